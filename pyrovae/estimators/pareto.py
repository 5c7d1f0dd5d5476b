"""The tail of importance weights: where a generalised Pareto distribution can be fitted to it, and ArviZ to do so."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrovae.programs.modules import import_arviz

if TYPE_CHECKING:
    import numpy

__all__ = ["tail_shape"]

_TIED_AT_THE_TOP = _FEWEST_DISTINCT = 5


def tail_shape(log_weights: Tensor) -> Tensor:
    """Shape k of the tail, (S, N) -> (N,), float64; S of 25 or more, no -inf throughout.

    The tail are the min(S/5, 3 sqrt S) largest weights. What is no tail is decided here, as ArviZ's answers to it differ
    from version to version (an exception, inf, NaN, or a number that means nothing):

    0: five weights or more share the largest value. They are bounded there, and the bound has been seen
    +inf: fewer than 5 distinct values in the tail, or a quarter of it tied at its foot. Few values, the largest of them
        seen too rarely to tell whether there are larger ones
    """
    num_particles = len(log_weights)
    size = math.ceil(min(num_particles / 5, 3 * num_particles**0.5))
    top = log_weights.topk(size + 1, dim=0).values
    bounded = (log_weights == top[0]).sum(0) >= _TIED_AT_THE_TOP
    num_distinct = (top[:-1] > top[1:]).sum(0)
    foot_tied = top[size - 1] == top[size - 1 - max(1, int(size / 4 + 0.5) - 1)]
    fit = ~bounded & ~foot_tied & (num_distinct >= _FEWEST_DISTINCT)
    k = torch.where(bounded, 0.0, math.inf).to(log_weights)
    if fit.any():
        fitted = torch.as_tensor(_arviz_k(log_weights[:, fit].T.cpu().numpy()))
        k[fit] = fitted.nan_to_num(math.inf, posinf=math.inf).to(k)
    return k


def _arviz_k(log_weights: "numpy.ndarray") -> "numpy.ndarray":
    """Rows of (N, S) log weights -> (N,), on ArviZ 0.x and 1.x."""
    import numpy

    psislw, sign = _psislw()
    with warnings.catch_warnings(), numpy.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # overflow in rows without a tail; they come back as inf or NaN
        return psislw(sign * log_weights)[1]


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
