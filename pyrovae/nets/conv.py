"""Convolutional networks for images of any size: encoders that halve the image, decoders that double it.

Each stage of an encoder halves height and width (rounded up). A decoder reverses these steps and returns to the exact
size. Normalisation is `nn.GroupNorm`, which works within one datum. With BatchNorm, log p(x) of a datum would depend on
its batch, and particles would depend on each other.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count, run_network
from pyrovae.common.component import Component
from pyrovae.nets.shapes import stages

__all__ = ["ConvDecoder", "ConvEncoder", "ResidualDecoder", "ResidualEncoder"]

_CHANNELS_PER_GROUP = 8


class ConvEncoder(Component):
    """Convolutional encoder: 3x3 convolutions of stride 2, then one fully connected layer.

        h_0 = x,   h_l = activation(norm(conv_l(h_(l-1)))),   output = activation(norm(W flatten(h_L) + b))

    Shapes: (..., *data_shape) -> (..., out_features).

    Args:
        data_shape: (height, width) or (channels, height, width), of any size. In (frames, channels, height, width) with
            up to 4 channels, frames count as more channels. Volumes and (height, width, channels) are rejected.
        channels: Widths of the stages, each of which halves the image.
        out_features: Width of the features.
        activation: Makes an activation.
        normalize: Normalise groups of 8 channels within a datum.

    Raises:
        ValueError: The shape is not that of an image (a volume, channels last), or a width is below 1. When run: the
            data have another shape.

    Example:
        >>> ConvEncoder((28, 20))(torch.zeros(3, 28, 20)).shape
        torch.Size([3, 256])

    References:
        Radford, Metz & Chintala, Unsupervised Representation Learning with Deep Convolutional GANs (2016).
        Wu & He, Group Normalization (2018).
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        out_features: int = 256,
        *,
        activation: Callable[[], nn.Module] = nn.SiLU,
        normalize: bool = True,
    ):
        super().__init__()
        self.data_shape, self.out_features = torch.Size(data_shape), out_features
        self.layers = _encoder_layers(data_shape, channels, out_features, 0, activation, normalize)

    def forward(self, x: Tensor) -> Tensor:
        return _encode(self, x)


