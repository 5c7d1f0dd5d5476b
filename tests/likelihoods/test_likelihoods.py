"""Likelihoods against closed forms, sums and quadrature; what they refuse; how they start and how they are recorded.

A decoder network that hands on its input makes a latent the likelihood's parameters.
"""

import math
from decimal import Decimal, localcontext

import numpy as np
import pyro
import pytest
import torch
from conftest import within
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyrovae as pv
from pyrovae import likelihoods, nets, priors
from pyrovae.common.arguments import without_checks
from pyrovae.compiled.record import record
from pyrovae.distributions.pixels import CategoricalLevels, ContinuousBernoulli, LogisticLevels

SHAPE = (1, 2, 2)

# name -> make(decoder_net, shape, **options)
DISCRETE = {
    "Bernoulli": likelihoods.Bernoulli,
    "DiscretizedLogistic": likelihoods.DiscretizedLogistic,
    "DiscretizedLogistic of 3": lambda net, shape, **options: likelihoods.DiscretizedLogistic(
        net, shape, num_components=3, num_levels=17, **options
    ),
    "Categorical": lambda net, shape, **options: likelihoods.Categorical(net, shape, num_levels=9, **options),
}
CONTINUOUS = {
    "ContinuousBernoulli": likelihoods.ContinuousBernoulli,
    "Normal": lambda net, shape, **options: likelihoods.Normal(net, shape, scale=0.4, **options),
    "LearnedScaleNormal": likelihoods.LearnedScaleNormal,
    "HeteroscedasticNormal": likelihoods.HeteroscedasticNormal,
}
COUNTS = {
    "Poisson": likelihoods.Poisson,
    "NegativeBinomial": likelihoods.NegativeBinomial,
    "NegativeBinomial of the network": lambda net, shape, **options: likelihoods.NegativeBinomial(
        net, shape, network_dispersion=True, **options
    ),
    "ZeroInflatedNegativeBinomial": likelihoods.ZeroInflatedNegativeBinomial,
}
WIDE = {  # of support without bounds, and tails that a quadrature in x itself would miss
    "StudentT": lambda net, shape, **options: likelihoods.StudentT(net, shape, df=12.0, **options),
    "LogNormal": likelihoods.LogNormal,
    "Scaled": lambda net, shape: likelihoods.Scaled(likelihoods.StudentT(net, shape, df=12.0), 0.5, 2.0),
}
CATEGORIES = {"Categories": lambda net, shape: likelihoods.Categories(net, shape, num_categories=3)}
ALL = DISCRETE | CONTINUOUS | COUNTS | WIDE | CATEGORIES
WITH_MEAN = [name for name in ALL if name not in ("Scaled", "Categories")]


def from_parameters(name, shape=SHAPE, **options):
    """A likelihood whose latents are its parameters, and how many they are."""
    likelihood = ALL[name](nn.Identity(), shape, **options)
    return likelihood, likelihood.parameters_shape.numel()


def outcomes(name, likelihood):
    """Values of one pixel and what they weigh: all levels, or nodes of a quadrature over the support."""
    if name in DISCRETE:
        num_levels = getattr(likelihood, "num_levels", 2)
        return torch.arange(num_levels) / (num_levels - 1), torch.ones(num_levels)
    if name in COUNTS or name in CATEGORIES:
        values = torch.arange(20_000 if name in COUNTS else 3) * 1.0
        return values, torch.ones_like(values)
    if name in WIDE:
        nodes, weights = quadrature(-12, 12, 200)
        return (nodes.exp(), weights * nodes.exp()) if name == "LogNormal" else (nodes.sinh(), weights * nodes.cosh())
    return quadrature(0, 1, 10) if name == "ContinuousBernoulli" else quadrature(-12, 12, 100)


def quadrature(low, high, panels):
    """Nodes and weights of Gauss's rule in each of some panels."""
    nodes, weights = (torch.as_tensor(part) for part in np.polynomial.legendre.leggauss(20))
    width = (high - low) / panels
    starts = low + width * torch.arange(panels, dtype=torch.float64).unsqueeze(-1)
    return (starts + width * (nodes + 1) / 2).flatten(), (weights * width / 2).repeat(panels)


