"""log p(x) against models whose evidence is known in closed form, written as plain Pyro programs."""

import functools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within

import pyrovae as pv


def test_exact_posterior_gives_exact_evidence_with_one_particle(linear_gaussian):
    x = linear_gaussian.data(20)
    lml = pv.log_marginal_likelihood(linear_gaussian.model, linear_gaussian.guide, x, num_particles=1)
    assert torch.allclose(lml.log_prob, linear_gaussian.log_prob(x), atol=1e-10, rtol=0)
    assert lml.stderr.isnan().all()
    assert lml.pareto_k.isnan().all()
    assert math.isnan(lml.share_of_bad_k())


def test_exact_posterior_at_100_particles_has_no_error_and_no_warning(linear_gaussian):
    x = linear_gaussian.data(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lml = pv.log_marginal_likelihood(linear_gaussian.model, linear_gaussian.guide, x, num_particles=100)
    assert torch.allclose(lml.log_prob, linear_gaussian.log_prob(x), atol=1e-10, rtol=0)
    assert lml.stderr.tolist() == [0] * 20
    assert lml.pareto_k.tolist() == [0] * 20
    assert lml.gap.tolist() == [0] * 20
    assert "cannot be trusted" not in lml.summary()


@pytest.mark.slow
def test_coverage_and_unbiasedness_with_an_overdispersed_guide(linear_gaussian):
    """q = N(m, 1.5 C): bounded weights. 4,000 repeats of the estimate for one x, 1,000 particles each.

    95 % intervals cover 92 to 97 % (binomial error of a coverage: 0.35 %); E[p-hat] = p within 4.5 errors.
    """
    x = linear_gaussian.data(1).expand(4000, -1)

    def guide(x):
        linear_gaussian.guide(x, inflate=1.5)

    lml = pv.log_marginal_likelihood(linear_gaussian.model, guide, x, num_particles=1000)
    truth = linear_gaussian.log_prob(x[:1]).item()
    covered = ((lml.log_prob - truth).abs() <= 1.96 * lml.stderr).double().mean().item()
    assert 0.92 <= covered <= 0.97
    ratio = (lml.log_prob - truth).exp()
    within(ratio.mean().item(), 1.0, ratio.std().item() / math.sqrt(len(ratio)))
    assert (lml.curve.diff(dim=0) >= -1e-12).all()
    assert lml.elbo.mean() < lml.log_prob.mean()


def test_gap_of_the_mean_field_guide_is_its_closed_form(linear_gaussian):
    x = linear_gaussian.data(50)
    lml = pv.log_marginal_likelihood(linear_gaussian.model, linear_gaussian.mean_field_guide, x, num_particles=4000)
    stderr = lml.gap_stderr.square().sum().sqrt().item() / 50
    within(lml.gap.mean().item(), linear_gaussian.mean_field_gap(), stderr + abs(lml.bias_estimate))
    assert linear_gaussian.mean_field_gap() > 0.1


def test_two_sites_and_another_plate_name(linear_gaussian):
    """The same model with z in two sites, a plate called otherwise, and a factor for part of the likelihood."""
    x = linear_gaussian.data(12)
    weight, bias, scale = linear_gaussian.weight, linear_gaussian.bias, linear_gaussian.scale

    def model(x):
        with pyro.plate("rows", len(x)):
            first = pyro.sample("first", dist.Normal(0.0, 1.0))
            rest = pyro.sample("rest", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            z = torch.cat([first.unsqueeze(-1), rest], -1)
            likelihood = dist.Normal(z @ weight.T + bias, scale)
            pyro.sample("x", dist.Normal((z @ weight.T + bias)[..., 1:], scale).to_event(1), obs=x[..., 1:])
            pyro.factor("x0", likelihood.log_prob(x)[..., 0])

    def guide(x):
        mean, covariance = linear_gaussian.posterior_mean(x), linear_gaussian.covariance
        with pyro.plate("rows", len(x)):
            first = pyro.sample("first", dist.Normal(mean[:, 0], covariance[0, 0].sqrt()))
            gain = covariance[1:, 0] / covariance[0, 0]
            conditional = mean[:, 1:] + (first - mean[:, 0]).unsqueeze(-1) * gain
            remaining = covariance[1:, 1:] - gain.outer(covariance[0, 1:])
            pyro.sample("rest", dist.MultivariateNormal(conditional, remaining))

    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=30)
    assert torch.allclose(lml.log_prob, linear_gaussian.log_prob(x), atol=1e-9, rtol=0)


def test_beta_bernoulli_without_plates_is_one_datum(double):
    """theta ~ Beta(a, b), flips ~ Bernoulli(theta): p = B(a + heads, b + tails) / B(a, b)."""
    flips, a, b = torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1]), 2.0, 3.0

    def model(flips):
        theta = pyro.sample("theta", dist.Beta(a, b))
        with pyro.plate("flips", len(flips)):
            pyro.sample("x", dist.Bernoulli(theta), obs=flips)

    def posterior(flips):
        pyro.sample("theta", dist.Beta(a + flips.sum(), b + (1 - flips).sum()))

    def wide(flips):
        pyro.sample("theta", dist.Beta(3.0, 2.0))

    def log_beta(a, b):
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    truth = log_beta(a + 6, b + 2) - log_beta(a, b)
    exact = pv.log_marginal_likelihood(model, posterior, flips, num_particles=100)
    assert exact.log_prob.shape == (1,)
    assert exact.log_prob.item() == pytest.approx(truth, abs=1e-10)
    assert exact.stderr.item() == 0
    lml = pv.log_marginal_likelihood(model, wide, flips, num_particles=20_000)
    within(lml.log_prob.item(), truth, lml.stderr.item())


