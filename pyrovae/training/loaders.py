"""The order in which a `DataLoader` gives its data: its length, its epochs, and one order on request."""

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from pyro.util import get_rng_state, set_rng_state
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from pyrovae.common.random_numbers import states_under
from pyrovae.training.generators import restored_after, samplers_of, start_at

__all__ = ["draws_one_order", "in_one_order", "length_of", "num_drawn", "set_epoch"]

_FEW = 12
_SEED = 20260102  # of a loader's order, if it shuffles; the noise of the measurement has another


def length_of(dataset: Any, name: str) -> int:
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"{name} is an IterableDataset, which gives its data in an order of its own: pass DataLoader({name}, "
            f"batch_size=...), which needs its __len__"
        )
    if not isinstance(dataset, Sized):
        raise TypeError(f"{name} is a {type(dataset).__name__} without a length: give it a __len__")
    if not len(dataset):
        raise ValueError(f"{name} must hold at least one datum, found an empty {type(dataset).__name__}")
    return len(dataset)


def set_epoch(loader: DataLoader, number: int) -> None:
    """Tell samplers and data the epoch, if they take it: a DistributedSampler shuffles anew only then."""
    for holder in (loader.dataset, *samplers_of(loader)):
        if callable(told := getattr(holder, "set_epoch", None)):
            told(number - 1)


def draws_one_order(loader: DataLoader) -> bool:
    """Whether the sampler yields the same batches every time; generators are left as they were."""
    if loader.batch_sampler is None:
        return False
    with torch.random.fork_rng([]), restored_after(loader):
        set_epoch(loader, 1)
        first = list(loader.batch_sampler)
        tries = 1 if sum(map(len, first)) > _FEW else 40  # few data may repeat an order by chance
        is_one = True
        for number in range(1, tries + 1):
            set_epoch(loader, number + 1)
            is_one &= list(loader.batch_sampler) == first
    return is_one


def num_drawn(loader: DataLoader) -> int:
    """Data per epoch: the sampler's length, less what `drop_last` drops; the data set's length if the sampler is hidden."""
    batches = loader.batch_sampler
    drawn: Any = loader.dataset
    size, drops = loader.batch_size, loader.drop_last
    if isinstance(batches, BatchSampler) and isinstance(batches.sampler, Sized):
        size, drops, drawn = batches.batch_size, batches.drop_last, batches.sampler
    num_data = len(drawn)
    return num_data // size * size if size and drops else num_data


def in_one_order(loader: DataLoader) -> Iterator[Any]:
    """The items of a loader, in the same order whenever it is begun; it takes no numbers from the measurement's noise."""
    state = states_under(_SEED)
    with restored_after(loader) as own:
        for generator in own:
            start_at(generator, _SEED)
        with _apart(state):
            items = iter(loader)
        while True:
            with _apart(state):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


@contextmanager
def _apart(state: dict[str, Any]) -> Iterator[None]:
    """Draw random numbers from these states inside, and let them advance; those of outside stay."""
    outside = get_rng_state()
    set_rng_state(state)
    try:
        yield
    finally:
        state.update(get_rng_state())
        set_rng_state(outside)
