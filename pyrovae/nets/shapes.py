"""Shape checks for convolutional networks, and the image sizes of their stages."""

import math
from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

__all__ = ["leading_shape", "stages"]

_MOST_COLOURS = 4  # channels of an image: grey (1) or RGB (3), plus transparency


def stages(shape: Sequence[int], num_stages: int, has_parameters: bool = False) -> list:
    """List the number of image channels, then the (height, width) of each stage, from full size to the smallest.

    Args:
        shape: Shape of the image.
        num_stages: Number of halvings.
        has_parameters: Whether the first axis counts the parameters of a likelihood and is not part of the datum.

    Raises:
        ValueError: The shape is not that of an image, or there are no stages.
    """
    shape = [index(size) for size in shape]
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"a convolutional network is for images, (height, width) or (channels, height, width); found {tuple(shape)}: "
            f"use an MLP for other data"
        )
    datum = tuple(shape[1:]) if has_parameters else tuple(shape)
    if _is_channels_last(datum):
        height, width, last = datum[-3:]
        raise ValueError(
            f"a convolutional network is for images, (channels, height, width); found {tuple(shape)}, which looks like "
            f"channels last, {height}x{width} with {last}: move the channels to the front, x.movedim(-1, -3), and pass "
            f"the shape {(*shape[:-3], last, height, width)}"
        )
    if len(datum) > 3 and datum[-3] > _MOST_COLOURS:
        raise ValueError(
            f"a convolutional network is for images, (height, width) or (channels, height, width); found {tuple(shape)}, "
            f"which looks like a volume, {'x'.join(map(str, datum[-3:]))}: use a network of nn.Conv3d layers or an MLP, or "
            f"make each slice {datum[-2:]} a datum"
        )
    if not num_stages:
        raise ValueError("channels must hold the widths of one stage or more, found none")
    sizes = [(shape[-2], shape[-1])]
    for _ in range(num_stages):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return [math.prod(shape[:-2]), *sizes]


def _is_channels_last(shape: Sequence[int]) -> bool:
    """Whether the last of three axes must be channels: 1, 3 or 4 of them, after the sides of an ordinary image.

    Signals are also images of width 1 to 4 and are accepted: (6 sensors, 128 times, 3 directions), (64 electrodes, 1000
    times, 1), (16 channels, 8, 3). Their first two axes usually differ more than the sides of an image. Therefore the
    longer side of an image is assumed to be less than twice the shorter one.
    """
    if len(shape) < 3 or shape[-1] not in (1, 3, _MOST_COLOURS):
        return False
    shorter, longer = sorted(shape[-3:-1])
    return shorter > _MOST_COLOURS and longer < 2 * shorter


def leading_shape(x: Tensor, width: int) -> torch.Size | None:
    """Return the dimensions of x before those of a datum of `width` numbers; None if no trailing dimensions fit.

    If the last dimension is `width`, it alone is the datum. Otherwise the datum takes as many trailing dimensions as
    fit, but never the first.
    """
    if x.shape[-1:] == (width,):
        return x.shape[:-1]
    return next((x.shape[:count] for count in range(1, x.ndim) if math.prod(x.shape[count:]) == width), None)
