"""Tables with numbers, categories and missing cells: make one tensor of a pandas frame, and a frame of a tensor."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Column", "Table", "table"]


@dataclass(frozen=True)
class Column:
    """What a column of a `Table` holds.

    Attributes:
        name: Name of the column.
        categories: The categories that are coded 0, 1, 2, ..., or None for numbers.
        loc: Mean of the known cells; 0 for categories.
        scale: Standard deviation of the known cells; 1 for categories.
    """

    name: str
    categories: tuple[Hashable, ...] | None = None
    loc: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Table:
    """A frame as one tensor.

    Attributes:
        values: (N, num_columns): numbers in their own units, categories by their codes, missing cells 0.
        observed: Mask of the known cells (N, num_columns).
        columns: What each column holds.
    """

    values: Tensor
    observed: Tensor
    columns: tuple[Column, ...]

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        missing = (~self.observed).sum().item()
        return f"Table({len(self):,} rows, {missing:,} missing cells, {', '.join(c.name for c in self.columns)})"

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [column.name for column in self.columns]

    @property
    def loc(self) -> list[float]:
        """Means of the columns, 0 for categories: for `pyrovae.nets.TableEncoder`."""
        return [column.loc for column in self.columns]

    @property
    def scale(self) -> list[float]:
        """Standard deviations of the columns, 1 for categories: for `pyrovae.nets.TableEncoder`."""
        return [column.scale for column in self.columns]

    @property
    def num_categories(self) -> list[int]:
        """Numbers of categories of the columns, 0 for numbers: for `pyrovae.nets.TableEncoder`."""
        return [0 if column.categories is None else len(column.categories) for column in self.columns]

    def encode(self, frame: Any) -> "Table":
        """Make a table of other rows, with the categories, loc and scale of this one: a test set, new data.

        Args:
            frame: A pandas frame with the columns of this table; more columns, in any order, are left out.

        Returns:
            The other table.

        Raises:
            ValueError: A column is absent, or a cell holds a category that this table does not have, or no number; the
                message names column and value.
        """
        frame = _with_text_names(frame)
        if absent := [name for name in self.names if name not in frame.columns]:
            raise ValueError(f"the frame lacks the columns {absent} of this table: found {list(frame.columns)}")
        if repeated := [name for name in self.names if list(frame.columns).count(name) > 1]:
            raise ValueError(f"the frame has more than one column of the name(s) {repeated}: rename or drop the others")
        values, observed = zip(*(_coded(frame[column.name], column) for column in self.columns), strict=True)
        table = replace(self, values=torch.stack(values, 1), observed=torch.stack(observed, 1))
        # What `fit` and the evaluations look for, to warn if they get the zeros without the mask.
        table.values.num_missing_cells = int((~table.observed).sum())  # type: ignore[attr-defined]
        return table

    def frame(self, values: Tensor | None = None, observed: Tensor | None = None) -> Any:
        """Make a pandas frame: of this table, or of rows that a model generated or imputed.

        Args:
            values: (M, num_columns); by default the rows of this table.
            observed: Mask of the cells to show, (M, num_columns); the others become missing. By default all cells of
                `values`, or the known ones of this table.

        Returns:
            The frame, with names of categories in place of codes.

        Raises:
            ValueError: The shape is another, or a category has a code that does not exist, such as the mean of two.
        """
        import pandas as pd

        if values is None:
            values, observed = self.values, self.observed if observed is None else observed
        if values.ndim != 2 or values.shape[1] != len(self.columns):
            raise ValueError(f"values must be of shape (M, {len(self.columns)}), found {tuple(values.shape)}")
        observed = torch.ones_like(values, dtype=torch.bool) if observed is None else observed
        found = {}
        for column, cells, known in zip(self.columns, values.cpu().unbind(1), observed.cpu().unbind(1), strict=True):
            if column.categories is None:
                found[column.name] = pd.Series(cells.double().numpy()).where(pd.Series(known.numpy()))
                continue
            codes = torch.where(known, cells, -1).double()
            wrong = known & ((codes != codes.round()) | (codes < 0) | (codes >= len(column.categories)))
            if wrong.any():
                raise ValueError(
                    f"column {column.name!r} has categories of codes 0 to {len(column.categories) - 1}, found "
                    f"{codes[wrong][0].item():g}: a mean of codes is no category; draw instead (mean=False)"
                )
            found[column.name] = pd.Series(
                pd.Categorical.from_codes(codes.long().numpy(), categories=pd.Index(column.categories))
            )
        return pd.DataFrame(found)


def table(frame: Any, *, categories: Sequence[str] = ()) -> Table:
    """Turn a pandas frame into one tensor, a mask of the known cells, and the meaning of each column.

    Numbers stay in their own units; their mean and standard deviation are noted, so that a likelihood can standardise
    them (`pyrovae.likelihoods.Columns.for_table`). Text, truth values and pandas' categories are coded 0, 1, 2, ... in
    sorted order, or in that of the pandas column. NaN, None and NA are missing cells.

    Args:
        frame: A pandas frame.
        categories: Names of columns of numbers that are codes of categories, such as postcodes.

    Returns:
        The table.

    Raises:
        TypeError: It is no frame, or a column is neither numbers nor categories (dates, lists).
        ValueError: There is no row or column, two columns have one name, a number is infinite, or a column has fewer
            than two different known values; the message names the column.

    Example:
        >>> import pandas as pd
        >>> people = table(pd.DataFrame({"age": [31.0, None, 45.0], "smokes": ["no", "yes", "no"]}))
        >>> people.values
        tensor([[31.,  0.],
                [ 0.,  1.],
                [45.,  0.]])
        >>> people.columns[1].categories
        ('no', 'yes')
    """
    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"table takes a pandas frame, found {type(frame).__name__}: pandas.DataFrame(data)")
    if not frame.size:
        raise ValueError(f"a table needs a row and a column or more, found shape {frame.shape}")
    frame = _with_text_names(frame)
    names = list(frame.columns)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"columns must have different names, found {repeated} more than once: rename them")
    if unknown := sorted(set(categories) - set(names)):
        raise ValueError(f"categories={list(categories)} names columns that are not there: {unknown}; found {names}")
    columns = tuple(_described(frame[name], name, name in categories) for name in names)
    return Table(torch.empty(0), torch.empty(0), columns).encode(frame)


def _with_text_names(frame: Any) -> Any:
    """The frame with its columns named by text, because whole numbers may name columns, too."""
    return frame.set_axis([str(name) for name in frame.columns], axis=1)


def _described(series: Any, name: str, is_category: bool) -> Column:
    import pandas as pd
    from pandas.api import types

    known = series[series.notna()]
    if known.nunique() < 2:
        raise ValueError(
            f"column {name!r} holds {f'one value, {known.iloc[0]!r},' if len(known) else 'no value'} in {len(series):,} "
            f"rows: leave it out; there is nothing to model, and the density of a constant has no bound"
        )
    if isinstance(series.dtype, pd.CategoricalDtype):
        return Column(name, tuple(series.cat.categories.tolist()))
    if is_category or types.is_bool_dtype(series) or _is_text(known):
        return Column(name, tuple(sorted(known.unique().tolist())))
    if not types.is_numeric_dtype(series) or types.is_complex_dtype(series):
        raise TypeError(
            f"column {name!r} is neither numbers nor categories: found {series.dtype}, for example {known.iloc[0]!r}; turn "
            f"it into numbers (dates into days), or leave it out"
        )
    values = _numbers(known, name).double()
    return Column(name, None, values.mean().item(), values.std(correction=0).item())


def _is_text(known: Any) -> bool:
    from pandas.api import types

    return types.infer_dtype(known) in ("string", "boolean")


_NOT_NUMBERS = ("datetime", "datetime64", "date", "time", "timedelta", "timedelta64", "period", "interval", "complex")
_LARGEST_LOSS = 1e-3  # of rounding, in standard deviations of a column


def _coded(series: Any, column: Column) -> tuple[Tensor, Tensor]:
    """The numbers or codes of a column, and the mask of its known cells."""
    is_known = series.notna()
    observed = torch.tensor(is_known.tolist(), dtype=torch.bool)
    values = torch.zeros(len(series))
    if column.categories is None:
        _check_is_no_time(series, column.name)
        numbers = _numbers(series[is_known], column.name)
        values[observed] = numbers.to(values.dtype)
        lost = (values[observed].double() - numbers).abs()
        if len(lost) and lost.max() > _LARGEST_LOSS * column.scale:
            raise ValueError(
                f"column {column.name!r} holds numbers such as {numbers[lost.argmax()].item()!r}, which {values.dtype} rounds by "
                f"{lost.max():.3g}, too much beside the table's standard deviation {column.scale:.3g}: subtract a "
                f"constant first, or torch.set_default_dtype(torch.float64)"
            )
        return values, observed
    codes = {category: float(code) for code, category in enumerate(column.categories)}
    cells = series[is_known].tolist()
    if unseen := list(dict.fromkeys(repr(cell) for cell in cells if cell not in codes)):
        known = ", ".join(map(repr, column.categories[:10])) + (", ..." if len(column.categories) > 10 else "")
        raise ValueError(
            f"column {column.name!r} holds categories that the table does not have: {', '.join(unseen[:5])}; it has {known}. "
            f"Make the table with them (a pandas categorical column names all), or leave these rows out"
        )
    values[observed] = torch.tensor([codes[cell] for cell in cells])
    return values, observed


def _check_is_no_time(series: Any, name: str) -> None:
    """Raise TypeError for times and complex numbers, which pandas would turn into nanoseconds, and into real parts."""
    from pandas.api import types

    if series.dtype.kind in "mMc" or types.infer_dtype(series, skipna=True) in _NOT_NUMBERS:
        raise TypeError(
            f"column {name!r} holds numbers in the table, found {series.dtype}: turn it into numbers of the same unit "
            f"(times into seconds, .dt.total_seconds())"
        )


def _numbers(known: Any, name: str) -> Tensor:
    try:
        values = torch.as_tensor(known.to_numpy(dtype="float64").copy())
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {name!r} holds numbers in the table, found {known.dtype} ({error})") from error
    if not values.isfinite().all():
        raise ValueError(f"column {name!r} holds {values[~values.isfinite()][0].item():g}: make it missing (NaN)")
    return values
