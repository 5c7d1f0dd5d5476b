"""The contract of a prior p(z)."""

from abc import ABC, abstractmethod

import pyro.distributions as dist

from pyrovae.common.arguments import check_count
from pyrovae.common.component import Component

__all__ = ["Prior"]


class Prior(Component, ABC):
    """Contract of a prior p(z): a module without inputs that returns a distribution.

    Shapes: batch shape (), event shape (latent_dim,).

    Args:
        latent_dim: Dimension of z.

    Raises:
        ValueError: `latent_dim` is below 1.
        TypeError: `latent_dim` is not a whole number.
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        latent_dim = check_count("latent_dim", latent_dim)
        self.latent_dim = latent_dim

    @abstractmethod
    def forward(self) -> dist.TorchDistribution:
        """Return p(z), on the device and in the dtype of the prior."""

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, {super().extra_repr()}"
