"""Convolutional networks for images, series and volumes of any size: encoders that halve them, decoders that double.

Each stage of an encoder halves every axis (rounded up), height and width of an image. A decoder reverses these steps
and returns to the exact size. Normalisation is `nn.GroupNorm`, which works within one datum. With BatchNorm, log p(x) of
a datum would depend on its batch, and particles would depend on each other.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count, check_sizes, run_network
from pyrovae.common.component import Component
from pyrovae.nets.conv_layers import decoder_layers, encoder_layers

__all__ = ["ConvDecoder", "ConvEncoder", "ResidualDecoder", "ResidualEncoder"]


class ConvEncoder(Component):
    """Convolutional encoder: 3x3 convolutions of stride 2, then one fully connected layer.

        h_0 = x,   h_l = activation(norm(conv_l(h_(l-1)))),   output = activation(norm(W flatten(h_L) + b))

    Shapes: (..., *data_shape) -> (..., out_features).

    Args:
        data_shape: (height, width) or (channels, height, width), of any size. In (frames, channels, height, width) with
            up to 4 channels, frames count as more channels. (height, width, channels) is rejected, and so are volumes
            unless `spatial_dims` says so.
        channels: Widths of the stages, each of which halves the image.
        out_features: Width of the features.
        spatial_dims: Axes to convolve over: 1 for series (channels, length), 2 for images, 3 for volumes (channels,
            depth, height, width); without channels the shape is that of one channel.
        activation: Makes an activation.
        normalize: Normalise groups of 8 channels within a datum.

    Raises:
        ValueError: The shape is not that of an image (a volume, channels last), or a width is below 1. When run: the
            data have another shape.

    Example:
        >>> ConvEncoder((28, 20))(torch.zeros(3, 28, 20)).shape
        torch.Size([3, 256])
        >>> ConvEncoder((9, 128), spatial_dims=1)(torch.zeros(3, 9, 128)).shape
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
        spatial_dims: int = 2,
        activation: Callable[[], nn.Module] = nn.SiLU,
        normalize: bool = True,
    ):
        super().__init__()
        _check_sizes("data_shape", data_shape, channels)
        self.data_shape, self.out_features, self.spatial_dims = torch.Size(data_shape), out_features, spatial_dims
        self.layers = encoder_layers(data_shape, channels, out_features, 0, spatial_dims, activation, normalize)

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
        spatial_dims: As for `ConvEncoder`.
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
        spatial_dims: int = 2,
        activation: Callable[[], nn.Module] = nn.SiLU,
        normalize: bool = True,
    ):
        super().__init__()
        num_blocks = check_count("num_blocks", num_blocks)
        _check_sizes("data_shape", data_shape, channels)
        self.data_shape, self.out_features, self.spatial_dims = torch.Size(data_shape), out_features, spatial_dims
        self.layers = encoder_layers(
            data_shape, channels, out_features, num_blocks, spatial_dims, activation, normalize
        )

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
        spatial_dims: As for `ConvEncoder`.
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
        spatial_dims: int = 2,
        activation: Callable[[], nn.Module] = nn.SiLU,
        normalize: bool = True,
    ):
        super().__init__()
        _check_sizes("out_shape", out_shape, channels)
        self.in_features, self.out_shape = in_features, torch.Size(out_shape)
        self.layers = decoder_layers(in_features, out_shape, channels, 0, spatial_dims, activation, normalize)

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
        spatial_dims: As for `ConvEncoder`.
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
        spatial_dims: int = 2,
        activation: Callable[[], nn.Module] = nn.SiLU,
        normalize: bool = True,
    ):
        super().__init__()
        num_blocks = check_count("num_blocks", num_blocks)
        _check_sizes("out_shape", out_shape, channels)
        self.in_features, self.out_shape = in_features, torch.Size(out_shape)
        self.layers = decoder_layers(in_features, out_shape, channels, num_blocks, spatial_dims, activation, normalize)

    def forward(self, z: Tensor) -> Tensor:
        return _decode(self, z)


def _check_sizes(name: str, shape: Sequence[int], channels: Sequence[int]) -> None:
    check_sizes(name, shape, "(1, 28, 28)")
    check_sizes("channels", channels, "[32, 64]")


def _encode(net: ConvEncoder | ResidualEncoder, x: Tensor) -> Tensor:
    data_shape = net.data_shape
    leading = x.shape[: x.ndim - len(data_shape)]
    if x.shape != leading + data_shape:
        moved = x.ndim > 2 and torch.Size((x.shape[-1], *x.shape[-3:-1])) == data_shape
        raise ValueError(
            f"this encoder is for data (..., {', '.join(map(str, data_shape))}), found {tuple(x.shape)}"
            + (": move the channels, which come last, to the front: x.movedim(-1, -3)" if moved else "")
        )
    split = len(data_shape) - net.spatial_dims
    images = x.reshape(-1, math.prod(data_shape[:split]), *data_shape[split:])
    features = run_network(net.layers, images, "pass data of the shape it was made for", type(net).__name__)
    return features.reshape(*leading, features.shape[-1])


def _decode(net: ConvDecoder | ResidualDecoder, z: Tensor) -> Tensor:
    advice = f"make it for {z.shape[-1]} latents (in_features={net.in_features})"
    return run_network(net.layers, z.reshape(-1, z.shape[-1]), advice, type(net).__name__).reshape(
        *z.shape[:-1], *net.out_shape
    )
