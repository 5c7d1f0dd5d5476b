"""Reducers work in float64 whatever dtype they are given, and take for rounding only what the dtype cannot tell apart."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrovae as pv
from pyrovae import estimators

NOT_REDUCERS = {"bits_per_dim", "ParetoTail", "pareto_k_limit"}
LOOK_AT_THE_TAIL = {"pareto_k", "pareto_smoothed_bound", "chi_square_bound", "pareto_tail"}
ERRORS = ["elbo_stderr", "importance_weighted_bound_stderr", "gap", "gap_stderr"]


def answers(name, log_weights):
    """(..., N) of every reducer, whatever it returns besides."""
    result = getattr(estimators, name)(log_weights)
    if name == "bound_curve":
        return result[1]
    return torch.stack(tuple(result)) if name == "pareto_tail" else result


def special(log_weights, column, kind):
    """Write zeros, infinities or NaN into one column."""
    if kind != "none":
        rows = slice(None) if kind == "all zero" else slice(0, None, 3)
        log_weights[rows, column] = {"some nan": math.nan, "some inf": math.inf}.get(kind, -math.inf)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_particles=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    level=st.sampled_from([0.0, 3.0, -10.0, -100.0, -1e3, -3e4]),
    spread=st.floats(-2, 1.5).map(lambda power: 10.0**power),
    kind=st.sampled_from(["none", "some zero", "all zero", "some nan", "some inf"]),
)
def test_a_reducer_gives_what_it_gives_in_float64(seed, num_particles, dtype, level, spread, kind):
    """Exactly, unless the weights agree to rounding: then no error. Of the tail: or NaN if it spans fewer than 32 numbers."""
    generator = torch.Generator().manual_seed(seed)
    given = (level + spread * torch.randn(num_particles, 4, generator=generator, dtype=torch.float64)).to(dtype)
    special(given, 0, kind)
    exact = given.double()
    low, high = exact.aminmax(dim=0)
    spacing = torch.finfo(dtype).eps * high.abs().clamp_min(1)
    constant = high - low <= (32 * spacing).clamp_max(0.01)
    for name in set(estimators.__all__) - NOT_REDUCERS - LOOK_AT_THE_TAIL:
        found, expected = answers(name, given), answers(name, exact)
        assert found.dtype == torch.float64
        same = (found == expected) | (found.isnan() & expected.isnan())
        if name in ERRORS:
            assert (found[constant] == 0).all() or num_particles == 1, name
            same |= constant
        elif name.startswith("jackknife"):
            same |= constant & ((found - expected).abs() < 1e-4)
        assert same.all(), name
    k, expected = estimators.pareto_k(given), estimators.pareto_k(exact)
    same = (k == expected) | (k.isnan() & expected.isnan())
    ordered = exact.sort(0, descending=True).values
    size = math.ceil(min(num_particles / 5, 3 * num_particles**0.5))
    if num_particles > size:
        coarse = ordered[0] - ordered[size] < 32 * spacing
        agreeing = (ordered[0] - ordered[: min(5, num_particles)] <= 0.01).all(0)
        assert (same | (k.isnan() & coarse) | ((k == 0) & agreeing)).all()
    for name in ("pareto_smoothed_bound", "chi_square_bound"):
        found, expected = answers(name, given), answers(name, exact)
        assert ((found == expected) | (found.isnan() & expected.isnan()))[same].all(), name


@pytest.mark.parametrize(
    ("dtype", "level", "spread"),
    [
        (torch.bfloat16, -100, 1.0),
        (torch.bfloat16, -10, 0.3),
        (torch.float16, -1000, 1.0),
        (torch.float16, -100, 0.3),
        (torch.float32, -1e4, 0.005),
        (torch.float32, -1e5, 0.1),
        (torch.float32, 1e6, 0.5),
    ],
)
def test_a_spread_that_the_dtype_resolves_is_seen(dtype, level, spread):
    """log w ~ N(level, s^2), for which the gap is s^2/2 and the ELBO's error s/sqrt(S); |log w| alone hides none of it."""
    num_particles = 20_000
    log_weights = (level + spread * torch.randn(num_particles, 2, dtype=torch.float64)).to(dtype)
    rounded = (log_weights.double() - level).var(0)  # rounding adds a twelfth of the squared spacing
    assert ((rounded / spread**2 - 1).abs() < 0.15).all()
    assert ((estimators.gap(log_weights) / (spread**2 / 2) - 1).abs() < 0.2).all()
    for name, expected in {
        "elbo_stderr": spread,
        "importance_weighted_bound_stderr": math.sqrt(math.expm1(spread**2)),
    }.items():
        found = getattr(estimators, name)(log_weights) * math.sqrt(num_particles)
        assert ((found / expected - 1).abs() < 0.2).all(), name
    assert (estimators.gap_stderr(log_weights) > 0).all()


