"""Plates of every form."""

import pyro
import pyro.distributions as dist
import torch

from ways import Pair, given, normal_data, normal_evidence, normal_model, way

PLATES = "plates"


@way(PLATES)
def with_a_dimension():
    def plated(program, dim):
        def run(x):
            with pyro.plate("data", len(x), dim=dim):
                program(x)

        return run

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.8))

    return given(plated(model, -1), plated(guide, -1), normal_data())


@way(PLATES)
def without_a_size():
    """As two of Pyro's own examples write it."""

    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return given(model, guide, normal_data())


@way(PLATES)
def without_a_size_in_the_guide():
    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return given(normal_model, guide, normal_data())


X2 = ((0.5, -1.0, 2.0), (0.1, 0.3, -0.4))


def nested_model(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def nested_guide(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(x.sum(1, keepdim=True) / 4, 0.6))


def shared_evidence(x):
    return dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)


@way(PLATES)
def nested():
    x = torch.tensor(X2)
    return Pair(nested_model, nested_guide, (x,), shared_evidence(x))


@way(PLATES)
def nested_with_the_data_inside():
    """The datum plate is the inner one, at dim -1."""
    x = torch.tensor(X2).T

    def model(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", len(x), dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x.sum(0) / 4, 0.6))

    return Pair(model, guide, (x,), shared_evidence(x.T))


@way(PLATES)
def nested_with_latents_on_both_levels():
    """z_n ~ N(0, 1), u_nd ~ N(z_n, 1), x_nd ~ N(u_nd, 1): x_n ~ N(0, 2 I + 1)."""
    x = torch.tensor(X2)

    def model(x):
        with pyro.plate("data", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 3, dim=-1):
                u = pyro.sample("u", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(x.sum(1, keepdim=True) / 5, 0.7))
            with pyro.plate("pixels", 3, dim=-1):
                pyro.sample("u", dist.Normal((x + z) / 2, 0.8))

    exact = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1).log_prob(x)
    return Pair(model, guide, (x,), exact)


def grid_pair():
    x = torch.tensor(X2)

    def plates():
        return pyro.plate_stack("grid", (2, 3))

    def model(x):
        with plates():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with plates():
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return x, model, guide


@way(PLATES, "say which, plate='grid")
def a_stack_where_no_plate_is_named():
    x, model, guide = grid_pair()
    return Pair(model, guide, (x,))


way(PLATES, name="a stack with the rows named")(
    lambda: (lambda x, m, g: Pair(m, g, (x,), normal_evidence(x).sum(1), options={"plate": "grid_1"}))(*grid_pair())
)
way(PLATES, name="a stack with the columns named")(
    lambda: (lambda x, m, g: Pair(m, g, (x,), normal_evidence(x).sum(0), options={"plate": "grid_0"}))(*grid_pair())
)


def sequential_model(x):
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])


def sequential_guide(x):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z_{i}", dist.Normal(x[i] / 2, 0.8))


@way(PLATES)
def in_sequence():
    x = normal_data()
    return Pair(sequential_model, sequential_guide, (x,), normal_evidence(x), options={"plate": "data"})


@way(PLATES)
def in_sequence_as_one_datum():
    x = normal_data()
    return Pair(sequential_model, sequential_guide, (x,), normal_evidence(x).sum())


@way(PLATES, "the same name in both")
def of_two_names():
    def guide(x):
        with pyro.plate("batch", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return Pair(normal_model, guide, (normal_data(),))


@way(PLATES, "outside plate 'data'")
def that_leaves_a_latent_outside():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean.unsqueeze(-1), 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    return Pair(model, guide, (normal_data(),), options={"plate": "data"})
