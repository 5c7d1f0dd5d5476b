"""Binary images as one distribution: the numbers, gradients and draws of Bernoulli pixels."""

import math

import pyro.distributions as dist
import pytest
import torch
from conftest import within

from pyrovae.distributions.binary import BinaryImages


def pixels(logits, event_dim):
    return dist.Bernoulli(logits=logits, validate_args=False).to_event(event_dim)


# 1 and 67 leave products of one factor, 784 of 56, 128 of 64
@pytest.mark.parametrize("event_shape", [(), (1,), (67,), (1, 28, 28), (2, 64)], ids=str)
def test_log_mass_and_gradients_are_those_of_bernoulli_pixels(double, event_shape):
    logits = (20 * torch.randn(3, 1, *event_shape)).requires_grad_()
    x = (torch.rand(4, *event_shape) < 0.3).double()
    weights = torch.randn(3, 4)
    results = []
    for distribution in (BinaryImages(logits, len(event_shape)), pixels(logits, len(event_shape))):
        log_prob = distribution.log_prob(x)
        assert log_prob.shape == (3, 4)
        results.append((log_prob, *torch.autograd.grad((weights * log_prob).sum(), logits)))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_second_derivatives_and_those_of_the_data(double):
    logits, x = torch.randn(2, 6, requires_grad=True), torch.rand(2, 6, requires_grad=True)
    log_prob = BinaryImages(logits, 1, validate_args=False).log_prob
    assert torch.autograd.gradcheck(
        lambda logits, x: BinaryImages(logits, 1, validate_args=False).log_prob(x), (logits, x)
    )
    (gradient,) = torch.autograd.grad(log_prob(x.detach()).sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), logits)
    assert torch.allclose(second, -logits.sigmoid() * (1 - logits.sigmoid()))


def test_accuracy_in_float32():
    """Against float64, at logits from flat to saturated: no worse than the sum of pixels, up to a few units."""
    for scale in (0.01, 1.0, 10.0, 100.0):
        logits = scale * torch.randn(500, 784)
        x = (torch.rand(500, 784) < 0.3).float()
        exact = pixels(logits.double(), 1).log_prob(x.double())
        error = (BinaryImages(logits, 1).log_prob(x) - exact).abs().max().item()
        unit = torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert error < 8 * unit, (scale, error, unit)


def test_bold_logits_are_finite():
    """Certain pixels: the mass is 1, or as small as the logits say; all factors at their largest do not overflow."""
    assert BinaryImages(torch.tensor([1e4, -1e4]), 1).log_prob(torch.tensor([1.0, 0.0])) == 0
    assert BinaryImages(torch.tensor([1e4, -1e4]), 1).log_prob(torch.tensor([0.0, 1.0])) == -2e4
    found = BinaryImages(torch.zeros(4096), 1).log_prob(torch.zeros(4096))
    assert found.item() == pytest.approx(-4096 * math.log(2), rel=1e-6)


def test_draws_moments_shapes_and_support():
    logits = torch.tensor([[-1.0, 0.5, 2.0], [0.0, 3.0, -2.0]])
    distribution = BinaryImages(logits, 1)
    assert (distribution.batch_shape, distribution.event_shape) == ((2,), (3,))
    draws = distribution.sample((20_000,))
    for i in range(2):
        for j in range(3):
            probability = logits[i, j].sigmoid().item()
            within(draws[:, i, j].mean().item(), probability, math.sqrt(probability * (1 - probability) / 20_000))
    assert torch.equal(distribution.mean, logits.sigmoid())
    assert torch.equal(distribution.base_dist.logits, logits)
    assert torch.allclose(distribution.variance, pixels(logits, 1).variance)
    wide = distribution.expand((5, 2))
    assert wide.sample().shape == (5, 2, 3)
    assert torch.equal(wide.log_prob(draws[0]), distribution.log_prob(draws[0]).expand(5, 2))
    assert distribution.support.check(torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.5, 1.0]])).tolist() == [True, False]
    with pytest.raises(ValueError, match="within the support"):
        BinaryImages(logits, 1, validate_args=True).log_prob(torch.full((2, 3), 0.5))
    with pytest.raises(ValueError, match="logits"):
        BinaryImages(torch.full((3,), math.nan), 1, validate_args=True)


@pytest.mark.parametrize("num_pixels", [1, 7, 16, 53, 64, 100, 560, 784, 3072, 4099])
def test_any_number_of_pixels(num_pixels, double):
    """Products of up to 64 pixels, of as many as divide their number."""
    logits, x = torch.randn(2, num_pixels), (torch.rand(2, num_pixels) < 0.5).double()
    assert torch.allclose(BinaryImages(logits, 1).log_prob(x), pixels(logits, 1).log_prob(x), rtol=1e-12)


def test_under_vmap(double):
    logits, x = torch.randn(4, 2, 6), (torch.rand(2, 6) < 0.5).double()
    found = torch.vmap(lambda one: BinaryImages(one, 1, validate_args=False).log_prob(x))(logits)
    assert torch.allclose(found, BinaryImages(logits, 1).log_prob(x))
    found = torch.vmap(lambda one: BinaryImages(logits[0], 1, validate_args=False).log_prob(one))(x.expand(3, 2, 6))
    assert torch.allclose(found, BinaryImages(logits[0], 1).log_prob(x).expand(3, 2))
