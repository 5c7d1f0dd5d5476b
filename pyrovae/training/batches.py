"""The batches of an epoch, from a tensor held on the device or, for data that exceed memory, from a `DataLoader`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import BatchSampler, DataLoader, Dataset

from pyrovae.common import distributed

__all__ = ["Arguments", "Batches", "arguments_of", "batches_of", "check_data"]

_FEW = 12
Transform = Callable[[Any], Tensor] | None
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # what the programs are called with: (args, kwargs)


class Batches(ABC):
    """The training data, in batches.

    Attributes:
        name: what the positions refer to, for messages: "train" or "batch".
        num_data: data per epoch.
        batch_size: data per batch, except perhaps in the last batch.
        full_size: data of a full batch that this process gets.
        per_epoch: batches per epoch.
        device: device of the batches.
        transform: function still to be applied to each batch, or None.
        in_one_order: whether each datum has the same place in the batch at every step.
    """

    name: str
    num_data: int
    batch_size: int
    full_size: int
    per_epoch: int
    device: torch.device
    transform: Transform
    in_one_order: bool

    def __init__(self) -> None:
        self._num_made: dict[int, int] = {}

    def arguments(self, data: Tensor, index: Tensor) -> Arguments:
        """What the programs are called with for a batch, as `epoch` yields it."""
        (batch,), options = arguments_of(data, index, self.transform)
        self._num_made[len(index)] = len(batch)
        return (batch,), options

    def num_made(self, num_rows: int) -> int:
        """How many data the transform makes of so many."""
        return self._num_made.get(num_rows, num_rows)

    @abstractmethod
    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (data, positions of this process's part of the batch in these data) for each batch of a shuffled epoch."""

    @abstractmethod
    def example(self) -> tuple[Tensor, Tensor]:
        """One such pair for a full batch. May consume random numbers."""


def check_data(name: str, data: Any) -> None:
    """Raise ValueError if `data` is not a tensor of at least one datum."""
    if isinstance(data, Tensor) and data.ndim > 0 and len(data) > 0:
        return
    if isinstance(data, Tensor):
        found, remedy = f"one of shape {tuple(data.shape)}", ""
    else:
        found, remedy = (
            f"a {type(data).__name__}",
            f": torch.as_tensor({name}, dtype=torch.float32) makes one of an array",
        )
        if isinstance(data, Dataset | DataLoader):
            loader = f", as DataLoader({name}, batch_size=200, shuffle=True)" if name == "train" else ""
            remedy = f"{' or a DataLoader' * bool(loader)}{loader}"
        elif isinstance(getattr(data, name, None), Tensor):  # the splits of a data set
            remedy = f": pass its .{name}"
        elif hasattr(data, "to_numpy"):
            remedy = f": torch.as_tensor({name}.to_numpy(), dtype=torch.float32) makes one of a table"
    raise ValueError(f"{name} must be a tensor of at least one datum, found {found}{remedy}")


def arguments_of(data: Tensor, index: Tensor, transform: Transform) -> Arguments:
    """The arguments of the programs for the data at these positions. Every call of a program in training gets its batch here.

    Raises:
        TypeError: if the transform makes no tensor of data.
    """
    batch = data[index]
    if transform is not None:
        batch = transform(batch)
        _check_transformed(batch)
    return (batch,), {}


def _check_transformed(batch: Any) -> None:
    if not isinstance(batch, Tensor) or batch.ndim == 0:
        raise TypeError(f"transform must make one tensor of a batch, found {_described(batch)}")


def batches_of(train: Any, batch_size: int | None, transform: Transform, device: torch.device) -> Batches:
    """Make the batches of a tensor in memory or of a `DataLoader`.

    Raises:
        TypeError: if a loader has no length.
        ValueError: if a loader has no batches, is given together with `batch_size`, or has another number of batches
            than in other processes; or if a batch of a tensor has fewer data than there are processes.
    """
    if isinstance(train, DataLoader):
        return _Loaded(train, batch_size, transform, device)
    return _InMemory(train, 200 if batch_size is None else batch_size, transform, device)


