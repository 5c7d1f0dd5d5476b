"""Loaders of the data sets: the MNIST family through torchvision, digits that need no download, Frey faces."""

import logging
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
_DOWNLOAD_TIMEOUT = 20.0  # seconds without a response
_SPLIT_SEED = 0
_FREY_FILE, _FREY_SHAPE = "freyfaces.npz", (1965, 28, 20)


class DataUnavailableError(RuntimeError):
    """A data set is not on disk and cannot be downloaded."""


def load(name: str = "auto", root: str | os.PathLike | None = None, **options: Any) -> Splits:
    """Load a data set by name.

    Args:
        name: auto, mnist, fashion, kmnist, digits or freyfaces. auto loads MNIST; if MNIST is neither on disk nor
            available for download, it logs one warning and loads the digits.
        root: As for `mnist`.
        **options: The other arguments of `mnist`.

    Returns:
        The data set, split in three.

    Raises:
        ValueError: The name is unknown, or as for `mnist`.
        DataUnavailableError: As for `mnist`, unless `name` is auto.
    """
    if name not in NAMES:
        raise ValueError(f"no data set {name!r}: choose one of {', '.join(NAMES)}")
    if name in ("digits", "freyfaces") and options.pop("draw", None) is not None:
        raise ValueError(f"draw= chooses a published test set of MNIST, and {name} has none: leave it out")
    if name == "digits":
        return digits(**options)
    if name == "freyfaces":
        return frey_faces(root, **options)
    if name != "auto":
        return _mnist_family(name, root, **options)
    try:
        return _mnist_family("mnist", root, **options)
    except DataUnavailableError:
        if options.pop("draw", None) is not None:  # of MNIST only
            raise
        missing = _missing_folder(root)
        _logger.warning(
            "%s: using scikit-learn's embedded 8x8 digits instead.",
            missing or f"MNIST is not in {data_dir(root)} and cannot be downloaded",
        )
        return digits(**options)


def mnist(
    root: str | os.PathLike | None = None,
    *,
    binarization: str | None = "dynamic",
    data_seed: int = 0,
    draw: str | None = None,
    train_on_all: bool = False,
) -> Splits:
    """Load MNIST: 50,000 training, 10,000 validation and 10,000 test images of 28x28 handwritten digits.

    You can put your own images of any number and size there instead, as bytes in MNIST's four files. The last 10,000 of
    the training file become the validation set.

    Args:
        root: Folder in torchvision's layout (root/MNIST/raw). If it is empty, the files are downloaded to it. By
            default $PYROVAE_DATA, else a folder in the user's cache. Only this last one is created if it is missing.
        binarization: See `Splits.binarized`.
        data_seed: See `Splits.binarized`.
        draw: 'seed-777' for the published binary validation and test images: see `Splits.binarized`.
        train_on_all: Train on all 60,000 images, without a validation set.

    Returns:
        The data set, split in three.

    Raises:
        DataUnavailableError: The data set is not on disk and cannot be downloaded. (A RuntimeError.)
        ValueError: A file is truncated, is of the wrong kind, has another number of data than its labels, or has
            another name or folder (the message names the file); or there are too few training images. Or as for
            `Splits.binarized`.

    References:
        LeCun, Bottou, Bengio & Haffner, Gradient-based learning applied to document recognition (1998).
    """
    return _mnist_family(
        "mnist", root, binarization=binarization, data_seed=data_seed, draw=draw, train_on_all=train_on_all
    )


def fashion_mnist(root: str | os.PathLike | None = None, **options: Any) -> Splits:
    """Load Fashion-MNIST, 28x28 images of clothing; arguments as for `mnist`.

    References:
        Xiao, Rasul & Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning (2017).
    """
    return _mnist_family("fashion", root, **options)


def kmnist(root: str | os.PathLike | None = None, **options: Any) -> Splits:
    """Load KMNIST, 28x28 images of cursive Japanese characters; arguments as for `mnist`.

    References:
        Clanuwat et al., Deep Learning for Classical Japanese Literature (2018).
    """
    return _mnist_family("kmnist", root, **options)


