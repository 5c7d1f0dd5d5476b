"""Argument checks, and a map over the tensors in nested arguments."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "check_count",
    "check_positive",
    "check_sizes",
    "checks_values",
    "map_tensors",
    "run_network",
    "without_checks",
]

_checks_values = True


def run_network(
    net: nn.Module, x: Tensor, advice: str, name: str | None = None, *more: Tensor, **options: Tensor
) -> Tensor:
    """Return net(x, *more, **options); if the network rejects x, raise an error that says what it was given.

    Args:
        net: The network.
        x: Its input.
        advice: How to fix a wrong shape.
        name: Name of the network in the error; by default its class.
        *more: Further inputs (a context).
        **options: Inputs by name.

    Returns:
        The network's output.

    Raises:
        TypeError: `x` is not a tensor.
        ValueError: The network does not take that shape or dtype. The message has both, torch's message, and the fix.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"the network {name or type(net).__name__} takes a tensor, found {type(x).__name__}: torch.as_tensor(x)"
        )
    try:
        return net(x, *more, **options)
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
            f"the network {name or type(net).__name__} does not take input of shape {tuple(x.shape)} and dtype {x.dtype}"
            f"{''.join(f' with {tuple(other.shape)}, {other.dtype}' for other in more)} ({error}): {advice}"
        ) from error


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int.

    Args:
        name: Name of the argument in the error.
        value: A whole number; NumPy's integers count.
        least: The smallest value allowed.

    Raises:
        TypeError: `value` is not a whole number.
        ValueError: `value` is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, found {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, found {value}")
    return int(value)


def check_sizes(name: str, sizes: Any, example: str) -> None:
    """Raise TypeError unless `sizes` is a list of sizes, or alike; a single number is a common mistake.

    Args:
        name: Name of the argument in the error.
        sizes: Sizes or widths.
        example: What to write, in the error.
    """
    if not isinstance(sizes, Iterable):
        raise TypeError(f"{name} must be a list of sizes, such as {example}, found {sizes!r}")


def check_positive(name: str, value: Any) -> float:
    """Return `value`, a number or a tensor of one, as a float.

    Args:
        name: Name of the argument in the error.
        value: A positive, finite number.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is not positive, or not finite.
    """
    is_number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    if isinstance(value, bool) or not is_number:
        raise TypeError(f"{name} must be a number, found {value!r}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, found {value}")
    return float(value)


def checks_values() -> bool:
    """Whether parts check the values of their data: always, except in a recording (see `pyrovae.compiled.record`)."""
    return _checks_values


@contextmanager
def without_checks() -> Iterator[None]:
    """Skip all checks of values inside the block: a recorded program cannot branch on values. Check the data before."""
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
