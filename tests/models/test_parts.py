"""One body over every part: shapes, gradients, densities, save and load, repr."""

import copy
import inspect
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import Trace_ELBO
from shared.parts import (
    DECODERS,
    ENCODERS,
    ENCODERS_OF_MORE,
    GUIDES,
    LATENT_DIM,
    LIKELIHOODS,
    PRIORS,
    SHAPE,
    TABLES,
    build,
    combinations,
    draw,
)
from torch import nn

import pyrovae as pv
from pyrovae import guides, likelihoods, nets, priors


@pytest.mark.parametrize(
    ("module", "listed"),
    [
        (priors, set(PRIORS)),
        (guides, set(GUIDES)),
        (likelihoods, set(LIKELIHOODS) | set(TABLES)),
        (nets, set(DECODERS) | set(ENCODERS) | set(ENCODERS_OF_MORE)),
    ],
)
def test_every_part_is_listed(module, listed):
    concrete = {name for name in module.__all__ if not inspect.isabstract(getattr(module, name))}
    assert concrete == listed


@pytest.mark.parametrize(("prior", "guide", "likelihood", "decoder", "encoder"), list(combinations()))
def test_pair(prior, guide, likelihood, decoder, encoder, tmp_path):
    names = prior, guide, likelihood, decoder, encoder
    model, guide = build(*names)
    x = draw(names[2])

    traced = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace(x))).get_trace(x)
    assert traced.nodes["z"]["value"].shape == (5, 2)
    assert traced.nodes["z"]["cond_indep_stack"][0].name == "data"
    assert traced.nodes["z"]["cond_indep_stack"][0].dim == -1
    assert traced.nodes["x"]["is_observed"]

    Trace_ELBO().loss_and_grads(model, guide, x)
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name

    assert guide.posterior(x).mean.shape == (5, 2)
    assert guide.posterior(x).batch_shape == (5,)
    shape = x.shape[1:]
    assert model.generate(6).shape == (6, *shape)
    model.likelihood.check(model.generate(6))
    assert model.generate(6, mean=True).shape == (6, *shape)
    assert model.decode(torch.zeros(3, 4, 2)).shape == (3, 4, *shape)

    # The draws from the prior in a defensive mixture make its bound noisy: it is a guide for evaluation.
    epochs = 400 if names[1] == "DefensiveMixture" else 60
    history = pv.fit(model, guide, x, epochs=epochs, batch_size=5, learning_rate=0.02, progress=False).history
    # Means, because one draw for each of five data says little.
    first, last = ([row["elbo"] for row in rows] for rows in (history[:20], history[-20:]))
    assert sum(last) > sum(first)

    pv.save(tmp_path / "pair.pt", model, guide, note="kept")
    other_model, other_guide = build(*names)
    assert pv.load(tmp_path / "pair.pt", other_model, other_guide) == {"note": "kept"}
    assert torch.equal(other_model.decode(torch.ones(2)), model.decode(torch.ones(2)))
    pyro.set_rng_seed(1)
    mean = guide.posterior(x).mean  # Monte Carlo for some
    pyro.set_rng_seed(1)
    assert torch.equal(other_guide.posterior(x).mean, mean)
    for part in (model.prior, model.likelihood, guide):
        assert type(part).__name__ in repr(part)
        assert "_dim=" in repr(part) or "data_shape=" in repr(part)
        count = sum(parameter.numel() for parameter in part.parameters())
        assert f", {count:,} parameters" in repr(part)
    copy.deepcopy((model, guide))


@pytest.mark.parametrize("name", PRIORS)
def test_prior_density(name, double):
    """log_prob integrates to 1 on a grid, and agrees with the moments of samples."""
    prior = PRIORS[name](guides.MeanFieldNormal(nets.MLP(12, [8]), LATENT_DIM)).double()
    distribution = prior()
    assert distribution.event_shape == (2,)
    assert distribution.batch_shape == ()
    axis = torch.linspace(-9, 9, 401)
    grid = torch.cartesian_prod(axis, axis)
    density = distribution.log_prob(grid).exp() * (axis[1] - axis[0]) ** 2
    assert density.sum().item() == pytest.approx(1, abs=1e-4)  # splines have kinks: a grid errs by 1e-5
    samples = distribution.sample((20_000,))
    for power in (1, 2):
        for axis_index in range(2):
            moment = (density * grid[:, axis_index] ** power).sum().item()
            powered = samples[:, axis_index] ** power
            within(powered.mean().item(), moment, powered.std().item() / math.sqrt(20_000))


