"""The layers of convolutional encoders and decoders, for series, images and volumes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pyrovae.common.arguments import check_count
from pyrovae.nets.shapes import stages

__all__ = ["decoder_layers", "encoder_layers"]

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
