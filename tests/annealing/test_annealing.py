"""Annealing against exact log p(x): strict bounds from both sides, constrained and several latents, planted mistakes."""

import inspect
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import LinearGaussian, within
from pyro.infer.autoguide import AutoNormal
from shared.exact import gamma_poisson, potential_of, two_sites

import pyrovae as pv
from pyrovae.annealing import bidirectional, chains
from pyrovae.annealing.chains import Annealed, anneal, anneal_back, sigmoidal_schedule, tune


@pytest.fixture(autouse=True)
def _recorded(uncompiled):
    """compile=True records and does not compile: the chains at a tenth of the time."""


def mean_ratio(log_ratios):
    """(mean of exp(log_ratios), its standard error), from independent ratios."""
    ratios = log_ratios.exp().flatten()
    return ratios.mean().item(), ratios.std().item() / math.sqrt(len(ratios))


def posterior_draws(linear_gaussian, x, num_chains):
    noise = torch.randn(len(x), linear_gaussian.latent_dim)
    z = linear_gaussian.posterior_mean(x) + noise @ torch.linalg.cholesky(linear_gaussian.covariance).T
    return z.repeat(num_chains, 1, 1)


def test_sigmoidal_schedule_by_hand():
    beta = sigmoidal_schedule(4)
    low, high = 1 / (1 + math.exp(4)), 1 / (1 + math.exp(-4))
    assert beta.tolist() == pytest.approx(
        [((1 / (1 + math.exp(-4 * (t / 2 - 1)))) - low) / (high - low) for t in range(5)]
    )
    assert (beta.diff() > 0).all()


@pytest.mark.parametrize("start", ["prior", "overdispersed", "mean field"])
def test_densities_are_those_of_the_programs(linear_gaussian, start):
    guides = {
        "prior": None,
        "overdispersed": lambda x: linear_gaussian.guide(x, 1.5),
        "mean field": linear_gaussian.mean_field_guide,
    }
    x = linear_gaussian.data(4)
    potential = potential_of(linear_gaussian.model, guides[start], 6, x)
    u = potential.draw()
    log_start, log_weight = potential.log_densities(u)
    prior = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
    likelihood = (
        dist.Normal(u @ linear_gaussian.weight.T + linear_gaussian.bias, linear_gaussian.scale).log_prob(x).sum(-1)
    )
    assert u.shape == (6, 4, 3)
    assert torch.allclose(log_start + log_weight, prior + likelihood)
    if start == "prior":
        assert torch.allclose(log_start, prior)
    if start == "overdispersed":
        covariance = 1.5 * linear_gaussian.covariance
        q = dist.MultivariateNormal(linear_gaussian.posterior_mean(x), covariance).log_prob(u)
        assert torch.allclose(log_start, q)
    beta = torch.tensor(0.3)
    energy = potential.energy(u, beta)
    shifted = u.clone()
    shifted[..., 1] += 1e-6
    moved = potential.energy(shifted, beta)
    slope = ((moved.log_start + beta * moved.log_weight) - (energy.log_start + beta * energy.log_weight)) / 1e-6
    assert torch.allclose(energy.gradient[..., 1], slope, rtol=1e-3, atol=1e-3)


def ratios_of_a_model(linear_gaussian, monkeypatch, leap):
    """(E[w] / p(x) forwards, its standard error), and the same of E[1/w] p(x) backwards: both 1 for kernels that are right.

    The kernels are tuned as they are, and then move by `leap`.
    """
    x = linear_gaussian.data(200)
    truth = linear_gaussian.log_prob(x)
    potential = potential_of(linear_gaussian.model, None, 8, x)
    potential = potential.record([], inductor=False)
    kernels = tune(potential, 100, 8)
    monkeypatch.setattr(chains, "_leap", leap)
    forward = anneal(potential, kernels)
    back = anneal_back(potential, kernels, posterior_draws(linear_gaussian, x, 8))
    # Chains are independent given the kernels; data are independent of each other. Chains that start at one draw are not
    # independent: their mean per datum is.
    ratios = (
        mean_ratio(forward.log_weights - truth),
        mean_ratio(torch.logsumexp(truth - back.log_weights, 0) - math.log(8)),
    )
    return ratios, forward


@pytest.mark.parametrize(("latent_dim", "scale"), [(2, 1.5), (10, 4.0)])
def test_both_directions_are_strict(double, monkeypatch, latent_dim, scale):
    """E[w] = p(x) forwards and E[1/w] = 1/p(x) backwards, where the weights hardly vary."""
    linear_gaussian = LinearGaussian(latent_dim, 2 * latent_dim, scale)
    ratios, forward = ratios_of_a_model(linear_gaussian, monkeypatch, chains._leap)
    for ratio, stderr in ratios:
        assert stderr < 0.03
        within(ratio, 1.0, stderr)
    assert 0.5 < forward.acceptance.mean() < 0.8
    assert torch.allclose(forward.u.mean((0, 1)), torch.zeros(latent_dim), atol=0.4)


