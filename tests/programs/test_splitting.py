"""What is fed in blocks and drawn together, and what is not: small couplings in float32, parameters made at the first call."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import LinearGaussian
from pyro.infer import autoguide
from torch import nn

import pyrovae as pv
from pyrovae.programs.reruns import equivalent, in_float64
from pyrovae.programs.splitting import inspect


@pytest.fixture(autouse=True)
def _clear():
    yield
    pyro.clear_param_store()


def evidence(x):
    return dist.Normal(0.0, math.sqrt(2)).log_prob(x)


def standard_guide(latent_dim):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), latent_dim), 1.0).to_event(1))

    return guide


# --- couplings that float32 would hide --------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [1e-2, 1e-4])
def test_data_that_influence_each_other_a_little_in_float32(amount):
    """|log w| of 4,000 nats: float32 has a rounding of 5e-4 there, and the coupling moves log w by 0.1 or less."""
    x = torch.randn(200, 1000)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            loc = z.sum(-1, keepdim=True) + amount * x.mean()
            pyro.sample("x", dist.Normal(loc.expand(*z.shape[:-1], 1000), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="cannot be fed its data in blocks"):
        pv.log_weights(model, standard_guide(3), x, num_particles=3, data_batch_size=50)


@pytest.mark.parametrize("amount", [1e-2, 1e-4])
def test_particles_that_influence_each_other_a_little_in_float32(amount):
    x = torch.randn(50, 1000)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            loc = z.sum(-1, keepdim=True) + (amount * z.mean() if z.ndim > 2 else 0.0)
            pyro.sample("x", dist.Normal(loc.expand(*z.shape[:-1], 1000), 1.0).to_event(1), obs=x)

    with pytest.warns(UserWarning, match="one by one"):
        pv.log_weights(model, standard_guide(3), x, num_particles=3)


class Wide(nn.Module):
    """Decoders of which float32 gives other digits at another batch size."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.deep = nn.Sequential(
            nn.Linear(3, 400), nn.LayerNorm(400), nn.SiLU(), nn.Linear(400, 400), nn.SiLU(), nn.Linear(400, 784)
        )
        self.register_buffer("shift", torch.randn(784))

    def forward(self, z):
        if self.kind == "bfloat16":
            with torch.autocast("cpu", torch.bfloat16):
                return self.deep(z).float()
        if self.kind == "in place":
            out = torch.zeros(*z.shape[:-1], 784)
            out[..., :392] = self.deep(z)[..., :392]
            out[..., 392:].add_(self.shift[392:])
            return out
        if self.kind == "float32 by hand":
            return self.deep(z.to(torch.float32)).to(torch.float32)
        if self.kind == "only float32":
            assert z.dtype == torch.float32, "a kernel of somebody's own"
        return self.deep(z)


@pytest.mark.parametrize("scale", [1.0, 0.03])
@pytest.mark.parametrize("kind", ["plain", "bfloat16", "in place", "float32 by hand", "only float32"])
def test_honest_float32_programs_are_cut_and_vectorised(kind, scale):
    decoder, captured = Wide(kind).eval(), torch.randn(784)
    x = torch.randn(45, 784)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z) + captured, scale).to_event(1), obs=x)

    pair = inspect(model, standard_guide(3), (x,), {})
    assert pair.split_size == 45
    assert pair.reason_to_loop(10) is None
    assert all(parameter.dtype == torch.float32 for parameter in decoder.parameters())


def test_how_sharply_two_ways_are_compared():
    weights = -1000 * torch.rand(3, 5)
    for change, same in ((0.0, True), (1e-6, True), (1e-3, False)):
        assert equivalent(lambda change=change: (weights + 0, weights + change)) is same
    assert not equivalent(lambda: (weights, weights[:2]))
    impossible = weights.clone()
    impossible[0, 0] = -torch.inf
    assert equivalent(lambda: (impossible, impossible.clone()))
    assert not equivalent(lambda: (impossible, weights))
    with in_float64():
        low = torch.randn(3, dtype=torch.float32)
        assert (low + 1).dtype == (low @ torch.ones(3)).dtype == torch.float64
        row = torch.zeros(4, 2)
        row[1].add_(1.0)
        assert row.sum() == 2, "a write into a view arrives"


# --- sizes that bind later, parameters made at the first call ---------------------------------------------------------


@pytest.mark.parametrize("num_data", [20, 100, 3000])
def test_a_subsample_size_that_binds_at_more_data_only(double, num_data):
    x = torch.arange(float(num_data)) / num_data

    def model(x):
        with pyro.plate("data", len(x), subsample_size=min(32, len(x))) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=min(32, len(x))) as index:
            pyro.sample("z", dist.Normal(x[index] / 2, math.sqrt(0.5)))

    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=10)
    assert len(lml) == min(32, num_data)
    assert torch.isclose(lml.log_prob.unsqueeze(1), evidence(x), atol=1e-10).any(1).all()
    assert lml.stderr.max() == 0


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Holder(nn.Module):
    """An automatic guide inside of another module."""

    def __init__(self):
        super().__init__()
        self.inner = autoguide.AutoNormal(local_model, init_scale=0.7)

    def forward(self, x):
        return self.inner(x)