def masses(name, likelihood, z):
    """Values of one pixel, and the probability of each: (values, *batch, *data_shape). Quadrature's weights included."""
    values, weights = outcomes(name, likelihood)
    pixel = likelihood(z).base_dist
    columns = values.reshape(-1, *(1 for _ in pixel.batch_shape))
    return values, pixel.log_prob(columns.to(z.dtype)).exp() * weights.reshape(columns.shape).to(z.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ALL)
def test_total_is_one(name, dtype, tolerance, double):
    likelihood, size = from_parameters(name)
    z = torch.randn(50, size) * torch.logspace(-1.5, 0, 50).unsqueeze(-1)
    _, mass = masses(name, likelihood.to(dtype), z.to(dtype))
    assert mass.dtype == dtype
    assert (mass.double().sum(0) - 1).abs().max() < tolerance


@pytest.mark.parametrize("name", ALL)
def test_log_prob_is_the_sum_over_pixels(name, double):
    likelihood, size = from_parameters(name)
    z = torch.randn(3, 5, size)
    x = likelihood(torch.randn(5, size)).sample()
    distribution = likelihood(z)
    assert (distribution.batch_shape, distribution.event_shape) == ((3, 5), SHAPE)
    one_pixel = ALL[name](nn.Identity(), (1,))
    rows = z.reshape(3, 5, -1, 4).movedim(-1, -2)  # (3, 5, pixels, parameters per pixel): the biases are alike
    total = one_pixel(rows).log_prob(x.reshape(5, 4, 1)).sum(-1)
    assert torch.allclose(distribution.log_prob(x), total, rtol=1e-12)


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_logistic_levels_sum_to_one_everywhere(num_levels, double):
    loc = torch.tensor([-40.0, -0.1, 0.0, 0.3, 0.5003, 1.0, 1.7, 300.0])
    log_scale = torch.linspace(-9, 6, 16)
    grid = torch.cartesian_prod(loc, log_scale)
    levels = torch.arange(num_levels) / (num_levels - 1)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        columns = grid.to(dtype).unsqueeze(-1)
        distribution = LogisticLevels(torch.zeros_like(columns[:, 0]), columns[:, 0], columns[:, 1], num_levels)
        total = distribution.log_prob(levels.to(dtype).unsqueeze(-1)).double().exp().sum(0)
        assert (total - 1).abs().max() < tolerance


def test_logistic_levels_exactly():
    """Against differences of the logistic function in 80 digits: in the tails too, where floats see 0 or 1 - 1."""
    cases = [(0.3, -2.0), (0.3, -6.5), (0.9999, -7.0), (-0.5, -3.0), (1.2, -1.0), (0.5, 2.0)]
    level = torch.tensor([0, 1, 2, 77, 128, 254, 255])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for loc, log_scale in cases:
            loc, log_scale = torch.tensor([loc], dtype=dtype), torch.tensor([log_scale], dtype=dtype)
            found = LogisticLevels(torch.zeros_like(loc), loc, log_scale, 256).log_prob(level.to(dtype) / 255)
            wanted = [_exact_log_mass(k, Decimal(loc.item()), Decimal(log_scale.item()), 255) for k in level.tolist()]
            assert found.tolist() == pytest.approx(wanted, rel=tolerance, abs=tolerance)


def _exact_log_mass(level, loc, log_scale, last):
    with localcontext() as context:
        context.prec = 900

        def below(edge):
            return 1 / (1 + (-(edge - loc * last) / (log_scale.exp() * last)).exp())

        half = Decimal("0.5")
        lower = Decimal(0) if level == 0 else below(level - half)
        upper = Decimal(1) if level == last else below(level + half)
        context.prec = 30
        return float((upper - lower).ln())


