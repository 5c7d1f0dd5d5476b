"""The validation data in blocks: the same data in the same order at every measurement."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from pyrovae.data.forms import Batch, as_batch, is_stream
from pyrovae.training.batches import (
    Batches,
    form_of,
    on_device,
    read_items,
    transformed,
)
from pyrovae.training.loaders import in_one_order, length_of

__all__ = ["ValidationData"]


class ValidationData:
    """The validation data of a run, as the programs take them.

    Data with the several items of the training data go through its transform, too: `lambda batch: batch[0]` leaves the
    labels of both out. A single tensor does not: it is what the programs are called with.

    Args:
        data: what `fit` takes to train on: data in memory, a `Dataset` or a `DataLoader`.
        train: the training data.

    Attributes:
        device: device of the blocks.
        is_cut: whether data in memory are cut into blocks; not if a latent is shared by all of them.

    Raises:
        TypeError, ValueError: if the data cannot be what programs are called with, or there are none.
    """

    def __init__(self, data: Any, train: Batches):
        self.train, self.device, self.is_cut = train, train.device, True
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
            for block in self.items.blocks(size if self.is_cut else self.items.num_data, only_ends):
                yield (block if self.transform is None else self._made(block.form)).by_position()
            return
        loader = self.stream
        if not isinstance(loader, DataLoader):
            loader = DataLoader(self.stream, batch_size=size)
        found = False
        for item in in_one_order(loader):
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
