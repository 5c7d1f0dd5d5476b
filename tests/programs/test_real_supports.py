"""Supports that hold every number are not checked element by element, and all others are."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions.transforms import ExpTransform

from pyrovae.programs.log_densities import site_log_prob
from pyrovae.programs.supports import is_possible

REAL = {
    "normal": dist.Normal(torch.zeros(3), 1.0),
    "event": dist.Normal(torch.zeros(3, 2), 1.0).to_event(1),
    "masked": dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True])),
    "vectors": dist.MultivariateNormal(torch.zeros(3, 2), torch.eye(2)),
}
# Distribution and a value of which the second element lies outside.
BOUNDED = {
    "gamma": (dist.Gamma(torch.ones(3), 1.0), [1.0, -1.0, 2.0]),
    "transformed": (dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [ExpTransform()]), [1.0, -1.0, 2.0]),
    # torch calls the support of the shifted gamma real.
    "shifted": (
        dist.TransformedDistribution(dist.Gamma(torch.ones(3), 1.0), [dist.transforms.AffineTransform(5.0, 1.0)]),
        [6.0, 4.0, 7.0],
    ),
}


def site_of(distribution, value):
    return poutine.trace(lambda: pyro.sample("x", distribution, obs=value)).get_trace().nodes["x"]


@pytest.mark.parametrize("name", REAL)
def test_real_supports_need_no_check(double, name):
    distribution = REAL[name]
    site = site_of(distribution, distribution.sample())
    assert is_possible(site, nan=True) is None
    assert is_possible(site).all()  # checked, and the same
    assert torch.equal(site_log_prob(site), distribution.log_prob(site["value"]))


@pytest.mark.parametrize("name", REAL)
def test_nan_is_outside_unless_it_counts(name):
    distribution = REAL[name]
    value = distribution.sample()
    value[0] = torch.nan
    site = site_of(distribution, value)
    assert not is_possible(site)[0]
    assert site_log_prob(site)[0].isnan()


@pytest.mark.parametrize("name", BOUNDED)
def test_values_outside_have_no_density(name):
    distribution, value = BOUNDED[name]
    with pyro.validation_enabled(False):
        site = site_of(distribution, torch.tensor(value))
        assert is_possible(site, nan=True).tolist() == [True, False, True]
        assert site_log_prob(site).isneginf().tolist() == [False, True, False]


def test_nan_in_validated_elements_of_an_event(double):
    """A masked element counts 0; one that is not masked makes the density NaN, though torch refuses to evaluate it."""
    distribution = dist.Normal(torch.zeros(3, 2), 1.0, validate_args=True)
    value = torch.ones(3, 2)
    value[1, 0] = torch.nan
    kept = torch.tensor([[True, True], [False, True], [True, True]])
    site = site_of(distribution.mask(kept).to_event(1), value)
    one = dist.Normal(0.0, 1.0).log_prob(torch.ones(()))
    assert torch.allclose(site_log_prob(site), torch.stack([2 * one, one, 2 * one]))
    site = site_of(distribution.to_event(1), value)
    assert site_log_prob(site).isnan().tolist() == [False, True, False]
