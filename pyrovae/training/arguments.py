"""What `fit` refuses to be told, apart from programs and data."""

import math

from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
)

from pyrovae.programs.modules import check_count

__all__ = ["check_numbers", "checked_loss"]

_JIT = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


def check_numbers(
    epochs: int, batch_size: int | None, max_skipped_steps: int, learning_rate: float, clip_norm: float | None
) -> None:
    """Raise TypeError or ValueError for a number that makes no training."""
    check_count("epochs", epochs)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    check_count("max_skipped_steps", max_skipped_steps, least=0)
    for name, number in (("learning_rate", learning_rate), ("clip_norm", 1.0 if clip_norm is None else clip_norm)):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{name} must be a number, found {number!r}")
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, found {number}")


def checked_loss(loss: ELBO | None) -> ELBO:
    """The loss, `Trace_ELBO()` for None; TypeError for what is none, or does not see the modules' parameters."""
    loss = Trace_ELBO() if loss is None else loss
    if not isinstance(loss, ELBO):
        raise TypeError(f"loss must be a pyro.infer.ELBO, Trace_ELBO() for instance; found {loss!r}")
    if isinstance(loss, _JIT):
        name = type(loss).__name__
        raise TypeError(
            f"loss={name}() reads its parameters from Pyro's global store, where those of modules are not: take "
            f"{name.removeprefix('Jit')}(), with compile=True to have the step recorded and compiled"
        )
    return loss
