"""Models and guides of a context: a linear-Gaussian regression with known evidence, then one body over every part."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from shared.hierarchies import LinearNormal, affine
from shared.parts import (
    CONDITIONAL_PRIORS,
    CONTEXT_DIM,
    GUIDES,
    GUIDES_ON_AN_ENCODER,
    LATENT_DIM,
    SHAPE,
)
from torch import nn

import pyrovae as pv
from pyrovae import guides, likelihoods, nets, priors, uses


class Regression:
    """z | c ~ N(A c + a, diag s^2), x | z, c ~ N(W z + V c + b, t^2 I), and the exact posterior as a guide."""

    def __init__(self):
        generator = torch.Generator().manual_seed(11)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.A, self.a, self.s = draw(2, 3), draw(2), torch.tensor([0.6, 1.4])
        self.W, self.V, self.b, self.t = draw(5, 2), draw(5, 3), draw(5), 0.7
        prior = priors.DiagonalNormal(2, context_net=nn.Identity(), num_features=3)
        prior.head.weight = nn.Parameter(torch.cat([self.A, torch.zeros(2, 3)]))
        prior.loc, prior.log_scale = nn.Parameter(self.a.clone()), nn.Parameter(self.s.log())
        likelihood = LinearNormal(nets.Concatenate(affine(torch.cat([self.W, self.V], 1), self.b)), (5,), self.t)
        self.model = pv.GenerativeModel(prior, likelihood)
        self.covariance = torch.linalg.inv((self.s**-2).diag() + self.W.T @ self.W / self.t**2)
        # E[z|x,c] = C (S^-2 (A c + a) + W^T (x - V c - b) / t^2), linear in x and c
        of_x = self.covariance @ self.W.T / self.t**2
        of_c = self.covariance @ (self.s**-2).diag() @ self.A - of_x @ self.V
        constant = self.covariance @ (self.s**-2 * self.a) - of_x @ self.b
        self.mean = affine(torch.cat([of_x, of_c], 1), constant)
        factor = torch.linalg.cholesky(self.covariance)
        self.guide = guides.FullRankNormal(self.joined(), 2, num_features=8)
        self.guide.head = affine(
            torch.cat([self.mean.weight, torch.zeros(3, 8)]),
            torch.cat([constant, factor.diagonal().log(), factor[1, :1]]),
        )
        self.mean_field = guides.MeanFieldNormal(self.joined(), 2, num_features=8)
        self.mean_field.head = affine(
            torch.cat([self.mean.weight, torch.zeros(2, 8)]), torch.cat([constant, factor.diagonal().log()])
        )

    @staticmethod
    def joined():
        return nets.Concatenate(nn.Identity(), in_features=8)

    def data(self, num_data):
        c = torch.randn(num_data, 3)
        return self.model.generate(num_data, context=c), c

    def log_prob(self, x, c):
        loc = (c @ self.A.T + self.a) @ self.W.T + c @ self.V.T + self.b
        covariance = self.W @ (self.s**2).diag() @ self.W.T + self.t**2 * torch.eye(5)
        return dist.MultivariateNormal(loc, covariance).log_prob(x)


@pytest.fixture
def regression(double):
    return Regression()


@pytest.mark.parametrize("options", [{}, {"data_batch_size": 7}, {"vectorize_particles": False}])
def test_the_exact_posterior_gives_the_evidence_with_one_particle(regression, options):
    x, c = regression.data(40)
    weights = pv.log_weights(regression.model, regression.guide, x, c, num_particles=1, **options)
    assert torch.allclose(weights[0], regression.log_prob(x, c), atol=1e-10)


@pytest.mark.parametrize("compile", [False, True])
def test_importance_sampling_is_right(regression, compile):
    x, c = regression.data(20)
    lml = pv.log_marginal_likelihood(regression.model, regression.mean_field, x, c, num_particles=4000, compile=compile)
    within(lml.mean, regression.log_prob(x, c).mean().item(), lml.mean_mc_stderr)
    shuffled = pv.log_marginal_likelihood(regression.model, regression.mean_field, x, c.flip(0), num_particles=4000)
    assert (shuffled.mean - lml.mean) < -1  # the context matters
    comparison = pv.compare({"right": lml, "wrong": shuffled})
    assert comparison.rows[0].name == "right"


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_annealing_is_right(regression, start):
    x, c = regression.data(6)
    guide = {"prior": None, "guide": regression.mean_field}[start]
    ais = pv.annealed_importance_sampling(
        regression.model, x, c, guide=guide, num_chains=150, num_temperatures=15, compile=False
    )
    within(ais.mean, regression.log_prob(x, c).mean().item(), ais.mean_mc_stderr)


def test_the_sandwich_holds_the_evidence_of_data_simulated_under_the_context(regression):
    c = torch.randn(6, 3)
    both = pv.bidirectional_monte_carlo(
        regression.model, torch.zeros(6, 5), c, num_chains=60, num_temperatures=15, compile=False
    )
    truth = regression.log_prob(both.data["x"], c)
    assert (both.lower - truth).mean() < 4.5 * both.lower_stderr.norm() / 6
    assert (both.upper - truth).mean() > -4.5 * both.upper_stderr.norm() / 6
    assert -0.5 < both.width.mean() < 1


def test_gaps_are_right(regression):
    """The best diagonal normal has variances 1 / precision, and KL = 1/2 (sum log precision_dd - log det precision)."""
    x, c = regression.data(5)
    regression.mean_field.head.bias.data[:2] += 0.3  # an encoder that errs
    gaps = pv.inference_gaps(regression.model, regression.mean_field, x, c, num_particles=2000, compile=False)
    precision = torch.linalg.inv(regression.covariance)
    best = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()
    within(gaps.log_prob.mean().item(), regression.log_prob(x, c).mean().item(), gaps.stderr.norm().item() / 5)
    assert gaps.approximation.mean().item() == pytest.approx(best, abs=0.1)
    assert (gaps.amortization > 0.02).all()


def test_calibration_of_the_exact_posterior(regression):
    calibration = pv.simulation_based_calibration(
        regression.model, regression.guide, torch.zeros(400, 5), torch.randn(400, 3), num_draws=19
    )
    ranks = calibration.ranks.double()
    # Ranks are uniform on 0 ... 19: mean 9.5, variance (20^2 - 1) / 12.
    within(ranks[:, 0].mean().item(), 9.5, (399 / 12 / 400) ** 0.5)


def test_uses_of_a_conditional_pair(regression):
    x, c = regression.data(9)
    model, guide = regression.model, regression.guide
    code = regression.mean(torch.cat([x, c], 1))

    def picture(z, c):
        return z @ regression.W.T + c @ regression.V.T + regression.b

    assert torch.allclose(uses.embed(guide, x, context=c), code)
    assert torch.allclose(guide.posterior(x, c).mean, code)
    assert torch.allclose(uses.reconstruct(model, guide, x, context=c), picture(code, c))
    assert uses.reconstruct(model, guide, x, context=c, mean=False).shape == (9, 5)
    draws = uses.sample_posterior(guide, x, 4, context=c)
    assert torch.allclose(model.decode(draws, context=c), picture(draws, c))
    assert torch.allclose(model.decode(draws, context=c[:1]), picture(draws, c[:1]))
    assert torch.allclose(model.decode(code[0], context=c[:1]), picture(code[0], c[0]))
    assert torch.allclose(model.decode(code[0], context=c), picture(code[0], c))  # one code in all contexts
    way = uses.interpolate(model, guide, x, x.flip(0), 3, context=c)
    assert torch.allclose(way[:, 0], picture(code, c))
    middle = (code + regression.mean(torch.cat([x.flip(0), c], 1))) / 2
    assert torch.allclose(way[:, 1], picture(middle, c))
    steps = uses.traverse(model, code, 1, [-1.0, 2.0], context=c)
    assert torch.allclose(steps[:, 1], picture(torch.stack([code[:, 0], torch.full((9,), 2.0)], 1), c))
    mask = torch.arange(9) % 2 == 0
    direction = uses.attribute_direction(guide, x, mask, context=c)
    assert torch.allclose(direction, code[mask].mean(0) - code[~mask].mean(0))
    assert torch.allclose(
        uses.edit(model, guide, x, direction, [0.0, 1.0], context=c)[:, 1], picture(code + direction, c)
    )


def test_generation_follows_the_context(regression):
    c = torch.tensor([[1.0, -2.0, 0.5]])
    x = regression.model.generate(20_000, context=c)
    loc = (c @ regression.A.T + regression.a) @ regression.W.T + c @ regression.V.T + regression.b
    variance = (regression.W**2 @ regression.s**2 + regression.t**2).tolist()
    for column in range(5):
        within(x[:, column].mean().item(), loc[0, column].item(), (variance[column] / 20_000) ** 0.5)
        within(x[:, column].var().item(), variance[column], variance[column] * (2 / 20_000) ** 0.5)


def test_training_finds_the_regression(double):
    """A model and a guide that hold the truth reach its evidence by Pyro's SVI."""
    truth = Regression()
    x, c = truth.data(1000)
    prior = priors.DiagonalNormal(2, context_net=nn.Identity(), num_features=3)
    likelihood = likelihoods.LearnedScaleNormal(nets.Concatenate(nn.Linear(2 + 3, 5)), 5)
    model = pv.GenerativeModel(prior, likelihood)
    guide = guides.FullRankNormal(Regression.joined(), 2, num_features=8)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.2, "lrd": 0.995}), Trace_ELBO())
    losses = [svi.step(x, c) / len(x) for _ in range(800)]
    # The best fit lies above the truth by half a nat per parameter, here about 0.02 nats per datum.
    assert -sum(losses[-50:]) / 50 == pytest.approx(truth.log_prob(x, c).mean().item(), abs=0.05)


