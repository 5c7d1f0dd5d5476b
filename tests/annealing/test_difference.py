"""The difference estimator: what it is by hand, unbiased over slices, and how often its error bars hold the truth."""

import math
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within

import pyrovae as pv
from pyrovae.annealing import difference
from pyrovae.annealing.difference import DifferenceEstimate, size_of_slice


@pytest.fixture(autouse=True)
def _quick(uncompiled, short_pilots):
    """Nothing here depends on compilation or on well-tuned kernels."""


def result_of(log_prob, stderr=0.0):
    """A result with these estimates."""
    template = pv.LogMarginalLikelihood.from_log_weights(torch.zeros(2, len(log_prob), dtype=torch.float64))
    return replace(template, log_prob=log_prob.double(), stderr=torch.full_like(log_prob.double(), stderr))


def test_by_hand():
    found = DifferenceEstimate(
        result_of(torch.tensor([-3.0, -2.0, -4.0, -1.0])), result_of(torch.tensor([-1.5, -1.0])), torch.tensor([0, 3])
    )
    assert found.differences.tolist() == [1.5, 0.0]
    assert found.mean == pytest.approx(-2.5 + 0.75)
    assert found.difference_stderr == pytest.approx(math.sqrt(1.125 / 2 * 0.5))
    assert found.mean_stderr == pytest.approx(math.sqrt(1.125 / 4 + 0.125 / 4))
    assert "-1.750" in found.summary()
    assert "+0.750" in found.summary()


@pytest.mark.parametrize("shape", [0.3, 3.0])
def test_error_bars_hold_the_truth(shape):
    """2,000 slices of 60 from 1,500 data whose differences are lopsided, as those of images are.

    The truth is what annealing all data would give without its noise. 95 % bars hold it in 92 to 97 % of the slices for
    mildly lopsided differences; for strongly lopsided ones, where few data carry the mean, in fewer (89 % or more).
    """
    generator = torch.Generator().manual_seed(3)
    num_data, n, noise = 1_500, 60, 0.2
    truth = torch.randn(num_data, generator=generator, dtype=torch.float64) * 20 - 90
    miss = torch.distributions.Gamma(torch.full((num_data,), shape, dtype=torch.float64), 1.0).sample()
    importance = result_of(truth - miss)
    held, held_new = [], []
    for _ in range(2_000):
        index = torch.randperm(num_data)[:n]
        annealed = result_of(truth[index] + noise * torch.randn(n, dtype=torch.float64), noise)
        found = DifferenceEstimate(importance, annealed, index)
        held.append(abs(found.mean - truth.mean().item()) < 1.96 * found.mean_mc_stderr)
        held_new.append(abs(found.mean - (-90)) < 1.96 * found.mean_stderr)
    least = 0.92 if shape > 1 else 0.87
    assert least < sum(held) / len(held) < 0.97


def test_new_data_error_is_that_of_repeats():
    """The spread of the estimate over new data and new slices is `mean_stderr`."""
    means, errors = [], []
    for _ in range(1_000):
        truth = 3 * torch.randn(200, dtype=torch.float64)
        miss = torch.distributions.Gamma(torch.full((200,), 2.0, dtype=torch.float64), 1.0).sample()
        index = torch.randperm(200)[:40]
        found = DifferenceEstimate(result_of(truth - miss), result_of(truth[index]), index)
        means.append(found.mean)
        errors.append(found.mean_stderr**2)
    means = torch.tensor(means)
    within(means.mean().item(), 0.0, means.std().item() / math.sqrt(1_000))
    assert math.sqrt(sum(errors) / 1_000) == pytest.approx(
        means.std().item(), rel=0.1
    )  # 4.5 standard errors of a spread


def test_on_a_model_with_known_evidence(linear_gaussian):
    """Importance sampling by a bad guide misses much; the slice finds it."""
    x = linear_gaussian.data(400)
    exact = linear_gaussian.log_prob(x)
    importance = pv.log_marginal_likelihood(
        linear_gaussian.model, lambda x: linear_gaussian.guide(x, 0.15), x, num_particles=25
    )
    found = pv.anneal_a_slice(
        linear_gaussian.model, importance, x, num_annealed=60, num_temperatures=120, num_leapfrog_steps=4
    )
    assert exact.mean().item() - importance.mean > 0.1
    assert abs(found.mean - exact.mean().item()) < 4.5 * found.mean_mc_stderr + 0.02  # annealing's own bias
    assert found.difference > 4.5 * found.difference_stderr


def test_annealing_all_data_is_the_mean_of_annealing(linear_gaussian):
    x = linear_gaussian.data(12)
    importance = pv.log_marginal_likelihood(linear_gaussian.model, linear_gaussian.guide, x, num_particles=30)
    found = pv.anneal_a_slice(
        linear_gaussian.model, importance, x=x, num_annealed=12, num_temperatures=10, num_leapfrog_steps=2
    )
    assert found.mean == pytest.approx(found.annealed.mean)
    assert found.difference_stderr == 0
    assert sorted(found.index.tolist()) == list(range(12))


