"""Finds the modules that Pyro programs use, and puts them into evaluation mode.

A program is a module, a method of a module, or a function or object that refers to modules. Modules without a reference
are found when they are called. Changes that an evaluation makes to a module (mode, buffers, parameters) are detected
and undone.
"""

import argparse
import functools
import inspect
import sys
import threading
import types
import warnings
import weakref
from collections import UserDict, UserList, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "OF_TORCH",
    "attributes_of",
    "changed_buffers",
    "codes_in",
    "evaluation_mode",
    "find_modules",
    "is_installed",
    "is_ours",
    "modules_behind",
    "replaced_parameters",
]


class _Evaluation:
    """Modules that were put into evaluation mode, with their state before."""

    def __init__(self) -> None:
        self.training: dict[nn.Module, bool] = {}
        self.buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []  # module, name, buffer, its copy
        self.parameters: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []

    def add(self, module: nn.Module) -> None:
        if module in self.training:
            return
        self.training[module] = module.training
        if isinstance(module, torch.jit.ScriptModule):  # its own slots do not open to Python
            module.train(False)
            return
        self.parameters.append((module, dict(module._parameters)))
        for name, buffer in module._buffers.items():
            self.buffers.append((module, name, buffer, None if buffer is None else buffer.detach().clone()))
        module.training = False

    def leave(self) -> None:
        # In reverse: a compiled module passes its mode on to the one inside, which was noted after it.
        for module, training in reversed(self.training.items()):
            if isinstance(module, torch.jit.ScriptModule):
                module.train(training)
            else:
                module.training = training


_evaluations: list[_Evaluation] = []  # the active evaluations, innermost last
_one_at_a_time = threading.RLock()


@contextmanager
def evaluation_mode(*programs: Any) -> Iterator[torch.device | None]:
    """Put the modules of Pyro programs into `eval()`, and restore the mode of each afterwards.

    A program is an `nn.Module`, a method of one, or a function or object that refers to modules. Evaluations in several
    threads wait for each other, because Pyro's handlers and the modes of modules are shared by all threads.

    Args:
        programs: Pyro programs.

    Yields:
        The device of the first parameter or buffer found; None if there is none.
    """
    modules = modules_behind(*programs)
    parameter = next((tensor for module in modules for tensor in (*module.parameters(), *module.buffers())), None)
    with _one_at_a_time:
        evaluation = _Evaluation()
        _evaluations.append(evaluation)
        try:
            for root in modules:
                for module in root.modules():
                    evaluation.add(module)
            yield None if parameter is None else parameter.device
        finally:
            _evaluations.remove(evaluation)
            evaluation.leave()


@contextmanager
def find_modules() -> Iterator[None]:
    """Put every module that is called inside into evaluation mode, until the current evaluation ends.

    This finds modules that a program reaches by references which `modules_behind` does not follow.
    """
    if not _evaluations:
        yield
        return
    evaluation = _evaluations[-1]
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: evaluation.add(module))
    try:
        # Compiled networks run eagerly meanwhile: Dynamo does not trace a hook that changes modules.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with warnings.catch_warnings(), eager:
            warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # warns that global hooks run twice
            yield
    finally:
        hook.remove()


def changed_buffers() -> list[str]:
    """Names of the buffers that changed since the current evaluation began; restores them."""
    changed = []
    for module, name, buffer, before in _evaluations[-1].buffers if _evaluations else ():
        now = module._buffers.get(name)
        if now is None and before is None:
            continue
        if now is None or before is None or now.shape != before.shape or not _equal(now, before):
            changed.append(f"{type(module).__name__}.{name}")
            if buffer is not None and before is not None:
                with torch.no_grad():
                    buffer.copy_(before)
            module._buffers[name] = buffer
    return changed


def replaced_parameters() -> list[str]:
    """Names of the parameters that were replaced since the current evaluation began; restores them.

    Pyro replaces them: it gives modules the tensors in its store under their names, which may be those of another
    model.
    """
    replaced = []
    for module, before in _evaluations[-1].parameters if _evaluations else ():
        for name, parameter in before.items():
            if module._parameters.get(name) is not parameter:
                replaced.append(f"{type(module).__name__}.{name}")
                module._parameters[name] = parameter
    return replaced


def _equal(first: Tensor, second: Tensor) -> bool:
    return bool(((first == second) | ((first != first) & (second != second))).all())


