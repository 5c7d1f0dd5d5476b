"""Turn a batch of any form (tensor, array, frame, tuple, mapping) into the arguments of the programs."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyrovae.common.arguments import map_tensors
from pyrovae.common.reporting import warn
from pyrovae.data.conversion import Numbers, check_same_rows, converted, is_table

__all__ = ["Batch", "as_arguments", "as_batch", "as_tensor", "by_position", "is_stream", "signature_of", "takes_items"]


class Batch(NamedTuple):
    """The arguments of a program for some data: it is called as `program(*batch.args, **batch.kwargs)`.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        num_data: N, the length of the first tensor. Tensors of this length hold one row for each datum; all others are
            constants.
        has_rows: For each tensor, in order, whether it holds one row for each datum. `rows` fills this in, because a
            constant may be as long as the rows that it chose; None if the lengths decide.
    """

    args: tuple
    kwargs: dict[str, Any]
    num_data: int
    has_rows: tuple[bool, ...] | None = None

    def rows(self, index: Tensor | slice) -> "Batch":
        """Return the data at these positions; constants stay whole."""
        has_rows = self._has_rows()
        are_data = iter(has_rows)
        num_data = len(index) if isinstance(index, Tensor) else len(range(*index.indices(self.num_data)))
        cut = self._mapped(lambda tensor: tensor[index] if next(are_data) else tensor)
        return Batch(cut.args, cut.kwargs, num_data, has_rows)

    def blocks(self, size: int, only_ends: bool = False) -> Iterator["Batch"]:
        """Yield blocks of `size` data; if `only_ends`, the first and the last one only."""
        starts = range(0, self.num_data, size)
        for start in dict.fromkeys((starts[0], starts[-1])) if only_ends else starts:
            yield self.rows(slice(start, start + size))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with all tensors on this device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def by_position(self) -> "Batch":
        """Return the batch with the context by position; see `by_position`."""
        args, kwargs = by_position(self.args, self.kwargs)
        return self._replace(args=args, kwargs=kwargs)

    def detach(self) -> "Batch":
        """Return the batch without gradients of its tensors."""
        return self._mapped(Tensor.detach)

    def filled(self) -> "Batch":
        """Return the batch with another value of the same column in place of each that is not finite; 0 if there is none."""

        def fill(tensor: Tensor) -> Tensor:
            known = tensor.isfinite()
            if known.all() or not tensor.ndim:
                return torch.where(known, tensor, 0)
            first = known.long().argmax(0, keepdim=True)
            of_column = torch.where(known, tensor, 0).gather(0, first)
            return torch.where(known, tensor, of_column)

        return self._mapped(fill)

    def is_finite(self) -> Tensor:
        """Whether all numbers of each datum are finite (N,)."""
        found = torch.ones(self.num_data, dtype=torch.bool, device=self.device)
        for tensor in self.data_tensors.values():
            found &= tensor.reshape(self.num_data, -1).isfinite().all(1)
        return found

    @property
    def form(self) -> Any:
        """The data as they were given: one tensor, a tuple or a dict."""
        return self.kwargs or (self.args[0] if len(self.args) == 1 else self.args)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their place, for messages: "argument 1", "argument 'mask'", "argument 1, 'image'"."""
        found: dict[str, Tensor] = {}
        for name, value in _named(self.args, self.kwargs):
            _collect(name, value, found)
        return found

    @property
    def data_tensors(self) -> dict[str, Tensor]:
        """Those of `tensors` that hold one row for each datum."""
        return {
            name: tensor
            for (name, tensor), has_rows in zip(self.tensors.items(), self._has_rows(), strict=True)
            if has_rows
        }

    @property
    def data(self) -> Tensor:
        """The first tensor, whose length is N."""
        return next(tensor for tensor in self.tensors.values() if tensor.ndim)

    @property
    def device(self) -> torch.device:
        """The device of the data."""
        return self.data.device

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        args, kwargs = map_tensors(function, (self.args, self.kwargs))
        return self._replace(args=args, kwargs=kwargs)

    def _has_rows(self) -> tuple[bool, ...]:
        if self.has_rows is not None:
            return self.has_rows
        return tuple(tensor.ndim > 0 and len(tensor) == self.num_data for tensor in self.tensors.values())


