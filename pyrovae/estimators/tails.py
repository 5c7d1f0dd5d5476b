"""The tail of importance weights: its Pareto k by ArviZ, which says if estimates can be trusted, and bounds from it."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyrovae.common.reporting import import_arviz
from pyrovae.estimators.reducers import importance_weighted_bound
from pyrovae.estimators.weights import Weights

if TYPE_CHECKING:
    import numpy

__all__ = ["ParetoTail", "chi_square_bound", "pareto_k", "pareto_k_limit", "pareto_smoothed_bound", "pareto_tail"]

_TIED_AT_THE_TOP = _FEWEST_DISTINCT = 5

# If a tail is rounded to 1/40 of its range, k is less than 0.1 too low; at 1/10, up to half of all tails look discrete.
_FEWEST_SPACINGS = 32


class ParetoTail(NamedTuple):
    """`pareto_k` and `pareto_smoothed_bound` of the same weights.

    Attributes:
        k: Shape k, (N,).
        smoothed_bound: Pareto-smoothed bound, (N,), in nats per datum.
    """

    k: Tensor
    smoothed_bound: Tensor


def pareto_tail(log_weights: Tensor | Weights) -> ParetoTail:
    """Compute `pareto_k` and `pareto_smoothed_bound` from one fit, which takes most of the time of either.

    Args:
        log_weights: Log weights (S, N).

    Raises:
        ValueError: The array is not (S, N) with S >= 1.
    """
    return Weights.of(log_weights).once(_fit_tail)


def _fit_tail(weights: Weights) -> ParetoTail:
    k, bound = weights.unknown(), weights.bound
    if len(weights) < 25:
        return ParetoTail(k, bound)
    k[weights.constant] = 0.0
    # Skip data with NaN weights and data whose weights are all 0.
    fit = ~weights.constant & ~weights.log_sum.isnan() & (weights.log_sum > -math.inf)
    if fit.any():
        k[fit], smoothed = smooth_tail(weights.log[:, fit], weights.spacing[fit], weights.rounding[fit])
        bound[fit] = importance_weighted_bound(smoothed)
    return ParetoTail(k, bound)


def pareto_k(log_weights: Tensor | Weights) -> Tensor:
    """Shape k of the generalised Pareto distribution fitted to the largest weights: can the estimate be trusted?

    The weights have about 1/k finite moments. k < 0.5 means finite variance. For k > 0.7 the error falls so slowly with
    S that the estimate and its standard error mean little. The limit for S particles is `pareto_k_limit(S)`.

    Shapes: (S, N) -> (N,). Special values:

    - NaN with fewer than 25 particles, if all weights are 0 or one is NaN, or if the dtype is too coarse to tell the
      large weights apart (bfloat16 from |log w| of about 10 on: evaluate in float32);
    - 0 if the weights are constant up to rounding, or five or more are tied at the top;
    - +inf if no tail can be fitted (fewer than 5 distinct large weights, or a quarter of them tied at the lower end of
      the tail).

    Args:
        log_weights: Log weights (S, N).

    Raises:
        ValueError: The array is not (S, N) with S >= 1.

    Example:
        >>> pareto_k(torch.tensor([3.0, 2.0, 2.0] + 97 * [0.0])[:, None])
        tensor([inf], dtype=torch.float64)

    References:
        Vehtari et al., Pareto Smoothed Importance Sampling (2024); fitted by ArviZ.
    """
    return pareto_tail(log_weights).k


def pareto_smoothed_bound(log_weights: Tensor | Weights) -> Tensor:
    """Importance-weighted bound of Pareto-smoothed weights: less noisy for heavy tails, but no longer a bound.

        log( 1/S sum_s w'[s, n] )

    In w' the largest weights are replaced by quantiles of the Pareto fit, none above the largest weight. If the result
    differs from `importance_weighted_bound` by more than its standard error, trust neither.

    Shapes: (S, N) -> (N,), in nats per datum. It is the raw bound if no tail is fitted: with fewer than 25 particles,
    for constant weights, and if `pareto_k` is 0 or +inf for lack of a tail.

    Args:
        log_weights: Log weights (S, N).

    Raises:
        ValueError: The array is not (S, N) with S >= 1.

    References:
        Vehtari et al., Pareto Smoothed Importance Sampling (2024); fitted by ArviZ.
    """
    return pareto_tail(log_weights).smoothed_bound


def chi_square_bound(log_weights: Tensor | Weights, k: Tensor | None = None) -> Tensor:
    """Chi-square upper bound of log p(x) in the limit of large S; at finite S the estimate may be below log p(x).

        CUBO_2 = 1/2 log( 1/S sum_s w[s, n]^2 ),   1/2 log E[w^2] >= log E[w] = log p(x_n)

    Do not report it as a bound; for this reason results do not contain it. How often it is below log p(x) although k <
    0.5:

        weights, of mean 1                                     S = 25    100   1000   5000
        log-normal, s = 0.3                                       26%     9%     0%     0%
        log-normal, s = 1                                         18%     1%     0%     0%
        log-normal, s = 2                                         44%    11%     0%     0%
        log-normal, s = 0.3, and 5,000 once in 10,000 draws      100%   100%   100%    79%

    No diagnostic shows a large weight that is too rare to be among the S draws. Therefore no rule can tell when the
    bound holds.

    Shapes: (S, N) -> (N,), in nats per datum. NaN if the Pareto k is 0.5 or more, or unknown.

    Args:
        log_weights: Log weights (S, N).
        k: `pareto_k` of the weights, if already computed.

    Raises:
        ValueError: The array is not (S, N) with S >= 1.

    Example:
        >>> chi_square_bound(torch.zeros(30, 1))
        tensor([0.], dtype=torch.float64)

    References:
        Dieng, Tran, Ranganath, Paisley & Blei, Variational Inference via chi Upper Bound Minimization (2017).
    """
    weights = Weights.of(log_weights)
    k = pareto_k(weights) if k is None else k
    bound = ((2 * weights.log).logsumexp(0) - math.log(len(weights))) / 2
    return torch.where(k < 0.5, bound, math.nan)


def pareto_k_limit(num_particles: int) -> float:
    """Largest Pareto k at which S particles give a usable estimate.

        min(1 - 1/log10 S, 0.7)

    Args:
        num_particles: S.

    Raises:
        ValueError: `num_particles` is below 2.

    Example:
        >>> pareto_k_limit(100), pareto_k_limit(5000)
        (0.5, 0.7)

    References:
        Vehtari et al., Pareto Smoothed Importance Sampling (2024).
    """
    if num_particles < 2:
        raise ValueError(f"a Pareto k needs 2 particles or more, found num_particles={num_particles}")
    return min(1 - 1 / math.log10(num_particles), 0.7)


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
