"""Ctrl-C in a long evaluation: what is done comes back, and the rest can be done later."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within

import pyrovae as pv
from pyrovae.programs.pair import Pair


@pytest.fixture(autouse=True)
def _quick(short_pilots):
    """Annealing at a tenth of the time."""


class Interrupted(torch.nn.Module):
    """x | z ~ N(z, 1); the program is interrupted when it comes to the data from `at` on."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.at, self.reached = math.inf, -1
        cut, blocks = Pair.cut, Pair.blocks
        looking = [True]

        def noticed_cut(pair, rows):
            self.reached = -1 if looking[0] else rows.start
            return cut(pair, rows)

        def noticed_blocks(pair, size):
            looking[0] = False  # the pair has been looked at
            return blocks(pair, size)

        def restart():
            looking[0], self.reached = True, -1

        self.restart = restart
        monkeypatch.setattr(Pair, "cut", noticed_cut)
        monkeypatch.setattr(Pair, "blocks", noticed_blocks)

    def forward(self, x):
        if self.reached >= self.at:
            raise KeyboardInterrupt
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def by_importance(model, x):
    return pv.log_marginal_likelihood(model, guide, x, num_particles=50, data_batch_size=4)


def by_annealing(model, x):
    return pv.annealed_importance_sampling(
        model, x, num_chains=4, num_temperatures=5, num_leapfrog_steps=1, data_batch_size=4
    )


@pytest.mark.parametrize("estimate", [by_importance, by_annealing])
@pytest.mark.parametrize(("at", "done"), [(1, 4), (5, 8)])
def test_what_is_done_comes_back(double, monkeypatch, estimate, at, done):
    model, x = Interrupted(monkeypatch), torch.linspace(-2, 2, 10)
    state = torch.get_rng_state()
    whole = estimate(model, x)
    assert len(whole) == 10
    torch.set_rng_state(state)
    model.restart()
    model.at = at
    with pytest.warns(RuntimeWarning, match=f"the first {done} of 10 data"):
        partial = estimate(model, x)
    assert model.training
    assert torch.equal(partial.log_prob, whole.log_prob[:done])
    assert partial.curve.shape == (len(whole.curve), done)
    # It goes on later.
    model.restart()
    model.at = math.inf
    joined = pv.LogMarginalLikelihood.concatenate([partial, estimate(model, x[done:])])
    assert len(joined) == 10
    error = joined.log_prob - dist.Normal(0.0, math.sqrt(2)).log_prob(x)
    within(error.mean().item(), 0.0, error.std().item() / math.sqrt(10) + 0.05)


@pytest.mark.parametrize("estimate", [by_importance, by_annealing])
def test_nothing_done_is_an_interrupt(monkeypatch, estimate):
    model = Interrupted(monkeypatch)
    model.at = 0
    with pytest.raises(KeyboardInterrupt):
        estimate(model, torch.zeros(10))
    assert model.training


@pytest.mark.parametrize("num_data", [10, 40])  # the second: more than are looked at before
def test_bounds_of_the_blocks_that_are_done(double, monkeypatch, num_data):
    model = Interrupted(monkeypatch)
    model.at = 1
    with pytest.warns(RuntimeWarning, match=f"the first 4 of {num_data} data"):
        result = pv.bidirectional_monte_carlo(
            model, torch.zeros(num_data), num_chains=16, num_temperatures=30, num_leapfrog_steps=5, data_batch_size=4
        )
    assert len(result) == len(result.data["x"]) == len(result.latents["z"]) == 4
    truth = dist.Normal(0.0, math.sqrt(2)).log_prob(result.data["x"])
    assert (result.lower - truth).abs().max() < 1
    assert (result.upper - truth).abs().max() < 1


def test_results_of_two_kinds_are_no_single_one():
    few, many = (pv.LogMarginalLikelihood.from_log_weights(torch.randn(size, 3)) for size in (5, 6))
    annealed = pv.LogMarginalLikelihood.from_annealed(torch.randn(5, 3), torch.ones(3))
    for parts in ([few, many], [few, annealed], []):
        with pytest.raises(ValueError, match="one method and one number of particles"):
            pv.LogMarginalLikelihood.concatenate(parts)