def is_stream(data: Any) -> bool:
    """Whether the data come in batches (a `DataLoader`) or one by one (a `Dataset`) instead of all at once."""
    if isinstance(data, TensorDataset):
        return False
    if isinstance(data, DataLoader | Dataset):
        return True
    # Hugging Face's data sets are not torch data sets, but are indexed by position, too.
    known = (Tensor, np.ndarray, str, bytes, tuple, list, Mapping)
    return not isinstance(data, known) and not is_table(data) and hasattr(type(data), "__getitems__")


def as_batch(data: Any, numbers: Numbers | torch.dtype | None = None, name: str = "data") -> Batch:
    """Turn data into the arguments that a program is called with.

    A tensor, array or frame becomes the one argument, `program(x)`; the items of a tuple, list or `TensorDataset`
    become `program(*items)`; a mapping becomes `program(**items)`.

    Numbers become those of the programs. NumPy arrays and frames with fractions are rounded to their dtype, because
    NumPy's float64 is seldom a choice; a tensor with another floating-point dtype is converted only if no value changes.
    Bytes (uint8) become that dtype, too, or int64 if there is one number for each datum, a label. Other whole numbers
    and booleans stay (labels, tokens, masks), except in the data x of programs that take no whole numbers there.

    Args:
        data: The data, N rows in each array that holds data.
        numbers: What numbers become, or the dtype alone; torch's default dtype if None.
        name: Name of the argument in errors.

    Returns:
        The program's arguments, with tensors in place of arrays and frames.

    Raises:
        TypeError: Something is neither a tensor, an array, a frame nor a constant, or holds no numbers; the message
            names the column.
        ValueError: There are no data, a tensor is sparse, or a conversion would change values.
    """
    if not isinstance(numbers, Numbers):
        numbers = Numbers(torch.get_default_dtype() if numbers is None else numbers)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Mapping):
        wrong = [key for key in data if not isinstance(key, str)]
        if wrong:
            raise TypeError(
                f"{name} is a mapping, whose keys name the arguments of the programs; found key {wrong[0]!r}"
            )
        # Users do not think of the order of a mapping: x holds the data, whatever its position.
        items: tuple[tuple, dict[str, Any]] = (), dict(sorted(data.items(), key=lambda item: item[0] != "x"))
    elif isinstance(data, tuple | list):
        if data and all(isinstance(item, Number) for item in data):
            raise TypeError(
                f"{name} must be a tensor or an array; found a {type(data).__name__} of numbers: torch.tensor(...)"
            )
        items = tuple(data), {}
    else:
        if data is None or isinstance(data, Number | str | bytes) or callable(data):
            raise TypeError(_expected(name, data))
        items = (data,), {}
    is_one = not isinstance(data, tuple | list | Mapping)
    batch = Batch(*as_arguments(*items, numbers, name, is_one), 0)
    lengths = [len(tensor) for tensor in batch.tensors.values() if tensor.ndim]
    if not lengths:
        found = ", ".join(f"shape {tuple(tensor.shape)}" for tensor in batch.tensors.values()) or type(data).__name__
        raise ValueError(f"{name} must hold a tensor of data (N, ...), found {found}")
    if not lengths[0]:
        raise ValueError(
            f"{name} must hold at least one datum, found a first tensor of shape {tuple(batch.data.shape)}"
        )
    return batch._replace(num_data=lengths[0])


