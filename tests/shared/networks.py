"""Small networks and models."""

import pyro
import pyro.distributions as dist
import torch
from shared.parts import SHAPE
from torch import nn

import pyrovae as pv


def mlp(activation=nn.SiLU, **options):
    return pv.nets.MLP(2, [4], 12, activation=activation, **options)


def model_of(likelihood):
    return pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood)


def bernoulli(net):
    return model_of(pv.likelihoods.Bernoulli(net, SHAPE))


class Net(nn.Module):
    """A user's own network: each argument decides what it computes, and none the shape of a parameter."""

    def __init__(
        self, scale=1.0, activation=torch.tanh, shift=None, mode="sum", steps_done=0, num_data=10, device="cpu"
    ):
        super().__init__()
        self.linear = nn.Linear(2, 12)
        self.gain = 2 * scale
        self.activation = activation
        self.shift = torch.zeros(12) if shift is None else shift
        self.mode = mode
        self.steps_done = steps_done
        self.num_data = num_data
        self.device = device
        self.seen = []

    def forward(self, z):
        self.steps_done += 1
        self.seen.append(len(z))
        return self.gain * self.activation(self.linear(z)) + self.shift


def normal_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
