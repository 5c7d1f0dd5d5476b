"""Reducers against exact answers, before anything uses them."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import within

from pyrovae import estimators

REDUCERS = [
    "elbo",
    "elbo_stderr",
    "importance_weighted_bound",
    "importance_weighted_bound_stderr",
    "gap",
    "gap_stderr",
    "jackknife",
    "effective_sample_size",
    "pareto_k",
]


def test_every_reducer_is_listed():
    assert {*REDUCERS, "bound_curve", "pareto_k_limit"} == set(estimators.__all__)


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_and_refusals(name, dtype):
    reducer = getattr(estimators, name)
    assert reducer(torch.randn(50, 3, dtype=dtype)).shape == (3,)
    assert reducer(torch.randn(50, 3, dtype=dtype)).dtype == torch.float64
    for wrong in (torch.randn(50), torch.randn(0, 3), torch.randn(2, 2, 2)):
        with pytest.raises(ValueError, match="num_particles, num_data"):
            reducer(wrong)
    with pytest.raises(TypeError, match="floating"):
        reducer(torch.ones(50, 3, dtype=torch.int64))


def test_hand_computed_values():
    weights = torch.tensor([[1.0, 2.0, 3.0, 6.0]]).double().T
    log_weights = weights.log()
    assert estimators.elbo(log_weights).item() == pytest.approx(math.log(36) / 4)
    assert estimators.importance_weighted_bound(log_weights).item() == pytest.approx(math.log(3))
    assert estimators.gap(log_weights).item() == pytest.approx(math.log(3) - math.log(36) / 4)
    assert estimators.effective_sample_size(log_weights).item() == pytest.approx(144 / 50)
    variance = (4 + 1 + 0 + 9) / 3
    assert estimators.importance_weighted_bound_stderr(log_weights).item() == pytest.approx(math.sqrt(variance / 4) / 3)
    leave_one_out = [math.log(11 / 3), math.log(10 / 3), math.log(9 / 3), math.log(6 / 3)]
    assert estimators.jackknife(log_weights).item() == pytest.approx(4 * math.log(3) - 3 * sum(leave_one_out) / 4)
    sizes, curve = estimators.bound_curve(log_weights)
    assert sizes == [1, 2, 4]
    assert curve[:, 0].tolist() == pytest.approx([math.log(36) / 4, (math.log(1.5) + math.log(4.5)) / 2, math.log(3)])


def test_bound_of_gamma_weights_is_exact_in_expectation():
    """Weights Gamma(a, 1): E[L_S] = digamma(a S) - log(a S), the truth being log a with weights/a."""
    shape, num_particles, repeats = 0.8, 10, 200_000
    weights = torch.distributions.Gamma(torch.tensor(shape).double(), 1.0).sample((num_particles, repeats)) / shape
    bounds = estimators.importance_weighted_bound(weights.log())
    exact = torch.digamma(torch.tensor(shape * num_particles)).item() - math.log(shape * num_particles)
    within(bounds.mean().item(), exact, bounds.std().item() / math.sqrt(repeats))
    # The jackknife takes most of that bias away.
    corrected = estimators.jackknife(weights.log())
    assert abs(corrected.mean().item()) < 0.3 * abs(exact)


def test_jackknife_is_stable_in_float32():
    log_weights = 2 * torch.randn(5000, 20, dtype=torch.float64) - 90
    exact = estimators.jackknife(log_weights)
    assert torch.allclose(estimators.jackknife(log_weights.float()), exact, atol=2e-4)
    naive = []  # by its definition
    total = log_weights.logsumexp(0)
    for datum in range(2):
        column = log_weights[:, datum]
        others = torch.log1p(-(column - total[datum]).exp()) + total[datum] - math.log(4999)
        naive.append((5000 * (total[datum] - math.log(5000)) - 4999 * others.mean()).item())
    assert exact[:2].tolist() == pytest.approx(naive, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, -543.21, 12.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_weights(value, dtype):
    """A perfect guide: no error, no tail, whatever rounding does."""
    noise = torch.randn(100, 2, dtype=dtype) * torch.finfo(dtype).eps * abs(value)
    log_weights = torch.full((100, 2), value, dtype=dtype) + noise
    assert estimators.importance_weighted_bound(log_weights).tolist() == pytest.approx([value] * 2, rel=1e-5)
    assert estimators.jackknife(log_weights).tolist() == pytest.approx([value] * 2, rel=1e-5)
    assert estimators.effective_sample_size(log_weights).tolist() == pytest.approx([100, 100])
    for name in ("elbo_stderr", "importance_weighted_bound_stderr", "gap", "gap_stderr", "pareto_k"):
        assert getattr(estimators, name)(log_weights).tolist() == [0, 0], name


def test_one_particle_is_honest():
    log_weights = torch.tensor([[-3.0, -4.0]])
    assert estimators.importance_weighted_bound(log_weights).tolist() == [-3, -4]
    assert estimators.gap(log_weights).tolist() == [0, 0]
    for name in ("elbo_stderr", "importance_weighted_bound_stderr", "gap_stderr", "pareto_k", "jackknife"):
        assert getattr(estimators, name)(log_weights).isnan().all(), name


def test_zero_weights():
    log_weights = torch.randn(64, 3).double()
    log_weights[::2, 0] = -torch.inf
    log_weights[:, 1] = -torch.inf
    bound = estimators.importance_weighted_bound(log_weights)
    alive = estimators.importance_weighted_bound(log_weights[1::2])
    assert bound[0].item() == pytest.approx(alive[0].item() - math.log(2))
    assert bound[1] == -torch.inf
    assert estimators.elbo(log_weights)[:2].tolist() == [-torch.inf, -torch.inf]
    assert estimators.gap(log_weights)[0] == torch.inf
    stderr = estimators.importance_weighted_bound_stderr(log_weights)
    assert stderr[0].isfinite()
    assert stderr[1].isnan()
    assert estimators.jackknife(log_weights)[0].isfinite()
    assert estimators.jackknife(log_weights)[1] == -torch.inf
    assert estimators.pareto_k(log_weights).isnan().tolist() == [False, True, False]
    assert estimators.effective_sample_size(log_weights).isnan().tolist() == [False, True, False]
    one = torch.full((30, 1), -torch.inf, dtype=torch.float64)
    one[3] = 0.0
    assert estimators.jackknife(one).item() == torch.inf


@pytest.mark.parametrize(("k", "low", "high"), [(0.2, -0.1, 0.45), (0.7, 0.5, 0.9), (1.5, 1.2, 1.8)])
def test_pareto_k_finds_the_tail_of_pareto_weights(k, low, high):
    """w = u^-k has tail shape k. Log weights go in, not their negatives: the other sign would give k <= 0."""
    log_weights = -k * torch.rand(20_000, 4, dtype=torch.float64).log()
    estimate = estimators.pareto_k(log_weights)
    assert (estimate > low).all()
    assert (estimate < high).all()
    before = log_weights.clone()
    estimators.pareto_k(log_weights)
    assert torch.equal(before, log_weights), "the fit must not change the weights"


def test_pareto_k_needs_25_particles_and_its_limit():
    assert estimators.pareto_k(torch.randn(24, 2)).isnan().all()
    assert not estimators.pareto_k(torch.randn(25, 2)).isnan().any()  # ArviZ 1.x says inf: too few to tell
    assert estimators.pareto_k(torch.randn(100, 2)).isfinite().all()
    assert estimators.pareto_k_limit(1000) == pytest.approx(1 - 1 / 3)
    assert estimators.pareto_k_limit(10**6) == 0.7
    with pytest.raises(ValueError, match="num_particles=1"):
        estimators.pareto_k_limit(1)


@pytest.mark.parametrize("num_particles", [1, 2, 7, 12, 60, 101, 1000, 1024])
def test_curve_rises_from_elbo_to_bound(num_particles):
    log_weights = 3 * torch.randn(num_particles, 8).double()
    sizes, curve = estimators.bound_curve(log_weights)
    assert sizes[0] == 1
    assert sizes[-1] == num_particles
    assert all(larger % smaller == 0 for smaller, larger in pairwise(sizes))
    assert torch.allclose(curve[0], estimators.elbo(log_weights))
    assert torch.allclose(curve[-1], estimators.importance_weighted_bound(log_weights))
    assert (curve.diff(dim=0) >= -1e-12).all()


def test_standard_errors_match_the_spread_of_repeats():
    """Delta-method errors of bound, ELBO and gap against the spread over 4,000 repeats (2 % accurate)."""
    log_weights = 0.8 * torch.randn(400, 4000).double()
    for estimate, error in (
        (estimators.elbo, estimators.elbo_stderr),
        (estimators.importance_weighted_bound, estimators.importance_weighted_bound_stderr),
        (estimators.gap, estimators.gap_stderr),
    ):
        assert error(log_weights).mean().item() == pytest.approx(estimate(log_weights).std().item(), rel=0.08)


def test_discrete_weights_have_no_tail():
    log_weights = torch.bernoulli(torch.full((1000, 3), 0.5)).double() * 2 - 50
    assert estimators.pareto_k(log_weights).tolist() == [0, 0, 0]


TAILS = {
    "one large weight": ([5.0], math.inf),
    "two values, the larger four times": ([5.0] * 4, math.inf),
    "two values, the larger five times": ([5.0] * 5, 0.0),
    "four values": ([5.0, 4.0, 4.0, 4.0, 3.0, 3.0, 2.0, 2.0], math.inf),
    "five values, the largest five times": ([5.0] * 5 + [4.0, 3.0, 2.0, 1.0], 0.0),
    "a foot of ties": ([5.0, 4.5, 4.0, 3.5, 3.0] + [1.0] * 40, math.inf),
    "values that differ in the last digit": ([5.0, 5.0 - 1e-15, 5.0 - 2e-15], math.inf),
    "values that underflow": ([5.0, -800.0, -801.0], math.inf),
}


@pytest.mark.parametrize("rest", [0.0, -math.inf])
@pytest.mark.parametrize("num_particles", [50, 100, 225, 1000])
@pytest.mark.parametrize("name", TAILS)
def test_tails_of_few_values(name, num_particles, rest):
    """Never an exception nor a number from a fit that cannot be made, on ArviZ 0.x and 1.x."""
    values, expected = TAILS[name]
    log_weights = torch.full((num_particles, 1), rest, dtype=torch.float64)
    log_weights[: len(values), 0] = torch.tensor(values).double()
    log_weights = log_weights[torch.randperm(num_particles)] - 70
    if name == "a foot of ties" and num_particles == 50:
        return  # there the ties are below the tail
    assert estimators.pareto_k(log_weights).item() == expected
    beside = torch.cat([log_weights, torch.randn(num_particles, 1).double()], 1)
    assert estimators.pareto_k(beside)[0].item() == expected
    assert estimators.pareto_k(beside)[1].isfinite()


def test_any_weights_have_an_answer():
    """Random tails of few values, of zeros, of jumps: a number, 0 or inf, or NaN where all weights are 0."""
    for _ in range(300):
        num_particles = int(torch.randint(25, 400, ()))
        values = torch.randn(int(torch.randint(1, 9, ()))).double() * 10 ** (8 * torch.rand(()).double() - 6)
        log_weights = values[torch.randint(len(values), (num_particles, 3))]
        log_weights[torch.rand(num_particles, 3) < 0.3 * torch.rand(())] = -torch.inf
        log_weights[0] += 100 * torch.rand(3)
        k = estimators.pareto_k(log_weights)
        assert torch.equal(k.isnan(), (log_weights == -torch.inf).all(0))
        assert not (k == -torch.inf).any()


def test_a_continuous_tail_beside_ties_is_fitted():
    """Ties in the body leave the fit alone: k is that of the same tail without them."""
    log_weights = -0.6 * torch.rand(2000, 1, dtype=torch.float64).log()
    tied = torch.where(log_weights < log_weights.median(), log_weights.min(), log_weights)
    assert estimators.pareto_k(tied).item() == pytest.approx(estimators.pareto_k(log_weights).item(), abs=1e-12)


def test_a_nan_among_the_weights_is_no_k():
    log_weights = torch.randn(100, 2).double()
    log_weights[3, 1] = torch.nan
    assert estimators.pareto_k(log_weights).isnan().tolist() == [False, True]


def test_what_float32_hides():
    """The contract: range <= 64 eps max|log w| is rounding. At 1,000 nats in float32 that is 0.0076, in float64 1e-11."""
    spread = torch.linspace(0.0, 0.007, 101, dtype=torch.float64).unsqueeze(1) - 1000
    hidden, seen = spread.float(), spread
    assert estimators.importance_weighted_bound_stderr(hidden).item() == 0
    assert estimators.pareto_k(hidden).item() == 0
    stderr = estimators.importance_weighted_bound_stderr(seen).item()
    assert 0 < stderr < 0.004 / math.sqrt(100)
    assert 0 < estimators.gap(seen).item() < 0.007**2 / 8
    wider = (1000 + 2 * (spread + 1000) - 2000).float()
    assert estimators.importance_weighted_bound_stderr(wider).item() == pytest.approx(2 * stderr, rel=0.02)
