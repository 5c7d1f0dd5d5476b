"""The layers of convolutional encoders and decoders, for series, images and volumes, and the sizes of their stages."""

import math
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

from torch import Tensor, nn

from pyrovae.common.arguments import check_count

__all__ = ["decoder_layers", "encoder_layers", "stages"]

_MOST_COLOURS = 4  # channels of an image: grey (1) or RGB (3), plus transparency
_AXES = {1: ("series", "length,"), 2: ("images", "height, width"), 3: ("volumes", "depth, height, width")}
_CHANNELS_PER_GROUP = 8
_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class _ResidualBlock(nn.Module):
    """h + conv(activation(norm(conv(activation(norm(h))))))"""

    def __init__(self, channels: int, spatial_dims: int, activation: Callable[[], nn.Module], normalize: bool):
        super().__init__()
        layers: list[nn.Module] = []
        for gain in (1.0, 0.1):  # the block starts near the identity, so that deep stacks train well
            conv = _CONVOLUTIONS[spatial_dims](channels, channels, 3, padding=1)
            layers += [*_norm(channels, normalize), activation(), _initialized(conv, 3**spatial_dims * channels, gain)]
        self.layers = nn.Sequential(*layers)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.layers(h)


class _Double(nn.Module):
    """Transposed convolution that doubles the image and cuts it to `size`."""

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, ...], gain: float):
        super().__init__()
        conv = _TRANSPOSED[len(size)](in_channels, out_channels, 4, stride=2, padding=1)
        self.conv = _initialized(conv, 2 ** len(size) * in_channels, gain)  # an output is a sum over 2 inputs per axis
        self.size = size

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h)[(..., *(slice(size) for size in self.size))]


