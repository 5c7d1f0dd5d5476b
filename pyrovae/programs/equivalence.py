"""Tests whether two ways to run a program give the same log weights: data in pieces or whole, particles together or
apart.

In float32 rounding can hide a difference: at |log w| = 1,000 and with networks, correct weights differ by 0.01 nats
between batch sizes, and data that influence each other as weakly would pass. So both ways are run in float64, whatever
the program's dtype: a dispatch mode casts the inputs of each operation. If a program cannot run in float64, it is
compared in its own precision.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["equivalent", "in_float64"]

_LOW = {torch.float32, torch.float16, torch.bfloat16}


def equivalent(both: Callable[[], tuple[Tensor, Tensor]], *, atol: float = 0.0) -> bool:
    """Whether the two log weights of `both()` agree up to rounding, or up to `atol` nats if that is more."""
    try:
        with in_float64():
            first, second = both()
    except Exception:  # the program does not run in float64: compare in its own precision
        first, second = both()
    if first.shape != second.shape:
        return False
    finite = first[first.isfinite()]
    scale = max(1.0, finite.abs().max().item()) if len(finite) else 1.0
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (first, second))
    tolerance = scale * (256 * eps if eps > 1e-12 else eps**0.5)
    return torch.allclose(first.double(), second.double(), rtol=0.0, atol=max(tolerance, atol), equal_nan=True)


class in_float64(TorchDispatchMode):
    """Context in which floating-point operations give float64: their inputs are cast, parameters and constants
    included.

    Views and in-place operations keep their dtype, because they would act on a copy.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; with True, torch imports its compiler, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if not func.is_view and not func._schema.is_mutable:
            args, named = tuple(map(_cast, args)), {name: _cast(value) for name, value in named.items()}
            if named.get("dtype") in _LOW:
                named["dtype"] = torch.float64
        return func(*args, **named)


def _cast(value: Any) -> Any:
    """The value with its floating-point tensors in float64; operations take tensors, and lists of them."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _LOW else value
    return [_cast(item) for item in value] if type(value) in (list, tuple) else value
