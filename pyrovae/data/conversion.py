"""Convert arrays, frames and tensors to tensors of the dtype that the programs take."""

from collections.abc import Mapping
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.frames import Table

__all__ = ["Numbers", "check_same_columns", "check_same_rows", "converted", "is_table"]

_LARGEST_INTEGER = 2**63 - 1
_LARGEST_WHOLE = 2**53  # up to here float64 tells whole numbers from others
_FEW = 100  # a longer list holds numbers or rows, not arguments


class Numbers(NamedTuple):
    """What numbers become on their way to the programs.

    Attributes:
        dtype: Floating-point dtype of the programs. If None, they have no parameters to tell: tensors then stay as they
            are, and arrays and frames become tensors of torch's default dtype.
        is_real: Whether the programs take no whole numbers as the data x (the first argument, or the one named x).
        converts: Whether tensors change, too, and not only arrays and frames.
    """

    dtype: torch.dtype | None = None
    is_real: bool = False
    converts: bool = True

    def of_arrays(self) -> "Numbers":
        """What arrays and frames alone become, before a transform sees them."""
        return self._replace(is_real=False, converts=False)


def converted(value: Any, numbers: Numbers, name: str) -> Any:
    """A tensor in place of an array or frame, also inside containers; constants as they are."""
    if isinstance(value, Table):
        raise TypeError(
            f"{name} is a Table, found in place of a tensor: pass its values and the mask of its known cells, "
            f"{{'x': table.values, 'observed': table.observed}} to fit, and table.values, observed=table.observed to an "
            f"evaluation"
        )
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise ValueError(f"{name} is a sparse tensor, which cannot be cut into batches: x.to_dense()")
        return _of_tensor(value, numbers, name) if numbers.converts and numbers.dtype is not None else value
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        raise TypeError(f"{name} is a sparse matrix ({type(value).__name__}): pass x.toarray()")
    array_numbers = numbers._replace(dtype=torch.get_default_dtype() if numbers.dtype is None else numbers.dtype)
    if isinstance(value, Mapping):
        return {key: converted(item, numbers, f"{name}, {key!r}") for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(converted(item, numbers, f"{name}, item {place}") for place, item in enumerate(value, 1))
    if is_table(value):
        return _of_frame(value, array_numbers, name)
    if isinstance(value, np.ndarray):
        return _of_array(value, array_numbers, name)
    if value is None or isinstance(value, Number | str | bytes) or callable(value) or not hasattr(value, "__array__"):
        return value
    return _of_array(np.asarray(value), array_numbers, name)


def _of_tensor(tensor: Tensor, numbers: Numbers, name: str) -> Tensor:
    dtype = numbers.dtype
    assert dtype is not None
    if numbers.is_real and tensor.is_complex():
        raise TypeError(
            f"{name}: found {tensor.dtype} for programs of real numbers: torch.view_as_real(x).flatten(1) keeps both parts, "
            f"x.abs() the magnitudes"
        )
    if tensor.dtype == torch.uint8 and not numbers.is_real:
        return tensor.to(dtype if tensor.ndim > 1 else torch.int64)
    if tensor.dtype == dtype or not (tensor.is_floating_point() or numbers.is_real):
        return tensor
    changed = _changed(tensor, dtype)
    if changed is not None:
        wider = tensor.dtype if tensor.is_floating_point() else torch.float64
        raise ValueError(
            f"{name}: found {tensor.dtype} for programs in {dtype}, which would change {changed}: convert it, "
            f".to({dtype}), or the programs, .to({wider})"
        )
    return tensor.to(dtype)


def _changed(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """The first value that the dtype does not hold, in words; None if it holds all."""
    there = tensor.detach()
    back = there.to(dtype).to(there.dtype)
    wrong = (back != there) & ~(there.isnan() & back.isnan())
    if not wrong.any():
        return None
    position = tuple(wrong.nonzero()[0].tolist())
    return f"{int(wrong.sum())} of {there.numel()} values, for example {there[position].item()!r} to {back[position].item()!r}"


def _of_array(array: np.ndarray, numbers: Numbers, name: str) -> Tensor:
    dtype = numbers.dtype
    assert dtype is not None
    if isinstance(array, np.ma.MaskedArray):
        if np.ma.is_masked(array):
            raise TypeError(
                f"{name}: found a masked array with {int(np.ma.count_masked(array))} missing values: pass "
                f"array.filled(0) and the mask, observed=~array.mask"
            )
        array = np.asarray(array)
    kind = array.dtype.kind
    if kind in "biufc":
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if kind == "f":
        return _rounded(array, dtype, name)
    if kind == "u" and array.dtype.itemsize > 1:
        if array.size and array.max() > _LARGEST_INTEGER:
            raise ValueError(f"{name}: found {array.max()}, which no torch integer holds")
        array = array.astype(np.int64)
    if kind not in "biuc":
        raise TypeError(f"{name}: expected numbers, found an array of {_kind(array)}")
    return _of_tensor(torch.tensor(np.asarray(array, order="C")), numbers, name)


def _rounded(array: np.ndarray, dtype: torch.dtype, name: str) -> Tensor:
    """Round to the dtype; refuse a whole number that changes, a number that overflows, and one that becomes 0."""
    if array.dtype.kind in "iu" and array.size and max(-int(array.min()), int(array.max())) > _LARGEST_WHOLE:
        raise ValueError(
            f"{name}: found whole numbers above 2^53, which floating point cannot hold exactly: rescale them"
        )
    before = torch.tensor(np.asarray(array, dtype=np.float64, order="C"))
    after = before.to(dtype)
    back = after.double()
    is_whole = (before == before.round()) & (before.abs() <= _LARGEST_WHOLE)
    lost = (before != back) & ~before.isnan() & (is_whole | back.isinf() | (back == 0))
    if lost.any():
        position = tuple(lost.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: {dtype} cannot hold {before[position].item()!r}, found at {list(position)}; it would become "
            f"{back[position].item()!r}: rescale the data, or run the programs in float64 (.double())"
        )
    return after


def is_table(value: Any) -> bool:
    """Whether this is a frame or series of pandas, polars or alike."""
    if not hasattr(value, "to_numpy"):
        return False
    return hasattr(value, "columns") or (hasattr(value, "name") and hasattr(value, "dtype"))


def _of_frame(frame: Any, numbers: Numbers, name: str) -> Tensor:
    """A frame (N, columns) as one tensor of the dtype; a series (N,) as its array."""
    if not hasattr(frame, "columns"):
        return _of_array(_numbers_of(frame, name), numbers, name)
    dtype, names = numbers.dtype, list(frame.columns)
    assert dtype is not None
    if not names:
        raise ValueError(f"{name}: found a frame without columns")
    if repeated := [column for column in dict.fromkeys(names) if names.count(column) > 1]:
        raise ValueError(f"{name}: found several columns of one name, {repeated}: rename them")
    columns = {column: _numbers_of(frame[column], f"{name}, column {column!r}") for column in names}
    return torch.stack([_rounded(found, dtype, f"{name}, column {key!r}") for key, found in columns.items()], 1)


def _numbers_of(series: Any, name: str) -> np.ndarray:
    """The numbers of a column; missing ones become NaN."""
    numbers = series.to_numpy()
    if numbers.dtype.kind == "O" and hasattr(series, "isna") and getattr(series.dtype, "kind", "O") in "biuf":
        numbers = series.to_numpy(dtype=np.float64, na_value=np.nan)  # pandas' nullable numbers
    if numbers.dtype.kind not in "biuf":
        example = next((value for value in numbers.tolist() if not isinstance(value, Number)), None)
        raise TypeError(
            f"{name} holds no numbers: found {_kind(numbers)}{'' if example is None else f', for example {example!r}'}. Code "
            f"it as numbers, leave it out, or turn a frame into numbers by pyrovae.data.table"
        )
    return numbers


def _kind(array: np.ndarray) -> str:
    return {"O": "Python objects", "U": "text", "S": "bytes", "T": "text", "M": "dates", "m": "time differences"}.get(
        array.dtype.kind, str(array.dtype)
    )


def check_same_rows(**values: Any) -> None:
    """Raise ValueError if pandas frames or series of one call do not belong together, by their labels.

    Rows and columns are taken in their order: those of one length must have the same index, and frames with the same
    columns must have them in the same order.

    Args:
        values: Arguments of the programs by their names in errors; anything may be among them.
    """
    first: dict[int, tuple[str, Any]] = {}
    for name, value in values.items():
        for index in _labels(value, "index"):
            other, expected = first.setdefault(len(index), (name, index))
            pairs = () if index.equals(expected) else enumerate(zip(index, expected, strict=True))
            for row, (label, of_other) in pairs:
                if label != of_other:
                    raise ValueError(
                        f"row {row} has the label {label!r} in {name} and {of_other!r} in {other}: rows are taken in "
                        f"their order, whatever their labels (the index), so these may not belong together. Order them "
                        f"alike, b.loc[a.index], or drop labels that mean nothing, .reset_index(drop=True) of both"
                    )
    check_same_columns(**values)


def check_same_columns(**values: Any) -> None:
    """Raise ValueError if two frames have the same columns in different orders; see `check_same_rows`."""
    first: dict[frozenset, tuple[str, Any]] = {}
    for name, value in values.items():
        for columns in _labels(value, "columns"):
            other, expected = first.setdefault(frozenset(columns), (name, columns))
            if len(columns) == len(expected) and columns != expected:
                raise ValueError(
                    f"the columns of {name} are {', '.join(map(str, columns))}, and those of {other} are "
                    f"{', '.join(map(str, expected))}: columns are taken in their order, whatever their names. Order them "
                    f"alike, b[a.columns], or pass b.to_numpy() if this order is meant"
                )


def _labels(value: Any, kind: str) -> list[Any]:
    """The labels of the rows ("index", of pandas) or "columns" of an argument, if it is a frame, and of frames in it."""
    if isinstance(value, Mapping):
        return [labels for item in value.values() for labels in _labels(item, kind)]
    if type(value) in (tuple, list):
        return [labels for item in value for labels in _labels(item, kind)] if len(value) < _FEW else []
    labels = getattr(value, kind, None)
    if kind == "columns":
        return [list(labels)] if is_table(value) and labels is not None else []
    return [labels] if hasattr(labels, "equals") else []
