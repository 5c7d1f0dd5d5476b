"""What users see: progress bars, warnings and errors; and ArviZ imported without its notice."""

import contextlib
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from tqdm import tqdm

__all__ = ["import_arviz", "plain_errors", "progress_bar", "warn", "warn_once"]

_MANY = 10_000  # from this total on, a progress bar counts in thousands
_IN_PLACE, _IN_A_LOG = 0.1, 10.0  # seconds between two states of a progress bar
_PACKAGE = str(Path(__file__).parent.parent)

_NOT_THE_USERS = (_PACKAGE, *(str(Path(str(module.__file__)).parent) for module in (torch, pyro)), contextlib.__file__)


def import_arviz() -> Any:
    """Import ArviZ without the notice about its next version that 0.x prints on the first import of the day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def progress_bar(what: str, total: int, unit: str, shown: bool) -> tqdm:
    """Make a progress bar on standard error that shows the elapsed and the remaining time.

    Use it as a context manager; `update(count)` advances it. A log file, where each new state is appended, gets one
    every ten seconds.

    Args:
        what: Description at the left of the bar.
        total: Number of units.
        unit: Name of a unit.
        shown: False for a bar that prints nothing.
    """
    is_terminal = getattr(sys.stderr, "isatty", bool)()
    in_place = is_terminal or type(sys.stderr).__module__.startswith("ipykernel")  # that of a notebook
    interval = _IN_PLACE if in_place else _IN_A_LOG
    many = total >= _MANY
    return tqdm(total=total, unit=f" {unit}", unit_scale=many, desc=what, disable=not shown, mininterval=interval)


_warned: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()


def warn_once(program: Any, message: str, category: type[Warning] = UserWarning) -> None:
    """Warn once per program, at the line of the user's code that led here.

    Args:
        program: Function, method or module that the warning is about.
        message: Text of the warning.
        category: Class of the warning.
    """
    holder, key = getattr(program, "__self__", program), getattr(program, "__qualname__", "") + message
    try:
        said = _warned.setdefault(holder, set())
    except TypeError:  # the object is unhashable or cannot be weakly referenced
        said = set()
    if key in said:
        return
    warn(message, category)
    said.add(key)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's code that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise this library's own errors without the table of sites that Pyro appends to errors from a traced program."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        first: BaseException = error
        while (cause := first.__cause__) is not None and str(first).startswith(f"{cause}\n"):
            first = cause
        trace = first.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if first is not error and trace is not None and trace.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            raise first from first.__cause__
        raise