HEAVY = {
    "light": lambda size: torch.randn(size, 8, dtype=torch.float64),
    "k = 0.7": lambda size: -0.7 * torch.rand(size, 8, dtype=torch.float64).log(),
    "k = 1.5": lambda size: -1.5 * torch.rand(size, 8, dtype=torch.float64).log(),
}


@pytest.mark.parametrize("name", HEAVY)
@pytest.mark.parametrize(
    ("dtype", "level"), [(torch.bfloat16, -100), (torch.bfloat16, 1000), (torch.float16, -2000), (torch.float32, -3e6)]
)
def test_k_is_unknown_if_the_dtype_cannot_tell_the_large_weights_apart(dtype, level, name):
    """Neither 0, as if a bound had been seen, nor infinite, as if the weights were discrete: both would be rounding."""
    log_weights = (level + HEAVY[name](1000)).to(dtype)
    assert estimators.pareto_k(log_weights).isnan().all()
    assert estimators.chi_square_bound(log_weights).isnan().all()
    bound = estimators.importance_weighted_bound(log_weights)
    assert torch.equal(estimators.pareto_smoothed_bound(log_weights), bound)
    lml = pv.evaluation.marginal_likelihood.LogMarginalLikelihood.from_log_weights(log_weights)
    assert math.isnan(lml.share_of_bad_k())
    assert "Pareto k" not in lml.summary()
    assert "±" in lml.summary()


@pytest.mark.parametrize("name", HEAVY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_k_of_a_tail_that_the_dtype_resolves(dtype, name):
    log_weights = HEAVY[name](1000)
    log_weights -= log_weights.max(0).values  # the largest numbers of a dtype are the coarsest
    exact = estimators.pareto_k(log_weights)
    assert ((estimators.pareto_k(log_weights.to(dtype)) - exact).abs() < 0.15).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_pixels=st.integers(1, 800),
    scale=st.floats(0.1, 1.0),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_an_exact_guide_has_no_tail_whatever_its_terms_round_to(seed, num_pixels, scale, dtype):
    """z ~ N(0, 1), x_d | z ~ N(z, s^2): the terms cancel where log p(x) is near 0, their rounding noise does not."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 1, generator=generator, dtype=torch.float64)
    x = x + scale * torch.randn(16, num_pixels, generator=generator, dtype=torch.float64)
    variance = 1 / (1 + num_pixels / scale**2)
    posterior = torch.distributions.Normal((variance / scale**2 * x.sum(1)).to(dtype), math.sqrt(variance))
    torch.manual_seed(seed)
    z = posterior.sample((200,))
    likelihood = torch.distributions.Normal(z.unsqueeze(-1), scale).log_prob(x.to(dtype)).sum(-1)
    log_weights = torch.distributions.Normal(0.0, 1.0).log_prob(z) + likelihood - posterior.log_prob(z)
    assert (estimators.pareto_k(log_weights) == 0).all()
    assert (estimators.gap(log_weights) < 1e-6).all()
    assert (estimators.importance_weighted_bound_stderr(log_weights) < 1e-4).all()


@pytest.mark.parametrize("values", [(-90.0, -92.0), (0.3, -1.0, -5.0), (-700.0, -math.inf)])
def test_discrete_weights_stay_discrete_under_rounding_noise(values):
    """Few values, each with noise in its last digits: bounded by the largest, as without the noise."""
    log_weights = torch.tensor(values)[torch.randint(len(values), (1000, 5))]
    noise = 3 * torch.finfo(torch.float32).eps * 100 * torch.randn(1000, 5)
    assert (estimators.pareto_k(log_weights) == 0).all()
    assert (estimators.pareto_k(log_weights + noise) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, -3.0, -1000.0])
def test_equal_weights_have_no_error_in_any_dtype(dtype, value):
    log_weights = torch.full((100, 2), value, dtype=dtype)
    for name in (*ERRORS, "pareto_k"):
        assert getattr(estimators, name)(log_weights).tolist() == [0, 0], name
    assert estimators.importance_weighted_bound(log_weights).tolist() == pytest.approx([value] * 2, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_what_is_no_floating_point_is_refused(dtype):
    for name in set(estimators.__all__) - NOT_REDUCERS:
        with pytest.raises(TypeError, match=r"floating point, found torch\."):
            answers(name, torch.ones(50, 3).to(dtype))
