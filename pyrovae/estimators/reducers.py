"""Bounds on log p(x) and their errors, from log importance weights (S, N) -> (N,), and the error of their mean over data."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from pyrovae.estimators.weights import Weights

__all__ = [
    "bound_curve",
    "effective_sample_size",
    "elbo",
    "elbo_stderr",
    "gap",
    "gap_stderr",
    "importance_weighted_bound",
    "importance_weighted_bound_stderr",
    "standard_error",
]


def elbo(log_weights: Tensor | Weights) -> Tensor:
    """Evidence lower bound: the mean log weight.

        ELBO_n = 1/S sum_s log w[s, n]

    Shapes: (S, N) -> (N,), in nats per datum. -inf if any weight is 0.

    Args:
        log_weights: Log weights (S, N).

    Raises:
        ValueError: The array is not (S, N) with S >= 1.

    Example:
        >>> elbo(torch.tensor([[0.0], [-2.0]]))
        tensor([-1.], dtype=torch.float64)

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes (2014).
    """
    return Weights.of(log_weights).log.mean(0)


def elbo_stderr(log_weights: Tensor | Weights) -> Tensor:
    """Monte Carlo standard error of the ELBO.

        se = sd(log w) / sqrt(S)

    Shapes: (S, N) -> (N,), in nats. NaN with fewer than 2 particles or a weight of 0; 0 for constant weights.

    Args:
        log_weights: Log weights (S, N).

    Raises:
        ValueError: The array is not (S, N) with S >= 1.
    """
    weights = Weights.of(log_weights)
    if len(weights) < 2:
        return weights.unknown()
    stderr = weights.log.std(0) / math.sqrt(len(weights))
    return torch.where(weights.constant, 0.0, stderr)


def importance_weighted_bound(log_weights: Tensor | Weights) -> Tensor:
    """Importance-weighted bound: an estimate of log p(x) that is a lower bound on average.

        L_S = log( 1/S sum_s w[s, n] ),   E[L_S] <= log p(x_n),   E[exp L_S] = p(x_n)

    Shapes: (S, N) -> (N,), in nats per datum. -inf if all weights are 0.

    Args:
        log_weights: Log weights (S, N).

    Raises:
        ValueError: The array is not (S, N) with S >= 1.

    Example:
        >>> importance_weighted_bound(torch.tensor([[0.0], [-torch.inf]]))
        tensor([-0.6931], dtype=torch.float64)

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).
    """
    return Weights.of(log_weights).bound


def importance_weighted_bound_stderr(log_weights: Tensor | Weights) -> Tensor:
    """Monte Carlo standard error of the importance-weighted bound (delta method).

        se = sd(w) / ( sqrt(S) mean(w) ), with the S - 1 variance

    It measures the error, not the bias (see `jackknife`). If the Pareto k exceeds 0.5, the variance of the weights may
    be infinite and this number too small.

    Shapes: (S, N) -> (N,), in nats. NaN with fewer than 2 particles or if all weights are 0; 0 for constant weights.

    Args:
        log_weights: Log weights (S, N).

    Raises:
        ValueError: The array is not (S, N) with S >= 1.
    """
    weights = Weights.of(log_weights)
    num_particles = len(weights)
    if num_particles < 2:
        return weights.unknown()
    stderr = ((weights.relative - 1).square().sum(0) / (num_particles - 1) / num_particles).sqrt()
    return torch.where(weights.constant, 0.0, stderr)


def gap(log_weights: Tensor | Weights) -> Tensor:
    """Tightness of the ELBO: an estimate of KL(q(z|x) || p(z|x)), the importance-weighted bound minus the ELBO.

        log p(x) = ELBO + KL(q(z|x) || p(z|x))

    The bound is below log p(x) on average, so the KL is at least this gap on average.

    Shapes: (S, N) -> (N,), in nats, never negative (Jensen's inequality). +inf if some but not all weights are 0; NaN
    if all are 0.

    Args:
        log_weights: Log weights (S, N).

    Raises:
        ValueError: The array is not (S, N) with S >= 1.
    """
    weights = Weights.of(log_weights)
    difference = weights.bound - elbo(weights)
    return torch.where(weights.constant, 0.0, difference.clamp_min(0.0))


def gap_stderr(log_weights: Tensor | Weights) -> Tensor:
    """Monte Carlo standard error of the gap (delta method for both terms, which share their draws).

        se = sd( w / mean(w) - log w ) / sqrt(S)

    Shapes: (S, N) -> (N,), in nats. NaN with fewer than 2 particles or a weight of 0; 0 for constant weights.

    Args:
        log_weights: Log weights (S, N).

    Raises:
        ValueError: The array is not (S, N) with S >= 1.
    """
    weights = Weights.of(log_weights)
    if len(weights) < 2:
        return weights.unknown()
    influence = weights.relative - weights.log
    return torch.where(weights.constant, 0.0, influence.std(0) / math.sqrt(len(weights)))


def effective_sample_size(log_weights: Tensor | Weights) -> Tensor:
    """Effective sample size of the weights, between 1 and S.

        ESS = (sum_s w)^2 / sum_s w^2

    Shapes: (S, N) -> (N,), in particles. NaN if all weights are 0.

    Args:
        log_weights: Log weights (S, N).

    Raises:
        ValueError: The array is not (S, N) with S >= 1.

    Example:
        >>> effective_sample_size(torch.zeros(4, 1))
        tensor([4.], dtype=torch.float64)

    References:
        Kong, A note on importance sampling using standardized weights (1992).
    """
    weights = Weights.of(log_weights)
    ess = (2 * weights.log_sum - (2 * weights.log).logsumexp(0)).exp()
    return ess.clamp(1, len(weights))


def bound_curve(log_weights: Tensor | Weights) -> tuple[list[int], Tensor]:
    """The importance-weighted bound at increasing numbers of particles, from the same draws.

    The S particles are split into S/s blocks of s. The curve at s is the mean of the blocks' bounds, an unbiased
    estimate of E[L_s]. Each size divides the next, so that blocks nest and, by Jensen's inequality, the curve never
    decreases. It starts at the ELBO (s = 1) and ends at the bound of all S particles.

    Shapes: (S, N) -> ([1, ..., S], (len, N)), in nats. If S is prime, the curve has two points.

    Args:
        log_weights: Log weights (S, N).

    Returns:
        The sizes s, and the curve for each datum.

    Raises:
        ValueError: The array is not (S, N) with S >= 1.

    Example:
        >>> sizes, curve = bound_curve(torch.randn(1000, 3))
        >>> sizes
        [1, 2, 4, 8, 40, 200, 1000]
    """
    weights = Weights.of(log_weights)
    sizes = _divisor_chain(len(weights))
    log_sums, curve = weights.log, [weights.log.mean(0)]
    for size, next_size in pairwise(sizes):
        log_sums = log_sums.unflatten(0, (-1, next_size // size)).logsumexp(1)
        curve.append((log_sums - math.log(next_size)).mean(0))
    return sizes, torch.stack(curve)


def _divisor_chain(number: int) -> list[int]:
    """1 = d_0 | d_1 | ... | number, where each divides the next: products of the smallest prime factors of `number`."""
    chain, factor, rest = [1], 2, number
    while rest > 1:
        if factor * factor > rest:
            factor = rest
        while rest % factor == 0:
            rest //= factor
            chain.append(chain[-1] * factor)
        factor += 1
    return chain


def standard_error(values: Tensor) -> float:
    """Standard error of the mean over data; NaN for one datum.

        sd(values) / sqrt(N)

    Shapes: (N,), in the unit of the values.

    Args:
        values: One value per datum, (N,).
    """
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
