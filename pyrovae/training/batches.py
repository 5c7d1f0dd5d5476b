"""Where the batches of an epoch come from: a tensor, held on the device whole, or a `DataLoader`, for more than memory holds."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyrovae import distributed

__all__ = ["Batches", "batches_of", "check_data"]


class Batches(ABC):
    """The training data, in batches.

    num_data: of an epoch; batch_size: of all but perhaps the last; per_epoch: how many batches
    full_size: how many of a full batch are this process's
    device: where they are
    name: whose positions are given
    """

    name: str
    num_data: int
    batch_size: int
    full_size: int
    per_epoch: int
    device: torch.device

    @abstractmethod
    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Data, and the positions in them that this process's part of a batch has, for each batch of one epoch, shuffled."""

    @abstractmethod
    def example(self) -> tuple[Tensor, Tensor]:
        """Such a pair, of a full batch; may use up random numbers."""


def check_data(name: str, data: Any) -> None:
    """Raise ValueError for what is not a tensor of data."""
    if not isinstance(data, Tensor) or data.ndim < 1 or len(data) == 0:
        found = tuple(data.shape) if isinstance(data, Tensor) else type(data).__name__
        raise ValueError(f"{name} must be a tensor of at least one datum, found {found}")


def batches_of(train: Any, batch_size: int | None, device: torch.device) -> Batches:
    """The batches of a tensor of data, in memory, or of a `DataLoader`.

    Raises TypeError for a loader that does not tell its length, ValueError for one without batches, with a batch size beside
    it, or unlike that of another process; and for batches of a tensor too small for the number of processes.
    """
    if isinstance(train, DataLoader):
        return _Loaded(train, batch_size, device)
    return _InMemory(train, 200 if batch_size is None else batch_size, device)


class _InMemory(Batches):
    name = "train"

    def __init__(self, train: Tensor, batch_size: int, device: torch.device):
        distributed.check_shares(len(train), batch_size)
        self.train, self.device = train.to(device), device
        self.num_data, self.batch_size = len(train), batch_size
        self.full_size = len(distributed.share(torch.arange(batch_size)))
        self.per_epoch = -(-len(train) // batch_size)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        shuffled = torch.randperm(self.num_data, device=self.device)
        distributed.same_everywhere([shuffled])
        for index in shuffled.split(self.batch_size):
            yield self.train, distributed.share(index)

    def example(self) -> tuple[Tensor, Tensor]:
        return self.train, torch.arange(self.batch_size, device=self.device).clamp_max(self.num_data - 1)


class _Loaded(Batches):
    name = "batch"

    def __init__(self, loader: DataLoader, batch_size: int | None, device: torch.device):
        if batch_size is not None:
            raise ValueError(f"found batch_size={batch_size} beside a DataLoader, which has its own: leave it out")
        try:
            self.num_data, self.per_epoch = len(loader.dataset), len(loader)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(
                "found a DataLoader of a data set without a length: the learning rate's schedule and the ELBO per datum need "
                "one; give the data set a __len__"
            ) from None
        if not self.per_epoch:
            raise ValueError("train must have at least one batch, found a DataLoader with none")
        counts = distributed.gather(self.per_epoch)
        if len(set(counts)) > 1:
            raise ValueError(
                f"found DataLoaders with {counts} batches in {len(counts)} processes, which make each step together: use a "
                f"DistributedSampler"
            )
        self.loader, self.device = loader, device
        self.batch_size = self.full_size = loader.batch_size or -(-self.num_data // self.per_epoch)

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        for item in self.loader:
            yield self._on_device(item)

    def example(self) -> tuple[Tensor, Tensor]:
        return self._on_device(next(iter(self.loader)))

    def _on_device(self, item: Any) -> tuple[Tensor, Tensor]:
        data = item[0] if isinstance(item, list | tuple) and item else item  # (images, labels)
        if not isinstance(data, Tensor):
            raise TypeError(
                f"a batch of the DataLoader must be a tensor of data, or begin with one, found {type(data).__name__}"
            )
        data = data.to(self.device, non_blocking=True)
        return data, torch.arange(len(data), device=self.device)
