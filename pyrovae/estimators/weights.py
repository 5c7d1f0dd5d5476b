"""Log weights as every reducer wants them: checked, in float64, with what several reducers ask for worked out once."""

import math
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Weights"]


class Weights:
    """An array (S, N) of log weights, looked at once for as many reducers as are wanted.

    log: the array in float64
    constant: (N,), where the weights of a datum are constant

    Raises ValueError if the array is not (S, N) with S >= 1, TypeError for integers.
    """

    def __init__(self, log_weights: Tensor):
        if log_weights.ndim != 2 or len(log_weights) == 0:
            raise ValueError(
                f"log weights must have shape (num_particles, num_data) with at least one particle, "
                f"found {tuple(log_weights.shape)}; for one datum, add an axis: log_weights[:, None]"
            )
        if not log_weights.is_floating_point():
            raise TypeError(f"log weights must be floating point, found {log_weights.dtype}")
        self.log = log_weights.double()
        self.constant = _constant(log_weights)

    @classmethod
    def of(cls, log_weights: "Tensor | Weights") -> "Weights":
        return log_weights if isinstance(log_weights, Weights) else cls(log_weights)

    def __len__(self) -> int:
        """The number of particles."""
        return len(self.log)

    @cached_property
    def log_sum(self) -> Tensor:
        """log sum_s w[s, n], (N,)."""
        return self.log.logsumexp(0)

    @property
    def bound(self) -> Tensor:
        """`importance_weighted_bound`."""
        return self.log_sum - math.log(len(self))

    @cached_property
    def relative(self) -> Tensor:
        """w / mean(w), (S, N)."""
        return (self.log - self.bound).exp()

    def unknown(self) -> Tensor:
        """(N,) NaN."""
        return torch.full_like(self.log[0], math.nan)


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