# --- every part -------------------------------------------------------------------------------------------------------


def make(prior, guide):
    """A conditional pair: the context reaches the prior (if it is conditional), the decoder and the encoder."""
    encoder = nets.Concatenate(nets.MLP(12 + CONTEXT_DIM, [8]))
    likelihood = likelihoods.Bernoulli(nets.Concatenate(nets.MLP(LATENT_DIM + CONTEXT_DIM, [8], 12)), SHAPE)
    prior = CONDITIONAL_PRIORS[prior]() if prior in CONDITIONAL_PRIORS else priors.StandardNormal(LATENT_DIM)
    model = pv.GenerativeModel(prior, likelihood)
    return model, GUIDES_ON_AN_ENCODER[guide](encoder, model)


PAIRS = [
    *((prior, "MeanFieldNormal") for prior in (*CONDITIONAL_PRIORS, "StandardNormal")),
    *(("DiagonalNormal", guide) for guide in GUIDES_ON_AN_ENCODER if guide != "MeanFieldNormal"),
]


def test_every_part_is_listed():
    conditional = {n for n in priors.__all__ if issubclass(getattr(priors, n), priors.ConditionalPrior)}
    assert conditional - {"ConditionalPrior", "FlowPrior"} == set(CONDITIONAL_PRIORS)
    assert set(GUIDES_ON_AN_ENCODER) == set(GUIDES)


