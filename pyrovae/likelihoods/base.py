"""The contract of a likelihood p(x|z)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Independent

from pyrovae.common.component import Component
from pyrovae.common.networks import broadcast_context, call_network, takes_context
from pyrovae.distributions.binary import BinaryImages

__all__ = ["FILL_IN", "Likelihood", "inverse_softplus"]

FILL_IN = "remove these data, fill in their values, or say which are missing: model(x, observed=~x.isnan())"


class Likelihood(Component, ABC):
    """Contract of a likelihood p(x|z): latents in, a distribution over data out.

    The network gets rows: all dimensions of z but the last are flattened for the network and restored after it.
    Therefore any network for batches works with any number of particles.

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, *parameters_shape), up to a reshape; or one that takes
            (rows, latent_dim) and a context (rows, ...), such as `pyrovae.nets.Concatenate`.
        data_shape: Shape of one datum, for example (1, 28, 28).

    Raises:
        ValueError: `data_shape` has no sizes or sizes below 1. When run: the network's output has the wrong size, or
            the data have the wrong shape or values.
    """

    def __init__(self, decoder_net: nn.Module, data_shape: Sequence[int]):
        super().__init__()
        shape = (int(data_shape),) if isinstance(data_shape, Integral) else tuple(int(size) for size in data_shape)
        if not shape or min(shape) < 1:
            raise ValueError(f"data_shape must hold sizes of 1 or more, for example (1, 28, 28); found {shape}")
        self.decoder_net = decoder_net
        self.data_shape = torch.Size(shape)

    @classmethod
    def num_parameters(cls) -> int:
        """How many numbers the network must return for each element of x; subclasses may take options for it.

        A decoder with output (num_parameters, *data_shape) fits.
        """
        return 1

    @property
    def parameters_shape(self) -> torch.Size:
        """Shape of the network's output for one datum."""
        return self.data_shape

    @abstractmethod
    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """Return p(x|z).

        Args:
            parameters: The network's output (..., *parameters_shape).
        """

    @abstractmethod
    def check(self, x: Tensor) -> None:
        """Check that the data are in the support.

        Args:
            x: Data (N, *data_shape).

        Raises:
            ValueError: A value is outside the support; the message says what was found.
        """

    @property
    def takes_context(self) -> bool:
        """Whether p(x|z) depends on a context: its network takes one, or the subclass uses it in `at`."""
        return type(self).at is not Likelihood.at or takes_context(self.decoder_net)

    def network_context(self, context: Tensor) -> Tensor | None:
        """Return what of a context the network sees; all of it by default.

        Args:
            context: (..., *context row shape).
        """
        return context

    def at(self, parameters: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        """Return p(x|z) given a context; by default that of the network's output alone.

        Args:
            parameters: The network's output (..., *parameters_shape).
            context: (..., *context row shape), or None.
        """
        return self.distribution(parameters)

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return p(x|z), or p(x|z,c).

        Args:
            z: Latents (..., latent_dim).
            context: c (N, ...), N the last dimension of z before latent_dim. A network that takes a second positional
                argument gets it as rows; one that does not is called without.

        Raises:
            ValueError: The network needs a context and gets none, or the context has another number of rows.
        """
        seen = None
        if context is not None:
            z, context = broadcast_context(z, context)
            seen = self.network_context(context)
            seen = None if seen is None else seen.reshape(-1, *seen.shape[z.ndim - 1 :])
        rows = z.reshape(-1, z.shape[-1])
        advice = "make the decoder for the prior's number of latents (latent_dim)"
        output = call_network(self.decoder_net, rows, advice, seen)
        size = math.prod(self.parameters_shape)
        if output.numel() != rows.shape[0] * size:
            raise ValueError(
                f"{type(self).__name__} needs {size} numbers per datum from its decoder network, to be shaped "
                f"{tuple(self.parameters_shape)}; found {tuple(output.shape)} for {rows.shape[0]} latents: set the width of the "
                f"network's output to {size}"
            )
        return self.at(output.reshape(*z.shape[:-1], *self.parameters_shape), context)

    def filled(self, x: Tensor, observed: Tensor) -> Tensor:
        """Return the data with some value of the support in place of what is missing: 0, unless a subclass says else.

        The value does not matter, because `masked` leaves it out.

        Args:
            x: Data (N, *data_shape); NaN if missing, or any other value.
            observed: What is known, bool (N, *data_shape).
        """
        return torch.where(observed, x, 0)

    def masked(self, distribution: dist.TorchDistribution, observed: Tensor) -> dist.TorchDistribution:
        """Return the distribution of what is known: its log density counts these elements alone.

        Args:
            distribution: p(x|z).
            observed: What is known, bool (N, *data_shape).

        Raises:
            ValueError: The elements are not independent given z, so that the rest has no density of its own here.
        """
        elements: Any = distribution
        while isinstance(elements, Independent | BinaryImages):
            elements = elements.base_dist
        if elements.event_shape or elements.batch_shape[-observed.ndim + 1 :] != self.data_shape:
            raise ValueError(
                f"observed= needs a likelihood whose elements are independent given z, and {type(self).__name__} gives "
                f"{type(elements).__name__} of event shape {tuple(elements.event_shape)}: use one that ends with "
                f".to_event({len(self.data_shape)}) over single elements, or override `masked`"
            )
        return elements.mask(observed).to_event(len(self.data_shape))

    def check_shape(self, x: Tensor) -> None:
        """Check that `x` is a floating-point batch of data, (N, *data_shape).

        Raises:
            ValueError: The shape is another, or N is 0.
            TypeError: The dtype is not floating point.
        """
        if x.ndim != 1 + len(self.data_shape) or x.shape[1:] != self.data_shape:
            raise ValueError(
                f"expected data of shape (N, {', '.join(map(str, self.data_shape))}), found {tuple(x.shape)}; add a leading "
                f"axis to one datum (x[None]), and reshape flat data by x.reshape(-1, {', '.join(map(str, self.data_shape))})"
            )
        if len(x) == 0:
            raise ValueError(f"expected one datum or more, found none: shape {tuple(x.shape)}")
        if not x.is_floating_point():
            remedy = (
                "x.float() / 255 for images of bytes, x.float() for other data"
                if x.dtype == torch.uint8
                else "x.float()"
            )
            raise TypeError(f"expected floating-point data, found {x.dtype}: {remedy}")

    def initial_mean(self, data_mean: Tensor | None, low: float = -math.inf, high: float = math.inf) -> Tensor | None:
        """Return `data_mean` in the default dtype on the CPU, or None if it is None.

        Args:
            data_mean: Mean of the training data, of shape `data_shape`, or one number for all of them.
            low: Smallest mean allowed.
            high: Largest mean allowed.

        Raises:
            ValueError: The shape is another, or a mean is outside [low, high].
        """
        if data_mean is None:
            return None
        data_mean = torch.as_tensor(data_mean)
        data_mean = data_mean.expand(self.data_shape) if data_mean.ndim == 0 else data_mean
        if data_mean.shape != self.data_shape or not ((data_mean >= low) & (data_mean <= high)).all():
            raise ValueError(
                f"data_mean must hold means in [{low:g}, {high:g}] of shape {tuple(self.data_shape)}, "
                f"found shape {tuple(data_mean.shape)} in [{data_mean.min():g}, {data_mean.max():g}]"
            )
        return data_mean.detach().to("cpu", torch.get_default_dtype())

    def initial_bias(self, data_mean: Tensor | None) -> nn.Parameter:
        """Return a bias per element that starts at the mean of the training data, or at 0 without one."""
        mean = self.initial_mean(data_mean)
        return nn.Parameter(torch.zeros(self.data_shape) if mean is None else mean)

    def extra_repr(self) -> str:
        return f"data_shape={tuple(self.data_shape)}, {super().extra_repr()}"


def inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))
