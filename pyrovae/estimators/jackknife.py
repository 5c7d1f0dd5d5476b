"""Jackknife estimates of log p(x): the importance-weighted bound with the leading terms of its bias removed."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.estimators.weights import Weights

__all__ = ["jackknife", "jackknife_2"]

# Pairs with one of the 4 largest weights are summed directly. The others have w~ < 1/5 and odds r = w~ / (1 - w~) below
# 1/4, so that 13 terms of the series of log(1 - r r') leave a relative error of 16^-13.
_LARGEST, _TERMS = 4, 13
_ROWS = 512


class _Parts(NamedTuple):
    """What both orders need.

    Attributes:
        log_normalised: log w~, (S, N).
        normalised: w~, (S, N).
        without_one: log(1 - w~), (S, N).
    """

    log_normalised: Tensor
    normalised: Tensor
    without_one: Tensor


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
    correction = math.log(num_particles / (num_particles - 1)) + weights.once(_parts).without_one.mean(0)
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
    parts = weights.once(_parts)
    pairs = _sum_over_pairs(parts, weights.log.topk(min(_LARGEST, size), dim=0).indices) / (size * (size - 1) / 2)
    offset = (size - 1) ** 2 * math.log1p(-1 / size) - (size - 2) ** 2 / 2 * math.log1p(-2 / size)
    corrected = bound + offset - (2 * size - 3) * parts.without_one.mean(0) + (size - 2) ** 2 / 2 * pairs
    corrected = torch.where(weights.constant, bound, corrected)
    return torch.where(bound == -math.inf, bound, corrected)


def _parts(weights: Weights) -> _Parts:
    log_normalised = weights.log - weights.log_sum
    normalised = log_normalised.exp()
    # The largest weight may be near 1: sum the others instead.
    largest = weights.log.argmax(0, keepdim=True)
    others = log_normalised.scatter(0, largest, -math.inf).logsumexp(0, keepdim=True)
    return _Parts(log_normalised, normalised, torch.log1p(-normalised).scatter_(0, largest, others))


def _sum_over_pairs(parts: _Parts, largest: Tensor) -> Tensor:
    """sum_{i<j} log(1 - r_i r_j) (N,), where each term is log(1 - w~_i - w~_j) - log(1 - w~_i) - log(1 - w~_j).

    Args:
        parts: Of all weights.
        largest: Indices of the largest weights, in decreasing order.
    """
    top, top_without = parts.log_normalised.gather(0, largest), parts.without_one.gather(0, largest)
    rest = parts.normalised.scatter(0, largest, 0.0)
    # The two largest weights may sum to nearly 1. In any other pair, w~_j is at most half of 1 - w~_i.
    total = parts.log_normalised.scatter(0, largest[:2], -math.inf).logsumexp(0) - top_without[0] - top_without[1]
    for index, without in enumerate(top_without):
        later = slice(max(2, index + 1), None)
        total += (torch.log1p(-(top[later] - without).exp()) - top_without[later]).sum(0)
    # The others with each of the largest: prod_i (1 - w~_j / (1 - w~_i)) = 1 - missing_j, by one logarithm for each j.
    # 1 - w~_i may be as small as the sum of the others for the largest weight only, which needs logarithms.
    missing = (parts.log_normalised - top_without[0]).exp_().scatter_(0, largest, 0.0)
    for share in (-top_without[1:]).exp():
        part = rest * share
        missing += part - missing * part
    rest_without = parts.without_one.scatter(0, largest, 0.0)
    total += torch.log1p(-missing).sum(0) - len(largest) * rest_without.sum(0)
    sums = _power_sums(rest / (1 - rest), 2 * _TERMS)
    for term in range(1, _TERMS + 1):
        total -= (sums[term - 1].square() - sums[2 * term - 1]) / (2 * term)
    return total


def _power_sums(x: Tensor, most: int) -> list[Tensor]:
    """Sums over the first dimension of x, x^2, ... x^most; in pieces of rows, which stay in the cache."""
    pieces = []
    for rows in x.split(_ROWS):
        power = torch.ones_like(rows)
        pieces.append(torch.stack([power.mul_(rows).sum(0) for _ in range(most)]))
    return list(torch.stack(pieces).sum(0))
