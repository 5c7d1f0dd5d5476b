"""What a guide q(z|x) is: an `nn.Module` that runs as a Pyro guide and gives q(z|x) as a distribution.

The seam: `encode(x) -> parameters (N, P)`, `distribution(parameters) -> q`, `posterior(x) = distribution(encode(x))`.
Evaluation encodes each datum once, and whatever improves q for one datum works on its parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count, run_network
from pyrovae.common.component import Component
from pyrovae.programs.parameters import emit_parameters

__all__ = ["EncoderGuide", "Guide", "check_guide", "features_of", "start_informative", "width_of_features"]


class Guide(Component, ABC):
    """Contract of a guide q(z|x): what it makes of a datum, and which distribution that stands for.

    latent_dim: D

    As a Pyro program, `guide(x)` has plate "data" (dim -1) and site "z" (event shape (D,)), or the sites that `latents`
    visits, where a subclass has others.

    Raises TypeError for a subclass with a `posterior` of its own, which its Pyro program would not draw from.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "posterior" in vars(cls) and "forward" not in vars(cls):
            raise TypeError(
                f"{cls.__name__} overrides posterior, but draws from distribution(encode(x)): override `distribution` or "
                f"`encode` instead, or `forward` as well"
            )

    def __init__(self, latent_dim: int):
        super().__init__()
        latent_dim = check_count("latent_dim", latent_dim)
        self.latent_dim = latent_dim

    @property
    def encodes_once(self) -> bool:
        """Whether the guide draws from `distribution(encode(x))`: not if its class has a `forward` or `posterior` of its own."""
        return type(self).forward is Guide.forward and type(self).posterior is Guide.posterior

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Parameters (N, P) of q(z|x) for data x (N, *data_shape), each row a function of its datum alone."""

    @abstractmethod
    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """q from its parameters (N, P): batch shape (N,), event shape (latent_dim,)."""

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z|x): batch shape (N,), event shape (latent_dim,); its `.mean` is the embedding."""
        return self.distribution(self.encode(x))

    def latents(self, parameters: Tensor, visit: Callable[[str, dist.TorchDistribution], Tensor]) -> Tensor:
        """Go through the latent sites as they are drawn: `visit(name, distribution)` gives each its value.

        Returns all values side by side, z (..., N, D).
        """
        distribution = self.distribution(parameters)
        found, expected = (
            (distribution.batch_shape, distribution.event_shape),
            (parameters.shape[:-1], (self.latent_dim,)),
        )
        if found != expected:
            raise ValueError(
                f"{type(self).__name__}.distribution must give batch shape {tuple(expected[0])} and event shape "
                f"{expected[1]}, its latent_dim; found {tuple(found[0])} and {tuple(found[1])}: a diagonal normal ends with "
                f".to_event(1)"
            )
        return visit("z", distribution)

    def forward(self, x: Tensor) -> Tensor:
        """Run as a Pyro guide; returns z (..., N, latent_dim)."""
        emit_parameters(self, "guide")
        parameters = self.encode(x)
        if parameters.ndim != 2 or len(parameters) != len(x):
            raise ValueError(
                f"{type(self).__name__}.encode must give parameters (N, P) for N data, one row for each; found "
                f"{tuple(parameters.shape)} for {len(x)} data"
            )
        return self.given(parameters)()

    def given(self, parameters: Tensor) -> Callable[..., Tensor]:
        """This guide as a Pyro guide for data whose encoding (N, P) is known, so that they are encoded once."""

        if len(parameters) == 0:
            raise ValueError("expected one datum or more, found none")

        def run(*_: Any, **__: Any) -> Tensor:
            with pyro.plate("data", len(parameters), dim=-1):
                return self.latents(parameters, pyro.sample)

        return run

    def outline(self) -> "Guide":
        """A guide with the sites, supports and dependences of this one, quick to run, where only these are asked about."""
        return self

    def compiled(self, num_data: int) -> "Guide":
        """This guide for one evaluation, whose `encode` may record and compile what it does with so many data at once.

        For one: what Python sees is frozen in a recording, and may change between evaluations.
        """
        return self

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, {super().extra_repr()}"


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
        self.encoder_net = encoder_net
        self.num_features = width_of_features(encoder_net, num_features)
        self.head = nn.Linear(self.num_features, num_parameters)

    def encode(self, x: Tensor) -> Tensor:
        return self.head(features_of(self.encoder_net, x, self.num_features))


def width_of_features(net: nn.Module, num_features: int | None) -> int:
    """`num_features`, or the network's `out_features`; raises ValueError if neither is known."""
    if num_features is None:
        num_features = getattr(net, "out_features", None)
    if num_features is None:
        raise ValueError(
            f"cannot tell how many features {type(net).__name__} gives: it has no `out_features`; pass num_features="
        )
    num_features = check_count("num_features", num_features)
    return num_features


def features_of(net: nn.Module, x: Tensor, num_features: int) -> Tensor:
    """Features (N, num_features) of x (N, ...); raises ValueError if they have another shape."""
    features = run_network(
        net, x, "give it data as it was made for, in the dtype of its parameters, or make it for these"
    )
    if (
        features.ndim > 2 and features.shape[1:-1].numel() == 1
    ):  # a network that keeps dimensions keeps the 1 of data (N, 1, D)
        features = features.flatten(1)
    if features.shape != (len(x), num_features):
        raise ValueError(
            f"the network must give features ({len(x)}, {num_features}), found {tuple(features.shape)}: "
            f"flatten its output, or set num_features="
        )
    return features


def start_informative(head: nn.Linear, latent_dim: int) -> None:
    """Spread means and scales near 1/e, for a head whose first outputs are (mu, log sigma): see `guides.MeanFieldNormal`."""
    with torch.no_grad():
        head.weight[:latent_dim] *= 3
        head.bias[latent_dim : 2 * latent_dim] -= 1


def check_guide(guide: Any) -> None:
    """Raise TypeError unless `guide` is a `Guide`, for what works on encodings."""
    if not isinstance(guide, Guide):
        raise TypeError(
            f"guide must be a pyrovae.guides.Guide, whose encode and distribution are used; found {type(guide).__name__}"
        )
