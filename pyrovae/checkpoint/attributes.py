"""Which attributes of an object are its constants: set by the constructor, changed by no method."""

import dis
import functools
import inspect
import re
import types
from typing import Any

from torch import nn

__all__ = ["attributes_set", "constants_of", "names_in"]

# What may differ between two uses of one model: where it runs, what it prints, how many data it is given.
_FREE = re.compile(r"device|cuda|gpu|inplace|warning|^_pyro")
_FREE_IN_OTHER_CLASSES = re.compile(
    r"verbose|debug|progress|seed|path|folder|file|dir$|name|data|batch|size|step|epoch|^_?(n|num|len|count|total)(_|$)",
    re.IGNORECASE,
)
_OURS = ("pyrovae", "pyro", "torch")


def constants_of(thing: Any) -> dict[str, Any]:
    """The attributes that an object's constructor sets and its other methods do not, so that training does not change them.

    Names that speak of devices, paths or numbers of data are left out, the latter in classes from elsewhere alone.
    """
    by_constructor, elsewhere = attributes_set(type(thing))
    has = getattr(thing, "__dict__", {})
    ours = type(thing).__module__.partition(".")[0] in _OURS
    return {
        name: has[name]
        for name in sorted(by_constructor - elsewhere)
        if name in has and not _FREE.search(name) and (ours or not _FREE_IN_OTHER_CLASSES.search(name))
    }


def attributes_set(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the attributes that the code of a class sets: in its constructor, in other methods."""
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
    """Names that these operations of the interpreter take in a function's code, the functions inside included."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in operations}
    for constant in code.co_consts:
        if inspect.iscode(constant):
            found |= names_in(constant, *operations)
    return found


def _set_in(member: Any) -> set[str]:
    functions = (member.fget, member.fset) if isinstance(member, property) else (getattr(member, "__func__", member),)
    codes = [inspect.unwrap(function).__code__ for function in functions if inspect.isfunction(function)]
    return {name for code in codes for name in names_in(code, "STORE_ATTR")}
