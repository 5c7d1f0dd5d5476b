"""Checkpoint files: locked by one run, written atomically, and checked when read.

A file holds the output of `torch.save` for tensors and plain values, then a marker and a digest of the bytes before it,
so that any changed byte is detected. `torch.load` can read the file too.
"""

import errno
import hashlib
import io
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["FORMAT", "earlier", "locked", "path_of", "plain", "read", "target_of", "write"]

_logger = logging.getLogger("pyrovae")

FORMAT = 2
_MARK = b"\npyrovae sha256 "
_DIGEST_SIZE = hashlib.sha256().digest_size
_WHAT_TO_NAME = "the file checkpoint.pt of a run, or a file written by pyrovae.save"


@contextmanager
def locked(path: str | os.PathLike, advice: str = "wait until it has ended, or name another place") -> Iterator[None]:
    """Hold a lock on `path` inside the context, so that two runs do not write to the same place.

    The lock file lies beside a file and inside a folder, and is removed on release. The operating system holds the
    lock, so a file left behind by a killed process locks nothing.

    Raises:
        RuntimeError: if another run holds the lock.
        OSError: if the lock file cannot be created.
    """
    import filelock  # only runs with a checkpoint need it, and importing pyrovae imports little

    path = path_of(path)
    real = target_of(path)  # one lock, whichever link leads to the file
    file = path / ".lock" if path.is_dir() else real.with_name(f".{real.name}.lock")
    lock = filelock.FileLock(file, timeout=0)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise RuntimeError(f"another run is writing to {path}: {advice}") from None
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot write to {file.parent} ({error.strerror}): name a folder that can be written to"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)  # before the release: filelock takes no file that has been removed
        lock.release()


def write(path: str | os.PathLike, content: dict[str, Any], *, keep: bool = False) -> None:
    """Write a checkpoint; a file already there stays intact until the new one is complete.

    If the path is a symbolic link, its target is written, and temporary files are made beside the target.

    Args:
        path: file to write.
        content: tensors, numbers, strings, None, and lists, tuples and dicts of them.
        keep: keep the previous file as `earlier(path)`.

    Raises:
        OSError: if the file cannot be written; the message names it.
        TypeError, ValueError: if `path` is not a path.
    """
    path = path_of(path)
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    try:
        target = target_of(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Release the view at once: after an error, Python 3.13 warns if the buffer is collected before its view.
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
    """Read what `write` wrote, with tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged in any byte, is no checkpoint of this library, holds anything but tensors and
            plain values, or has a newer format.
    """
    path = path_of(path)
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        inside = path / "checkpoint.pt"
        remedy = f"name {inside}" if inside.is_file() else f"name {_WHAT_TO_NAME}; it holds no checkpoint.pt"
        raise ValueError(f"{path} is a folder, expected a checkpoint: {remedy}") from None
    content, mark, digest = data[: -len(_MARK) - _DIGEST_SIZE], data[-len(_MARK) - _DIGEST_SIZE :], data[-_DIGEST_SIZE:]
    is_marked = mark.startswith(_MARK)
    if is_marked and hashlib.sha256(content).digest() != digest:
        raise ValueError(f"{path} is damaged: its bytes do not match its checksum{_or_earlier(path)}")
    try:
        archive = content if is_marked else _checked_parts(data)
        found = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many types for a damaged file
        # Leave out torch's message, which advises to run any code that the file holds.
        raise ValueError(
            f"{path} is damaged or no checkpoint of pyrovae: name {_WHAT_TO_NAME}{_or_earlier(path)}"
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise ValueError(f"{path} is no checkpoint of pyrovae: save one with pyrovae.save")
    if found["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {found['format']}, this version of pyrovae reads up to {FORMAT}: update it"
        )
    if found["format"] > 1 and not is_marked:
        raise ValueError(f"{path} is damaged: its end is missing{_or_earlier(path)}")
    if not is_marked:
        _logger.warning(
            "%s has format 1, which has no digest of the whole file: only the checksums of its parts were checked; "
            "pyrovae.save writes it again with a digest",
            path,
        )
    return found


def path_of(path: str | os.PathLike) -> Path:
    """The path of a file, `~` being the home folder; raises TypeError or ValueError for anything else."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"a checkpoint's path must be a string or pathlib.Path, found {type(path).__name__}: name a file"
        )
    if os.fspath(path) in ("", b""):
        raise ValueError("a checkpoint's path must name a file, found an empty one")
    return Path(path).expanduser()


def earlier(path: str | os.PathLike) -> Path:
    """Where `write` with `keep` puts the previous file; if the path is a symbolic link, beside its target."""
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
    """Convert a value to plain types; raise TypeError, with this name, if it could only be pickled."""
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
    # Link instead of moving, so that a file is at the path even if the process is killed here.
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
    """Check the checksums in an archive of `torch.save`, which torch does not, and return its content as a new archive.

    Raises:
        zipfile.BadZipFile: if the archive is damaged; other errors are possible.
    """
    checked = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as found, zipfile.ZipFile(checked, "w") as again:
        for name in dict.fromkeys(found.namelist()):
            again.writestr(name, found.read(name))
    return checked.getvalue()


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power failure, if the system can sync folders."""
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
