"""How `fit` prepares a run: it checks the options once, and makes batches and the optimizer from programs and data."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyrovae.common import distributed
from pyrovae.common.arguments import check_count, check_positive
from pyrovae.data.conversion import check_same_columns
from pyrovae.programs.parameters import check_program, numbers_of
from pyrovae.programs.precision import check_precision, in_precision
from pyrovae.programs.reach import modules_behind
from pyrovae.programs.traces import Program
from pyrovae.training.acceleration import step_pays_off
from pyrovae.training.batches import Batches, batches_of
from pyrovae.training.callbacks import Callback
from pyrovae.training.losses import check_loss, default_loss
from pyrovae.training.optimization import OneOptimizer, Schedule, schedule_message
from pyrovae.training.optimizer_factory import fused_adam, optimizer_factory
from pyrovae.training.validation import ValidationData

__all__ = ["Options", "Run", "pick_device", "prepare", "put_back"]

_RATE = 1e-3  # of Adam


@dataclass(frozen=True)
class Options:
    """The options of `fit`, except programs and data; `fit` documents them."""

    epochs: int
    batch_size: int | None
    optimizer: Any
    learning_rate: float | None
    schedule: Callable[[float], float] | None
    accumulate: int
    average: float | None
    patience: int | None
    callback: Callback | None
    loss: ELBO | None
    transform: Callable[[Any], Any] | None
    clip_norm: float | None
    max_skipped_steps: int
    compile: bool | Literal["auto"]
    precision: Literal["float32", "medium", "bf16"]
    checkpoint: str | os.PathLike | None
    checkpoint_every: float
    resume: bool
    device: str | torch.device
    progress: bool

    def checked(self) -> "Options":
        """Return the options with numbers of plain types, which a checkpoint can hold, and the device chosen.

        Raises:
            TypeError, ValueError: for an option that training cannot use.
        """
        check_count("epochs", self.epochs)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        check_count("max_skipped_steps", self.max_skipped_steps, least=0)
        self._check_optimizer()
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        if self.transform is not None and not callable(self.transform):
            raise TypeError(f"transform must be a function of a batch, or None; found {self.transform!r}")
        if self.schedule is not None and not callable(self.schedule):
            raise TypeError(schedule_message(self.schedule, "cannot be called"))
        self._check_checkpoint()
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', found {self.compile!r}")
        check_precision(self.precision)
        return replace(
            self,
            epochs=int(self.epochs),
            batch_size=None if self.batch_size is None else int(self.batch_size),
            learning_rate=None if self.optimizer is not None else float(self.learning_rate or _RATE),
            accumulate=int(self.accumulate),
            average=None if self.average is None else float(self.average),
            patience=None if self.patience is None else int(self.patience),
            clip_norm=None if self.clip_norm is None else float(self.clip_norm),
            max_skipped_steps=int(self.max_skipped_steps),
            loss=None if self.loss is None else check_loss(self.loss),
            device=pick_device(self.device),
        )

    def _check_optimizer(self) -> None:
        if self.learning_rate is not None:
            if self.optimizer is not None:
                raise ValueError(
                    f"found learning_rate={self.learning_rate} beside optimizer=, which has a rate of its own: give it there, "
                    f"optimizer=functools.partial(torch.optim.AdamW, lr={self.learning_rate})"
                )
            check_positive("learning_rate", self.learning_rate)
        check_count("accumulate", self.accumulate)
        if self.patience is not None:
            check_count("patience", self.patience)
        if self.average is not None:
            check_positive("average", self.average)
            if not self.average < 1:
                raise ValueError(
                    f"average is the weight that the moving average keeps at each step, between 0 and 1, 0.999 for example; "
                    f"found {self.average}"
                )
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be a function of the progress of the run, or None; found {self.callback!r}")

    def _check_checkpoint(self) -> None:
        if self.resume not in (True, False):
            raise TypeError(f"resume must be True or False, found {self.resume!r}")
        if self.resume and self.checkpoint is None:
            raise ValueError("found resume=True without a checkpoint to resume: give checkpoint= its path")
        if isinstance(self.checkpoint_every, bool) or not isinstance(self.checkpoint_every, Real):
            raise TypeError(f"checkpoint_every must be a number of seconds, found {self.checkpoint_every!r}")
        if not self.checkpoint_every >= 0:
            raise ValueError(f"checkpoint_every must be 0 seconds or more, found {self.checkpoint_every}")


@dataclass(frozen=True)
class Run:
    """Everything that a run needs: programs, data, optimizer.

    Attributes:
        model, guide: the programs as given, to validate.
        programs: the two in the precision of training.
        modules: the modules behind the programs, on the device.
        loss: loss of the training.
        batches: the training data.
        validation: validation data, or None.
        optimizer: optimizer of all parameters of the modules.
        schedule: factor of the learning rates as a function of the fraction of training done.
        epochs: passes over the data.
        compiles: whether to record the step after the first epoch.
        precision: of the training, see `in_precision`.
        device: device of the training.
    """

    model: Program
    guide: Program
    programs: tuple[Program, Program]
    modules: Sequence[nn.Module]
    loss: ELBO
    batches: Batches
    validation: ValidationData | None
    optimizer: OneOptimizer
    schedule: Schedule
    epochs: int
    compiles: bool
    precision: str
    device: torch.device

    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        """The modules' buffers with copies, for `put_back`."""
        return [(buffer, buffer.clone()) for buffer in nn.ModuleList(self.modules).buffers()]

    def gpus(self) -> list[torch.device]:
        """The device, if it is a GPU, for `torch.random.fork_rng`."""
        return [self.device] if self.device.type == "cuda" else []


