"""Seed one part of a computation without changing the random numbers of the rest.

`torch.manual_seed` seeds every GPU, even before CUDA is initialised, but `torch.random.fork_rng` restores only the GPUs
that it is given. So these functions seed only the generators that they restore.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["seed_generators", "seeded", "states_under"]


@contextmanager
def seeded(seed: int, *devices: torch.device) -> Iterator[None]:
    """Seed torch's generators of the CPU and of these devices, and restore them afterwards."""
    with torch.random.fork_rng(list(_gpus(devices))):
        seed_generators(seed, *devices)
        yield


def seed_generators(seed: int, *devices: torch.device) -> None:
    """Seed torch's generators of the CPU and of these devices."""
    torch.default_generator.manual_seed(seed)
    for gpu in _gpus(devices):
        index = torch.cuda.current_device() if gpu.index is None else gpu.index
        torch.cuda.default_generators[index].manual_seed(seed)


def states_under(seed: int) -> dict[str, Any]:
    """The states of the generators of torch, Python and NumPy under a seed, for `pyro.util.set_rng_state`."""
    return {
        "torch": torch.Generator().manual_seed(seed).get_state(),
        "random": random.Random(seed).getstate(),
        "numpy": np.random.RandomState(seed).get_state(),
    }


def _gpus(devices: tuple[torch.device, ...]) -> set[torch.device]:
    return {device for device in devices if device.type == "cuda"}
