"""Finds what a recording would silently lose: reads by Python, sizes, hooks, hidden state.

The self-check compares a few runs. A count that Python reads may be equal in all of them, and a counter may act only
after many runs. So these are searched for directly: in the graph, and in whatever the program holds outside of parameters
and buffers (counters, lists, objects, generators of random numbers), which one run changes visibly.
"""

import argparse
import functools
import inspect
import itertools
import operator
import random
import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from zlib import crc32

import numpy
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from pyrovae.compiled.signature import HOOKS
from pyrovae.programs.reach import OF_TORCH, attributes_of, codes_in, is_installed, is_ours

__all__ = ["HiddenState", "ReadsByPython", "check_gradient_hooks", "check_graph"]

_DEEPEST, _MOST, _LONGEST = 12, 20_000, 1000  # limits: depth of references; number of holders; items per holder
_PLAIN = (bool, int, float, complex, str, bytes, types.NoneType)
_MUTABLE = (dict, list, set, deque)
# Objects of installed packages whose attributes a program reads.
_RECORDS = (types.SimpleNamespace, argparse.Namespace, Distribution)


@functools.cache
def _generators() -> tuple[type, ...]:
    """The types of random generators; a function, because NumPy imports its own only at their first use."""
    return random.Random, numpy.random.Generator, numpy.random.RandomState, torch.Generator


class ReadsByPython(TorchFunctionMode):
    """Context that raises ValueError if Python or NumPy reads values of traced tensors: they would become constants.

    (`make_fx` itself refuses item(), float() and bool().)
    """

    _READS = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in self._READS:
            from torch.fx.experimental.proxy_tensor import get_proxy_mode, has_proxy_slot

            mode = get_proxy_mode()
            if mode is not None and has_proxy_slot(args[0], mode.tracer):
                raise ValueError(
                    f"values of data, parameters or draws are read by Python or NumPy (Tensor.{func.__name__}) and "
                    f"would be constants in the recording"
                )
        return func(*args, **(kwargs or {}))


def check_gradient_hooks(modules: nn.Module) -> None:
    """Raise ValueError for a hook on an accumulated gradient, which a recording does not call."""
    for name, parameter in modules.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"parameter '{name}' has a hook on its accumulated gradient, which a recording does not call"
            )


def check_graph(graph: torch.fx.GraphModule) -> None:
    """Raise ValueError for a parameter of no module, and for a tensor whose size depends on values.

    The first (pyro.param in a function) would get no gradient. The size of the second (nonzero, a mask as an index) may
    have been read by Python.
    """
    masks = {torch.bool, torch.uint8}

    def is_mask(index: torch.fx.Node) -> bool:
        held = getattr(graph, str(index.target)) if index.op == "get_attr" else index.meta["tensor_meta"]
        return held.dtype in masks

    for node in graph.graph.nodes:
        if node.op == "get_attr" and getattr(getattr(graph, node.target, None), "requires_grad", False):
            raise ValueError("the program uses a parameter that belongs to none of its modules")
        if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
            continue
        indices = node.args[1] if node.target is torch.ops.aten.index.Tensor else ()
        if not indices or any(i is not None and is_mask(i) for i in indices):
            raise ValueError(
                f"the size of a tensor depends on values ({node.target}), and would be a constant in the recording"
            )


