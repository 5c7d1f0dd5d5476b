"""Describe what the state dict of a module does not hold, to compare a module with that of a file.

A description holds the class of each submodule and its constants: attributes that the constructor sets and no other
method changes.
"""

from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from pyrovae.training.attributes import attributes_set, constants_of
from pyrovae.training.values import describe, same_text

__all__ = ["Description", "describe_module", "difference"]

Description = dict[str, dict[str, Any]]

_CLASS, _NOTHING = "class", "nothing"
# Containers and reshaping modules: their children are described separately, and shape errors show up anyway.
_PASSIVE = {
    *(nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict),
    *(nn.Identity, nn.Flatten, nn.Unflatten, pyro.nn.PyroModule, pyro.nn.PyroModuleList),
}
_LARGEST = 4096  # larger tensors outside the state dict are not compared


def describe_module(module: nn.Module) -> Description:
    """{"likelihood": {"class": "Normal", "scale": "0.5"}, "likelihood.decoder_net.layers.2": {"class": "SiLU"}, ...}.

    Values are text or small tensors. A lazy module has an empty description before its first call, which matches any
    other.
    """
    found = {path: _constants(part) for path, part in _parts(module, "")}
    return {path: part for path, part in found.items() if part != {_CLASS: _NOTHING}}


def difference(there: Description, here: Description) -> str | None:
    """The first difference, "'likelihood' (Normal) has scale=0.5 in the file and scale=1 here"; None if there is none.

    An attribute that only one side has does not count: the class may have gained it since the file was written.
    """
    for path in dict.fromkeys((*there, *here)):
        found, expected = (side.get(path, {_CLASS: _NOTHING}) for side in (there, here))
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
    if isinstance(module, AutoGuide):  # its arguments only set initial values
        return found
    _, set_by_methods = attributes_set(type(module))
    buffers = {name: module._buffers[name] for name in sorted(module._non_persistent_buffers_set - set_by_methods)}
    for name, value in (constants_of(module) | buffers).items():
        if not isinstance(value, Tensor):
            if (text := describe(value)) is not None:
                found[name] = text
        elif (
            value.layout is torch.strided
            and not value.requires_grad
            and not value.is_meta
            and value.numel() <= _LARGEST
        ):
            found[name] = value.detach().to("cpu", copy=True)
    return found


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
