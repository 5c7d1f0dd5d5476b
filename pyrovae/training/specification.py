"""Specify how to build a model and a guide again, in plain values: names of the library's parts, and their arguments.

    {"parts": [{"part": "nets.MLP", "arguments": [12, [8]], "options": {}}, ...], "roots": [4, 6]}

Each part comes once, before the parts that it is an argument of, so that shared parts are shared again. Only names
listed here are looked up, so that a file can build these parts and nothing else.
"""

import inspect
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae import guides, likelihoods, nets, priors
from pyrovae.common.component import Component, Unknown
from pyrovae.models.generative import GenerativeModel
from pyrovae.models.hierarchy import BottomUpGuide, HierarchicalModel, TopDownGuide
from pyrovae.models.layers import ConditionalNormal
from pyrovae.models.mixture import MixtureVAE
from pyrovae.training.attributes import hooks_of

__all__ = ["NotSpecifiedError", "build", "specify"]

_ROLES = {"guides": guides, "likelihoods": likelihoods, "nets": nets, "priors": priors}
_PARTS = {
    f"{role}.{name}": getattr(module, name)
    for role, module in _ROLES.items()
    for name in module.__all__
    if not inspect.isabstract(getattr(module, name))
} | {
    f"models.{kind.__name__}": kind
    for kind in (BottomUpGuide, ConditionalNormal, GenerativeModel, HierarchicalModel, MixtureVAE, TopDownGuide)
}
_ACTIVATIONS = {name: getattr(nn, name) for name in torch.nn.modules.activation.__all__}
_NAMES = {kind: name for name, kind in (_PARTS | _ACTIVATIONS).items()}


class NotSpecifiedError(ValueError):
    """Raised if plain values cannot specify a module; the message says which one and why."""


def specify(*modules: nn.Module) -> dict[str, Any]:
    """Specify how to build these modules again.

    Raises:
        NotSpecifiedError: if a part is not the library's, a file cannot hold an argument, or a module was changed after
            construction, so that its arguments no longer build it.
    """
    for part in nn.ModuleList(modules).modules():
        if hooks_of(part):
            raise NotSpecifiedError(f"{type(part).__name__} has a hook or a forward of its own, which no file can hold")
    writer = _Writer()
    tensors = list(_tensors(modules).values())
    floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    specification = {
        "roots": [writer.write(type(module).__name__, module) for module in modules],
        "parts": writer.parts,
        "dtype": _name(floating[0]) if floating else None,
        "frozen": [name for name, tensor in _tensors(modules).items() if _is_frozen(tensor)],
    }
    with torch.random.fork_rng(devices=[]):
        try:
            again = build(specification)
        except Exception as error:  # arguments that were changed later may raise any error
            raise NotSpecifiedError(f"its arguments do not make it again ({error})") from error
        for module, other in zip(modules, again, strict=True):
            if repr(module) != repr(other) or _kinds([module]) != _kinds([other]):
                raise NotSpecifiedError(f"{type(module).__name__} was changed after it was made")
    return specification


def build(specification: dict[str, Any]) -> list[nn.Module]:
    """Build the modules of a specification, with new parameters, on the CPU.

    Raises:
        ValueError: if a name is not listed here. Constructors of the parts may raise other errors.
    """
    built: list[nn.Module] = []
    with torch.device("cpu"):
        for entry in specification["parts"]:
            if entry["part"] not in _PARTS:
                raise ValueError(f"there is no part {entry['part']!r} in this version of pyrovae")
            options = {name: _read(value, built) for name, value in entry["options"].items()}
            built.append(_PARTS[entry["part"]](*_read(entry["arguments"], built), **options))
    roots = [built[index] for index in specification["roots"]]
    if specification["dtype"] is not None:
        for root in roots:
            root.to(getattr(torch, specification["dtype"]))
    tensors = _tensors(roots)
    for name in specification["frozen"]:
        tensors[name].requires_grad_(False)
    return roots


class _Writer:
    """Write each part once into a list; other entries refer to it by its place."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []
        self.places: dict[int, int] = {}

    def write(self, where: str, part: nn.Module) -> int:
        if id(part) not in self.places:
            if not isinstance(part, Component) or type(part) not in _NAMES:
                raise NotSpecifiedError(f"{where} is no part of pyrovae ({type(part).__name__})")
            arguments, options = part.made_with
            entry = {
                "part": _NAMES[type(part)],
                "arguments": self._plain(where, arguments),
                "options": {name: self._plain(where, value) for name, value in options.items()},
            }
            self.places[id(part)] = len(self.parts)
            self.parts.append(entry)
        return self.places[id(part)]

    def _plain(self, where: str, value: Any) -> Any:
        if isinstance(value, Component):
            return {"built": self.write(f"{type(value).__name__} in {where}", value)}
        if isinstance(value, type):
            if value not in _ACTIVATIONS.values():
                raise NotSpecifiedError(f"an argument of {where} is the class {value.__name__}")
            return {"activation": _NAMES[value]}
        if isinstance(value, Unknown):
            raise NotSpecifiedError(f"an argument of {where} is a {value.kind}")
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True)
        if isinstance(value, tuple | list):
            items = [self._plain(where, item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        kinds = (kind for kind in (bool, int, float, str) if isinstance(value, kind))
        return value if value is None else next(kinds)(value)  # NumPy's float64 is a subclass of float


def _read(value: Any, built: Sequence[nn.Module]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_read(item, built) for item in value)
    if not isinstance(value, dict):
        return value
    return built[value["built"]] if "built" in value else _ACTIVATIONS[value["activation"]]


def _tensors(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    together = nn.ModuleList(modules)
    return dict(chain(together.named_parameters(), together.named_buffers()))


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _kinds(modules: Sequence[nn.Module]) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype, _is_frozen(tensor)) for name, tensor in _tensors(modules).items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
