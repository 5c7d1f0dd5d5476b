"""Reducers against exact answers, before anything uses them."""

import math
from itertools import combinations, pairwise

import pyro.distributions as dist
import pytest
import torch
from conftest import within

from pyrovae import estimators
from pyrovae.estimators.weights import Weights

REDUCERS = [
    "elbo",
    "elbo_stderr",
    "importance_weighted_bound",
    "importance_weighted_bound_stderr",
    "gap",
    "gap_stderr",
    "jackknife",
    "jackknife_2",
    "effective_sample_size",
    "pareto_k",
    "pareto_smoothed_bound",
    "chi_square_bound",
]


def test_every_reducer_is_listed():
    assert {*REDUCERS, "bits_per_dim", "bound_curve", "pareto_k_limit", "pareto_tail", "ParetoTail"} == set(
        estimators.__all__
    )


def test_an_array_that_was_looked_at_gives_what_the_array_gives():
    """`Weights` keeps what several reducers ask for; none of them may change it for the next."""
    log_weights = torch.randn(60, 4)
    looked_at = Weights(log_weights)
    for name in 2 * REDUCERS:
        reducer = getattr(estimators, name)
        assert torch.equal(reducer(looked_at), reducer(log_weights)), name


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


def by_definition(log_weights, order):
    """sum_j c_j mean over all subsets of S - j weights of their bound, c_j = (-1)^j (S - j)^m / (j! (m - j)!)."""
    num_particles = len(log_weights)
    total = 0.0
    for left_out in range(order + 1):
        size = num_particles - left_out
        coefficient = (-1) ** left_out * size**order / math.factorial(left_out) / math.factorial(order - left_out)
        bounds = [
            estimators.importance_weighted_bound(log_weights[list(kept)])
            for kept in combinations(range(num_particles), size)
        ]
        total = total + coefficient * torch.stack(bounds).mean(0)
    return total


