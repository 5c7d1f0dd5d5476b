"""Log weights by a recorded program: the eager program's numbers under the same noise, or the eager program."""

import functools
import math
import random

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import LinearGaussian
from pyro import poutine
from shared.parts import build, combinations, draw
from torch import nn

import pyrovae as pv
from pyrovae.annealing.potential import prior_of
from pyrovae.compiled.policy import pays_off
from pyrovae.compiled.record import Recording, record
from pyrovae.compiled.self_check import reversed_values


@pytest.fixture(autouse=True)
def _clear():
    yield
    pyro.clear_param_store()


def both_ways(model, guide, *args, **options):
    """Eager and recorded log weights, under the same noise."""
    options = {"num_particles": 20, "particle_batch_size": 4, **options}
    results = []
    for compile in (False, True):
        pyro.set_rng_seed(8)
        results.append(pv.log_weights(model, guide, *args, compile=compile, **options))
    return results


def standard_guide(latent_dim=2, scale=1.0):
    def guide(x, *args, **kwargs):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), latent_dim), scale).to_event(1))

    return guide


# --- programs ---------------------------------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """BatchNorm in the decoder, with statistics that are not those of any batch."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.norm.running_mean.copy_(torch.tensor([0.3, -1.0, 2.0]))
        self.norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.0]))

    def forward(self, x):
        pyro.module("batch_norm", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            loc = self.drop(self.norm(self.linear(z.reshape(-1, 2)))).reshape(*z.shape[:-1], 3)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def masked(x, mask):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with poutine.mask(mask=mask[:, 0]):
            pyro.sample(
                "x", dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3), 1.0).mask(mask).to_event(1), obs=x
            )


def several_plates(x):
    """Pixels in an inner plate, the data in the outer one."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), 1]))
        with pyro.plate("pixels", 3, dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def several_plates_guide(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(x.mean(1, keepdim=True), 0.8))


def outside(x):
    """z ~ U(0, 1) under a guide on the whole line: half of the weights are 0, and sqrt(z) is NaN there."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Uniform(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z.sqrt().sum(-1, keepdim=True).expand(*z.shape[:-1], 3), 1.0).to_event(1), obs=x)