class ResidualEncoder(Component):
    """Residual encoder: a `ConvEncoder` with residual blocks after each halving.

        h <- conv_l(h), of stride 2;   h <- h + conv(activation(norm(conv(activation(norm(h)))))), num_blocks times

    Shapes: (..., *data_shape) -> (..., out_features).

    Args:
        data_shape: As for `ConvEncoder`.
        channels: As for `ConvEncoder`.
        out_features: As for `ConvEncoder`.
        num_blocks: Residual blocks per stage.
        activation: As for `ConvEncoder`.
        normalize: As for `ConvEncoder`.

    Raises:
        ValueError: The shape is not that of an image (a volume, channels last), or a width is below 1. When run: the
            data have another shape.

    Example:
        >>> ResidualEncoder((3, 32, 32), num_blocks=2)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 256])

    References:
        He, Zhang, Ren & Sun, Identity Mappings in Deep Residual Networks (2016).
        Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow (2016): in a variational
            autoencoder.
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        out_features: int = 256,
        *,
        num_blocks: int = 1,
        activation: Callable[[], nn.Module] = nn.SiLU,
        normalize: bool = True,
    ):
        super().__init__()
        num_blocks = check_count("num_blocks", num_blocks)
        self.data_shape, self.out_features = torch.Size(data_shape), out_features
        self.layers = _encoder_layers(data_shape, channels, out_features, num_blocks, activation, normalize)

    def forward(self, x: Tensor) -> Tensor:
        return _encode(self, x)


class ConvDecoder(Component):
    """Convolutional decoder: one fully connected layer, then 4x4 transposed convolutions of stride 2.

        h_0 = activation(norm(W z + b)),   h_l = activation(norm(conv_l(h_(l-1)))),   output = conv_L(h_(L-1))

    Each convolution doubles the image and cuts it to the size that the encoder has at that stage. Windows of 4x4 at a
    stride of 2 cover all pixels equally, which avoids checkerboard patterns.

    Shapes: (..., in_features) -> (..., *out_shape).

    Args:
        in_features: Width of z.
        out_shape: (height, width) or (channels, height, width), with further dimensions before these if needed:
            (2, channels, height, width) for a likelihood with two numbers per pixel (its `num_parameters`).
        channels: Widths of the stages, starting at the smallest image.
        activation: Makes an activation.
        normalize: Normalise groups of 8 channels within a datum.

    Raises:
        ValueError: The shape is not that of an image (a volume, channels last), or a width is below 1. When run: the
            latents have another width.

    Example:
        >>> ConvDecoder(40, (2, 1, 28, 20))(torch.zeros(3, 40)).shape
        torch.Size([3, 2, 1, 28, 20])

    References:
        Radford, Metz & Chintala, Unsupervised Representation Learning with Deep Convolutional GANs (2016).
        Odena, Dumoulin & Olah, Deconvolution and Checkerboard Artifacts (2016).
    """

    def __init__(
        self,
        in_features: int,
        out_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        *,
        activation: Callable[[], nn.Module] = nn.SiLU,
        normalize: bool = True,
    ):
        super().__init__()
        self.in_features, self.out_shape = in_features, torch.Size(out_shape)
        self.layers = _decoder_layers(in_features, out_shape, channels, 0, activation, normalize)

    def forward(self, z: Tensor) -> Tensor:
        return _decode(self, z)


class ResidualDecoder(Component):
    """Residual decoder: a `ConvDecoder` with residual blocks before each doubling.

        h <- h + conv(activation(norm(conv(activation(norm(h)))))), num_blocks times;   h <- conv_l(activation(norm(h)))

    Shapes: (..., in_features) -> (..., *out_shape).

    Args:
        in_features: As for `ConvDecoder`.
        out_shape: As for `ConvDecoder`.
        channels: As for `ConvDecoder`.
        num_blocks: Residual blocks per stage.
        activation: As for `ConvDecoder`.
        normalize: As for `ConvDecoder`.

    Raises:
        ValueError: The shape is not that of an image (a volume, channels last), or a width is below 1. When run: the
            latents have another width.

    Example:
        >>> ResidualDecoder(16, (8, 8), num_blocks=2)(torch.zeros(7, 3, 16)).shape
        torch.Size([7, 3, 8, 8])

    References:
        He, Zhang, Ren & Sun, Identity Mappings in Deep Residual Networks (2016).
        Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow (2016): in a variational
            autoencoder.
    """

    def __init__(
        self,
        in_features: int,
        out_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        *,
        num_blocks: int = 1,
        activation: Callable[[], nn.Module] = nn.SiLU,
        normalize: bool = True,
    ):
        super().__init__()
        num_blocks = check_count("num_blocks", num_blocks)
        self.in_features, self.out_shape = in_features, torch.Size(out_shape)
        self.layers = _decoder_layers(in_features, out_shape, channels, num_blocks, activation, normalize)

    def forward(self, z: Tensor) -> Tensor:
        return _decode(self, z)


class _ResidualBlock(nn.Module):
    """h + conv(activation(norm(conv(activation(norm(h))))))"""

    def __init__(self, channels: int, activation: Callable[[], nn.Module], normalize: bool):
        super().__init__()
        layers: list[nn.Module] = []
        for gain in (1.0, 0.1):  # the block starts near the identity, so that deep stacks train well
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            layers += [*_norm(channels, normalize), activation(), _initialized(conv, 9 * channels, gain)]
        self.layers = nn.Sequential(*layers)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.layers(h)


class _Double(nn.Module):
    """Transposed convolution that doubles the image and cuts it to `size`."""

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, int], gain: float):
        super().__init__()
        conv = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)
        self.conv = _initialized(conv, 4 * in_channels, gain)  # each output pixel is a sum over 2x2 inputs
        self.size = size

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h)[..., : self.size[0], : self.size[1]]


def _encoder_layers(
    data_shape: Sequence[int],
    channels: Sequence[int],
    out_features: int,
    num_blocks: int,
    activation: Callable[[], nn.Module],
    normalize: bool,
) -> nn.Sequential:
    channels = [check_count("channels", width) for width in channels]
    in_channels, *sizes = stages(data_shape, len(channels))
    out_features = check_count("out_features", out_features)
    layers: list[nn.Module] = []
    for num_channels in channels:
        conv = nn.Conv2d(in_channels, num_channels, 3, stride=2, padding=1)
        layers += [_initialized(conv, 9 * in_channels)]
        layers += [_ResidualBlock(num_channels, activation, normalize) for _ in range(num_blocks)]
        layers += [*_norm(num_channels, normalize), activation()]
        in_channels = num_channels
    width = in_channels * math.prod(sizes[-1])
    layers += [nn.Flatten(), _initialized(nn.Linear(width, out_features), width)]
    layers += [nn.LayerNorm(out_features)] if normalize else []
    return nn.Sequential(*layers, activation())


def _decoder_layers(
    in_features: int,
    out_shape: Sequence[int],
    channels: Sequence[int],
    num_blocks: int,
    activation: Callable[[], nn.Module],
    normalize: bool,
) -> nn.Sequential:
    in_features = check_count("in_features", in_features)
    channels = [check_count("channels", width) for width in channels]
    out_channels, *sizes = stages(out_shape, len(channels), has_parameters=len(out_shape) > 3 and out_shape[0] > 1)
    smallest = (channels[0], *sizes[-1])
    linear = _initialized(nn.Linear(in_features, math.prod(smallest)), in_features)
    layers: list[nn.Module] = [linear, nn.Unflatten(1, smallest)]
    for stage, (num_channels, size) in enumerate(zip(channels, reversed(sizes[:-1]), strict=True), start=1):
        is_last = stage == len(channels)
        layers += [_ResidualBlock(num_channels, activation, normalize) for _ in range(num_blocks)]
        layers += [*_norm(num_channels, normalize), activation()]
        # The output starts small, so that a likelihood starts at its bias.
        layers += [_Double(num_channels, out_channels if is_last else channels[stage], size, 0.3 if is_last else 1.0)]
    return nn.Sequential(*layers)


def _encode(net: ConvEncoder | ResidualEncoder, x: Tensor) -> Tensor:
    data_shape = net.data_shape
    leading = x.shape[: x.ndim - len(data_shape)]
    if x.shape != leading + data_shape:
        moved = x.ndim > 2 and torch.Size((x.shape[-1], *x.shape[-3:-1])) == data_shape
        raise ValueError(
            f"this encoder is for data (..., {', '.join(map(str, data_shape))}), found {tuple(x.shape)}"
            + (": move the channels, which come last, to the front: x.movedim(-1, -3)" if moved else "")
        )
    images = x.reshape(-1, math.prod(data_shape[:-2]), *data_shape[-2:])
    features = run_network(net.layers, images, "pass data of the shape it was made for", type(net).__name__)
    return features.reshape(*leading, features.shape[-1])


def _decode(net: ConvDecoder | ResidualDecoder, z: Tensor) -> Tensor:
    advice = f"make it for {z.shape[-1]} latents (in_features={net.in_features})"
    return run_network(net.layers, z.reshape(-1, z.shape[-1]), advice, type(net).__name__).reshape(
        *z.shape[:-1], *net.out_shape
    )


def _norm(channels: int, normalize: bool) -> list[nn.Module]:
    """A GroupNorm of about 8 channels per group, or nothing."""
    return [nn.GroupNorm(math.gcd(channels, max(1, channels // _CHANNELS_PER_GROUP)), channels)] if normalize else []


def _initialized(layer: Any, fan_in: int, gain: float = 1.0) -> nn.Module:
    """Draw weights of variance 2 gain^2 / fan-in, which keep the size of activations from layer to layer (He 2015)."""
    nn.init.normal_(layer.weight, std=gain * math.sqrt(2 / fan_in))
    nn.init.zeros_(layer.bias)
    return layer