def modules_behind(*programs: Any) -> list[nn.Module]:
    """The modules that Pyro programs are (an `nn.Module`, a method of one) or refer to, each once.

    Follows closures, globals and default arguments of functions, attributes of objects and of imported modules, and
    containers, except those of installed packages.
    """
    found: dict[nn.Module, None] = {}
    seen: set[int] = set()
    for program in programs:
        _follow(program, found, seen, _DEEPEST)
    return list(found)


_DEEPEST, _LONGEST = 12, 1000  # longest chain of references that is followed; largest container that is searched
_HOLDERS = (argparse.Namespace, types.SimpleNamespace, threading.local, UserDict, UserList, deque)
OF_TORCH = set(vars(nn.Module()))  # attributes that every module has


def _follow(value: Any, found: dict[nn.Module, None], seen: set[int], depth: int) -> None:
    if id(value) in seen or depth == 0 or isinstance(value, Tensor | str | int | float | bytes | None):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        found[value] = None
    for reached in _references(value):
        _follow(reached, found, seen, depth - 1)


def _references(value: Any) -> Iterator[Any]:
    """The objects that a program, or an object reached from it, refers to."""
    if isinstance(value, list | tuple | set | frozenset | dict):
        if len(value) <= _LONGEST:
            yield from value.values() if isinstance(value, dict) else value
    elif isinstance(value, nn.Module):  # attributes of modules that torch does not register
        own = (part for part in value.modules() if not is_installed(type(part).__module__))
        yield from (held for part in own for name, held in vars(part).items() if name not in OF_TORCH)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif inspect.ismethod(value):
        yield value.__self__
        yield value.__func__
    elif inspect.isfunction(value):
        if not is_installed(value.__module__):
            yield from _values_in_reach(value)
    elif inspect.isclass(value):
        if not is_installed(value.__module__):
            kinds = (kind for kind in value.__mro__ if not is_installed(kind.__module__))
            yield from (held for kind in kinds for held in vars(kind).values() if not inspect.isroutine(held))
    elif isinstance(value, _HOLDERS):
        yield from getattr(value, "__dict__", {}).values()
        yield from value if isinstance(value, deque) else ()
    elif isinstance(value, Mapping) and len(value) <= _LONGEST:
        yield from value.values()
    elif isinstance(value, weakref.ref):
        yield value()
    elif inspect.isgenerator(value):
        yield from (value.gi_frame.f_locals if value.gi_frame else {}).values()
    elif type(value).__name__ == "ndarray":  # by name, without importing NumPy
        yield from value.ravel()[:_LONGEST] if value.dtype == object else ()
    elif not inspect.ismodule(value) and not is_installed(type(value).__module__):
        yield type(value)  # for attributes of its class
        yield from attributes_of(value).values()
    elif hasattr(value, "__wrapped__"):  # for example functools.cache
        yield value.__wrapped__


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that an object itself holds, in its slots and its dictionary."""
    slots: list[str] = []
    for kind in type(value).__mro__:
        own = vars(kind).get("__slots__", ())
        slots += [own] if isinstance(own, str) else own
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


@functools.cache
def is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or to an installed package other than this one."""
    package = (module or "").partition(".")[0]
    if is_ours(module) or package in ("__main__", ""):
        return False
    if package in sys.stdlib_module_names or package in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(package), "__file__", None)
    return file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def is_ours(module: str | None) -> bool:
    """Whether a module belongs to this package."""
    return (module or "").partition(".")[0] == "pyrovae"


def _values_in_reach(function: types.FunctionType) -> Iterator[Any]:
    """The values a function may use, nested functions included: globals, closure and default arguments."""
    yield from (function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # the cell is empty
            yield cell.cell_contents
    for code in codes_in(function.__code__):
        names = [name for name in code.co_names if name in function.__globals__]
        values = [function.__globals__[name] for name in names]
        while values:
            value = values.pop()
            if not inspect.ismodule(value):
                yield value
            elif not is_installed(value.__name__):  # attributes of an imported module that the code names
                values += (vars(value)[name] for name in code.co_names if name in vars(value))


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function, and of the functions inside it."""
    codes = [code]
    while codes:
        code = codes.pop()
        yield code
        codes += (constant for constant in code.co_consts if inspect.iscode(constant))
