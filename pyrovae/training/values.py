"""Describe values and functions as text, to compare those in a file with those of now.

A user's function is described by its name, a digest of its code, and the plain values that it uses from outside.
Functions of installed packages are described by name only, so that a new version of a package counts as the same
function.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import numbers
import os
import re
import sys
import sysconfig
import types
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyrovae.training.attributes import constants_of, is_circumstance, names_in

__all__ = ["checksum", "describe", "describe_callable", "same_text"]

_DEPTH = 6
_CODE = re.compile(r" \(code [0-9a-f]{8} of ([\w-]+)\)")
_FOLDERS = [str(Path(__file__).parent.parent), *(sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib"))]
_INSTALLED = tuple(os.path.join(folder, "") for folder in _FOLDERS)


def describe(value: Any, depth: int = 0, seen: frozenset[int] = frozenset()) -> str | None:
    """Describe a number, string, class, function, or a tuple or data class of them as text; None for other values.

    Args:
        value: the value.
        depth: if above 0, also describe lists, dicts, tensors and callable objects, nested up to this depth. Use it
            only for arguments, because these can change in place.
        seen: ids of the functions that hold this value.
    """
    if value is None or isinstance(value, bool | str | torch.dtype | enum.Enum):
        return repr(value)
    if isinstance(value, numbers.Integral):
        return repr(int(value))
    if isinstance(value, numbers.Real):
        return f"{float(value):.7g}"  # 1.0 and 1 count as equal, and so do 0.1 in float32 and in float64
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, functools.partial) or inspect.isroutine(value):
        return _function(value, seen)
    if isinstance(value, tuple) or (depth and isinstance(value, list)):
        items = [describe(item, max(depth - 1, 0), seen) for item in value]
        return None if None in items else f"({', '.join(map(str, items))})"
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        return f"{type(value).__name__}({_listed(fields, depth, seen)})"
    if depth and isinstance(value, dict):
        return f"{{{_listed(value, depth, seen)}}}"
    if depth and isinstance(value, Tensor | np.ndarray):
        return checksum(value)
    return _object(value, depth - 1, seen) if depth and callable(value) else None


def describe_callable(function: Any) -> str:
    """Describe a function, class, method, partial or callable object as text."""
    return str(describe(function, _DEPTH))


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
    """Whether two descriptions are equal; code is compared only if the same version of Python compiled it."""
    if set(_CODE.findall(there)) == set(_CODE.findall(here)):
        return there == here
    return _CODE.sub("", there) == _CODE.sub("", here)


def _listed(values: Mapping[Any, Any], depth: int, seen: frozenset[int]) -> str:
    return ", ".join(f"{name}={_or_kind(value, max(depth - 1, 0), seen)}" for name, value in values.items())


def _or_kind(value: Any, depth: int, seen: frozenset[int]) -> str:
    text = describe(value, depth, seen)
    return type(value).__name__ if text is None else text


def _object(thing: Any, depth: int, seen: frozenset[int]) -> str:
    """Describe a callable object by its class and its constants."""
    kind, has_repr = type(thing), type(thing).__repr__ not in (object.__repr__, nn.Module.__repr__)
    if has_repr and _is_installed(kind) and " at 0x" not in repr(thing):
        return repr(thing)
    values = constants_of(thing)
    if isinstance(thing, nn.Module):
        values |= {name: repr(child) for name, child in thing.named_children()}
    return f"{kind.__name__}({_listed(values, depth, seen)})"


def _function(function: Any, seen: frozenset[int]) -> str:
    if id(function) in seen:
        return "itself"
    seen = seen | {id(function)}
    if isinstance(function, functools.partial):
        given = [_or_kind(value, _DEPTH, seen) for value in (function.func, *function.args)]
        keywords = {name: value for name, value in sorted(function.keywords.items()) if not is_circumstance(name)}
        named = [_listed(keywords, _DEPTH, seen)] if keywords else []
        return f"partial({', '.join([*given, *named])})"
    if inspect.ismethod(function):
        owner = function.__self__
        held = {} if isinstance(owner, nn.Module | type) else constants_of(owner)
        return f"{type(owner).__name__}({_listed(held, _DEPTH, seen)}).{_function(function.__func__, seen)}"
    name = getattr(function, "__name__", type(function).__name__)
    if not inspect.isfunction(function) or _is_installed(function):
        return name
    text = f"{name} (code {_digest(function.__code__, function.__doc__)} of {sys.implementation.cache_tag})"
    outside = [f"{key}={value}" for key, value in _outside(function, seen)]
    return f"{text} with {', '.join(outside)}" if outside else text


def _outside(function: types.FunctionType, seen: frozenset[int]) -> Iterator[tuple[str, str]]:
    """Names and descriptions of the plain outside values that a function uses and does not change."""
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
    changed = names_in(code, "STORE_DEREF", "STORE_GLOBAL")
    for name, value in sorted(found.items()):
        is_constant = isinstance(value, Tensor) and not value.requires_grad
        if name in changed or is_circumstance(name):
            continue
        if (text := describe(value, 1 if is_constant else 0, seen)) is not None:
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


def _is_installed(thing: Any) -> bool:
    name = getattr(thing, "__module__", None) or ""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return name != "__main__"
    return file.startswith(_INSTALLED) or "site-packages" in file or "dist-packages" in file
