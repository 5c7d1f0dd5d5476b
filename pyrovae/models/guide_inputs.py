"""What a guide is called with by functions that encode data: checked, as tensors, and in batches on its device."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyrovae.common.networks import Inputs, check_context, check_mask
from pyrovae.data.conversion import check_same_rows
from pyrovae.data.forms import as_tensor, warn_of_table_without_mask
from pyrovae.guides.base import Guide
from pyrovae.models.generative import LatentVariableModel
from pyrovae.programs.parameters import numbers_of

__all__ = ["batches", "data_of", "given_tensor", "inputs_of"]


def inputs_of(guide: Guide, x: Any, context: Any = None, observed: Any = None) -> Inputs:
    """Return data, context and mask as tensors of matching rows; arrays and frames become numbers of the guide.

    Raises:
        ValueError: If their rows, columns or shapes do not match, or `x` is one datum instead of a batch.
    """
    check_same_rows(x=x, context=context, observed=observed)
    warn_of_table_without_mask(x, observed)
    x = data_of(x, guide)
    context = given_tensor("context", context, guide)
    if context is not None:
        check_context(context, len(x))
    return Inputs(x, context, None if observed is None else check_mask(given_tensor("observed", observed, guide), x))


def batches(data: Inputs, size: int, device: torch.device | None) -> Iterator[Inputs]:
    """Yield the rows of the data in order, `size` at a time, on a device."""
    for start in range(0, len(data.x), size):
        yield data.map(partial(_moved, rows=slice(start, start + size), device=device))


def _moved(tensor: Tensor, rows: slice, device: torch.device | None) -> Tensor:
    return tensor[rows].to(device)


def given_tensor(name: str, value: Any, program: Any) -> Any:
    """Return an array as a tensor, in the numbers of the program; a tensor and None as they are."""
    if value is None or isinstance(value, Tensor):
        return value
    return as_tensor(name, value, numbers_of(program)._replace(is_real=False))


def data_of(x: Any, guide: Guide, model: LatentVariableModel | None = None, name: str = "x") -> Tensor:
    """Return data as a tensor.

    Raises:
        ValueError: If this is one datum instead of a batch, and the shape of a datum is known.
    """
    if not isinstance(x, Tensor):
        x = as_tensor(name, x, numbers_of(guide) if model is None else numbers_of(guide, model))
    part = getattr(guide, "encoder_net", None) if model is None else model.likelihood
    data_shape = getattr(part, "data_shape", None)
    if data_shape is not None and x.shape == data_shape:
        raise ValueError(
            f"expected data of shape (N, {', '.join(map(str, data_shape))}), found {tuple(x.shape)} for {name}, one datum: "
            f"add a leading axis, {name}[None]"
        )
    return x
