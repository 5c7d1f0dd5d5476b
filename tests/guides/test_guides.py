"""Guides against closed forms and grids: each family reaches its best member, each density is that of its draws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from shared.parts import GUIDES, SHAPE
from torch import nn

import pyrovae as pv
from pyrovae import guides, likelihoods, nets, priors
from pyrovae.compiled.record import record
from pyrovae.distributions.zuko_adapter import import_zuko
from pyrovae.training.losses import surrogate

FLOWS = ["InverseAutoregressiveFlow", "NeuralSplineFlow"]


def stirred(name, seed=0):
    """A guide of `tests/shared/parts.py` with weights far from where it starts, where maps near the identity hide mistakes."""
    torch.manual_seed(seed)
    guide = GUIDES[name]().to(torch.get_default_dtype())
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return guide


class SufficientStatistic(nn.Module):
    """x -> the posterior mean of the linear-Gaussian model: an encoder that leaves the family alone to be at fault."""

    out_features = 3

    def __init__(self, linear_gaussian):
        super().__init__()
        self.mean = linear_gaussian.posterior_mean

    def forward(self, x):
        return self.mean(x)


# The posterior's covariance is its least eigenvalue times I plus a matrix of rank 2.
NORMALS = {
    "MeanFieldNormal": lambda net: guides.MeanFieldNormal(net, 3),
    "FullRankNormal": lambda net: guides.FullRankNormal(net, 3),
    "LowRankNormal": lambda net: guides.LowRankNormal(net, 3, rank=2),
}


def true_gap(linear_gaussian, posterior, x):
    """KL(q || p(z|x)) per datum, in closed form."""
    covariance = (
        posterior.variance.diag_embed() if isinstance(posterior, dist.Independent) else posterior.covariance_matrix
    )
    exact = dist.MultivariateNormal(linear_gaussian.posterior_mean(x), linear_gaussian.covariance)
    return torch.distributions.kl_divergence(dist.MultivariateNormal(posterior.mean, covariance), exact)


@pytest.mark.parametrize("name", NORMALS)
def test_best_of_a_family(name, linear_gaussian):
    """Without noise: the least KL over a family is the mean field's closed form, and 0 where the family has the posterior."""
    x = linear_gaussian.data(20)
    guide = NORMALS[name](SufficientStatistic(linear_gaussian))
    optimizer = torch.optim.LBFGS(
        guide.parameters(), max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-14
    )

    def loss():
        optimizer.zero_grad()
        value = true_gap(linear_gaussian, guide.posterior(x), x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    least = linear_gaussian.mean_field_gap() if name == "MeanFieldNormal" else 0.0
    assert linear_gaussian.mean_field_gap() > 0.2
    assert loss().item() == pytest.approx(least, abs=1e-5)


@pytest.mark.parametrize("name", ["FullRankNormal", "LowRankNormal"])
def test_training_reaches_the_posterior(name, linear_gaussian):
    """The same by noisy gradients of the ELBO: a gap below 0.01 nats, where the mean field's is 0.29."""
    x = linear_gaussian.data(100)
    guide = NORMALS[name](SufficientStatistic(linear_gaussian))
    loss = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    pv.fit(linear_gaussian.model, guide, x, epochs=300, batch_size=100, learning_rate=0.1, loss=loss, progress=False)
    assert true_gap(linear_gaussian, guide.posterior(x), x).mean().item() < 0.01
    lml = pv.log_marginal_likelihood(linear_gaussian.model, guide, x, num_particles=200)
    within(lml.mean, linear_gaussian.log_prob(x).mean().item(), lml.mean_mc_stderr)


class Banana:
    """z ~ N(0, I_2), x | z ~ N(z_2 + z_1^2 / 2, 0.4), x = 1: a bent posterior, known on a grid."""

    def __init__(self):
        self.x = torch.ones(1, 1)
        axis = torch.linspace(-6, 6, 401)
        self.grid = torch.cartesian_prod(axis, axis)
        self.cell = ((axis[1] - axis[0]) ** 2).item()
        log_joint = dist.Normal(0.0, 1.0).log_prob(self.grid).sum(-1) + self.likelihood(self.grid).log_prob(self.x)
        self.evidence = torch.logsumexp(log_joint, 0).item() + math.log(self.cell)
        self.log_posterior = log_joint - self.evidence

    @staticmethod
    def likelihood(z):
        return dist.Normal(z[..., 1:] + z[..., :1] ** 2 / 2, 0.4).to_event(1)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", self.likelihood(z), obs=x)

    def train(self, guide):
        with torch.no_grad():  # from the middle: elsewhere a flow may settle in half of the banana
            guide.head.weight[:2] = guide.head.bias[:2] = 0
        loss = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
        pv.fit(self.model, guide, self.x, epochs=300, batch_size=1, learning_rate=0.05, loss=loss, progress=False)

    @torch.no_grad()
    def gap(self, guide):
        log_q = guide.posterior(self.x).log_prob(self.grid.unsqueeze(1)).squeeze(1)
        return (log_q.exp() * (log_q - self.log_posterior)).sum().item() * self.cell


@pytest.mark.parametrize("name", FLOWS)
def test_flows_bend(name, double):
    """Trained on a bent posterior, a flow leaves a tenth of a normal's gap; its evidence and its ELBO are the grid's."""
    banana = Banana()
    flow = getattr(guides, name)(nn.Identity(), 2, num_features=1, hidden_features=(32,), num_context=2)
    banana.train(flow)
    assert banana.gap(flow) < 0.1
    lml = pv.log_marginal_likelihood(banana.model, flow, banana.x, num_particles=4000)
    within(lml.mean, banana.evidence, lml.mean_mc_stderr)
    within(lml.elbo.item(), banana.evidence - banana.gap(flow), lml.elbo_stderr.item())


def test_normals_do_not_bend(double):
    banana = Banana()
    normal = guides.FullRankNormal(nn.Identity(), 2, num_features=1)
    banana.train(normal)
    assert banana.gap(normal) == pytest.approx(0.417, abs=0.02)


def test_normals_of_their_parameters(double):
    """Mean and covariance are those of the docstrings, for numbers put in by hand."""
    net = nets.MLP(12, [8])
    loc, log_scale, triangle = (
        torch.tensor([1.0, -2.0, 0.5]),
        torch.tensor([0.1, -0.7, 0.3]),
        torch.tensor([0.4, -0.2, 0.9]),
    )
    factor = torch.diag(log_scale.exp())
    factor[1, 0], factor[2, 0], factor[2, 1] = triangle
    full = guides.FullRankNormal(net, 3).distribution(torch.cat([loc, log_scale, triangle]).unsqueeze(0))
    assert torch.allclose(full.mean, loc)
    assert torch.allclose(full.covariance_matrix, factor @ factor.T)
    directions = torch.tensor([[0.3, 1.0], [-0.5, 0.2], [0.8, 0.0]])
    low = guides.LowRankNormal(net, 3, rank=2).distribution(
        torch.cat([loc, log_scale, directions.flatten()]).unsqueeze(0)
    )
    assert torch.allclose(low.mean, loc)
    assert torch.allclose(low.covariance_matrix, directions @ directions.T + torch.diag((2 * log_scale).exp()))


@pytest.mark.parametrize("name", FLOWS)
def test_flows_scale_and_shift_last(name, double):
    """z = mu + sigma f(noise): another mu and sigma move the same draws, whatever f makes of the noise."""
    guide = stirred(name)
    loc, log_scale, context = torch.tensor([3.0, -1.0]), torch.tensor([0.7, -0.4]), torch.randn(4)
    draws = []
    for parameters in ((torch.zeros(2), torch.zeros(2), context), (loc, log_scale, context)):
        torch.manual_seed(2)
        draws.append(guide.distribution(torch.cat(parameters).unsqueeze(0)).rsample((50,)))
    assert torch.allclose(draws[1], loc + log_scale.exp() * draws[0])
    assert not torch.allclose(draws[0].std(), torch.tensor(1.0), atol=0.01)


@pytest.mark.parametrize("name", GUIDES)
def test_draws_and_density_agree(name, double):
    """Moments of draws, third ones and the mixed one too, are those of the density on a grid."""
    guide = stirred(name)
    with torch.no_grad():
        posterior = guide.posterior(torch.rand(1, *SHAPE))
        draws = posterior.sample((20_000,)).squeeze(1)
        center, spread = draws.mean(0), 9 * draws.std(0)
        axes = [torch.linspace(m - s, m + s, 251) for m, s in zip(center.tolist(), spread.tolist(), strict=True)]
        grid = torch.cartesian_prod(*axes)
        mass = posterior.log_prob(grid.unsqueeze(1)).exp().squeeze(1) * math.prod(a[1] - a[0] for a in axes)
    assert mass.sum().item() == pytest.approx(1, abs=3e-3)  # a spline's density has kinks: 1.6e-3 off at one of them
    for powers in ((1, 0), (0, 1), (2, 0), (0, 2), (1, 1), (3, 0), (2, 1)):
        exponents = torch.tensor(powers)
        moment = (((grid - center) ** exponents).prod(-1) * mass).sum().item()
        powered = ((draws - center) ** exponents).prod(-1)
        # The center is the draws' own mean; the grid's error is of order 1e-4 of the moment's scale.
        within(
            powered.mean().item(), moment, powered.std().item() / math.sqrt(20_000) + 1e-4 * powered.abs().mean().item()
        )
    # The mean of a flow is the average of 128 spread points, good to a few hundredths of the spread.
    assert torch.allclose(posterior.mean[0], (grid * mass.unsqueeze(-1)).sum(0), atol=0.03 * draws.std(0).max().item())


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("latent_dim", [1, 2, 7])
def test_flows_invert(name, latent_dim, double):
    """The density that comes with a draw is that of its value, by inversion and by the Jacobian; and so its gradients."""
    guide = getattr(guides, name)(nets.MLP(4, [8]), latent_dim, hidden_features=(16,), num_context=3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    encoded = guide.encode(torch.rand(3, 4)).detach().requires_grad_()
    drawn = guide.distribution(encoded).expand((6, 3))
    z = drawn.rsample()
    with_draw = drawn.log_prob(z)
    by_inversion = guide.distribution(encoded).log_prob(z + 0)
    assert torch.allclose(with_draw, by_inversion, rtol=0, atol=1e-8)
    for first, second in zip(
        torch.autograd.grad(with_draw.sum(), encoded, retain_graph=True),
        torch.autograd.grad(by_inversion.sum(), encoded),
        strict=True,
    ):
        assert torch.allclose(first, second, atol=1e-6)

    def draw(noise, row):
        flow = guide.distribution(row.unsqueeze(0)).flow
        return flow.transform.inv(noise.unsqueeze(0))[0]

    noise, row = torch.randn(latent_dim), encoded[1].detach()
    jacobian = torch.autograd.functional.jacobian(lambda noise: draw(noise, row), noise)
    expected = dist.Normal(0.0, 1.0).log_prob(noise).sum() - torch.linalg.slogdet(jacobian).logabsdet
    value = draw(noise, row).detach()
    assert guide.distribution(row.unsqueeze(0)).log_prob(value).item() == pytest.approx(expected.item(), abs=1e-8)


@pytest.mark.parametrize("name", FLOWS)
def test_flows_do_not_invert_in_training(name, monkeypatch):
    """An ELBO and a draw of log weights ask for no inverse: 40 passes in place of one."""
    guide = getattr(guides, name)(nets.MLP(12, [8]), 40, hidden_features=(40,))

    def refuse(self, y):
        raise AssertionError("inverted")

    monkeypatch.setattr(import_zuko().transforms.AutoregressiveTransform, "_inverse", refuse)
    model = pv.GenerativeModel(priors.StandardNormal(40), likelihoods.Bernoulli(nets.MLP(40, [8], 12), SHAPE))
    x = model.generate(5)
    Trace_ELBO().loss_and_grads(model, guide, x)
    Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1).loss_and_grads(model, guide, x)
    with torch.no_grad():
        traced = poutine.trace(guide).get_trace(x).nodes["z"]
        traced["fn"].log_prob(traced["value"])
    with pytest.raises(AssertionError, match="inverted"):
        guide.posterior(x).log_prob(torch.zeros(5, 40))


@pytest.mark.parametrize("name", [name for name in GUIDES if name not in ("Refined", "DefensiveMixture")])
def test_guides_start_where_the_mean_field_does(name, double):
    """Informative means and scales near 1/e from the first step on, whatever else the family can do."""
    torch.manual_seed(0)
    guide = GUIDES[name]().double()
    x = torch.rand(50, *SHAPE)
    with torch.no_grad():
        posterior = guide.posterior(x)
        loc, log_scale = guide.encode(x)[:, :2], guide.encode(x)[:, 2:4]
        normal = dist.Normal(loc, log_scale.exp()).to_event(1)
        z = posterior.sample((500,))
        assert abs((posterior.log_prob(z) - normal.log_prob(z)).mean().item()) < 0.1
        assert log_scale.mean().item() == pytest.approx(-1, abs=0.5)


@pytest.mark.parametrize("name", [name for name in GUIDES if name not in ("Refined", "DefensiveMixture")])
def test_recorded_step_gives_the_eager_gradients(name, double, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)  # recording alone
    guide = stirred(name)
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE)).double()
    x = model.generate(5)

    def objective(x):
        return surrogate(Trace_ELBO(), model, guide, x)

    recorded = record(objective, [model, guide], (x,), gradients=True)
    assert recorded is not None, caplog.text
    torch.manual_seed(7)
    (value, _, _), gradients = recorded(x)
    torch.manual_seed(7)
    assert value.item() == pytest.approx(Trace_ELBO().loss_and_grads(model, guide, x), rel=1e-10)
    for parameter, gradient in zip(recorded.parameters, gradients, strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", GUIDES)
def test_recorded_weights_are_the_eager_ones(name, double, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    guide = stirred(name)
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE)).double()
    x = model.generate(4)
    weights = []
    for compile in (False, True):
        torch.manual_seed(3)
        weights.append(pv.log_weights(model, guide, x, num_particles=20, particle_batch_size=5, compile=compile))
    assert torch.allclose(*weights, rtol=1e-10)
    assert not caplog.records


