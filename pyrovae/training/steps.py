"""The steps of an epoch: Pyro's `SVI.step`, or its recording."""

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from pyrovae.common import distributed
from pyrovae.common.reporting import warn_once
from pyrovae.compiled.compiler import float32_products
from pyrovae.data.forms import Batch
from pyrovae.objectives.base import Parts
from pyrovae.programs.traces import Program
from pyrovae.training.acceleration import Constants, RecordedStep, record_step
from pyrovae.training.first_step import FirstStepCheck
from pyrovae.training.losses import EpochSums, ReportingLoss, pyro_checks
from pyrovae.training.non_finite import TriedStep, find_source, stop, warn_skipped
from pyrovae.training.preparation import Run, put_back

__all__ = ["Steps"]

_logger = logging.getLogger("pyrovae")
_LOOK_EVERY = 50  # steps on a GPU, because reading a number there waits for the device


class Steps:
    """The steps of `SVI(model, guide, optimizer, loss)` on batches of the training data.

    Args:
        run: what is trained.
    """

    def __init__(self, run: Run):
        self.run = run
        self.loss = ReportingLoss(run.loss)
        self.first = FirstStepCheck(run)
        self.svi = SVI(*run.programs, run.optimizer, loss=self.loss.loss, loss_and_grads=self._loss_and_grads)
        self.compiles, self.is_medium = run.compiles, run.precision == "medium"
        self.recorded: RecordedStep | None = None
        self.constants: Constants | None = None
        self.look_every = _LOOK_EVERY if run.device.type == "cuda" else 1
        self._parts: list[Parts] = []
        self._batch: Batch | None = None  # of the step that SVI is making

    def get_ready(self) -> None:
        """Run the loss once when a run is resumed, because the loss, Pyro's store and the checks need a first step.

        Call this before the state is restored, which undoes all other changes.
        """
        data, index = self.run.batches.example()
        # Leave out data that would make the step be skipped.
        rows = data.is_finite().nonzero().squeeze(1)
        rows = rows[torch.arange(len(index), device=rows.device) % len(rows)] if len(rows) else index
        self.first(self.loss.loss_and_grads, self.run.batches.arguments(data, rows), restored=True)
        for parameter in chain(
            nn.ModuleList(self.run.modules).parameters(), dict(pyro.get_param_store().named_parameters()).values()
        ):
            parameter.grad = None

    def epoch(self, number: int, full_size: int | None, progress: Callable[[int], object]) -> EpochSums:
        """Run one epoch.

        A step whose loss or gradient is NaN or infinite changes neither parameters nor buffers, its data do not count,
        and the log names it.

        Args:
            number: of the epoch, counted from 1.
            full_size: size of a subsampled plate, if an earlier epoch found it.
            progress: called with the number of data after each step.

        Returns:
            The sums over all processes, with the number of data that this process received.

        Raises:
            NotFiniteError: at the first such step that the optimizer does not skip, and if all steps of the run were
                skipped.
        """
        run, guard = self.run, self.run.optimizer.guard
        full, per_epoch, accumulate = run.batches.full_size, run.batches.per_epoch, run.optimizer.accumulate
        run.optimizer.is_scaled = bool(full_size)
        batches = run.batches.epoch(number)
        first = next(batches, None)
        if first is None:
            raise ValueError(
                f"the DataLoader gave no batch in epoch {number}: if its data set is an IterableDataset, each call of its "
                f"__iter__ must start again from the first item"
            )
        self._run_eagerly_if_changed(f"before epoch {number}")
        if self.compiles and number > 1 and len(first[1]) == full:
            self.constants = self.constants or self._constants()
            self.compiles = False
            self.recorded = record_step(
                *(*run.programs, run.loss, run.optimizer, run.modules, run.batches.transform, run.batches.numbers),
                *first,
                medium=self.is_medium,
            )
        sums = EpochSums(full_size, objective=torch.zeros((), dtype=torch.float64, device=run.device))
        rows = torch.zeros(4, dtype=torch.float64, device=run.device)  # of the recorded steps
        unseen: list[TriedStep] = []
        num_steps = int(guard.num_steps)
        value: Tensor | float
        for step, (data, index) in enumerate(chain([first], batches)):
            # The fraction at the middle of the batches that make this optimizer step.
            begin = step - step % accumulate
            end = max(step + 1, min(begin + accumulate, per_epoch))
            run.optimizer.factor = run.schedule((number - 1 + (begin + end) / 2 / per_epoch) / run.epochs)
            run.optimizer.num_rows = len(index)
            unseen.append(TriedStep(number, step + 1, data, index, self._random_state()))
            # Running means see the numbers of a step before it is skipped.
            buffers = run.buffers() if guard.max_skipped else []
            if self.recorded is not None and len(index) == full and self.recorded.takes(data):
                value, parts, row = self.recorded(data, index)
            else:
                value, parts = self._eager(unseen[-1], checks=number == 1 and step == 0)
                row = None
            if self.compiles and self.constants is None and self.first.is_done:
                self.constants = self._constants()
            put_back(buffers, unless=guard.was_made)
            if row is not None:
                rows.add_(row)
            else:
                sums.add(parts, run.batches.num_made(len(index)), guard.was_made)
                sums.objective = torch.where(guard.was_made, sums.objective - value, sums.objective)
            sums.num_rows += len(index)
            if (step + 1) % accumulate == 0:
                run.optimizer.make_step()
            unseen[-1] = last = unseen[-1]._replace(was_made=guard.was_made.clone())
            if len(unseen) == self.look_every:
                num_steps = self._look(unseen, num_steps)
                unseen = []
            progress(len(index))
        self._look(unseen, num_steps)
        sums.num_steps = -(-(step + 1) // accumulate)  # a loader may give other numbers of batches than its length says
        if self.recorded is not None:
            sums.add_rows(rows, run.batches.num_made(full))
            if name := self._run_eagerly_if_changed(f"in epoch {number}"):
                warn_once(
                    run.model,
                    f"the programs' '{name}' changed in the middle of epoch {number}, and compiled steps used the value that "
                    f"it had before: start again with compile=False, or keep the value in a buffer (register_buffer)",
                )
        run.optimizer.make_step()  # of fewer batches, at a ragged end
        # A single bad step may be an accident, even if it is the only step of the first epoch.
        if guard.num_skipped and not run.optimizer.has_moved and (number == run.epochs or number * per_epoch > 1):
            stop(run, last, none_made=True)
        return _over_processes(sums)

    def _look(self, unseen: list[TriedStep], num_steps: int) -> int:
        """Stop at the first of these steps that ends the run, log those that were skipped, and return the steps so far.

        Args:
            unseen: the steps since the last look.
            num_steps: the steps so far at the last look.
        """
        guard = self.run.optimizer.guard
        if not guard.is_running:
            stop(self.run, unseen[int(guard.num_steps) - num_steps])
        warn_skipped(self.run, unseen)
        return int(guard.num_steps)

    def _constants(self) -> Constants:
        run = self.run
        return Constants(
            *run.programs, run.loss, run.modules, run.batches.transform, getattr(run.batches, "train", None)
        )

    def _run_eagerly_if_changed(self, when: str) -> str | None:
        """Give up the recording if a value has changed that it keeps as a constant; return the name of the value.

        A callback may change an attribute (a scale, a temperature, a weight of the KL), and so may a schedule. The first
        epoch, which is always eager, shows most of these.
        """
        if self.constants is None or (name := self.constants.changed()) is None:
            return None
        _logger.warning(
            "runs eagerly from now on: the programs' '%s' has changed %s, and compiled steps keep values, layers and hooks as they "
            "are: keep a value in a buffer (register_buffer) and change that in place",
            *(name, when),
        )
        self.compiles, self.recorded, self.constants = False, None, None
        return name

    def _eager(self, tried: TriedStep, checks: bool) -> tuple[float, list[Parts]]:
        """Make a step with Pyro's SVI and return (loss, parts of the ELBO)."""
        guard = self.run.optimizer.guard
        try:
            with pyro_checks(checks), float32_products(medium=True) if self.is_medium else nullcontext():
                self._batch = batch = self.run.batches.arguments(tried.data, tried.rows)
                return self.svi.step(*batch.args, **batch.kwargs), self._parts
        except ValueError as error:  # a distribution rejects NaN; other errors recur when the step is run again
            if error is self.first.refusal:
                raise
            if len(tried.rows) == 1 and "more than 1 value per channel" in str(error):
                raise ValueError(
                    "BatchNorm got a batch of a single datum, but needs at least two to train: leave it out, "
                    "DataLoader(..., drop_last=True), or use another batch size"
                ) from error
            # With several processes no step can be skipped: the others wait for this one's gradients.
            if guard.num_skipped >= guard.max_skipped or distributed.num_ranks() > 1:
                stop(self.run, tried, error)
            if find_source(self.run, tried)[0] is None:
                raise
            guard(torch.zeros_like(guard.was_made))
            return math.nan, []

    def _loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss of a step for SVI. Reports a loss that is not finite to the optimizer; keeps the parts for the caller."""
        if self.first.is_done:
            value, self._parts = self.loss.loss_and_grads(model, guide, *args, **kwargs)
        else:
            assert self._batch is not None
            value, self._parts = self.first(self.loss.loss_and_grads, self._batch)
        self.run.optimizer.is_scaled |= any(part.full_size for part in self._parts)
        if not math.isfinite(value):
            self.run.optimizer.watch(torch.tensor(value))
        return value

    def _random_state(self) -> list[Tensor]:
        on_gpu = [torch.cuda.get_rng_state(self.run.device)] if self.run.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_gpu]


def _over_processes(sums: EpochSums) -> EpochSums:
    objective, sums.reconstruction, sums.kl, num_data = distributed.sums(
        sums.objective, sums.reconstruction, sums.kl, sums.num_data
    )
    sums.num_data = int(num_data)
    sums.objective = objective
    return sums
