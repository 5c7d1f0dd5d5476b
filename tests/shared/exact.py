"""Models with known evidence, and their potentials."""

import pyro
import pyro.distributions as dist
import torch

from pyrovae.annealing.potential import block_potential, prior_of
from pyrovae.programs.splitting import inspect


def potential_of(model, guide, num_chains, *args):
    pair = inspect(model, guide or prior_of(model), args, {})
    return block_potential(pair, 0, pair.num_data, num_chains, from_prior=guide is None)


def gamma_poisson(counts):
    with pyro.plate("data", len(counts)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        pyro.sample("counts", dist.Poisson(rate.unsqueeze(-1).expand(*rate.shape, 3)).to_event(1), obs=counts)


def two_sites(x):
    """b ~ N(0, 1), a | b ~ N(b, 0.5), x | a, b ~ N((a + b, a), 0.6): a linear-Gaussian model with two sites."""
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        a = pyro.sample("a", dist.Normal(b, 0.5))
        pyro.sample("x", dist.Normal(torch.stack([a + b, a], -1), 0.6).to_event(1), obs=x)
