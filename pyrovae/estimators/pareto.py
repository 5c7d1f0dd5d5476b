"""Pareto fits to the tail of importance weights: which tails can be fitted, and the fit by ArviZ."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrovae.common.reporting import import_arviz

if TYPE_CHECKING:
    import numpy

__all__ = ["smooth_tail"]

_TIED_AT_THE_TOP = _FEWEST_DISTINCT = 5

# If a tail is rounded to 1/40 of its range, k is less than 0.1 too low; at 1/10, up to half of all tails look discrete.
_FEWEST_SPACINGS = 32


def smooth_tail(log_weights: Tensor, spacing: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the tail of each datum's weights, and smooth it.

    The tail consists of the min(S/5, 3 sqrt S) largest weights. Weights without a usable tail are detected here and not
    smoothed, because ArviZ's answers for them vary with its version (an exception, inf, NaN, or a meaningless number).
    Their k is:

    - 0 if five weights or more share the largest value, up to rounding: the weights are bounded by a value that was
      drawn;
    - NaN if the dtype of the weights is too coarse: the tail spans fewer than 32 spacings, so that ties may be
      rounding;
    - +inf if the tail has fewer than 5 distinct values, or a quarter of it is tied at its lower end: there are few
      values, and the largest is too rare to tell whether larger ones exist.

    Args:
        log_weights: Log weights (S, N), S >= 25, not all -inf for any datum.
        spacing: (N,), as in `Weights`.
        rounding: (N,), as in `Weights`.

    Returns:
        Shape k of the tail (N,), and log weights (S, N) with the tail smoothed.
    """
    num_particles = len(log_weights)
    size = math.ceil(min(num_particles / 5, 3 * num_particles**0.5))
    top = log_weights.topk(size + 1, dim=0)
    values, below = top.values, top.indices[size]  # the largest weight below the tail
    tied = (values[0] - log_weights <= rounding).sum(0) >= _TIED_AT_THE_TOP
    bounded = tied & (spacing <= rounding)
    unresolved = ~bounded & (values[0] - values[size] < _FEWEST_SPACINGS * spacing)
    num_distinct = (values[:-1] > values[1:]).sum(0)
    foot_tied = values[size - 1] == values[size - 1 - max(1, int(size / 4 + 0.5) - 1)]
    fit = ~bounded & ~unresolved & ~foot_tied & (num_distinct >= _FEWEST_DISTINCT)
    k = torch.where(bounded, 0.0, math.inf).to(log_weights)
    k[unresolved] = math.nan
    if not fit.any():
        return k, log_weights
    smoothed, fitted = (
        torch.as_tensor(array).to(log_weights) for array in _arviz_psis(log_weights[:, fit].T.cpu().numpy())
    )
    k[fit] = fitted.nan_to_num(math.inf, posinf=math.inf)
    # ArviZ changes weights below the tail only by a shift of the whole row (1.x normalises each row): undo the shift.
    anchor = below[fit].unsqueeze(0)
    raw = log_weights[:, fit]
    smoothed = smoothed.T + (raw - smoothed.T).gather(0, anchor)
    known = k[fit].isfinite() & raw.gather(0, anchor).isfinite().squeeze(0) & smoothed.isnan().logical_not().all(0)
    result = log_weights.clone()
    result[:, fit] = torch.where(known, smoothed, raw)
    return k, result


def _arviz_psis(log_weights: "numpy.ndarray") -> tuple["numpy.ndarray", "numpy.ndarray"]:
    """Smooth rows of log weights (N, S) with ArviZ 0.x or 1.x; return them, up to a constant per row, and k (N,)."""
    import numpy

    psislw, sign = _psislw()
    with warnings.catch_warnings(), numpy.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # rows without a tail overflow and return inf or NaN
        return psislw(sign * log_weights)


@functools.cache
def _psislw() -> tuple[Callable, int]:
    """ArviZ's PSIS and the sign of its argument: 0.x takes log weights, 1.x log likelihoods (for LOO), their negatives.

    The sign is found by calling the function on weights whose k is 1, because the wrong sign gives a plausible but
    wrong k.
    """
    try:
        from arviz_stats.base import array_stats as statistics
    except ImportError:
        statistics = import_arviz()
    tail = -torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64).log().numpy()
    return statistics.psislw, 1 if statistics.psislw(tail.copy())[1] > 0.5 else -1
