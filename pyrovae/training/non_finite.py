"""Stop the run at a step whose numbers are not finite, or warn that it was skipped, with site, data and advice."""

import logging
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from pyrovae.common import distributed
from pyrovae.data.forms import Batch
from pyrovae.training.non_finite_source import NonFiniteSource, find_non_finite
from pyrovae.training.preparation import Run, put_back

__all__ = ["NotFiniteError", "TriedStep", "find_source", "stop", "warn_skipped"]

_logger = logging.getLogger("pyrovae")

_LARGE = 5.0  # root mean square above which data count as unscaled


class NotFiniteError(RuntimeError):
    """Raised if a loss or a gradient is NaN or infinite.

    Attributes:
        site: sample site that caused it; None if running the step again did not find it.
        epoch, step: where it happened, counted from 1.
        index: positions in `train` of the data that caused it; of the whole batch if the data cannot be told apart.
    """

    def __init__(self, message: str, site: str | None, epoch: int, step: int, index: Tensor):
        super().__init__(message)
        self.site, self.epoch, self.step, self.index = site, epoch, step, index


class TriedStep(NamedTuple):
    """A step with all that is needed to run it again; `was_made` is None until known."""

    epoch: int
    step: int
    data: Batch
    rows: Tensor
    random: list[Tensor]
    was_made: Tensor | None = None


def stop(run: Run, tried: TriedStep, error: ValueError | None = None, none_made: bool = False) -> NoReturn:
    """Raise NotFiniteError with the source of this step's bad numbers, or `error` if they are finite.

    Args:
        run: what is trained.
        tried: the step.
        error: error that the step raised.
        none_made: whether the epoch ended with all steps of the run skipped.
    """
    source, what = find_source(run, tried)
    if source is None and error is not None:
        raise error
    where, index = source.at(tried.rows, run.batches.name) if source else ("", tried.rows.cpu())
    broken = [name for name, p in nn.ModuleList(run.modules).named_parameters() if not p.isfinite().all()]
    guard = run.optimizer.guard
    num_skipped = min(int(guard.num_skipped), guard.max_skipped)
    before = "" if none_made else " before"
    raise NotFiniteError(
        ("no step of this run was made, and nothing was trained: " if none_made else "")
        + f"the loss or its gradient is not finite at epoch {tried.epoch}, step {tried.step}: {what}{', for ' if where else ''}{where}"
        + (f"; not finite before that step: {', '.join(broken[:3])}" if broken else "")
        + (f"; {num_skipped} such steps were skipped{before} (max_skipped_steps)" if num_skipped else "")
        + f". {_advice(run, tried, source)}",
        *(source.site if source else None, tried.epoch, tried.step, index),
    ) from error


def warn_skipped(run: Run, tried: list[TriedStep]) -> None:
    """Log which of these steps were skipped."""
    guard = run.optimizer.guard
    for step in tried if guard.max_skipped and guard.num_skipped else ():
        if not step.was_made:
            source, what = find_source(run, step)
            where = f", for {source.at(step.rows, run.batches.name)[0]}" if source else ""
            _logger.warning(
                "epoch %d, step %d was skipped because its loss or gradient is not finite: %s%s (skipped so far: %d of at "
                "most %d)",
                *(step.epoch, step.step, what, where, int(guard.num_skipped), guard.max_skipped),
            )


def find_source(run: Run, tried: TriedStep) -> tuple[NonFiniteSource | None, str]:
    """Run a step again, without side effects, and return the source of its bad numbers, and a text about it."""
    buffers = run.buffers()
    with torch.random.fork_rng(run.gpus()):
        torch.set_rng_state(tried.random[0])
        if run.gpus():
            torch.cuda.set_rng_state(tried.random[1], run.device)
        try:
            source = find_non_finite(*run.programs, run.loss, run.batches.arguments(tried.data, tried.rows))
        except Exception as again:  # programs may raise any error for NaN
            return None, f"running that step again raises {type(again).__name__}: {again}"
        finally:
            put_back(buffers)
            for parameter in run.optimizer.parameters:
                parameter.grad = None
    if source is not None and run.batches.num_made(len(tried.rows)) != len(tried.rows):
        source = source._replace(rows=None)  # rows that the transform made are not those of the data
    finite = "running that step again, eagerly, gives finite numbers"
    elsewhere = "; look at the messages of the other processes" if distributed.num_ranks() > 1 else ""
    return source, source.what if source else finite + elsewhere


def _advice(run: Run, tried: TriedStep, source: NonFiniteSource | None) -> str:
    batch = tried.data.rows(tried.rows)
    numbers = batch.data.double()
    numbers = numbers[numbers.isfinite()]
    # If the step could not be run again, data that are not finite are the first to look at.
    if source.is_data if source else not batch.is_finite().all():
        if not any(tensor.isnan().any() for tensor in batch.data_tensors.values()):
            return "Leave these data out, or replace their values that are not finite"
        return (
            "Leave these data out, or replace their values that are not finite. If NaN means missing, train on what is "
            "known: programs that take a mask, as the parts of this library do, get it from {'x': x, 'observed': "
            "~x.isnan()}; pyrovae.data.table makes values and mask of a frame"
        )
    if run.optimizer.has_moved:
        return (
            f"Look at these data; lower the learning rate ({run.optimizer.learning_rate:g} in that step) or clip gradients "
            f"(clip_norm=)"
        )
    if not len(numbers) or numbers.square().mean().sqrt() <= _LARGE:
        return "No step was made before it, so the learning rate is not the cause: look at these data and at the parameters"
    how = (
        "scale the data, (x - x.mean(0)) / x.std(0) for a table without the columns whose x.std(0) is 0 (with a mask, over "
        "the known cells of each column), or x / 255 for bytes"
    )
    if (numbers >= 0).all() and (numbers == numbers.round()).all():
        how += "; if they are counts, which their likelihood needs as they are, let the encoder's first layer scale them, x.log1p()"
    return (
        f"No step was made before it, so the learning rate is not the cause. The data of that step have mean "
        f"{numbers.mean():.3g} and standard deviation {numbers.std(correction=0):.3g}, from {numbers.min():.3g} to "
        f"{numbers.max():.3g}: {how}"
    )
