"""What makes a step faster: recording it as a tensor function (`compile`)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyrovae import data
from pyrovae.common.arguments import map_tensors
from pyrovae.compiled.hidden_state import HiddenState
from pyrovae.compiled.policy import pays_off
from pyrovae.compiled.record import Recording, Results, record
from pyrovae.compiled.signature import Structure
from pyrovae.data.conversion import Numbers
from pyrovae.data.forms import Batch
from pyrovae.objectives.base import Parts
from pyrovae.programs.traces import Program
from pyrovae.training.batches import selected
from pyrovae.training.losses import has_surrogate, surrogate
from pyrovae.training.optimization import OneOptimizer

__all__ = ["Constants", "RecordedStep", "record_step", "step_pays_off"]

_SAVED_PER_STEP = 2e-3  # seconds on two cores: Pyro's handlers, constructors of distributions


def step_pays_off(
    num_steps: int, batch_size: int, programs: Sequence[Program], loss: ELBO, transform: Callable | None
) -> bool:
    """Whether `compile="auto"` records the step: `pyrovae.compiled.policy.pays_off` for its programs, loss and transform."""
    drawing = getattr(transform, "func", transform)  # of a partial
    known = has_surrogate(loss) and drawing in (None, data.binarize, data.dequantize)
    return pays_off(num_steps, batch_size, programs, saved_per_run=_SAVED_PER_STEP, known=known)


def record_step(
    model: Program,
    guide: Program,
    loss: ELBO,
    optimizer: OneOptimizer,
    modules: Sequence[nn.Module],
    transform: Callable[[Any], Any] | None,
    numbers: Numbers,
    train: Batch,
    index: Tensor,
    medium: bool = False,
) -> "RecordedStep | None":
    """Record the step of `SVI(model, guide, optimizer, loss)` on these data; None if that is impossible.

    The recording chooses the rows, transforms them, and computes the loss, its gradients, whether they are finite, and
    the clipped gradients. torch's optimizer follows it with a kernel of its own: a recorded Adam is hardly faster than
    the fused one, and takes the compiler several seconds more (measured in `docs/benchmarks.md`).
    """
    tensors, kind = _apart(train)

    def objective(*given: Tensor) -> tuple[Tensor, ...]:
        held = iter(given)
        args, kwargs = map_tensors(lambda _: next(held), (train.args, train.kwargs))
        batch = selected(train._replace(args=args, kwargs=kwargs), next(held), transform, numbers)
        return surrogate(loss, model, guide, *batch.args, **batch.kwargs)

    # An objective that changes with the steps (KL warm-up) keeps its state in buffers of its own modules.
    changed = [*modules, *getattr(loss, "modules", ())]
    finish = None
    if optimizer is not None and optimizer.is_judged_alone:  # None in tests that look at the gradients alone
        changed.append(optimizer.guard)
        trained = [p for p in nn.ModuleList(changed).parameters() if p.requires_grad]
        finish = partial(_finish, optimizer, [parameter in set(optimizer.parameters) for parameter in trained])
    recording = record(objective, changed, (*tensors, index), gradients=True, medium=medium, finish=finish)
    return None if recording is None else RecordedStep(recording, kind, optimizer, getattr(loss, "advance", None))


def _finish(
    optimizer: OneOptimizer, are_moved: Sequence[bool], outputs: list[Tensor], gradients: list[Tensor | None]
) -> Results:
    """Judge the step and clip its gradients in the recording; the last output holds what the history sums."""
    there = [g for g, is_moved in zip(gradients, are_moved, strict=True) if is_moved and g is not None]
    norm = nn.utils.get_total_norm(there, foreach=False)
    optimizer.guard((norm + outputs[0]).isfinite())
    if optimizer.clip_norm is not None:
        factor = (optimizer.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        gradients = [None if gradient is None else gradient * factor for gradient in gradients]
    row = torch.stack([*outputs, torch.ones_like(outputs[0])])
    return [*outputs, torch.where(optimizer.guard.was_made, row, 0.0)], gradients


def _apart(data: Batch) -> tuple[list[Tensor], Any]:
    """Split the data into tensors and everything else, which a recording keeps as constants."""
    tensors: list[Tensor] = []

    def take(tensor: Tensor) -> type:
        tensors.append(tensor)
        return Tensor

    return tensors, (map_tensors(take, (data.args, data.kwargs)), data.num_data, data.has_rows)


class Constants:
    """What a recorded step keeps as it was: the modules' parts, Python values behind the programs, numbers of the loss.

    Args:
        model, guide, loss, modules, transform: as for `record_step`.
        train: the training data, if they are in memory.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        loss: ELBO,
        modules: Sequence[nn.Module],
        transform: Callable[[Any], Any] | None,
        train: Batch | None,
    ):
        self.loss, self.numbers = loss, _numbers(loss)
        held = nn.ModuleList(modules)
        data = [] if train is None else train.tensors.values()  # arguments of the recording
        self.structure = Structure(held)
        self.hidden = HiddenState([model, guide, transform, *modules], [*held.parameters(), *held.buffers(), *data])

    def changed(self) -> str | None:
        """The name of the first value or part that has changed; None if none has."""
        now = _numbers(self.loss)
        name = next((name for name in now | self.numbers if now.get(name) != self.numbers.get(name)), None)
        return name or self.structure.changed() or self.hidden.changed_value()


def _numbers(loss: ELBO) -> dict[str, Any]:
    return {name: value for name, value in vars(loss).items() if isinstance(value, bool | int | float | str)}


class RecordedStep:
    """Compute gradients with a recording, then make the optimizer's step, as `SVI.step` does.

    Args:
        recording: the loss, its parts and its gradients.
        kind: what the data hold besides tensors.
        optimizer: optimizer of the parameters.
        advance: function that tells the objective that a step was made, or None.
    """

    def __init__(self, recording: Recording, kind: Any, optimizer: OneOptimizer, advance: Callable[[], None] | None):
        self.recording, self.kind, self.optimizer, self.advance = recording, kind, optimizer, advance
        self.parameters = recording.parameters

    def takes(self, data: Batch) -> bool:
        """Whether the data differ from those recorded in the values of tensors only."""
        return bool(_apart(data)[1] == self.kind)

    def __call__(self, data: Batch, index: Tensor) -> tuple[Tensor, list[Parts], Tensor | None]:
        """Make a step and return (loss, parts of the ELBO, row), summed over the batch.

        The row holds loss, reconstruction, KL and 1, or zeros if the step was skipped; None if the recording does not
        decide that.
        """
        (value, reconstruction, kl, *row), gradients = self.recording(*_apart(data)[0], index)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if not row:
            self.optimizer.watch(value)
        self.optimizer(self.optimizer.parameters, is_judged=bool(row))
        if self.advance is not None:
            self.advance()
        return value, [Parts(reconstruction, kl, None)], row[0] if row else None
