"""Data that memory does not hold: evaluations that go through a `DataLoader` or a `Dataset` batch by batch."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from pyrovae.data.conversion import Numbers
from pyrovae.data.forms import as_batch, is_stream

__all__ = ["Part", "parts_of"]

_ROWS = 500  # data in a batch of a data set


class Part(NamedTuple):
    """A part of the data, as the arguments of the programs.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        before: How many data came before.
        num_data: How many data there are in all; None if this part holds all of them.
    """

    args: tuple
    kwargs: dict[str, Any]
    before: int
    num_data: int | None


def parts_of(args: tuple, kwargs: dict[str, Any], transform: Callable[[Any], Any] | None) -> Iterator[Part]:
    """Yield the batches of a `DataLoader` or `Dataset`, if that is the one argument; all arguments at once otherwise.

    Args:
        args: Arguments of an evaluation.
        kwargs: Keyword arguments.
        transform: Maps the argument, or each batch, to the data that the programs are called with.

    Raises:
        TypeError: `transform` is no function, or is given with several arguments.
        ValueError: The loader shuffles, or drops its last data, so that the results would not be those of all data in
            order.
    """
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be a function of a batch, or None; found {transform!r}")
    if transform is not None and (len(args) != 1 or kwargs):
        raise TypeError(
            f"transform maps one argument, a batch; found {len(args)} arguments and the keywords {list(kwargs)}"
        )
    if len(args) != 1 or kwargs or not is_stream(args[0]):
        yield Part(args if transform is None else (transform(args[0]),), kwargs, 0, None)
        return
    loader = args[0] if isinstance(args[0], DataLoader) else DataLoader(args[0], batch_size=_ROWS)
    _check_order(loader)
    before, num_data = 0, len(loader.dataset)  # type: ignore[arg-type]  # a data set with a sampler has a length
    for item in loader:
        batch = item[0] if isinstance(item, list | tuple) and len(item) == 1 else item
        batch = batch if transform is None else transform(batch)
        yield Part((batch,), {}, before, num_data)
        before += as_batch(batch, Numbers()).num_data


def _check_order(loader: DataLoader) -> None:
    """Raise ValueError unless the loader goes through all data once, in order: results are told apart by their place."""
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    drops = getattr(batches, "drop_last", False)
    if type(sampler) is SequentialSampler and (batches is None or type(batches) is BatchSampler) and not drops:
        return
    how = "leaves data out (drop_last=True)" if drops else f"takes its data in the order of a {type(sampler).__name__}"
    raise ValueError(
        f"found a DataLoader that {how}, so that nobody could tell which result is of which datum: make one with "
        f"shuffle=False and drop_last=False, without a sampler of its own"
    )
