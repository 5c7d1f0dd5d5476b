"""Pairs and data whose loss or gradient is not finite."""

import torch
from shared.runs import binary
from torch import nn

import pyrovae as pv
from pyrovae.training.steps import Steps


class Trap(nn.Module):
    """Features of images, spoilt for images whose first pixel is 7 once it was called often enough.

    spoil: features (N, 8), where (N, 1) -> features
    """

    def __init__(self, spoil, num_calls):
        super().__init__()
        self.net, self.weight = pv.nets.MLP(12, [8]), nn.Parameter(torch.ones(8))
        self.register_buffer("calls", torch.zeros(()))
        self.spoil, self.num_calls = spoil, num_calls

    def forward(self, x):
        self.calls += 1
        marked = (x.flatten(1)[:, :1] == 7.0) & (self.calls > self.num_calls)
        return self.spoil(self.net(x), marked, self.weight)


def nan_in_features(features, marked, weight):
    return torch.where(marked, torch.nan, features) * weight


def infinite_features(features, marked, weight):
    return torch.where(marked, torch.inf, features * weight)


def nan_in_gradient(features, marked, weight):
    """sqrt at 0: the value is 0, its gradient infinite, and infinite times 0 is NaN."""
    return features + (weight.square() * ~marked).sqrt()


def pair_with(spoil, num_calls):
    torch.manual_seed(0)
    likelihood = pv.likelihoods.Normal(pv.nets.MLP(2, [8], 12), (1, 4, 3))
    guide = pv.guides.MeanFieldNormal(Trap(spoil, num_calls), 2, num_features=8)
    return pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood), guide


def marked_data():
    x = binary(30)
    x[17, 0, 0, 0] = 7.0
    return x


OPTIONS = {"batch_size": 10, "learning_rate": 0.01, "progress": False}


def look_rarely(monkeypatch, look_every):
    """Read the guard after as many steps, and at the epoch's end, as on a GPU."""
    original = Steps.__init__

    def init(self, *arguments):
        original(self, *arguments)
        self.look_every = look_every

    monkeypatch.setattr(Steps, "__init__", init)
