"""Whether two ways to run a program give the same log weights: cut or whole, particles together or apart.

In float32 rounding hides what is to be found: at |log w| = 1,000 and with networks behind it, honest weights differ by 0.01
nats from one batch size to the next, and data that influence each other by as much would pass. So both ways are run in
float64, whatever the program's dtype: a dispatch mode casts what each operation is given. A program that cannot be run so
is compared in its own precision.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["equivalent", "in_float64"]

_LOW = {torch.float32, torch.float16, torch.bfloat16}


def equivalent(both: Callable[[], tuple[Tensor, Tensor]], *, atol: float = 0.0) -> bool:
    """Whether the two log weights that `both()` gives are the same up to rounding, or to `atol` nats if that is more."""
    try:
        with in_float64():
            first, second = both()
    except Exception:  # an operation without float64, or a program that minds: as it is
        first, second = both()
    if first.shape != second.shape:
        return False
    finite = first[first.isfinite()]
    scale = max(1.0, finite.abs().max().item()) if len(finite) else 1.0
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (first, second))
    tolerance = scale * (256 * eps if eps > 1e-12 else eps**0.5)
    return torch.allclose(first.double(), second.double(), rtol=0.0, atol=max(tolerance, atol))


class in_float64(TorchDispatchMode):
    """Inside, floating-point operations give float64: parameters, captured tensors and arguments are cast as they are used.

    Views and operations in place are left as they are, or they would act on a copy.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; asked to see to that, torch imports its compiler, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if not func.is_view and not func._schema.is_mutable:
            args, named = tree_map(_cast, (args, named))
            if named.get("dtype") in _LOW:
                named["dtype"] = torch.float64
        return func(*args, **named)


def _cast(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in _LOW else value
