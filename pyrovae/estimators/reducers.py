"""Reducers of log importance weights, (S, N) -> (N,)."""

import math

import torch
from torch import Tensor

from pyrovae.estimators.pareto import tail_shape

__all__ = [
    "bound_curve",
    "effective_sample_size",
    "elbo",
    "elbo_stderr",
    "gap",
    "gap_stderr",
    "importance_weighted_bound",
    "importance_weighted_bound_stderr",
    "jackknife",
    "pareto_k",
    "pareto_k_limit",
]


def elbo(log_weights: Tensor) -> Tensor:
    """Evidence lower bound, the mean log weight.

    ELBO_n = 1/S sum_s log w[s, n]

    Shapes: (S, N) -> (N,), in nats per datum. -inf where any weight is 0.

    Raises ValueError if the array is not (S, N) with S >= 1.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014).

    >>> elbo(torch.tensor([[0.0], [-2.0]]))
    tensor([-1.], dtype=torch.float64)
    """
    return _checked(log_weights)[0].mean(0)


def elbo_stderr(log_weights: Tensor) -> Tensor:
    """Monte Carlo standard error of the ELBO, sd(log w) / sqrt(S).

    Shapes: (S, N) -> (N,), in nats. NaN with fewer than 2 particles or a weight of 0; 0 for constant weights.
    """
    log_weights, constant = _checked(log_weights)
    if len(log_weights) < 2:
        return torch.full_like(log_weights[0], math.nan)
    stderr = log_weights.std(0) / math.sqrt(len(log_weights))
    return torch.where(constant, 0.0, stderr)


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """Importance-weighted bound: the estimate of log p(x), a lower bound of it on average.

    L_S = log( 1/S sum_s w[s, n] ),   E[L_S] <= log p(x_n),   E[exp L_S] = p(x_n)

    Shapes: (S, N) -> (N,), in nats per datum. -inf where all weights are 0.

    Raises ValueError if the array is not (S, N) with S >= 1.

    Source: Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).

    >>> importance_weighted_bound(torch.tensor([[0.0], [-torch.inf]]))
    tensor([-0.6931], dtype=torch.float64)
    """
    log_weights, _ = _checked(log_weights)
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def importance_weighted_bound_stderr(log_weights: Tensor) -> Tensor:
    """Monte Carlo standard error of the importance-weighted bound (delta method).

    se = sd(w) / ( sqrt(S) mean(w) ), with the S - 1 variance

    Shapes: (S, N) -> (N,), in nats. NaN with fewer than 2 particles or where all weights are 0; 0 for constant
    weights. It is an error, not a bias: the bias (see `jackknife`) is invisible to it, and where the Pareto k
    exceeds 0.5 the variance of the weights may be infinite and this number too small.
    """
    log_weights, constant = _checked(log_weights)
    num_particles = len(log_weights)
    if num_particles < 2:
        return torch.full_like(log_weights[0], math.nan)
    relative = (log_weights - importance_weighted_bound(log_weights)).exp()  # w / mean(w), mean 1
    stderr = ((relative - 1).square().sum(0) / (num_particles - 1) / num_particles).sqrt()
    return torch.where(constant, 0.0, stderr)


def gap(log_weights: Tensor) -> Tensor:
    """Estimate of KL(q(z|x) || p(z|x)), the tightness of the ELBO: importance-weighted bound minus ELBO.

    log p(x) = ELBO + KL(q(z|x) || p(z|x)); as the bound lies below log p(x) on average, the gap is "at least" this.

    Shapes: (S, N) -> (N,), in nats, never negative (Jensen); +inf where some but not all weights are 0, NaN where
    all are.
    """
    log_weights, constant = _checked(log_weights)
    difference = importance_weighted_bound(log_weights) - elbo(log_weights)
    return torch.where(constant, 0.0, difference.clamp_min(0.0))


def gap_stderr(log_weights: Tensor) -> Tensor:
    """Monte Carlo standard error of the gap (delta method on both terms, which share their draws).

    se = sd( w / mean(w) - log w ) / sqrt(S)

    Shapes: (S, N) -> (N,), in nats. NaN with fewer than 2 particles or a weight of 0; 0 for constant weights.
    """
    log_weights, constant = _checked(log_weights)
    if len(log_weights) < 2:
        return torch.full_like(log_weights[0], math.nan)
    influence = (log_weights - importance_weighted_bound(log_weights)).exp() - log_weights
    return torch.where(constant, 0.0, influence.std(0) / math.sqrt(len(log_weights)))


