"""Shape checks for convolutional networks, and the sizes of their stages."""

import math
from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

__all__ = ["leading_shape", "stages"]

_MOST_COLOURS = 4  # channels of an image: grey (1) or RGB (3), plus transparency
_AXES = {1: ("series", "length,"), 2: ("images", "height, width"), 3: ("volumes", "depth, height, width")}


def stages(shape: Sequence[int], num_stages: int, spatial_dims: int = 2, has_parameters: bool = False) -> list:
    """List the number of channels, then the sizes of each stage, (height, width) for images, from full to smallest.

    Args:
        shape: Shape of the image, series or volume.
        num_stages: Number of halvings.
        spatial_dims: Axes that are halved.
        has_parameters: Whether the first axis counts the parameters of a likelihood and is not part of the datum.

    Raises:
        ValueError: The shape is another, there are no stages, or `spatial_dims` is not 1, 2 or 3.
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


def leading_shape(x: Tensor, width: int) -> torch.Size | None:
    """Return the dimensions of x before those of a datum of `width` numbers; None if no trailing dimensions fit.

    If the last dimension is `width`, it alone is the datum. Otherwise the datum takes as many trailing dimensions as
    fit, but never the first.
    """
    if x.shape[-1:] == (width,):
        return x.shape[:-1]
    return next((x.shape[:count] for count in range(1, x.ndim) if math.prod(x.shape[count:]) == width), None)