PLANTED = {
    "accepts always": ("torch.rand_like(log_ratio).log() < log_ratio", "log_ratio.isfinite()"),
    "a whole step where a half one begins": (
        "momentum + 0.5 * step * scale * energy",
        "momentum + step * scale * energy",
    ),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_wrong_kernel_is_caught(double, monkeypatch, mistake):
    """The check above fails for a kernel that does not leave its density invariant: it can fail."""
    source = inspect.getsource(chains._leap)
    right, wrong = PLANTED[mistake]
    assert source.count(right) == 1
    planted = dict(vars(chains))
    exec(source.replace(right, wrong), planted)
    ratios, _ = ratios_of_a_model(LinearGaussian(2, 4, scale=1.5), monkeypatch, planted["_leap"])
    assert max(abs(ratio - 1) / stderr for ratio, stderr in ratios) > 10


def test_bounds_in_order_and_the_width_falls(linear_gaussian):
    x = linear_gaussian.data(60)
    widths = []
    for num_temperatures in (25, 200):
        result = pv.bidirectional_monte_carlo(
            linear_gaussian.model,
            x,
            num_chains=2,
            num_temperatures=num_temperatures,
            num_leapfrog_steps=8,
            compile=True,
        )
        truth = linear_gaussian.log_prob(result.data["x"])
        below, above = result.lower - truth, result.upper - truth
        assert below.mean() < 3 * below.std() / math.sqrt(60)
        assert above.mean() > -3 * above.std() / math.sqrt(60)
        # Markov: P(lower > log p + a) <= exp(-a); 60 data of which e^-3 = 5 % may, and more than 12 only once in 30,000.
        assert (below > 3).sum() <= 12
        widths.append(result.width.mean().item())
        assert not torch.equal(result.data["x"], x)
        assert result.latents["z"].shape == (60, 3)
    assert widths[1] < 0.5 * widths[0]


def test_both_bounds_of_known_weights_by_hand(linear_gaussian, monkeypatch, short_pilots):
    """lower = log mean(w), upper = -log mean(1/w): the mean of w along backward chains is an upper bound too, and looser."""
    weights = torch.tensor([1.0, 2.0, 3.0, 6.0]).unsqueeze(1)

    def known(acceptance):
        return lambda potential, *_: Annealed(
            weights.log().expand(4, 5), potential.coordinates.u, torch.full((5,), acceptance)
        )

    monkeypatch.setattr(bidirectional, "anneal", known(0.6))
    monkeypatch.setattr(bidirectional, "anneal_back", known(0.8))
    x = linear_gaussian.data(5)
    result = pv.bidirectional_monte_carlo(linear_gaussian.model, x, num_chains=4, num_temperatures=5, compile=False)
    inverse = 1 / weights
    for found, expected in (
        (result.lower, math.log(3)),
        (result.lower_stderr, weights.std() / 2 / 3),
        (result.upper, math.log(2)),
        (result.upper_stderr, inverse.std() / 2 / inverse.mean()),
        (result.acceptance, 0.7),
    ):
        assert torch.allclose(found, torch.full((5,), float(expected)), rtol=1e-10)


def test_from_a_guide(linear_gaussian):
    """From the mean-field guide to the posterior is a short way."""
    x = linear_gaussian.data(50)
    result = pv.annealed_importance_sampling(
        linear_gaussian.model,
        x,
        guide=linear_gaussian.mean_field_guide,
        num_chains=2,
        num_temperatures=60,
        num_leapfrog_steps=8,
        compile=True,
    )
    error = result.log_prob - linear_gaussian.log_prob(x)
    within(error.mean().item(), 0.0, error.std().item() / math.sqrt(50) + 0.01)
    assert error.abs().mean() < 0.2
    both = pv.bidirectional_monte_carlo(
        linear_gaussian.model,
        x,
        guide=linear_gaussian.mean_field_guide,
        num_chains=2,
        num_temperatures=60,
        num_leapfrog_steps=8,
        compile=True,
    )
    truth = linear_gaussian.log_prob(both.data["x"])
    assert (both.lower - truth).abs().mean() < 0.2
    assert (both.upper - truth).abs().mean() < 0.2


def gamma_poisson_log_prob(counts):
    total, num = counts.sum(-1), counts.shape[-1]
    return (
        2 * math.log(0.5)
        - math.lgamma(2)
        + torch.lgamma(2 + total)
        - (2 + total) * math.log(0.5 + num)
        - torch.lgamma(counts + 1).sum(-1)
    )


def test_constrained_latents(double):
    """Gamma-Poisson, whose rate is positive; data drawn for two of its rates."""
    counts = torch.poisson(torch.tensor([[1.0], [9.0]]).expand(20, 2, 3).reshape(40, 3))
    result = pv.annealed_importance_sampling(
        gamma_poisson, counts, num_chains=16, num_temperatures=100, num_leapfrog_steps=8, compile=True
    )
    error = result.log_prob - gamma_poisson_log_prob(counts)
    assert error.abs().max() < 0.5
    within(error.mean().item(), 0.0, error.std().item() / math.sqrt(40) + 0.005)
    both = pv.bidirectional_monte_carlo(
        gamma_poisson, counts, num_chains=16, num_temperatures=100, num_leapfrog_steps=8, compile=True
    )
    truth = gamma_poisson_log_prob(both.data["counts"])
    below, above = both.lower - truth, both.upper - truth
    assert below.mean() < 4.5 * below.std() / math.sqrt(40)
    assert above.mean() > -4.5 * above.std() / math.sqrt(40)
    assert both.width.mean() < 0.2


def two_sites_log_prob(x):
    joint = torch.tensor([[1.0, 1.0], [1.0, 1.25]])  # of (b, a)
    design = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    return dist.MultivariateNormal(torch.zeros(2), design @ joint @ design.T + 0.36 * torch.eye(2)).log_prob(x)


@pytest.mark.parametrize("guided", [False, True])
def test_several_sites_and_auxiliary_draws(double, guided):
    """The prior's path, and that of an AutoNormal, whose draws are auxiliary."""
    x = torch.randn(30, 2) * torch.tensor([2.2, 1.2])
    guide = AutoNormal(two_sites, init_scale=0.5) if guided else None
    if guided:
        guide(x)
    result = pv.annealed_importance_sampling(
        two_sites, x, guide=guide, num_chains=16, num_temperatures=100, num_leapfrog_steps=8, compile=True
    )
    error = result.log_prob - two_sites_log_prob(x)
    assert error.abs().mean() < 0.15
    within(error.mean().item(), 0.0, error.std().item() / math.sqrt(30) + 0.005)
    pyro.clear_param_store()


def test_one_joint_datum(double):
    """Without a plate common to all sites, the program is one datum: a global mean with its data."""
    x = torch.randn(6) + 1

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    truth = dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + 4.0).log_prob(x)
    result = pv.annealed_importance_sampling(
        model, x, num_chains=40, num_temperatures=100, num_leapfrog_steps=8, compile=True
    )
    assert len(result) == 1
    within(result.log_prob.item(), truth.item(), result.stderr.item())