def jackknife(log_weights: Tensor) -> Tensor:
    """Jackknife-corrected estimate of log p(x), of order 1: less biased, and no longer a bound.

    JVI-1 = S L_S - (S-1) mean_i L_{S-1}^(-i) = L_S - (S-1) [ log(S/(S-1)) + mean_i log(1 - w~_i) ],
    w~ the normalised weights. The second form keeps its digits in float32. Bias O(S^-2) against O(S^-1) of L_S.

    Shapes: (S, N) -> (N,), in nats per datum. NaN with one particle; +inf where only one weight is not 0.

    Raises ValueError if the array is not (S, N) with S >= 1.

    Source: Nowozin, Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife
    Variational Inference (2018).
    """
    log_weights, constant = _checked(log_weights)
    num_particles = len(log_weights)
    bound = importance_weighted_bound(log_weights)
    if num_particles < 2:
        return torch.full_like(bound, math.nan)
    log_total = log_weights.logsumexp(0)
    normalised = (log_weights - log_total).exp()
    # log(1 - w~) loses all digits where one weight is nearly everything: there, add up the others.
    largest = log_weights.argmax(0, keepdim=True)
    others = log_weights.scatter(0, largest, -math.inf).logsumexp(0) - log_total
    leave_one_out = torch.log1p(-normalised).scatter(0, largest, others.unsqueeze(0))
    correction = math.log(num_particles / (num_particles - 1)) + leave_one_out.mean(0)
    corrected = bound - (num_particles - 1) * correction
    corrected = torch.where(constant, bound, corrected)
    return torch.where(bound == -math.inf, bound, corrected)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Effective sample size of the weights, between 1 and S.

    ESS = (sum_s w)^2 / sum_s w^2

    Shapes: (S, N) -> (N,), in particles. NaN where all weights are 0.

    Source: Kong, A note on importance sampling using standardized weights (1992).

    >>> effective_sample_size(torch.zeros(4, 1))
    tensor([4.], dtype=torch.float64)
    """
    log_weights, _ = _checked(log_weights)
    ess = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()
    return ess.clamp(1, len(log_weights))


def bound_curve(log_weights: Tensor) -> tuple[list[int], Tensor]:
    """The importance-weighted bound at growing numbers of particles, from one draw.

    The S particles are cut into S/s blocks of s; the curve at s is the mean of the blocks' bounds: an unbiased
    estimate of E[L_s]. The sizes are a chain of divisors of S, so that blocks nest and, by Jensen's inequality, the
    curve never falls. It starts at the ELBO (s = 1) and ends at the bound of all S.

    Shapes: (S, N) -> ([1, ..., S], (len, N)), in nats. (S prime gives the two ends only.)

    >>> sizes, curve = bound_curve(torch.randn(1000, 3))
    >>> sizes
    [1, 2, 4, 8, 40, 200, 1000]
    """
    log_weights, _ = _checked(log_weights)
    sizes = _divisor_chain(len(log_weights))
    curve = [(log_weights.unflatten(0, (-1, size)).logsumexp(1) - math.log(size)).mean(0) for size in sizes]
    return sizes, torch.stack(curve)


def pareto_k(log_weights: Tensor) -> Tensor:
    """Shape k of the generalised Pareto distribution fitted to the largest weights: can the estimate be trusted?

    The weights have about 1/k finite moments: k < 0.5 finite variance, k > 0.7 an error that falls so slowly that the
    estimate and its standard error mean little. The limit at S particles is `pareto_k_limit(S)`.

    Shapes: (S, N) -> (N,). NaN with fewer than 25 particles, where all weights are 0 or one is NaN; 0 where the weights
    are constant to rounding or five and more are tied at the top; +inf where no tail can be fitted (fewer than 5 distinct
    large weights, or a quarter of them tied at the foot of the tail).

    Source: Vehtari et al., Pareto Smoothed Importance Sampling (2024); fitted by ArviZ.

    >>> pareto_k(torch.tensor([3.0, 2.0, 2.0] + 97 * [0.0])[:, None])
    tensor([inf], dtype=torch.float64)
    """
    log_weights, constant = _checked(log_weights)
    k = torch.full_like(log_weights[0], math.nan)
    if len(log_weights) < 25:
        return k
    k[constant] = 0.0
    fit = ~constant & ~log_weights.isnan().any(0) & (log_weights > -math.inf).any(0)
    if fit.any():
        k[fit] = tail_shape(log_weights[:, fit])
    return k


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


def _checked(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(S, N) float64 log weights, and (N,): where the weights of a datum are constant."""
    if log_weights.ndim != 2 or len(log_weights) == 0:
        raise ValueError(
            f"log weights must have shape (num_particles, num_data) with at least one particle, "
            f"found {tuple(log_weights.shape)}; for one datum, add an axis: log_weights[:, None]"
        )
    if not log_weights.is_floating_point():
        raise TypeError(f"log weights must be floating point, found {log_weights.dtype}")
    return log_weights.double(), _constant(log_weights)


def _constant(log_weights: Tensor) -> Tensor:
    """Where all weights of a datum agree to rounding: range(log w) <= 64 eps max|log w|.

    An exact guide gives such weights; their rounding noise must not be mistaken for a tail. False at one particle.

    What this hides in float32, at |log w| = 1,000 nats, are ranges up to 0.008 nats: a gap up to 1e-5 nats (range^2 / 8),
    and a standard error up to 0.004 / sqrt(S), below the rounding of a single weight from S = 4,000 on. Who wants to see
    them evaluates in float64: model.double(), guide.double(), x.double().
    """
    if len(log_weights) < 2:
        return torch.zeros_like(log_weights[0], dtype=torch.bool)
    low, high = log_weights.aminmax(dim=0)
    tolerance = 64 * torch.finfo(log_weights.dtype).eps * torch.maximum(low.abs(), high.abs())
    return (high - low <= tolerance) & high.isfinite() & low.isfinite()


def _divisor_chain(number: int) -> list[int]:
    """1 = d_0 | d_1 | ... | number, each the product of the smallest prime factors so far."""
    chain, factor, rest = [1], 2, number
    while rest > 1:
        if factor * factor > rest:
            factor = rest
        while rest % factor == 0:
            rest //= factor
            chain.append(chain[-1] * factor)
        factor += 1
    return chain
