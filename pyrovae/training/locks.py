"""A lock on a file or folder, so that two runs do not write to the same place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from pyrovae.training.checkpoint_file import path_of, target_of

__all__ = ["locked"]


@contextmanager
def locked(path: str | os.PathLike, advice: str = "wait until it has ended, or name another place") -> Iterator[None]:
    """Hold a lock on `path` inside the context.

    The lock file lies beside a file and inside a folder, and is removed on release. The operating system holds the
    lock, so a file left behind by a killed process locks nothing. On Windows, which lacks this kind of lock, nothing is
    locked.

    Raises:
        RuntimeError: if another run holds the lock.
        OSError: if the lock file cannot be created.
    """
    path = path_of(path)
    real = target_of(path)  # one lock, whichever link leads to the file
    file = path / ".lock" if path.is_dir() else real.with_name(f".{real.name}.lock")
    descriptor = _acquire(path, file, advice)
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)  # before the release, so that others see that this file is gone
        os.close(descriptor)


def _acquire(path: Path, file: Path, advice: str) -> int:
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise type(error)(
                error.errno, f"cannot write to {file.parent} ({error.strerror}): name a folder that can be written to"
            ) from error
        if fcntl is None:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise RuntimeError(f"another run is writing to {path}: {advice}") from None
        except OSError:  # a network file system without locks
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)  # the previous holder has just removed this file: try again