def digits(*, binarization: str | None = "dynamic", data_seed: int = 0, train_on_all: bool = False) -> Splits:
    """Load the handwritten digits that come with scikit-learn: 1,797 images of 8x8, without a download.

    A fixed seed splits them into 1,197 training, 300 validation and 300 test images.

    Args:
        binarization: See `Splits.binarized`.
        data_seed: See `Splits.binarized`.
        train_on_all: Train on 1,497 images, without a validation set.

    Returns:
        The data set, split in three.

    References:
        Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
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
    """Load the Frey faces: 1,965 grey images, 28 high and 20 wide, of one man's face from a film, without labels.

    They are split into 1,565 training, 200 validation and 200 test images, as published, but here by a fixed seed.
    Neighbouring frames of the film look alike and fall into different splits: the test measures how well a model fills
    in faces between others that it has seen.

    Args:
        root: Folder with freyfaces.npz (array `images`, bytes). By default $PYROVAE_DATA, else a folder in the user's
            cache. There is no download.
        binarization: See `Splits.binarized`. By default the images stay grey.
        data_seed: See `Splits.binarized`.
        train_on_all: Train on 1,765 images, without a validation set.

    Returns:
        The data set, split in three.

    Raises:
        DataUnavailableError: The file is missing. (A RuntimeError.)
        ValueError: The file is damaged. The message names it.

    References:
        Roweis, Saul & Hinton, Global Coordination of Local Linear Models (2002).
        Tomczak & Welling, VAE with a VampPrior (2018): the split.
    """
    path = data_dir(root) / _FREY_FILE
    if missing := _missing_folder(root):
        raise DataUnavailableError(missing)
    if not path.exists():
        raise DataUnavailableError(
            f"Frey faces are not in {path.parent}: put {_FREY_FILE} there (array `images` of bytes, {_FREY_SHAPE}), or "
            f"choose another folder (--data-dir, $PYROVAE_DATA); --dataset digits needs no files"
        )
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # `np.load(path)` would leave a damaged file open
            array = arrays["images"]
    except Exception as error:  # NumPy raises many types of error for a damaged file
        raise ValueError(
            f"{path} is truncated, damaged or has no `images` ({type(error).__name__}: {error}): replace it by an intact file"
        ) from error
    if array.shape != _FREY_SHAPE or array.dtype != np.uint8:
        raise ValueError(f"{path} must hold `images` of bytes, {_FREY_SHAPE}; found {array.dtype}, {array.shape}")
    order = torch.randperm(len(array), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    images = torch.as_tensor(array)[order].unsqueeze(1).float().div(255)
    splits = _split("freyfaces", images[:-200], None, images[-200:], None, 200, train_on_all)
    return splits.binarized(binarization, data_seed)


def data_dir(root: str | os.PathLike | None = None) -> Path:
    """The folder for data sets and downloads: `root`, else $PYROVAE_DATA, else a folder in the user's cache."""
    if root is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = os.environ.get("PYROVAE_DATA") or Path(cache) / "pyrovae"
    return Path(root).expanduser()


def _missing_folder(root: str | os.PathLike | None) -> str | None:
    """The error for a folder that the user named and that does not exist, else None. A misspelt name is not created."""
    folder = data_dir(root)
    if folder.is_dir() or (root is None and not os.environ.get("PYROVAE_DATA")):
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
            f"{name}: found {len(images):,} training images, but needs more than {kept:,}, of which {kept:,} are kept for "
            f"validation: add images"
            + (", or keep none for validation: train_on_all=True, --train-on-all" if kept else "")
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
    draw: str | None = None,
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
        except RuntimeError:  # not downloaded yet
            check_ready_for_download(folder, dataset, sizes)
            parts.append(_download(dataset, folder, name, train))
    (images, labels), (test, test_labels) = ((part.data.unsqueeze(1).float().div(255), part.targets) for part in parts)
    splits = _split(name, images, labels, test, test_labels, 10_000, train_on_all)
    return splits.binarized(binarization, data_seed, draw)


def _download(dataset: Any, folder: Path, name: str, train: bool) -> Any:
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # torchvision sets none and would hang on a dead network
        folder.mkdir(parents=True, exist_ok=True)
        return dataset(folder, train=train, download=True)
    except (RuntimeError, OSError) as error:
        raise DataUnavailableError(
            f"{_CLASSES[name]} is not in {folder} and cannot be downloaded to it ({' '.join(str(error).split())}): connect to "
            f"the network, or put torchvision's files into {folder / _CLASSES[name] / 'raw'}, or choose another folder (root=, "
            f"--data-dir, $PYROVAE_DATA); pv.data.digits() (--dataset digits) needs no download"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
