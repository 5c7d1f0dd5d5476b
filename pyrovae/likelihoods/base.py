"""The contract of a likelihood p(x|z), which each of `pyrovae.likelihoods` keeps."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.common.arguments import run_network
from pyrovae.common.component import Component

__all__ = ["Likelihood"]


class Likelihood(Component, ABC):
    """Contract of a likelihood p(x|z): decoder parameters in, a distribution over data out.

    decoder_net: any module (rows, latent_dim) -> (rows, *parameters_shape), up to a reshape
    data_shape: shape of one datum, (1, 28, 28) for instance

    Networks are fed rows: whatever dimensions stand before the last one of z are flattened for the network and put back
    after it, so that any network for batches works under any number of particles.

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape.

    Raises ValueError if the network's output has the wrong size, or data the wrong shape or values.
    """

    def __init__(self, decoder_net: nn.Module, data_shape: Sequence[int]):
        super().__init__()
        shape = (int(data_shape),) if isinstance(data_shape, Integral) else tuple(int(size) for size in data_shape)
        if not shape or min(shape) < 1:
            raise ValueError(f"data_shape must hold sizes of 1 or more, (1, 28, 28) for instance; found {shape}")
        self.decoder_net = decoder_net
        self.data_shape = torch.Size(shape)

    @classmethod
    def num_parameters(cls) -> int:
        """How many numbers the network gives per pixel; where a likelihood has options that tell, it takes them.

        A decoder with output (num_parameters, *data_shape) fits.
        """
        return 1

    @property
    def parameters_shape(self) -> torch.Size:
        """Shape of what the network gives for one datum."""
        return self.data_shape

    @abstractmethod
    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """p(x|z) from the network's output (..., *parameters_shape)."""

    @abstractmethod
    def check(self, x: Tensor) -> None:
        """Raise ValueError if `x` (N, *data_shape) lies outside the support, saying what was found."""

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """p(x|z) for latents z (..., latent_dim)."""
        rows = z.reshape(-1, z.shape[-1])
        output = run_network(
            self.decoder_net, rows, "make the decoder for as many latents as the prior has (latent_dim)"
        )
        size = math.prod(self.parameters_shape)
        if output.numel() != len(rows) * size:
            raise ValueError(
                f"{type(self).__name__} needs {size} numbers per datum from its decoder network, to be shaped "
                f"{tuple(self.parameters_shape)}; found {tuple(output.shape)} for {len(rows)} latents: set the network's "
                f"output to {size}"
            )
        return self.distribution(output.reshape(*z.shape[:-1], *self.parameters_shape))

    def check_shape(self, x: Tensor) -> None:
        """Raise ValueError if `x` is not a batch of data, (N, *data_shape)."""
        if x.ndim != 1 + len(self.data_shape) or x.shape[1:] != self.data_shape:
            raise ValueError(
                f"expected data of shape (N, {', '.join(map(str, self.data_shape))}), found {tuple(x.shape)}; one datum "
                f"needs a leading axis (x[None]), and flat data x.reshape(-1, {', '.join(map(str, self.data_shape))})"
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
        """`data_mean` in the default dtype, on the CPU; ValueError unless it holds means of pixels within [low, high]."""
        if data_mean is None:
            return None
        if data_mean.shape != self.data_shape or not ((data_mean >= low) & (data_mean <= high)).all():
            raise ValueError(
                f"data_mean must hold means in [{low:g}, {high:g}] of shape {tuple(self.data_shape)}, "
                f"found shape {tuple(data_mean.shape)} in [{data_mean.min():g}, {data_mean.max():g}]"
            )
        return data_mean.detach().to("cpu", torch.get_default_dtype())

    def extra_repr(self) -> str:
        return f"data_shape={tuple(self.data_shape)}, {super().extra_repr()}"
