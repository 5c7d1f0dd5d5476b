"""What every reducer asks of its log weights first."""

import torch
from torch import Tensor

__all__ = ["checked"]


def checked(log_weights: Tensor) -> tuple[Tensor, Tensor]:
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