def test_mixture_of_logistics_exactly(double):
    """Weights, locations and scales, each in its place."""
    likelihood, _ = from_parameters("DiscretizedLogistic of 3", (1,))
    with torch.no_grad():
        likelihood.bias.zero_()
    loc, raw_scale, logits = torch.tensor([[0.1, 0.4, 0.9], [-2.0, -1.0, -3.0], [0.5, -1.0, 0.0]])
    smallest = -4 - math.log(16)  # a soft floor, e^-4 of a level
    log_scale = smallest + (1 + (raw_scale - smallest).exp()).log()
    x = torch.arange(17) / 16
    wanted = torch.zeros(17)
    for weight, m, s in zip(logits.softmax(0), loc, log_scale.exp(), strict=True):
        below = ((x[:-1] + 1 / 32 - m) / s).sigmoid()
        wanted += weight * torch.cat([below[:1], below.diff(), 1 - below[-1:]])
    found = likelihood(torch.cat([loc, raw_scale, logits])).log_prob(x.unsqueeze(-1))
    assert torch.allclose(found, wanted.log(), rtol=1e-10)


def test_components_are_drawn_by_their_weights():
    weights = torch.tensor([0.1, 0.3, 0.6])
    loc, log_scale = torch.tensor([0.2, 0.5, 0.9]), torch.full((3,), -9.0)
    samples = LogisticLevels(weights.log(), loc, log_scale, 11).sample((20_000,))
    for weight, level in zip(weights.tolist(), loc, strict=True):
        frequency = (samples - level).abs().lt(1e-3).float().mean().item()
        within(frequency, weight, math.sqrt(weight * (1 - weight) / 20_000))


def test_categorical_exactly(double):
    logits = torch.randn(4, 9)
    level = torch.tensor([0, 3, 7, 8])
    found = CategoricalLevels(logits).log_prob(level / 8)
    assert torch.allclose(found, logits.log_softmax(-1)[torch.arange(4), level], rtol=1e-13)
    likelihood = likelihoods.Categorical(nn.Identity(), (2, 2), num_levels=9)  # 9 x 2 x 2: levels first
    found = likelihood(logits.T.flatten()).log_prob((level / 8).reshape(1, 2, 2))
    assert found.item() == pytest.approx(logits.log_softmax(-1)[torch.arange(4), level].sum().item(), rel=1e-12)