@pytest.mark.parametrize("name", ["FullRankNormal", *FLOWS])
def test_hand_written_svi_lowers_the_loss(name):
    guide = GUIDES[name]()
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE))
    x = (torch.rand(20, *SHAPE) < torch.linspace(0.05, 0.95, 12).reshape(SHAPE)) * 1.0
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(80)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_printing_draws_nothing():
    guide = GUIDES["NeuralSplineFlow"]()
    before = torch.get_rng_state()
    assert "MonotonicRQSTransform" in repr(guide)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda net: guides.FullRankNormal(net, 0), ValueError, "latent_dim must be 1 or more"),
        (lambda net: guides.LowRankNormal(net, 2, rank=0), ValueError, "rank must be 1 or more, found 0"),
        (lambda net: guides.LowRankNormal(nn.Identity(), 2), ValueError, "pass num_features="),
        (lambda net: guides.InverseAutoregressiveFlow(net, 2, num_transforms=0), ValueError, "num_transforms must be"),
        (lambda net: guides.InverseAutoregressiveFlow(net, 2.0), TypeError, "latent_dim must be a whole number"),
        (lambda net: guides.InverseAutoregressiveFlow(net, 2, num_context=0), ValueError, "num_context must be 1"),
        (lambda net: guides.NeuralSplineFlow(net, 2, num_bins=1), ValueError, "num_bins of 2 or more"),
        (lambda net: guides.NeuralSplineFlow(net, 2, hidden_features=(8, 0)), ValueError, "each of hidden_features"),
    ],
)
def test_errors_at_construction(make, error, match):
    with pytest.raises(error, match=match):
        make(nets.MLP(12, [8]))


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("name", ["FullRankNormal", "LowRankNormal", *FLOWS])
def test_one_latent_dimension(name, latent_dim, double):
    guide = getattr(guides, name)(nets.MLP(12, [8]), latent_dim)
    x = torch.rand(3, *SHAPE)
    assert guide.posterior(x).mean.shape == (3, latent_dim)
    assert guide.posterior(x).log_prob(torch.zeros(7, 3, latent_dim)).shape == (7, 3)


def test_a_posterior_that_would_not_be_drawn_from_is_refused():
    with pytest.raises(TypeError, match="override `distribution`"):
        type("Own", (pv.guides.MeanFieldNormal,), {"posterior": lambda self, x: None})


class OfDataAlone(guides.Guide):
    def encode(self, x):
        return x[:, : self.latent_dim]

    def distribution(self, parameters):
        return dist.Normal(parameters, 1.0).to_event(1)


@pytest.mark.parametrize("name", ["context", "observed"])
def test_an_encode_without_the_argument(name):
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [4], 6), (6,)))
    guide, x = OfDataAlone(2), torch.ones(5, 6)
    value = torch.zeros(5) if name == "context" else x > 0
    for call in (
        lambda **options: guide(x, **options),
        lambda **options: pv.uses.embed(guide, x, **options),
        lambda **options: pv.log_marginal_likelihood(model, guide, x, num_particles=5, **options),
    ):
        call()
        with pytest.raises(
            TypeError, match=f"OfDataAlone.encode takes no {name}, .*give it an argument .*, or call without"
        ):
            call(**{name: value})