def test_a_constant_as_long_as_the_data_is_not_cut():
    """log_marginal_likelihood takes it whole; cutting it gave a number that was .4 nats off."""

    def model(x, w):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * w.sum(), 1.0), obs=x)

    def guide(x, w):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * w.sum() / (1 + w.sum() ** 2), 1.2 / (1 + w.sum() ** 2) ** 0.5))

    x, w = 2 * torch.randn(20), torch.full((20,), 0.1)
    importance = pv.log_marginal_likelihood(model, guide, x, w, num_particles=50)
    with pytest.raises(ValueError, match="not one row for each datum"):
        pv.anneal_a_slice(model, importance, x, w, num_annealed=10)


def test_few_data_that_decide_are_said():
    importance = result_of(torch.zeros(50))
    even = DifferenceEstimate(importance, result_of(torch.arange(10.0)), torch.arange(10))
    one = DifferenceEstimate(importance, result_of(torch.tensor([0.0] * 9 + [30.0])), torch.arange(10))
    assert "too small" in one.summary()
    assert "too small" not in even.summary()


def test_size_of_slice():
    assert size_of_slice(100, 10, 8, 200, 5, 1 / 3) == 10
    assert size_of_slice(5, 10, 8, 200, 5, 1 / 3) == 5


@pytest.mark.parametrize(
    ("num_annealed", "rows", "words"),
    [(1, 8, "num_annealed must be 2"), (9, 8, "at most the number of data, 8"), (4, 7, "no argument of that length")],
)
def test_bad_numbers_are_refused(linear_gaussian, num_annealed, rows, words):
    x = linear_gaussian.data(8)
    importance = pv.log_marginal_likelihood(linear_gaussian.model, linear_gaussian.guide, x, num_particles=30)
    with pytest.raises(ValueError, match=words):
        pv.anneal_a_slice(linear_gaussian.model, importance, x[:rows], num_annealed=num_annealed)


def test_a_model_that_holds_its_data(linear_gaussian):
    """All of them can be annealed, in their order; a slice cannot be taken."""
    x = linear_gaussian.data(6)
    model = pyro.condition(lambda: linear_gaussian.model(x), data={"x": x})

    def guide():
        return linear_gaussian.guide(x)

    importance = pv.log_marginal_likelihood(model, guide, num_particles=2000)
    found = pv.anneal_a_slice(model, importance, guide=guide, num_annealed=6, num_chains=8, num_temperatures=20)
    assert found.index.tolist() == list(range(6))
    torch.testing.assert_close(found.annealed.log_prob, importance.log_prob, atol=0.3, rtol=0)
    with pytest.raises(
        ValueError, match="holds its 6 data itself, and a slice of 4 cannot be taken: .*num_annealed=6, or pass"
    ):
        pv.anneal_a_slice(model, importance, guide=guide, num_annealed=4)


@pytest.mark.parametrize("finished", [0, 1, 4])
def test_an_interrupted_slice_is_a_random_one(linear_gaussian, finished, monkeypatch):
    """Its results are those of its own data, and these are no run of the first ones."""
    x = linear_gaussian.data(60)
    importance = pv.log_marginal_likelihood(linear_gaussian.model, linear_gaussian.guide, x, num_particles=5)
    whole = difference.annealed_importance_sampling
    monkeypatch.setattr(
        difference, "annealed_importance_sampling", lambda *args, **kwargs: _first(whole(*args, **kwargs), finished)
    )
    anneal = partial(
        pv.anneal_a_slice,
        *(linear_gaussian.model, importance, x),
        **{"guide": linear_gaussian.guide, "num_annealed": 20, "num_temperatures": 4, "num_leapfrog_steps": 2},
    )
    if finished < 2:
        with pytest.raises(KeyboardInterrupt):
            anneal()
        return
    found = anneal()
    assert found.index.tolist() != sorted(found.index.tolist()) or found.index.max() > 20
    # The exact guide gives exact evidence, so each number shows whose it is.
    assert torch.allclose(found.annealed.log_prob, linear_gaussian.log_prob(x[found.index]))


def _first(result, number):
    return result[:number] if number else []


def test_a_slice_of_the_plate_asked_for(linear_gaussian):
    x = linear_gaussian.data(12)
    importance = pv.log_marginal_likelihood(linear_gaussian.model, linear_gaussian.guide, x, num_particles=5)
    with pytest.raises(ValueError, match="'other'"):
        pv.anneal_a_slice(linear_gaussian.model, importance, x, num_annealed=4, plate="other")
