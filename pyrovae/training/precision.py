"""Networks in bfloat16, densities in float32."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyrovae.common.arguments import map_tensors
from pyrovae.programs.traces import Program

__all__ = ["PRECISIONS", "in_precision"]

# What linear and convolutional layers call; distributions multiply matrices by other functions.
_LAYERS = {
    F.linear,
    F.bilinear,
    *(F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}


class _Rounded(TorchFunctionMode):
    """Layers inside see their input, weights and bias rounded to bfloat16, and give their output as float32.

    `torch.autocast` would take the distributions' own arithmetic along, and leave features in bfloat16 to them.
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
    def run(*args: Any, **kwargs: Any) -> Any:
        with _Rounded():
            return program(*args, **kwargs)

    return run


# name -> (program -> program)
PRECISIONS: dict[str, Callable[[Program], Program]] = {"float32": lambda program: program, "bf16": _rounded}


def in_precision(precision: str, *programs: Program) -> list[Program]:
    """The programs with their layers computed in a precision: "float32" as they are, "bf16".

    bf16: linear layers and convolutions round their input and weights to bfloat16 (3 significant digits) and add up in
    float32 or better, and their outputs and weight gradients are rounded to bfloat16 too. Parameters, their updates and all
    else stay float32. Layers of float64 are left alone.

    Raises ValueError for another name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, found {precision!r}")
    return [PRECISIONS[precision](program) for program in programs]