def as_tensor(name: str, value: Any, numbers: Numbers) -> Tensor:
    """Return a tensor, array or frame as a tensor of these numbers; see `as_batch`.

    Args:
        name: Name of the argument in errors.
        value: The tensor, array or frame.
        numbers: What its numbers become.

    Raises:
        TypeError: It is none of these, or holds no numbers.
        ValueError: A conversion would change values.
    """
    tensor = converted(value, numbers, name)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor or an array, found {type(value).__name__}: torch.as_tensor({name})")
    return tensor


def as_arguments(
    args: tuple, kwargs: dict[str, Any], numbers: Numbers, name: str = "", is_one: bool = False
) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of a program with the numbers that it takes; see `as_batch`.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        numbers: What numbers become.
        name: What the arguments are of, in errors.
        is_one: Whether `name` is that of the one argument.
    """
    check_same_rows(**dict(_named(args, kwargs)))
    found = []
    for place, value in _named(args, kwargs):
        label = name if is_one else f"{name}, {place}" if name else place
        is_x = place in ("argument 1", "argument 'x'")
        found.append(converted(value, numbers if is_x else numbers._replace(is_real=False), label))
    if numbers.converts:
        warn_of_table_without_mask(*args, *kwargs.values())
    return tuple(found[: len(args)]), dict(zip(kwargs, found[len(args) :], strict=True))


def warn_of_table_without_mask(*values: Any) -> None:
    """Warn if an argument holds the values of a `Table` that lacks cells, and no other has the shape of a mask of them."""
    tensors = [value for value in values if isinstance(value, Tensor | np.ndarray)]
    for tensor in tensors:
        num_missing = getattr(tensor, "num_missing_cells", 0)
        if num_missing and sum(other.shape == tensor.shape for other in tensors) == 1:
            warn(
                f"found the values of a table without its mask: {num_missing:,} missing cells hold 0, and count as data. Pass "
                f"observed=table.observed, too, to fit as {{'x': table.values, 'observed': table.observed}}; if the zeros are "
                f"meant, pass table.values.clone()"
            )


def by_position(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments with `context` as the second positional one.

    Pyro's handlers call a program through a function with an argument `context` of its own, so that a program cannot
    get one by keyword.
    """
    if "context" not in kwargs or len(args) > 1:
        return args, kwargs
    kwargs = dict(kwargs)
    if not args:
        if "x" not in kwargs:
            return args, kwargs
        args = (kwargs.pop("x"),)
    return (*args, kwargs.pop("context")), kwargs


def takes_items(programs: Sequence[Callable], items: tuple | list | Mapping) -> bool:
    """Whether to call the programs with the items of a tuple or mapping, instead of with the whole as one argument.

    The items are the arguments, unless their number or names do not fit and one argument does: a program
    `def model(batch): x, y = batch` gets the whole.
    """

    signatures = [signature for program in programs if (signature := signature_of(program)) is not None]

    def binds(*args: Any, **kwargs: Any) -> bool:
        try:
            return all(signature.bind(*args, **kwargs) for signature in signatures)
        except TypeError:
            return False

    if isinstance(items, Mapping):
        named = all(isinstance(key, str) for key in items)
        return named and (binds(**items) or not binds(items))
    return binds(*items) or not binds(items)


def signature_of(program: Callable) -> inspect.Signature | None:
    """The arguments that a program takes; None if they are unknown (a builtin)."""
    try:
        return inspect.signature(program.forward if isinstance(program, nn.Module) else program)
    except (TypeError, ValueError):
        return None


def _named(args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    positions = [(f"argument {position}", value) for position, value in enumerate(args, 1)]
    return positions + [(f"argument {key!r}", value) for key, value in kwargs.items()]


def _collect(name: str, value: Any, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[name] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(f"{name}, {key!r}", item, found)
    elif type(value) in (tuple, list):
        for position, item in enumerate(value, 1):
            _collect(f"{name}, item {position}", item, found)


def _expected(name: str, data: Any) -> str:
    return (
        f"{name} must be a tensor, an array, a frame, a tuple or mapping of these, a Dataset or a DataLoader; found "
        f"{type(data).__name__}"
    )
