"""Ranks of exact posterior draws: uniform for the exact guide, not for others, and in the direction that they should be."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within

import pyrovae as pv


def calibrated(linear_gaussian, guide, num_data=1000, **options):
    return pv.simulation_based_calibration(linear_gaussian.model, guide, torch.zeros(num_data, 5), **options)


def test_the_exact_guide_is_calibrated(linear_gaussian):
    found = calibrated(linear_gaussian, linear_gaussian.guide)
    assert found.ranks.shape == (1000, 3)
    assert found.names == ["z[0]", "z[1]", "z[2]"]
    assert found.num_bins == 20
    assert found.counts.shape == (3, 20)
    assert (found.counts.sum(1) == 1000).all()
    assert found.ranks.min() >= 0
    assert found.ranks.max() <= 99
    assert found.overall_p_value > 1e-5
    for dimension in range(3):
        within(found.offset[dimension].item(), 0.0, math.sqrt(1 / 12 / 1000))
        within(found.spread[dimension].item(), 1.0, math.sqrt(0.8 / 1000))  # variance of 12 (u - 1/2)^2: 4/5
    assert "not uniform" not in found.summary()


@pytest.mark.parametrize(("inflate", "narrow"), [(2.0, False), (0.5, True)])
def test_a_wrong_spread_is_found(linear_gaussian, inflate, narrow):
    """z and draws differ as normals of variance 1 and c: P(u > r) by quadrature is left to the sign and size here."""
    found = calibrated(linear_gaussian, functools.partial(linear_gaussian.guide, inflate=inflate))
    assert found.overall_p_value < 1e-6
    assert ((found.spread > 1.15) if narrow else (found.spread < 0.85)).all()
    assert "3 of 3 are not uniform" in found.summary()
    outer, inner = found.counts[:, [0, -1]].sum(1), found.counts[:, 9:11].sum(1)
    assert ((outer > inner) if narrow else (outer < inner)).all()


def test_a_shift_is_found_in_its_direction(linear_gaussian):
    def low(x):
        with pyro.plate("data", len(x)):
            loc = linear_gaussian.posterior_mean(x) - torch.tensor([0.0, 0.3, 0.0])
            pyro.sample("z", dist.MultivariateNormal(loc, linear_gaussian.covariance))

    found = calibrated(linear_gaussian, low)
    shift = 0.3 / math.sqrt(2 * linear_gaussian.covariance[1, 1])
    exact = 0.5 * (1 + math.erf(shift / math.sqrt(2))) - 0.5  # P(draw < z) - 1/2
    within(found.offset[1].item(), exact, math.sqrt(1 / 12 / 1000))
    assert found.p_value[1] < 1e-6
    assert "z[1]" in found.summary()
    assert (found.p_value[[0, 2]] > 1e-6).all()


def test_the_test_has_the_level_it_says():
    """p-values of uniform ranks are uniform: 2,000 latents, mean 1/2."""
    found = pv.Calibration(99, [f"z[{i}]" for i in range(2000)], torch.randint(100, (400, 2000)))
    within(found.p_value.mean().item(), 0.5, math.sqrt(1 / 12 / 2000) + 1e-3)
    assert (found.p_value < 0.05).double().mean().item() == pytest.approx(0.05, abs=4.5 * math.sqrt(0.05 * 0.95 / 2000))
    few = pv.Calibration(99, ["z"], torch.randint(100, (7, 1)))
    assert few.num_bins == 1
    assert few.p_value.isnan().all()
    assert math.isnan(few.overall_p_value)
    assert pv.Calibration(9, ["z"], torch.randint(10, (30, 1))).num_bins == 5


def test_a_number_of_ranks_that_no_bins_divide():
    """101 ranks in 20 bins of 5 or 6: uniform ranks have uniform p-values there too, and others are found."""
    found = pv.Calibration(100, [f"z[{i}]" for i in range(2000)], torch.randint(101, (400, 2000)))
    assert found.num_bins == 20
    assert found.bin_shares.sum().item() == pytest.approx(1.0)
    within(found.p_value.mean().item(), 0.5, math.sqrt(1 / 12 / 2000) + 1e-3)
    assert pv.Calibration(100, ["z"], torch.randint(60, (400, 1))).overall_p_value < 1e-6


def test_several_sites_and_discrete_ones(double):
    """Two sites, one of them discrete, whose ties are ranked at random; the posterior by Bayes."""

    def model(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
            z = pyro.sample("z", dist.Normal(3 * b, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, wrong=False):
        with pyro.plate("data", len(x)):
            scale = math.sqrt(1.25)
            logits = dist.Normal(3.0, scale).log_prob(x) - dist.Normal(0.0, scale).log_prob(x) + math.log(0.3 / 0.7)
            b = pyro.sample("b", dist.Bernoulli(logits=logits * (0.0 if wrong else 1.0)))
            pyro.sample("z", dist.Normal(0.8 * x + 0.2 * 3 * b, math.sqrt(0.2)))

    found = pv.simulation_based_calibration(model, guide, torch.zeros(2000))
    assert found.names == ["b", "z"]
    assert found.overall_p_value > 1e-5
    wrong = pv.simulation_based_calibration(model, functools.partial(guide, wrong=True), torch.zeros(2000))
    assert wrong.p_value.max() < 1e-6


def test_a_guide_of_the_library():
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Normal(pv.nets.MLP(2, [4], 6), 6, scale=0.5))
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(6, [4]), 2)
    found = pv.simulation_based_calibration(model, guide, torch.zeros(50, 6), num_draws=19)
    assert found.ranks.shape == (50, 2)
    assert found.num_bins == 10
    assert "Calibration(50 simulated data, 2 latent dimensions, 19 draws" in repr(found)


def test_what_is_refused(linear_gaussian):
    def one(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 1.0))

    with pytest.raises(ValueError, match="no datum plate"):
        pv.simulation_based_calibration(one, guide, torch.tensor(0.3))
    with pytest.raises(ValueError, match="num_draws"):
        calibrated(linear_gaussian, linear_gaussian.guide, num_draws=0)
