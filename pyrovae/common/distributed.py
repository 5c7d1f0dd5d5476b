"""Training and evaluation that several processes share, started by `torchrun`.

Each process (rank) takes its share of every batch. Gradients are summed over ranks as one flat tensor. This also works
for recorded steps, which the hooks of `DistributedDataParallel` do not see. A loss that is a sum over data, such as an
ELBO with a data plate, thus gets the gradient of the whole batch. In a single process these functions do nothing.
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
    "from_first",
    "gather",
    "gather_soon",
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
_PATIENCE = timedelta(hours=12)  # for work that takes some ranks longer than others
_patient: Any = None  # the group of all ranks with that timeout
_prompt: Any = None  # the group of all ranks for values on the CPU, with the timeout of training


@contextmanager
def joined(timeout: float = _TIMEOUT) -> Iterator[int]:
    """Join the processes that `torchrun` started; yield this process's rank.

    Uses gloo on CPUs and NCCL on GPUs, one GPU per process. If `torchrun` started no processes, it does nothing and
    yields rank 0 of 1.

    Args:
        timeout: Seconds that a rank waits for another in training. If a rank hangs, the others stop after this time; if
            it dies, they stop at once. Both raise an error that says so. At the end of an evaluation (`gather`), ranks
            wait for each other for hours.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or processes.is_initialized():
        yield rank()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    global _patient, _prompt
    processes.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        _patient = processes.new_group(backend="gloo", timeout=_PATIENCE)
        _prompt = processes.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        yield rank()
    finally:
        _patient = _prompt = None
        processes.destroy_process_group()


def rank() -> int:
    """The index of this process. Only rank 0 writes files."""
    return processes.get_rank() if _several() else 0


def num_ranks() -> int:
    """The number of processes."""
    return processes.get_world_size() if _several() else 1


def share(index: Tensor) -> Tensor:
    """This rank's part of a batch: every `num_ranks()`-th index. Shares differ in length by at most one."""
    ranks = num_ranks()
    return index if ranks == 1 else index[rank() :: ranks]


def check_shares(num_data: int, batch_size: int) -> None:
    """Check that every rank gets at least one datum of every batch.

    Raises:
        ValueError: A batch has fewer data than there are processes.
    """
    smallest = min(num_data, batch_size, num_data % batch_size or batch_size)
    if smallest < num_ranks():
        raise ValueError(
            f"{num_data} data in batches of {batch_size} have a batch of {smallest}, fewer than the {num_ranks()} processes: "
            f"choose another batch_size, or use fewer processes"
        )


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors on all ranks with those of rank 0."""
    if _several():
        for tensor in tensors:
            with _together():
                processes.broadcast(tensor.detach(), 0)


def random_numbers_apart() -> None:
    """Reseed every rank but the first, each differently, because ranks with equal seeds would draw the same noise."""
    if not _several():
        return
    with torch.random.fork_rng([]):
        seed = torch.randint(2**62, ())
    same_everywhere([seed])
    if rank():
        torch.manual_seed(int(seed) + rank())


def sum_gradients(parameters: Sequence[Tensor], loss: Tensor | None = None) -> None:
    """Replace each parameter's gradient by its sum over ranks; a rank without a gradient adds zeros.

    A parameter without a gradient on any rank keeps none, because the optimizer would decay it.

    Args:
        parameters: The parameters, in the same order on all ranks.
        loss: This rank's loss. If it is not finite, the sum is NaN on all ranks, so that they all react alike.
    """
    if not _several() or not parameters:
        return
    is_there = [p.grad is not None for p in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    if loss is not None:
        flat = torch.where(loss.isfinite(), flat, torch.nan)
    counts = torch.tensor(is_there, dtype=flat.dtype, device=flat.device)
    flat = torch.cat([flat, counts])
    with _together():
        processes.all_reduce(flat)
    *totals, counts = flat.split([*(p.numel() for p in parameters), len(parameters)])
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype)
    if not all(is_there):  # only then, because reading numbers on a GPU waits for the device
        for parameter, count in zip(parameters, counts.tolist(), strict=True):
            if not count:
                parameter.grad = None


def sums(*numbers: float | Tensor) -> list[float]:
    """Sum each number over ranks."""
    values = [float(number) for number in numbers]
    if _several():
        totals = torch.tensor(values, dtype=torch.float64)
        with _together():
            processes.all_reduce(totals)
        values = totals.tolist()
    return values


def gather(value: Any) -> list[Any]:
    """Collect the values of all ranks, in the order of ranks, on every rank. Waits for slower ranks for hours."""
    return _gathered(value, _patient)


def gather_soon(value: Any) -> list[Any]:
    """As `gather`, for values that all ranks have at about the same time: waits as long as training does."""
    return _gathered(value, _prompt)


def from_first(value: Any) -> Any:
    """Give every rank the value of rank 0."""
    if not _several():
        return value
    values = [value]
    with _together():
        processes.broadcast_object_list(values, 0, group=_prompt)
    return values[0]


def _gathered(value: Any, group: Any) -> list[Any]:
    if not _several():
        return [value]
    values = [None] * num_ranks()
    with _together():
        processes.all_gather_object(values, value, group=group)
    return values


@contextmanager
def _together() -> Iterator[None]:
    """Explain the error if another rank does not take part."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"process {rank()} of {num_ranks()} waited for another process, which hangs or has died, and therefore stops. "
            f"Look at the output of the other processes ({error})"
        ) from error


def _several() -> bool:
    return processes.is_available() and processes.is_initialized() and processes.get_world_size() > 1
