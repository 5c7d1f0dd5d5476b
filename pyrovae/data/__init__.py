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
from pyrovae.data.splits import Splits, binarize, dequantize

__all__ = [
    "NAMES",
    "DataUnavailableError",
    "Splits",
    "binarize",
    "data_dir",
    "dequantize",
    "digits",
    "fashion_mnist",
    "frey_faces",
    "kmnist",
    "load",
    "mnist",
]