class HiddenState:
    """A snapshot of the Python values that can be reached from programs.

    Args:
        roots: Functions and modules.
        state: Tensors that are compared elsewhere: parameters and buffers.
    """

    def __init__(self, roots: Sequence[Any], state: Sequence[Tensor]):
        self._seen = {id(tensor) for tensor in state}
        self._alive: list[Any] = []  # keeps the objects alive, because an id may be reused later
        self._held: list[tuple[str, Any, Any]] = []
        for root in roots:
            self._follow(type(root).__name__, root, _DEEPEST)
        self._of_python, self._of_numpy = random.getstate(), _legacy_state()

    def changed(self) -> str | None:
        """The name of the first value that has changed; None if none has."""
        if random.getstate() != self._of_python or not _same(_legacy_state(), self._of_numpy, _DEEPEST):
            return "the random numbers of Python or NumPy"
        return self.changed_value()

    def changed_value(self) -> str | None:
        """Like `changed`, but without the global random numbers of Python and NumPy, which others use too."""
        for name, holder, before in self._held:
            now = _look(holder)
            if isinstance(holder, Distribution):
                now, before = _in_both(now, before)
            if not _same(now, before, _DEEPEST):
                return _name_in(now, before) or name
        return None

    def put_back(self) -> None:
        """Undo what can be undone: items of lists and dicts, attributes, and variables of functions."""
        for _, holder, before in self._held:
            if _same(_look(holder), before, _DEEPEST):
                continue
            if isinstance(holder, list | deque):
                holder.clear()
                holder.extend(before)
            elif isinstance(holder, dict | set):
                holder.clear()
                holder.update(before)
            elif isinstance(holder, types.CellType):
                holder.cell_contents = before[0]
            elif isinstance(holder, _Globals):
                of_modules = {name for name in before if "." in name}
                holder.function.__globals__.update({name: before[name] for name in before.keys() - of_modules})
            elif isinstance(holder, numpy.ndarray) and holder.size <= _LONGEST:
                holder[...] = before
            elif isinstance(holder, random.Random):
                holder.setstate(before)
            elif isinstance(holder, torch.Generator):
                holder.set_state(before)
            elif isinstance(before, dict) and hasattr(holder, "__dict__") and not isinstance(holder, type):
                vars(holder).update(before)

    def _follow(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, _PLAIN) or depth == 0 or id(value) in self._seen or len(self._held) > _MOST:
            return
        self._seen.add(id(value))
        self._alive.append(value)
        for holder in _holders(value):
            before = _look(holder)
            self._held.append((name, holder, before))
            items = before.items() if isinstance(before, dict) else ((None, item) for item in _items(before))
            for key, item in itertools.islice(items, _LONGEST):
                self._follow(key if isinstance(key, str) else name, item, depth - 1)
        for other in _others(value):
            self._follow(getattr(other, "__name__", name), other, depth - 1)


class _Globals:
    """The global variables that a function's code names."""

    def __init__(self, function: types.FunctionType):
        self.function = function
        self.names = {name for code in codes_in(function.__code__) for name in code.co_names}


def _holders(value: Any) -> Iterator[Any]:
    """The parts of a value that can change, or the value itself."""
    is_iterator = isinstance(value, Iterator) and type(value).__module__ in ("itertools", "builtins")
    if is_iterator or isinstance(value, (Tensor, numpy.ndarray, tuple, frozenset, *_MUTABLE, *_generators())):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.modules()
    elif inspect.isfunction(value):
        if not is_installed(value.__module__):
            yield from value.__closure__ or ()
            if not is_ours(value.__module__):  # this library's functions keep nothing that a recording would lose
                yield _Globals(value)
            yield [value.__defaults__, value.__kwdefaults__]
            yield vars(value)
    elif inspect.isroutine(value) or inspect.ismodule(value) or isinstance(value, functools.partial):
        return
    elif inspect.isclass(value):
        if not is_installed(value.__module__) and not is_ours(value.__module__):
            yield value
    elif isinstance(value, _RECORDS) or not is_installed(type(value).__module__):
        yield value


def _others(value: Any) -> Iterator[Any]:
    """What else a value refers to."""
    if isinstance(value, nn.Module):
        for part in value.modules():
            yield from (hook for kind in HOOKS for hook in vars(part)[kind].values())
            if not is_installed(type(part).__module__):
                yield type(part)
                yield type(part).forward
    elif inspect.ismethod(value):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif inspect.isclass(value):
        if not is_installed(value.__module__) and not is_ours(value.__module__):
            yield from (routine for routine in vars(value).values() if inspect.isfunction(routine))
            yield from value.__bases__
    elif "__wrapped__" in getattr(value, "__dict__", {}):  # by functools.cache, for instance
        yield value.__wrapped__
    elif not isinstance(value, (Tensor, tuple, frozenset, *_MUTABLE)) and not is_installed(type(value).__module__):
        yield type(value)


