"""The parameters of Pyro programs: emitted without Pyro's store, out of sight of handlers around them."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro.nn import PyroModule
from pyro.poutine import runtime
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn

__all__ = ["apart_from_handlers", "check_program", "emit_parameters"]


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
