"""Files that are whole or not there: written beside their place, moved when complete, checked when read.

A file is what `torch.save` makes of tensors and plain values, and behind it a mark and a digest of all before, so that any
byte that changed is noticed. `torch.load` reads it too.
"""

import errno
import hashlib
import io
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["FORMAT", "earlier", "path_of", "plain", "read", "target_of", "write"]

_logger = logging.getLogger("pyrovae")

FORMAT = 2
_MARK = b"\npyrovae sha256 "
_DIGEST_SIZE = hashlib.sha256().digest_size


def write(path: str | os.PathLike, content: dict[str, Any], *, keep: bool = False) -> None:
    """Write a checkpoint; what stood in its place stays whole until the new one is, and with `keep` beyond that.

    content: tensors, numbers, strings, None, and lists, tuples and dicts of them
    keep: leave the file before at `earlier(path)`

    A path that is a symbolic link stays one: its target is written, and what else is written lies beside the target.

    Raises OSError, naming the path, where it cannot be written; TypeError or ValueError for what is no path.
    """
    path = path_of(path)
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    try:
        target = target_of(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Given back at once: Python 3.13 complains of a buffer that is collected before its view, as after an error.
            with buffer.getbuffer() as data, temporary.open("wb") as file:
                file.write(data)
                file.write(_MARK + hashlib.sha256(data).digest())
                file.flush()
                os.fsync(file.fileno())
            if keep and target.exists():
                _keep(target)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
    except OSError as error:
        state = "the file written before is whole" if path.exists() else "no file was written before"
        raise type(error)(
            error.errno,
            f"cannot write {path} ({error.strerror or error}): make room, or name a folder that can be written to; {state}",
        ) from error


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Read what `write` wrote, tensors on the CPU.

    Raises FileNotFoundError; ValueError for a file that is damaged in any byte, is no checkpoint of this library, holds
    anything but tensors and plain values, or has a newer format.
    """
    path = path_of(path)
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, expected a checkpoint: name the file in it") from None
    content, mark, digest = data[: -len(_MARK) - _DIGEST_SIZE], data[-len(_MARK) - _DIGEST_SIZE :], data[-_DIGEST_SIZE:]
    is_marked = mark.startswith(_MARK)
    if is_marked and hashlib.sha256(content).digest() != digest:
        raise ValueError(f"{path} is damaged: its bytes are not those that were written{_or_earlier(path)}")
    try:
        archive = content if is_marked else _checked_parts(data)
        found = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # what torch and zipfile raise for a damaged file is not one type
        # Without torch's own words, which advise to run whatever code the file holds.
        raise ValueError(
            f"{path} is damaged or no checkpoint of pyrovae ({type(error).__name__}){_or_earlier(path)}"
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise ValueError(f"{path} is no checkpoint of pyrovae: save one with pyrovae.save")
    if found["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {found['format']}, this version of pyrovae reads up to {FORMAT}: update it"
        )
    if found["format"] > 1 and not is_marked:
        raise ValueError(f"{path} is damaged: it lacks its end{_or_earlier(path)}")
    if not is_marked:
        _logger.warning(
            "%s has format 1, which has no digest of the whole file: only the checksums of its parts were checked; "
            "pyrovae.save writes it anew, with one",
            path,
        )
    return found


def path_of(path: str | os.PathLike) -> Path:
    """The path of a file, `~` being the home folder; raises TypeError or ValueError for what cannot be one."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"a checkpoint's path must be a string or pathlib.Path, found {type(path).__name__}: name a file"
        )
    if os.fspath(path) in ("", b""):
        raise ValueError("a checkpoint's path must name a file, found an empty one")
    return Path(path).expanduser()


def earlier(path: str | os.PathLike) -> Path:
    """Where `write` leaves the file before, with `keep`: beside the file itself if the path is a symbolic link."""
    path = target_of(path)
    return path.with_name(f"{path.name}.previous")


def target_of(path: str | os.PathLike) -> Path:
    """The path, or that of the file that a symbolic link there leads to, whether or not there is one yet."""
    path = path_of(path)
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def plain(name: str, value: Any) -> Any:
    """The value as a checkpoint can hold it; raises TypeError, with this name, for what could only be pickled."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # NumPy's float64 is a float that would be pickled as NumPy's
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return plain(name, value.item())
    if isinstance(value, dict):
        return {
            key.item() if isinstance(key, np.generic) else key: plain(f"{name}[{key!r}]", item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(name, item) for item in value]
    raise TypeError(
        f"{name} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings, lists and dicts"
    )


def _keep(path: Path) -> None:
    # Linked, not moved: the path itself must never be empty, whenever the process is killed.
    link = path.with_name(f".{path.name}.{os.getpid()}.link")
    try:
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without links
            shutil.copyfile(path, link)
        link.replace(earlier(path))
    finally:
        link.unlink(missing_ok=True)


def _checked_parts(data: bytes) -> bytes:
    """The archive that `torch.save` made, written anew from what its checksums fit: torch does not look at them.

    Raises zipfile.BadZipFile, and more, for one that is damaged.
    """
    checked = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as found, zipfile.ZipFile(checked, "w") as again:
        for name in dict.fromkeys(found.namelist()):
            again.writestr(name, found.read(name))
    return checked.getvalue()


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a loss of power, where the system can do that for folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _or_earlier(path: str | os.PathLike) -> str:
    before, target = earlier(path), target_of(path)
    where = "here" if target == path_of(path) else f"to {target}"
    return f"; the one before it is {before}: move it {where} to take it" if before.exists() else ""