def moving_support(x):
    """x ~ U(0, z): impossible for small z."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Exponential(torch.ones(2)).to_event(1))
        pyro.sample("x", dist.Uniform(0.0, z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3)).to_event(1), obs=x)


def positive_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.LogNormal(torch.zeros(len(x), 2), 1.0).to_event(1))


def discrete(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3), 1.0).to_event(1), obs=x)


def discrete_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Bernoulli(torch.full((len(x), 2), 0.4)).to_event(1))


def factors(x, *, offset):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.factor("x", -(x.sum(-1) - z.sum(-1) + offset).square())
        pyro.deterministic("double", 2 * z)


def closure():
    """A program without modules, of tensors it has captured."""
    weight = torch.randn(2, 3)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)

    return model


def auxiliary_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        u = pyro.sample("u", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(0.5 * u, log_density=torch.full((len(x),), 2 * math.log(2.0)), event_dim=1))


MASK = torch.rand(11, 3, generator=torch.Generator().manual_seed(2)) < 0.7

# name -> (model, guide, further arguments of x)
PROGRAMS = {
    "batch norm": (BatchNorm, standard_guide, (), {}),
    "masks": (lambda: masked, standard_guide, (MASK,), {}),
    "several plates": (lambda: several_plates, lambda: several_plates_guide, (), {}),
    "outside the support": (lambda: outside, lambda: standard_guide(scale=0.7), (), {}),
    "a support that moves": (lambda: moving_support, lambda: positive_guide, (), {}),
    "discrete": (lambda: discrete, lambda: discrete_guide, (), {}),
    "factors and keywords": (lambda: factors, standard_guide, (), {"offset": torch.tensor(0.3)}),
    "closure": (closure, standard_guide, (), {}),
    "auxiliary": (closure, lambda: auxiliary_guide, (), {}),
}


@pytest.mark.parametrize(
    "options", [{}, {"data_batch_size": 4}, {"num_particles": 18, "data_batch_size": None}], ids=str
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_recording_gives_the_eager_numbers(double, uncompiled, chunks, name, options):
    """Ragged blocks, ragged chunks, -inf where it belongs."""
    make_model, make_guide, args, kwargs = PROGRAMS[name]
    x = torch.rand(11, 3)
    eager, recorded = both_ways(make_model(), make_guide(), x, *args, **kwargs, **options)
    assert len(chunks) >= 3, "the recording was used"
    assert torch.allclose(recorded, eager, rtol=1e-10, atol=1e-10)
    assert (eager == -torch.inf).any() == (name in ("outside the support", "a support that moves"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_programs_give_the_eager_numbers(chunks, name):
    """The same through the compiler, in float32."""
    make_model, make_guide, args, kwargs = PROGRAMS[name]
    x = torch.rand(11, 3)
    eager, compiled = both_ways(make_model(), make_guide(), x, *args, **kwargs)
    assert len(chunks) >= 3
    assert torch.allclose(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-10), pytest.param(torch.float32, 2e-4, marks=pytest.mark.slow)]
)
def test_exact_evidence_compiled(chunks, dtype, error):
    """The exact posterior gives log p(x) with every particle, also through the compiler."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        linear = LinearGaussian()
        x = linear.data(30)
        options = {"num_particles": 40, "particle_batch_size": 10, "compile": True}
        lml = pv.log_marginal_likelihood(linear.model, linear.guide, x, **options)
    finally:
        torch.set_default_dtype(default)
    assert len(chunks) == 3
    truth = LinearGaussian()
    for name in ("weight", "bias"):
        setattr(truth, name, getattr(linear, name).double())
    covariance = truth.weight @ truth.weight.T + truth.scale**2 * torch.eye(5, dtype=torch.float64)
    exact = dist.MultivariateNormal(truth.bias, covariance).log_prob(x.double())
    assert torch.allclose(lml.log_prob, exact, atol=error, rtol=0)
    assert lml.stderr.max() < error


# --- what a recording must not freeze ---------------------------------------------------------------------------------


class Attribute:
    """A program that reads a number from an object, as a notebook's does."""

    def __init__(self):
        self.shift = 0.0

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + self.shift, 1.0), obs=x)

    def guide(self, x):
        mean = ((x - self.shift) / 3).unsqueeze(-1).expand(-1, 2)
        covariance = torch.eye(2) - torch.ones(2, 2) / 3
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(mean, covariance))


def test_attributes_are_read_at_every_call(double, uncompiled, chunks):
    program, x = Attribute(), torch.randn(6)
    for shift in (0.0, 2.5):
        program.shift = shift
        lml = pv.log_marginal_likelihood(
            program.model, program.guide, x, num_particles=12, particle_batch_size=4, compile=True
        )
        assert torch.allclose(lml.log_prob, dist.Normal(shift, math.sqrt(3)).log_prob(x), atol=1e-10)
    assert len(chunks) == 4


def test_parameters_are_read_at_every_call(double, uncompiled, chunks):
    model, guide, x = BatchNorm(), standard_guide(), torch.randn(6, 3)
    first, _ = both_ways(model, guide, x)
    with torch.no_grad():
        model.linear.bias.add_(1.0)
        model.norm.running_mean.add_(-1.0)
    eager, recorded = both_ways(model, guide, x)
    assert torch.allclose(recorded, eager)
    assert not torch.allclose(eager, first)
    assert len(chunks) == 8