def stages(shape: Sequence[int], num_stages: int, spatial_dims: int = 2, has_parameters: bool = False) -> list:
    """List the number of channels, then the sizes of each stage, (height, width) for images, from full to smallest.

    Args:
        shape: Shape of the image, series or volume.
        num_stages: Number of halvings.
        spatial_dims: Axes that are halved.
        has_parameters: Whether the first axis counts the parameters of a likelihood and is not part of the datum.

    Raises:
        ValueError: The shape does not fit, there are no stages, or `spatial_dims` is not 1, 2 or 3.
    """
    if spatial_dims not in _AXES:
        raise ValueError(f"spatial_dims must be 1 (series), 2 (images) or 3 (volumes), found {spatial_dims!r}")
    kind, axes = _AXES[spatial_dims]
    takes = f"a convolutional network is for {kind}, ({axes}) or (channels, {axes.removesuffix(',')})"
    shape = [index(size) for size in shape]
    if len(shape) < spatial_dims or min(shape) < 1:
        raise ValueError(f"{takes}; found {tuple(shape)}: use an MLP for other data")
    datum = tuple(shape[1:]) if has_parameters else tuple(shape)
    if _is_channels_last(datum, spatial_dims):
        *sides, last = datum[-spatial_dims - 1 :]
        where = -spatial_dims - 1
        raise ValueError(
            f"{takes}; found {tuple(shape)}, which looks like channels last, {'x'.join(map(str, sides))} with {last}: move "
            f"the channels to the front, x.movedim(-1, {where}), and pass the shape {(*shape[:where], last, *sides)}"
        )
    if spatial_dims == 2 and len(datum) > 3 and datum[-3] > _MOST_COLOURS:
        raise ValueError(
            f"{takes}; found {tuple(shape)}, which looks like a volume, {'x'.join(map(str, datum[-3:]))}: pass "
            f"spatial_dims=3, or make each slice {datum[-2:]} a datum"
        )
    if not num_stages:
        raise ValueError("channels must hold the widths of one stage or more, found none")
    sizes = [tuple(shape[-spatial_dims:])]
    for _ in range(num_stages):
        sizes.append(tuple(-(-size // 2) for size in sizes[-1]))
    return [math.prod(shape[:-spatial_dims]), *sizes]


def _is_channels_last(shape: Sequence[int], spatial_dims: int) -> bool:
    """Whether the last axis of images or volumes must be channels: 1, 3 or 4 of them, after ordinary sides.

    Signals are also images of width 1 to 4 and are accepted: (6 sensors, 128 times, 3 directions), (64 electrodes, 1000
    times, 1), (16 channels, 8, 3). Their first two axes usually differ more than the sides of an image. Therefore the
    longer side of an image is assumed to be less than twice the shorter one.
    """
    if spatial_dims == 1 or len(shape) < spatial_dims + 1 or shape[-1] not in (1, 3, _MOST_COLOURS):
        return False
    shorter, *_, longer = sorted(shape[-spatial_dims - 1 : -1])
    return shorter > _MOST_COLOURS and longer < 2 * shorter


def encoder_layers(
    data_shape: Sequence[int],
    channels: Sequence[int],
    out_features: int,
    num_blocks: int,
    spatial_dims: int,
    activation: Callable[[], nn.Module],
    normalize: bool,
) -> nn.Sequential:
    """Layers of an encoder: (rows, channels, *sizes) -> (rows, out_features)."""
    channels = [check_count("channels", width) for width in channels]
    in_channels, *sizes = stages(data_shape, len(channels), spatial_dims)
    out_features = check_count("out_features", out_features)
    layers: list[nn.Module] = []
    for num_channels in channels:
        conv = _CONVOLUTIONS[spatial_dims](in_channels, num_channels, 3, stride=2, padding=1)
        layers += [_initialized(conv, 3**spatial_dims * in_channels)]
        layers += [_ResidualBlock(num_channels, spatial_dims, activation, normalize) for _ in range(num_blocks)]
        layers += [*_norm(num_channels, normalize), activation()]
        in_channels = num_channels
    width = in_channels * math.prod(sizes[-1])
    layers += [nn.Flatten(), _initialized(nn.Linear(width, out_features), width)]
    layers += [nn.LayerNorm(out_features)] if normalize else []
    return nn.Sequential(*layers, activation())


def decoder_layers(
    in_features: int,
    out_shape: Sequence[int],
    channels: Sequence[int],
    num_blocks: int,
    spatial_dims: int,
    activation: Callable[[], nn.Module],
    normalize: bool,
) -> nn.Sequential:
    """Layers of a decoder: (rows, in_features) -> (rows, channels, *sizes)."""
    in_features = check_count("in_features", in_features)
    channels = [check_count("channels", width) for width in channels]
    out_channels, *sizes = stages(
        out_shape, len(channels), spatial_dims, has_parameters=len(out_shape) > spatial_dims + 1 and out_shape[0] > 1
    )
    smallest = (channels[0], *sizes[-1])
    linear = _initialized(nn.Linear(in_features, math.prod(smallest)), in_features)
    layers: list[nn.Module] = [linear, nn.Unflatten(1, smallest)]
    for stage, (num_channels, size) in enumerate(zip(channels, reversed(sizes[:-1]), strict=True), start=1):
        is_last = stage == len(channels)
        layers += [_ResidualBlock(num_channels, spatial_dims, activation, normalize) for _ in range(num_blocks)]
        layers += [*_norm(num_channels, normalize), activation()]
        # The output starts small, so that a likelihood starts at its bias.
        layers += [_Double(num_channels, out_channels if is_last else channels[stage], size, 0.3 if is_last else 1.0)]
    return nn.Sequential(*layers)


def _norm(channels: int, normalize: bool) -> list[nn.Module]:
    """A GroupNorm of about 8 channels per group, or nothing."""
    return [nn.GroupNorm(math.gcd(channels, max(1, channels // _CHANNELS_PER_GROUP)), channels)] if normalize else []


def _initialized(layer: Any, fan_in: int, gain: float = 1.0) -> nn.Module:
    """Draw weights of variance 2 gain^2 / fan-in, which keep the size of activations from layer to layer (He 2015)."""
    nn.init.normal_(layer.weight, std=gain * math.sqrt(2 / fan_in))
    nn.init.zeros_(layer.bias)
    return layer
