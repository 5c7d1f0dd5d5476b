"""Lengths of codes: bits per dimension of a datum, and rate and distortion of weighted chains at one temperature."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.common.arguments import check_count
from pyrovae.estimators.weights import Weights

__all__ = ["RateAndDistortion", "bits_per_dim", "rate_and_distortion"]


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


class RateAndDistortion(NamedTuple):
    """A point of the curve for each datum, (N,) each, in nats; standard errors are NaN with one chain."""

    rate: Tensor
    distortion: Tensor
    rate_stderr: Tensor
    distortion_stderr: Tensor


def rate_and_distortion(beta: float, log_weights: Tensor, log_likelihood: Tensor) -> RateAndDistortion:
    """Estimate rate and distortion of a code that is drawn from S annealed chains in proportion to their weights.

        D = sum_s v_s d_s,   R = -beta D - log 1/S sum_s w_s,   v_s = w_s / sum w,   d_s = -log p(x|z_s)

    See `pyrovae.rate_distortion` for why the expected R bounds the rate of that code from above. The standard errors
    are those of the delta method: sd over chains of each chain's contribution, / sqrt(S),

        to D: S v_s (d_s - D),   to R: 1 - S v_s - beta S v_s (d_s - D)

    Shapes: (S, N), (S, N) -> (N,) each.

    Args:
        beta: Temperature, from 0 to 1. At 0 the rate is 0, even if the distortion is infinite.
        log_weights: log w of the chains up to this temperature, (S, N).
        log_likelihood: log p(x|z_s) at their states, (S, N).

    Returns:
        Rate and distortion with their standard errors. Both are infinite for a datum whose weights are all 0.

    References:
        Huang, Makhzani, Cao & Grosse, Evaluating Lossy Compression Rates of Deep Generative Models (2020).
    """
    weights = Weights(log_weights)
    num_chains = len(weights)
    known = weights.bound > -torch.inf
    share = weights.log.softmax(0)
    distortions = -log_likelihood.double()
    distortion = torch.where(share > 0, share * distortions, 0.0).sum(0)
    distortion = torch.where(known, distortion, torch.inf)
    rate = -weights.bound - (beta * distortion if beta > 0 else 0.0)
    rate = torch.where(known, rate, torch.inf)
    if num_chains == 1:
        return RateAndDistortion(rate, distortion, weights.unknown(), weights.unknown())
    to_distortion = torch.where(share > 0, num_chains * share * (distortions - distortion), 0.0)
    to_rate = 1 - num_chains * share - (beta * to_distortion if beta > 0 else 0.0)
    errors = (to.std(0) / math.sqrt(num_chains) for to in (to_rate, to_distortion))
    return RateAndDistortion(rate, distortion, *errors)
