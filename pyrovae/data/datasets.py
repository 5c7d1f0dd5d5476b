"""The data sets: the MNIST family through torchvision, digits that need no network, Frey faces."""

import logging
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.idx import _check_idx as _check_idx  # tests look for it here
from pyrovae.data.idx import check_files, check_ready_for_download
from pyrovae.data.splits import Splits

__all__ = [
    "NAMES",
    "DataUnavailableError",
    "data_dir",
    "digits",
    "fashion_mnist",
    "frey_faces",
    "kmnist",
    "load",
    "mnist",
]

_logger = logging.getLogger("pyrovae")
_CLASSES = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}
NAMES = ("auto", *_CLASSES, "digits", "freyfaces")
_DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer
_SPLIT_SEED = 0
_FREY_FILE, _FREY_SHAPE = "freyfaces.npz", (1965, 28, 20)


class DataUnavailableError(RuntimeError):
    """A data set is neither on disk nor to be had from the network."""


def load(name: str = "auto", root: str | os.PathLike | None = None, **options: Any) -> Splits:
    """Load a data set by name: auto, mnist, fashion, kmnist, digits or freyfaces.

    auto takes MNIST; where it is neither on disk nor to be had from the network, it says so in one line of the log
    and takes the digits. `root` and `options` are those of `mnist`.

    Raises ValueError for another name, and what `mnist` raises.
    """
    if name not in NAMES:
        raise ValueError(f"no data set {name!r}: choose one of {', '.join(NAMES)}")
    if name == "digits":
        return digits(**options)
    if name == "freyfaces":
        return frey_faces(root, **options)
    if name != "auto":
        return _mnist_family(name, root, **options)
    try:
        return _mnist_family("mnist", root, **options)
    except DataUnavailableError:
        missing = _missing_folder(root)
        _logger.warning(
            "%s: going on with scikit-learn's embedded 8x8 digits.",
            missing or f"MNIST is neither in {data_dir(root)} nor to be had from the network",
        )
        return digits(**options)


def mnist(
    root: str | os.PathLike | None = None,
    *,
    binarization: str | None = "dynamic",
    data_seed: int = 0,
    train_on_all: bool = False,
) -> Splits:
    """MNIST: 50,000 training, 10,000 validation and 10,000 test images of 28x28 handwritten digits.

    root: folder in torchvision's layout (root/MNIST/raw), downloaded into where empty; else $PYROVAE_DATA, else a
        cache folder of the user's, which alone is made where it is missing
    binarization, data_seed: see `Splits.binarized`
    train_on_all: train on all 60,000 images, without a validation set

    Own images of any number and size can lie there in its place, as bytes in MNIST's four files: the last 10,000 of the
    training file are the validation set.

    Raises DataUnavailableError (a RuntimeError) if it is neither there nor can be downloaded; ValueError, with its
    name, for a file that is truncated, of the wrong kind, of another number of data than its labels, or under another name
    or in another folder; and for too few training images.

    Source: LeCun, Bottou, Bengio & Haffner, Gradient-based learning applied to document recognition (1998).
    """
    return _mnist_family("mnist", root, binarization=binarization, data_seed=data_seed, train_on_all=train_on_all)


def fashion_mnist(root: str | os.PathLike | None = None, **options: Any) -> Splits:
    """Fashion-MNIST: as `mnist`, of 28x28 articles of clothing.

    Source: Xiao, Rasul & Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning (2017).
    """
    return _mnist_family("fashion", root, **options)


def kmnist(root: str | os.PathLike | None = None, **options: Any) -> Splits:
    """KMNIST: as `mnist`, of 28x28 cursive Japanese characters.

    Source: Clanuwat et al., Deep Learning for Classical Japanese Literature (2018).
    """
    return _mnist_family("kmnist", root, **options)


