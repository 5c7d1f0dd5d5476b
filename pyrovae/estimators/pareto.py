"""The tail of importance weights: where a generalised Pareto distribution can be fitted to it, and ArviZ to do so."""

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

# k of a tail rounded to 1/40 of its span is less than 0.1 too low; rounded to 1/10, up to half of all tails look discrete.
_FEWEST_SPACINGS = 32


def smooth_tail(log_weights: Tensor, spacing: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Shape k of the tail (N,) and log weights (S, N) with the tail smoothed; S of 25 or more, no -inf throughout.

    The tail are the min(S/5, 3 sqrt S) largest weights. What is no tail is decided here, as ArviZ's answers to it differ
    from version to version (an exception, inf, NaN, or a number that means nothing), and is not smoothed:

    0: five weights or more share the largest value, to rounding. They are bounded there, and the bound has been seen
    NaN: the weights came in a dtype too coarse for their tail: it spans fewer than 32 of the dtype's numbers, so that ties
        may be rounding
    +inf: fewer than 5 distinct values in the tail, or a quarter of it tied at its foot. Few values, the largest of them
        seen too rarely to tell whether there are larger ones

    spacing, rounding: of `Weights`, (N,)
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
    # ArviZ shifts all weights of a row, 1.x always so that they add up to 1. Those below the tail it leaves alone otherwise.
    anchor = below[fit].unsqueeze(0)
    raw = log_weights[:, fit]
    smoothed = smoothed.T + (raw - smoothed.T).gather(0, anchor)
    known = k[fit].isfinite() & raw.gather(0, anchor).isfinite().squeeze(0) & smoothed.isnan().logical_not().all(0)
    result = log_weights.clone()
    result[:, fit] = torch.where(known, smoothed, raw)
    return k, result


def _arviz_psis(log_weights: "numpy.ndarray") -> tuple["numpy.ndarray", "numpy.ndarray"]:
    """Rows of (N, S) log weights -> smoothed (N, S), up to a number for each row, and k (N,); on ArviZ 0.x and 1.x."""
    import numpy

    psislw, sign = _psislw()
    with warnings.catch_warnings(), numpy.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # overflow in rows without a tail; they come back as inf or NaN
        return psislw(sign * log_weights)


@functools.cache
def _psislw() -> tuple[Callable, int]:
    """ArviZ's PSIS, and the sign it wants: 0.x takes log weights, 1.x their negatives (log likelihoods, for LOO).

    Asked of the function itself, by weights whose k is 1: the wrong sign gives a plausible and very wrong k.
    """
    try:
        from arviz_stats.base import array_stats as statistics
    except ImportError:
        statistics = import_arviz()
    tail = -torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64).log().numpy()
    return statistics.psislw, 1 if statistics.psislw(tail.copy())[1] > 0.5 else -1
