"""Log weights, checked and in float64, with the intermediate results that estimators share."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Weights"]

# Weights of an exact guide differ only by rounding. Their measured range was up to 15 spacings (float32, 2 to 3,072
# pixels, 1,000 particles; float64, 5 values, 200 particles) if no term of a log weight is larger than their sum.
_FEW = 32

# Assumed size in nats of the terms of a log weight. If terms cancel, their rounding errors stay: in float32 the
# measured range was up to 290 spacings at |log w| < 10, or 15 of the spacings at 100.
_USUAL_TERMS = 100

# Largest range in nats that counts as rounding in any dtype. It hides a gap of at most 1.3e-5 nats (range^2 / 8) and a
# standard error of at most 0.005 / sqrt(S).
_NEGLIGIBLE = 0.01


_Shared = TypeVar("_Shared")


class Weights:
    """An array (S, N) of log weights, processed once for any number of estimators.

    Args:
        log_weights: The array (S, N), floating point.

    Attributes:
        log: The array in float64.
        spacing: (N,), distance of neighbouring numbers of the given dtype at the largest weight: eps max(1, |log w|).
        constant: (N,), True if all weights of a datum agree within 32 spacings and 0.01 nats, as those of an exact
            guide do.
        rounding: (N,), largest difference that may be rounding of terms that cancelled: 32 eps max(100, |log w|), at
            most 0.01 nats.

    Raises:
        ValueError: The array is not (S, N) with S >= 1.
        TypeError: The array holds integers.
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
        self._shared: dict[Callable, Any] = {}
        low, high = self.log.aminmax(dim=0)
        epsilon = torch.finfo(log_weights.dtype).eps
        self.spacing = epsilon * high.abs().clamp_min(1)
        self.constant = (high - low <= (_FEW * self.spacing).clamp_max(_NEGLIGIBLE)) & high.isfinite()
        self.rounding = (_FEW * epsilon * high.abs().clamp_min(_USUAL_TERMS)).clamp_max(_NEGLIGIBLE)

    @classmethod
    def of(cls, log_weights: "Tensor | Weights") -> "Weights":
        """Return `log_weights` as `Weights`."""
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
        """The importance-weighted bound, (N,); see `importance_weighted_bound`."""
        return self.log_sum - math.log(len(self))

    @cached_property
    def relative(self) -> Tensor:
        """w / mean(w), (S, N)."""
        return (self.log - self.bound).exp()

    def once(self, function: "Callable[[Weights], _Shared]") -> _Shared:
        """function(self), computed at the first call: a result that several estimators share."""
        if function not in self._shared:
            self._shared[function] = function(self)
        return self._shared[function]

    def unknown(self) -> Tensor:
        """NaN for each datum, (N,)."""
        return torch.full_like(self.log[0], math.nan)