def digits(*, binarization: str | None = "dynamic", data_seed: int = 0, train_on_all: bool = False) -> Splits:
    """The handwritten digits that come with scikit-learn: 1,797 images of 8x8, no network needed.

    Split into 1,197 training, 300 validation and 300 test images by a fixed seed; options as those of `mnist`.

    Source: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32).div(16).unsqueeze(1)
    labels = torch.as_tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    images, labels = images[order], labels[order]
    splits = _split("digits", images[:-300], labels[:-300], images[-300:], labels[-300:], 300, train_on_all)
    return replace(splits, num_levels=17).binarized(binarization, data_seed)


def frey_faces(
    root: str | os.PathLike | None = None,
    *,
    binarization: str | None = None,
    data_seed: int = 0,
    train_on_all: bool = False,
) -> Splits:
    """Frey faces: 1,965 grey images, 28 high and 20 wide, of one man's face from a film, without labels.

    Split into 1,565 training, 200 validation and 200 test images, as published, here by a fixed seed. Neighbours in the
    film are alike and fall into different parts: the test tells how well faces are filled in between others.

    root: folder that holds freyfaces.npz (array `images`, bytes); else $PYROVAE_DATA, else a cache folder of the user's.
        There is no download
    binarization, data_seed: see `Splits.binarized`; grey by default
    train_on_all: train on 1,765 images, without a validation set

    Raises DataUnavailableError (a RuntimeError) if the file is not there; ValueError, with its name, if it is damaged.

    Source: Roweis, Saul & Hinton, Global Coordination of Local Linear Models (2002); the split: Tomczak & Welling, VAE
    with a VampPrior (2018).
    """
    path = data_dir(root) / _FREY_FILE
    if missing := _missing_folder(root):
        raise DataUnavailableError(missing)
    if not path.exists():
        raise DataUnavailableError(
            f"Frey faces are not in {path.parent}: put {_FREY_FILE} there (array `images` of bytes, {_FREY_SHAPE}), or "
            f"name another folder (--data-dir, $PYROVAE_DATA); --dataset digits needs no files"
        )
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # NumPy leaves a damaged file open that it opened itself
            array = arrays["images"]
    except Exception as error:  # what NumPy raises for a damaged file is not one type
        raise ValueError(
            f"{path} is truncated, damaged or has no `images` ({type(error).__name__}: {error}): put a whole one there"
        ) from error
    if array.shape != _FREY_SHAPE or array.dtype != np.uint8:
        raise ValueError(f"{path} must hold `images` of bytes, {_FREY_SHAPE}; found {array.dtype}, {array.shape}")
    order = torch.randperm(len(array), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    images = torch.as_tensor(array)[order].unsqueeze(1).float().div(255)
    splits = _split("freyfaces", images[:-200], None, images[-200:], None, 200, train_on_all)
    return splits.binarized(binarization, data_seed)


def data_dir(root: str | os.PathLike | None = None) -> Path:
    """The folder data sets are looked for and downloaded to: `root`, else $PYROVAE_DATA, else the user's cache."""
    if root is None:
        root = os.environ.get("PYROVAE_DATA") or None
    if root is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(cache) / "pyrovae"
    return Path(root).expanduser()


def _missing_folder(root: str | os.PathLike | None) -> str | None:
    """What to say of a folder that was asked for and is not there: a misspelt name, most likely, and so not made."""
    folder = data_dir(root)
    if root is None and not os.environ.get("PYROVAE_DATA"):
        return None
    if folder.is_dir():
        return None
    origin = "$PYROVAE_DATA" if root is None else "root, --data-dir"
    return f"the data folder {folder} ({origin}) does not exist: make it, or correct its name"


def _split(
    name: str,
    images: Tensor,
    labels: Tensor | None,
    test: Tensor,
    test_labels: Tensor | None,
    num_validation: int,
    train_on_all: bool,
) -> Splits:
    kept = 0 if train_on_all else num_validation
    if len(images) <= kept:
        raise ValueError(
            f"{name}: found {len(images):,} training images, and more than {kept:,} are needed, of which {kept:,} are kept for "
            f"validation: add images" + (", or keep none: train_on_all=True, --train-on-all" if kept else "")
        )
    if train_on_all:
        return Splits(name, images, None, test, labels, None, test_labels)
    cut = len(images) - num_validation
    train_labels, validation_labels = (None, None) if labels is None else (labels[:cut], labels[cut:])
    return Splits(name, images[:cut], images[cut:], test, train_labels, validation_labels, test_labels)


def _mnist_family(
    name: str,
    root: str | os.PathLike | None,
    *,
    binarization: str | None = "dynamic",
    data_seed: int = 0,
    train_on_all: bool = False,
) -> Splits:
    import torchvision

    folder = data_dir(root)
    if missing := _missing_folder(root):
        raise DataUnavailableError(missing)
    dataset = getattr(torchvision.datasets, _CLASSES[name])
    raw = folder / _CLASSES[name] / "raw"
    sizes = check_files(raw)
    parts = []
    for train in (True, False):
        try:
            parts.append(dataset(folder, train=train))
        except RuntimeError:  # not there (yet)
            check_ready_for_download(folder, dataset, sizes)
            parts.append(_download(dataset, folder, name, train))
    (images, labels), (test, test_labels) = ((part.data.unsqueeze(1).float().div(255), part.targets) for part in parts)
    return _split(name, images, labels, test, test_labels, 10_000, train_on_all).binarized(binarization, data_seed)


def _download(dataset: Any, folder: Path, name: str, train: bool) -> Any:
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # torchvision sets none, and a dead network would hang it
        folder.mkdir(parents=True, exist_ok=True)
        return dataset(folder, train=train, download=True)
    except (RuntimeError, OSError) as error:
        raise DataUnavailableError(
            f"{_CLASSES[name]} is not in {folder} and cannot be downloaded to it ({' '.join(str(error).split())}): connect to "
            f"the network, or put torchvision's files into {folder / _CLASSES[name] / 'raw'}, or name another folder (root=, "
            f"--data-dir, $PYROVAE_DATA); pv.data.digits(), --dataset digits, needs no download"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