def prepare(model: Program, guide: Program, train: Any, validation: Any, options: Options) -> Run:
    """Check programs and data, move them to the device, and make optimizer and batches.

    Raises:
        TypeError, ValueError: for programs or data that training cannot use.
    """
    check_program("model", model)
    check_program("guide", guide)
    if validation is None and options.patience is not None:
        raise ValueError(
            f"found patience={options.patience} without validation data, whose bound tells when to stop: give validation="
        )
    device = torch.device(options.device)
    loss = default_loss(model) if options.loss is None else options.loss
    modules = modules_behind(model, guide)
    batches = batches_of(train, options.batch_size, options.transform, device, numbers_of(model, guide))
    check_same_columns(train=train, validation=validation)
    held_out = None if validation is None else ValidationData(validation, batches)
    modules = [module.to(device) for module in modules]
    _check_not_lazy(modules)
    optimizer = _optimizer(modules, options)
    distributed.same_everywhere(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    distributed.random_numbers_apart()
    compiles = options.compile
    if compiles == "auto":
        num_steps = options.epochs * batches.per_epoch
        compiles = step_pays_off(num_steps, batches.batch_size, (model, guide), loss, options.transform)
    trained_model, trained_guide = in_precision(options.precision, model, guide)
    return Run(
        model=model,
        guide=guide,
        programs=(trained_model, trained_guide),
        modules=modules,
        loss=loss,
        batches=batches,
        validation=held_out,
        optimizer=optimizer,
        schedule=Schedule(options.schedule),
        epochs=options.epochs,
        compiles=compiles,
        precision=options.precision,
        device=device,
    )


def _optimizer(modules: Sequence[nn.Module], options: Options) -> OneOptimizer:
    parameters: list[Tensor] = [p for module in modules for p in module.parameters()]
    if options.optimizer is None:
        factory = fused_adam(options.learning_rate or _RATE)
    else:
        names: dict[Tensor, str] = {}
        for name, parameter in (pair for module in modules for pair in module.named_parameters()):
            if parameter.requires_grad:
                names.setdefault(parameter, name)
        factory = optimizer_factory(options.optimizer, names, is_scheduled=options.schedule is not None)
    return OneOptimizer(
        parameters,
        clip_norm=options.clip_norm,
        max_skipped=options.max_skipped_steps,
        factory=factory,
        accumulate=options.accumulate,
        average=options.average,
    )


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Choose the device.

    Args:
        device: "auto" takes CUDA if there is a GPU, else the CPU; any other name is taken as given.

    Raises:
        ValueError: if the name is unknown, or CUDA is requested and there is no GPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', or one of torch's; found {device!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was requested, but torch finds no GPU: take device='auto' or 'cpu'")
    return device


@torch.no_grad()
def put_back(buffers: list[tuple[Tensor, Tensor]], unless: Tensor | None = None) -> None:
    """Restore buffers from their copies."""
    for buffer, before in buffers:
        buffer.copy_(before if unless is None else torch.where(unless, buffer, before))


def _check_not_lazy(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        for name, parameter in module.named_parameters():
            if is_lazy(parameter):
                raise ValueError(
                    f"'{name}' of {type(module).__name__} is a parameter of a lazy module, and has no shape yet: call the module "
                    f"once on a batch before fit"
                )