@pytest.mark.parametrize("num_particles", [3, 4, 9, 10, 11, 40])
@pytest.mark.parametrize("spread", [0.3, 2.0, 12.0])
def test_jackknives_by_definition(num_particles, spread):
    """Over all subsets; so that, in expectation, they are the same sums of E[L_S], and lose the orders they should."""
    log_weights = spread * torch.randn(num_particles, 6).double() - 90
    log_weights[:, 1] = log_weights[:, 1].sort().values
    log_weights[: num_particles // 4, 2] = -torch.inf
    log_weights[0, 3] += 40  # nearly everything
    log_weights[1:3, 4] += 30  # two that are
    for order, estimator in ((1, estimators.jackknife), (2, estimators.jackknife_2)):
        exact = by_definition(log_weights, order)
        assert torch.allclose(estimator(log_weights), exact, rtol=1e-9, atol=1e-8), order


def gamma_bias(size, shape=0.8):
    """E[L_S] - log E[w] of weights Gamma(a, 1)."""
    return torch.digamma(shape * size) - torch.log(shape * size)


def two_point_bias(size):
    """The same of weights that are 3 with probability 0.3, else 1."""
    size, number = int(size), torch.arange(int(size) + 1).double()
    log_mass = dist.Binomial(size, torch.tensor(0.3).double()).log_prob(number)
    return (log_mass.exp() * torch.log1p(2 * number / size)).sum() - math.log(1.6)


def jackknifed(bias, size, order):
    """What is left of the bias: the jackknife is the same sum of E[L_S], E[L_{S-1}], ... as of L_S, L_{S-1}, ..."""
    if order == 0:
        return bias(size)
    if order == 1:
        return size * bias(size) - (size - 1) * bias(size - 1)
    return size**2 / 2 * bias(size) - (size - 1) ** 2 * bias(size - 1) + (size - 2) ** 2 / 2 * bias(size - 2)


@pytest.mark.parametrize(
    ("bias", "powers"),
    [
        (gamma_bias, [1, 2, 4]),  # digamma(y) - log y = -1/2y - 1/12y^2 + 1/120y^4 - ... has no third order
        (two_point_bias, [1, 2, 3]),
    ],
)
def test_jackknives_lose_the_bias_of_their_order(bias, powers):
    """Exactly: the bias falls as S^-1, S^-2 and S^-3 (or faster)."""
    sizes = torch.tensor([30.0, 60.0]).double()
    for order, power in enumerate(powers):
        small, large = (jackknifed(bias, size, order).item() for size in sizes)
        assert math.log2(small / large) == pytest.approx(power, abs=0.2), order


def test_jackknives_have_these_expectations():
    num_particles, repeats = 6, 400_000
    weights = torch.distributions.Gamma(torch.tensor(0.8).double(), 1.0).sample((num_particles, repeats)) / 0.8
    size = torch.tensor(float(num_particles)).double()
    estimates = (estimators.importance_weighted_bound, estimators.jackknife, estimators.jackknife_2)
    exact = [jackknifed(gamma_bias, size, order).item() for order in range(3)]
    for truth, estimator in zip(exact, estimates, strict=True):
        found = estimator(weights.log())
        within(found.mean().item(), truth, found.std().item() / math.sqrt(repeats))
    assert abs(exact[2]) < 0.3 * abs(exact[1]) < 0.03 * abs(exact[0])


def test_second_jackknife_keeps_its_digits():
    """At S = 5,000 the coefficients are 12 million: against a sum over all pairs, in float64 and from float32 weights."""
    log_weights = 2 * torch.randn(5000, 3, dtype=torch.float64) - 90
    log_weights[0, 1] += 20
    normalised = log_weights.softmax(0).T  # (N, S)
    odds = normalised / (1 - normalised)
    first, second = torch.triu_indices(5000, 5000, 1)
    pairs = torch.stack([torch.log1p(-row[first] * row[second]).mean() for row in odds])
    alone = torch.log1p(-normalised).mean(1)
    size = 5000.0
    exact = (
        estimators.importance_weighted_bound(log_weights)
        + ((size - 1) ** 2 * math.log1p(-1 / size) - (size - 2) ** 2 / 2 * math.log1p(-2 / size))
        - (2 * size - 3) * alone
        + (size - 2) ** 2 / 2 * pairs
    )
    assert torch.allclose(estimators.jackknife_2(log_weights)[[0, 2]], exact[[0, 2]], atol=1e-8)
    assert torch.allclose(estimators.jackknife_2(log_weights.float()), estimators.jackknife_2(log_weights), atol=5e-4)
    # Equal weights, through the sums: nothing to correct.
    nearly = -90 + 1e-9 * torch.randn(5000, 2, dtype=torch.float64)
    assert torch.allclose(estimators.jackknife_2(nearly), estimators.importance_weighted_bound(nearly), atol=1e-7)


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
    for name in ("jackknife", "jackknife_2", "pareto_smoothed_bound", "chi_square_bound"):
        assert getattr(estimators, name)(log_weights).tolist() == pytest.approx([value] * 2, rel=1e-5), name
    assert estimators.effective_sample_size(log_weights).tolist() == pytest.approx([100, 100])
    for name in ("elbo_stderr", "importance_weighted_bound_stderr", "gap", "gap_stderr", "pareto_k"):
        assert getattr(estimators, name)(log_weights).tolist() == [0, 0], name


def test_one_particle_is_honest():
    log_weights = torch.tensor([[-3.0, -4.0]])
    assert estimators.importance_weighted_bound(log_weights).tolist() == [-3, -4]
    assert estimators.gap(log_weights).tolist() == [0, 0]
    unknown = ("elbo_stderr", "importance_weighted_bound_stderr", "gap_stderr", "pareto_k", "jackknife", "jackknife_2")
    for name in (*unknown, "chi_square_bound"):
        assert getattr(estimators, name)(log_weights).isnan().all(), name
    assert estimators.pareto_smoothed_bound(log_weights).tolist() == [-3, -4]


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
    assert estimators.jackknife_2(one).isnan().item()
    assert estimators.pareto_smoothed_bound(one).item() == pytest.approx(-math.log(30))
    one[7] = 0.0
    assert estimators.jackknife_2(one).item() == -torch.inf
    assert estimators.jackknife_2(log_weights)[0].isfinite()
    assert estimators.jackknife_2(log_weights)[1] == -torch.inf


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
    """The contract: range <= 32 eps max|log w| is rounding. At 1,000 nats in float32 that is 0.0038, in float64 7e-12."""
    spread = torch.linspace(0.0, 0.0035, 101, dtype=torch.float64).unsqueeze(1) - 1000
    hidden, seen = spread.float(), spread
    assert estimators.importance_weighted_bound_stderr(hidden).item() == 0
    assert estimators.pareto_k(hidden).item() == 0
    stderr = estimators.importance_weighted_bound_stderr(seen).item()
    assert 0 < stderr < 0.002 / math.sqrt(100)
    assert 0 < estimators.gap(seen).item() < 0.0035**2 / 8
    wider = (1000 + 2 * (spread + 1000) - 2000).float()
    assert estimators.importance_weighted_bound_stderr(wider).item() == pytest.approx(2 * stderr, rel=0.02)


# --- smoothing, and the bound from above ---------------------------------------------------------------------------------


def test_smoothing_helps_where_the_tail_is_heavy():
    """w = u^-k (1 - k), E[w] = 1, k = 0.6: the smoothed estimate has the smaller error, and the mean it should."""
    k = 0.6
    uniform = torch.rand(1000, 800, dtype=torch.float64)
    log_weights = -k * uniform.log() + math.log(1 - k) - 77
    tail = estimators.pareto_tail(log_weights)
    raw = estimators.importance_weighted_bound(log_weights) + 77
    smoothed = tail.smoothed_bound + 77
    assert torch.equal(tail.smoothed_bound, estimators.pareto_smoothed_bound(log_weights))
    assert torch.equal(tail.k, estimators.pareto_k(log_weights))
    assert smoothed.exp().std() < 0.8 * raw.exp().std()
    assert abs(smoothed.exp().mean().item() - 1) < 0.05
    assert (smoothed - raw).abs().median() > 0.001


def test_only_the_tail_is_smoothed():
    """What ArviZ adds to all weights is taken off again: a shift of the weights is a shift of the estimate."""
    log_weights = 1.5 * torch.randn(400, 30).double()
    smoothed = estimators.pareto_smoothed_bound(log_weights)
    raw = estimators.importance_weighted_bound(log_weights)
    assert torch.allclose(estimators.pareto_smoothed_bound(log_weights - 500), smoothed - 500)
    share = (log_weights.sort(0).values[:-60].logsumexp(0) - math.log(400) - smoothed).exp()
    assert (share < 1).all()  # the body alone is less
    assert ((smoothed - raw).abs() < 5 * estimators.importance_weighted_bound_stderr(log_weights)).all()
    # No weight grows above the largest.
    assert (smoothed < log_weights.max(0).values).all()
    half = torch.where(torch.rand(400, 30) < 0.9, -torch.inf, log_weights)  # the body has no weight to hold on to
    assert torch.equal(estimators.pareto_smoothed_bound(half), estimators.importance_weighted_bound(half))


def test_chi_square_bound_is_above_where_the_tail_allows_it():
    """w = exp(s e - s^2/2): E[w] = 1, CUBO_2 = s^2/2 exactly; nothing where k is 0.5 or more."""
    scale = 0.6
    log_weights = scale * torch.randn(4000, 500).double() - scale**2 / 2
    bound = estimators.chi_square_bound(log_weights)
    known = bound[bound.isfinite()]
    assert len(known) > 450
    spread = math.sqrt(math.exp(4 * scale**2) - 1) / 2 / math.sqrt(4000)  # of one, by the delta method
    assert abs(known.mean().item() - scale**2 / 2) < spread  # k < 0.5 chooses among the draws
    k = estimators.pareto_k(log_weights)
    assert torch.equal(bound.isnan(), k >= 0.5)
    assert torch.equal(estimators.chi_square_bound(log_weights, k).nan_to_num(), bound.nan_to_num())
    heavy = -0.8 * torch.rand(4000, 5, dtype=torch.float64).log()
    assert estimators.chi_square_bound(heavy).isnan().all()
    assert estimators.chi_square_bound(log_weights[:20]).isnan().all()
