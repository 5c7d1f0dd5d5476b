"""Several processes that train one model and share an evaluation, as `torchrun` starts them.

Each process (rank) takes its share of every batch; gradients are added up over ranks as one flat tensor, which works with
recorded steps too (the hooks of `DistributedDataParallel` do not see a recording). A loss that is a sum over data, as
every ELBO of a datum plate is, has then the gradient of the whole batch. In a process of its own nothing here does
anything.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as processes

__all__ = [
    "check_shares",
    "gather",
    "joined",
    "num_ranks",
    "random_numbers_apart",
    "rank",
    "same_everywhere",
    "share",
    "sum_gradients",
    "sums",
]

_TIMEOUT = 50.0
_PATIENCE = timedelta(hours=12)  # where the ranks' work may differ in length
_patient: Any = None  # the group of all ranks that waits so long


@contextmanager
def joined(timeout: float = _TIMEOUT) -> Iterator[int]:
    """Join the processes that `torchrun` has started (gloo on CPUs, NCCL on GPUs, one each); yields the rank.

    timeout: seconds that a rank waits for another in training: one that hangs ends the others after these, one that has died
        at once, with an error that says so. At the end of an evaluation (`gather`) they wait for each other for hours

    Does nothing, as rank 0 of 1, where `torchrun` started none.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or processes.is_initialized():
        yield rank()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    global _patient
    processes.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        _patient = processes.new_group(backend="gloo", timeout=_PATIENCE)
        yield rank()
    finally:
        _patient = None
        processes.destroy_process_group()


def rank() -> int:
    """Which of the processes this is; 0 is the one that writes."""
    return processes.get_rank() if _several() else 0


def num_ranks() -> int:
    """How many processes there are."""
    return processes.get_world_size() if _several() else 1


def share(index: Tensor) -> Tensor:
    """This rank's part of a batch's positions: every `num_ranks()`-th; shares differ in length by one at most."""
    return index[rank() :: num_ranks()]


def check_shares(num_data: int, batch_size: int) -> None:
    """Raise ValueError where a rank would have no datum of a batch."""
    smallest = min(num_data, batch_size, num_data % batch_size or batch_size)
    if smallest < num_ranks():
        raise ValueError(
            f"{num_data} data in batches of {batch_size} have a batch of {smallest}, fewer than the {num_ranks()} processes: "
            f"choose another batch_size, or fewer processes"
        )


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of rank 0."""
    if _several():
        for tensor in tensors:
            with _together():
                processes.broadcast(tensor.detach(), 0)


def random_numbers_apart() -> None:
    """Seed all ranks but the first anew, each differently: ranks seeded alike would share their noise."""
    if not _several():
        return
    with torch.random.fork_rng([]):
        seed = torch.randint(2**62, ())
    same_everywhere([seed])
    if rank():
        torch.manual_seed(int(seed) + rank())


def sum_gradients(parameters: Sequence[Tensor], loss: Tensor | None = None) -> None:
    """Give each parameter the sum of its gradients over ranks; a rank without one adds zeros.

    loss: of this rank; where it is not finite, the sum is NaN on all of them, so that they agree on what to do
    """
    if not _several() or not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    if loss is not None:
        flat = torch.where(loss.isfinite(), flat, torch.nan)
    with _together():
        processes.all_reduce(flat)
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype)


def sums(*numbers: float | Tensor) -> list[float]:
    """Each number summed over ranks."""
    values = [float(number) for number in numbers]
    if _several():
        totals = torch.tensor(values, dtype=torch.float64)
        with _together():
            processes.all_reduce(totals)
        values = totals.tolist()
    return values


def gather(value: Any) -> list[Any]:
    """Every rank's value, in their order, on all of them."""
    if not _several():
        return [value]
    values = [None] * num_ranks()
    with _together():
        processes.all_gather_object(values, value, group=_patient)
    return values


@contextmanager
def _together() -> Iterator[None]:
    """Say what it means where the others do not come."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"process {rank()} of {num_ranks()} waited for another in vain: one hangs or has died, and so this one ends. Look at "
            f"what the others say ({error})"
        ) from error


def _several() -> bool:
    return processes.is_available() and processes.is_initialized() and processes.get_world_size() > 1
