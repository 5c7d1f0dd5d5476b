"""One bar for all long work: how far it has come, and how long it still takes."""

from tqdm import tqdm

__all__ = ["progress_bar"]

_MANY = 10_000  # from here on counted in thousands


def progress_bar(what: str, total: int, unit: str, shown: bool) -> tqdm:
    """A bar of `total` units on the standard error, with the time gone and left; nothing at all where it is not shown.

    A context; `update(count)` moves it on.
    """
    return tqdm(total=total, unit=f" {unit}", unit_scale=total >= _MANY, desc=what, disable=not shown)