@pytest.fixture
def batch():
    return (torch.rand(5, *SHAPE) < 0.5) * 1.0, torch.randn(5, CONTEXT_DIM)


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_pair(prior, guide, batch, tmp_path, double, uncompiled):
    x, c = (part.double() for part in batch)
    names = prior, guide
    model, guide = (part.double() for part in make(*names))

    guide_trace = poutine.trace(guide).get_trace(x, c)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x, c)
    assert model_trace.nodes["z"]["value"].shape == (5, LATENT_DIM)
    assert model_trace.nodes["x"]["fn"].batch_shape == (5,)
    assert guide.posterior(x, c).mean.shape == (5, LATENT_DIM)

    # Each datum depends on its own row of the context: change one, and log p(x, z | c) of the others stays.
    changed = c.clone()
    changed[1] += 1
    model_trace.compute_log_prob()
    other = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x, changed)
    other.compute_log_prob()
    moved = [site for site in ("z", "x") if site == "x" or prior in CONDITIONAL_PRIORS]
    for site in moved:
        difference = (other.nodes[site]["log_prob"] - model_trace.nodes[site]["log_prob"]).abs() > 1e-9
        assert difference.tolist() == [False, True, False, False, False], site
    rows = (guide.encode(x, changed) - guide.encode(x, c)).abs().amax(1) > 1e-9
    assert rows.tolist() == [False, True, False, False, False]

    if names[1] != "DefensiveMixture":  # not reparameterised
        Trace_ELBO().loss_and_grads(model, guide, x, c)
    else:
        Trace_ELBO(num_particles=20).loss_and_grads(model, guide, x, c)
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name

    assert model.generate(6, context=torch.randn(6, CONTEXT_DIM)).shape == (6, *SHAPE)
    one = torch.randn(1, CONTEXT_DIM)
    means = []
    for context in (one, one.expand(6, -1), one + 2):
        pyro.set_rng_seed(3)
        means.append(model.generate(6, mean=True, context=context))
    assert torch.equal(means[0], means[1])
    assert not torch.allclose(means[0], means[2])

    pv.save(tmp_path / "pair.pt", model, guide)
    other_model, other_guide = (part.double() for part in make(*names))
    pv.load(tmp_path / "pair.pt", other_model, other_guide)
    weights = []
    options = {"num_particles": 6, "particle_batch_size": 2}
    for pair, compile in (((model, guide), False), ((other_model, other_guide), False), ((model, guide), True)):
        pyro.set_rng_seed(8)
        weights.append(pv.log_weights(*pair, x, c, compile=compile, **options))
    assert weights[0].shape == (6, 5)
    assert torch.equal(weights[0], weights[1])
    assert torch.allclose(weights[0], weights[2], atol=1e-8)


