"""Describe values and functions as text, to compare those in a file with the current ones.

A user's function is described by its name, a digest of its code, and the plain values that it uses from outside.
Functions of installed packages are described by name only, so that a new version of a package counts as the same
function.
"""

import argparse
import dataclasses
import enum
import functools
import hashlib
import inspect
import numbers
import re
import sys
import types
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrovae.training.attributes import changed_in, constants_of, is_circumstance, is_free, is_of_library, names_in

__all__ = ["DEPTH", "checksum", "describe", "describe_callable", "describe_program", "same_text"]

DEPTH = 6
_MOST_SHOWN = 100  # items
_CODE = re.compile(r" \(code [0-9a-f]{8} of ([\w-]+)\)")
_BOOL = re.compile(r"\b(True|False)\b")
_COUNTED = re.compile(r"running_|num_batches_tracked")  # buffers of batch normalisation
# Objects of installed classes that are told by what they were made of.
_PLAIN = (types.SimpleNamespace, argparse.Namespace, Distribution, Messenger)


def describe(value: Any, depth: int = 0, seen: dict[int, Any] | None = None) -> str | None:
    """Text for a number, string, class, function, or a tuple or data class of them; None for what is not plain.

    Args:
        value: Anything.
        depth: Above 0, lists, dicts, sets, tensors, a user's objects, distributions and Pyro's handlers are plain, too, so many
            inside each other.
        seen: By their ids, functions and objects that were described before, or are described by themselves: each is told once.

    Returns:
        The text, or None.
    """
    seen = {} if seen is None else seen
    if value is None or isinstance(value, bool | str | bytes | complex | torch.dtype | enum.Enum):
        return repr(value)
    if isinstance(value, numbers.Integral):
        return repr(int(value))
    if isinstance(value, numbers.Real):
        return f"{float(value):.7g}"  # 1.0 and 1 count as equal, and so do 0.1 in float32 and in float64
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, functools.partial) or inspect.isroutine(value):
        return _function(value, seen)
    if isinstance(value, tuple) or (depth and isinstance(value, list | set | frozenset)):
        if depth == 0:
            items = [describe(item, 0, seen) for item in value]
            return None if None in items else f"({', '.join(map(str, items))})"
        texts = [_or_kind(item, depth - 1, seen) for item in value]
        return _shortened(texts if isinstance(value, tuple | list) else sorted(texts))
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        return f"{type(value).__name__}({_listed(fields, depth, seen)})"
    if not depth:
        return None
    if isinstance(value, Mapping):
        return f"{{{_listed({key: item for key, item in value.items() if not is_free(str(key))}, depth, seen)}}}"
    if isinstance(value, Tensor | np.ndarray):
        is_constant = isinstance(value, np.ndarray) or not (value.requires_grad or value.is_meta)
        return checksum(value) if is_constant else None
    is_plain = isinstance(value, _PLAIN) or not is_of_library(type(value))
    return _object(value, depth - 1, seen) if is_plain or callable(value) else None


def describe_callable(function: Any) -> str:
    """Text for a function, class, method, partial, or an object that is called."""
    return str(describe(function, DEPTH))


def describe_program(program: Any, modules: Iterable[nn.Module]) -> str:
    """Text for a Pyro program, but for the modules in it, which are described by themselves."""
    parts = {id(part): part for module in modules for part in module.modules()}
    return str(describe(program, DEPTH, parts))


def checksum(data: Tensor | np.ndarray) -> str:
    """Describe an array by its shape, its dtype and a checksum of its numbers."""
    if isinstance(data, Tensor):
        tensor = data.detach().cpu().to_dense().resolve_conj().resolve_neg()
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    elif data.dtype.hasobject:
        return f"{tuple(data.shape)} {data.dtype}"
    else:
        content = np.frombuffer(np.ascontiguousarray(data).tobytes(), dtype=np.uint8)
    return f"{tuple(data.shape)} {data.dtype} with checksum {zlib.crc32(content.data):08x}"


def same_text(there: str, here: str) -> bool:
    """Whether two descriptions are the same; the code in them is compared if one version of Python compiled it."""
    there, here = (_BOOL.sub(lambda found: str(int(found[0] == "True")), side) for side in (there, here))
    if set(_CODE.findall(there)) == set(_CODE.findall(here)):
        return there == here
    return _CODE.sub("", there) == _CODE.sub("", here)


