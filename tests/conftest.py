"""Shared fixtures: seeds, float64, and a linear-Gaussian model whose every quantity is known in closed form."""

import math
import os
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyrovae.annealing import chains
from pyrovae.compiled.record import Recording
from pyrovae.evaluation.recorded_draw import RecordedDraw

matplotlib.use("Agg")

# Threads of several processes wait for each other, and small tests gain nothing by them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(20261121)


@pytest.fixture(autouse=True)
def _empty_store():
    """Programs of the tests that use Pyro's store leave nothing for the next one to find."""
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture
def double():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.fixture
def mnist_root():
    """Folder with real MNIST images, or a skip that says where they were looked for."""
    root = os.environ.get("PYROVAE_DATA", "")
    if not root or not (Path(root) / "MNIST/raw/train-images-idx3-ubyte").exists():
        pytest.skip(f"needs MNIST: $PYROVAE_DATA={root!r} holds no MNIST/raw")
    return root


@pytest.fixture
def uncompiled(monkeypatch):
    """Recordings run as they were recorded: seconds faster than with Inductor, for what the recording itself decides."""
    monkeypatch.setattr(Recording, "compiler", staticmethod(lambda graph: graph))


@pytest.fixture
def chunks(monkeypatch):
    """Counts the chunks that were drawn by a recording."""
    drawn, original = [], RecordedDraw.given

    def given(self, *args):
        draw = original(self, *args)
        return lambda: (drawn.append(1), draw())[1]

    monkeypatch.setattr(RecordedDraw, "given", given)
    return drawn


@pytest.fixture
def short_pilots(monkeypatch):
    """Annealing hardly tuned: for what does not depend on how good its kernels are."""
    monkeypatch.setattr(chains, "_SETTLING", 2)
    monkeypatch.setattr(chains, "_num_pilot_temperatures", lambda num_temperatures: 5)


class LinearGaussian:
    """z ~ N(0, I_D), x | z ~ N(W z + b, s^2 I), as plain Pyro functions; log p(x) and p(z|x) in closed form."""

    def __init__(self, latent_dim=3, data_dim=5, scale=0.7):
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.randn(data_dim, latent_dim, generator=generator)
        self.bias = torch.randn(data_dim, generator=generator)
        self.scale = scale
        precision = torch.eye(latent_dim) + self.weight.T @ self.weight / scale**2
        self.covariance = torch.linalg.inv(precision)
        self.latent_dim, self.data_dim = latent_dim, data_dim

    def data(self, num_data):
        z = torch.randn(num_data, self.latent_dim)
        return z @ self.weight.T + self.bias + self.scale * torch.randn(num_data, self.data_dim)

    def posterior_mean(self, x):
        return (x - self.bias) @ self.weight / self.scale**2 @ self.covariance

    def log_prob(self, x):
        covariance = self.weight @ self.weight.T + self.scale**2 * torch.eye(self.data_dim)
        return dist.MultivariateNormal(self.bias, covariance).log_prob(x)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.latent_dim]).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T + self.bias, self.scale).to_event(1), obs=x)

    def guide(self, x, inflate=1.0):
        """N(m, inflate C); the exact posterior at inflate=1."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(self.posterior_mean(x), inflate * self.covariance))

    def mean_field_guide(self, x):
        """The best diagonal normal: the posterior mean, variances 1 / precision."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.posterior_mean(x), self.mean_field_scale()).to_event(1))

    def mean_field_scale(self):
        return torch.linalg.inv(self.covariance).diagonal().rsqrt()

    def mean_field_gap(self):
        """KL(mean-field || posterior), the same for every x."""
        precision = torch.linalg.inv(self.covariance)
        return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()


@pytest.fixture
def linear_gaussian(double):
    return LinearGaussian()


def within(estimate, truth, stderr, sigmas=4.5):
    """|estimate - truth| <= 4.5 standard errors: fails by chance once in 150,000 tries."""
    assert math.isfinite(estimate)
    assert math.isfinite(stderr)
    assert abs(estimate - truth) <= sigmas * stderr, f"{estimate} is not {truth} within {sigmas} x {stderr}"
