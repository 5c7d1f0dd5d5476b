"""Bits per dimension against codes of known length, and against other units of the same data."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae import likelihoods
from pyrovae.estimators import bits_per_dim


def test_codes_of_known_length(double):
    """Uniform levels take log2 L bits, and a fair coin one."""
    likelihood = likelihoods.Categorical(nn.Identity(), (2, 3), num_levels=16)
    x = torch.randint(0, 16, (5, 2, 3)) / 15
    log_prob = likelihood(torch.zeros(5, 96)).log_prob(x)
    assert bits_per_dim(log_prob, 6).tolist() == pytest.approx([4.0] * 5)
    coins = dist.Bernoulli(torch.full((7,), 0.5)).to_event(1)
    assert bits_per_dim(coins.log_prob(torch.ones(7)), 7).item() == pytest.approx(1.0)
    uniform = likelihoods.ContinuousBernoulli(nn.Identity(), 9)
    assert bits_per_dim(uniform(torch.zeros(9)).log_prob(torch.rand(9)), 9, bin_width=1 / 256).item() == pytest.approx(
        8
    )


def test_units_do_not_matter(double):
    """The bits of rounded data are those of the bins, whatever the units; close to the entropy of the bins."""
    scale, loc = torch.tensor([3.0, 50.0, 700.0]), torch.tensor([0.0, 10.0, -5.0])
    base = likelihoods.Normal(nn.Identity(), 3, scale=1.0)
    raw = likelihoods.Scaled(base, loc, scale)
    z, y = torch.zeros(4, 3), torch.randn(4, 3)
    in_raw = bits_per_dim(raw(z).log_prob(loc + scale * y), 3, bin_width=0.01)
    standardised = bits_per_dim(base(z).log_prob(y), 3, bin_width=0.01 / scale)
    assert torch.allclose(in_raw, standardised, rtol=1e-12)
    by_hand = (0.5 * y**2 + 0.5 * math.log(2 * math.pi) + (scale / 0.01).log()).sum(-1) / (3 * math.log(2))
    assert torch.allclose(in_raw, by_hand, rtol=1e-12)
    bins = torch.arange(-800, 801) * 0.01
    mass = dist.Normal(0.0, 1.0).cdf(bins + 0.005) - dist.Normal(0.0, 1.0).cdf(bins - 0.005)
    entropy = -(mass * mass.clamp(min=1e-300).log2()).sum()
    density = bits_per_dim(dist.Normal(0.0, 1.0).log_prob(bins), 1, bin_width=0.01)
    assert (mass * density).sum().item() == pytest.approx(entropy.item(), abs=1e-4)


def test_errors_of_bits():
    with pytest.raises(ValueError, match="num_dims must be 1 or more, found 0"):
        bits_per_dim(torch.zeros(2), 0)
    with pytest.raises(TypeError, match="whole number"):
        bits_per_dim(torch.zeros(2), 2.5)
    for width in (0.0, -1.0, math.nan, torch.ones(4)):
        with pytest.raises(ValueError, match="bin_width must be positive, one number or one for each of 3 dimensions"):
            bits_per_dim(torch.zeros(2), 3, bin_width=width)


def test_it_is_a_number_of_the_result():
    result = pv.LogMarginalLikelihood.from_log_weights(torch.randn(5, 3, dtype=torch.float64))
    expected = bits_per_dim(result.log_prob, 12, bin_width=1 / 255)
    assert torch.equal(result.bits_per_dim(12, bin_width=1 / 255), expected)