def _listed(values: Mapping[Any, Any], depth: int, seen: dict[int, Any]) -> str:
    texts = [f"{name}={_or_kind(value, max(depth - 1, 0), seen)}" for name, value in values.items()]
    return ", ".join(texts) if len(texts) <= _MOST_SHOWN else _shortened(texts)


def _or_kind(value: Any, depth: int, seen: dict[int, Any]) -> str:
    text = describe(value, depth, seen)
    return type(value).__name__ if text is None else text


def _shortened(texts: list[str]) -> str:
    """Many items as a checksum."""
    if len(texts) <= _MOST_SHOWN:
        return f"({', '.join(texts)})"
    return f"{len(texts)} items with checksum {zlib.crc32(chr(10).join(texts).encode()):08x}"


def _object(thing: Any, depth: int, seen: dict[int, Any]) -> str:
    """An object, by its class and its constants; a module also by the buffers that its use does not change."""
    kind = type(thing)
    if id(thing) in seen:
        return kind.__name__
    seen[id(thing)] = thing
    has_repr = kind.__repr__ not in (object.__repr__, nn.Module.__repr__)
    if has_repr and is_of_library(kind) and not isinstance(thing, _PLAIN) and " at 0x" not in repr(thing):
        return repr(thing)
    values = constants_of(thing)
    if isinstance(thing, nn.Module):
        values |= {name: child if id(child) in seen else repr(child) for name, child in thing.named_children()}
        values |= {name: buffer for name, buffer in thing.named_buffers() if not _COUNTED.search(name)}
    return f"{kind.__name__}({_listed(values, depth, seen)})"


def _function(function: Any, seen: dict[int, Any]) -> str:
    if id(function) in seen:
        return "itself"
    seen[id(function)] = function
    if isinstance(function, functools.partial):
        given = [_or_kind(value, DEPTH, seen) for value in (function.func, *function.args)]
        keywords = {name: value for name, value in sorted(function.keywords.items()) if not is_circumstance(name)}
        named = [_listed(keywords, DEPTH, seen)] if keywords else []
        return f"partial({', '.join([*given, *named])})"
    if inspect.ismethod(function):
        owner = function.__self__
        held = {} if id(owner) in seen or isinstance(owner, nn.Module | type) else constants_of(owner)
        seen[id(owner)] = owner
        return f"{type(owner).__name__}({_listed(held, DEPTH, seen)}).{_function(function.__func__, seen)}"
    name = getattr(function, "__name__", type(function).__name__)
    if not inspect.isfunction(function) or is_of_library(function):
        return name
    text = f"{name} (code {_digest(function.__code__, function.__doc__)} of {sys.implementation.cache_tag})"
    outside = [f"{key}={value}" for key, value in _outside(function, seen)]
    return f"{text} with {', '.join(outside)}" if outside else text


def _outside(function: types.FunctionType, seen: dict[int, Any]) -> Iterator[tuple[str, str]]:
    """What a function takes from outside by name, if it is plain and the function does not change it itself."""
    code = function.__code__
    defaults = function.__defaults__ or ()
    with_default = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    found = dict(zip(with_default, defaults, strict=True)) | (function.__kwdefaults__ or {})
    found |= {
        name: function.__globals__[name] for name in names_in(code, "LOAD_GLOBAL") if name in function.__globals__
    }
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell
            found[name] = cell.cell_contents
    assigned, filled = changed_in(code)
    for name, value in sorted(found.items()):
        is_filled = name in filled and isinstance(value, list | dict | set | Tensor | np.ndarray)
        if name in assigned or is_filled or is_circumstance(name):
            continue
        if (text := describe(value, DEPTH, seen)) is not None:
            yield name, text


def _digest(code: types.CodeType, documentation: str | None = None) -> str:
    """Digest of a function's code, independent of its location and docstring."""
    constants = []
    for constant in code.co_consts:
        if inspect.iscode(constant):
            constants.append(_digest(constant))
        elif isinstance(constant, frozenset):
            constants.append(str(sorted(map(repr, constant))))  # sets have no fixed order
        else:
            constants.append(repr(None if constant == documentation else constant))
    content = [code.co_code.hex(), *code.co_names, *code.co_varnames, *code.co_freevars, *constants]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:8]
