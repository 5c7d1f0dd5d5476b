"""The aggregate posterior against quadrature, closed forms and brute force over all pairs of data."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from shared.hierarchies import LinearHierarchy
from shared.parts import GUIDES, SHAPE
from torch import nn

import pyrovae as pv
from pyrovae.evaluation import sum_over_data as module
from pyrovae.evaluation.sum_over_data import draw_codes, sum_over_data


class Fixed(pv.guides.Guide):
    """q(z|x) = N(x, diag scale^2)."""

    def __init__(self, *scale):
        super().__init__(len(scale))
        self.scale = torch.tensor(scale)

    def encode(self, x):
        return x

    def distribution(self, parameters):
        return dist.Normal(parameters, self.scale).to_event(1)


class Correlated(Fixed):
    """q(z|x) = N(x, [[s1^2, 0.6 s1 s2], [0.6 s1 s2, s2^2]])."""

    def distribution(self, parameters):
        correlation = torch.tensor([[1.0, 0.6], [0.6, 1.0]])
        return dist.MultivariateNormal(parameters, self.scale[:, None] * correlation * self.scale)


class Smooth(Fixed):
    """A distribution without marginals in closed form."""

    def distribution(self, parameters):
        return dist.MixtureSameFamily(
            dist.Categorical(torch.ones(len(parameters), 2)),
            dist.Normal(torch.stack([parameters, parameters + 1], -2), 1.0).to_event(1),
        )


def model_of(latent_dim, loc=0.0, scale=1.0):
    prior = pv.priors.DiagonalNormal(latent_dim)
    with torch.no_grad():
        prior.loc.fill_(loc)
        prior.log_scale.fill_(math.log(scale))
    return pv.GenerativeModel(prior, pv.likelihoods.Normal(nn.Linear(latent_dim, 3), (3,)))


def grid(latent_dim, size):
    axis = torch.linspace(-8, 8, size)
    points = torch.cartesian_prod(*[axis] * latent_dim).reshape(-1, latent_dim)
    return axis, points, (axis[1] - axis[0]).item() ** latent_dim


def kl(log_p, log_q, cell):
    return (log_p.exp() * (log_p - log_q)).sum().item() * cell


X1 = torch.tensor([[-1.5], [0.2], [0.6], [2.0]], dtype=torch.float64)
X2 = torch.tensor([[-1.5, 1.0], [0.2, 0.5], [1.1, -1.3]], dtype=torch.float64)


def test_one_dimension_by_quadrature(double):
    model, guide = model_of(1, 0.3, 1.2), Fixed(0.7)
    found = pv.aggregate_posterior(model, guide, X1, num_draws=8_000)
    _, z, cell = grid(1, 4_001)
    log_q = guide.distribution(X1).log_prob(z.unsqueeze(1)).T  # (4, grid)
    log_prior = model.prior().log_prob(z)
    average = log_q.logsumexp(0) - math.log(4)
    others = [log_q[[m for m in range(4) if m != n]].logsumexp(0) - math.log(3) for n in range(4)]
    for name, truth in {
        "rate": sum(kl(row, log_prior, cell) for row in log_q) / 4,
        "mutual_information": sum(kl(row, average, cell) for row in log_q) / 4,
        "mutual_information_upper": sum(kl(row, rest, cell) for row, rest in zip(log_q, others, strict=True)) / 4,
        "marginal_kl": kl(average, log_prior, cell),
    }.items():
        assert getattr(found, f"{name}_stderr") < 0.02
        within(getattr(found, name), truth, getattr(found, f"{name}_stderr"))
    exact = torch.distributions.kl_divergence(guide.distribution(X1).base_dist, model.prior().base_dist).mean().item()
    within(found.rate, exact, found.rate_stderr)
    assert found.total_correlation == pytest.approx(0, abs=1e-12)
    assert found.dimension_kl.item() == pytest.approx(found.marginal_kl)


@pytest.mark.parametrize("make", [Fixed, Correlated])
def test_total_correlation_by_quadrature(double, make):
    model, guide = model_of(2, 0.3, 1.2), make(0.6, 0.9)
    found = pv.aggregate_posterior(model, guide, X2, num_draws=8_000, total_correlation=True)
    axis, z, cell = grid(2, 401)
    average = guide.distribution(X2).log_prob(z.unsqueeze(1)).logsumexp(1) - math.log(3)
    square, step = average.reshape(401, 401), (axis[1] - axis[0]).log()
    first, second = square.logsumexp(1) + step, square.logsumexp(0) + step
    product = (first[:, None] + second).flatten()
    within(found.total_correlation, kl(average, product, cell), found.total_correlation_stderr)
    assert found.total_correlation > 0.1
    prior = model.prior().base_dist
    for d, log_q in enumerate((first, second)):
        truth = kl(log_q, dist.Normal(prior.loc[d], prior.scale[d]).log_prob(axis), step.exp().item())
        within(found.dimension_kl[d].item(), truth, found.dimension_kl_stderr[d].item())
    assert found.marginal_kl == pytest.approx(found.total_correlation + found.dimension_kl.sum().item())


class Masked(Fixed):
    """q(z|x) of data whose missing values are the mean 0.25; a context shifts it."""

    def encode(self, x, context=None, *, observed=None):
        known = x if observed is None else torch.where(observed, x, 0.25)
        return known if context is None else known + context


def test_missing_values_and_a_context():
    x, observed, context = torch.randn(40, 2), torch.rand(40, 2) < 0.7, 3 * torch.randn(40, 1)
    filled, guide, model = torch.where(observed, x, 0.25), Masked(0.6, 0.9), model_of(2)

    def split(x, **known):
        pyro.set_rng_seed(1)
        return pv.aggregate_posterior(model, guide, x, **known).summary()

    assert split(x, observed=observed) == split(filled) != split(x)
    spread = filled.var(0).max().item()
    for known, moved in (({}, filled), ({"context": context}, filled + context)):
        active = [pv.active_units(guide, x, observed=observed, threshold=spread, **known), moved.var(0) > spread]
        assert torch.equal(*active)
    assert active[0].all()
    with pytest.raises(ValueError, match="observed"):
        pv.aggregate_posterior(model, guide, x, observed=observed[:5])


def test_the_parts_add_up(double):
    found = pv.aggregate_posterior(model_of(2), Fixed(0.6, 0.9), torch.randn(50, 2))
    assert found.rate == pytest.approx(found.mutual_information + found.marginal_kl, abs=1e-12)
    assert found.mutual_information < found.mutual_information_upper


def test_codes_that_do_not_differ_or_do_not_touch(double):
    same = pv.aggregate_posterior(model_of(1), Fixed(0.7), torch.full((6, 1), 0.4))
    assert same.mutual_information == pytest.approx(0, abs=1e-12)
    assert same.mutual_information_upper == pytest.approx(0, abs=1e-12)
    assert not same.saturated
    assert "saturated" not in same.summary()
    apart = pv.aggregate_posterior(model_of(1), Fixed(0.1), 10 * torch.arange(6.0).unsqueeze(1))
    assert apart.mutual_information == pytest.approx(math.log(6), abs=1e-12)
    assert apart.mutual_information_upper > 1_000
    assert apart.saturated
    assert "saturated" in apart.summary()


def test_the_truth_lies_between_on_average(double):
    """x ~ N(0, 1), q(z|x) = N(a x, s^2), p(z) = N(0, 1): I = log(1 + a^2 / s^2) / 2, in 300 sets of 12 data."""
    a, s = 1.3, 0.5
    truth = math.log(1 + a**2 / s**2) / 2
    variance = a**2 + s**2
    marginal_kl = (variance - 1 - math.log(variance)) / 2
    lower, upper, kls = [], [], []
    for _ in range(300):
        found = pv.aggregate_posterior(model_of(1), Fixed(s), a * torch.randn(12, 1))
        lower.append(found.mutual_information)
        upper.append(found.mutual_information_upper)
        kls.append(found.marginal_kl)
    lower, upper, kls = (torch.tensor(values) for values in (lower, upper, kls))
    for below, above in ((lower, truth), (-upper, -truth), (-kls, -marginal_kl)):
        assert above - below.mean() > 4.5 * below.std() / math.sqrt(300)


def test_standard_errors_are_those_of_repeats(double):
    x = torch.randn(40, 2)
    repeats = [pv.aggregate_posterior(model_of(2, 0.5), Fixed(0.6, 0.9), x, num_draws=3) for _ in range(400)]
    names = ("rate", "mutual_information", "mutual_information_upper", "marginal_kl", "total_correlation")
    for name in names:
        values = torch.tensor([getattr(found, name) for found in repeats])
        errors = torch.tensor([getattr(found, f"{name}_stderr") for found in repeats])
        assert values.std().item() == pytest.approx(errors.square().mean().sqrt().item(), rel=0.17), name
    values = torch.stack([found.dimension_kl for found in repeats])
    errors = torch.stack([found.dimension_kl_stderr for found in repeats])
    torch.testing.assert_close(values.std(0), errors.square().mean(0).sqrt(), rtol=0.17, atol=0)
    assert math.isnan(pv.aggregate_posterior(model_of(2), Fixed(0.6, 0.9), x, num_draws=1).rate_stderr)


def test_blocks_change_nothing(double, monkeypatch):
    x = torch.randn(23, 2)

    def run():
        torch.manual_seed(3)
        return pv.aggregate_posterior(model_of(2), Fixed(0.6, 0.9), x)

    whole, sizes = run(), []
    original = module._log_density

    def noted(latents, values):
        result = original(latents, values)
        if isinstance(latents, partial):  # of the guide at some data, not of the prior
            sizes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(module, "_CPU_ELEMENTS", 64 * 33)
    monkeypatch.setattr(module, "_log_density", noted)
    blocks = run()
    assert max(rows * columns for rows, columns in sizes) <= 33
    assert sum(rows * columns for rows, columns in sizes) == 2 * 23 * 23
    for name in ("rate", "mutual_information", "mutual_information_upper", "marginal_kl", "total_correlation"):
        assert getattr(whole, name) == pytest.approx(getattr(blocks, name), abs=1e-12)
        assert getattr(whole, f"{name}_stderr") == pytest.approx(getattr(blocks, f"{name}_stderr"), abs=1e-12)
    torch.testing.assert_close(whole.dimension_kl, blocks.dimension_kl)


@pytest.mark.parametrize("name", [*GUIDES, "BottomUpGuide", "TopDownGuide"])
def test_every_guide_by_brute_force(double, name):
    """Densities of all pairs, one datum at a time, by the distribution that `posterior` gives."""
    if name in GUIDES:
        guide, x = GUIDES[name](), torch.rand(5, *SHAPE)
        model = pv.GenerativeModel(
            pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 12), SHAPE)
        )
    else:
        hierarchy = LinearHierarchy()
        model, x = hierarchy.model(), hierarchy.data(5)
        guide = hierarchy.bottom_up() if name == "BottomUpGuide" else hierarchy.top_down()
    guide.eval()
    closed = name in ("MeanFieldNormal", "FullRankNormal", "LowRankNormal", "Refined")
    with torch.no_grad():
        parameters = guide.encode(x)
        drawn = draw_codes(model, guide, parameters, 3)
        others, of_dimensions = sum_over_data(guide, parameters, drawn, closed, False)
        z = torch.cat([drawn.values[site] for site in sorted(drawn.values)], -1)
        each = [guide.distribution(row.unsqueeze(0)) for row in parameters]
        pairs = torch.stack([q.log_prob(z.unsqueeze(2)).squeeze(2) for q in each], -1)  # (S, N, M)
    torch.testing.assert_close(drawn.log_own, pairs.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(others, pairs.masked_fill(torch.eye(5).bool(), -torch.inf).logsumexp(-1))
    log_prior = model.prior().log_prob(z) if name in GUIDES else model.latent_prior().log_prob(z)
    torch.testing.assert_close(drawn.log_prior, log_prior)
    found = pv.aggregate_posterior(model, guide, x)
    assert (found.total_correlation is not None) == closed
    assert found.rate == pytest.approx(found.mutual_information + found.marginal_kl)
    if closed:
        mean = torch.stack([q.mean for q in each], -2)
        sd = torch.stack([q.variance.sqrt() for q in each], -2)
        of_pairs = dist.Normal(mean, sd).log_prob(z.unsqueeze(2))
        torch.testing.assert_close(of_dimensions, of_pairs.logsumexp(2) - math.log(5))
    else:
        with pytest.raises(ValueError, match=f"{type(guide).__name__} has none in closed form"):
            pv.aggregate_posterior(model, guide, x, total_correlation=True)


def test_float32_and_a_prior_without_marginals():
    model = pv.GenerativeModel(
        pv.priors.MixtureOfNormals(2, 3), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 12), SHAPE)
    )
    guide = GUIDES["MeanFieldNormal"]()
    found = pv.aggregate_posterior(model, guide, torch.rand(5, *SHAPE))
    assert found.dimension_kl is None
    assert found.total_correlation is not None
    words = found.summary()
    assert "total correlation" in words
    assert "dimension-wise" not in words
    assert f"{found.mutual_information:.3f}" in words
    assert "log N = 1.609" in words
    assert "AggregatePosterior(5 data" in repr(found)
    without = pv.aggregate_posterior(model, guide, torch.rand(5, *SHAPE), total_correlation=False)
    assert without.total_correlation is None
    diagonal = pv.aggregate_posterior(model_of(2), Fixed(0.5, 0.5), torch.randn(4, 2))
    assert "over 2 dimensions" in diagonal.summary()


class Overridden(Fixed):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("guide", "rows", "options", "error", "words"),
    [
        (Fixed(1.0, 1.0), 1, {}, ValueError, "2 data or more, found 1"),
        (Fixed(1.0, 1.0), 3, {"num_draws": 0}, ValueError, "num_draws must be 1"),
        (Fixed(1.0, 1.0), 3, {"total_correlation": "yes"}, ValueError, "found 'yes'"),
        (Smooth(1.0, 1.0), 3, {"total_correlation": True}, ValueError, "Smooth has none in closed form"),
        (Overridden(1.0, 1.0), 3, {}, ValueError, "Overridden overrides forward"),
        (lambda x: x, 3, {}, TypeError, "must be a pyrovae.guides.Guide"),
    ],
)
def test_bad_arguments_are_refused(guide, rows, options, error, words):
    with pytest.raises(error, match=words):
        pv.aggregate_posterior(model_of(2), guide, torch.randn(rows, 2), **options)


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"site 'z' has \(2,\) in the guide and \(3,\) in the model"):
        pv.aggregate_posterior(model_of(3), Fixed(1.0, 1.0), torch.randn(3, 2))
    with pytest.raises(ValueError, match="same latent sites"):
        pv.aggregate_posterior(LinearHierarchy().model(), Fixed(1.0, 1.0), torch.randn(3, 2))
    with pytest.raises(TypeError, match=r"GenerativeModel or HierarchicalModel.*found function"):
        pv.aggregate_posterior(lambda x: x, Fixed(1.0), torch.randn(3, 1))
