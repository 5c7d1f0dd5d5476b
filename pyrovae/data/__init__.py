"""Data sets: images, grey or binarised (the MNIST family, digits that need no download, Frey faces), tables and series.

`table` turns a pandas frame with numbers, categories and missing cells into one tensor.
"""

from pyrovae.data.datasets import (
    NAMES,
    DataUnavailableError,
    data_dir,
    digits,
    fashion_mnist,
    frey_faces,
    kmnist,
    load,
    mnist,
)
from pyrovae.data.frames import Column, Table, table
from pyrovae.data.grey_values import binarize, dequantize
from pyrovae.data.series import Series, japanese_vowels
from pyrovae.data.splits import Splits
from pyrovae.data.tables import RowSplits, airquality, breast_cancer, penguins, wine

__all__ = [
    "NAMES",
    "Column",
    "DataUnavailableError",
    "RowSplits",
    "Series",
    "Splits",
    "Table",
    "airquality",
    "binarize",
    "breast_cancer",
    "data_dir",
    "dequantize",
    "digits",
    "fashion_mnist",
    "frey_faces",
    "japanese_vowels",
    "kmnist",
    "load",
    "mnist",
    "penguins",
    "table",
    "wine",
]