@pytest.mark.parametrize("name", CONDITIONAL_PRIORS)
def test_conditional_prior_density(name, double):
    """For each context, the density integrates to 1 on a grid and its moments are those of the draws."""
    prior = CONDITIONAL_PRIORS[name]().double()
    with torch.no_grad():
        for parameter in prior.parameters():  # so that contexts differ
            parameter += 0.1 * torch.randn_like(parameter)
        distribution = prior(torch.randn(2, CONTEXT_DIM))
        assert distribution.batch_shape == (2,)
        assert distribution.event_shape == (LATENT_DIM,)
        axis = torch.linspace(-16, 16, 801)
        grid = torch.cartesian_prod(axis, axis).unsqueeze(1)
        density = distribution.log_prob(grid).exp() * (axis[1] - axis[0]) ** 2
        assert torch.allclose(density.sum(0), torch.ones(2), atol=1e-3)
        assert (density[:, 0] - density[:, 1]).abs().sum() > 1e-3
        draws = distribution.sample((20_000,))
        for datum in range(2):
            for axis_index in range(2):
                for power in (1, 2):
                    moment = (density[:, datum] * grid[:, 0, axis_index] ** power).sum().item()
                    powered = draws[:, datum, axis_index] ** power
                    within(powered.mean().item(), moment, powered.std().item() / math.sqrt(20_000) + 1e-3)


@pytest.mark.parametrize("top_down", [False, True])
def test_hierarchies_take_a_context(top_down, batch, double):
    """The context reaches the top, a layer, the decoder and the encoder."""
    x, c = (part.double() for part in batch)

    def joined(width, hidden, out=None):
        return nets.Concatenate(nets.MLP(width + CONTEXT_DIM, [hidden], out))

    model = pv.HierarchicalModel(
        CONDITIONAL_PRIORS["DiagonalNormal"](),
        [pv.ConditionalNormal(joined(2, 6), 4)],
        likelihoods.Bernoulli(joined(4, 6, 12), SHAPE),
    )
    if top_down:
        guide = pv.TopDownGuide(
            guides.MeanFieldNormal(joined(12, 8), 2), [pv.ConditionalNormal(nets.MLP(2 + 8, [6]), 4)], joined(12, 8)
        )
    else:
        guide = pv.BottomUpGuide(guides.MeanFieldNormal(joined(12, 8), 4), [pv.ConditionalNormal(nets.MLP(4, [6]), 2)])
    Trace_ELBO().loss_and_grads(model, guide, x, c)
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert pv.log_weights(model, guide, x, c, num_particles=4).shape == (4, 5)
    assert model.generate(3, context=c[:3]).shape == (3, *SHAPE)
    assert model.decode(torch.zeros(7, 5, 6), context=c).shape == (7, 5, *SHAPE)
    assert model.decode(torch.zeros(5, 2), context=c).shape == (5, *SHAPE)  # the top alone
    # log p(x, z | c), layer by layer, by hand
    z2, z1 = torch.randn(5, 2), torch.randn(5, 4)
    trace = poutine.trace(poutine.condition(model, data={"z1": z1, "z2": z2})).get_trace(x, c)
    by_hand = (
        model.prior(c).log_prob(z2).sum()
        + model.layers[0](z2, context=c).log_prob(z1).sum()
        + model.likelihood(z1, c).log_prob(x).sum()
    )
    assert torch.allclose(trace.log_prob_sum(), by_hand)


