"""Scales of densities, and subsampled plates, whose scale is divided out."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from ways import Pair, normal_data, normal_evidence, normal_model, way, wide_guide

SCALES = "scales"


def _scaled(program, scale):
    def run(x):
        with poutine.scale(scale=scale):
            program(x)

    return run


@way(SCALES, "site 'z' carries a scale of 0.5")
def of_the_model():
    return Pair(_scaled(normal_model, 0.5), wide_guide, (normal_data(),))


@way(SCALES, "site 'z' carries a scale of 2")
def of_the_guide():
    return Pair(normal_model, _scaled(wide_guide, 2.0), (normal_data(),))


@way(SCALES, "site 'z' carries a scale of 3")
def of_both():
    return Pair(_scaled(normal_model, 3.0), _scaled(wide_guide, 3.0), (normal_data(),))


@way(SCALES, "site 'z' carries a scale of 0.1")
def of_the_kl_alone():
    """Annealing as Pyro's tutorials write it: the latent scaled in both, the observation whole."""

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Pair(model, _scaled(wide_guide, 0.1), (normal_data(),))


@way(SCALES, "site 'x' carries a scale of 2")
def of_an_observation_per_datum():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=torch.tensor([1.0, 2.0, 1.0])):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Pair(model, wide_guide, (normal_data(),))


@way(SCALES)
def of_one():
    return Pair(_scaled(normal_model, 1.0), wide_guide, (normal_data(),), normal_evidence(normal_data()))


@way(SCALES)
def of_a_subsample_that_is_given():
    x, chosen = torch.tensor([0.5, -1.0, 2.0, 0.3, 1.0]), torch.tensor([4, 0, 2])

    def model(x):
        with pyro.plate("data", len(x), subsample=chosen) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample=chosen) as index:
            pyro.sample("z", dist.Normal(x[index] / 2, 0.8))

    return Pair(model, guide, (x,), normal_evidence(x[chosen]))


@way(SCALES)
def of_a_plate_larger_than_the_batch():
    """A minibatch with the size of the whole data: plate(size=1000, subsample=x)."""

    def model(x):
        with pyro.plate("data", 1000, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 1000, subsample=x):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return Pair(model, guide, (normal_data(),), normal_evidence(normal_data()))


@way(SCALES)
def of_pyro_subsample():
    x = torch.full((6,), 0.7)

    def model(x):
        with pyro.plate("data", 6, subsample_size=4):
            batch = pyro.subsample(x, event_dim=0)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

    def guide(x):
        with pyro.plate("data", 6, subsample_size=4):
            pyro.sample("z", dist.Normal(pyro.subsample(x, event_dim=0) / 2, 0.8))

    return Pair(model, guide, (x,), normal_evidence(x[:4]))


@way(SCALES, "scale of 3")
def of_a_subsample_in_the_model_alone():
    """Global latents, and rows of a regression drawn at random: a third of the data stand for all of them."""
    x = torch.randn(6)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6, subsample_size=2) as index:
            pyro.sample("x", dist.Normal(mean.unsqueeze(-1), 1.0), obs=x[index])

    def guide(x):
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    return Pair(model, guide, (x,))


@way(SCALES)
def of_an_automatic_guide_in_a_subsample():
    x = torch.full((6,), 0.7)

    def model(x):
        with pyro.plate("data", 6, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = AutoNormal(model, init_scale=0.9, create_plates=lambda x: pyro.plate("data", 6, subsample_size=4))
    return Pair(model, guide, (x,), normal_evidence(x[:4]))
