"""The progress bar of all long computations."""

from tqdm import tqdm

__all__ = ["progress_bar"]

_MANY = 10_000  # from this total on, the bar counts in thousands


def progress_bar(what: str, total: int, unit: str, shown: bool) -> tqdm:
    """Make a progress bar on standard error that shows the elapsed and the remaining time.

    Use it as a context manager; `update(count)` advances it.

    Args:
        what: Description at the left of the bar.
        total: Number of units.
        unit: Name of a unit.
        shown: False for a bar that prints nothing.
    """
    return tqdm(total=total, unit=f" {unit}", unit_scale=total >= _MANY, desc=what, disable=not shown)
