"""Whether programs take the arguments that data make, and what to do if they do not."""

import inspect
from typing import Any

from torch import Tensor, nn

from pyrovae.data.forms import Batch
from pyrovae.programs.traces import Program

__all__ = ["check_same_arguments", "not_taken"]

_SHOWN = 4


def not_taken(model: Program, guide: Program, batch: Batch, name: str) -> str | None:
    """Say which program does not take these arguments, and how to mend it; None if both do, or it cannot be told.

    Args:
        model, guide: the programs.
        batch: what they were called with.
        name: what the batch was made of, for the message.
    """
    for role, program in (("model", model), ("guide", guide)):
        signature = _signature(program)
        if signature is None or _bound(signature, batch) is not None:
            continue
        first = repr(next(iter(batch.kwargs))) if batch.kwargs else 0
        remedy = f"transform=lambda batch: batch[{first}] passes one item on and leaves the others out"
        if len(batch.args) > _SHOWN and all(isinstance(value, Tensor) for value in batch.args):
            remedy += "; torch.stack makes one tensor of a list of rows"
        return (
            f"a batch of {name} has {_described(batch)}, and the programs are called with all of it, but the {role} takes "
            f"{_takes(signature)}. {remedy}; or let model and guide take {'these names' if batch.kwargs else 'them all'}"
        )
    return None


def check_same_arguments(model: Program, batch: Batch, train: Batch) -> None:
    """Raise ValueError if a block of the validation data has other arguments than a batch of the training data."""
    if (len(batch.args), set(batch.kwargs)) == (len(train.args), set(train.kwargs)):
        return
    signature = _signature(model)
    names = [None if signature is None else _bound(signature, of) for of in (batch, train)]
    if names[0] is not None and names[0] == names[1]:
        return
    raise ValueError(
        f"validation has {_described(batch)}, and the batches of train have {_described(train)}: give both the same arguments. "
        f"The transform is applied to validation data that have the several items of the training data"
    )


def _signature(program: Program) -> inspect.Signature | None:
    called: Any = program.forward if isinstance(program, nn.Module) else program
    try:
        return inspect.signature(called)
    except (TypeError, ValueError):  # a builtin
        return None


def _bound(signature: inspect.Signature, batch: Batch) -> dict[str, Any] | None:
    """The names of the parameters that the arguments go to, with the number of those that one of them collects."""
    try:
        bound = signature.bind(*batch.args, **batch.kwargs).arguments
    except TypeError:
        return None
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    return {
        name: len(value) if kinds[name] in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) else 1
        for name, value in bound.items()
    }


def _takes(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})" if signature.parameters else "no arguments"


def _described(batch: Batch) -> str:
    if not batch.kwargs and len(batch.args) == 1:
        return f"one item ({_one(batch.args[0])})"
    names = [f"{key!r}: " for key in batch.kwargs] if batch.kwargs else [""] * len(batch.args)
    values = [*batch.args, *batch.kwargs.values()]
    shown = [f"{name}{_one(value)}" for name, value in zip(names, values, strict=True)]
    more = ", ..." if len(shown) > 2 * _SHOWN else ""
    return f"{len(shown)} item{'s' * (len(shown) > 1)} ({', '.join(shown[: 2 * _SHOWN])}{more})"


def _one(value: Any) -> str:
    return f"{type(value).__name__} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
