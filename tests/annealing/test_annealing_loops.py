"""Chains one by one, for programs that take no outer plate: the densities of chains run together, and exact evidence."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import LinearGaussian, within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyrovae as pv
from pyrovae.annealing.potential import block_potential, prior_of
from pyrovae.programs.splitting import inspect

SETTINGS = {"num_chains": 4, "num_temperatures": 10, "num_leapfrog_steps": 4}
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
ONE_BY_ONE = "chains are run one by one, which is slow"


def both_potentials(model, guide, num_chains, *args):
    pair = inspect(model, guide or prior_of(model), args, {})
    return (
        block_potential(pair, 0, pair.num_data, num_chains, from_prior=guide is None, vectorised=vectorised)
        for vectorised in (True, False)
    )


def local(x):
    """Constrained and vector latents in the data's plate."""
    with pyro.plate("data", len(x)):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(share[..., :2], scale.unsqueeze(-1)).to_event(1), obs=x)


def nested(x):
    """A plate inside the data's: "a" has one plate fewer than "b"."""
    with pyro.plate("data", len(x), dim=-2):
        a = pyro.sample("a", dist.Normal(torch.zeros(len(x), 1), 1.0))
        with pyro.plate("inner", x.shape[1], dim=-1):
            b = pyro.sample("b", dist.Normal(a, 0.5))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def joint(x):
    """No plate in common: one datum."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mean + z.unsqueeze(-1), 0.5).to_event(1), obs=x)


@pytest.mark.parametrize("model", [local, nested, joint])
@pytest.mark.parametrize("guided", [False, True])
@settings(max_examples=6, derandomize=True, deadline=None, database=None, suppress_health_check=CHECKS)
@given(num_data=st.integers(1, 4), num_chains=st.integers(1, 3), beta=st.floats(0.0, 1.0))
def test_chains_one_by_one_have_the_densities_of_chains_together(double, model, guided, num_data, num_chains, beta):
    pyro.clear_param_store()
    x = torch.randn(num_data, 2) / 3
    guide = AutoNormal(model, init_scale=0.3) if guided else None
    if guide is not None:
        guide(x)
    together, apart = both_potentials(model, guide, num_chains, x)
    for u in (together.draw(), apart.draw()):
        assert u.shape[:2] == (num_chains, together.block.layout.num_data)
        first, second = (potential.energy(u, torch.tensor(beta)) for potential in (together, apart))
        for name, one, other in zip(first._fields, first, second, strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-10), name
        values = apart.coordinates.values(u[:1])
        assert torch.equal(apart.coordinates.join(values), u[:1])
    draws = apart.draw()
    assert all(not torch.equal(draws[0], other) for other in draws[1:])  # no chain starts where another does


class Decoders:
    """z W^T + b, written so that it takes only (N, D); and `plain`, which keeps leading dimensions."""

    def __init__(self, linear_gaussian):
        self.weight, self.bias = linear_gaussian.weight, linear_gaussian.bias
        self.norm = nn.BatchNorm1d(linear_gaussian.latent_dim, affine=False, eps=0.0).eval()

    def plain(self, z):
        return z @ self.weight.T + self.bias

    def view(self, z):
        return self.plain(z.view(-1, self.weight.shape[1]))

    def batch_norm(self, z):
        return self.plain(self.norm(z))

    def fixed_dim(self, z):
        return torch.cat([z, torch.ones(len(z), 1)], dim=1) @ torch.cat([self.weight, self.bias.unsqueeze(-1)], 1).T


def pair_with(linear_gaussian, decoder):
    decode = getattr(Decoders(linear_gaussian), decoder)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([linear_gaussian.latent_dim]).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), linear_gaussian.scale).to_event(1), obs=x)

    return model


LOOPED = ["view", "batch_norm", "fixed_dim"]


@pytest.mark.parametrize("decoder", LOOPED)
def test_a_decoder_that_takes_no_plate_has_the_densities_of_one_that_does(linear_gaussian, decoder):
    x = linear_gaussian.data(4)
    pair = inspect(pair_with(linear_gaussian, decoder), linear_gaussian.mean_field_guide, (x,), {})
    assert pair.reason_to_loop(4)
    apart = block_potential(pair, 0, 4, 3, from_prior=False, vectorised=False)
    together, _ = both_potentials(linear_gaussian.model, linear_gaussian.mean_field_guide, 3, x)
    u, beta = together.draw(), torch.tensor(0.4)
    for one, other in zip(apart.energy(u, beta), together.energy(u, beta), strict=True):
        assert torch.allclose(one, other, rtol=1e-10)


@pytest.mark.parametrize("decoder", LOOPED)
@pytest.mark.parametrize("guided", [False, True])
def test_the_evidence_of_programs_that_take_no_plate(double, short_pilots, decoder, guided):
    """E[w] = p(x), from the prior and from a guide, in blocks; one warning."""
    linear_gaussian = LinearGaussian(2, 3, scale=1.5)
    x = linear_gaussian.data(100)
    guide = linear_gaussian.mean_field_guide if guided else None
    with pytest.warns(UserWarning, match=ONE_BY_ONE) as caught:
        result = pv.annealed_importance_sampling(
            pair_with(linear_gaussian, decoder), x, guide=guide, data_batch_size=60, compile=True, **SETTINGS
        )
    assert len(caught) == 1
    assert result.num_particles == 4
    ratio = (result.log_prob - linear_gaussian.log_prob(x)).exp()
    stderr = ratio.std().item() / math.sqrt(len(x))
    assert stderr < 0.06
    within(ratio.mean().item(), 1.0, stderr)


@pytest.mark.parametrize("decoder", LOOPED)
def test_both_bounds_of_programs_that_take_no_plate(double, short_pilots, decoder):
    """E[w] = p(x) forwards and E[1/w] = 1/p(x) backwards: the exact draws are put where the chains one by one have theirs."""
    linear_gaussian = LinearGaussian(2, 3, scale=1.5)
    with pytest.warns(UserWarning, match=ONE_BY_ONE):
        both = pv.bidirectional_monte_carlo(pair_with(linear_gaussian, decoder), torch.zeros(100, 3), **SETTINGS)
    truth = linear_gaussian.log_prob(both.data["x"])
    for log_ratio in (both.lower - truth, truth - both.upper):
        ratio = log_ratio.exp()
        stderr = ratio.std().item() / math.sqrt(len(truth))
        assert stderr < 0.06
        within(ratio.mean().item(), 1.0, stderr)


def test_the_warning_is_given_once_for_each_program_at_the_line_of_the_call(linear_gaussian, short_pilots):
    x, given = linear_gaussian.data(3), []
    for model in (pair_with(linear_gaussian, "view"), pair_with(linear_gaussian, "fixed_dim")):
        for _ in range(2):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pv.annealed_importance_sampling(model, x, **SETTINGS)
            given.append([warning.filename for warning in caught])
    assert given == [[__file__], [], [__file__], []]


def test_a_program_that_takes_a_plate_is_not_looped(linear_gaussian, short_pilots):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.annealed_importance_sampling(linear_gaussian.model, linear_gaussian.data(3), **SETTINGS)
