"""Data sets: the MNIST family through torchvision, digits that need no download, Frey faces; grey or binarised."""

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
from pyrovae.data.splits import Splits, binarize, dequantize

__all__ = [
    "NAMES",
    "Column",
    "DataUnavailableError",
    "Splits",
    "Table",
    "binarize",
    "data_dir",
    "dequantize",
    "digits",
    "fashion_mnist",
    "frey_faces",
    "kmnist",
    "load",
    "mnist",
    "table",
]
