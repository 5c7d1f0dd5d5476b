"""Chunking changes nothing: neither blocks of data, nor chunks of particles, nor their ragged ends; memory stays flat."""

import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from pyrovae.compiled import compiler
from pyrovae.evaluation import log_weights

NUM_DATA, NUM_PARTICLES = 10, 130


class Tape(dist.TorchDistribution):
    """N(0, 2) whose draws come from a table, by particle and datum: replayed latents under any chunking."""

    support = dist.constraints.real
    arg_constraints = {}
    has_rsample = False

    def __init__(self, table, columns, batch_shape=torch.Size()):
        self.table, self.columns = table, columns
        super().__init__(batch_shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Tape(self.table, self.columns, torch.Size(batch_shape))

    def sample(self, sample_shape=torch.Size()):
        num_particles = self.batch_shape[0] if len(self.batch_shape) > 1 else 1
        drawn = self.table.take(self.columns, num_particles)
        return drawn.reshape(self.batch_shape)

    def log_prob(self, value):
        return dist.Normal(0.0, 2.0).log_prob(value)


class Table:
    def __init__(self):
        self.values = torch.randn(NUM_PARTICLES, NUM_DATA) * 2
        self.used = [0] * NUM_DATA
        self.recording = False

    def take(self, columns, num_particles):
        if not self.recording:  # the looks at the program before the draws
            return torch.randn(num_particles, len(columns))
        start = self.used[int(columns[0])]
        for column in columns.long().tolist():
            self.used[column] = start + num_particles
        return self.values[start : start + num_particles, columns.long()]


@pytest.mark.parametrize("particle_batch_size", [1, 7, 64, NUM_PARTICLES, "auto"])
@pytest.mark.parametrize("data_batch_size", [1, 7, NUM_DATA, "auto", None])
def test_replayed_latents_give_the_same_bits(double, monkeypatch, particle_batch_size, data_batch_size):
    table = Table()
    x = torch.randn(NUM_DATA)
    columns = torch.arange(float(NUM_DATA))

    def model(x, columns):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, columns):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", Tape(table, columns))

    original = log_weights._draw_block

    def recording_block(*args):
        table.recording = True
        return original(*args)

    monkeypatch.setattr(log_weights, "_draw_block", recording_block)
    drawn = pv.log_weights(
        model,
        guide,
        x,
        columns,
        num_particles=NUM_PARTICLES,
        data_batch_size=data_batch_size,
        particle_batch_size=particle_batch_size,
    )
    z = table.values
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x) - dist.Normal(0.0, 2.0).log_prob(z)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("particle_batch_size", [1, 7, 64, 500])
def test_chunks_agree_in_distribution(linear_gaussian, particle_batch_size):
    x = linear_gaussian.data(9)

    def guide(x):
        linear_gaussian.guide(x, inflate=1.5)

    lml = pv.log_marginal_likelihood(
        linear_gaussian.model, guide, x, num_particles=500, data_batch_size=4, particle_batch_size=particle_batch_size
    )
    truth = linear_gaussian.log_prob(x)
    within(lml.mean, truth.mean().item(), lml.mean_mc_stderr + abs(lml.bias_estimate))


def test_data_that_influence_each_other_are_not_cut(double):
    x = torch.randn(50)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.mean(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + x.mean()) / 2, 0.5**0.5))

    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=30)
    assert torch.allclose(lml.log_prob, dist.Normal(x.mean(), 2**0.5).log_prob(x), atol=1e-10)
    with pytest.raises(ValueError, match="cannot be fed its data in blocks"):
        pv.log_marginal_likelihood(model, guide, x, num_particles=30, data_batch_size=10)


@pytest.mark.parametrize("data_batch_size", [1, 2])
def test_a_single_datum_needs_no_cutting(linear_gaussian, data_batch_size):
    """The last batch of a loader may be one datum; one run without a plate is still refused."""
    x = linear_gaussian.data(5)
    loader = DataLoader(TensorDataset(x), batch_size=4)
    lml = pv.log_marginal_likelihood(
        linear_gaussian.model, linear_gaussian.guide, loader, num_particles=5, data_batch_size=data_batch_size
    )
    assert torch.allclose(lml.log_prob, linear_gaussian.log_prob(x))

    def without_plate(x):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0).expand(x.shape).to_event(1), obs=x)

    with pytest.raises(ValueError, match="cannot be fed its data in blocks"):
        pv.log_marginal_likelihood(
            without_plate, lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), torch.randn(5), data_batch_size=2
        )


def test_a_plate_of_fixed_size_is_not_cut(double):
    x = torch.randn(50)

    def model(x):
        with pyro.plate("data", 50):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 50):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=30)
    assert torch.allclose(lml.log_prob, dist.Normal(0.0, 2**0.5).log_prob(x), atol=1e-10)


def test_eager_draws_use_the_products_of_recordings(monkeypatch):
    """On a processor for which oneDNN is chosen, whatever this one is; the switch is back afterwards."""
    monkeypatch.setattr(compiler, "_prefers_onednn", lambda: True)
    switch = torch.backends.mkldnn.matmul
    before, seen = switch.fp32_precision, []

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            seen.append(switch.fp32_precision)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0))

    pv.log_weights(model, guide, torch.randn(6), num_particles=40, particle_batch_size=10, compile=False)
    assert before not in ("bf16", *seen[-4:])
    assert switch.fp32_precision == before


MEMORY = """
import resource, sys, torch, pyrovae as pv
x = (torch.rand(3, 1, 28, 28) < 0.5).float()
model = pv.GenerativeModel(
    pv.priors.StandardNormal(10), pv.likelihoods.Bernoulli(pv.nets.MLP(10, [50], 784), (1, 28, 28))
)
guide = pv.guides.MeanFieldNormal(pv.nets.MLP(784, [50]), 10)
pv.log_marginal_likelihood(model, guide, x, num_particles=50)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pv.log_marginal_likelihood(model, guide, x, num_particles=int(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_memory_is_flat_in_the_particles(record_property):
    """Growth of the peak beyond model, data and libraries, in MB, for 3 images and 100 to 100,000 particles."""
    grown = {}
    for num_particles in (100, 10_000, 100_000):
        command = [sys.executable, "-c", MEMORY, str(num_particles)]
        grown[num_particles] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    record_property("peak_megabytes", grown)
    print(f"peak memory above model and data, MB by particles: {grown}")
    assert max(grown.values()) < 150, grown  # all activations at once would be 0.9 GB at 100,000
