"""The rate-distortion curve against closed forms: a linear-Gaussian model, whose p_beta(z|x) is normal."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within

import pyrovae as pv
from pyrovae.estimators.compression import rate_and_distortion

SMALL = {"num_chains": 4, "num_temperatures": 6, "num_leapfrog_steps": 2}


@pytest.fixture(autouse=True)
def _quick(uncompiled):
    """Nothing here depends on compilation."""


class Curve:
    """R, D and log Z at temperatures beta (T,) for data x (N, d), each (T, N), of a linear-Gaussian model."""

    def __init__(self, exact, x, beta):
        beta = beta[:, None, None]
        variance, dim = exact.scale**2, x.shape[1]
        covariance = torch.linalg.inv(torch.eye(exact.latent_dim) + beta * exact.weight.T @ exact.weight / variance)
        centred = x - exact.bias
        mean = beta * centred @ exact.weight / variance @ covariance
        left = centred - mean @ exact.weight.T
        spread = torch.einsum("ij,tjk,ik->t", exact.weight, covariance, exact.weight)[:, None]
        self.distortion = dim / 2 * math.log(2 * math.pi * variance) + (left.square().sum(-1) + spread) / 2 / variance
        trace = covariance.diagonal(dim1=1, dim2=2).sum(1)[:, None]
        self.rate = (trace + mean.square().sum(-1) - exact.latent_dim - torch.logdet(covariance)[:, None]) / 2
        self.log_z = -self.rate - beta[:, :, 0] * self.distortion


def test_the_closed_form_is_right(linear_gaussian):
    """Its log Z is the integral of N(z; 0, I) N(x; W z + b, s^2)^beta, and its ends are known."""
    x = linear_gaussian.data(3)
    curve = Curve(linear_gaussian, x, torch.tensor([0.0, 0.3, 1.0]))
    assert curve.rate[0].abs().max() < 1e-12
    torch.testing.assert_close(curve.log_z[2], linear_gaussian.log_prob(x))
    narrowed = linear_gaussian.weight @ linear_gaussian.weight.T + linear_gaussian.scale**2 / 0.3 * torch.eye(5)
    constant = 5 / 2 * ((1 - 0.3) * math.log(2 * math.pi * linear_gaussian.scale**2) - math.log(0.3))
    log_z = dist.MultivariateNormal(linear_gaussian.bias, narrowed).log_prob(x) + constant
    torch.testing.assert_close(curve.log_z[1], log_z)


def test_many_temperatures_reach_the_curve(linear_gaussian):
    x = linear_gaussian.data(12)
    found = pv.rate_distortion(
        linear_gaussian.model, x, num_chains=64, num_temperatures=200, num_leapfrog_steps=4, data_batch_size=6
    )
    exact = Curve(linear_gaussian, x, found.beta)
    assert found.rate.shape == found.distortion.shape == found.ess.shape == (201, 12)
    assert found.beta[0] == 0
    assert found.beta[-1] == 1
    for t in range(0, 201, 20):
        within(found.mean_rate[t].item(), exact.rate[t].mean().item(), found.mean_rate_mc_stderr[t].item() + 0.01)
        within(
            found.mean_distortion[t].item(),
            exact.distortion[t].mean().item(),
            found.mean_distortion_mc_stderr[t].item() + 1e-9,
        )
    above = found.rate + found.beta[:, None] * found.distortion + exact.log_z  # of the least value at this slope
    assert above.mean(1).abs().max() < 0.05
    assert found.ess[1:].mean() > 50


def test_no_point_lies_below_the_curve(linear_gaussian):
    """However coarse the run: at each distortion found, the exact curve, the largest of its tangents, needs less."""
    x = linear_gaussian.data(200)
    found = pv.rate_distortion(linear_gaussian.model, x, num_chains=2, num_temperatures=8, num_leapfrog_steps=2)
    fine = torch.cat([torch.linspace(0, 1, 201), torch.logspace(0, 2, 50)])
    tangents = -Curve(linear_gaussian, x, fine).log_z.mean(1)
    least, best = (tangents[:, None] - fine[:, None] * found.mean_distortion).max(0)
    error = found.mean_rate_mc_stderr + fine[best] * found.mean_distortion_mc_stderr
    assert (found.mean_rate[1:] - least[1:] > -4.5 * error[1:]).all()
    above = found.rate + found.beta[:, None] * found.distortion + Curve(linear_gaussian, x, found.beta).log_z
    assert above.mean(1)[3:].min() > 0.05  # coarse: well above


def test_weights_are_unbiased_at_every_temperature(linear_gaussian, short_pilots):
    """E[exp(-(R + beta D))] = Z_beta strictly, even with kernels that hardly move and few temperatures."""
    x = linear_gaussian.data(1).expand(3_000, -1).contiguous()
    found = pv.rate_distortion(linear_gaussian.model, x, **SMALL)
    exact = Curve(linear_gaussian, x, found.beta)
    ratio = (-(found.rate + found.beta[:, None] * found.distortion) - exact.log_z).exp()
    assert (ratio[0] - 1).abs().max() < 1e-10
    for row in ratio[1:]:
        within(row.mean().item(), 1.0, row.std().item() / math.sqrt(3_000))


def test_chains_drawn_by_weight_have_the_distribution_of_each_temperature(linear_gaussian, short_pilots):
    """With many chains a coarse run is right as well, and its standard errors say how far."""
    x = linear_gaussian.data(6)
    found = pv.rate_distortion(
        linear_gaussian.model, x, num_chains=20_000, num_temperatures=6, num_leapfrog_steps=2, data_batch_size=None
    )
    exact = Curve(linear_gaussian, x, found.beta)
    assert ((found.rate - exact.rate).abs() <= 5 * found.rate_stderr + 1e-9).all()
    assert ((found.distortion - exact.distortion).abs() <= 5 * found.distortion_stderr).all()
    assert found.rate_stderr[0].max() < 1e-9
    assert found.rate_stderr[-1].max() < 0.2


def test_standard_errors_are_those_of_repeats(linear_gaussian, short_pilots):
    x = linear_gaussian.data(1).expand(1_500, -1).contiguous()
    found = pv.rate_distortion(
        linear_gaussian.model, x, num_chains=100, num_temperatures=20, num_leapfrog_steps=3, data_batch_size=None
    )
    for values, errors in ((found.rate, found.rate_stderr), (found.distortion, found.distortion_stderr)):
        for t in (2, 10, 20):
            assert values[t].std().item() == pytest.approx(errors[t].square().mean().sqrt().item(), rel=0.15)


def test_the_end_is_that_of_annealed_importance_sampling(linear_gaussian, short_pilots):
    x = linear_gaussian.data(5)
    pyro.set_rng_seed(4)
    found = pv.rate_distortion(linear_gaussian.model, x, **SMALL)
    pyro.set_rng_seed(4)
    annealed = pv.annealed_importance_sampling(linear_gaussian.model, x, schedule="sigmoidal", **SMALL)
    torch.testing.assert_close(found.log_prob, annealed.log_prob)
    torch.testing.assert_close(found.acceptance, annealed.acceptance)


def test_one_chain_is_the_plain_bound():
    log_weights, log_likelihood = torch.tensor([[-3.0, -4.0]]), torch.tensor([[-2.0, -8.0]])
    found = rate_and_distortion(0.25, log_weights, log_likelihood)
    assert found.distortion.tolist() == [2.0, 8.0]
    assert found.rate.tolist() == [3.0 - 0.5, 4.0 - 2.0]
    assert found.rate_stderr.isnan().all()


def test_by_hand_with_weights_of_zero():
    log_weights = torch.tensor([[math.log(3.0), 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    log_likelihood = torch.tensor([[-1.0, -2.0, -torch.inf], [-5.0, -torch.inf, -torch.inf]])
    found = rate_and_distortion(0.5, log_weights, log_likelihood)
    torch.testing.assert_close(found.distortion, torch.tensor([2.0, 2.0, torch.inf], dtype=torch.float64))
    torch.testing.assert_close(
        found.rate, torch.tensor([-math.log(2) - 1, math.log(2) - 1, torch.inf], dtype=torch.float64)
    )
    # Chains 3/4 and 1/4: contributions to D are -1.5 and 1.5, to R 1/4 and -1/4.
    torch.testing.assert_close(found.distortion_stderr[0].item(), 1.5)
    torch.testing.assert_close(found.rate_stderr[0].item(), 0.25)
    start = rate_and_distortion(0.0, torch.zeros(2, 1), torch.tensor([[-1.0], [-torch.inf]]))
    assert start.rate.item() == 0
    assert start.distortion.item() == torch.inf


def test_the_other_side_on_simulated_data(linear_gaussian):
    """-upper - D is below the exact curve at every distortion, and touches it at beta = 1."""
    options = {"num_chains": 16, "num_temperatures": 100, "num_leapfrog_steps": 4}
    bounds = pv.bidirectional_monte_carlo(linear_gaussian.model, linear_gaussian.data(40), **options)
    x = bounds.data["x"]
    found = pv.rate_distortion(linear_gaussian.model, x, **options)
    least = found.least_rate(bounds)
    fine = torch.linspace(0, 1, 401)
    tangents = -Curve(linear_gaussian, x, fine).log_z
    curve = (tangents[:, None] - fine[:, None, None] * found.distortion).amax(0)  # exact R at these distortions
    error = (bounds.upper - linear_gaussian.log_prob(x)).std().item() / math.sqrt(40)
    assert ((curve - least).mean(1) > -4.5 * error - 1e-3).all()
    assert (found.rate - least).mean(1)[-1].item() == pytest.approx(0, abs=0.05)
    assert (curve - least).mean(1)[20] > 1  # far from it at small beta: only a line
    with pytest.raises(ValueError, match="bounds for 40 data and a curve for 10"):
        pv.rate_distortion(linear_gaussian.model, x[:10], **SMALL).least_rate(bounds)


def test_a_likelihood_of_zero_on_a_part_of_the_prior(double, short_pilots):
    """z ~ U(0, 1), and x = 1/2 is certain for z > x and impossible below: R(beta) = log 2 at every beta > 0."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.factor("x", torch.where(z > x, 0.0, -torch.inf) + 0 * z)

    found = pv.rate_distortion(model, torch.full((4,), 0.5), num_chains=2_000, num_temperatures=6, num_leapfrog_steps=2)
    assert (found.distortion[0] == torch.inf).all()
    assert (found.rate[0] == 0).all()
    assert (found.distortion[1:] == 0).all()
    assert (found.rate[1:] - math.log(2)).abs().max() < 4.5 * math.sqrt(1 / 2_000)


def test_a_pair_of_this_library(short_pilots):
    model = pv.GenerativeModel(pv.priors.MixtureOfNormals(2, 3), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 6), 6))
    found = pv.rate_distortion(model, torch.ones(5, 6), **SMALL)
    assert len(found) == 5
    words = found.summary()
    assert "5 data, 4 chains, 6 temperatures" in words
    assert f"{found.mean_distortion[0]:.3f}" in words
    assert f"{found.log_prob.mean():.3f}" in words
    assert "RateDistortion(5 data" in repr(found)
    one = pv.rate_distortion(model, torch.ones(2, 6), **{**SMALL, "num_chains": 1})
    assert one.mean_rate_mc_stderr.isnan().all()
    assert "1 chain," in one.summary()


def test_bad_settings_are_refused(linear_gaussian):
    with pytest.raises(ValueError, match="num_chains must be 1"):
        pv.rate_distortion(linear_gaussian.model, linear_gaussian.data(2), num_chains=0)
