"""Bidirectional Monte Carlo's simulated data: drawn from the model, put where they belong, refused where that is not sure."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from shared.exact import two_sites

import pyrovae as pv
from pyrovae.programs.simulation import simulate

SETTINGS = {"num_chains": 2, "num_temperatures": 5, "num_leapfrog_steps": 1}


@pytest.fixture(autouse=True)
def _recorded(uncompiled):
    """compile=True records and does not compile: the chains at a tenth of the time."""


def test_simulation_is_of_the_model_and_reads_no_data(linear_gaussian):
    x = linear_gaussian.data(500)
    result = pv.bidirectional_monte_carlo(
        linear_gaussian.model, x, num_chains=1, num_temperatures=5, num_leapfrog_steps=1, compile=True
    )
    z, simulated = result.latents["z"], result.data["x"]
    within(z.mean().item(), 0.0, 1 / math.sqrt(1500))
    residual = (simulated - z @ linear_gaussian.weight.T - linear_gaussian.bias) / linear_gaussian.scale
    within(residual.square().mean().item(), 1.0, math.sqrt(2 / 2500))


def test_data_that_are_no_argument(double):
    x = torch.randn(5)

    def model():
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    result = pv.bidirectional_monte_carlo(
        model, num_chains=16, num_temperatures=100, num_leapfrog_steps=8, compile=True
    )
    truth = dist.Normal(0.0, math.sqrt(1.25)).log_prob(result.data["x"])
    assert (result.lower - truth).abs().max() < 0.5
    assert (result.upper - truth).abs().max() < 0.5


def two_observed(x, y):
    """z ~ N(0, 1), x | z ~ N(z, 0.5), y | z ~ N(1 - 2 z, 0.7)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        pyro.sample("y", dist.Normal(1 - 2 * z, 0.7), obs=y)


def guide_of_two(x, y):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x - y) / 3, 0.7))


def refuse_wrong_bounds(result):
    covariance = torch.tensor([[1.25, -2.0], [-2.0, 4.49]])
    data = torch.stack([result.data["x"], result.data["y"]], -1)
    truth = dist.MultivariateNormal(torch.tensor([0.0, 1.0]), covariance).log_prob(data)
    for bound in (result.lower, result.upper):
        error = bound - truth
        assert error.abs().mean() < 0.5
        assert error.mean().abs() < 0.1


BOUNDS = {"num_chains": 16, "num_temperatures": 60, "num_leapfrog_steps": 5, "compile": True}


def test_equal_placeholders_do_not_stand_for_each_other(double):
    refuse_wrong_bounds(pv.bidirectional_monte_carlo(two_observed, torch.zeros(50), torch.zeros(50), **BOUNDS))
    with pytest.raises(ValueError, match="differ in value"):
        pv.bidirectional_monte_carlo(two_observed, torch.zeros(50), torch.zeros(50), guide=guide_of_two, **SETTINGS)


def test_a_guide_sees_the_simulated_data(double):
    refuse_wrong_bounds(
        pv.bidirectional_monte_carlo(two_observed, torch.zeros(50), torch.ones(50), guide=guide_of_two, **BOUNDS)
    )


def test_an_argument_that_is_not_observed_as_it_is(double):
    """Its zeros are those of the data, which are yet another order of it."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.linspace(-3, 3, len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x.flip(0))

    result = pv.bidirectional_monte_carlo(model, torch.zeros(50), **BOUNDS)
    truth = dist.Normal(torch.linspace(-3, 3, 50), math.sqrt(1.25)).log_prob(result.data["x"])
    assert (result.lower - truth).abs().max() < 0.5
    assert (result.upper - truth).abs().max() < 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_simulation_on_a_gpu():
    """Two runs under one seed draw the same there too, and leave the generators as they were."""
    x = torch.zeros(5, 12, device="cuda")
    model = pv.GenerativeModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Normal(pv.nets.MLP(2, [8], 12), (12,))
    ).cuda()
    before = torch.cuda.get_rng_state()
    trace, *_ = simulate(model, None, (x,), {})
    assert trace.nodes["x"]["value"].is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_a_summary_of_bounds_that_crossed():
    bounds = {"lower_stderr": torch.ones(2), "upper_stderr": torch.ones(2), "acceptance": torch.ones(2)}
    lower, upper = torch.tensor([-3.0, -4.0]), torch.tensor([-3.5, -3.9])
    crossed = pv.BidirectionalMonteCarlo(2, lower=lower, upper=upper, **bounds, data={}, latents={})
    assert "crossed" in crossed.summary()
    assert "at most this" not in crossed.summary()
    ordered = pv.BidirectionalMonteCarlo(2, lower=upper, upper=lower, **bounds, data={}, latents={})
    assert "crossed" not in ordered.summary()


def test_what_cannot_be_simulated_is_refused():
    def factor(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("x", -((z - x) ** 2))

    def masked(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=torch.tensor([True, False, True])):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def reading(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + x.mean(), 1.0), obs=x)

    x = torch.tensor([0.1, 0.5, -1.0])
    for model, text in ((factor, "factor"), (masked, "masked"), (reading, "depends on the values")):
        with pytest.raises(ValueError, match=text):
            pv.bidirectional_monte_carlo(model, x, **SETTINGS)


def test_auxiliary_draws_cannot_start_a_reverse_chain():
    x = torch.zeros(3, 2)
    guide = AutoNormal(two_sites)
    guide(x)
    with pytest.raises(ValueError, match="auxiliary"):
        pv.bidirectional_monte_carlo(two_sites, x, guide=guide, **SETTINGS)
    pyro.clear_param_store()