def test_a_pyro_param_of_no_module(double, uncompiled, chunks, caplog):
    """Run eagerly, and right."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) + loc, 1.0).to_event(1), obs=x)

    x = torch.randn(6, 3)
    for value in (0.0, 1.5):
        with torch.no_grad():
            pyro.param("loc", torch.zeros(3)).fill_(value)
        eager, recorded = both_ways(model, standard_guide(), x)
        assert torch.equal(recorded, eager)
    assert not chunks
    assert "belongs to none of its modules" in caplog.text


def through_numpy(z):
    return torch.from_numpy(numpy.tanh(z.numpy()))


def listed(z):
    return torch.tensor(z.tolist()).tanh()


def of_python(z):
    return z + random.gauss(0, 1)


def branching(z):
    return z if z.sum() > 0 else -z


@pytest.mark.parametrize("step", [through_numpy, listed, of_python])
def test_what_a_recording_would_freeze_runs_eagerly(double, uncompiled, chunks, caplog, step):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(step(z).sum(-1), 1.0), obs=x)

    x = torch.randn(6)
    if step in (through_numpy, listed):
        eager, recorded = both_ways(model, standard_guide(), x)
        assert torch.equal(recorded, eager)
        assert "would be constants" in caplog.text
    else:  # particles drawn together are not those drawn apart, so it does not come to a recording
        with pytest.warns(UserWarning, match="one by one"):
            pv.log_weights(model, standard_guide(), x, num_particles=12, data_batch_size=None, compile=True)
    assert not chunks


@pytest.mark.parametrize("step", [through_numpy, of_python, branching])
def test_what_a_recording_would_freeze_is_not_recorded(double, uncompiled, caplog, step):
    assert record(lambda z: (step(z + torch.randn_like(z)),), [], [torch.randn(40)]) is None
    assert "runs eagerly" in caplog.text
    assert record(lambda z: (z + torch.randn_like(z),), [], [torch.randn(40)]) is not None


@pytest.mark.parametrize("step", [through_numpy, listed])
def test_what_it_would_freeze_of_the_data_is_seen_as_well(double, uncompiled, chunks, caplog, step):
    """Blocks after the first would have the first one's values; and a parameter that moves, the first step's."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + step(x), 1.0), obs=x)

    x = 2 * torch.randn(12)
    eager, recorded = both_ways(model, standard_guide(), x)
    assert torch.equal(recorded, eager)
    assert not chunks
    assert "would be constants" in caplog.text

    linear = nn.Linear(1, 1)
    assert record(lambda x: (x + step(linear.bias.detach()),), [linear], [x]) is None
    assert record(lambda x: (x + linear.bias.detach().tanh(),), [linear], [x]) is not None


def test_other_values_lie_in_memory_alike():
    whole = torch.arange(24.0).reshape(4, 6)
    for tensor in (
        whole,
        whole.T,
        whole[:, 1:3],
        whole[::2],
        torch.arange(5),
        torch.tensor(2.0),
        whole[0].expand(3, 6),
    ):
        other = reversed_values(tensor)
        assert (other.shape, other.stride(), other.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        assert torch.equal(other.flatten().sort()[0], tensor.flatten().sort()[0])
    assert torch.equal(reversed_values(whole), whole.flip(0, 1))
    assert reversed_values(torch.tensor([[0, 5], [1, 7]])).tolist() == [[1, 7], [0, 5]]  # each index in its column


def test_auto_is_for_programs_of_this_library_alone():
    model, guide = (
        pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 6), 6)),
        pv.guides.MeanFieldNormal(pv.nets.MLP(6, [4]), 2),
    )
    net = nn.Linear(2, 2)

    def function(x):
        return net(x)

    def has_known_parts(*programs):
        return pays_off(10**9, 10**9, repeated=programs)

    assert has_known_parts(model, guide)
    assert has_known_parts(model.forward, guide.forward, prior_of(model))
    assert not has_known_parts(function, prior_of(function))
    assert not has_known_parts(function, guide)
    assert not has_known_parts(functools.partial(model, scale=2), guide)


