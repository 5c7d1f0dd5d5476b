"""The importance-weighted bound with its bias of the first orders removed, (S, N) -> (N,)."""

import math

import torch
from torch import Tensor

from pyrovae.estimators.weights import Weights

__all__ = ["jackknife", "jackknife_2"]

# Pairs of weights of which one is among the 4 largest are looked at one by one. Of the others w~ < 1/5, so that the odds
# r = w~ / (1 - w~) are below 1/4, and 13 terms of the series of log(1 - r r') leave 16^-13 of it.
_LARGEST, _TERMS = 4, 13


def jackknife(log_weights: Tensor | Weights) -> Tensor:
    """Jackknife-corrected estimate of log p(x), of order 1: less biased, and no longer a bound.

    JVI-1 = S L_S - (S-1) mean_i L_{S-1}^(-i) = L_S - (S-1) [ log(S/(S-1)) + mean_i log(1 - w~_i) ],
    w~ the normalised weights. The second form keeps its digits in float32. Bias O(S^-2) against O(S^-1) of L_S.

    Shapes: (S, N) -> (N,), in nats per datum. NaN with one particle; +inf where only one weight is not 0.

    Raises ValueError if the array is not (S, N) with S >= 1.

    Source: Nowozin, Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife
    Variational Inference (2018).
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
    """Jackknife-corrected estimate of log p(x), of order 2: less biased still, noisier, and not a bound.

    JVI-2 = S^2/2 L_S - (S-1)^2 mean_i L_{S-1}^(-i) + (S-2)^2/2 mean_ij L_{S-2}^(-ij)
          = L_S + c_S - (2S-3) mean_i log(1 - w~_i) + (S-2)^2/2 mean_ij log(1 - r_i r_j),   r_i = w~_i / (1 - w~_i),
    c_S = -(S-1)^2 log(S/(S-1)) + (S-2)^2/2 log(S/(S-2)), w~ the normalised weights, i < j. The second form keeps its digits.
    Bias O(S^-3) against O(S^-2) of order 1. The mean over all pairs takes O(S) operations.

    Shapes: (S, N) -> (N,), in nats per datum. NaN with fewer than 3 particles or where only one weight is not 0; -inf
    where only two are not.

    Raises ValueError if the array is not (S, N) with S >= 1.

    Source: Nowozin, Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife
    Variational Inference (2018).
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
    """log(1 - w~_i), (S, N); for the largest, (1, N) by its index, which may be nearly everything, from the others."""
    others = log_normalised.scatter(0, largest, -math.inf).logsumexp(0, keepdim=True)
    return torch.log1p(-log_normalised.exp()).scatter(0, largest, others)


def _sum_over_pairs(log_normalised: Tensor, without_one: Tensor, largest: Tensor) -> Tensor:
    """sum_{i<j} log(1 - r_i r_j) (N,), which is log(1 - w~_i - w~_j) - log(1 - w~_i) - log(1 - w~_j).

    largest: indices of the largest weights, in their order
    """
    top, top_without = log_normalised.gather(0, largest), without_one.gather(0, largest)
    rest = log_normalised.scatter(0, largest, -math.inf)
    rest_without = without_one.scatter(0, largest, 0.0)
    # The first pair may be nearly everything; in any other, w~_j is half of what i leaves, or less.
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
