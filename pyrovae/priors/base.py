"""The contract of a prior p(z)."""

from abc import ABC, abstractmethod

import pyro.distributions as dist
from torch import Tensor, nn

from pyrovae.common.arguments import check_count
from pyrovae.common.component import Component
from pyrovae.common.networks import features_of, width_of_features

__all__ = ["ConditionalPrior", "Prior"]


class Prior(Component, ABC):
    """Contract of a prior p(z): a module without inputs that returns a distribution.

    A prior p(z|c) is one whose `forward` takes a context c (N, ...); its batch shape is (N,).

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


class ConditionalPrior(Prior):
    """Contract of a prior that is p(z) without a context network, and p(z|c) with one.

        p(z|c) = distribution(features),   features = context_net(c)

    Shapes: without a network, batch shape (), event shape (latent_dim,). With one, context (N, ...) -> batch shape
    (N,).

    Args:
        latent_dim: Dimension of z.
        context_net: Any module context (N, ...) -> features (N, num_features); `nn.Embedding` for labels.
        num_features: Width of the features; by default the network's `out_features`.

    Raises:
        ValueError: A size is below 1, or the width of the features is unknown or wrong.
        TypeError: A size is not a whole number.
    """

    def __init__(self, latent_dim: int, context_net: nn.Module | None = None, num_features: int | None = None):
        super().__init__(latent_dim)
        self.context_net = context_net
        self.num_features = 0 if context_net is None else width_of_features(context_net, num_features)

    @property
    def takes_context(self) -> bool:
        """Whether this prior has a context network."""
        return self.context_net is not None

    @abstractmethod
    def distribution(self, features: Tensor | None) -> dist.TorchDistribution:
        """Return p(z|c) for the features (N, num_features) of c, or p(z) for None."""

    def features(self, context: Tensor | None) -> Tensor | None:
        """Return what `distribution` takes: the features (N, num_features), or None without a context network.

        Raises:
            ValueError: A context is missing, or given to a prior without a context network.
        """
        if self.context_net is None:
            if context is not None:
                raise ValueError(
                    f"{type(self).__name__} has no context network and would leave the context out: pass context_net="
                )
            return None
        if context is None:
            raise ValueError(
                f"{type(self).__name__} is p(z|c) (it has a context_net), and no context was given: call "
                f"model(x, context), and pass context= to generate and the like"
            )
        return features_of(self.context_net, context, self.num_features)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return self.distribution(self.features(context))
