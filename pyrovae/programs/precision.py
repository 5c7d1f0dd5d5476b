"""Programs whose layers are computed in bfloat16: for training and evaluation with `precision="bf16"`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyrovae.common.arguments import map_tensors
from pyrovae.programs.enumeration import SummedOut
from pyrovae.programs.traces import Program

__all__ = ["check_precision", "in_precision"]

# The functions of linear and convolutional layers. Distributions use other functions to multiply matrices.
_LAYERS = {
    F.linear,
    F.bilinear,
    *(F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}


class _Rounded(TorchFunctionMode):
    """Round input, weights and bias of the layers inside to bfloat16, and return their output as float32.

    `torch.autocast` goes by operation instead of layer: it hands the features to the distributions in bfloat16, and
    rounds the matrix products in densities, too (that of a LowRankMultivariateNormal is off by 0.003 nats).
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function not in _LAYERS or not _is_float32(args[0] if args else kwargs["input"]):
            return function(*args, **kwargs)
        args, kwargs = map_tensors(lambda tensor: tensor.bfloat16() if _is_float32(tensor) else tensor, (args, kwargs))
        return function(*args, **kwargs).float()


def _is_float32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32


def _rounded(program: Program) -> Program:
    if isinstance(program, SummedOut):
        return program.around(_rounded(program.drawn))

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Rounded():
            return program(*args, **kwargs)

    return run


# name -> (program -> program)
_PRECISIONS: dict[str, Callable[[Program], Program]] = {
    "float32": lambda program: program,
    "medium": lambda program: program,  # `float32_products` around the step instead
    "bf16": _rounded,
}


def check_precision(precision: str) -> None:
    """Raise ValueError unless `in_precision` knows this precision."""
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {list(_PRECISIONS)}, found {precision!r}")


def in_precision(precision: str, *programs: Program) -> list[Program]:
    """Return the programs with their layers computed in a precision.

    "bf16" rounds input and weights of linear and convolutional layers to bfloat16 (3 significant digits) and
    accumulates in float32 or better; outputs and weight gradients are rounded to bfloat16 too. Parameters, updates and
    everything else stay float32. Layers in float64 are unchanged, and so is what is no layer to torch: products by `@`,
    and the insides of `nn.MultiheadAttention`, of recurrent networks and of scripted ones.

    Args:
        precision: "float32" or "medium" (no change here; see `float32_products`), or "bf16".
        programs: models and guides.

    Raises:
        ValueError: if the precision has another name.
    """
    check_precision(precision)
    return [_PRECISIONS[precision](program) for program in programs]