@pytest.mark.parametrize(
    "logit", [0.0, 1e-8, 1e-4, 0.0039, 0.00401, 0.1, 0.2499, 0.2501, 1.0, 7.0, 17.0, 30.0, 100.0, 600.0]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_continuous_bernoulli_exactly(logit, sign):
    """Value, gradient and mean against quadrature: where torch's is wrong (around 0.004, from 15 on) as elsewhere."""
    nodes, weights = quadrature(0, 1, 60)
    x = torch.tensor([0.0, 1e-3, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        logits = torch.tensor(sign * logit, dtype=dtype, requires_grad=True)
        exact = logits.detach().double()
        highest = exact.clamp(min=0)  # factored out of exp(l x), which overflows
        integrand = weights * (exact * nodes - highest).exp()
        log_norm, mean = integrand.sum().log() + highest, (integrand @ nodes) / integrand.sum()
        distribution = ContinuousBernoulli(logits)
        found = distribution.log_prob(x.to(dtype))
        # x near 1 in float32: l (x - 1) is as uncertain as x
        assert torch.allclose(
            found.double(), exact * x.to(dtype).double() - log_norm, rtol=tolerance, atol=tolerance * (1 + logit)
        )
        (gradient,) = torch.autograd.grad(found[2], logits)
        assert gradient.item() == pytest.approx(0.25 - mean.item(), abs=2 * tolerance)
        assert distribution.mean.item() == pytest.approx(mean.item(), abs=2 * tolerance)


@pytest.mark.parametrize("name", ["Normal", "LearnedScaleNormal", "HeteroscedasticNormal"])
def test_normals_exactly(name, double):
    likelihood, size = from_parameters(name, (3,))
    z, x = torch.randn(size), torch.randn(3)
    loc = z[:3]
    scale = {
        "Normal": torch.full((3,), 0.4),
        "LearnedScaleNormal": torch.full((3,), 0.3),
        "HeteroscedasticNormal": 1e-3 + (1 + (z[3:] + math.log(math.expm1(0.3 - 1e-3))).exp()).log()
        if size == 6
        else None,
    }[name]
    wanted = (-0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum()
    assert likelihood(z).log_prob(x).item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_moments(name, double):
    """The mean, and samples, against the masses; pixels weighted unalike, so that none can stand for another."""
    likelihood, size = from_parameters(name)
    z = 0.7 * torch.randn(size)
    values, mass = masses(name, likelihood, z)
    columns = values.reshape(-1, 1, 1, 1)
    assert torch.allclose(likelihood(z).mean, (mass * columns).sum(0), atol=1e-9)
    samples = likelihood(z).sample((20_000,))
    likelihood.check(samples)
    pixel_weights = torch.tensor([1.0, -0.5, 2.0, 0.3]).reshape(SHAPE)
    for power in (1, 2):
        moment = ((mass * columns**power).sum(0) * pixel_weights).sum().item()
        drawn = (samples**power * pixel_weights).flatten(1).sum(1)
        within(drawn.mean().item(), moment, drawn.std().item() / math.sqrt(20_000))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [30.0, 80.0])
def test_extremes_have_finite_gradients(name, size):
    """Networks that are very sure, rightly and wrongly, in float32; data at both ends."""
    likelihood, num_parameters = from_parameters(name)
    signs = torch.tensor([-1.0, 1.0])
    z = (size * signs[torch.randint(2, (200, num_parameters))]).requires_grad_()
    ends = (1e-6, 1e6) if name == "LogNormal" else (0.0, 1.0)
    for x in (torch.full(SHAPE, end) for end in ends):
        log_prob = likelihood(z).log_prob(x)
        assert log_prob.isfinite().all()
        gradients = torch.autograd.grad(log_prob.sum(), [z, *likelihood.parameters()])
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert likelihood(z).mean.isfinite().all()
    likelihood.check(likelihood(z).sample())


def test_a_sure_pixel_is_worth_what_it_should_be():
    """A level, sure at the floor of the scale: log mass 0; a normal pixel, sure at its floor: 6 nats and no more."""
    logistic, _ = from_parameters("DiscretizedLogistic", (1,))
    x = torch.tensor([100 / 255])
    z = torch.stack([x - 0.5, torch.tensor([-100.0])]).flatten()
    assert logistic(z).log_prob(x).item() == pytest.approx(0, abs=1e-6)
    normal, _ = from_parameters("HeteroscedasticNormal", (1,))
    found = normal(torch.tensor([x.item(), -100.0])).log_prob(x).item()
    assert found == pytest.approx(-math.log(1e-3) - 0.5 * math.log(2 * math.pi), rel=1e-5)
    assert found < 6


@pytest.mark.parametrize("name", WITH_MEAN)
def test_starts_at_the_mean_image(name):
    """Where a network of zeros leaves it: at the mean, or near it where bounds and levels round it."""
    mean = torch.tensor([0.1, 0.4, 0.6, 0.8]).reshape(SHAPE)
    likelihood, size = from_parameters(name, data_mean=mean)
    z = torch.zeros(size)
    exact = name not in ("Categorical", "DiscretizedLogistic", "DiscretizedLogistic of 3")
    assert torch.allclose(likelihood(z).mean, mean, atol=1e-5 if exact else 0.06)
    likelihood, _ = from_parameters(name, data_mean=torch.tensor([0.0, 0.0, 1.0, 1.0]).reshape(SHAPE))
    assert likelihood(z).mean.isfinite().all()
    with pytest.raises(ValueError, match=r"data_mean must hold means in \[.*of shape \(1, 2, 2\), found shape \(4,\)"):
        from_parameters(name, data_mean=mean.flatten())
    with pytest.raises(ValueError, match="data_mean must hold means"):
        from_parameters(name, data_mean=mean * math.nan)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("Bernoulli", math.inf, "0 or 1, found inf"),
        ("Bernoulli", math.nan, "0 or 1, found nan"),
        ("Bernoulli", 0.5, "0 or 1, found 0.5"),
        ("ContinuousBernoulli", 1.01, r"lie in \[0, 1\], found 1.01: scale the data"),
        ("ContinuousBernoulli", -0.5, "found -0.5"),
        ("ContinuousBernoulli", math.nan, "found nan"),
        ("Normal", math.inf, "real numbers, found inf"),
        ("LearnedScaleNormal", math.nan, "real numbers, found nan"),
        ("HeteroscedasticNormal", -math.inf, "real numbers, found -inf"),
        (
            "DiscretizedLogistic",
            0.5,
            r"one of 256 grey levels, k / 255 .* found 0.5 = 127.5 / 255: divide bytes by 255",
        ),
        ("DiscretizedLogistic", 256 / 255, "found 1.00392 = 256 / 255"),
        ("DiscretizedLogistic", -1 / 255, "= -1 / 255"),
        ("DiscretizedLogistic", 200.0, "found 200 = 51000 / 255"),
        ("DiscretizedLogistic of 3", 7 / 255, "one of 17 grey levels"),
        ("Categorical", 0.1, "one of 9 grey levels"),
        ("Categorical", math.nan, "found nan"),
        ("Poisson", -1.0, "whole numbers of 0 or more, found -1: use a likelihood for real values"),
        ("NegativeBinomial", 0.5, "found 0.5: pass the raw counts"),
        ("ZeroInflatedNegativeBinomial", math.nan, "found nan: remove these data"),
        ("Poisson", math.inf, "found inf: remove these data"),
        ("StudentT", math.nan, "real numbers, found nan"),
        ("LogNormal", 0.0, "positive numbers, found 0: use a likelihood for real values"),
        ("LogNormal", math.inf, "positive numbers, found inf: remove"),
        ("Scaled", math.nan, "real numbers, found nan"),
        ("Categories", 3.0, "coded 0 to 2, found 3: code them from 0 on"),
        ("Categories", 0.5, "coded 0 to 2, found 0.5"),
        ("Categories", math.nan, "coded 0 to 2, found nan"),
    ],
)
def test_refuses_data_outside_the_support(name, value, match):
    likelihood = ALL[name](nets.MLP(2, [3], from_parameters(name)[1]), SHAPE)
    x = likelihood(torch.randn(4, 2)).sample()
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihood)
    model(x)
    x[2, 0, 1, 0] = value
    with pytest.raises(ValueError, match=match), pyro.validation_enabled(False):
        model(x)
    if not math.isinf(value):  # torch's real line has both its ends
        with pyro.validation_enabled(), pytest.raises(ValueError, match="support"):
            likelihood(torch.randn(4, 2)).log_prob(x)


