"""Objects of another file that hold modules in ways a program does not show: for `test_reruns`."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Network(nn.Module):
    """Dropout and batch statistics: what must be off, and stay as it is, in an evaluation."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, z):
        return self.layers(z.reshape(-1, 2)).reshape(*z.shape[:-1], 3)


class Plain:
    """No module: it holds one, and its methods are the programs."""

    def __init__(self, network):
        self.network = network

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.network(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2] / 2, 0.8).to_event(1))


class Slots:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


class Holder:
    def __init__(self, inner):
        self.inner = inner


class Module(nn.Module):
    """A module that holds another in a plain object, which torch does not know of."""

    def __init__(self, network):
        super().__init__()
        self.held = Holder(Plain(network))

    def forward(self, x):
        return self.held.inner.model(x)


registry: dict[str, Plain] = {}
current: Plain | None = None


def by_name(x):
    """Reached through a registry that the code names."""
    return registry["vae"].model(x)


def by_import(x):
    """Reached in a way that no search follows."""
    import importlib

    return vars(importlib.import_module(__name__))["current"].model(x)
