"""Sequential Monte Carlo against exact log p(x): unbiased on lopsided and two-humped targets, resampling by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.exact import gamma_poisson, potential_of

import pyrovae as pv
from pyrovae.annealing import smc
from pyrovae.annealing.chains import tune
from pyrovae.annealing.smc import run_populations, sequential_monte_carlo, systematic_ancestors


@pytest.fixture(autouse=True)
def _quick(uncompiled, short_pilots):
    """Nothing here depends on compilation or on well-tuned kernels."""


def two_humps(x):
    """z ~ N(0, 3^2), x | z ~ 0.8 N(z - 4, 0.5) + 0.2 N(z + 4, 0.3): the posterior has two humps far apart."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 3.0).expand([1]).to_event(1))[..., 0]
        humps = torch.stack([z - 4, z + 4], -1)
        mixture = dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.8, 0.2])), dist.Normal(humps, torch.tensor([0.5, 0.3]))
        )
        pyro.sample("x", mixture, obs=x)


def log_prob_of_two_humps(x):
    z = torch.linspace(-25, 25, 20_001)
    joint = dist.Normal(0.0, 3.0).log_prob(z) + torch.logaddexp(
        math.log(0.8) + dist.Normal(z - 4, 0.5).log_prob(x[:, None]),
        math.log(0.2) + dist.Normal(z + 4, 0.3).log_prob(x[:, None]),
    )
    return joint.logsumexp(1) + (z[1] - z[0]).log()


def log_prob_of_counts(counts):
    """Three Poisson counts with one Gamma(2, 0.5) rate."""
    total = counts.sum(-1)
    return (
        2 * math.log(0.5)
        + torch.lgamma(2 + total)
        - math.lgamma(2)
        - (2 + total) * math.log(3.5)
        - torch.lgamma(counts + 1).sum(-1)
    )


def one_hump(x):
    """A start at the lesser hump alone has small weights at the other one."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x - 4).unsqueeze(-1), 2.5).to_event(1))


TARGETS = {
    "counts": (gamma_poisson, None, torch.tensor([[0.0, 1.0, 0.0], [3.0, 5.0, 9.0]]), log_prob_of_counts),
    "two humps": (two_humps, None, torch.tensor([0.5, -2.0]), log_prob_of_two_humps),
    "two humps, from one": (two_humps, one_hump, torch.tensor([0.5]), log_prob_of_two_humps),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("num_temperatures", [3, 12])
def test_weights_are_unbiased(double, name, num_temperatures):
    """E[w] = p(x) of every population, with so few temperatures that populations are resampled often."""
    model, guide, x, log_prob = TARGETS[name]
    repeated = x.repeat_interleave(500, 0).to(torch.float64)
    potential = potential_of(model, guide, 12, repeated)
    kernels = tune(potential, num_temperatures, 3)
    found = run_populations(potential, kernels, 3)
    assert found.log_weights.shape == (3, len(repeated))
    ratios = (found.log_weights - log_prob(repeated)).exp().reshape(3, len(x), -1)
    for of_datum in ratios.unbind(1):
        within(of_datum.mean().item(), 1.0, of_datum.mean(0).std().item() / math.sqrt(of_datum.shape[1]))


def test_populations_are_resampled_in_these_tests(double, monkeypatch):
    """Otherwise the tests above would say nothing about resampling."""
    chosen = []
    monkeypatch.setattr(smc, "systematic_ancestors", lambda w: chosen.append(systematic_ancestors(w)) or chosen[-1])
    for model, guide, x, _ in TARGETS.values():
        before = len(chosen)
        potential = potential_of(model, guide, 12, x.repeat_interleave(20, 0).to(torch.float64))
        run_populations(potential, tune(potential, 12, 3), 3)
        assert len(chosen) > before


@given(st.lists(st.floats(-30, 5), min_size=2, max_size=9), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_ancestors_occur_in_proportion(log_weights, seed):
    """Systematic resampling: floor or ceiling of the expected number, in every draw; the mean is exact.

    6 / repeats: a number that is seldom drawn is not normal.
    """
    torch.manual_seed(seed)
    weights = torch.tensor(log_weights, dtype=torch.float64)
    repeats = 400
    ancestors = systematic_ancestors(weights[None, :, None].expand(1, -1, repeats))
    size = len(weights)
    expected = size * weights.softmax(0)
    counts = torch.stack([torch.bincount(ancestors[0, :, n], minlength=size) for n in range(repeats)]).double()
    assert ((counts >= expected.floor() - 1e-6) & (counts <= (expected + 1e-6).ceil())).all()
    spread = ((expected - expected.floor()) * (expected.ceil() - expected)).sqrt()
    assert ((counts.mean(0) - expected).abs() <= 5 * spread / math.sqrt(repeats) + 6 / repeats).all()


def test_the_result_is_annealings(double):
    x = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    result = sequential_monte_carlo(two_humps, x, num_populations=6, num_chains=32, num_temperatures=30)
    assert isinstance(result, pv.LogMarginalLikelihood)
    assert (len(result), result.num_particles) == (3, 6)
    assert "by sequential Monte Carlo: 3 data, 6 populations" in result.summary()
    assert result[:2].method == result.method == "sequential Monte Carlo"
    assert result.elbo.isnan().all()
    assert ((result.log_prob - log_prob_of_two_humps(x)).abs() < 5 * result.stderr + 0.1).all()
    assert 0 < result.acceptance.min() <= result.acceptance.max() <= 1


def test_parts_of_the_library_recorded_and_eager():
    torch.manual_seed(0)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 6), 6))
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(6, [8]), 2)
    x = torch.bernoulli(torch.full((5, 6), 0.4))
    grid = torch.cartesian_prod(*[torch.linspace(-7, 7, 301)] * 2)
    with torch.no_grad():
        joint = model.prior().log_prob(grid)[:, None] + model.likelihood(grid[:, None]).log_prob(x)
    exact = joint.double().logsumexp(0) + 2 * math.log(14 / 300)
    for compile in (False, True):
        result = sequential_monte_carlo(
            model, x, guide=guide, num_populations=4, num_chains=16, num_temperatures=20, compile=compile
        )
        assert ((result.log_prob - exact).abs() < 6 * result.stderr + 0.02).all()


@pytest.mark.parametrize(
    ("options", "words"), [({"num_populations": 0}, "num_populations"), ({"num_chains": 1}, "num_chains must be 2")]
)
def test_bad_numbers_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        sequential_monte_carlo(two_humps, torch.ones(2), **options)
