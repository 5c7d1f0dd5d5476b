"""Priors p(z). A prior is an `nn.Module` whose `forward()` gives a distribution over z with event shape (D,).

A new prior is one class here: subclass `Prior`, give `latent_dim` to its constructor, return a distribution.
"""

from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from torch import nn

from pyrovae.modules import check_count

__all__ = ["Prior", "StandardNormal"]


class Prior(nn.Module, ABC):
    """Contract of a prior p(z): a module without inputs that gives a distribution.

    Shapes: batch shape (), event shape (latent_dim,).
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        check_count("latent_dim", latent_dim)
        self.latent_dim = latent_dim

    @abstractmethod
    def forward(self) -> dist.TorchDistribution:
        """p(z), on the device and in the dtype of the prior."""

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}"


class StandardNormal(Prior):
    """Standard normal prior.

    p(z) = N(z; 0, I)

    Shapes: event shape (latent_dim,); nothing is learned.

    Raises ValueError for latent_dim < 1.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014).

    >>> StandardNormal(2)().log_prob(torch.zeros(2))
    tensor(-1.8379)
    """

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.scale).to_event(1)
