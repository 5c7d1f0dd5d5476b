"""The steps of an epoch: Pyro's `SVI.step`, or its recording; and a stop where numbers stop being finite."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from pyro.infer import ELBO, SVI
from torch import Tensor, nn

from pyrovae import distributed
from pyrovae.programs.traces import Program
from pyrovae.training.numbers import NotFiniteError, find_culprit
from pyrovae.training.optimization import OneAdam
from pyrovae.training.parts import ElboParts, parts_of
from pyrovae.training.recorded import RecordedStep, record_step

__all__ = ["Schedule", "Steps"]

_LOOK_EVERY = 50  # steps, on a GPU: to look at a number there is to wait for it


class Schedule(NamedTuple):
    """The learning rate at a fraction of the training.

    shape: factor at a fraction done, None: constant
    """

    learning_rate: float
    shape: Callable[[float], float] | None

    def __call__(self, done: float) -> float:
        return self.learning_rate * (self.shape(done) if self.shape else 1.0)


class _Made(NamedTuple):
    """A step that was made, as it may have to be made again."""

    step: int
    rows: Tensor
    random: list[Tensor]


class Steps:
    """The steps of `SVI(model, guide, optimizer, loss)` on shuffled batches of the training data.

    compiles: record the step once an epoch has been run eagerly
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        loss: ELBO,
        optimizer: OneAdam,
        modules: list[nn.Module],
        train: Tensor,
        batch_size: int,
        transform: Callable[[Tensor], Tensor] | None,
        compiles: bool,
    ):
        self.model, self.guide, self.loss, self.optimizer, self.modules = model, guide, loss, optimizer, modules
        self.train, self.batch_size, self.transform = train, batch_size, transform
        self.svi = SVI(model, guide, optimizer, loss=loss)
        self.compiles = compiles
        self.recorded: RecordedStep | None = None
        self.look_every = _LOOK_EVERY if train.is_cuda else 1

    @property
    def per_epoch(self) -> int:
        return -(-len(self.train) // self.batch_size)

    def get_ready(self) -> None:
        """Run the loss once, in place of the epochs before: for what it and Pyro's store learn of programs in their first step.

        To be called before the state is put back, which undoes everything else that this changes.
        """
        with torch.no_grad():
            self.loss.loss(
                self.model, self.guide, self._batch(torch.arange(self.batch_size).clamp_max(len(self.train) - 1))
            )

    def epoch(
        self, number: int, epochs: int, rate: Schedule, full_size: int | None, progress: Callable[[int], object]
    ) -> tuple[float, ElboParts]:
        """(minus the loss per datum, its parts) of one epoch.

        Raises NotFiniteError where the loss or a gradient is NaN or infinite; the parameters are then as before that step.
        """
        shuffled = torch.randperm(len(self.train), device=self.train.device)
        distributed.same_everywhere([shuffled])
        order = [distributed.share(index) for index in shuffled.split(self.batch_size)]
        full = len(order[0])
        if number > 1 and self.compiles and len(self.train) >= self.batch_size:
            self.compiles = False
            self.recorded = record_step(
                *(self.model, self.guide, self.loss, self.optimizer, self.modules), self.transform, self.train, order[0]
            )
        objective = torch.zeros((), dtype=torch.float64, device=self.train.device)
        unseen: list[_Made] = []
        value: Tensor | float
        updates = self.optimizer.num_updates
        with parts_of(self.loss, full_size) as parts:
            for step, index in enumerate(order):
                self.optimizer.learning_rate = rate((number - 1 + (step + 0.5) / self.per_epoch) / epochs)
                unseen.append(_Made(step + 1, index, self._random_state()))
                if self.recorded is not None and len(index) == full:
                    value, reconstruction, kl = self.recorded(self.train, index)
                    parts.add(reconstruction, kl)
                else:
                    value = self._eager(number, unseen, validates=number == 1 and step == 0)
                parts.count(len(index))
                objective = objective - value
                if len(unseen) == self.look_every or step + 1 == len(order):
                    if not self.optimizer.is_finite:
                        self._stop(number, unseen[int(self.optimizer.num_updates - updates)])
                    unseen, updates = [], self.optimizer.num_updates
                progress(len(index))
        total, parts.reconstruction, parts.kl, num_data = distributed.sums(
            objective, parts.reconstruction, parts.kl, parts.num_data
        )
        parts.num_data = int(num_data)
        return total / num_data, parts

    def _batch(self, index: Tensor) -> Tensor:
        batch = self.train[index.to(self.train.device)]
        return batch if self.transform is None else self.transform(batch)

    def _eager(self, epoch: int, unseen: list[_Made], validates: bool) -> float:
        try:
            # The first step runs with Pyro's checks on; they cost a fifth of the time.
            with pyro.validation_enabled(validates):
                value = self.svi.step(self._batch(unseen[-1].rows))
        except ValueError as error:  # a distribution refuses NaN; other errors come again when the step is run again
            self._stop(epoch, unseen[-1], error)
        if not math.isfinite(value) and self.optimizer.is_finite:  # finite gradients of a loss that is not
            self._stop(epoch, unseen[-1])
        return value

    def _random_state(self) -> list[Tensor]:
        on_gpu = [torch.cuda.get_rng_state(self.train.device)] if self.train.is_cuda else []
        return [torch.get_rng_state(), *on_gpu]

    def _stop(self, epoch: int, made: _Made, error: ValueError | None = None) -> None:
        """Raise NotFiniteError, saying where the numbers of this step went wrong; the `error` it raised if they did not."""
        torch.set_rng_state(made.random[0])
        if self.train.is_cuda:
            torch.cuda.set_rng_state(made.random[1], self.train.device)
        try:
            culprit = find_culprit(self.model, self.guide, self.loss, self._batch(made.rows))
            finite = "running that step again, eagerly, gives finite numbers"
            elsewhere = "; look at what the other processes say" if distributed.num_ranks() > 1 else ""
            what = culprit.what if culprit else finite + elsewhere
        except Exception as again:  # what a program makes of NaN is not one type
            culprit, what = None, f"running that step again raises {type(again).__name__}: {again}"
        if culprit is None and error is not None:
            raise error
        where, index = culprit.at(made.rows) if culprit else ("", made.rows.cpu())
        broken = [name for name, p in nn.ModuleList(self.modules).named_parameters() if not p.isfinite().all()]
        raise NotFiniteError(
            f"the loss or its gradient is not finite at epoch {epoch}, step {made.step}: {what}{', for ' if where else ''}{where}"
            + (f"; not finite before that step: {', '.join(broken[:3])}" if broken else "")
            + f". Look at these data; lower the learning rate ({self.optimizer.learning_rate:g} in that step) or clip gradients "
            f"(clip_norm=)",
            *(culprit.site if culprit else None, epoch, made.step, index),
        ) from error
