"""Contract of a guide q(z|x): an `nn.Module` that runs as a Pyro guide and gives q(z|x) as a distribution.

A guide has two steps: `encode(x) -> parameters (N, P)` and `distribution(parameters) -> q`, and
`posterior(x) = distribution(encode(x))`. Evaluation encodes each datum once; refinement improves its parameters.

`encode`, `posterior` and the program itself also take a context, `guide(x, context)`, and the mask of what is known of
x, `guide(x, observed=mask)`. A network that takes a second positional argument gets the context; one that does not is
called without, because q(z|x) may leave it out. Networks see zeros in place of what is missing, and the mask as well if
they have an argument named `observed` (`pyrovae.nets.ConcatenateMask` joins it to the data).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count
from pyrovae.common.component import Component
from pyrovae.common.networks import check_context, encoding_of, features_of, given, width_of_features
from pyrovae.programs.parameters import emit_parameters

__all__ = ["EncoderGuide", "Guide", "check_guide", "start_informative"]


class Guide(Component, ABC):
    """Contract of a guide q(z|x): encode a datum into parameters, and turn parameters into a distribution.

    As a Pyro program, `guide(x)` has plate "data" (dim -1) and site "z" (event shape (D,)), or the sites that `latents`
    visits if a subclass defines others.

    Args:
        latent_dim: D.

    Raises:
        TypeError: If a subclass overrides `posterior`, from which its Pyro program would not draw.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "posterior" in vars(cls) and "forward" not in vars(cls):
            raise TypeError(
                f"{cls.__name__} overrides posterior, but draws from distribution(encode(x)): override `distribution` "
                f"or `encode` instead, or `forward` as well"
            )

    def __init__(self, latent_dim: int):
        super().__init__()
        latent_dim = check_count("latent_dim", latent_dim)
        self.latent_dim = latent_dim

    @property
    def encodes_once(self) -> bool:
        """Whether the guide draws from `distribution(encode(x))`: False if `forward` or `posterior` is overridden."""
        return type(self).forward is Guide.forward and type(self).posterior is Guide.posterior

    @abstractmethod
    def encode(self, x: Tensor, context: Tensor | None = None, *, observed: Tensor | None = None) -> Tensor:
        """Parameters (N, P) of q(z|x) for data x (N, *data_shape); each row depends on its own datum only.

        A subclass that uses neither context nor mask may leave both arguments out.

        Args:
            x: Data (N, *data_shape).
            context: What q is conditioned on beside x, (N, ...).
            observed: Mask of what is known of x, shaped like x; all of it by default.
        """

    @abstractmethod
    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """Return q for parameters (N, P): batch shape (N,), event shape (latent_dim,)."""

    def posterior(
        self, x: Tensor, context: Tensor | None = None, *, observed: Tensor | None = None
    ) -> dist.TorchDistribution:
        """Return q(z|x): batch shape (N,), event shape (latent_dim,); its `.mean` is the embedding."""
        more, options = given(context, observed)
        return self.distribution(encoding_of(self, (x, *more), options))

    def latents(self, parameters: Tensor, visit: Callable[[str, dist.TorchDistribution], Tensor]) -> Tensor:
        """Visit the latent sites in the order in which they are drawn.

        Args:
            parameters: What `encode` returned, (N, P).
            visit: Called as `visit(name, distribution)`; returns the value of the site.

        Returns:
            All values concatenated, z (..., N, D).

        Raises:
            ValueError: If `distribution` gives another batch shape than (N,) or event shape than (latent_dim,).
        """
        distribution = self.distribution(parameters)
        found, expected = (
            (distribution.batch_shape, distribution.event_shape),
            (parameters.shape[:-1], (self.latent_dim,)),
        )
        if found != expected:
            raise ValueError(
                f"{type(self).__name__}.distribution must give batch shape {tuple(expected[0])} and event shape "
                f"{expected[1]}, its latent_dim; found {tuple(found[0])} and {tuple(found[1])}: a diagonal normal ends "
                f"with .to_event(1)"
            )
        return visit("z", distribution)

    def forward(self, x: Tensor, context: Tensor | None = None, *, observed: Tensor | None = None) -> Tensor:
        """Run as a Pyro guide.

        Args:
            x: Data (N, *data_shape).
            context: What q is conditioned on beside x, (N, ...).
            observed: Mask of what is known of x, shaped like x, bool or 0 and 1; all of it by default.

        Returns:
            z (..., N, latent_dim).

        Raises:
            ValueError: If `encode` does not give parameters (N, P), or context or mask do not fit the data.
        """
        emit_parameters(self, "guide")
        if context is not None:
            check_context(context, x.shape[0])
        more, options = given(context, observed)
        parameters = encoding_of(self, (x, *more), options)
        if parameters.ndim != 2 or len(parameters) != len(x):
            raise ValueError(
                f"{type(self).__name__}.encode must give parameters (N, P) for N data, one row for each; found "
                f"{tuple(parameters.shape)} for {len(x)} data"
            )
        return self.given(parameters)()

    def given(self, parameters: Tensor) -> Callable[..., Tensor]:
        """Return this guide as a Pyro guide for data whose encoding (N, P) is known, so that they are encoded once.

        Args:
            parameters: What `encode` returned for the data.

        Returns:
            A Pyro guide that ignores its arguments and returns z (..., N, latent_dim).

        Raises:
            ValueError: If there are no data.
        """

        if len(parameters) == 0:
            raise ValueError("expected at least one datum, found none")

        def run(*_: Any, **__: Any) -> Tensor:
            with pyro.plate("data", len(parameters), dim=-1):
                return self.latents(parameters, pyro.sample)

        return run

    def in_model(self, name: str, value: Tensor) -> Tensor:
        """Return values (B, *event) of a latent site in the shape that the model's site has for B data; unchanged here.

        A guide whose sites have plates left of the data's moves these in front.
        """
        return value

    def outline(self) -> "Guide":
        """Return a guide that is quick to run and has the same sites, supports and dependences, for inspection."""
        return self

    def compiled(self, num_data: int) -> "Guide":
        """Return this guide for one evaluation; its `encode` may be recorded and compiled for batches of `num_data`.

        Use the result for one evaluation only: a recording freezes what Python sees, and that may change afterwards.
        """
        return self

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, {super().extra_repr()}"