def test_nan_is_named_and_chance_is_not_thrown_away(double, uncompiled):
    """A chunk with NaN is drawn again eagerly, with the same noise, and refused by name."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            loc = torch.where(z > 3.0, torch.nan, z).sum(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'x' of the model is NaN"):
        pv.log_weights(
            model, standard_guide(), torch.randn(6), num_particles=4000, particle_batch_size=40, compile=True
        )


# --- guides with a forward or a posterior of their own ----------------------------------------------------------------


def sampled(posterior, num_data):
    with pyro.plate("data", num_data, dim=-1):
        return pyro.sample("z", posterior)


class OwnForward(pv.guides.MeanFieldNormal):
    def forward(self, x):
        loc = self.posterior(x).mean
        return sampled(dist.StudentT(5.0, loc, 1.5).to_event(1), len(x))


@pytest.mark.parametrize("compile", [False, True])
def test_a_guide_with_a_forward_of_its_own_is_run_as_it_is(double, uncompiled, chunks, compile):
    """The weights are those of Student's t, which the guide draws from, not of the normal it inherits."""
    torch.manual_seed(3)
    linear = LinearGaussian(latent_dim=2)
    guide, x = OwnForward(pv.nets.MLP(5, [8]), 2).double(), linear.data(5)
    lml = pv.log_marginal_likelihood(
        linear.model, guide, x, num_particles=40_000, particle_batch_size=10_000, compile=compile, data_batch_size=None
    )
    assert len(chunks) == (3 if compile else 0)
    truth = linear.log_prob(x)
    with torch.no_grad():
        loc = guide.distribution(guide.encode(x)).mean
        z = dist.StudentT(5.0, loc, 1.5).to_event(1).sample((40_000,))
        weights = (
            dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
            + dist.Normal(z @ linear.weight.T + linear.bias, linear.scale).log_prob(x).sum(-1)
            - dist.StudentT(5.0, loc, 1.5).log_prob(z).sum(-1)
        )
    for datum in range(5):
        assert abs(lml.log_prob[datum] - truth[datum]) < 5 * lml.stderr[datum]
        spread = weights[:, datum].std().item() / 200
        assert abs(lml.elbo[datum].item() - weights[:, datum].mean().item()) < 5 * math.sqrt(2) * spread


# --- every part of the library; how often it is recorded ---------------------------------------------------------------


@pytest.mark.parametrize(("prior", "guide", "likelihood", "decoder", "encoder"), list(combinations()))
def test_every_part_records_as_it_draws(double, uncompiled, chunks, prior, guide, likelihood, decoder, encoder):
    refines_within = (prior, guide) == ("VampPrior", "Refined")  # at the pseudo-inputs, by gradient steps: runs eagerly
    model, guide = (module.double() for module in build(prior, guide, likelihood, decoder, encoder))
    eager, recorded = both_ways(model, guide, draw(likelihood).double(), num_particles=6, particle_batch_size=2)
    assert len(chunks) == (0 if refines_within else 2)
    assert torch.allclose(recorded, eager, rtol=1e-10, atol=1e-10)


def test_a_hierarchy_records_as_it_draws(double, uncompiled, chunks):
    model, guide = (part.double() for part in pv.two_layer_vae((1, 4, 3), latent_dims=(3, 2), hidden_features=(8, 6)))
    eager, recorded = both_ways(model, guide, draw("Bernoulli").double())
    assert len(chunks) == 4
    assert torch.allclose(recorded, eager, rtol=1e-10, atol=1e-10)


def test_one_recording_for_all_blocks(double, uncompiled, chunks, monkeypatch):
    """Eight blocks of data, the last of them filled up, five chunks and a ragged sixth: recorded once."""
    recordings, original = [], Recording._record
    monkeypatch.setattr(Recording, "_record", lambda self, *args: recordings.append(1) or original(self, *args))
    x = torch.randn(31, 3)
    both_ways(BatchNorm(), standard_guide(), x, num_particles=22, particle_batch_size=4, data_batch_size=4)
    assert len(recordings) == 1
    assert len(chunks) == 8 * 4


def test_arguments_that_were_one_tensor_when_it_was_recorded(double, uncompiled):
    recorded = record(lambda x, y: (x - 2 * y,), [], [x := torch.randn(5), x])
    y = torch.randn(5)
    assert torch.equal(recorded(x, x)[0][0], -x)
    assert torch.equal(recorded(x, y)[0][0], x - 2 * y)