def guide_list():
    guides = autoguide.AutoGuideList(local_model)
    guides.append(autoguide.AutoNormal(local_model, init_scale=0.7))
    return guides


LAZY = {
    "AutoNormal": lambda: autoguide.AutoNormal(local_model, init_scale=0.7),
    "AutoGuideList": guide_list,
    "inside": Holder,
}


@pytest.mark.parametrize("name", LAZY)
def test_automatic_guides_are_first_called_with_all_data(double, name):
    x, guide = torch.randn(100), LAZY[name]()
    lml = pv.log_marginal_likelihood(local_model, guide, x, num_particles=400)
    assert {tuple(parameter.shape) for parameter in guide.parameters()} == {(100,)}
    assert len(lml) == 100
    # Guides of scale 0.7 near the prior's centre: bounded weights.
    assert ((lml.log_prob - evidence(x)).abs() < 6 * lml.stderr + 0.3).all()
    again = pv.log_marginal_likelihood(local_model, guide, x, num_particles=400)
    assert len(again) == 100


@pytest.mark.parametrize("num_data", [100, 20])
def test_parameters_made_at_the_first_call_are_made_for_all_data(double, num_data):
    x = torch.randn(num_data)

    def guide(x):
        loc = pyro.param("loc", lambda: x.detach() / 2)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, math.sqrt(0.5)))

    lml = pv.log_marginal_likelihood(local_model, guide, x, num_particles=10)
    assert pyro.param("loc").shape == (num_data,)
    assert torch.allclose(lml.log_prob, evidence(x), atol=1e-10)


def test_parameters_that_were_there_stay(double):
    """And global ones that are made at the first call do not stand in the way of blocks."""
    x = torch.randn(100)
    shift = pyro.param("shift", torch.tensor(0.25))

    def guide(x):
        scale = pyro.param("scale", lambda: torch.tensor(math.sqrt(0.5)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + pyro.param("shift") - 0.25, scale))

    lml = pv.log_marginal_likelihood(local_model, guide, x, num_particles=10, data_batch_size=7)
    assert torch.allclose(lml.log_prob, evidence(x), atol=1e-10)
    assert pyro.param("shift") is shift or torch.equal(pyro.param("shift"), shift)


def test_captured_data_read_by_position(double):
    """A mask that is no argument: blocks would all read its first rows."""
    x = torch.randn(300)
    mask = torch.arange(300) < 150

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(mask[: len(x)]), obs=x)

    def guide(x):
        seen = mask[: len(x)]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(seen, x / 2, 0.0), torch.where(seen, math.sqrt(0.5), 1.0)))

    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=10)
    assert torch.allclose(lml.log_prob, torch.where(mask, evidence(x), 0.0), atol=1e-10)


# --- single rows ------------------------------------------------------------------------------------------------------


class Squeezing(nn.Module):
    """A decoder to one number that squeeze()s, which takes a single datum's dimension with it."""

    def forward(self, z):
        return z.squeeze()


def squeezing_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        pyro.sample("x", dist.Normal(Squeezing()(z), 1.0), obs=x)


def squeezing_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.unsqueeze(-1) / 2, math.sqrt(0.5)).to_event(1))


@pytest.mark.parametrize("num_data", [1, 2, 3, 13, 41, 50])
@pytest.mark.parametrize("data_batch_size", ["auto", 4, 2])
def test_a_single_row_left_over_is_no_block(double, num_data, data_batch_size):
    x = torch.randn(num_data)
    if num_data == 1 and data_batch_size != "auto":
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if num_data == 1 else "error")  # one datum is looped, and told so
        lml = pv.log_marginal_likelihood(
            squeezing_model,
            squeezing_guide,
            x,
            num_particles=11,
            particle_batch_size=5,
            data_batch_size=data_batch_size,
        )
    assert torch.allclose(lml.log_prob, evidence(x), atol=1e-10)


def test_blocks_cover_the_data():
    linear = LinearGaussian()
    for num_data in (1, 2, 3, 7, 8, 9, 33):
        pair = inspect(linear.model, linear.guide, (linear.data(num_data),), {})
        for size in (1, 2, 4, 8, 40):
            blocks = list(pair.blocks(size))
            assert [i for start, stop in blocks for i in range(start, stop)] == list(range(num_data))
            lengths = [stop - start for start, stop in blocks]
            assert max(lengths) <= size + 1
            assert size == 1 or num_data == 1 or min(lengths) > 1


def test_one_row_at_a_time_is_looked_at_in_one_row(double):
    """data_batch_size=1 of a program that squeeze()s: it says why not, or gives the right numbers one by one."""
    x = torch.randn(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lml = pv.log_marginal_likelihood(squeezing_model, squeezing_guide, x, num_particles=4, data_batch_size=1)
    assert torch.allclose(lml.log_prob, evidence(x), atol=1e-10)
