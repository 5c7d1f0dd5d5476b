"""Missing values: a linear-Gaussian model whose observed part has a known evidence, for every pattern of five columns."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from shared.hierarchies import LinearNormal, affine
from shared.parts import DECODERS, GUIDES_ON_AN_ENCODER, LIKELIHOODS, SHAPE
from torch import nn

import pyrovae as pv
from pyrovae import guides, likelihoods, nets, priors, uses

PATTERNS = torch.tensor(list(itertools.product([False, True], repeat=5)))  # all 32, the empty one included


class Posterior(guides.Guide):
    """The exact posterior given the observed columns: its precision is I + W_o^T W_o / s^2."""

    def __init__(self, weight, bias, scale):
        super().__init__(2)
        self.weight, self.bias, self.scale = weight, bias, scale

    def encode(self, x, context=None, *, observed=None):
        known = torch.ones_like(x) if observed is None else observed.to(x.dtype)
        return torch.cat([torch.where(known > 0, x, 0), known], -1)

    def distribution(self, parameters):
        x, known = parameters.chunk(2, -1)
        weight = known.unsqueeze(-1) * self.weight
        precision = torch.eye(2) + weight.mT @ weight / self.scale**2
        shift = ((x - self.bias).unsqueeze(-2) @ weight).squeeze(-2) / self.scale**2
        mean = torch.linalg.solve(precision, shift.unsqueeze(-1)).squeeze(-1)
        return dist.MultivariateNormal(mean, precision_matrix=precision)


class Linear:
    """z ~ N(0, I), x | z ~ N(W z + b, s^2 I); log p of any columns of x in closed form."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.W, self.b, self.s = (
            torch.randn(5, 2, generator=generator),
            torch.randn(5, generator=generator),
            0.6,
        )
        self.model = pv.GenerativeModel(
            priors.StandardNormal(2), LinearNormal(affine(self.W, self.b), (5,), self.s)
        ).double()
        self.guide = Posterior(self.W, self.b, self.s)

    def log_prob(self, x, observed):
        covariance = self.W @ self.W.T + self.s**2 * torch.eye(5)
        values = []
        for row, known in zip(x, observed, strict=True):
            if not known.any():
                values.append(torch.zeros(()))
                continue
            normal = dist.MultivariateNormal(self.b[known], covariance[known][:, known])
            values.append(normal.log_prob(row[known]))
        return torch.stack(values)


@pytest.fixture
def linear(double):
    return Linear()


@pytest.fixture
def data(linear):
    """All 32 patterns, with NaN for what is missing."""
    x = linear.model.generate(32)
    return torch.where(PATTERNS, x, torch.nan), PATTERNS


@pytest.mark.parametrize("options", [{}, {"data_batch_size": 5}, {"vectorize_particles": False}])
def test_the_exact_posterior_gives_the_evidence_of_what_is_observed(linear, data, options):
    x, observed = data
    weights = pv.log_weights(linear.model, linear.guide, x, observed=observed, num_particles=2, **options)
    assert torch.allclose(weights, linear.log_prob(x, observed).expand(2, 32), atol=1e-10)
    assert weights[:, 0].abs().max() < 1e-12  # nothing is observed: log p = 0
    as_numbers = pv.log_weights(linear.model, linear.guide, x, observed=observed.double(), num_particles=1, **options)
    assert torch.allclose(as_numbers[0], linear.log_prob(x, observed), atol=1e-10)


def test_what_is_missing_may_hold_anything(linear, data):
    x, observed = data
    results = []
    for unknown in (torch.nan, torch.inf, 1e300, 0.0):
        pyro.set_rng_seed(1)
        other = torch.where(observed, x, unknown)
        results.append(pv.log_weights(linear.model, linear.guide, other, observed=observed, num_particles=2))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("compile", [False, True])
def test_any_guide_estimates_the_evidence(linear, data, compile):
    """A guide that sees zeros, and is wrong: importance weights, annealing."""
    x, observed = data
    truth = linear.log_prob(x, observed).mean().item()
    guide = guides.MeanFieldNormal(nn.Identity(), 2, num_features=5)
    guide.head = affine(torch.zeros(4, 5), torch.zeros(4))  # the prior
    lml = pv.log_marginal_likelihood(
        linear.model, guide, x, observed=observed, num_particles=20_000, particle_batch_size=5000, compile=compile
    )
    within(lml.mean, truth, lml.mean_mc_stderr)


