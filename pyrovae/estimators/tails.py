"""The tail of importance weights: its Pareto k, which says if estimates can be trusted, and bounds from it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.estimators.pareto import smooth_tail
from pyrovae.estimators.reducers import importance_weighted_bound
from pyrovae.estimators.weights import Weights

__all__ = ["ParetoTail", "chi_square_bound", "pareto_k", "pareto_k_limit", "pareto_smoothed_bound", "pareto_tail"]


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
