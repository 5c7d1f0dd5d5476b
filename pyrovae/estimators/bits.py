"""Nats per datum as bits per dimension."""

import math

import torch
from torch import Tensor

from pyrovae.common.arguments import check_count

__all__ = ["bits_per_dim"]


def bits_per_dim(log_prob: Tensor, num_dims: int, *, bin_width: float | Tensor = 1.0) -> Tensor:
    """Bits per dimension: the length of a code for a datum, by dimension; lower is better.

        bits = -(log p(x) + sum_d log w_d) / (D ln 2)

    A density has units, so that its bits depend on them; times the width w of a bin it is the mass of a bin. For masses
    (grey levels, counts) w is 1. For bytes that were dequantised to [0, 1], w = 1/256 gives bits per pixel of the bytes,
    an upper bound on average. For other rounded data w is the step of the rounding, in the units of x.

    Shapes: (...) -> (...).

    Args:
        log_prob: log p(x), or its estimate or bound, in nats per datum, or a mean of these over data.
        num_dims: D, numbers in a datum: `model.likelihood.data_shape.numel()`.
        bin_width: w, for all dimensions or for each, (num_dims,).

    Raises:
        TypeError: `num_dims` is no whole number.
        ValueError: `num_dims` is below 1, or a bin width is not positive or not one per dimension.

    Example:
        >>> bits_per_dim(torch.tensor(0.0), 784, bin_width=1 / 256)  # a uniform density on [0, 1]^784
        tensor(8., dtype=torch.float64)

    References:
        Theis, van den Oord & Bethge, A note on the evaluation of generative models (2016).
    """
    num_dims = check_count("num_dims", num_dims)
    widths = torch.as_tensor(bin_width, dtype=torch.float64)
    if widths.numel() not in (1, num_dims) or not ((widths > 0) & widths.isfinite()).all():
        raise ValueError(
            f"bin_width must be positive, one number or one for each of {num_dims} dimensions, found shape "
            f"{tuple(widths.shape)} from {widths.min():g} to {widths.max():g}"
        )
    log_volume = widths.log().flatten().expand(num_dims).sum().to(log_prob.device)
    return -(log_prob.double() + log_volume) / (num_dims * math.log(2))
