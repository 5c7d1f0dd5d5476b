"""Batch axes that no plate declares."""

import pyro
import pyro.distributions as dist
import torch

from ways import Pair, normal_data, normal_evidence, normal_model, way, wide_guide

UNDECLARED = "batch axes that no plate declares"
# The words every refusal of this kind holds: a site, and what to do about it.
UNNAMED = r"site '[xzu]\d?'.*(plate|to_event)|inside plate\('data'\) at site x"


def wide_column(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, None] / 2, 0.8).to_event(1))


@way(UNDECLARED, UNNAMED)
def a_column_against_a_vector():
    """loc (N, 1), x (N,): N x N numbers."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Pair(model, wide_column, (torch.randn(6),))


@way(UNDECLARED, UNNAMED)
def a_column_without_to_event():
    """x (N, 1), z (N,)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.squeeze(-1) / 2, 0.8))

    return Pair(model, guide, (torch.randn(5, 1),))


def features(shape):
    """x (*shape) without to_event: as many features as data hide the fault."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8).to_event(1))

    return Pair(model, guide, (torch.randn(*shape),))


for _shape in ((4, 4), (5, 3), (2, 2)):
    way(UNDECLARED, UNNAMED, name=f"an observation {_shape} without to_event")(lambda shape=_shape: features(shape))


def latents(shape):
    """z (*shape) without to_event, in both programs."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(*shape), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return Pair(model, guide, (torch.randn(*shape),))


for _shape in ((4, 4), (3, 3)):
    way(UNDECLARED, UNNAMED, name=f"a latent {_shape} without to_event")(lambda shape=_shape: latents(shape))


@way(UNDECLARED, UNNAMED)
def rows_left_of_the_plate():
    """x (3, N) in a plate of N at dim -1: the rows are in no plate."""

    def model(x):
        with pyro.plate("data", x.shape[1]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[1]):
            pyro.sample("z", dist.Normal(x.mean(0) / 2, 0.8))

    return Pair(model, guide, (torch.randn(3, 5),))


@way(UNDECLARED, UNNAMED)
def an_axis_in_the_guide_alone():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, torch.ones(2, 1)))

    return Pair(normal_model, guide, (torch.randn(4),))


@way(UNDECLARED, UNNAMED)
def an_axis_left_of_two_plates():
    def model(x):
        with pyro.plate("data", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 2, dim=-1):
                pyro.sample("x", dist.Normal(z, torch.ones(4, 1, 1)), obs=x)

    def guide(x):
        with pyro.plate("data", 3, dim=-2):
            pyro.sample("z", dist.Normal(x.mean(1, keepdim=True) / 2, 0.8))

    return Pair(model, guide, (torch.randn(3, 2),))


@way(UNDECLARED, UNNAMED)
def a_factor_over_pairs():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("x", dist.Normal(z, 1.0).log_prob(x[:, None]))

    return Pair(model, wide_guide, (torch.randn(5),))


@way(UNDECLARED, UNNAMED)
def in_a_sequential_plate():
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(x[i].mean() / 2, 0.8))

    return Pair(model, guide, (torch.randn(3, 2),), options={"plate": "data"})


@way(UNDECLARED, UNNAMED)
def data_in_no_plate_with_a_guide_in_one():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Pair(model, wide_guide, (torch.randn(4),))


@way(UNDECLARED, UNNAMED)
def data_in_no_plate_of_either():
    """A vector of data as a batch that nobody declares; .to_event(1) would make it one datum."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.8))

    return Pair(model, guide, (torch.randn(4),))


@way(UNDECLARED, UNNAMED)
def looped_particles():
    """The same fault where particles are drawn one by one."""
    pair = features((4, 4))
    return pair._replace(options={"vectorize_particles": False, "num_particles": 10})


@way(UNDECLARED)
def axes_of_size_one_are_none():
    """x (N, 1) beside z (N, 1) with a plate at dim -2: nothing is summed that should not be."""
    x = normal_data().unsqueeze(-1)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return Pair(model, guide, (x,), normal_evidence(x))


@way(UNDECLARED)
def all_in_one_event():
    """A vector that is one datum, by to_event."""
    x = normal_data()

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return Pair(model, lambda x: pyro.sample("z", dist.Normal(x / 2, 0.8).to_event(1)), (x,), normal_evidence(x).sum())
