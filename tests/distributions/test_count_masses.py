"""Counts, t and log-normal distributions against 50 digits, closed forms of their gradients, and moments of draws."""

import math

import mpmath
import pytest
import torch
from conftest import within
from torch.distributions import constraints

from pyrovae.distributions.count_masses import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from pyrovae.distributions.mixed import Categories, Mixed
from pyrovae.distributions.real_values import Affine, LogNormal, StudentT

LOG_MEANS = [math.log(1e-8), -2.0, 0.3, 5.0, math.log(1e6)]
LOG_SIZES = [
    -900.0,
    -740.0,
    -18.0,
    -1.0,
    0.0,
    math.log(15.99),
    math.log(16.01),
    7.0,
    20.0,
    45.0,
    80.0,
    600.0,
    720.0,
    3000.0,
]
COUNTS = [0, 1, 2, 17, 1000, 1_000_000]


def negative_binomial(count, log_mean, log_size):
    """Log mass and its gradients by the two parameters, in 50 digits."""
    with mpmath.workdps(60 + max(0, int(log_size / 2.3))):  # of r log r, with r = exp(log_size)
        x, m, r = mpmath.mpf(count), mpmath.exp(log_mean), mpmath.exp(log_size)
        log_mass = (
            mpmath.loggamma(x + r) - mpmath.loggamma(r) - mpmath.loggamma(x + 1)
            + r * mpmath.log(r / (r + m)) + x * mpmath.log(m / (r + m))
        )  # fmt: skip
        by_mean = x - (x + r) * m / (r + m)
        by_size = r * (mpmath.digamma(x + r) - mpmath.digamma(r) + mpmath.log(r / (r + m)) + 1 - (x + r) / (r + m))
        return float(log_mass), float(by_mean), float(by_size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("log_size", LOG_SIZES)
def test_negative_binomial_exactly(log_size, dtype):
    """From a dispersion without bound to none, for rates from 1e-8 to 1e6: values and gradients, in float32 too."""
    grid = torch.cartesian_prod(torch.tensor(LOG_MEANS, dtype=dtype), torch.tensor(COUNTS, dtype=dtype))
    log_mean = grid[:, 0].clone().requires_grad_()
    sizes = torch.full((len(grid),), log_size, dtype=dtype, requires_grad=True)
    found = NegativeBinomial(log_mean, sizes).log_prob(grid[:, 1])
    assert found.dtype == dtype
    gradients = torch.autograd.grad(found.sum(), [log_mean, sizes])
    wanted = [negative_binomial(int(x), m.item(), sizes[0].item()) for m, x in grid]
    tolerance = 1e-11 if dtype == torch.float64 else 2e-7
    # Terms as large as the count or the mean cancel.
    size_of_terms = 1 + 1e-3 * (grid[:, 1] + grid[:, 0].exp()).double()
    for column, values in enumerate((found, *gradients)):
        exact = torch.tensor([row[column] for row in wanted], dtype=torch.float64)
        error = (values.double() - exact).abs()
        assert (error <= tolerance * exact.abs() + 2e-11 * size_of_terms).all(), (column, error / size_of_terms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_poisson_exactly(dtype):
    grid = torch.cartesian_prod(torch.tensor(LOG_MEANS, dtype=dtype), torch.tensor(COUNTS, dtype=dtype))
    log_rate = grid[:, 0].clone().requires_grad_()
    found = Poisson(log_rate).log_prob(grid[:, 1])
    (gradient,) = torch.autograd.grad(found.sum(), log_rate)
    with mpmath.workdps(50):
        exact = [
            float(int(x) * mpmath.mpf(m.item()) - mpmath.exp(m.item()) - mpmath.loggamma(int(x) + 1)) for m, x in grid
        ]
    tolerance = 1e-9 if dtype == torch.float64 else 2e-7
    assert torch.allclose(found.double(), torch.tensor(exact, dtype=torch.float64), rtol=tolerance, atol=1e-8)
    rate = grid[:, 0].double().exp()
    assert torch.allclose(gradient.double(), grid[:, 1].double() - rate, rtol=1e-6, atol=1e-12)


def test_no_dispersion_is_poisson(double):
    log_mean, count = torch.linspace(-5, 8, 14), torch.tensor([0.0, 3.0, 500.0]).unsqueeze(-1)
    found = NegativeBinomial(log_mean, torch.tensor(60.0)).log_prob(count)
    assert torch.allclose(found, Poisson(log_mean).log_prob(count), rtol=1e-12, atol=1e-10)


def test_more_zeros_exactly(double):
    log_mean, log_size, gate = torch.randn(3, 7)
    count = torch.tensor([0.0, 1.0, 9.0]).unsqueeze(-1)
    share = 1 / (1 + (-gate).exp())
    mass = (1 - share) * NegativeBinomial(log_mean, log_size).log_prob(count).exp()
    mass[0] += share
    found = ZeroInflatedNegativeBinomial(log_mean, log_size, gate).log_prob(count)
    assert torch.allclose(found.exp(), mass, rtol=1e-12)


DRAWN = {
    "Poisson": lambda: Poisson(torch.tensor([-2.0, 1.0, 5.0])),
    "NegativeBinomial": lambda: NegativeBinomial(torch.tensor([-2.0, 1.0, 5.0]), torch.tensor([1.0, -0.5, 3.0])),
    "more zeros": lambda: ZeroInflatedNegativeBinomial(
        torch.tensor([-1.0, 1.0, 3.0]), torch.tensor(0.7), torch.tensor([0.5, -1.0, 0.0])
    ),
    "StudentT": lambda: StudentT(torch.tensor([1.0, -2.0, 0.0]), torch.tensor(0.5), torch.tensor([9.0, 30.0, 12.0])),
    "LogNormal": lambda: LogNormal(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 0.1, 0.3])),
    "Affine": lambda: Affine(
        LogNormal(torch.tensor([1.0, -2.0, 0.0]), torch.tensor(0.2)), torch.tensor(3.0), torch.tensor([2.0, 0.1, 1.0])
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_moments_of_draws(name, double):
    distribution = DRAWN[name]()
    x = distribution.sample((40_000,))
    assert x.shape == (40_000, 3)
    assert distribution.support.check(x).all()
    for column in range(3):
        draws, mean = x[:, column], distribution.mean[column].item()
        within(draws.mean().item(), mean, draws.std().item() / 200)
        squares = (draws - mean) ** 2
        within(squares.mean().item(), distribution.variance[column].item(), squares.std().item() / 200)


@pytest.mark.parametrize("name", DRAWN)
def test_expanded(name, double):
    """Values, validation and draws after `expand`, by which plates and `to_event` change the batch shape."""
    distribution = DRAWN[name]()
    larger = distribution.expand((5, 3))
    assert larger.batch_shape == (5, 3)
    x = larger.sample((2,))
    assert x.shape == (2, 5, 3)
    assert len(x[0, :, 2].unique()) > 1, "one draw for all"
    assert torch.equal(larger.log_prob(x), distribution.log_prob(x))
    with pytest.raises(ValueError, match="support"):
        larger.log_prob(torch.full((5, 3), math.nan))


def test_largest_counts_are_drawn():
    """torch.poisson overflows its integers at 9e18."""
    x = Poisson(torch.tensor([30.0, 36.0, 40.0, 60.0]).double()).sample((2000,))
    rate = torch.tensor([30.0, 36.0, 40.0, 60.0]).double().exp()
    z = (x - rate) / rate.sqrt()
    for column in range(4):
        within(z[:, column].mean().item(), 0.0, 2000**-0.5)
        within(z[:, column].square().mean().item(), 1.0, (2 / 2000) ** 0.5)


@pytest.mark.parametrize("df", [0.5, 3.0, 30.0, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_student_t_exactly(df, dtype):
    x = torch.tensor([-30.0, -0.5, 0.0, 4.0, 1000.0], dtype=dtype)
    parameters = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (0.25, 1.5, df)]
    found = StudentT(*parameters).log_prob(x)
    with mpmath.workdps(40):
        v, s = mpmath.mpf(parameters[2].item()), mpmath.mpf(1.5)
        norm = mpmath.loggamma((v + 1) / 2) - mpmath.loggamma(v / 2) - mpmath.log(v * mpmath.pi) / 2 - mpmath.log(s)
        exact = [float(norm - (v + 1) / 2 * mpmath.log1p(((value - 0.25) / s) ** 2 / v)) for value in x.tolist()]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    slack = 1e-16 * df * 20  # of the gamma functions in float64
    assert found.tolist() == pytest.approx(exact, rel=tolerance, abs=max(tolerance, slack))
    assert all(gradient.isfinite() for gradient in torch.autograd.grad(found.sum(), parameters))


def test_log_normal_exactly(double):
    x, loc, scale = torch.tensor([1e-8, 0.5, 1e6]), torch.tensor(0.7), torch.tensor(1.3)
    by_hand = [
        -((math.log(value) - 0.7) ** 2) / (2 * 1.3**2) - math.log(1.3 * math.sqrt(2 * math.pi)) - math.log(value)
        for value in x.tolist()
    ]
    assert LogNormal(loc, scale).log_prob(x).tolist() == pytest.approx(by_hand, rel=1e-12)


def test_a_masked_zero_leaves_finite_gradients():
    """0 stands for a missing value; log 0 must not come into the gradient as NaN."""
    loc = torch.zeros(2, requires_grad=True)
    distribution = LogNormal(loc, torch.ones(2), validate_args=False)
    log_prob = torch.where(torch.tensor([True, False]), distribution.log_prob(torch.tensor([2.0, 0.0])), 0.0)
    (gradient,) = torch.autograd.grad(log_prob.sum(), loc)
    assert gradient.tolist() == pytest.approx([math.log(2.0), 0.0])


def test_affine_by_hand(double):
    """The density of x = loc + scale y, by the change of variables."""
    loc, scale = torch.tensor([10.0, -3.0]), torch.tensor([4.0, 0.1])
    base = StudentT(torch.zeros(2), torch.ones(2), torch.tensor(5.0))
    y = torch.randn(6, 2)
    found = Affine(base, loc, scale).log_prob(loc + scale * y)
    jacobian = torch.tensor([math.log(4.0), math.log(0.1)])
    assert torch.allclose(found, base.log_prob(y) - jacobian, rtol=1e-12)
    assert Affine(base, loc, scale).support is constraints.real
    positive = Affine(LogNormal(torch.zeros(2), torch.ones(2)), loc, scale)
    assert positive.support.check(torch.tensor([[10.1, -2.9], [9.9, -3.1]])).tolist() == [[True, True], [False, False]]


def test_mixed_rows_are_their_parts(double):
    logits, loc = torch.randn(5, 1, 3), torch.randn(4, 5, 1)
    parts = [Categories(logits), LogNormal(loc, torch.tensor([0.4])), Poisson(loc)]
    rows = Mixed(parts)
    assert (rows.batch_shape, rows.event_shape) == ((4, 5, 3), ())
    x = rows.sample()
    assert x.shape == (4, 5, 3)
    assert rows.support.check(x).all()
    wanted = torch.stack(
        [
            logits.squeeze(1).log_softmax(-1).expand(4, 5, 3).gather(-1, x[..., :1].long()).squeeze(-1),
            LogNormal(loc.squeeze(-1), torch.tensor(0.4)).log_prob(x[..., 1]),
            Poisson(loc.squeeze(-1)).log_prob(x[..., 2]),
        ],
        -1,
    )
    assert torch.allclose(rows.log_prob(x), wanted, rtol=1e-12)
    assert torch.allclose(rows.to_event(1).log_prob(x), wanted.sum(-1), rtol=1e-12)
    larger = rows.expand((2, 4, 5, 3))
    assert torch.allclose(larger.log_prob(x), wanted.expand(2, 4, 5, 3), rtol=1e-12)
    assert larger.sample().shape == (2, 4, 5, 3)
    assert torch.allclose(rows.mean[..., 2], loc.exp().squeeze(-1))
    x[1, 2, 0] = 3.0
    with pytest.raises(ValueError, match="support"):
        rows.log_prob(x)


@pytest.mark.parametrize("log_mean", [-3.0, 2.0])
@pytest.mark.parametrize("log_size", [-900.0, -60.0, -3.0, 1.0, 50.0, 800.0])
def test_draws_have_the_masses(log_mean, log_size):
    """The share of zeros and of ones, also where the inverse dispersion under- or overflows."""
    distribution = NegativeBinomial(torch.tensor(log_mean), torch.tensor(log_size))
    drawn = distribution.sample(torch.Size([40_000]))
    assert drawn.isfinite().all()
    for count in (0.0, 1.0):
        mass = distribution.log_prob(torch.tensor(count)).exp().item()
        share = (drawn == count).double().mean().item()
        assert abs(share - mass) <= 4.5 * math.sqrt(mass * (1 - mass) / 40_000) + 1e-6
