"""Find the constants of an object: attributes that the constructor sets and no other method changes."""

import dis
import functools
import inspect
import re
import types
from typing import Any

from torch import nn

__all__ = ["attributes_set", "constants_of", "is_circumstance", "names_in"]

# Names of attributes that may differ between two runs of one model: where it runs, what it reports.
_CIRCUMSTANCES = re.compile(
    r"device|cuda|gpu|inplace|warning|verbose|debug|progress|logger|path|folder|file|dir$|(^|_)time$|^_pyro",
    re.IGNORECASE,
)
# In third-party classes, these may differ too: names, and numbers of data.
_AMOUNTS = re.compile(r"name|seed|data|batch|size|step|epoch|^_?(n|num|len|count|total)(_|$)", re.IGNORECASE)
_OURS = ("pyrovae", "pyro", "torch")


def constants_of(thing: Any) -> dict[str, Any]:
    """Return the attributes that the constructor sets and no other method sets, so that training does not change them.

    Attributes whose names suggest circumstances (device, path) are left out. In third-party classes, so are those whose
    names suggest amounts (`num_data`).
    """
    by_constructor, elsewhere = attributes_set(type(thing))
    has = getattr(thing, "__dict__", {})
    ours = type(thing).__module__.partition(".")[0] in _OURS
    return {
        name: has[name]
        for name in sorted(by_constructor - elsewhere)
        if name in has and not is_circumstance(name) and (ours or not _AMOUNTS.search(name))
    }


def is_circumstance(name: str) -> bool:
    """Whether a name suggests where something runs or what it reports, not what it computes: device, path, verbose."""
    return _CIRCUMSTANCES.search(name) is not None


def attributes_set(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the attributes that a class sets: (in its constructor, in its other methods)."""
    return _attributes_set(kind)


@functools.lru_cache(maxsize=1000)
def _attributes_set(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    by_constructor: set[str] = set()
    elsewhere: set[str] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        for name, member in vars(base).items():
            if name in ("__init__", "__post_init__"):
                by_constructor |= _set_in(member)
            elif not name.startswith("__") or name == "__call__":
                elsewhere |= _set_in(member)
    return frozenset(by_constructor), frozenset(elsewhere)


def names_in(code: types.CodeType, *operations: str) -> set[str]:
    """Names used by these bytecode operations in a function's code, including nested functions."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in operations}
    for constant in code.co_consts:
        if inspect.iscode(constant):
            found |= names_in(constant, *operations)
    return found


def _set_in(member: Any) -> set[str]:
    functions = (member.fget, member.fset) if isinstance(member, property) else (getattr(member, "__func__", member),)
    codes = [inspect.unwrap(function).__code__ for function in functions if inspect.isfunction(function)]
    return {name for code in codes for name in names_in(code, "STORE_ATTR")}