@pytest.mark.parametrize("num_levels", [2, 17, 256, 1024])
def test_levels_are_recognised_through_rounding(num_levels, double):
    level = torch.arange(num_levels)
    likelihood = likelihoods.DiscretizedLogistic(nn.Identity(), (1,), num_levels=num_levels)
    for dtype in (torch.float32, torch.float64):
        for x in (level.to(dtype) / (num_levels - 1), level.to(dtype) * (1 / (num_levels - 1))):
            likelihood.check(x.unsqueeze(-1))
            logits = torch.eye(num_levels, dtype=dtype) * 50
            assert (CategoricalLevels(logits).log_prob(x).abs() < 1e-5).all()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: likelihoods.Normal(nn.Identity(), (3,), scale=0),
            ValueError,
            "scale must be positive and finite, found 0",
        ),
        (lambda: likelihoods.Normal(nn.Identity(), (3,), scale="1"), TypeError, "scale must be a number, found '1'"),
        (
            lambda: likelihoods.LearnedScaleNormal(nn.Identity(), (3,), initial_scale=math.inf),
            ValueError,
            "initial_scale",
        ),
        (
            lambda: likelihoods.HeteroscedasticNormal(nn.Identity(), (3,), min_scale=0.3),
            ValueError,
            "above min_scale=0.3",
        ),
        (
            lambda: likelihoods.HeteroscedasticNormal(nn.Identity(), (3,), min_scale=-1.0),
            ValueError,
            "min_scale must be",
        ),
        (lambda: likelihoods.StudentT(nn.Identity(), (3,), df=True), TypeError, "df must be a number, found True"),
        (
            lambda: likelihoods.LogNormal(nn.Identity(), (3,), initial_scale=math.nan),
            ValueError,
            "initial_scale must be",
        ),
        (
            lambda: likelihoods.NegativeBinomial(nn.Identity(), (3,), inverse_dispersion=-1.0),
            ValueError,
            "inverse_dispersion must be positive and finite, found -1",
        ),
        (lambda: likelihoods.DiscretizedLogistic(nn.Identity(), (3,), num_components=0), ValueError, "num_components"),
        (lambda: likelihoods.DiscretizedLogistic(nn.Identity(), (3,), num_levels=1), ValueError, "2 or more, found 1"),
        (lambda: likelihoods.Categorical(nn.Identity(), (3,), num_levels=2.0), TypeError, "whole number"),
    ],
)
def test_errors_at_construction(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_positive_numbers_may_be_tensors():
    """The scale of data, x.std(), is one."""
    two = torch.tensor(2.0, dtype=torch.float64)
    assert likelihoods.Normal(nn.Identity(), (3,), scale=two).scale == 2.0
    assert likelihoods.StudentT(nn.Identity(), (3,), df=two).df == 2.0
    counts = likelihoods.NegativeBinomial(nn.Identity(), (3,), inverse_dispersion=two)
    assert torch.allclose(counts.log_inverse_dispersion.exp(), torch.full((3,), 2.0))


KINDS = ("num_components", "network_dispersion", "num_categories", "likelihood")


@pytest.mark.parametrize("name", ALL)
def test_says_what_the_network_must_give(name):
    likelihood, size = from_parameters(name)
    options = {key: getattr(likelihood, key) for key in KINDS if hasattr(likelihood, key)}
    if name == "Categorical":
        options = {"num_levels": 9}
    assert likelihood.num_parameters(**options) * 4 == size
    with pytest.raises(ValueError, match=f"needs {size} numbers per datum"):
        ALL[name](nn.Linear(2, size + 1), SHAPE)(torch.zeros(3, 2))


def step(likelihood):
    """log p(x|z) and its gradients, as a function to record."""

    def function(z, x):
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            log_prob = likelihood(z).log_prob(x)
            gradients = torch.autograd.grad(log_prob.sum(), [z])
        return (log_prob.detach(), *gradients)

    return function


@pytest.mark.parametrize("name", ALL)
def test_can_be_recorded(name):
    """Recorded on some data, right on others, other levels among them: no branch on a value, no number kept."""
    likelihood, size = from_parameters(name)
    z, other_z = 3 * torch.randn(2, 6, size)
    x, other_x = likelihood(z).sample(), likelihood(other_z).sample()
    with without_checks(), pyro.validation_enabled(False):
        recorded = make_fx(step(likelihood))(z, x)
        drawing = make_fx(lambda z: likelihood(z).sample())(z)
    for found, wanted in zip(recorded(other_z, other_x), step(likelihood)(other_z, other_x), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    pyro.set_rng_seed(3)
    found = drawing(other_z)
    pyro.set_rng_seed(3)
    assert torch.allclose(found, likelihood(other_z).sample(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_as_eager():
    """All of them in one graph, with the gradients of their biases and scales."""
    made = {name: from_parameters(name) for name in ALL}
    z = {name: 2 * torch.randn(6, size) for name, (_, size) in made.items()}
    x = {name: likelihood(z[name]).sample() for name, (likelihood, _) in made.items()}
    modules = [likelihood for likelihood, _ in made.values()]

    def loss(*tensors):
        parts = [m(z).log_prob(x).sum() for m, z, x in zip(modules, tensors[::2], tensors[1::2], strict=True)]
        return (torch.stack(parts).sum(), *parts)

    tensors = [tensor for name in ALL for tensor in (z[name], x[name])]
    compiled = record(loss, modules, tensors, gradients=True)
    assert compiled is not None
    outputs, gradients = compiled(*tensors)
    eager = loss(*tensors)
    assert torch.allclose(torch.stack(outputs), torch.stack(eager), rtol=1e-5)
    for found, wanted in zip(gradients, torch.autograd.grad(eager[0], compiled.parameters), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_scaled_says_in_which_units_it_found_values():
    likelihood = likelihoods.Scaled(likelihoods.LogNormal(lambda z: torch.zeros(len(z), 2, 3), (3,)), 0.0, 2.0)
    with pytest.raises(ValueError, match=r"-0\.5.*in the units of Scaled, \(x - loc\) / scale"):
        likelihood.check(torch.tensor([[1.0, -1.0, 2.0]]))
