"""Random generators that data hold themselves, besides the global ones: found, saved and restored."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, Subset

__all__ = [
    "Generator",
    "generators_of",
    "restored_after",
    "samplers_of",
    "set_state",
    "start_at",
    "state_of",
    "with_arrays",
    "with_tensors",
]

Generator: TypeAlias = "torch.Generator | np.random.Generator | np.random.RandomState | random.Random"


def generators_of(data: DataLoader | Dataset) -> list[Generator]:
    """The generators that a loader, its samplers and its data set have as attributes, whatever their names."""
    # Not before data are at hand, because NumPy imports its random numbers when they are first asked for.
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    found = (value for holder in _holders(data) for value in getattr(holder, "__dict__", {}).values())
    return list(dict.fromkeys(value for value in found if isinstance(value, kinds)))


def samplers_of(loader: DataLoader) -> tuple[Any, ...]:
    """What a loader draws positions from."""
    batches = loader.batch_sampler
    return loader.sampler, batches, getattr(batches, "sampler", None)


def _holders(data: Any) -> Iterator[Any]:
    if isinstance(data, DataLoader):
        yield from (data, *samplers_of(data))
        data = data.dataset
    yield data
    if isinstance(data, Subset):
        yield from _holders(data.dataset)


def state_of(generator: Generator) -> Any:
    """The state as plain values, which a checkpoint can hold."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    state: Any = (
        generator.get_state() if isinstance(generator, np.random.RandomState) else generator.bit_generator.state
    )
    return with_tensors(state)


def set_state(generator: Generator, state: Any) -> None:
    """Restore what `state_of` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        state = with_arrays(state)
        if isinstance(generator, np.random.RandomState):
            generator.set_state(state)
        else:
            generator.bit_generator.state = state


def with_tensors(state: Any) -> Any:
    """A state of NumPy's with tensors in place of arrays, as a checkpoint holds it."""
    return tree_map(lambda leaf: torch.as_tensor(leaf.astype("int64")) if isinstance(leaf, np.ndarray) else leaf, state)


def with_arrays(state: Any) -> Any:
    """Undo `with_tensors`."""
    return tree_map(lambda leaf: leaf.numpy().astype("uint64") if isinstance(leaf, Tensor) else leaf, state)


@contextmanager
def restored_after(data: DataLoader | Dataset) -> Iterator[list[Generator]]:
    """Yield the generators of data, and restore their states afterwards."""
    before = [(generator, state_of(generator)) for generator in generators_of(data)]
    try:
        yield [generator for generator, _ in before]
    finally:
        for generator, state in before:
            set_state(generator, state)


def start_at(generator: Generator, seed: int) -> None:
    """Seed a generator, with the same numbers in every process."""
    if isinstance(generator, np.random.Generator):
        kind: Callable[[int], Any] = type(generator.bit_generator)
        generator.bit_generator.state = kind(seed).state
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    else:
        generator.seed(seed)