def test_annealing(linear, data):
    x, observed = (part[::3] for part in data)
    ais = pv.annealed_importance_sampling(
        linear.model, x, observed=observed, num_chains=100, num_temperatures=15, compile=False
    )
    within(ais.mean, linear.log_prob(x, observed).mean().item(), ais.mean_mc_stderr)
    with pytest.raises(ValueError, match="'x' is masked"):
        pv.bidirectional_monte_carlo(linear.model, x, observed=observed)


def test_gaps(linear, data):
    """Of a full-rank family nothing is lost after refinement: the whole gap is the encoder's."""
    x, observed = (part[::5] for part in data)
    guide = guides.FullRankNormal(nn.Identity(), 2, num_features=5)
    gaps = pv.inference_gaps(linear.model, guide, x, observed=observed, num_particles=1000, compile=False)
    assert torch.allclose(gaps.log_prob, linear.log_prob(x, observed), atol=0.05)
    assert (gaps.approximation.abs() < 0.1).all()


def test_uses(linear, data):
    x, observed = data
    code = linear.guide.posterior(x, observed=observed).mean
    assert torch.allclose(uses.embed(linear.guide, x, observed=observed), code)
    assert torch.allclose(
        uses.reconstruct(linear.model, linear.guide, x, observed=observed), code @ linear.W.T + linear.b
    )
    assert uses.sample_posterior(linear.guide, x, 3, observed=observed).shape == (3, 32, 2)


def test_training_on_data_with_gaps(double):
    """SVI on NaN with a mask: gradients are finite, and the fit recovers means and scales of columns half missing."""
    x = torch.tensor([1.0, -2.0, 5.0]) + torch.tensor([0.5, 2.0, 1.0]) * torch.randn(1500, 3)
    observed = torch.rand(1500, 3) < 0.5
    x = torch.where(observed, x, torch.nan)
    model = pv.GenerativeModel(
        priors.StandardNormal(1), likelihoods.HeteroscedasticNormal(nn.Linear(1, 6), 3, initial_scale=1.0)
    )
    guide = guides.MeanFieldNormal(nets.ConcatenateMask(nets.MLP(6, [8])), 1)
    Trace_ELBO().loss_and_grads(model, guide, x, observed=observed)
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(500):
        loss = svi.step(x, observed=observed)
    assert loss == loss
    draws = model.generate(40_000)
    known = [x[observed[:, column], column] for column in range(3)]
    for column, values in enumerate(known):
        # half of 1,500 values each: the mean has a standard error of sd / 27, the sd of sd / 39
        assert abs(draws[:, column].mean() - values.mean()) < 0.2 * values.std()
        assert draws[:, column].std() == pytest.approx(values.std().item(), rel=0.15)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_counts_what_is_observed_alone(name, double):
    """log p of a masked datum is the sum over its known elements; gradients do not see the rest."""
    make, draw = LIKELIHOODS[name]
    likelihood = make(DECODERS["MLP"]).double()
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihood).double()
    x, z = draw().double(), torch.randn(5, 2)
    if name == "DiscretizedLogistic":
        x = torch.randint(0, 256, x.shape) / 255
    if name == "Categorical":
        x = torch.randint(0, 7, x.shape) / 6
    observed = torch.rand(5, *SHAPE) < 0.6
    observed[0] = False
    holes = torch.where(observed, x, torch.nan)
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(holes, observed=observed)
    trace.compute_log_prob()
    elements = likelihood(z)
    while elements.event_shape:
        elements = elements.base_dist
    expected = (elements.log_prob(x) * observed).sum((1, 2, 3))
    found = trace.nodes["x"]["log_prob"]
    assert torch.allclose(found, expected)
    assert found[0] == 0
    assert trace.nodes["x"]["fn"].event_shape == SHAPE
    found.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in likelihood.parameters())
    everything = torch.ones_like(observed)
    full = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(x, observed=everything)
    plain = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(x)
    assert torch.allclose(full.log_prob_sum(), plain.log_prob_sum())


