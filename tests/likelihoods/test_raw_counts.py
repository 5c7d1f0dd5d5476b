"""Raw counts do not overflow in the first steps, whatever the seed; and the bounded mean changes no density below 5e8."""

import math

import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae.training.non_finite import NotFiniteError


class Log1p(nn.Module):
    def forward(self, x):
        return x.log1p()


def pair_for(kind, x, seed, with_mean, first=None):
    torch.manual_seed(seed)
    num_parts = kind.num_parameters()
    net = pv.nets.MLP(4, [16], x.shape[1] * num_parts)
    likelihood = kind(net, (x.shape[1],), data_mean=x.mean(0) if with_mean else None)
    encoder = pv.nets.MLP(x.shape[1], [16])
    guide = pv.guides.MeanFieldNormal(encoder if first is None else nn.Sequential(first, encoder), 4, num_features=16)
    return pv.GenerativeModel(pv.priors.StandardNormal(4), likelihood), guide


def counts(scale, seed):
    torch.manual_seed(seed)
    return torch.poisson(torch.distributions.Gamma(1.0, 1 / scale).sample((40, 10)))


KINDS = [pv.likelihoods.Poisson, pv.likelihoods.NegativeBinomial, pv.likelihoods.ZeroInflatedNegativeBinomial]
OPTIONS = {"epochs": 2, "batch_size": 20, "progress": False, "device": "cpu", "compile": False}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "first"), [(3.0, None), (1e2, Log1p()), (1e6, Log1p())])
def test_forty_seeds_start(kind, scale, first):
    for seed in range(40):
        x = counts(scale, seed)
        result = pv.fit(*pair_for(kind, x, seed, seed % 2 == 0, first), x, **OPTIONS)
        assert math.isfinite(result.history[-1]["elbo"])


def test_counts_too_large_for_the_encoder_say_how_to_scale_them():
    x = counts(1e6, 0)
    with pytest.raises(NotFiniteError, match=r"if they are counts.*encoder's first layer scale them, x.log1p\(\)"):
        pv.fit(*pair_for(pv.likelihoods.Poisson, x, 0, True), x, **OPTIONS)


def test_means_are_exponential_up_to_5e8_and_grow_linearly_beyond():
    likelihood = pv.likelihoods.Poisson(None, (1,)).double()
    logs = torch.tensor([[-30.0], [0.0], [13.7], [19.5], [21.0], [1e6]], dtype=torch.float64, requires_grad=True)
    distribution = likelihood.distribution(logs)
    e20 = math.exp(20)
    expected = torch.tensor(
        [math.exp(-30), 1.0, math.exp(13.7), math.exp(19.5), 2 * e20, (1e6 - 19) * e20], dtype=torch.float64
    )
    torch.testing.assert_close(distribution.mean.squeeze(1), expected, rtol=1e-12, atol=0)
    x = torch.tensor([[0.0], [2.0], [9e5], [3e8], [9e8], [1e14]], dtype=torch.float64)
    exact = torch.distributions.Poisson(expected).log_prob(x.squeeze(1))
    torch.testing.assert_close(distribution.log_prob(x), exact, rtol=1e-9, atol=1e-6)
    (slope,) = torch.autograd.grad(distribution.mean.sum(), logs)
    torch.testing.assert_close(slope.squeeze(1), expected.clamp(max=e20), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_means_beyond_5e8_start_at_those_of_the_data_and_are_proportional_to_the_exposure(kind):
    """A population of 1e10 of whom half count: 5e9 expected, with the same density as of any other mean."""
    per_exposure = torch.tensor([0.5, 3.0, 1e10], dtype=torch.float64)
    likelihood = kind(None, (3,), exposure_column=0, data_mean=per_exposure).double()
    exposures = torch.tensor([[1.0], [1e3], [1e10]], dtype=torch.float64)
    network = torch.zeros(3, *likelihood.parameters_shape, dtype=torch.float64)
    mean = likelihood.at(network, exposures).mean
    torch.testing.assert_close(mean, exposures * per_exposure, rtol=1e-5, atol=0)  # the bias is float32 at first
    if kind is pv.likelihoods.Poisson:
        x = (exposures * per_exposure).round()
        exact = torch.distributions.Poisson(mean).log_prob(x).sum(1)
        # The terms of a log mass, which cancel, are up to 5e21 at a count of 1e20.
        torch.testing.assert_close(likelihood.at(network, exposures).log_prob(x)[:2], exact[:2], rtol=1e-9, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_raw_counts_with_exposures_start(kind):
    for seed in range(10):
        x = counts(1e3, seed)
        exposure = x.sum(1, keepdim=True)
        torch.manual_seed(seed)
        net = pv.nets.MLP(4, [16], 10 * kind.num_parameters())
        mean = (x / exposure).mean(0) if seed % 2 else None
        likelihood = kind(net, (10,), exposure_column=0, data_mean=mean)
        encoder = nn.Sequential(Log1p(), pv.nets.MLP(10, [16]))
        pair = (
            pv.GenerativeModel(pv.priors.StandardNormal(4), likelihood),
            pv.guides.MeanFieldNormal(encoder, 4, num_features=16),
        )
        result = pv.fit(*pair, (x, exposure), **OPTIONS)
        assert math.isfinite(result.history[-1]["elbo"])


@pytest.mark.parametrize("name", ["Poisson", "NegativeBinomial", "ZeroInflatedNegativeBinomial"])
def test_means_as_a_list(name):
    kind = getattr(pv.likelihoods, name)
    lists, tensors = (
        kind(lambda z: torch.zeros(len(z), *((2,) if "Zero" in name else ()), 3), (3,), data_mean=mean)
        for mean in ([1.0, 2.0, 4.0], torch.tensor([1.0, 2.0, 4.0]))
    )
    assert torch.equal(lists.bias, tensors.bias)
