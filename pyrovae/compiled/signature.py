"""The signature of a recording: detecting changes of modules and arguments, and restoring modules."""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HOOKS", "LastCall", "Snapshot", "Structure", "kinds"]

_SLOTS, _MODE = itemgetter("_modules", "_parameters", "_buffers"), itemgetter("training")
_VALUES = methodcaller("values")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module
_OF_ALL = [f"_global{kind}" for kind in HOOKS]
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_KIND = attrgetter("shape", "dtype", "requires_grad")


class LastCall:
    """The previous call: a check, faster than the signature, that modules and arguments have not changed.

    A parameter has not changed if its slot holds the same tensor with the same memory; its values may differ. The check
    runs before every step, so its loops are those of Python's own functions.
    """

    def __init__(self, modules: nn.ModuleList, tensors: Sequence[Tensor], run: Callable, values: list[Tensor]):
        self.run, self.values = run, values
        self.insides = [module.__dict__ for module in modules.modules()]
        self.slots, self.modes = self._held(), [*map(_MODE, self.insides)]
        self.held = [value for value in self.slots if isinstance(value, Tensor)]
        self.seen = self._look(tensors)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        now = self._held()
        return (
            len(now) == len(self.slots)
            and all(map(is_, now, self.slots))
            and [*map(_MODE, self.insides)] == self.modes
            and self._look(tensors) == self.seen
        )

    def _held(self) -> list[Any]:
        """What all slots for modules, parameters and buffers hold."""
        return [*chain.from_iterable(map(_VALUES, chain.from_iterable(map(_SLOTS, self.insides))))]

    def _look(self, tensors: Sequence[Tensor]) -> tuple:
        held = self.held
        return [*map(Tensor.data_ptr, held)], [*map(Tensor.stride, held)], [*map(_KIND, held)], kinds(tensors)


def kinds(tensors: Sequence[Tensor]) -> tuple:
    """The properties of tensors and the torch settings for which a recording is valid."""
    kinds = tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors)
    autocast = tuple(
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
    )
    return kinds, torch.get_default_dtype(), autocast


class Structure:
    """What modules consist of: classes, children, parameters, and the hooks of both, to see if any of them is replaced."""

    def __init__(self, modules: nn.ModuleList):
        self.modules, self.before = modules, _structure(modules)

    def changed(self) -> str | None:
        """The path of the first module or parameter of which something was replaced; None if nothing was."""
        now, before = _structure(self.modules), self.before
        for path in now | before:
            if len(now.get(path, ())) != len(before.get(path, ())) or not all(map(is_, now[path], before[path])):
                root, _, inside = path.partition(".")
                return inside or (type(self.modules[int(root)]).__name__ if root.isdigit() else root)
        return None


def _structure(modules: nn.ModuleList) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {
        "hooks of all modules": [hook for kind in _OF_ALL for hook in getattr(nn.modules.module, kind, {}).values()]
    }
    for path, module in modules.named_modules():
        inside = vars(module)
        hooks = (hook for kind in HOOKS for hook in inside[kind].values())
        found[path] = [type(module), *inside["_modules"].values(), *hooks]
        for name, parameter in inside["_parameters"].items():
            hooks_of_it = (getattr(parameter, kind, None) or {} for kind in _OF_PARAMETERS)
            is_trained = parameter is not None and parameter.requires_grad
            found[f"{path}.{name}"] = [parameter, is_trained, *chain.from_iterable(map(_VALUES, hooks_of_it))]
    return found


class Snapshot:
    """The state of modules, to be restored after a program was run for inspection only; `with` does so on exit."""

    def __init__(self, modules: nn.ModuleList):
        self.modules = modules
        self.slots = [_keep(held) for module in modules.modules() for held in (module._parameters, module._buffers)]
        self.others = [_keep(vars(module)) for module in modules.modules()]
        tensors = (*modules.parameters(), *modules.buffers())
        self.values = [_keep_values(tensor) for tensor in tensors]
        plain = (value for _, before in self.others for value in before.values() if isinstance(value, Tensor))
        self.other_values = [_keep_values(tensor) for tensor in plain]

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(self, *_: object) -> None:
        self.put_back()

    def put_back_state(self) -> None:
        """Restore the values of parameters and buffers only."""
        _put_back(self.slots, self.values)

    def put_back(self) -> None:
        """Restore the values of parameters, buffers and attributes."""
        _put_back(self.others, self.other_values)
        self.put_back_state()

    def attributes(self) -> dict[str, Any]:
        """The current numbers, strings and tensors that modules hold besides parameters and buffers."""
        return {
            f"{path}.{name}".removeprefix("."): value.detach().clone() if isinstance(value, Tensor) else value
            for path, module in self.modules.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str | Tensor)
        }


def _keep(held: Any) -> tuple[Any, dict[str, Any]]:
    return held, dict(held.items())


def _keep_values(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A tensor, its memory, and its values."""
    return tensor, tensor.detach(), tensor.detach().clone()


@torch.no_grad()
def _put_back(dictionaries: list[tuple[Any, dict[str, Any]]], values: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for held, before in dictionaries:
        if [*map(id, held.values())] != [*map(id, before.values())] or [*held.keys()] != [*before]:
            held.clear()
            held.update(before)
    for tensor, memory, value in values:
        if tensor.layout != torch.strided:
            tensor.copy_(value)
            continue
        if (tensor.dtype, tensor.shape, tensor.data_ptr()) != (memory.dtype, memory.shape, memory.data_ptr()):
            tensor.data = memory  # other data were assigned to it
        if not torch.equal(tensor, value):
            tensor.copy_(value)