def small_pair():
    torch.manual_seed(0)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 12), 12))
    return model.double(), pv.guides.MeanFieldNormal(pv.nets.MLP(12, [8]), 2).double()


def test_library_models_in_blocks_and_compiled(double):
    """Against quadrature, with a guide so bad that importance sampling errs by a nat; blocks and compilation change nothing."""
    model, guide = small_pair()
    x = torch.bernoulli(torch.full((7, 12), 0.4))
    axis = torch.linspace(-7, 7, 281)
    z = torch.cartesian_prod(axis, axis).unsqueeze(1)
    with torch.no_grad():
        joint = model.prior().log_prob(z) + model.likelihood(z).log_prob(x)
    truth = torch.logsumexp(joint, 0) + 2 * (axis[1] - axis[0]).log()
    settings = {"num_chains": 16, "num_temperatures": 60, "num_leapfrog_steps": 5}
    for start in (None, guide):
        whole = pv.annealed_importance_sampling(model, x, guide=start, compile=True, **settings)
        blocks = pv.annealed_importance_sampling(model, x, guide=start, compile=True, data_batch_size=3, **settings)
        for result in (whole, blocks):
            assert ((result.log_prob - truth).abs() < 6 * result.stderr + 0.01).all()  # 15 degrees of freedom
            assert result.stderr.mean() < 0.2
    assert whole.gap.isnan().all()
    pyro.set_rng_seed(4)
    eager = pv.annealed_importance_sampling(model, x, guide=guide, compile=False, **settings)
    pyro.set_rng_seed(4)
    compiled = pv.annealed_importance_sampling(model, x, guide=guide, compile=True, **settings)
    assert torch.allclose(eager.log_prob, compiled.log_prob, atol=1e-6)
