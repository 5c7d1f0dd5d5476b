"""Describe what the state dict of a module does not hold, to compare a module with that of a file.

That is the class of each module in it, its hooks, and its constants: attributes that its use does not change.
"""

from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from pyrovae.training.attributes import changed_by_use, constants_of
from pyrovae.training.values import DEPTH, describe, same_text

__all__ = ["Description", "describe_module", "difference"]

Description = dict[str, dict[str, Any]]

_CLASS, _NOTHING = "class", "nothing"
_ABSENT = {_CLASS: _NOTHING, "hooks": "()"}
# They hold others or reshape: what they hold is described by itself, and a wrong shape is noticed anyway.
_PASSIVE = {
    *(nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict),
    *(nn.Identity, nn.Flatten, nn.Unflatten, pyro.nn.PyroModule, pyro.nn.PyroModuleList),
}
_LARGEST = 4096  # larger tensors outside the state dict are not compared


def describe_module(module: nn.Module) -> Description:
    """{"likelihood": {"class": "Normal", "hooks": "()", "scale": "0.5"}, ...}.

    Values are text or small tensors. A lazy module has an empty description before its first call, which matches any
    other.
    """
    found = {path: _constants(part) for path, part in _parts(module, "")}
    return {path: part for path, part in found.items() if part != _ABSENT}


def difference(there: Description, here: Description) -> str | None:
    """The first difference, "'likelihood' (Normal) has scale=0.5 in the file and scale=1 here"; None if there is none.

    An attribute that only one side has does not count: the class may have gained it since the file was written.
    """
    for path in dict.fromkeys((*there, *here)):
        found, expected = (side.get(path, _ABSENT) for side in (there, here))
        where = f"'{path}'" if path else "it"
        kind = "" if found.get(_CLASS) == _NOTHING else f" ({found.get(_CLASS)})"
        for name in found:
            if name not in expected or _same(found[name], expected[name]):
                continue
            if name == _CLASS:
                return f"{where} is {found[name]} in the file and {expected[name]} here"
            values = [_shown(side[name]) for side in (found, expected)]
            if values[0] == values[1]:
                values = [f"{values[0]}{other}" for other in ("", " with other values")]
            return f"{where}{kind} has {name}={values[0]} in the file and {name}={values[1]} here"
    return None


def _parts(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and its submodules; shared ones come under each of their names."""
    yield path, module
    if not isinstance(module, AutoGuide):  # it creates its submodules at the first call
        for name, child in module._modules.items():
            if child is not None:
                yield from _parts(child, f"{path}.{name}" if path else name)


def _is_passive(kind: type) -> bool:
    return kind in _PASSIVE or (kind.__name__.startswith("_") and kind.__module__.startswith("pyrovae."))


def _constants(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return {}
    found: dict[str, Any] = {_CLASS: _NOTHING if _is_passive(type(module)) else type(module).__name__}
    found["hooks"] = str(describe(hooks_of(module), DEPTH))
    if isinstance(module, AutoGuide):  # its arguments tell where it starts
        return found
    values = constants_of(module)
    unsaved = module._non_persistent_buffers_set.difference(*changed_by_use(type(module)))
    values |= {name: module._buffers[name] for name in sorted(unsaved)}
    for name, value in values.items():
        if isinstance(value, list | dict | set) and not value:
            continue  # it fills
        is_small = isinstance(value, Tensor) and value.layout is torch.strided and value.numel() <= _LARGEST
        if is_small and not value.requires_grad and not value.is_meta:
            found[name] = value.detach().to("cpu", copy=True)
        elif (text := describe(value, DEPTH)) is not None:
            found[name] = text
    return found


def hooks_of(module: nn.Module) -> tuple:
    """Functions that were given to a module to change what it computes: its hooks, a `forward` of its own."""
    own = [vars(module)["forward"]] if "forward" in vars(module) else []
    return (*own, *module._forward_pre_hooks.values(), *module._forward_hooks.values())


def _same(there: Any, here: Any) -> bool:
    """Whether two values are equal, tensors up to rounding."""
    if isinstance(there, Tensor) and isinstance(here, Tensor):
        if there.shape != here.shape or there.is_complex() != here.is_complex():
            return False
        there, here = (side.to(torch.complex128 if side.is_complex() else torch.float64) for side in (there, here))
        return torch.allclose(there, here, rtol=1e-4, atol=1e-8, equal_nan=True)
    return isinstance(there, str) and isinstance(here, str) and same_text(there, here)


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{value.item():.7g}" if value.numel() == 1 else f"a tensor of shape {tuple(value.shape)}"