class EncoderGuide(Guide):
    """Contract of a guide with an encoder network and a linear head.

        encode(x) = head(encoder_net(x)),   head(encoder_net(x, context)) if the network takes two arguments

    Args:
        encoder_net: Any module data (N, *data_shape) -> features (N, num_features), or data and context -> features
            (`pyrovae.nets.Concatenate` makes the second from a network of one input).
        latent_dim: D.
        num_features: Width of the features; by default the network's `out_features`.
        num_parameters: P, the number of parameters of a distribution.

    Raises:
        ValueError: If the width of the features is unknown or wrong.
    """

    def __init__(self, encoder_net: nn.Module, latent_dim: int, num_features: int | None, num_parameters: int):
        super().__init__(latent_dim)
        self.encoder_net = encoder_net
        self.num_features = width_of_features(encoder_net, num_features)
        self.head = nn.Linear(self.num_features, num_parameters)

    def encode(self, x: Tensor, context: Tensor | None = None, *, observed: Tensor | None = None) -> Tensor:
        return self.head(features_of(self.encoder_net, x, self.num_features, context, observed))


def start_informative(head: nn.Linear, latent_dim: int) -> None:
    """Start a head (mu, log sigma, ...) with spread-out means and scales near 1/e: see `guides.MeanFieldNormal`."""
    with torch.no_grad():
        head.weight[:latent_dim] *= 3
        head.bias[latent_dim : 2 * latent_dim] -= 1


def check_guide(guide: Any) -> None:
    """Raise TypeError unless `guide` is a `Guide`, with an `encode` and a `distribution`."""
    if not isinstance(guide, Guide):
        raise TypeError(
            f"guide must be a pyrovae.guides.Guide, whose encode and distribution are used; found "
            f"{type(guide).__name__}"
        )
