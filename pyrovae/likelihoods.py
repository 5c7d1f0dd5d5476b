"""Likelihoods p(x|z). A likelihood is an `nn.Module` whose `forward(z)` gives a normalised distribution over x.

A new likelihood is one class here: subclass `Likelihood`, say how many numbers the network must give per datum, turn
those numbers into a distribution. Networks are fed rows: whatever dimensions stand before the last one of z are
flattened for the network and put back after it, so that any network for batches works under any number of particles.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["Bernoulli", "Likelihood"]


class Likelihood(nn.Module, ABC):
    """Contract of a likelihood p(x|z): decoder parameters in, a distribution over data out.

    decoder_net: any module (rows, latent_dim) -> (rows, *parameters_shape), up to a reshape
    data_shape: shape of one datum, (1, 28, 28) for instance

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape.

    Raises ValueError if the network's output has the wrong size, or data the wrong shape or values.
    """

    def __init__(self, decoder_net: nn.Module, data_shape: Sequence[int]):
        super().__init__()
        data_shape = (data_shape,) if isinstance(data_shape, int) else tuple(data_shape)
        if not data_shape or min(data_shape) < 1:
            raise ValueError(f"data_shape must hold sizes of 1 or more, (1, 28, 28) for instance; found {data_shape}")
        self.decoder_net = decoder_net
        self.data_shape = torch.Size(data_shape)

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
        output = self.decoder_net(rows)
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
        if not x.is_floating_point():
            raise TypeError(f"expected floating-point data, found {x.dtype}: x.float()")

    def extra_repr(self) -> str:
        return f"data_shape={tuple(self.data_shape)}"


class Bernoulli(Likelihood):
    """Independent Bernoulli pixels, for binary data.

    p(x|z) = prod_d Bernoulli(x_d; sigmoid(l_d)),   l = decoder_net(z) + bias

    decoder_net: any module (rows, latent_dim) -> (rows, data_shape), the logits up to a learned bias per pixel
    data_mean: mean of the training data, whose logit the bias starts at (0.001 to 0.999); zeros without it. A network
        that starts near 0 then starts at the mean image instead of spending its first epochs on finding it.

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Densities in nats per datum.

    Raises ValueError for data other than 0 and 1, for wrong shapes, and for a mean outside [0, 1].

    Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014); the bias: Burda, Grosse & Salakhutdinov,
    Importance Weighted Autoencoders (2016).
    """

    def __init__(self, decoder_net: nn.Module, data_shape: Sequence[int], *, data_mean: Tensor | None = None):
        super().__init__(decoder_net, data_shape)
        self.bias = nn.Parameter(torch.zeros(self.data_shape))
        if data_mean is not None:
            if data_mean.shape != self.data_shape or not ((data_mean >= 0) & (data_mean <= 1)).all():
                raise ValueError(
                    f"data_mean must hold means in [0, 1] of shape {tuple(self.data_shape)}, "
                    f"found shape {tuple(data_mean.shape)} in [{data_mean.min():g}, {data_mean.max():g}]"
                )
            with torch.no_grad():
                self.bias.copy_(data_mean.clamp(1e-3, 1 - 1e-3).logit())

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=parameters + self.bias).to_event(len(self.data_shape))

    def check(self, x: Tensor) -> None:
        if not torch.equal(x * x, x):  # true of 0 and 1 only, and the fastest way to ask
            raise ValueError(
                f"Bernoulli pixels are 0 or 1, found {x[x * x != x][0].item():g}: binarise the data "
                f"(pyrovae.data.binarize; fit(..., transform=pyrovae.data.binarize) redraws at every use), or take a "
                f"likelihood for grey values"
            )
