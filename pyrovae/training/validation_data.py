"""The validation data in blocks: the same data in the same order at every measurement."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pyro.util import get_rng_state, set_rng_state
from torch.utils.data import DataLoader

from pyrovae.data.forms import Batch, as_batch, is_stream
from pyrovae.training.batches import (
    Batches,
    form_of,
    length_of,
    on_device,
    read_items,
    transformed,
)
from pyrovae.training.generators import generators_of, set_state, start_at, state_of

__all__ = ["ValidationData"]

_SEED = 20260102  # of a loader's order, if it shuffles; the noise of the measurement has another


class ValidationData:
    """The validation data of a run, as the programs take them.

    Data with the several items of the training data go through its transform, too: `lambda batch: batch[0]` leaves the
    labels of both out. A single tensor does not: it is what the programs are called with.

    Args:
        data: what `fit` takes to train on: data in memory, a `Dataset` or a `DataLoader`.
        train: the training data.

    Attributes:
        device: device of the blocks.

    Raises:
        TypeError, ValueError: if the data cannot be what programs are called with, or there are none.
    """

    def __init__(self, data: Any, train: Batches):
        self.train, self.device = train, train.device
        self.transform = getattr(train, "of_items", train.transform)
        self.items: Batch | None = None
        self.stream: Any = None
        if not is_stream(data):
            self.items = read_items("validation", data, self.transform, train.numbers).to(self.device)
        else:
            self.stream = data
            if not isinstance(data, DataLoader):
                length_of(data, "validation")

    def blocks(self, size: int, only_ends: bool = False) -> Iterator[Batch]:
        """Yield the data in blocks, of `size` data unless a `DataLoader` makes them; only the first and last (of a
        stream, only the first), if `only_ends`.
        """
        if self.items is not None:
            for block in self.items.blocks(size, only_ends):
                yield (block if self.transform is None else self._made(block.form)).by_position()
            return
        loader = self.stream
        if not isinstance(loader, DataLoader):
            loader = DataLoader(self.stream, batch_size=size)
        found = False
        for item in _in_one_order(loader):
            found = True
            yield self._made(item).to(self.device, non_blocking=True).by_position()
            if only_ends:
                break
        if not found:
            raise ValueError("validation must have at least one batch, found a DataLoader that gave none")

    def _made(self, item: Any) -> Batch:
        form, numbers = form_of(item), self.train.numbers
        if self.transform is not None and form is not None and form == self.train.form:
            return transformed(on_device(item, numbers, self.device), self.transform, numbers)
        return as_batch(item, numbers, "validation")


def _in_one_order(loader: DataLoader) -> Iterator[Any]:
    """The items of a loader, in the same order whenever it is begun; it takes no numbers from the measurement's noise."""
    own = [(generator, state_of(generator)) for generator in generators_of(loader)]
    for generator, _ in own:
        start_at(generator, _SEED)
    state = {
        "torch": torch.Generator().manual_seed(_SEED).get_state(),
        "random": random.Random(_SEED).getstate(),
        "numpy": np.random.RandomState(_SEED).get_state(),
    }
    try:
        with _apart(state):
            items = iter(loader)
        while True:
            with _apart(state):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
    finally:
        for generator, before in own:
            set_state(generator, before)


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
