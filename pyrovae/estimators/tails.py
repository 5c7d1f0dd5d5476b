"""The tail of importance weights, (S, N) -> (N,): whether estimates can be trusted, and what else it gives."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.estimators.pareto import smooth_tail
from pyrovae.estimators.reducers import importance_weighted_bound
from pyrovae.estimators.weights import Weights

__all__ = ["ParetoTail", "chi_square_bound", "pareto_k", "pareto_k_limit", "pareto_smoothed_bound", "pareto_tail"]


class ParetoTail(NamedTuple):
    """`pareto_k` and `pareto_smoothed_bound` of the same weights, each (N,)."""

    k: Tensor
    smoothed_bound: Tensor


def pareto_tail(log_weights: Tensor | Weights) -> ParetoTail:
    """`pareto_k` and `pareto_smoothed_bound` from one fit, which is most of the work of either."""
    weights = Weights.of(log_weights)
    k, bound = weights.unknown(), weights.bound
    if len(weights) < 25:
        return ParetoTail(k, bound)
    k[weights.constant] = 0.0
    # Neither NaN among them nor nothing but -inf.
    fit = ~weights.constant & ~weights.log_sum.isnan() & (weights.log_sum > -math.inf)
    if fit.any():
        k[fit], smoothed = smooth_tail(weights.log[:, fit], weights.spacing[fit], weights.rounding[fit])
        bound[fit] = importance_weighted_bound(smoothed)
    return ParetoTail(k, bound)


def pareto_k(log_weights: Tensor | Weights) -> Tensor:
    """Shape k of the generalised Pareto distribution fitted to the largest weights: can the estimate be trusted?

    The weights have about 1/k finite moments: k < 0.5 finite variance, k > 0.7 an error that falls so slowly that the
    estimate and its standard error mean little. The limit at S particles is `pareto_k_limit(S)`.

    Shapes: (S, N) -> (N,). NaN with fewer than 25 particles, if all weights are 0 or one is NaN, and if the array's dtype is
    too coarse to tell the large weights apart (bfloat16 from |log w| of about 10 on: evaluate in float32); 0 if the weights
    are constant to rounding or five and more are tied at the top; +inf if no tail can be fitted (fewer than 5 distinct
    large weights, or a quarter of them tied at the foot of the tail).

    Source: Vehtari et al., Pareto Smoothed Importance Sampling (2024); fitted by ArviZ.

    >>> pareto_k(torch.tensor([3.0, 2.0, 2.0] + 97 * [0.0])[:, None])
    tensor([inf], dtype=torch.float64)
    """
    return pareto_tail(log_weights).k


def pareto_smoothed_bound(log_weights: Tensor | Weights) -> Tensor:
    """Importance-weighted bound of Pareto-smoothed weights: less noise where the tail is heavy, and no longer a bound.

    log( 1/S sum_s w'[s, n] ),   w' the weights with the largest replaced by quantiles of the Pareto fit, none above the
    largest of them

    Where it differs from `importance_weighted_bound` by more than its standard error, neither is to be trusted.

    Shapes: (S, N) -> (N,), in nats per datum. The raw bound where no tail is fitted: with fewer than 25 particles, for
    constant weights, and where `pareto_k` is 0 or +inf for want of a tail.

    Raises ValueError if the array is not (S, N) with S >= 1.

    Source: Vehtari et al., Pareto Smoothed Importance Sampling (2024); fitted by ArviZ.
    """
    return pareto_tail(log_weights).smoothed_bound


def chi_square_bound(log_weights: Tensor | Weights, k: Tensor | None = None) -> Tensor:
    """Chi-square upper bound of log p(x) as S grows; at finite S the estimate may lie below log p(x).

    CUBO_2 = 1/2 log( 1/S sum_s w[s, n]^2 ),   1/2 log E[w^2] >= log E[w] = log p(x_n)

    Do not report it as a bound: results do not contain it for that reason. How often it lies below log p(x) though k < 0.5:

        weights, of mean 1                                     S = 25    100   1000   5000
        log-normal, s = 0.3                                       26%     9%     0%     0%
        log-normal, s = 1                                         18%     1%     0%     0%
        log-normal, s = 2                                         44%    11%     0%     0%
        log-normal, s = 0.3, and 5,000 once in 10,000 draws      100%   100%   100%    79%

    A large weight too rare to be among the S drawn shows in no diagnostic, so that no rule can tell when the bound holds.

    Shapes: (S, N) -> (N,), in nats per datum. NaN if the Pareto k is 0.5 or more or not known.
    k: `pareto_k` of the weights, if it is at hand

    Raises ValueError if the array is not (S, N) with S >= 1.

    Source: Dieng, Tran, Ranganath, Paisley & Blei, Variational Inference via chi Upper Bound Minimization (2017).

    >>> chi_square_bound(torch.zeros(30, 1))
    tensor([0.], dtype=torch.float64)
    """
    weights = Weights.of(log_weights)
    k = pareto_k(weights) if k is None else k
    bound = ((2 * weights.log).logsumexp(0) - math.log(len(weights))) / 2
    return torch.where(k < 0.5, bound, math.nan)


def pareto_k_limit(num_particles: int) -> float:
    """Largest Pareto k at which S particles give a usable estimate: min(1 - 1/log10 S, 0.7).

    Raises ValueError if `num_particles` is below 2.

    Source: Vehtari et al., Pareto Smoothed Importance Sampling (2024).

    >>> pareto_k_limit(100), pareto_k_limit(5000)
    (0.5, 0.7)
    """
    if num_particles < 2:
        raise ValueError(f"a Pareto k needs 2 particles or more, found num_particles={num_particles}")
    return min(1 - 1 / math.log10(num_particles), 0.7)