@pytest.mark.parametrize("name", GUIDES)
def test_guide_density_and_seam(name, double):
    guide = GUIDES[name]().double()
    x = torch.rand(2, *SHAPE)
    posterior = guide.posterior(x)
    axis = torch.linspace(-5, 5, 251)
    grid = torch.cartesian_prod(axis, axis).unsqueeze(1)
    integral = posterior.log_prob(grid).exp().sum(0) * (axis[1] - axis[0]) ** 2
    # A spline's density has kinks, which a sum over a grid sees.
    assert torch.allclose(integral, torch.ones(2), atol=1e-3 if name == "NeuralSplineFlow" else 1e-6)
    # encode, then distribution: the same as posterior, and what evaluation uses.
    again = guide.distribution(guide.encode(x))
    assert torch.equal(again.mean, posterior.mean)
    pyro.set_rng_seed(0)
    direct = poutine.trace(guide).get_trace(x).nodes["z"]
    pyro.set_rng_seed(0)
    encoded = poutine.trace(guide.given(guide.encode(x))).get_trace(x).nodes["z"]
    assert torch.equal(direct["value"], encoded["value"])
    assert torch.equal(direct["fn"].log_prob(direct["value"]), encoded["fn"].log_prob(encoded["value"]))


def test_bernoulli_sums_to_one(double):
    likelihood = likelihoods.Bernoulli(nets.MLP(2, [4], 3), (3,)).double()
    outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    total = likelihood(torch.randn(2)).log_prob(outcomes).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


def test_bernoulli_starts_at_the_mean_image():
    mean = torch.linspace(0, 1, 12).reshape(SHAPE)
    likelihood = likelihoods.Bernoulli(nn.Linear(2, 12), SHAPE, data_mean=mean)
    nn.init.zeros_(likelihood.decoder_net.weight)
    nn.init.zeros_(likelihood.decoder_net.bias)
    assert torch.allclose(likelihood(torch.randn(1, 2)).mean[0], mean.clamp(1e-3, 1 - 1e-3), atol=1e-6)
    with pytest.raises(ValueError, match=r"means in \[0, 1\]"):
        likelihoods.Bernoulli(nn.Linear(2, 12), SHAPE, data_mean=2 * mean)


def test_any_network_for_batches_works_under_particles():
    """BatchNorm, view and softmax(dim=1) are safe in our likelihoods: they are fed rows."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(2, 12), nn.BatchNorm1d(12)

        def forward(self, z):
            return torch.softmax(self.norm(self.linear(z.view(-1, 2))), 1).view(-1, *SHAPE)

    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(Odd(), SHAPE))
    guide = guides.MeanFieldNormal(nets.MLP(12, [8]), 2)
    assert pv.log_weights(model, guide, model.generate(4), num_particles=3).shape == (3, 4)  # no warning, as an error


def test_kl_formula_against_monte_carlo(double):
    """KL(N(m, s^2) || N(0, I)) = 1/2 sum(s^2 + m^2 - 1 - ln s^2)."""
    loc, scale = torch.tensor([0.5, -1.0]), torch.tensor([0.3, 1.7])
    posterior = dist.Normal(loc, scale).to_event(1)
    formula = 0.5 * (scale**2 + loc**2 - 1 - (scale**2).log()).sum()
    prior = priors.StandardNormal(2).double()()
    z = posterior.sample((100_000,))
    draws = posterior.log_prob(z) - prior.log_prob(z)
    within(draws.mean().item(), formula.item(), draws.std().item() / math.sqrt(100_000))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: priors.StandardNormal(0), ValueError, "latent_dim must be 1 or more, found 0"),
        (lambda: priors.StandardNormal(2.0), TypeError, "latent_dim must be a whole number"),
        (lambda: nets.MLP(3, []), ValueError, "at least one layer"),
        (lambda: guides.MeanFieldNormal(nn.Flatten(), 2), ValueError, "pass num_features="),
        (lambda: likelihoods.Bernoulli(nn.Identity(), ()), ValueError, "data_shape"),
    ],
)
def test_errors_at_construction(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.zeros(5, 12), ValueError, r"shape \(N, 1, 4, 3\), found \(5, 12\)"),
        (torch.zeros(1, 4, 3), ValueError, "leading axis"),
        (torch.zeros(5, *SHAPE, dtype=torch.long), TypeError, "floating-point"),
        (torch.full((5, *SHAPE), 0.5), ValueError, "found 0.5: binarise"),
        (torch.full((5, *SHAPE), torch.nan), ValueError, "found nan"),
    ],
)
def test_errors_of_data(x, error, match):
    model = build("StandardNormal", "MeanFieldNormal", "Bernoulli", "MLP", "MLP")[0]
    with pytest.raises(error, match=match), pyro.validation_enabled(False):
        model(x)


def test_errors_of_networks():
    x = torch.zeros(5, *SHAPE)
    with pytest.raises(ValueError, match="needs 12 numbers per datum"):
        pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [3], 7), SHAPE))(x)
    with pytest.raises(ValueError, match=r"must give features \(5, 9\), found \(5, 8\)"):
        guides.MeanFieldNormal(nets.MLP(12, [8]), 2, num_features=9)(x)
