"""The steps of an epoch, by Pyro's `SVI.step` or its recording, with checks for numbers that are not finite."""

import logging
import math
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import pyro
import torch
from pyro.infer import ELBO, SVI
from torch import Tensor, nn

from pyrovae.common import distributed
from pyrovae.programs.reach import evaluation_mode
from pyrovae.programs.traces import Program, run_pair
from pyrovae.training.batches import Batches, check_transformed
from pyrovae.training.data_order import by_position, site_by_position
from pyrovae.training.elbo_parts import ElboParts, parts_of
from pyrovae.training.first_step import FirstStep
from pyrovae.training.fit_arguments import schedule_message
from pyrovae.training.non_finite import NonFiniteSource, NotFiniteError, find_non_finite
from pyrovae.training.optimization import OneAdam
from pyrovae.training.recorded_step import RecordedStep, record_step

__all__ = ["Schedule", "Steps"]

_logger = logging.getLogger("pyrovae")

_LARGE = 5.0  # root mean square above which data count as unscaled
_LOOK_EVERY = 50  # steps on a GPU, because reading a number there waits for the device


class Schedule(NamedTuple):
    """The learning rate as a function of the fraction of training done.

    Attributes:
        learning_rate: the rate at factor 1.
        shape: function from the fraction to a factor; None for a constant rate.
    """

    learning_rate: float
    shape: Callable[[float], float] | None

    def __call__(self, done: float) -> float:
        try:
            factor = float(self.shape(done) if self.shape else 1.0)  # a checkpoint takes no NumPy number
        except (
            TypeError,
            ValueError,
            AttributeError,
        ) as error:  # a torch scheduler, for example, which expects an optimizer
            problem = f"raises {type(error).__name__} when called with {done:.3g}: {error}"
            raise TypeError(schedule_message(self.shape, problem)) from error
        if not 0 <= factor < math.inf:
            raise ValueError(
                f"schedule gives {factor:g} at the fraction {done:.3g} of the training: a factor of the learning rate must be "
                f"0 or more, and finite"
            )
        return self.learning_rate * factor


class _Tried(NamedTuple):
    """A step with all that is needed to run it again; `was_made` is None until known."""

    step: int
    data: Tensor
    rows: Tensor
    random: list[Tensor]
    was_made: Tensor | None = None