@pytest.mark.parametrize("name", GUIDES_ON_AN_ENCODER)
@pytest.mark.parametrize("sees_mask", [False, True])
def test_every_guide_sees_zeros(name, sees_mask):
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [4], 12), SHAPE))
    encoder = nets.ConcatenateMask(nets.MLP(24, [8])) if sees_mask else nets.MLP(12, [8])
    guide = GUIDES_ON_AN_ENCODER[name](encoder, model)
    x, observed = (torch.rand(4, *SHAPE) < 0.5) * 1.0, torch.rand(4, *SHAPE) < 0.5
    holes, zeros = torch.where(observed, x, torch.nan), torch.where(observed, x, 0)
    encoded = guide.encode(holes, observed=observed)
    assert encoded.isfinite().all()
    assert torch.equal(encoded, guide.encode(zeros, observed=observed))
    if name != "Refined":  # which raises the ELBO of what is observed
        assert torch.equal(encoded, guide.encode(zeros)) != sees_mask
    assert pv.log_weights(model, guide, holes, observed=observed, num_particles=3).isfinite().all()


def test_with_a_context():
    """Mask and context together, through every part that takes them."""
    model = pv.GenerativeModel(
        priors.StandardNormal(2), likelihoods.Bernoulli(nets.Concatenate(nets.MLP(5, [4], 12)), SHAPE)
    )
    guide = guides.MeanFieldNormal(nets.ConcatenateMask(nets.Concatenate(nets.MLP(27, [8]))), 2)
    x, observed, c = (torch.rand(4, *SHAPE) < 0.5) * 1.0, torch.rand(4, *SHAPE) < 0.5, torch.randn(4, 3)
    holes = torch.where(observed, x, torch.nan)
    weights = pv.log_weights(model, guide, holes, c, observed=observed, num_particles=6, data_batch_size=2)
    assert weights.isfinite().all()
    joined = torch.cat([torch.where(observed, x, 0).flatten(1), observed.flatten(1) * 1.0, c], 1)
    assert torch.allclose(guide.encode(holes, c, observed=observed), guide.head(guide.encoder_net.net.net(joined)))
    with pytest.raises(ValueError, match="takes a context as its second argument, and none was given"):
        guide(holes, observed=observed)


def test_hierarchies(double):
    model, guide = pv.two_layer_vae(SHAPE, latent_dims=(3, 2), hidden_features=(6, 5))
    x, observed = (torch.rand(4, *SHAPE) < 0.5) * 1.0, torch.rand(4, *SHAPE) < 0.5
    holes = torch.where(observed, x, torch.nan)
    assert pv.log_weights(model, guide, holes, observed=observed, num_particles=3).isfinite().all()


class Joint(likelihoods.Likelihood):
    """Elements that depend on each other given z."""

    def distribution(self, parameters):
        return dist.MultivariateNormal(parameters, torch.eye(3))

    def check(self, x):
        pass


def test_refusals(linear, data):
    x, observed = data
    for program in (linear.model, guides.MeanFieldNormal(nn.Identity(), 2, num_features=5)):
        with pytest.raises(ValueError, match=r"mask of the data's shape \(32, 5\).*found shape \(32,\)"):
            program(x, observed=observed[:, 0])
        with pytest.raises(ValueError, match="True or False"):
            program(x, observed=observed * 0.5)
        with pytest.raises(TypeError, match="observed must be a tensor"):
            program(x, observed=observed.numpy())
    joint = pv.GenerativeModel(priors.StandardNormal(2), Joint(nn.Linear(2, 3), 3))
    with pytest.raises(ValueError, match="Joint gives MultivariateNormal"):
        joint(torch.zeros(2, 3), observed=torch.ones(2, 3))
    with pytest.raises(ValueError, match="found 0.5"):  # what is known is checked as ever
        pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nn.Linear(2, 5), 5))(
            torch.full((2, 5), 0.5), observed=torch.ones(2, 5)
        )


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_nan_without_a_mask_is_an_error_that_says_how_to_mark_it(name):
    make, draw = LIKELIHOODS[name]
    model = pv.GenerativeModel(priors.StandardNormal(2), make(DECODERS["MLP"]))
    x = draw()
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"found nan.*observed=~x.isnan\(\)"):
        model(x)
