"""Small pairs to train, runs that are killed, and states to compare."""

import torch

import pyrovae as pv
from pyrovae.training.steps import Steps


def make(seed=0, latent_dim=2):
    torch.manual_seed(seed)
    model = pv.GenerativeModel(
        pv.priors.StandardNormal(latent_dim), pv.likelihoods.Bernoulli(pv.nets.MLP(latent_dim, [8], 12), (1, 4, 3))
    )
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(12, [8]), latent_dim)
    return model, guide


def binary(num_data=40, seed=1):
    return torch.bernoulli(torch.full((num_data, 1, 4, 3), 0.3), generator=torch.Generator().manual_seed(seed))


def parameters(*modules):
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Killed(BaseException):
    pass


def killed_after(monkeypatch, num_epochs):
    """The run stops as if killed, once it has begun that many epochs and one more."""
    original = Steps.epoch

    def epoch(self, number, *arguments):
        if number > num_epochs:
            raise Killed
        return original(self, number, *arguments)

    monkeypatch.setattr(Steps, "epoch", epoch)
