"""Check the arguments of `fit`, except programs and data."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceTailAdaptive_ELBO,
)

from pyrovae.common.arguments import check_count

__all__ = ["check_functions", "check_numbers", "check_saving", "checked_loss"]

_JIT = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


def check_numbers(
    epochs: int, batch_size: int | None, max_skipped_steps: int, learning_rate: float, clip_norm: float | None
) -> None:
    """Raise TypeError or ValueError for a number that training cannot use."""
    check_count("epochs", epochs)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    check_count("max_skipped_steps", max_skipped_steps, least=0)
    for name, number in (("learning_rate", learning_rate), ("clip_norm", 1.0 if clip_norm is None else clip_norm)):
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"{name} must be a number, found {number!r}")
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, found {number}")


def check_saving(checkpoint: Any, checkpoint_every: float, resume: bool) -> None:
    """Raise TypeError or ValueError for a checkpoint that cannot be written or resumed as told."""
    if resume not in (True, False):
        raise TypeError(f"resume must be True or False, found {resume!r}")
    if resume and checkpoint is None:
        raise ValueError("found resume=True without a checkpoint to go on from: give checkpoint= its path")
    if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, Real):
        raise TypeError(f"checkpoint_every must be a number of seconds, found {checkpoint_every!r}")
    if not checkpoint_every >= 0:
        raise ValueError(f"checkpoint_every must be 0 seconds or more, found {checkpoint_every}")


def check_functions(schedule: Callable[[float], float] | None, transform: Callable | None) -> None:
    """Raise TypeError if the schedule or the transform cannot be called as `fit` does."""
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be a function of a batch, or None; found {transform!r}")
    if schedule is not None and not callable(schedule):
        raise TypeError(schedule_message(schedule, "cannot be called"))


def schedule_message(schedule: Any, problem: str) -> str:
    """Say what a schedule must be, and what is wrong with this one."""
    return (
        f"schedule must be a function from the fraction of training done, 0 to 1, to a factor of the learning rate (by "
        f"default pyrovae.training.optimization.cosine_schedule), or None for a constant rate; {schedule!r} {problem}"
    )


def checked_loss(loss: ELBO | None) -> ELBO:
    """Return the loss, `Trace_ELBO()` for None; raise TypeError if it is no loss or cannot train modules."""
    loss = Trace_ELBO() if loss is None else loss
    if not isinstance(loss, ELBO):
        raise TypeError(f"loss must be a pyro.infer.ELBO, Trace_ELBO() for instance; found {loss!r}")
    if isinstance(loss, _JIT):
        name = type(loss).__name__
        raise TypeError(
            f"loss={name}() reads its parameters from Pyro's global store, which does not hold those of modules: take "
            f"{name.removeprefix('Jit')}(), with compile=True to record and compile the step"
        )
    if isinstance(loss, ReweightedWakeSleep | TraceTailAdaptive_ELBO):
        gives = "two losses" if isinstance(loss, ReweightedWakeSleep) else "gradients without a loss"
        raise TypeError(
            f"loss={type(loss).__name__}() gives {gives}, but fit needs one loss, to report it and to stop if it is not finite: take "
            f"RenyiELBO or an objective of pyrovae.objectives, or train with pyro.infer.SVI"
        )
    return loss