def test_gamma_poisson_per_datum(double):
    """rate ~ Gamma(a, b), x ~ Poisson(rate): negative binomial evidence, a constrained support."""
    x, a, b = torch.tensor([0.0, 1.0, 4.0, 9.0]), 2.0, 0.5

    def model(x):
        with pyro.plate("counts", len(x)):
            rate = pyro.sample("rate", dist.Gamma(a, b))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def posterior(x):
        with pyro.plate("counts", len(x)):
            pyro.sample("rate", dist.Gamma(a + x, b + 1))

    def log_normal(x):
        with pyro.plate("counts", len(x)):
            pyro.sample("rate", dist.LogNormal(((a + x) / (b + 1)).log(), 1.0))

    truth = dist.GammaPoisson(a, b).log_prob(x)
    exact = pv.log_marginal_likelihood(model, posterior, x, num_particles=100)
    assert torch.allclose(exact.log_prob, truth, atol=1e-10, rtol=0)
    assert exact.stderr.tolist() == [0] * 4
    lml = pv.log_marginal_likelihood(model, log_normal, x, num_particles=20_000)
    for datum in range(4):
        within(lml.log_prob[datum].item(), truth[datum].item(), lml.stderr[datum].item())


def test_guide_wider_than_a_bounded_prior_gives_zero_weights(double):
    """z ~ U(0, 1), x ~ N(z, 1), q = N(0.5, 1): draws outside [0, 1] have weight 0, and the answer is still right."""
    x = torch.tensor([0.3, -1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5, 1.0).expand([len(x)]))

    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=50_000)
    normal = torch.distributions.Normal(0.0, 1.0)
    truth = (normal.cdf(1 - x) - normal.cdf(-x)).log()
    for datum in range(2):
        within(lml.log_prob[datum].item(), truth[datum].item(), lml.stderr[datum].item())
    assert (lml.elbo == -torch.inf).all()
    assert (pv.log_weights(model, guide, x, num_particles=200) == -torch.inf).any()


def test_impossible_latents_that_break_the_likelihood(double):
    """A negative rate makes Poisson(rate) NaN; the prior says that it cannot be, and the weight is 0."""
    x = torch.tensor([2.0, 0.0])

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Exponential(1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Normal(1.0, 1.5).expand([len(x)]))

    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=50_000)
    truth = -(x + 1) * math.log(2)  # geometric
    for datum in range(2):
        within(lml.log_prob[datum].item(), truth[datum].item(), lml.stderr[datum].item())


def test_automatic_guides(linear_gaussian):
    """Pyro's AutoNormal (auxiliary sites) and AutoMultivariateNormal (one site for all data) as they are."""
    from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

    x = linear_gaussian.data(3)
    normal = AutoNormal(linear_gaussian.model, init_scale=0.5)
    normal(x)
    lml = pv.log_marginal_likelihood(linear_gaussian.model, normal, x, num_particles=40_000)
    truth = linear_gaussian.log_prob(x)
    assert lml.log_prob.shape == (3,)
    for datum in range(3):
        assert abs(lml.log_prob[datum] - truth[datum]) < 6 * lml.stderr[datum] + 0.05

    joint = AutoMultivariateNormal(linear_gaussian.model, init_scale=0.3)
    joint(x[:1])
    lml = pv.log_marginal_likelihood(linear_gaussian.model, joint, x[:1], num_particles=100_000)
    assert lml.log_prob.shape == (1,)
    assert abs(lml.log_prob.item() - truth[0].item()) < 6 * lml.stderr.item() + 0.05
    pyro.clear_param_store()


# --- how many particles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_particles_for_a_standard_error(linear_gaussian, share):
    """q = N(m, c C): Var w / p(x)^2 = (c / sqrt(2c - 1))^D - 1, the same for all data."""
    inflate, wanted = 1.8, 0.02
    variance = (inflate / math.sqrt(2 * inflate - 1)) ** 3 - 1
    x = linear_gaussian.data(60)
    guide = functools.partial(linear_gaussian.guide, inflate=inflate)
    found = pv.particles_for(linear_gaussian.model, guide, x, stderr=wanted, share=share, num_pilot_particles=1000)
    assert found == pytest.approx(variance / wanted**2, rel=0.25)
    lml = pv.log_marginal_likelihood(linear_gaussian.model, guide, x, num_particles=found)
    assert lml.stderr.quantile(share).item() == pytest.approx(wanted, rel=0.15)
    half = pv.particles_for(linear_gaussian.model, guide, x, stderr=wanted / 2, share=share, num_pilot_particles=1000)
    assert half == pytest.approx(4 * found, rel=0.25)


def test_particles_for_an_exact_guide_and_wrong_settings(linear_gaussian):
    x = linear_gaussian.data(3)
    few = functools.partial(pv.particles_for, linear_gaussian.model, linear_gaussian.guide, x)
    assert few(stderr=0.1) == 25
    for options, match in (
        ({"stderr": 0.0}, "stderr must be positive"),
        ({"stderr": 0.1, "share": 1.5}, "share must lie in"),
        ({"stderr": 0.1, "num_pilot_particles": 1}, "one pilot particle"),
    ):
        with pytest.raises(ValueError, match=match):
            few(**options)


def test_particles_for_data_out_of_reach(double):
    """All weights 0 for two of three data: no error is known for them."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("reach", torch.where(z > x, 0.0, -math.inf))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.tensor([0.0, 9.0, 9.5])
    assert pv.particles_for(model, guide, x, stderr=0.05, share=0.3, num_pilot_particles=2000) == pytest.approx(
        400, rel=0.2
    )
    with pytest.raises(ValueError, match="0 for 2 of 3 data"):
        pv.particles_for(model, guide, x, stderr=0.05)
