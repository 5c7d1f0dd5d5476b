"""Jackknife estimates of log p(x): the importance-weighted bound with the leading terms of its bias removed."""

import math

import torch
from torch import Tensor

from pyrovae.estimators.weights import Weights

__all__ = ["jackknife", "jackknife_2"]

# Pairs with one of the 4 largest weights are summed directly. The others have w~ < 1/5 and odds r = w~ / (1 - w~) below
# 1/4, so that 13 terms of the series of log(1 - r r') leave a relative error of 16^-13.
_LARGEST, _TERMS = 4, 13


def jackknife(log_weights: Tensor | Weights) -> Tensor:
    """Jackknife-corrected estimate of log p(x) of order 1: less biased than the bound, but not a bound.

        JVI-1 = S L_S - (S-1) mean_i L_{S-1}^(-i) = L_S - (S-1) [ log(S/(S-1)) + mean_i log(1 - w~_i) ]

    w~ are the normalised weights. The second form loses no digits in float32. The bias is O(S^-2); that of L_S is
    O(S^-1).

    Shapes: (S, N) -> (N,), in nats per datum. NaN with one particle; +inf if only one weight is not 0.

    Args:
        log_weights: Log weights (S, N).

    Raises:
        ValueError: The array is not (S, N) with S >= 1.

    References:
        Nowozin, Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife Variational
            Inference (2018).
    """
    weights = Weights.of(log_weights)
    num_particles, bound = len(weights), weights.bound
    if num_particles < 2:
        return weights.unknown()
    log_normalised = weights.log - weights.log_sum
    without_one = _log_without_one(log_normalised, weights.log.argmax(0, keepdim=True))
    correction = math.log(num_particles / (num_particles - 1)) + without_one.mean(0)
    corrected = bound - (num_particles - 1) * correction
    corrected = torch.where(weights.constant, bound, corrected)
    return torch.where(bound == -math.inf, bound, corrected)


def jackknife_2(log_weights: Tensor | Weights) -> Tensor:
    """Jackknife-corrected estimate of log p(x) of order 2: less biased than order 1, noisier, and not a bound.

        JVI-2 = S^2/2 L_S - (S-1)^2 mean_i L_{S-1}^(-i) + (S-2)^2/2 mean_ij L_{S-2}^(-ij)
              = L_S + c_S - (2S-3) mean_i log(1 - w~_i) + (S-2)^2/2 mean_ij log(1 - r_i r_j),   r_i = w~_i / (1 - w~_i)

    c_S = -(S-1)^2 log(S/(S-1)) + (S-2)^2/2 log(S/(S-2)), w~ are the normalised weights, i < j. The second form loses no
    digits. The bias is O(S^-3); that of order 1 is O(S^-2). The mean over all pairs takes O(S) operations.

    Shapes: (S, N) -> (N,), in nats per datum. NaN with fewer than 3 particles or if only one weight is not 0; -inf if
    only two weights are not 0.

    Args:
        log_weights: Log weights (S, N).

    Raises:
        ValueError: The array is not (S, N) with S >= 1.

    References:
        Nowozin, Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife Variational
            Inference (2018).
    """
    weights = Weights.of(log_weights)
    size, bound = len(weights), weights.bound
    if size < 3:
        return weights.unknown()
    log_normalised = weights.log - weights.log_sum
    largest = weights.log.topk(min(_LARGEST, size), dim=0).indices
    without_one = _log_without_one(log_normalised, largest[:1])
    pairs = _sum_over_pairs(log_normalised, without_one, largest) / (size * (size - 1) / 2)
    offset = (size - 1) ** 2 * math.log1p(-1 / size) - (size - 2) ** 2 / 2 * math.log1p(-2 / size)
    corrected = bound + offset - (2 * size - 3) * without_one.mean(0) + (size - 2) ** 2 / 2 * pairs
    corrected = torch.where(weights.constant, bound, corrected)
    return torch.where(bound == -math.inf, bound, corrected)


def _log_without_one(log_normalised: Tensor, largest: Tensor) -> Tensor:
    """log(1 - w~_i), (S, N). The largest weight, at index `largest` (1, N), may be near 1: sum the others instead."""
    others = log_normalised.scatter(0, largest, -math.inf).logsumexp(0, keepdim=True)
    return torch.log1p(-log_normalised.exp()).scatter(0, largest, others)


def _sum_over_pairs(log_normalised: Tensor, without_one: Tensor, largest: Tensor) -> Tensor:
    """sum_{i<j} log(1 - r_i r_j) (N,), where each term is log(1 - w~_i - w~_j) - log(1 - w~_i) - log(1 - w~_j).

    Args:
        log_normalised: log w~ (S, N).
        without_one: log(1 - w~) (S, N).
        largest: Indices of the largest weights, in decreasing order.
    """
    top, top_without = log_normalised.gather(0, largest), without_one.gather(0, largest)
    rest = log_normalised.scatter(0, largest, -math.inf)
    rest_without = without_one.scatter(0, largest, 0.0)
    # The two largest weights may sum to nearly 1. In any other pair, w~_j is at most half of 1 - w~_i.
    total = log_normalised.scatter(0, largest[:2], -math.inf).logsumexp(0) - top_without[0] - top_without[1]
    for index, without in enumerate(top_without):
        total += (torch.log1p(-(rest - without).exp()) - rest_without).sum(0)
        later = slice(max(2, index + 1), None)
        total += (torch.log1p(-(top[later] - without).exp()) - top_without[later]).sum(0)
    odds = (rest - rest_without).exp()
    power, sums = torch.ones_like(odds), []
    for _ in range(2 * _TERMS):
        sums.append(power.mul_(odds).sum(0))
    for term in range(1, _TERMS + 1):
        total -= (sums[term - 1].square() - sums[2 * term - 1]) / (2 * term)
    return total
