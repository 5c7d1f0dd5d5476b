"""What `fit` shows a callback after each epoch, and how it calls one so that the run's numbers stay as they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pyrovae.common import distributed
from pyrovae.programs.traces import Program
from pyrovae.training.state import TrainingState, random_state, set_random_state

__all__ = ["Callback", "Progress", "call"]


@dataclass(frozen=True)
class Progress:
    """A run after an epoch, for a callback.

    Attributes:
        row: the history's row of the epoch (see `FitResult`); a copy.
        history: the rows so far; copies.
        epoch: number of the epoch, counted from 1.
        model, guide: the programs, with the weights that were validated: the averaged ones with `average=`.
        optimizer: the torch optimizer. Each step sets the "lr" of a group to its "initial_lr" times the schedule's factor.
            None if every step so far was skipped before its gradients.
        best_epoch: epoch with the best validation bound so far; 0 without one.
    """

    row: dict[str, float]
    history: Sequence[dict[str, float]]
    epoch: int
    model: Program
    guide: Program
    optimizer: Optimizer | None
    best_epoch: int


Callback = Callable[[Progress], bool | None]


def call(callback: Callback, model: Program, guide: Program, state: TrainingState) -> bool:
    """Call a callback and return whether it, in any process, stops the run.

    The random generators and the modes of the modules (training or evaluation) are as before afterwards.

    Raises:
        TypeError: if it returns anything but a bool or None.
    """
    history = tuple(dict(row) for row in state.history)
    progress = Progress(
        dict(history[-1]), history, len(history), model, guide, state.optimizer.inner, best_epoch=state.best_epoch
    )
    random = random_state(state.device)
    modes = [(module, module.training) for module in nn.ModuleList(state.modules).modules()]
    with state.averaged():
        answer: Any = callback(progress)
    for module, mode in modes:
        module.training = mode
    set_random_state(random, state.device)
    if answer is not None and answer not in (True, False):
        raise TypeError(
            f"callback must return True to stop the run, or False or None to continue, and returned {answer!r} after epoch "
            f"{progress.epoch}"
        )
    return bool(distributed.sums(float(bool(answer)))[0])