class Steps:
    """The steps of `SVI(model, guide, optimizer, loss)` on batches of the training data.

    Args:
        model, guide, loss, optimizer: arguments of `SVI`.
        modules: the modules behind the programs.
        batches: the training data.
        compiles: record the step after one eager epoch.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        loss: ELBO,
        optimizer: OneAdam,
        modules: list[nn.Module],
        batches: Batches,
        compiles: bool,
    ):
        self.model, self.guide, self.loss, self.optimizer, self.modules = model, guide, loss, optimizer, modules
        self.batches, self.device = batches, batches.device
        self.num_made: dict[int, int] = {}  # how many rows the transform makes of so many
        self.was_checked = False
        self.refusal: ValueError | None = None
        self.svi = SVI(model, guide, optimizer, loss=loss)
        self.svi.loss_and_grads = self._watched(self.svi.loss_and_grads)
        self.compiles = compiles
        self.recorded: RecordedStep | None = None
        self.look_every = _LOOK_EVERY if self.device.type == "cuda" else 1

    def get_ready(self) -> None:
        """Run the loss once when a run is resumed, because the loss, Pyro's store and the checks need a first step.

        Call this before the state is restored, which undoes all other changes.
        """
        data, index = self.batches.example()
        # Leave out data that would make the step be skipped.
        rows = data.reshape(len(data), -1).isfinite().all(1).nonzero().squeeze(1)
        rows = rows[torch.arange(len(index), device=rows.device) % len(rows)] if len(rows) else index
        self._first(self.loss.loss_and_grads, self._batch(data, rows), restored=True)
        for parameter in chain(
            nn.ModuleList(self.modules).parameters(), dict(pyro.get_param_store().named_parameters()).values()
        ):
            parameter.grad = None

    def epoch(
        self, number: int, epochs: int, rate: Schedule, full_size: int | None, progress: Callable[[int], object]
    ) -> tuple[float, ElboParts, int]:
        """Run one epoch.

        A step whose loss or gradient is NaN or infinite changes neither parameters nor buffers, its data do not count,
        and the log names it.

        Returns:
            (minus the loss per datum, its parts, number of data that this process received).

        Raises:
            NotFiniteError: at the first such step that the optimizer does not skip, and if all steps of the run were
                skipped.
        """
        full, per_epoch = self.batches.full_size, self.batches.per_epoch
        batches = self.batches.epoch()
        first = next(batches, None)
        if first is None:
            raise ValueError(
                f"the DataLoader gave no batch in epoch {number}: if its data set is an IterableDataset, each call of its "
                f"__iter__ must begin anew"
            )
        if self.compiles and number > 1 and len(first[1]) == full:
            self.compiles = False
            self.recorded = record_step(
                *(self.model, self.guide, self.loss, self.optimizer, self.modules), self.batches.transform, *first
            )
        objective = torch.zeros((), dtype=torch.float64, device=self.device)
        verdicts = self.optimizer.verdicts
        unseen: list[_Tried] = []
        value: Tensor | float
        num_steps = int(verdicts.num_steps)
        num_rows = 0
        with parts_of(self.loss, full_size) as parts:
            for step, (data, index) in enumerate(chain([first], batches)):
                self.optimizer.learning_rate = rate((number - 1 + (step + 0.5) / per_epoch) / epochs)
                unseen.append(_Tried(step + 1, data, index, self._random_state()))
                buffers = self._buffers() if verdicts.max_skipped else []
                if self.recorded is not None and len(index) == full:
                    value, reconstruction, kl = self.recorded(data, index)
                    parts.add(reconstruction, kl)
                else:
                    value = self._eager(number, unseen, validates=number == 1 and step == 0)
                _put_back(buffers, unless=verdicts.was_made)
                parts.count(self.num_made.get(len(index), len(index)), verdicts.was_made)
                objective = torch.where(verdicts.was_made, objective - value, objective)
                unseen[-1] = unseen[-1]._replace(was_made=verdicts.was_made.clone())
                last = unseen[-1]
                if len(unseen) == self.look_every or step + 1 == per_epoch:
                    if not verdicts.goes_on:
                        self._stop(number, unseen[int(verdicts.num_steps) - num_steps])
                    self._warn(number, unseen)
                    parts.forget()  # of steps that were run again
                    unseen, num_steps = [], int(verdicts.num_steps)
                num_rows += len(index)
                progress(len(index))
        # A single bad step may be an accident, even if it is the only step of the first epoch.
        if verdicts.num_skipped and not self.optimizer.has_moved and (number == epochs or number * per_epoch > 1):
            self._stop(number, last, none_made=True)
        total, parts.reconstruction, parts.kl, num_data = distributed.sums(
            objective, parts.reconstruction, parts.kl, parts.num_data
        )
        parts.num_data = int(num_data)
        return total / num_data if num_data else math.nan, parts, num_rows

    def _batch(self, data: Tensor, index: Tensor) -> Tensor:
        batch = data[index]
        if self.batches.transform is None:
            return batch
        batch = self.batches.transform(batch)
        check_transformed(batch)
        self.num_made[len(index)] = len(batch)
        return batch

    def _eager(self, epoch: int, unseen: list[_Tried], validates: bool) -> float:
        try:
            # Only the first step runs with Pyro's checks, which take a fifth of the time.
            with pyro.validation_enabled(validates):
                return self.svi.step(self._batch(unseen[-1].data, unseen[-1].rows))
        except ValueError as error:  # a distribution rejects NaN; other errors recur when the step is run again
            if error is self.refusal:
                raise
            if len(unseen[-1].rows) == 1 and "more than 1 value per channel" in str(error):
                raise ValueError(
                    "a batch of a single datum came to BatchNorm, which needs at least two to train: leave it out, "
                    "DataLoader(..., drop_last=True), or use another batch size"
                ) from error
            verdicts = self.optimizer.verdicts
            # With several processes no step can be skipped: the others wait for this one's gradients.
            if verdicts.num_skipped >= verdicts.max_skipped or distributed.num_ranks() > 1:
                self._stop(epoch, unseen[-1], error)
            if self._culprit(unseen[-1])[0] is None:
                raise
            verdicts(torch.zeros_like(verdicts.was_made))
            return math.nan

    def _watched(self, loss_and_grads: Callable[..., float]) -> Callable[..., float]:
        """Wrap `loss_and_grads`: check the first step, and report a loss that is not finite to the optimizer."""

        def run(model: Program, guide: Program, batch: Tensor) -> float:
            value = loss_and_grads(model, guide, batch) if self.was_checked else self._first(loss_and_grads, batch)
            if not math.isfinite(value):
                self.optimizer.watch(torch.tensor(value))
            return value

        return run

    def _first(self, loss_and_grads: Callable[..., float], batch: Tensor, restored: bool = False) -> float:
        """A step's loss, and an error with nothing moved if no step of these programs can train what they are made of."""
        look, buffers = FirstStep(self.modules, restored), self._buffers()
        value = look.run(loss_and_grads, self.model, self.guide, batch)
        if not math.isfinite(value):
            return value
        if look.masked and not look.observed and self._observes_elsewhere():
            look.observed |= look.masked
        try:
            look.check(self.loss)
            if not self.batches.in_one_order:
                site = site_by_position(self.model, self.guide, batch, list(look.declared.values()), self.modules)
                if site is not None:
                    raise ValueError(by_position(site))
        except ValueError as error:
            _put_back(buffers)
            look.drop_gradients()
            self.refusal = error
            raise
        self.was_checked = True
        return value

    def _observes_elsewhere(self) -> bool:
        """Whether some of the data are not masked out, if those of the first step are; not known of a loader."""
        if not isinstance(train := getattr(self.batches, "train", None), Tensor):
            return True
        devices = [self.device] if self.device.type == "cuda" else []
        look, buffers = FirstStep(self.modules), self._buffers()
        with torch.random.fork_rng(devices), torch.no_grad(), evaluation_mode(*self.modules), look:
            for index in torch.arange(len(train), device=self.device).split(self.batches.full_size):
                run_pair(self.model, self.guide, (self._batch(train, index),), {})
                if look.observed:
                    break
        _put_back(buffers)
        return bool(look.observed)

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        """The modules' buffers with copies, because running means see the numbers of a step before it is skipped."""
        return [(buffer, buffer.clone()) for buffer in nn.ModuleList(self.modules).buffers()]

    def _random_state(self) -> list[Tensor]:
        on_gpu = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_gpu]

    def _culprit(self, tried: _Tried) -> tuple[NonFiniteSource | None, str]:
        """Run a step again, without side effects, and return the source of its bad numbers, and a text about it."""
        devices = [self.device] if self.device.type == "cuda" else []
        buffers = self._buffers()
        with torch.random.fork_rng(devices):
            torch.set_rng_state(tried.random[0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tried.random[1], self.device)
            try:
                culprit = find_non_finite(self.model, self.guide, self.loss, self._batch(tried.data, tried.rows))
            except Exception as again:  # programs may raise any error for NaN
                return None, f"running that step again raises {type(again).__name__}: {again}"
            finally:
                _put_back(buffers)
                for parameter in self.optimizer.parameters:
                    parameter.grad = None
        num_rows = len(tried.rows)
        if culprit is not None and self.num_made.get(num_rows, num_rows) != num_rows:
            culprit = culprit._replace(rows=None)  # rows that the transform made are not those of the data
        finite = "running that step again, eagerly, gives finite numbers"
        elsewhere = "; look at the messages of the other processes" if distributed.num_ranks() > 1 else ""
        return culprit, culprit.what if culprit else finite + elsewhere

    def _warn(self, epoch: int, tried: list[_Tried]) -> None:
        """Log which of these steps were skipped."""
        verdicts = self.optimizer.verdicts
        for step in tried if verdicts.max_skipped and verdicts.num_skipped else ():
            if not step.was_made:
                culprit, what = self._culprit(step)
                where = f", for {culprit.at(step.rows, self.batches.name)[0]}" if culprit else ""
                _logger.warning(
                    "epoch %d, step %d was skipped because its loss or gradient is not finite: %s%s (skipped so far: %d of at "
                    "most %d)",
                    *(epoch, step.step, what, where, int(verdicts.num_skipped), verdicts.max_skipped),
                )

    def _stop(self, epoch: int, tried: _Tried, error: ValueError | None = None, none_made: bool = False) -> None:
        """Raise NotFiniteError with the source of this step's bad numbers, or `error` if they are finite.

        Args:
            epoch: number of the epoch.
            tried: the step.
            error: error that the step raised.
            none_made: whether the epoch ended with all steps of the run skipped.
        """
        culprit, what = self._culprit(tried)
        if culprit is None and error is not None:
            raise error
        where, index = culprit.at(tried.rows, self.batches.name) if culprit else ("", tried.rows.cpu())
        broken = [name for name, p in nn.ModuleList(self.modules).named_parameters() if not p.isfinite().all()]
        verdicts = self.optimizer.verdicts
        num_skipped = min(int(verdicts.num_skipped), verdicts.max_skipped)
        before = "" if none_made else " before"
        raise NotFiniteError(
            ("no step of this run was made, and nothing was trained: " if none_made else "")
            + f"the loss or its gradient is not finite at epoch {epoch}, step {tried.step}: {what}{', for ' if where else ''}{where}"
            + (f"; not finite before that step: {', '.join(broken[:3])}" if broken else "")
            + (f"; {num_skipped} such steps were skipped{before} (max_skipped_steps)" if num_skipped else "")
            + f". {self._advice(tried)}",
            *(culprit.site if culprit else None, epoch, tried.step, index),
        ) from error

    def _advice(self, tried: _Tried) -> str:
        numbers = tried.data[tried.rows].double()
        if not numbers.isfinite().all():
            return "Leave these data out, or replace their values that are not finite"
        if self.optimizer.has_moved:
            return (
                f"Look at these data; lower the learning rate ({self.optimizer.learning_rate:g} in that step) or clip gradients "
                f"(clip_norm=)"
            )
        if numbers.square().mean().sqrt() <= _LARGE:
            return "No step was made before it, so the learning rate is not the cause: look at these data and at the parameters"
        return (
            f"No step was made before it, so the learning rate is not the cause. The data of that step have mean "
            f"{numbers.mean():.3g} and standard deviation {numbers.std(correction=0):.3g}, from {numbers.min():.3g} to "
            f"{numbers.max():.3g}: scale the data, (x - x.mean(0)) / x.std(0) for a table without the columns whose x.std(0) is "
            f"0, or x / 255 for bytes"
        )


@torch.no_grad()
def _put_back(buffers: list[tuple[Tensor, Tensor]], unless: Tensor | None = None) -> None:
    """Restore buffers from their copies."""
    for buffer, before in buffers:
        buffer.copy_(before if unless is None else torch.where(unless, buffer, before))