class ImagesWithLabels(nn.Module):
    """A network of two arguments: an image, and labels (N,) or images (N, 1, 2, 3) as they are."""

    def __init__(self, num_inputs, out_features):
        super().__init__()
        self.linear, self.out_features = nn.Linear(num_inputs, out_features), out_features

    def forward(self, x, context):
        return self.linear(torch.cat([x.flatten(1), context.flatten(1)], 1))


@pytest.mark.parametrize("kind", ["labels", "covariates", "images"])
def test_kinds_of_context(kind, batch):
    """All kinds, through prior, decoder and encoder, particles and blocks of data."""
    x = batch[0]
    context = {
        "labels": torch.tensor([3, 1, 4, 1, 0]),
        "covariates": torch.randn(5, 3),
        "images": torch.rand(5, 1, 2, 3),
    }[kind]
    width = {"labels": 5, "covariates": 3, "images": 6}[kind]
    if kind == "images":
        encoder, decoder = ImagesWithLabels(12 + width, 8), ImagesWithLabels(2 + width, 12)
    else:
        num_classes = 5 if kind == "labels" else None
        encoder = nets.Concatenate(nets.MLP(12 + width, [8]), num_classes=num_classes)
        decoder = nets.Concatenate(nets.MLP(2 + width, [8], 12), num_classes=num_classes)
    of_context = nn.Embedding(5, 4) if kind == "labels" else nets.MLP(width, [4])
    prior = priors.DiagonalNormal(2, context_net=of_context)
    model = pv.GenerativeModel(prior, likelihoods.Bernoulli(decoder, SHAPE))
    guide = guides.MeanFieldNormal(encoder, 2)
    weights = pv.log_weights(model, guide, x, context, num_particles=40, data_batch_size=2, particle_batch_size=10)
    assert weights.shape == (40, 5)
    z = torch.randn(3, 5, 2)
    apart = torch.stack([model.likelihood(z[:, n : n + 1], context[n : n + 1]).mean[:, 0] for n in range(5)], 1)
    assert torch.allclose(model.decode(z, context=context), apart, atol=1e-6)
    assert model.generate(4, context=context[:1]).shape == (4, *SHAPE)
    if kind == "labels":
        assert model.generate(4, context=torch.tensor(3)).shape == (4, *SHAPE)


def test_concatenate_finds_the_datum():
    net = nets.Concatenate(nn.Linear(12 + 3, 2))
    images, z, context = torch.randn(4, 1, 4, 3), torch.randn(4, 4, 12), torch.randn(4, 3)
    assert torch.equal(net(images, context), net.net(torch.cat([images.flatten(1), context], 1)))
    # As many particles as data: the last dimension is the datum, the one before it the data.
    assert torch.equal(net(z, context), net.net(torch.cat([z, context.expand(4, 4, 3)], -1)))
    labelled = nets.Concatenate(nn.Linear(12 + 4, 2), num_classes=4)
    one_hot = torch.eye(4)[torch.tensor([2, 0, 3, 3])]
    assert torch.equal(
        labelled(images, torch.tensor([2, 0, 3, 3])), labelled.net(torch.cat([images.flatten(1), one_hot], 1))
    )
    assert torch.equal(labelled(images, torch.tensor([2.0, 0, 3, 3])), labelled(images, torch.tensor([2, 0, 3, 3])))
    assert nets.Concatenate(nn.Sequential(nn.Flatten(), nn.Linear(7, 3))).num_inputs == 7


# --- what is refused --------------------------------------------------------------------------------------------------


def plain_pair():
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(LATENT_DIM, [4], 12), SHAPE))
    return model, guides.MeanFieldNormal(nets.MLP(12, [4]), 2)


