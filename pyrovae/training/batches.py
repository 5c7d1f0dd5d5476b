"""The batches of an epoch, from data held on the device or, for data that exceed memory, from a `DataLoader`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Sampler

from pyrovae.common import distributed
from pyrovae.data.conversion import Numbers
from pyrovae.data.forms import Batch, as_batch, is_stream
from pyrovae.training.generators import Generator, generators_of
from pyrovae.training.loaders import draws_one_order, length_of, num_drawn, set_epoch

__all__ = [
    "Batches",
    "Transform",
    "batches_of",
    "form_of",
    "on_device",
    "read_items",
    "selected",
    "transformed",
]

_BATCH_SIZE = 200
Transform = Callable[[Any], Any] | None


class Batches(ABC):
    """The training data, in batches.

    Attributes:
        name: what the positions refer to, for messages: "train" or "batch".
        num_data: data per epoch.
        batch_size: data per batch, except perhaps in the last batch.
        full_size: data of a full batch that this process gets.
        per_epoch: batches per epoch.
        numbers: what the numbers of the data become on their way to the programs.
        device: device of the batches.
        transform: function still to be applied to each batch, or None.
        form: form of the data before the transform (`form_of`); of a loader, that of its last batch.
        in_one_order: whether each datum has the same place in the batch at every step.
        generators: random generators of the data's own, besides the global ones.
    """

    name: str
    num_data: int
    batch_size: int
    full_size: int
    per_epoch: int
    form: Any
    in_one_order: bool
    generators: Sequence[Generator] = ()

    def __init__(self, transform: Transform, numbers: Numbers, device: torch.device) -> None:
        self.transform, self.numbers, self.device = transform, numbers, device
        self._num_made: dict[int, int] = {}

    def arguments(self, data: Batch, index: Tensor) -> Batch:
        """What the programs are called with for a batch, as `epoch` yields it."""
        batch = selected(data, index, self.transform, self.numbers)
        self._num_made[len(index)] = batch.num_data
        return batch

    def num_made(self, num_rows: int) -> int:
        """How many data the transform makes of so many."""
        return self._num_made.get(num_rows, num_rows)

    @abstractmethod
    def epoch(self, number: int) -> Iterator[tuple[Batch, Tensor]]:
        """Yield (data, positions of this process's part of the batch in these data) for each batch of a shuffled epoch.

        Args:
            number: of the epoch, counted from 1.
        """

    @abstractmethod
    def example(self) -> tuple[Batch, Tensor]:
        """One pair for a full batch, as `epoch` yields it. May consume random numbers."""


def selected(data: Batch, index: Tensor, transform: Transform, numbers: Numbers) -> Batch:
    """What the programs are called with for the data at these positions. Every call of a program in training gets its batch
    here.
    """
    batch = data.rows(index)
    return (batch if transform is None else transformed(batch.form, transform, numbers)).by_position()


def transformed(data: Any, transform: Callable[[Any], Any], numbers: Numbers) -> Batch:
    """What the programs are called with for a batch that the transform makes.

    Raises:
        TypeError, ValueError: if the transform makes nothing that holds data.
    """
    return as_batch(transform(data), numbers, "the result of transform")


def form_of(data: Any) -> Any:
    """The number of items of a tuple or list, the keys of a mapping; None for one item, whatever holds it."""
    if isinstance(data, Mapping):
        return tuple(data)
    return len(data) if isinstance(data, tuple | list) and len(data) > 1 else None


def batches_of(
    train: Any,
    batch_size: int | None,
    transform: Transform,
    device: torch.device,
    numbers: Numbers = Numbers(),  # noqa: B008  # immutable
) -> Batches:
    """Make the batches of data in memory (see `as_batch`), of a `Dataset`, or of a `DataLoader`.

    Raises:
        TypeError: if data cannot be what programs are called with, or a loader has no length.
        ValueError: if there are no data, a loader is given together with `batch_size`, or has another number of batches
            than in other processes; or if a batch of data in memory has fewer data than there are processes.
    """
    if isinstance(train, DataLoader):
        if batch_size is not None:
            raise ValueError(f"found batch_size={batch_size} beside a DataLoader, which has its own: leave it out")
        return _Loaded(train, transform, numbers, device)
    batch_size = _BATCH_SIZE if batch_size is None else batch_size
    if is_stream(train):
        order = _Shuffled(length_of(train, "train"), batch_size)
        # A loader draws a seed for its workers: from a generator of its own, so that the order is that of data in memory.
        return _Loaded(DataLoader(train, batch_sampler=order, generator=torch.Generator()), transform, numbers, device)
    return _InMemory(read_items("train", train, transform, numbers), batch_size, transform, numbers, device)


def read_items(name: str, data: Any, transform: Transform, numbers: Numbers) -> Batch:
    """Data in memory as what programs are called with; with a transform, tensors keep their dtype until then."""
    if isinstance(getattr(data, name, None), Tensor):  # the splits of a data set
        raise ValueError(f"{name} must be data, found a {type(data).__name__}: pass its .{name}")
    return as_batch(data, numbers if transform is None else numbers.of_arrays(), name)


class _InMemory(Batches):
    name = "train"
    in_one_order = False

    def __init__(self, train: Batch, batch_size: int, transform: Transform, numbers: Numbers, device: torch.device):
        super().__init__(transform, numbers, device)
        self.order = _Shuffled(train.num_data, batch_size, device)
        self.train, self.form = train.to(device), form_of(train.form)
        self.num_data, self.batch_size = train.num_data, batch_size
        self.full_size, self.per_epoch = self.order.full_size, len(self.order)

    def epoch(self, number: int) -> Iterator[tuple[Batch, Tensor]]:
        for index in self.order.draw():
            yield self.train, index

    def example(self) -> tuple[Batch, Tensor]:
        return self.train, torch.arange(min(self.batch_size, self.num_data), device=self.device)


class _Shuffled(Sampler):
    """The batches of a shuffled epoch: this process's part of each."""

    def __init__(self, num_data: int, batch_size: int, device: torch.device | str = "cpu"):
        self.num_data, self.batch_size, self.device = num_data, batch_size, device
        self.sizes = _sizes(num_data, batch_size)
        joined = batch_size > 1 and self.sizes[-1] == batch_size + 1
        distributed.check_shares(num_data - joined, batch_size)
        self.full_size = len(distributed.share(torch.arange(min(batch_size, num_data))))

    def draw(self) -> Iterator[Tensor]:
        shuffled = torch.randperm(self.num_data, device=self.device)
        distributed.same_everywhere([shuffled])
        for index in shuffled.split(self.sizes):
            yield distributed.share(index)

    def __iter__(self) -> Iterator[list[int]]:
        return (index.tolist() for index in self.draw())

    def __len__(self) -> int:
        return len(self.sizes)


def _sizes(num_data: int, batch_size: int) -> list[int]:
    """Batch sizes of an epoch. A single leftover datum joins the batch before, because BatchNorm needs two to train.

    >>> _sizes(23, 10), _sizes(21, 10), _sizes(1, 10), _sizes(2, 1)
    ([10, 10, 3], [10, 11], [1], [1, 1])
    """
    full, rest = divmod(num_data, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    if rest == 1 and full:
        sizes[-2:] = [batch_size + 1]
    return sizes


class _Loaded(Batches):
    name = "batch"
    form = None

    def __init__(self, loader: DataLoader, transform: Transform, numbers: Numbers, device: torch.device):
        super().__init__(transform, numbers, device)
        try:
            self.num_data, self.per_epoch = num_drawn(loader), len(loader)
        except TypeError:
            raise TypeError(
                "found a DataLoader whose data set or sampler has no length, which the learning rate's schedule needs: give it "
                "a __len__"
            ) from None
        if not self.per_epoch:
            raise ValueError("train must have at least one batch, found a DataLoader with none")
        counts = distributed.gather(self.per_epoch)
        if len(set(counts)) > 1:
            raise ValueError(
                f"found DataLoaders with {counts} batches in {len(counts)} processes, but the processes make each step together: "
                f"use a DistributedSampler"
            )
        self.loader, self.of_items, self.generators = loader, transform, generators_of(loader)
        self.batch_size = self.full_size = loader.batch_size or -(-self.num_data // self.per_epoch)
        if isinstance(loader.batch_sampler, _Shuffled):
            self.batch_size, self.full_size = loader.batch_sampler.batch_size, loader.batch_sampler.full_size
        self.in_one_order = self.per_epoch == 1 and draws_one_order(loader)

    def epoch(self, number: int) -> Iterator[tuple[Batch, Tensor]]:
        set_epoch(self.loader, number)
        for item in self.loader:
            yield self._on_device(item)

    def example(self) -> tuple[Batch, Tensor]:
        return self._on_device(next(iter(self.loader)))

    def _on_device(self, item: Any) -> tuple[Batch, Tensor]:
        self.form = form_of(item)
        data = item[0] if isinstance(item, list | tuple) and len(item) == 1 else item
        if self.of_items is None or isinstance(data, Tensor | np.ndarray):
            batch = read_items("a batch of train", item, self.of_items, self.numbers).to(self.device, non_blocking=True)
        else:
            # The transform gets the batch as the loader made it, so it is applied here and not again.
            self.transform = None
            batch = transformed(on_device(data, self.numbers, self.device), self.of_items, self.numbers).to(self.device)
        return batch, torch.arange(batch.num_data, device=self.device)


def on_device(batch: Any, numbers: Numbers, device: torch.device) -> Any:
    """A batch in its own form, with its tensors and arrays of numbers as tensors on the device."""

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
            leaf = (
                as_batch(leaf, numbers.of_arrays(), "a batch").data
                if leaf.size and leaf.ndim
                else torch.as_tensor(leaf)
            )
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    return tree_map(moved, batch)