class _InMemory(Batches):
    name = "train"
    in_one_order = False

    def __init__(self, train: Tensor, batch_size: int, transform: Transform, device: torch.device):
        super().__init__()
        self.sizes = _sizes(len(train), batch_size)
        joined = batch_size > 1 and self.sizes[-1] == batch_size + 1
        distributed.check_shares(len(train) - joined, batch_size)
        self.train, self.transform, self.device = train.to(device), transform, device
        self.num_data, self.batch_size = len(train), batch_size
        self.largest = min(batch_size, len(train))
        self.full_size = len(distributed.share(torch.arange(self.largest)))
        self.per_epoch = len(self.sizes)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        shuffled = torch.randperm(self.num_data, device=self.device)
        distributed.same_everywhere([shuffled])
        for index in shuffled.split(self.sizes):
            yield self.train, distributed.share(index)

    def example(self) -> tuple[Tensor, Tensor]:
        return self.train, torch.arange(self.largest, device=self.device)


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

    def __init__(self, loader: DataLoader, batch_size: int | None, transform: Transform, device: torch.device):
        super().__init__()
        if batch_size is not None:
            raise ValueError(f"found batch_size={batch_size} beside a DataLoader, which has its own: leave it out")
        try:
            self.num_data, self.per_epoch = _num_drawn(loader), len(loader)
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
        self.loader, self.device = loader, device
        self.transform = self.of_items = transform
        self.batch_size = self.full_size = loader.batch_size or -(-self.num_data // self.per_epoch)
        self.in_one_order = self.per_epoch == 1 and _draws_one_order(loader)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        for item in self.loader:
            yield self._on_device(item)

    def example(self) -> tuple[Tensor, Tensor]:
        return self._on_device(next(iter(self.loader)))

    def _on_device(self, item: Any) -> tuple[Tensor, Tensor]:
        data = item[0] if isinstance(item, list | tuple) and len(item) == 1 else item
        data = tree_map_only(Tensor, lambda tensor: tensor.to(self.device, non_blocking=True), data)
        if not isinstance(data, Tensor):
            if self.of_items is None:
                key = next(iter(data), 0) if isinstance(data, Mapping) else 0
                raise TypeError(
                    f"a batch of the DataLoader must be a tensor of data, found {_described(data)}: the programs are called "
                    f"with one tensor. Select it with transform=, for example transform=lambda batch: "
                    f"batch[{key!r}]"
                )
            data = self.of_items(data)
            self.transform = None  # it is done, for the items of a batch belong together
            _check_transformed(data)
        return data, torch.arange(len(data), device=self.device)


def _draws_one_order(loader: DataLoader) -> bool:
    """Whether the sampler yields the same batches every time; generators are left as they were."""
    if loader.batch_sampler is None:
        return False
    generators = {loader.generator, getattr(loader.sampler, "generator", None)} - {None}
    states = [(generator, generator.get_state()) for generator in generators]
    with torch.random.fork_rng([]):
        first = list(loader.batch_sampler)
        tries = 1 if sum(map(len, first)) > _FEW else 40  # few data may repeat an order by chance
        is_one = all(list(loader.batch_sampler) == first for _ in range(tries))
    for generator, state in states:
        generator.set_state(state)
    return is_one


def _num_drawn(loader: DataLoader) -> int:
    """Data per epoch: the sampler's length, less what `drop_last` drops; the data set's length if the sampler is hidden."""
    batches = loader.batch_sampler
    drawn: Any = loader.dataset
    size, drops = loader.batch_size, loader.drop_last
    if isinstance(batches, BatchSampler) and isinstance(batches.sampler, Sized):
        size, drops, drawn = batches.batch_size, batches.drop_last, batches.sampler
    num_data = len(drawn)
    return num_data // size * size if size and drops else num_data


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} of {list(batch)}"
    if isinstance(batch, list | tuple):
        items = (
            f"{type(item).__name__} {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
            for item in batch
        )
        return f"{len(batch)} items ({', '.join(items)})"
    return "a single number" if isinstance(batch, Tensor) else type(batch).__name__
