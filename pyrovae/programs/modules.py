"""What Pyro programs and PyTorch modules have to do with each other: whose parameters are whose, and in which mode."""

import contextlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine import runtime
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn

__all__ = [
    "apart_from_handlers",
    "check_count",
    "check_program",
    "checks_values",
    "emit_parameters",
    "import_arviz",
    "map_tensors",
    "plain_errors",
    "run_network",
    "warn_once",
    "without_checks",
]

_checks_values = True
_PACKAGE = str(Path(__file__).parent.parent)
_NOT_THE_USERS = (_PACKAGE, *(str(Path(str(module.__file__)).parent) for module in (torch, pyro)), contextlib.__file__)


def import_arviz() -> Any:
    """ArviZ, without the notice about its next version that 0.x gives on its first import of the day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


_warned: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()


def warn_once(program: Any, message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of something about a program, once for each program, at the line of the user's code that led here."""
    holder, key = getattr(program, "__self__", program), getattr(program, "__qualname__", "") + message
    try:
        said = _warned.setdefault(holder, set())
    except TypeError:  # an object that no weak reference or dictionary takes
        said = set()
    if key in said:
        return
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
    said.add(key)


def check_program(name: str, program: Any) -> None:
    """Raise TypeError for what cannot be run: an object that holds a program, as many a class named VAE does."""
    called_as = (nn.Module.__call__, PyroModule.__call__)  # what calls `forward`
    empty = isinstance(program, nn.Module) and type(program).forward is nn.Module.forward
    if not callable(program) or (empty and type(program).__call__ in called_as):
        methods = [method for method in ("model", "guide") if callable(getattr(program, method, None))]
        hint = f": pass its method, {' or '.join(f'{name}.{method}' for method in methods)}" if methods else ""
        raise TypeError(
            f"{name} must be a Pyro program to call, found {type(program).__name__}, which cannot be called{hint}"
        )


def emit_parameters(module: nn.Module, name: str) -> None:
    """Make every parameter of a module a Pyro param site, without Pyro's global parameter store.

    `SVI` optimises the param sites it sees. `pyro.module` would make them by putting the parameters into a store
    under their names, where a second model of the same name finds the first one's and never moves. These sites carry
    the module's own parameters, so that models trained by turns do not touch each other, and nothing needs clearing.
    """
    if not am_i_wrapped():
        return
    for parameter_name, parameter in module.named_parameters():
        if parameter.requires_grad:
            _local_parameter(parameter, name=f"{name}${parameter_name}")


@effectful(type="param")
def _local_parameter(parameter: Tensor) -> Tensor:
    # An alias, so that the attribute Pyro asks for is not left on the module's parameter (it would not pickle).
    value = parameter.detach()
    value.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
    return value


@contextmanager
def apart_from_handlers() -> Iterator[None]:
    """Run a Pyro program inside another as if it were alone: no handler or plate around it sees it, or lends it a dimension.

    `poutine.block` hides sites, but a plate inside still finds its name or its dimension taken by one outside.
    """
    stacks = runtime._PYRO_STACK, runtime._DIM_ALLOCATOR._stack
    kept = [list(stack) for stack in stacks]
    for stack in stacks:
        stack.clear()
    try:
        yield
    finally:
        for stack, before in zip(stacks, kept, strict=True):
            stack[:] = before


def run_network(net: nn.Module, x: Tensor, advice: str, name: str | None = None) -> Tensor:
    """net(x), with an error that says what the network was given if it does not take that.

    Args:
        net: The network.
        x: Its input.
        advice: How to mend another shape.
        name: What to call the network; by default its class.

    Returns:
        The network's output.

    Raises:
        ValueError: The network does not take that shape or dtype; with both, torch's words, and how to mend it.
    """
    try:
        return net(x)
    except (RuntimeError, IndexError) as error:
        of_dtype = ("dtype", "Input type", "scalar type", "not implemented for")
        words = ("shape", "size", "channels", "Dimension", *of_dtype)
        if not any(word in str(error) for word in words) or "memory" in str(error):
            raise
        if any(word in str(error) for word in of_dtype):
            expected = next((p.dtype for p in net.parameters() if p.dtype.is_floating_point), x.dtype)
            if not x.is_floating_point():
                advice = f"{'x.float() / 255 for images of bytes, ' if x.dtype == torch.uint8 else ''}x.to({expected})"
            elif x.dtype != expected:
                advice = f"x.to({expected}), the dtype of its parameters, or the network's .to({x.dtype})"
        raise ValueError(
            f"the network {name or type(net).__name__} does not take what it is given, of shape {tuple(x.shape)} and {x.dtype} "
            f"({error}): {advice}"
        ) from error


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors of this library as they are: without the table of sites that Pyro adds to what a traced program raises."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        first: BaseException = error
        while (cause := first.__cause__) is not None and str(first).startswith(f"{cause}\n"):
            first = cause
        trace = first.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if first is not error and trace is not None and trace.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            raise first from first.__cause__
        raise


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int, if it is a whole number (NumPy's too), `least` or more; raises TypeError or ValueError if not."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, found {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, found {value}")
    return int(value)


def checks_values() -> bool:
    """Whether a part looks at the values of its data, as it does but in a recording (see `pyrovae.programs.extract`)."""
    return _checks_values


@contextmanager
def without_checks() -> Iterator[None]:
    """No look at values inside: a recorded program cannot branch on them. For data that were checked before."""
    global _checks_values
    before, _checks_values = _checks_values, False
    try:
        yield
    finally:
        _checks_values = before


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply `function` to the tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree
