"""Find the constants among the attributes of an object: all that do not change as it is used."""

import argparse
import dis
import functools
import inspect
import re
import types
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrovae.programs.reach import OF_TORCH, codes_in, is_installed, is_ours

__all__ = [
    "changed_by_use",
    "changed_in",
    "constants_of",
    "hooks_of",
    "is_circumstance",
    "is_free",
    "is_of_library",
    "names_in",
]

# Names of attributes that may differ between two runs of one model: where it runs, what it reports.
_CIRCUMSTANCES = re.compile(
    r"device|cuda|gpu|inplace|warning|verbose|quiet|debug|progress|logger|resume|checkpoint|workers|^out$|"
    r"^(path|file)|(path|folder|(?<!pro)file(name)?|dir)s?$|(start|elapsed|wall|training)_?time$|^_pyro|^made_with$",
    re.IGNORECASE,
)
# In a user's own classes and options: what it is called, its data and training, what was recorded on the way.
_AMOUNTS = re.compile(
    r"^name$|(run|model|data|experiment)_name$|seed|(^|_)(num|n|len|total)_(data|train|examples)|data(set|loader)?s?$|"
    r"data(set)?_(size|len)|batch_?size|batches|epoch|learning_rate|^lr$|global_step|steps_done|^iteration$|"
    r"(^|_)count(er)?s?$|^best|loss(es)?$|histor|cache|^logs?$",
    re.IGNORECASE,
)
# Methods that training and evaluation call. Others, a setter for instance, make an object what it is.
_RUNS = re.compile(
    r"^(forward|__(call|enter|exit|getitem|len|iter|next)__|r?sample\w*|log_prob|\w*loss\w*|encode|decode)$|"
    r"(^|_)(model|guide)|step|epoch|anneal|update",
)
_FILLS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear"}
_CONTAINERS = (list, dict, set, Tensor, np.ndarray)


def constants_of(thing: Any, *, amounts: bool = False) -> dict[str, Any]:
    """The attributes of an object, and of its class, but for those that its use changes, and names that speak of circumstances.

    Args:
        thing: Any object.
        amounts: Whether to keep names that speak of data and training, which are left out of users' classes.

    Returns:
        Values by name, sorted.
    """
    kind = type(thing)
    assigned, filled = changed_by_use(kind)
    has = _class_constants(kind) | getattr(thing, "__dict__", {})
    keep_amounts = amounts or (
        is_of_library(kind) and not isinstance(thing, types.SimpleNamespace | argparse.Namespace)
    )
    return {
        name: has[name]
        for name in sorted(has)
        if not (isinstance(thing, nn.Module) and name in OF_TORCH)
        and not (isinstance(thing, Distribution) and hasattr(kind, name))  # computed when it was first asked for
        and name not in assigned
        and not (name in filled and isinstance(has[name], _CONTAINERS))
        and not (is_circumstance(name) if keep_amounts else is_free(name))
    }


def is_circumstance(name: str) -> bool:
    """Whether a name suggests where something runs or what it reports, not what it computes: device, path, verbose."""
    return _CIRCUMSTANCES.search(name) is not None


def is_free(name: str) -> bool:
    """Whether a name in a user's class or options speaks of circumstances, or of data and training: batch_size, seed."""
    return is_circumstance(name) or _AMOUNTS.search(name) is not None


def is_of_library(thing: Any) -> bool:
    """Whether a class or function is of Python or an installed package, this one included."""
    module = getattr(thing, "__module__", None) or "builtins"
    return is_ours(module) or is_installed(module)


def hooks_of(module: nn.Module) -> tuple:
    """Functions that were given to a module to change what it computes: its hooks, a `forward` of its own."""
    own = [vars(module)["forward"]] if "forward" in vars(module) else []
    return (*own, *module._forward_pre_hooks.values(), *module._forward_hooks.values())


def names_in(code: types.CodeType, *operations: str) -> set[str]:
    """Names that these operations of the interpreter take in a function's code, the functions inside included."""
    return {i.argval for part in codes_in(code) for i in dis.get_instructions(part) if i.opname in operations}


def changed_in(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Names that code assigns outside itself, `self.calls += 1`, and those that it may fill, `self.seen.append(x)`."""
    filled = set()
    for part in codes_in(code):
        instructions = list(dis.get_instructions(part))
        # `self.seen[0].append` and `self.seen[0] = x` start where `self.seen` does.
        starts = {_start(found) for found in instructions if _fills(found)} - {None}
        loads = ("LOAD_ATTR", "LOAD_GLOBAL", "LOAD_DEREF")
        filled |= {found.argval for found in instructions if found.opname in loads and _start(found) in starts}
    return names_in(code, "STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL"), filled


def _fills(found: dis.Instruction) -> bool:
    if found.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
        return True
    name = str(found.argval)
    in_place = name in _FILLS or (name.endswith("_") and not name.endswith("__"))  # torch's methods in place
    return found.opname in ("LOAD_METHOD", "LOAD_ATTR") and in_place


def _start(found: dis.Instruction) -> tuple[int, int] | None:
    """Line and column where the expression of an instruction starts, None if Python was told to forget them."""
    place = found.positions
    return (
        None if place is None or place.lineno is None or place.col_offset is None else (place.lineno, place.col_offset)
    )


def _class_constants(kind: type) -> dict[str, Any]:
    """Attributes of a user's classes that are no methods."""
    found: dict[str, Any] = {}
    methods = (
        types.FunctionType,
        staticmethod,
        classmethod,
        property,
        functools.cached_property,
        types.MemberDescriptorType,
    )
    for base in reversed(kind.__mro__):
        if base is object or is_of_library(base):
            continue
        for name, value in vars(base).items():
            if not name.startswith(("__", "_abc_")) and not isinstance(value, methods):
                found[name] = value
    return found


def changed_by_use(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the attributes that the methods of a class assign, and fill, when it is used.

    Of an installed class these are all methods but the constructor; of a user's, those that `_RUNS` names, what they call,
    and what reads a property, or all if it has none of these names. A distribution does not change.
    """
    if issubclass(kind, Distribution):
        return frozenset(), frozenset()
    by_use: tuple[frozenset[str], frozenset[str]] = _changed_by_use(kind)  # type: ignore[arg-type]
    return by_use


@functools.lru_cache(maxsize=1000)
def _changed_by_use(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    assigned: set[str] = set()
    filled: set[str] = set()
    own: dict[str, types.CodeType] = {}
    waiting: list[types.CodeType] = []
    bases = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    runs = any(_RUNS.search(name) for base in bases if not is_of_library(base) for name in vars(base))
    for base in bases:
        for name, member in vars(base).items():
            if isinstance(member, functools.cached_property):
                assigned.add(name)
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if not inspect.isfunction(function) or name in ("__init__", "__post_init__"):
                continue
            code = inspect.unwrap(function).__code__
            if isinstance(member, property) or _RUNS.search(name):
                waiting.append(code)
            elif is_of_library(base) or not runs:
                waiting += [] if name.startswith("__") else [code]
            else:
                own[name] = code
    while waiting:
        code = waiting.pop()
        for names, more in zip((assigned, filled), changed_in(code), strict=True):
            names |= more
        waiting += [own.pop(name) for part in codes_in(code) for name in part.co_names if name in own]
    return frozenset(assigned), frozenset(filled)
