"""Emit the parameters of Pyro programs without Pyro's store, and isolate programs from the handlers around them."""

import difflib
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pyro.nn import PyroModule
from pyro.poutine import runtime
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn

from pyrovae.data.conversion import Numbers
from pyrovae.data.forms import is_stream, signature_of
from pyrovae.programs.reach import modules_behind

__all__ = ["apart_from_handlers", "check_arguments", "check_names", "check_program", "emit_parameters", "numbers_of"]


def check_program(name: str, program: Any) -> None:
    """Raise TypeError if `program` cannot be called, such as an object VAE that only holds a model and a guide."""
    called_as = (nn.Module.__call__, PyroModule.__call__)  # what calls `forward`
    empty = isinstance(program, nn.Module) and type(program).forward is nn.Module.forward
    if not callable(program) or (empty and type(program).__call__ in called_as):
        methods = [method for method in ("model", "guide") if callable(getattr(program, method, None))]
        hint = f": pass its method, {' or '.join(f'{name}.{method}' for method in methods)}" if methods else ""
        raise TypeError(
            f"{name} must be a Pyro program to call, found {type(program).__name__}, which cannot be called{hint}"
        )


def check_arguments(programs: Sequence[Any], args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise TypeError for arguments of an evaluation that are not data: a guide in their place, or a loader."""
    if len(programs) == 1 and args and callable(args[0]) and not hasattr(args[0], "__array__"):
        raise TypeError(
            f"expected data as the first argument of the model, found {type(args[0]).__name__}: if it is the guide, pass "
            f"it by name, guide=guide; a program that takes a function is given by functools.partial(model, function)"
        )
    if streams := [value for value in (*args, *kwargs.values()) if is_stream(value)]:
        raise TypeError(
            f"found a {type(streams[0]).__name__}, and this function takes data in memory: join its batches, "
            f"torch.cat(list(loader)). log_marginal_likelihood, annealed_importance_sampling and sequential_monte_carlo take "
            f"a loader as their only argument, and go through its batches"
        )


def check_names(programs: Sequence[Any], kwargs: dict[str, Any], options: Collection[str]) -> None:
    """Raise TypeError for a keyword argument that no program has: most are misspelt options of the evaluation.

    Args:
        programs: What is called with the keyword arguments.
        kwargs: The keyword arguments.
        options: Names of the options of the evaluation.
    """
    signatures = [signature_of(program) for program in programs]
    taken = [signature.parameters for signature in signatures if signature is not None]
    if all(any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values()) for found in taken):
        return
    for name in kwargs:
        if any(name in found for found in taken):
            continue
        if name in options:
            raise TypeError(f"the programs take no argument {name}=: give both of them an argument of that name")
        similar = difflib.get_close_matches(name, options, 1)
        remedy = f"did you mean {similar[0]}=?" if similar else f"leave it out; options are {', '.join(options)}"
        raise TypeError(
            f"found {name}=, and this evaluation has no option of that name, nor do the programs take such an "
            f"argument: {remedy}"
        )


def numbers_of(*programs: Any) -> Numbers:
    """What the programs take numbers as: the dtype of their parameters, and whether their data are real numbers.

    A program says the latter by its attribute `takes_real_data`, as the models of this library do.
    """
    parameters = (parameter for module in modules_behind(*programs) for parameter in module.parameters())
    dtype = next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), None)
    return Numbers(dtype, is_real=any(getattr(program, "takes_real_data", False) for program in programs))


def emit_parameters(module: nn.Module, name: str) -> None:
    """Make every parameter of a module a Pyro param site, without Pyro's global parameter store.

    `SVI` optimises the param sites it sees. `pyro.module` puts the parameters into the store under their names; a
    second model with the same names then gets the parameters of the first and is never trained. These sites carry the
    module's own parameters, so models trained in turn do not affect each other, and the store need not be cleared.
    """
    if not am_i_wrapped():
        return
    for parameter_name, parameter in module.named_parameters():
        if parameter.requires_grad:
            _local_parameter(parameter, name=f"{name}${parameter_name}")


@effectful(type="param")
def _local_parameter(parameter: Tensor) -> Tensor:
    # Use an alias, so that the module's parameter does not get the attribute that Pyro needs (it could not be pickled).
    value = parameter.detach()
    value.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
    return value


@contextmanager
def apart_from_handlers() -> Iterator[None]:
    """Isolate a Pyro program that runs inside another from the handlers and plates around it.

    `poutine.block` only hides sites: a plate inside still conflicts with an outer plate of the same name or dimension.
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