def _look(holder: Any) -> Any:
    """What something holds now, to be compared later."""
    if isinstance(holder, Tensor):
        return None if holder.is_inference() else holder._version
    if isinstance(holder, numpy.ndarray):
        return holder.copy() if holder.size <= _LONGEST else crc32(holder.tobytes())
    if isinstance(holder, dict):
        return dict(holder)
    if isinstance(holder, list | set | deque | tuple | frozenset):
        return list(holder)
    if isinstance(holder, types.CellType):
        with suppress(ValueError):  # not filled yet
            return [holder.cell_contents]
        return []
    if isinstance(holder, _Globals):
        found = holder.function.__globals__
        values = {name: found[name] for name in holder.names if name in found}
        modules = [value for value in values.values() if inspect.ismodule(value)]
        for module in modules:
            if not is_installed(module.__name__) and not is_ours(module.__name__):
                inside = {
                    f"{module.__name__}.{name}": vars(module)[name] for name in holder.names if name in vars(module)
                }
                values |= inside
        return {name: value for name, value in values.items() if not inspect.ismodule(value)}
    if isinstance(holder, random.Random):
        return holder.getstate()
    if isinstance(holder, numpy.random.Generator):
        return holder.bit_generator.state
    if isinstance(holder, numpy.random.RandomState):
        return holder.get_state(legacy=False)
    if isinstance(holder, torch.Generator):
        return holder.get_state()
    if isinstance(holder, types.GeneratorType | itertools.cycle):
        return object()  # its position cannot be read
    if isinstance(holder, Iterator):
        return repr(holder) if isinstance(holder, itertools.count) else operator.length_hint(holder)
    if isinstance(holder, nn.Module):
        return {name: value for name, value in vars(holder).items() if name not in OF_TORCH}
    if isinstance(holder, type):
        return {name: value for name, value in vars(holder).items() if not name.startswith("__")}
    return attributes_of(holder)


def _name_in(now: Any, before: Any) -> str | None:
    """The name of the attribute or variable that differs, if these are named."""
    if not (isinstance(now, dict) and isinstance(before, dict)):
        return None
    return next((str(k) for k in now | before if not (k in now and k in before and _same(now[k], before[k], 1))), None)


def _items(before: Any) -> Sequence[Any]:
    return before if isinstance(before, list) else ()


def _same(now: Any, before: Any, depth: int) -> bool:
    """Whether two values look the same to a program; objects of installed packages that cannot be compared do."""
    if now is before or depth == 0:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, _PLAIN):
        return now == before or now != now
    if isinstance(now, Tensor):
        return now.shape == before.shape and now.dtype == before.dtype and bool(((now == before) | (now != now)).all())
    if isinstance(now, numpy.ndarray):
        return numpy.array_equal(now, before)
    if isinstance(now, dict):
        return list(now) == list(before) and all(_same(now[key], before[key], depth - 1) for key in now)
    if isinstance(now, list | tuple | deque):
        return len(now) == len(before) and all(_same(*pair, depth - 1) for pair in zip(now, before, strict=True))
    if isinstance(now, set | frozenset):
        return now == before
    if type(now) is object:
        return False
    if inspect.isroutine(now):  # a function that is defined anew in each run has the same code
        return bool(now == before) or (
            hasattr(now, "__code__")
            and now.__code__ is before.__code__
            and _same(_around(now), _around(before), depth - 1)
        )
    if isinstance(now, type | nn.Module):
        return False
    if isinstance(now, functools.partial):
        return all(_same(*pair, depth - 1) for pair in zip(_of_partial(now), _of_partial(before), strict=True))
    if isinstance(now, Distribution):
        return _same(*_in_both(vars(now), vars(before)), depth)
    if isinstance(now, _RECORDS) or not is_installed(type(now).__module__):
        return _same(_look(now), _look(before), depth - 1)
    if type(now).__eq__ is not object.__eq__:
        with suppress(Exception):
            return bool(now == before)
    return True


def _in_both(now: dict[str, Any], before: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attributes that a distribution has both times: it keeps some of them only after their first use."""
    names = [name for name in before if name in now]
    return {name: now[name] for name in names}, {name: before[name] for name in names}


def _around(function: Any) -> list[Any]:
    """What a function uses beside its code, its arguments and global variables."""
    cells = (_look(cell) for cell in function.__closure__ or ())
    return [getattr(function, "__self__", None), function.__defaults__, function.__kwdefaults__, *cells]


def _of_partial(function: functools.partial) -> tuple:
    return function.func, function.args, function.keywords


def _legacy_state() -> Any:
    return numpy.random.get_state(legacy=False)  # noqa: NPY002
