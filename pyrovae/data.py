"""Data: tensors in, tensors out. The MNIST family through torchvision, digits that need no network, binarisation."""

import logging
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "NAMES",
    "DataUnavailableError",
    "Splits",
    "binarize",
    "data_dir",
    "digits",
    "fashion_mnist",
    "kmnist",
    "load",
    "mnist",
]

_logger = logging.getLogger("pyrovae")
_CLASSES = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}
NAMES = ("auto", *_CLASSES, "digits")
_DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer
_DIGITS_SPLIT_SEED = 0


class DataUnavailableError(RuntimeError):
    """A data set is neither on disk nor to be had from the network."""


@dataclass(frozen=True)
class Splits:
    """A data set in three parts, images (N, channels, height, width) in [0, 1] with their labels (N,).

    `validation` is None where all of its images went to `train`. `transform` makes a batch of `train` ready for use:
    `binarize` where the training images are grey and binarised anew at every use (dynamic), None where nothing
    is left to do. `validation` and `test` are ready as they are: binarised once, from `data_seed`.
    """

    name: str
    train: Tensor
    validation: Tensor | None
    test: Tensor
    train_labels: Tensor
    validation_labels: Tensor | None
    test_labels: Tensor
    binarization: str | None = None
    data_seed: int | None = None
    transform: Callable[[Tensor], Tensor] | None = None

    @property
    def data_shape(self) -> torch.Size:
        """Shape of one image."""
        return self.train.shape[1:]

    def binarized(self, binarization: str | None = "dynamic", data_seed: int = 0) -> "Splits":
        """These images made binary, x ~ Bernoulli(grey value).

        dynamic: training images are redrawn at every use; static: drawn once; None: all images stay grey.
        Validation and test images are drawn once in either case, each split by a generator of its own from
        `data_seed`, so that a test set is the same for every training seed, device and choice of splits.

        Raises ValueError for another word, and for images already binarised.

        Source: Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016), for dynamic;
        Larochelle & Murray, The Neural Autoregressive Distribution Estimator (2011), for static.
        """
        if binarization not in ("dynamic", "static", None):
            raise ValueError(f"binarization must be 'dynamic', 'static' or None, found {binarization!r}")
        if self.binarization is not None:
            raise ValueError(f"these images are binarised already ({self.binarization})")
        if binarization is None:
            return self

        def draw(images: Tensor | None, stream: int) -> Tensor | None:
            if images is None:
                return None
            return binarize(images, torch.Generator().manual_seed(3 * data_seed + stream))

        dynamic = binarization == "dynamic"
        return replace(
            self,
            train=self.train if dynamic else draw(self.train, 2),
            validation=draw(self.validation, 1),
            test=draw(self.test, 0),
            binarization=binarization,
            data_seed=data_seed,
            transform=binarize if dynamic else None,
        )


def binarize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw binary pixels with the grey values as probabilities, x ~ Bernoulli(images).

    Shapes: any, values in [0, 1]; the same shape and dtype, values 0 and 1. (`torch.bernoulli` draws from the same
    distribution and takes three times as long on a CPU.)

    >>> binarize(torch.tensor([0.0, 1.0]))
    tensor([0., 1.])
    """
    uniform = torch.rand(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    return (uniform < images).to(images.dtype)


def load(name: str = "auto", root: str | os.PathLike | None = None, **options) -> Splits:
    """Load a data set by name: auto, mnist, fashion, kmnist or digits.

    auto takes MNIST; where it is neither on disk nor to be had from the network, it says so in one line of the log
    and takes the digits. `root` and `options` are those of `mnist`.

    Raises ValueError for another name, and what `mnist` raises.
    """
    if name not in NAMES:
        raise ValueError(f"no data set {name!r}: choose one of {', '.join(NAMES)}")
    if name == "digits":
        return digits(**options)
    if name != "auto":
        return _mnist_family(name, root, **options)
    try:
        return _mnist_family("mnist", root, **options)
    except DataUnavailableError:
        _logger.warning(
            "MNIST is neither in %s nor to be had from the network: going on with scikit-learn's embedded 8x8 digits.",
            data_dir(root),
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
        cache folder of the user's
    binarization, data_seed: see `Splits.binarized`
    train_on_all: train on all 60,000 images, without a validation set

    Raises DataUnavailableError (a RuntimeError) if it is neither there nor can be downloaded; ValueError, with its
    name, for a file that is truncated or of the wrong kind.

    Source: LeCun, Bottou, Bengio & Haffner, Gradient-based learning applied to document recognition (1998).
    """
    return _mnist_family("mnist", root, binarization=binarization, data_seed=data_seed, train_on_all=train_on_all)


