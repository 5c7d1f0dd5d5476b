"""What a guide q(z|x) is: an `nn.Module` that runs as a Pyro guide and gives q(z|x) as a distribution.

The seam: `encode(x) -> parameters (N, P)`, `distribution(parameters) -> q`, `posterior(x) = distribution(encode(x))`.
Evaluation encodes each datum once, and whatever improves q for one datum works on its parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyrovae.modules import check_count, emit_parameters

__all__ = ["EncoderGuide", "Guide"]


class Guide(nn.Module, ABC):
    """Contract of a guide q(z|x): what it makes of a datum, and which distribution that stands for.

    latent_dim: D

    As a Pyro program, `guide(x)` has plate "data" (dim -1) and site "z" (event shape (D,)).
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        check_count("latent_dim", latent_dim)
        self.latent_dim = latent_dim

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Parameters (N, P) of q(z|x) for data x (N, *data_shape), each row a function of its datum alone."""

    @abstractmethod
    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """q from its parameters (N, P): batch shape (N,), event shape (latent_dim,)."""

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z|x): batch shape (N,), event shape (latent_dim,); its `.mean` is the embedding."""
        return self.distribution(self.encode(x))

    def forward(self, x: Tensor) -> Tensor:
        """Run as a Pyro guide; returns z (..., N, latent_dim)."""
        emit_parameters(self, "guide")
        return _sample(self.posterior(x), len(x))

    def given(self, parameters: Tensor) -> Callable[..., Tensor]:
        """This guide as a Pyro guide for data whose encoding (N, P) is known, so that they are encoded once."""
        return lambda *_, **__: _sample(self.distribution(parameters), len(parameters))

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}"


class EncoderGuide(Guide):
    """Contract of a guide on the features of an encoder network, with a linear head of its own.

    encode(x) = head(encoder_net(x))

    encoder_net: any module data (N, *data_shape) -> features (N, num_features)
    latent_dim: D
    num_features: width of the features; by default the network's `out_features`
    num_parameters: P, how many numbers a distribution takes

    Raises ValueError if the width of the features is unknown or wrong.
    """

    def __init__(self, encoder_net: nn.Module, latent_dim: int, num_features: int | None, num_parameters: int):
        super().__init__(latent_dim)
        if num_features is None:
            num_features = getattr(encoder_net, "out_features", None)
        if num_features is None:
            raise ValueError(
                f"cannot tell how many features {type(encoder_net).__name__} gives: it has no `out_features`; "
                f"pass num_features="
            )
        check_count("num_features", num_features)
        self.encoder_net = encoder_net
        self.num_features = num_features
        self.head = nn.Linear(num_features, num_parameters)

    def encode(self, x: Tensor) -> Tensor:
        features = self.encoder_net(x)
        if features.shape != (len(x), self.num_features):
            raise ValueError(
                f"the encoder network must give features ({len(x)}, {self.num_features}), found {tuple(features.shape)}: "
                f"flatten its output, or set num_features="
            )
        return self.head(features)


def _sample(posterior: dist.TorchDistribution, num_data: int) -> Tensor:
    with pyro.plate("data", num_data, dim=-1):
        return pyro.sample("z", posterior)
