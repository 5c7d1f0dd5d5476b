"""Describe loss, functions and data of a run in plain values, to compare them when the run is resumed."""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from pyro.infer import ELBO
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyrovae.training.attributes import constants_of
from pyrovae.training.values import DEPTH, checksum, describe, describe_callable

__all__ = ["settings_of"]

# Attributes in which data sets of torch and torchvision keep lists of data in memory.
_LISTS = ("tensors", "targets", "labels", "indices", "datasets")
_MOST_ITEMS, _MOST_BYTES = 100_000, 2**28  # of what is larger, evenly spaced items or rows are read


def settings_of(
    train: Tensor | DataLoader,
    validation: Tensor | None,
    loss: ELBO,
    transform: Callable | None,
    schedule: Callable | None,
) -> dict[str, Any]:
    """Describe, in plain values, what must stay the same when a run is resumed, besides the numeric settings.

    Names with a dot or "in full" may be missing in files of earlier versions.
    """
    described = repr(loss)
    if type(loss).__repr__ is object.__repr__:
        described = f"{type(loss).__name__}(num_particles={getattr(loss, 'num_particles', 1)})"
    settings: dict[str, Any] = {"loss": described}
    settings |= {f"loss.{name}": text for name, value in constants_of(loss).items() if (text := describe(value, DEPTH))}
    for name, function in (("transform", transform), ("schedule", schedule)):
        settings[name] = _function_name(function)
        settings[f"{name} in full"] = None if function is None else describe_callable(function)
    for name, data in (("train", train), ("validation", validation)):
        if isinstance(data, DataLoader):
            settings[name] = f"DataLoader with {len(data)} batches"
            settings |= {f"{name}.{key}": text for key, text in _of_loader(data).items() if text is not None}
        elif isinstance(data, Tensor | np.ndarray):
            settings[name] = checksum(data)
        else:
            settings[name] = None if data is None else _checksum_of(data)
    return settings


def _function_name(function: Callable | None) -> str | None:
    function = getattr(function, "func", function)  # of a partial
    return None if function is None else getattr(function, "__qualname__", type(function).__name__)


def _of_loader(loader: DataLoader) -> dict[str, str | None]:
    """What determines the batches of a loader, as far as reading it does not change them."""
    dataset: Any = loader.dataset
    found: dict[str, str | None] = {
        "drop_last": str(loader.drop_last),
        "collate_fn": describe_callable(loader.collate_fn),
        "dataset.content": _checksum_of(dataset) or type(dataset).__name__,
    }
    samplers: dict[str, Any] = {"sampler": loader.sampler}
    if loader.batch_size is None and loader.batch_sampler is not None:  # its own
        inside = getattr(loader.batch_sampler, "sampler", None)
        samplers = {"sampler": inside or loader.sampler, "batch_sampler": loader.batch_sampler}
    for role, sampler in samplers.items():
        found[role] = type(sampler).__name__
        for name, value in constants_of(sampler, amounts=True).items():
            if name not in ("data_source", "sampler"):
                found[f"{role}.{name}"] = describe(value) or _checksum_of(value)
    # With workers, a data set may open its files at its first reading, which must be the workers'.
    if not loader.num_workers and not isinstance(dataset, IterableDataset):
        found["dataset.items"] = _checksum_of(_items(dataset))
    return found


def _items(dataset: Any) -> list:
    """The first, middle and last item of a data set; none if a second read gives others."""
    kept = get_rng_state()
    try:
        places = sorted({0, len(dataset) // 2, len(dataset) - 1})
        once, again = ([dataset[place] for place in places] for _ in range(2))
        return once if _checksum_of(once) == _checksum_of(again) else []
    except Exception:  # its items may have other keys
        return []
    finally:
        set_rng_state(kept)


def _checksum_of(thing: Any) -> str | None:
    """Checksum of all arrays, numbers and texts in lists, tuples, dicts and data sets; None if there are none."""
    total, count = 0, 0
    for leaf in _leaves(thing):
        text = checksum(leaf) if isinstance(leaf, Tensor | np.ndarray) else repr(leaf)
        total, count = zlib.crc32(text.encode(), total), count + 1
    return f"checksum {total:08x} of {count} arrays, numbers or texts" if count else None


def _leaves(thing: Any) -> Iterator[Any]:
    if isinstance(thing, Tensor | np.ndarray):
        every = max(1, thing.nbytes // _MOST_BYTES) if thing.ndim else 1
        yield thing if every == 1 else thing[::every]
    elif thing is None or isinstance(thing, bool | int | float | str | bytes):
        yield thing
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield str(key)
            yield from _leaves(value)
    elif isinstance(thing, list | tuple):
        are_numbers = len(thing) > 0 and isinstance(thing[0], int | float)
        for item in thing if are_numbers else thing[:: max(1, len(thing) // _MOST_ITEMS)]:
            yield from _leaves(item)
    elif callable(getattr(thing, "tobytes", None)):  # a Pillow image or a NumPy number
        yield thing.tobytes()
    elif isinstance(thing, Dataset):
        for name, value in constants_of(thing, amounts=True).items():
            if name in _LISTS or isinstance(value, Tensor | np.ndarray | Dataset):
                yield from _leaves(value)
            elif isinstance(value, list | tuple | dict):  # text may be the paths of files, which may be moved
                yield from (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor | np.ndarray))