def fashion_mnist(root: str | os.PathLike | None = None, **options) -> Splits:
    """Fashion-MNIST: as `mnist`, of 28x28 articles of clothing.

    Source: Xiao, Rasul & Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning (2017).
    """
    return _mnist_family("fashion", root, **options)


def kmnist(root: str | os.PathLike | None = None, **options) -> Splits:
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
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_DIGITS_SPLIT_SEED))
    images, labels = images[order], labels[order]
    return _split("digits", images[:-300], labels[:-300], images[-300:], labels[-300:], 300, train_on_all).binarized(
        binarization, data_seed
    )


def data_dir(root: str | os.PathLike | None = None) -> Path:
    """The folder data sets are looked for and downloaded to: `root`, else $PYROVAE_DATA, else the user's cache."""
    if root is None:
        root = os.environ.get("PYROVAE_DATA") or None
    if root is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(cache) / "pyrovae"
    return Path(root).expanduser()


def _split(name, images, labels, test, test_labels, num_validation, train_on_all) -> Splits:
    if train_on_all:
        return Splits(name, images, None, test, labels, None, test_labels)
    cut = len(images) - num_validation
    return Splits(name, images[:cut], images[cut:], test, labels[:cut], labels[cut:], test_labels)


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
    dataset = getattr(torchvision.datasets, _CLASSES[name])
    raw = folder / _CLASSES[name] / "raw"
    for part in ("train", "t10k"):
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            _check_idx(raw / f"{part}-{kind}-ubyte", header)
    parts = []
    for train in (True, False):
        try:
            parts.append(dataset(folder, train=train))
        except RuntimeError:  # not there (yet)
            parts.append(_download(dataset, folder, name, train))
    tensors = [tensor for part in parts for tensor in (part.data.unsqueeze(1).float().div(255), part.targets)]
    return _split(name, *tensors, 10_000, train_on_all).binarized(binarization, data_seed)


def _download(dataset, folder: Path, name: str, train: bool):
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # torchvision sets none, and a dead network would hang it
        folder.mkdir(parents=True, exist_ok=True)
        return dataset(folder, train=train, download=True)
    except (RuntimeError, OSError) as error:
        raise DataUnavailableError(
            f"{_CLASSES[name]} is not in {folder} and cannot be downloaded to it ({error}): connect to the network, or "
            f"put torchvision's files into {folder / _CLASSES[name] / 'raw'}, or name another folder "
            f"(--data-dir, $PYROVAE_DATA); --dataset digits needs no download"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _check_idx(path: Path, header_size: int) -> None:
    """Raise ValueError, naming the file, if an IDX file of bytes is not as long as its header says."""
    if not path.exists():
        return
    with path.open("rb") as file:
        header = file.read(header_size)
    num_axes = header_size // 4 - 1
    magic = 0x0800 + num_axes
    if len(header) < header_size or struct.unpack(">I", header[:4])[0] != magic:
        raise ValueError(
            f"{path} is no IDX file of bytes with {num_axes} axes (magic number {magic:#06x}, found "
            f"{header[:4].hex() or 'an empty file'}): delete it, and it is downloaded anew"
        )
    sizes = struct.unpack(f">{num_axes}I", header[4:])
    expected = header_size + torch.Size(sizes).numel()
    found = path.stat().st_size
    if found != expected:
        raise ValueError(
            f"{path} is truncated or damaged: its header promises {expected} bytes, found {found}: delete it, and it is "
            f"downloaded anew"
        )
