"""Checks of the four IDX files in MNIST's layout: they must be intact, match each other, and lie in the right place."""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["check_files", "check_ready_for_download"]

_PARTS, _KINDS = ("train", "t10k"), {"images": 3, "labels": 1}  # number of axes by kind
_PUBLISHED = {"train": 60_000, "t10k": 10_000}  # number of data in every data set that torchvision downloads
_GZIP = b"\x1f\x8b"
# train-images.idx3-ubyte, train_images_idx3_ubyte.gz, test-labels-idx1-ubyte, ...
_OTHER_NAME = re.compile(
    r"(?P<part>train|t10k|test)[-_. ]?(?P<kind>images|labels)([-_. ]?idx[13])?([-_. ]?ubyte)?(\.idx)?(\.gz)?",
    re.IGNORECASE,
)


def check_files(raw: Path) -> dict[Path, tuple[int, ...]]:
    """Check the IDX files in a folder.

    Args:
        raw: The folder.

    Returns:
        The array's shape for each file that exists.

    Raises:
        ValueError: A file is damaged or holds another array, or two files do not match.
    """
    sizes = {path: _check_idx(path, axes) for part in _PARTS for path, axes in _files(raw, part) if path.is_file()}
    for part in _PARTS:
        images, labels = (path for path, _ in _files(raw, part))
        if images in sizes and 0 in sizes[images]:
            raise ValueError(f"{images} holds no images, {sizes[images]}: use a file with one image or more")
        if images in sizes and labels in sizes and sizes[images][0] != sizes[labels][0]:
            raise ValueError(
                f"{images} holds {sizes[images][0]:,} images and {labels} {sizes[labels][0]:,} labels: use matching files, "
                f"with one label for each image"
            )
    train, test = (next(_files(raw, part))[0] for part in _PARTS)
    if train in sizes and test in sizes and sizes[train][1:] != sizes[test][1:]:
        raise ValueError(
            f"{train} holds images of {sizes[train][1:]} pixels and {test} of {sizes[test][1:]}: use images of one size"
        )
    return sizes


def check_ready_for_download(folder: Path, dataset: Any, sizes: dict[Path, tuple[int, ...]]) -> None:
    """Check that a download, which fetches all four files, would neither replace nor ignore existing files.

    Args:
        folder: The data folder.
        dataset: torchvision's class.
        sizes: Result of `check_files`.

    Raises:
        ValueError: Files have other names or lie in another folder, or some are the user's own.
    """
    raw = folder / dataset.__name__ / "raw"
    wanted = [path for part in _PARTS for path, _ in _files(raw, part)]
    lacking = [path for path in wanted if path not in sizes]
    found = {path: list(_under_another_name(folder, dataset, path)) for path in lacking}
    if any(found.values()):
        moves = "; ".join(_move(others, path) for path, others in found.items() if others)
        absent = [str(path) for path, others in found.items() if not others]
        raise ValueError(
            f"{dataset.__name__} must be in {raw}, but its files are elsewhere or have other names: {moves}"
            + (f"; not found: {', '.join(absent)}" if absent else "")
        )
    own = [
        path
        for path, size in sizes.items()
        if size[0] != _PUBLISHED[path.name.split("-")[0]] or size[1:] not in ((), (28, 28))
    ]
    if own:
        raise ValueError(
            f"{', '.join(map(str, own))} holds {sizes[own[0]][0]:,} data of your own, but {', '.join(map(str, lacking))} is missing: "
            f"add the missing files, or remove your own to download {dataset.__name__}"
        )


def _files(raw: Path, part: str) -> Iterator[tuple[Path, int]]:
    for kind, axes in _KINDS.items():
        yield raw / f"{part}-{kind}-idx{axes}-ubyte", axes


def _check_idx(path: Path, num_axes: int) -> tuple[int, ...]:
    """The shape in the header of an IDX file of bytes; raises ValueError if the file's length does not match it."""
    header_size = 4 + 4 * num_axes
    with path.open("rb") as file:
        header = file.read(header_size)
    magic = 0x0800 + num_axes
    if header[:2] == _GZIP:
        raise ValueError(f"{path} is compressed: rename it to {path.name}.gz and decompress it (gunzip {path.name}.gz)")
    if len(header) < header_size or struct.unpack(">I", header[:4])[0] != magic:
        raise ValueError(
            f"{path} is not an IDX file of bytes with {num_axes} axes (magic number {magic:#06x}, found "
            f"{header[:4].hex() or 'an empty file'}): replace it by an intact file; if it is a published one, delete it to "
            f"download it again"
        )
    sizes = struct.unpack(f">{num_axes}I", header[4:])
    expected = header_size + torch.Size(sizes).numel()
    found = path.stat().st_size
    if found != expected:
        raise ValueError(
            f"{path} is truncated or damaged: expected {expected} bytes from its header, found {found}: replace it by an "
            f"intact file; if it is a published one, delete it to download it again"
        )
    return sizes


def _under_another_name(folder: Path, dataset: Any, path: Path) -> Iterator[Path]:
    """Files that are probably meant to be `path`, but have another name or folder."""
    from torchvision.datasets.utils import check_integrity

    published = {path.parent / name: md5 for name, md5 in dataset.resources}
    part, kind = path.name.split("-")[:2]
    for other in (file for place in _places(folder, dataset.__name__) for file in _entries(place)):
        name = _OTHER_NAME.fullmatch(other.name)
        if name is None or not other.is_file() or other == path:
            continue
        if (name["part"].lower().replace("test", "t10k"), name["kind"].lower()) != (part, kind):
            continue
        if other in published and check_integrity(other, published[other]):
            continue  # torchvision decompresses its own downloads
        yield other


def _places(folder: Path, name: str) -> Iterator[Path]:
    """Where files may be: `folder`, folder/raw, the data set's folder in any spelling, and the folders below these.

    The folders of other data sets are left out because their files have the same names.
    """
    spellings = {name.lower(), name.lower().removesuffix("mnist") or "mnist", "raw"}
    yield folder
    for place in _entries(folder):
        yield place / name / "raw"  # one folder deeper
        if _OTHER_NAME.fullmatch(place.name):  # some archives unpack each file into a folder of the same name
            yield place
        if re.sub("[^a-z]", "", place.name.lower()) in spellings:
            yield place
            for inner in _entries(place):
                yield inner
                yield from _entries(inner)


def _entries(place: Path) -> list[Path]:
    try:
        return sorted(place.iterdir())
    except OSError:  # a file, missing, or unreadable
        return []


def _move(others: list[Path], path: Path) -> str:
    """What to do with the first of these files."""
    other = others[0]
    with other.open("rb") as file:
        if file.read(2) == _GZIP:
            return f"decompress {other} to {path} (gunzip -c {other} > {path})"
    raw = other.parent
    if (raw.name, raw.parent.name, other.name) == ("raw", path.parent.parent.name, path.name):
        return f"{other} is found with root={raw.parent.parent} (root=, --data-dir, $PYROVAE_DATA)"
    if path.is_dir():
        return f"move {other} out of the folder {path}, delete the folder, and give the file the folder's name"
    return f"{'rename' if other.parent == path.parent else 'move'} {other} to {path}"
