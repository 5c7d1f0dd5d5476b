"""Annealing where p(z) is learned (exact by quadrature), and where the posterior is long and thin (exact by algebra)."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within

import pyrovae as pv


@pytest.fixture(autouse=True)
def _recorded(uncompiled):
    """compile=True records and does not compile: the chains at a tenth of the time."""


def mean_field(latent_dim):
    return pv.guides.MeanFieldNormal(pv.nets.MLP(4, [6]), latent_dim)


def vamp(guide):
    return pv.priors.VampPrior(guide, torch.rand(5, 4), learn_weights=True)


# name -> (latent_dim, make(guide) -> prior, whether chains start from the guide)
PRIORS = {
    "VampPrior": (1, vamp, False),
    "VampPrior in 2-D from its guide": (2, vamp, True),
    "NeuralSplineFlow": (1, lambda guide: pv.priors.NeuralSplineFlow(1, num_transforms=1, hidden_features=[8]), False),
    "MaskedAutoregressiveFlow in 2-D": (
        2,
        lambda guide: pv.priors.MaskedAutoregressiveFlow(2, num_transforms=2, hidden_features=[8]),
        False,
    ),
}


def four_bits(model, x):
    """log p(x) (N,) of four bits each, from the 16 there are: a sum over a grid of z."""
    axis = torch.linspace(-10, 10, 4001 if model.prior.latent_dim == 1 else 401)
    z = torch.cartesian_prod(*[axis] * model.prior.latent_dim).reshape(-1, 1, model.prior.latent_dim)
    patterns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    with torch.no_grad():
        log_joint = model.prior().log_prob(z) + model.likelihood(z).log_prob(patterns)
    log_prob = log_joint.logsumexp(0) + model.prior.latent_dim * (axis[1] - axis[0]).log()
    within(log_prob.exp().sum().item(), 1.0, 2e-4)  # the grid is wide and fine enough
    return log_prob[(x * torch.tensor([8, 4, 2, 1])).sum(-1).long()]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_learned_priors(double, name):
    latent_dim, make_prior, guided = PRIORS[name]
    guide = mean_field(latent_dim)
    likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(latent_dim, [8], 4), (4,))
    model = pv.GenerativeModel(make_prior(guide), likelihood)
    with torch.no_grad():
        for (
            parameter
        ) in model.prior.parameters():  # away from where it starts, not so far that one chain in 300 gets nowhere
            parameter.add_(0.1 * torch.randn_like(parameter))
        for parameter in likelihood.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    settings = {"guide": guide if guided else None, "num_temperatures": 20, "num_leapfrog_steps": 4, "compile": True}
    both = pv.bidirectional_monte_carlo(model, torch.zeros(300, 4), num_chains=3, **settings)
    truth = four_bits(model, both.data["x"])
    for log_ratio in (both.lower - truth, truth - both.upper):
        stderr = log_ratio.exp().std().item() / math.sqrt(300)
        assert stderr < 0.05
        within(log_ratio.exp().mean().item(), 1.0, stderr)
    x = torch.tensor([[0.0, 1.0, 1.0, 1.0]]).expand(100, 4).contiguous()
    ratio = (pv.annealed_importance_sampling(model, x, num_chains=3, **settings).log_prob - four_bits(model, x)).exp()
    assert ratio.std() / math.sqrt(100) < 0.05
    within(ratio.mean().item(), 1.0, ratio.std().item() / math.sqrt(100))


@pytest.mark.parametrize("compile", ["auto", False])
def test_a_shared_guide_still_trains_after_annealing(compile):
    """Recording puts values in the place of parameters and has to put these back, those with two paths to them too."""
    guide = mean_field(2)
    model = pv.GenerativeModel(vamp(guide), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 4), (4,)))
    x = (torch.rand(6, 4) < 0.5).float()
    before = dict(guide.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    pv.annealed_importance_sampling(model, x, guide=guide, num_temperatures=3)
    assert all(before[name] is parameter for name, parameter in guide.named_parameters())
    assert model.prior.guide is guide
    pv.fit(model, guide, x, epochs=2, batch_size=3, compile=compile, device="cpu", progress=False)
    for name, parameter in guide.named_parameters():
        assert not torch.equal(parameter, values[name]), name


class Thin:
    """z ~ N(0, I_D), x | z ~ N(W z, s^2 I): the posterior's precision has eigenvalues from 1 to 100, in turned axes."""

    def __init__(self, latent_dim, scale=0.5):
        generator = torch.Generator().manual_seed(3)
        turn = torch.linalg.qr(torch.randn(latent_dim, latent_dim, generator=generator)).Q
        eigenvalues = torch.logspace(0, 2, latent_dim)
        self.weight = scale * (eigenvalues - 1).sqrt().unsqueeze(-1) * turn
        self.latent_dim, self.scale = latent_dim, scale
        precision = torch.eye(latent_dim) + self.weight.T @ self.weight / scale**2
        assert torch.linalg.cond(precision) == pytest.approx(100.0)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.latent_dim]).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, self.scale).to_event(1), obs=x)

    def log_prob(self, x):
        covariance = self.weight @ self.weight.T + self.scale**2 * torch.eye(self.latent_dim)
        return dist.MultivariateNormal(torch.zeros(self.latent_dim), covariance).log_prob(x)


@pytest.mark.slow
def test_latent_50_and_condition_number_100(double):
    """The means are in order, and more temperatures bring them together."""
    thin = Thin(50)
    widths = []
    for num_temperatures in (50, 400):
        result = pv.bidirectional_monte_carlo(
            thin.model, torch.zeros(16, 50), num_chains=4, num_temperatures=num_temperatures, compile=True
        )
        truth = thin.log_prob(result.data["x"])
        below, above = result.lower - truth, result.upper - truth
        assert below.mean() < 3 * below.std() / math.sqrt(16)
        assert above.mean() > -3 * above.std() / math.sqrt(16)
        widths.append(result.width)
    assert widths[1].mean() < 0.5 * widths[0].mean()
    assert widths[1].mean() < 10


@pytest.mark.parametrize("num_temperatures", [3, 20])
def test_a_bound_errs_rarely(double, num_temperatures):
    """P(lower > log p + a) <= e^-a and P(upper < log p - a) <= e^-a (Markov), counted over 3,000 data of one chain each."""
    thin = Thin(4)
    result = pv.bidirectional_monte_carlo(
        thin.model,
        torch.zeros(3000, 4),
        num_chains=1,
        num_temperatures=num_temperatures,
        num_leapfrog_steps=3,
        compile=True,
    )
    truth = thin.log_prob(result.data["x"])
    for excess in (result.lower - truth, truth - result.upper):
        assert (excess > 0).double().mean() > 0.02  # it does happen
        for a in (0.25, 0.5, 1.0, 2.0, 3.0):
            most = math.exp(-a)
            assert (excess > a).double().mean() < most + 4.5 * math.sqrt(most * (1 - most) / 3000)
