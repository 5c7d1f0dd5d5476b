"""Annealing of latents whose distributions say little of themselves: flows of zuko by Pyro's adapter, improper priors, no support."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import constraints
from torch.distributions import biject_to

import pyrovae as pv
from pyrovae.annealing.potential import block_potential, prior_of
from pyrovae.distributions.zuko_adapter import FlowDistribution, import_zuko, support_of_flow
from pyrovae.programs.splitting import inspect

zuko = import_zuko()
SETTINGS = {"num_chains": 4, "num_temperatures": 10, "num_leapfrog_steps": 4}


@pytest.fixture(autouse=True)
def _quick(short_pilots):
    """What is refused, and whether E[w] = p(x), does not depend on how good the kernels are."""


FLOWS = {
    "NSF": lambda: zuko.flows.NSF(2, transforms=2, hidden_features=[8]),
    "MAF": lambda: zuko.flows.MAF(2, transforms=2, hidden_features=[8]),
    "NICE": lambda: zuko.flows.NICE(2, transforms=2, hidden_features=[8]),
}


def of_flow(flow):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", ZukoToPyro(flow()))
            pyro.sample("x", dist.Normal(z, 0.8).to_event(1), obs=x)

    return model


def on_a_grid(flow, x):
    """log p(x) (N,) by a sum over z."""
    axis = torch.linspace(-8, 8, 321)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_prior = flow().log_prob(z)
        width = 2 * (axis[1] - axis[0]).log()
        within((log_prior.logsumexp(0) + width).exp().item(), 1.0, 2e-3)  # the grid is wide and fine enough
        log_likelihood = dist.Normal(z.unsqueeze(1), 0.8).log_prob(x).sum(-1)
    return (log_prior.unsqueeze(-1) + log_likelihood).logsumexp(0) + width


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", FLOWS)
def test_flows_of_zuko_by_the_adapter_of_pyro(double, name, guided):
    """As a prior, and as a guide of it."""
    flow = FLOWS[name]()
    proposal = FLOWS[name]()
    x = torch.randn(3, 2)
    rows = x.repeat(50, 1)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(proposal()))

    settings = SETTINGS | {"num_temperatures": 30, "compile": False}
    result = pv.annealed_importance_sampling(of_flow(flow), rows, guide=guide if guided else None, **settings)
    ratio = (result.log_prob - on_a_grid(flow, x).repeat(50)).exp()
    stderr = ratio.std().item() / math.sqrt(len(rows))
    assert stderr < 0.1
    within(ratio.mean().item(), 1.0, stderr)


def test_the_adapter_of_pyro_has_the_densities_of_ours(double):
    flow, x = FLOWS["NSF"](), torch.randn(4, 2)

    def ours(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", FlowDistribution(flow()))
            pyro.sample("x", dist.Normal(z, 0.8).to_event(1), obs=x)

    first, second = (
        block_potential(inspect(model, prior_of(model), (x,), {}), 0, 4, 3, from_prior=True)
        for model in (of_flow(flow), ours)
    )
    u = first.draw()
    for one, other in zip(first.energy(u, torch.tensor(0.5)), second.energy(u, torch.tensor(0.5)), strict=True):
        assert torch.allclose(one, other)


def test_both_bounds_of_a_flow(double):
    flow = FLOWS["NSF"]()
    both = pv.bidirectional_monte_carlo(of_flow(flow), torch.zeros(100, 2), **(SETTINGS | {"num_temperatures": 30}))
    truth = on_a_grid(flow, both.data["x"])
    for log_ratio in (both.lower - truth, truth - both.upper):
        ratio = log_ratio.exp()
        stderr = ratio.std().item() / math.sqrt(len(truth))
        assert stderr < 0.1
        within(ratio.mean().item(), 1.0, stderr)


TRANSFORMS = torch.distributions.transforms


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: zuko.flows.MAF(3, transforms=1)(), "the line"),
        (lambda: zuko.flows.UNAF(3, transforms=1, signal=2)(), "the line"),
        (lambda: zuko.distributions.DiagNormal(torch.zeros(2), torch.ones(2)), "the line"),
        (lambda: zuko.distributions.BoxUniform(torch.zeros(2), torch.ones(2)), "a box"),
        (lambda: zuko.flows.NCSF(2, transforms=1)(), None),  # angles
        (lambda: zuko.distributions.TransformedUniform(TRANSFORMS.ExpTransform(), -1.0, 1.0), None),
        (
            lambda: zuko.distributions.NormalizingFlow(
                TRANSFORMS.SigmoidTransform().inv, dist.Normal(torch.tensor(0.0), 1.0)
            ),
            "a box",
        ),
    ],
)
def test_the_support_of_a_flow_is_known_or_not_claimed(make, expected):
    distribution = make()
    support = support_of_flow(distribution)
    if expected is None:
        assert support is None
        return
    draws = distribution.sample((100,))
    assert support.check(draws).all()
    assert support.check(10 * draws).all() == (expected == "the line")
    assert torch.allclose(biject_to(support)(biject_to(support).inv(draws)), draws, atol=1e-4)


def test_angles_by_the_adapter_of_pyro_are_refused():
    flow = zuko.flows.NCSF(2, transforms=1)
    with pytest.raises(ValueError, match=r"site 'z' \(ZukoToPyro\) does not say what its support is"):
        pv.annealed_importance_sampling(of_flow(flow), torch.zeros(3, 2), **SETTINGS)


class Silent(dist.TorchDistribution):
    """A normal distribution that does not say where it is positive."""

    arg_constraints = {}
    has_rsample = True

    def __init__(self, batch_shape=()):
        super().__init__(torch.Size(batch_shape), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Silent(batch_shape)

    def rsample(self, sample_shape=()):
        return torch.randn(*sample_shape, *self.batch_shape)

    def log_prob(self, value):
        return -0.5 * value.square() - 0.5 * math.log(2 * math.pi)


class OddConstraint(constraints.Constraint):
    def check(self, value):
        return torch.ones_like(value, dtype=torch.bool)


class Odd(Silent):
    support = OddConstraint()

    def expand(self, batch_shape, _instance=None):
        return Odd(batch_shape)


def with_prior(prior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


@pytest.mark.parametrize("run", [pv.annealed_importance_sampling, pv.bidirectional_monte_carlo])
@pytest.mark.parametrize(
    ("prior", "text"),
    [
        (Silent, "site 'z' (Silent) does not say what its support is"),
        (lambda: Silent().mask(torch.tensor(True)), "site 'z' (Silent) does not say what its support is"),
        (Odd, "no bijection from the real numbers to the support of site 'z'"),
        (lambda: dist.ImproperUniform(constraints.real, (), ()), "the prior of site 'z' is improper"),
        (lambda: dist.ImproperUniform(constraints.positive, (), ()).mask(True), "the prior of site 'z' is improper"),
    ],
)
def test_priors_without_coordinates_or_draws_are_refused_by_name(run, prior, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        run(with_prior(prior), torch.zeros(3), **SETTINGS)


def test_a_silent_prior_under_a_guide_that_speaks(double):
    """The chains are in the guide's coordinates, and the model's distribution is asked for densities alone."""
    x = torch.randn(100)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.9))

    result = pv.annealed_importance_sampling(with_prior(Silent), x, guide=guide, **SETTINGS)
    ratio = (result.log_prob - dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)).exp()
    within(ratio.mean().item(), 1.0, ratio.std().item() / 10)


@pytest.mark.parametrize("run", [pv.annealed_importance_sampling, pv.bidirectional_monte_carlo])
@pytest.mark.parametrize("plates", [["data"], [], ["data", "slots"]])
def test_a_model_without_latents_is_refused_with_what_to_do(run, plates):
    x = torch.randn(3, 2)

    def model(x):
        normal = dist.Normal(torch.zeros(3, 2), 1.0)
        if not plates:
            pyro.sample("x", normal.to_event(2), obs=x)
        elif plates == ["data"]:
            with pyro.plate("data", 3):
                pyro.sample("x", normal.to_event(1), obs=x)
        else:
            with pyro.plate("data", 3, dim=-2), pyro.plate("slots", 2, dim=-1):
                pyro.sample("x", normal, obs=x)

    plate = plates[0] if plates else None
    with pytest.raises(ValueError, match="no latent sites.*take log_marginal_likelihood"):
        run(model, x, plate=plate, **SETTINGS)
    result = pv.log_marginal_likelihood(model, lambda *args, **kwargs: None, x, plate=plate, num_particles=1)
    exact = dist.Normal(0.0, 1.0).log_prob(x)
    assert torch.allclose(result.log_prob.float(), exact.sum(-1) if plates else exact.sum().reshape(1))


def test_what_cannot_be_called_is_refused_before_it_is_simulated():
    with pytest.raises(TypeError, match="model must be a Pyro program to call, found object"):
        pv.bidirectional_monte_carlo(object(), torch.zeros(3))
