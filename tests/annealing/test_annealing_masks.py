"""Annealing of models that mask latents: proper start densities, and exact evidence of what is not masked."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyrovae as pv
from pyrovae.annealing.chains import anneal, tune
from pyrovae.annealing.potential import block_potential, prior_of
from pyrovae.programs.splitting import inspect

LOC, SCALE = 0.4, 0.8  # of the guides
SETTINGS = {"plate": "data", "num_chains": 4, "num_temperatures": 10, "num_leapfrog_steps": 4}
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def masked_by_handler(x, mask):
    with pyro.plate("data", len(x), dim=-2), pyro.plate("slots", x.shape[1], dim=-1), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def masked_by_distribution(x, mask):
    with pyro.plate("data", len(x), dim=-2), pyro.plate("slots", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(mask))
        pyro.sample("x", dist.Normal(z, 1.0).mask(mask), obs=x)


def masked_inside_events(x, mask):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(x.shape[1:]).mask(mask).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).mask(mask).to_event(1), obs=x)


def masked_data(x, mask):
    """A whole datum is there or not: its first slot says which."""
    with pyro.plate("data", len(x)), poutine.mask(mask=mask[:, 0]):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(x.shape[1:]).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def observed_in_part(x, mask):
    """x ~ N(z, 1): the slots that are not observed are latents, masked where they are observed."""
    with pyro.plate("data", len(x), dim=-2), pyro.plate("slots", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=mask)


def of_slots(masked_too):
    """A guide for the models with a plate of slots."""

    def guide(x, mask):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("slots", x.shape[1], dim=-1):
            proposal = dist.Normal(LOC, SCALE)
            pyro.sample("z", proposal.mask(mask) if masked_too else proposal)

    return guide


def of_events(model, masked_too):
    def guide(x, mask):
        proposal = dist.Normal(LOC, SCALE).expand(x.shape[1:])
        if masked_too and model is masked_inside_events:
            proposal = proposal.mask(mask)
        with pyro.plate("data", len(x)), poutine.mask(mask=mask[:, 0] if masked_too and model is masked_data else True):
            pyro.sample("z", proposal.to_event(1))

    return guide


def guides_of(model):
    """None (the prior), a guide without masks, and one with those of the model."""
    if model is observed_in_part:
        return [None]
    if model in (masked_inside_events, masked_data):
        return [None, of_events(model, False), of_events(model, True)]
    return [None, of_slots(False), of_slots(True)]


def counted_slots(model, mask):
    return mask[:, :1].expand_as(mask) if model is masked_data else mask


MODELS = [masked_by_handler, masked_by_distribution, masked_inside_events, masked_data, observed_in_part]


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=CHECKS)
@given(data=st.data(), num_data=st.integers(1, 3), width=st.integers(1, 3))
def test_chains_start_from_what_is_drawn_and_end_at_the_joint_density(double, model, data, num_data, width):
    """log q of all that is drawn, masked or not; log w of what is not masked, whatever the guide masks."""
    mask = data.draw(st.lists(st.booleans(), min_size=num_data * width, max_size=num_data * width))
    mask = torch.tensor(mask).reshape(num_data, width)
    x = torch.randn(num_data, width)
    for guide in guides_of(model):
        pair = inspect(model, guide or prior_of(model), (x, mask), {}, "data")
        for vectorised in (True, False):
            potential = block_potential(pair, 0, num_data, 3, from_prior=guide is None, vectorised=vectorised)
            u = potential.draw()
            log_start, log_weight = potential.log_densities(u)
            z = u[..., :width]
            seen = counted_slots(model, mask)
            likelihood = torch.where(seen, dist.Normal(z, 1.0).log_prob(x), 0.0)
            if guide is None:
                start = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
                if model is observed_in_part:
                    start = start + dist.Normal(z, 1.0).log_prob(u[..., width:]).sum(-1)
                weight = likelihood.sum(-1)
            else:
                q = dist.Normal(LOC, SCALE).log_prob(z)
                start = q.sum(-1)
                weight = (likelihood + torch.where(seen, dist.Normal(0.0, 1.0).log_prob(z) - q, 0.0)).sum(-1)
            assert torch.allclose(log_start, start)
            assert torch.allclose(log_weight, weight)


@pytest.mark.parametrize("model", MODELS)
def test_the_evidence_of_masked_models(double, uncompiled, short_pilots, model):
    x, mask = torch.randn(100, 2) * 1.3, torch.rand(100, 2) < 0.6
    log_prob = torch.where(counted_slots(model, mask), dist.Normal(0.0, math.sqrt(2.0)).log_prob(x), 0.0).sum(-1)
    for guide in guides_of(model):
        result = pv.annealed_importance_sampling(model, x, mask, guide=guide, compile=True, **SETTINGS)
        ratio = (result.log_prob - log_prob).exp()
        stderr = ratio.std().item() / math.sqrt(len(x))
        assert stderr < 0.06
        within(ratio.mean().item(), 1.0, stderr)
        nothing = ~counted_slots(model, mask).any(-1)
        assert nothing.any()
        assert torch.allclose(result.log_prob[nothing], torch.zeros(()))  # log p of no data, without noise


@pytest.mark.parametrize("masked_too", [False, True])
def test_masked_elements_stay_where_they_are_drawn(double, short_pilots, masked_too):
    """Under a density of 0 they would walk off, by a step per temperature."""
    x, mask = torch.zeros(200, 2), torch.tensor([True, False]).expand(200, 2)
    pair = inspect(masked_by_handler, of_slots(masked_too), (x, mask), {}, "data")
    potential = block_potential(pair, 0, 200, 4, from_prior=False)
    masked = anneal(potential, tune(potential, 40, 4)).u[..., 1]
    within(masked.mean().item(), LOC, SCALE / math.sqrt(800))
    within(masked.var().item(), SCALE**2, SCALE**2 * math.sqrt(2 / 800))


def test_an_automatic_guide_of_data_observed_in_part(double, uncompiled, short_pilots):
    """AutoNormal proposes all elements, those that are observed too."""
    x, mask = torch.randn(50, 2), torch.rand(50, 2) < 0.6
    guide = AutoNormal(observed_in_part, init_scale=0.9)
    guide(x, mask)
    log_prob = torch.where(mask, dist.Normal(0.0, math.sqrt(2.0)).log_prob(x), 0.0).sum(-1)
    settings = SETTINGS | {"num_chains": 16, "num_temperatures": 40}
    result = pv.annealed_importance_sampling(observed_in_part, x, mask, guide=guide, compile=True, **settings)
    ratio = (result.log_prob - log_prob).exp()
    stderr = ratio.std().item() / math.sqrt(len(x))
    assert stderr < 0.1
    within(ratio.mean().item(), 1.0, stderr)


def hidden_in_part(x, mask, style):
    """The latents that are masked reach no datum: all of x is observed."""
    masked = style(dist.Normal(0.0, 1.0), mask)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", masked)
        pyro.sample("x", dist.Normal(torch.where(mask, z, 0.0).sum(-1), 1.0), obs=x)


INSIDE = {
    "inside an event": lambda normal, mask: normal.expand(mask.shape).mask(mask).to_event(1),
    "expanded within": lambda normal, mask: normal.mask(mask[0]).expand(mask.shape).to_event(1),
}


@pytest.mark.parametrize("style", INSIDE)
def test_masked_latents_of_simulated_data(double, uncompiled, short_pilots, style):
    """From the prior the simulated latents are draws of the path's end; from a guide they are not, and it says so."""
    mask = torch.tensor([True, False]).expand(200, 2)

    def model(x):
        hidden_in_part(x, mask[: len(x)], INSIDE[style])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(LOC, SCALE).expand([2]).to_event(1))

    both = pv.bidirectional_monte_carlo(model, torch.zeros(200), data_batch_size=None, compile=True, **SETTINGS)
    truth = dist.Normal(0.0, math.sqrt(2.0)).log_prob(both.data["x"])
    for log_ratio in (both.lower - truth, truth - both.upper):
        ratio = log_ratio.exp()
        stderr = ratio.std().item() / math.sqrt(len(truth))
        assert stderr < 0.06
        within(ratio.mean().item(), 1.0, stderr)
    with pytest.raises(ValueError, match="masks latent site 'z'.*start from the prior"):
        pv.bidirectional_monte_carlo(model, torch.zeros(200), guide=guide, data_batch_size=None, **SETTINGS)


@pytest.mark.parametrize(
    "masked",
    [
        lambda normal, mask: normal.to_event(1).mask(mask[:, 0]),
        lambda normal, mask: normal.mask(mask).to_event(1),
        lambda normal, mask: normal.mask(mask).expand(mask.shape).to_event(1),
    ],
)
def test_masked_observations_are_not_simulated(masked):
    """However deep the mask lies."""
    mask = torch.tensor([[True, False], [True, True], [False, True]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            normal = dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 1.0)
            pyro.sample("x", masked(normal, mask), obs=x)

    with pytest.raises(ValueError, match="observed site 'x' is masked"):
        pv.bidirectional_monte_carlo(model, torch.zeros(3, 2), **SETTINGS)
