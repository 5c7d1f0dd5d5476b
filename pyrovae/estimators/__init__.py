"""Estimators from log importance weights: every bound, error and diagnostic is a function of one array.

``log_weights[s, n] = log p(x_n, z_sn) - log q(z_sn | x_n)`` with ``z_sn ~ q(. | x_n)`` has shape (S, N): S particles
for each of N data. Every function maps (S, N) -> (N,), computes in float64 and returns float64. The dtype of the array
only decides which differences count as rounding. The functions compute with torch, and with ArviZ for the Pareto fit.
"""

from pyrovae.estimators.compression import bits_per_dim
from pyrovae.estimators.jackknife import jackknife, jackknife_2
from pyrovae.estimators.reducers import (
    bound_curve,
    effective_sample_size,
    elbo,
    elbo_stderr,
    gap,
    gap_stderr,
    importance_weighted_bound,
    importance_weighted_bound_stderr,
)
from pyrovae.estimators.tails import (
    ParetoTail,
    chi_square_bound,
    pareto_k,
    pareto_k_limit,
    pareto_smoothed_bound,
    pareto_tail,
)

__all__ = [
    "ParetoTail",
    "bits_per_dim",
    "bound_curve",
    "chi_square_bound",
    "effective_sample_size",
    "elbo",
    "elbo_stderr",
    "gap",
    "gap_stderr",
    "importance_weighted_bound",
    "importance_weighted_bound_stderr",
    "jackknife",
    "jackknife_2",
    "pareto_k",
    "pareto_k_limit",
    "pareto_smoothed_bound",
    "pareto_tail",
]