def test_a_context_that_no_part_uses_is_refused(batch):
    x, c = batch
    model, guide = plain_pair()
    for call in (
        lambda: model(x, c),
        lambda: pv.log_weights(model, guide, x, c),
        lambda: model.generate(5, context=c),
        lambda: model.decode(torch.zeros(5, 2), context=c),
    ):
        with pytest.raises(ValueError, match=r"neither its prior \(StandardNormal\) nor its likelihood \(Bernoulli\)"):
            call()


def test_a_guide_may_leave_the_context_out(batch):
    x, c = batch
    model, _ = make("DiagonalNormal", "MeanFieldNormal")
    guide = plain_pair()[1]
    assert torch.equal(guide.encode(x, c), guide.encode(x))
    assert pv.log_weights(model, guide, x, c, num_particles=3).shape == (3, 5)


@pytest.mark.parametrize("prior", ["DiagonalNormal", "StandardNormal"])
def test_a_missing_context_is_refused(prior, batch):
    x, _ = batch
    model, guide = make(prior, "MeanFieldNormal")
    with pytest.raises(ValueError, match=r"no context was given|Concatenate takes a context as its second argument"):
        model(x)
    with pytest.raises(ValueError, match=r"Concatenate takes a context as its second argument, and none was given"):
        guide(x)
    with pytest.raises(ValueError, match="none was given|no context was given"):
        model.generate(3)


def test_another_number_of_rows_is_refused(batch):
    x, c = batch
    model, guide = make("DiagonalNormal", "MeanFieldNormal")
    match = r"one row for each of the 5 data, found shape \(4, 3\)"
    for call in (
        lambda: model(x, c[:4]),
        lambda: guide(x, c[:4]),
        lambda: guide.posterior(x, c[:4]),
        lambda: uses.embed(guide, x, context=c[:4]),
        lambda: model.generate(5, context=c[:4]),
        lambda: pv.log_weights(model, guide, x, c[:4]),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(ValueError, match="do not belong together"):
        model.decode(torch.zeros(3, 5, 2), context=c[:4])
    with pytest.raises(TypeError, match="the context must be a tensor"):
        model(x, c.numpy())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: nets.Concatenate(nn.Identity()), ValueError, "pass in_features="),
        (lambda: nets.Concatenate(nn.Linear(3, 1))(torch.zeros(2, 1), torch.zeros(2, 3)), ValueError, "alone has 3"),
        (lambda: nets.Concatenate(nn.Linear(5, 1))(torch.zeros(2, 1), torch.zeros(2, 3)), ValueError, "trailing dim"),
        (lambda: nets.Concatenate(nn.Linear(5, 1))(torch.zeros(2, 2), torch.zeros(3, 3)), ValueError, "has 2 rows"),
        (
            lambda: nets.Concatenate(nn.Linear(5, 1))(torch.zeros(2, 4), torch.tensor([0, 1])),
            ValueError,
            "pass num_classes=",
        ),
        (
            lambda: nets.Concatenate(nn.Linear(5, 1), num_classes=3)(torch.zeros(2, 2), torch.tensor([0, 3])),
            ValueError,
            "from 0 to 2, found 3",
        ),
        (lambda: priors.DiagonalNormal(2)(torch.zeros(3, 1)), ValueError, "would leave the context out"),
        (
            lambda: priors.VampPrior(guides.MeanFieldNormal(nets.Concatenate(nets.MLP(5, [4])), 2), torch.rand(3, 2)),
            ValueError,
            "pseudo-inputs, which have no context",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_defensive_mixture_takes_conditional_priors_of_the_library_alone():
    class OfContext(nn.Module):
        latent_dim = 2

        def forward(self, context):
            return dist.Normal(context[:, :2], 1.0).to_event(1)

    guide = guides.MeanFieldNormal(nets.MLP(12, [4]), 2)
    with pytest.raises(TypeError, match="ConditionalPrior"):
        guides.DefensiveMixture(guide, OfContext())
    # As the prior of a model it needs no base class.
    model = pv.GenerativeModel(OfContext(), likelihoods.Bernoulli(nets.MLP(2, [4], 12), SHAPE))
    x = model.generate(4, context=torch.randn(4, 3))
    assert pv.log_weights(model, guide, x, torch.randn(4, 3), num_particles=2).shape == (2, 4)
    with pytest.raises(ValueError, match="the prior OfContext takes a context, and none was given"):
        model(x)
