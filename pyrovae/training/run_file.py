"""The checkpoint file of a run: its state, and the settings that must be the same when the run is resumed."""

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyrovae.common import distributed
from pyrovae.data.conversion import Numbers
from pyrovae.data.forms import as_batch, is_stream
from pyrovae.programs.reach import modules_behind
from pyrovae.programs.traces import Program
from pyrovae.training.attributes import constants_of
from pyrovae.training.checkpoint_file import earlier, locked, path_of, read, target_of, write
from pyrovae.training.generators import restored_after
from pyrovae.training.preparation import Options, Run
from pyrovae.training.saved_pair import describe_module, described_in, difference, pair_content, versions
from pyrovae.training.state import TrainingState
from pyrovae.training.values import DEPTH, checksum, describe, describe_callable, describe_program, same_text

__all__ = ["RunFile", "describe_data", "run_file"]

# Attributes in which data sets of torch and torchvision keep lists of data in memory.
_LISTS = ("tensors", "targets", "labels", "indices", "datasets")
_MOST_ITEMS, _MOST_BYTES = 100_000, 2**28  # above these, only evenly spaced items or rows are read


class RunFile:
    """The checkpoint file of a run.

    Args:
        path: the file.
        every: seconds that `save_when_due` leaves between two saves at least, except for the last.
        settings: what must stay the same when the run is resumed.
        model, guide: the programs of the run.
    """

    def __init__(self, path: Path, every: float, settings: dict[str, Any], model: Program, guide: Program):
        self.path, self.every, self.settings = path, every, settings
        self.modules: dict[str, nn.Module] = {}
        self.pair: dict[str, Any] = {"versions": versions(), "model": None}
        if isinstance(model, nn.Module) and isinstance(guide, nn.Module):
            self.modules, self.pair = {"model": model, "guide": guide}, pair_content(model, guide)
        else:
            behind = modules_behind(model, guide)
            described = {f"module {i} ({type(m).__name__})": describe_module(m) for i, m in enumerate(behind)}
            programs = {"model": model, "guide": guide}
            described |= {name: {"": {"class": describe_program(of, behind)}} for name, of in programs.items()}
            self.pair["description"] = described
        self.saved_at = -float("inf")

    def found(self) -> dict[str, Any] | None:
        """Return the saved state, or None if there is no file.

        Raises:
            ValueError: if the file is damaged, holds no run, or holds a run with other settings.
        """
        return self._state_in(self.path) if self.path.exists() else None

    def check_not_lost(self) -> None:
        """Raise ValueError if only the previous file of this run is there: a new run would replace it."""
        before = earlier(self.path)
        try:
            is_lost = not self.path.exists() and before.exists() and self._state_in(before) is not None
        except ValueError:  # of another run, or damaged: nothing to resume
            return
        if is_lost:
            raise ValueError(
                f"{self.path} is missing, but the state before it, {before}, exists: move that to {self.path} to resume from "
                f"it, or move it away to start a new run"
            )

    def _state_in(self, path: Path) -> dict[str, Any]:
        content = read(path)
        if "training" not in content:
            raise ValueError(f"{path} holds a model and a guide, but no run to resume: give fit another path")
        for name, there in content["training"]["settings"].items():
            here = self.settings.get(name)
            known = name in self.settings or "." not in name  # versions differ in what they record of a loss or loader
            is_extended = name == "epochs" and there <= here
            if known and here != there and not is_extended and not _same(there, here):
                raise ValueError(
                    f"{path} was written by a run with {name}={there}, and this one has {name}={here}: call fit as before, "
                    f"or give it another path"
                )
        for name, described in described_in(content).items():
            here = self.pair["description"].get(name)
            # Restoring the state reports tensors of other shapes.
            if here is None or (name in self.modules and not _fits(content[name], self.modules[name])):
                continue
            if found := difference(described, here):
                raise ValueError(
                    f"{path} is of a run of another {name}: {found}: call fit as before, or give it another path"
                )
        state: dict[str, Any] = content["training"]["state"]
        return state

    def save(self, state: TrainingState, captured: dict[str, Any]) -> None:
        """Write the state as captured now, and keep the previous file."""
        content = {**self.pair, "training": {"settings": self.settings, "state": captured}}
        for name, module in self.modules.items():
            content[name] = state.best_of(module.state_dict(keep_vars=True))
        write(self.path, content, keep=True)
        self.saved_at = time.monotonic()

    def save_when_due(self, state: TrainingState, captured: dict[str, Any], *, is_last: bool) -> None:
        if is_last or time.monotonic() - self.saved_at >= self.every:
            self.save(state, captured)


@contextmanager
def run_file(run: Run, options: Options, train: Any, validation: Any) -> Iterator[RunFile | None]:
    """Lock the file of a run inside the context; give None without a checkpoint, and in all processes but the first.

    Raises:
        ValueError: if the file exists already and the run is not resumed.
        RuntimeError: if another run is using the file.
    """
    if options.checkpoint is None or distributed.rank() != 0:
        yield None
        return
    path = path_of(options.checkpoint)
    with locked(path):
        if path.exists() and not options.resume:
            raise ValueError(
                f"{path} already exists: resume=True resumes its run, another checkpoint= starts a new one"
            )
        target = target_of(path)
        for kind in ("tmp", "link"):
            for leftover in target.parent.glob(f".{target.name}.*.{kind}"):  # left by runs killed while writing
                leftover.unlink(missing_ok=True)
        settings = _settings_of(run, options, train, validation)
        file = RunFile(path, options.checkpoint_every, settings, run.model, run.guide)
        if options.resume:
            file.check_not_lost()
        yield file


def _same(there: Any, here: Any) -> bool:
    return isinstance(there, str) and isinstance(here, str) and same_text(there, here)


def _fits(there: dict[str, Any], module: nn.Module) -> bool:
    here = module.state_dict()
    return there.keys() == here.keys() and all(
        not (is_lazy(tensor) or is_lazy(there[name])) and there[name].shape == tensor.shape
        for name, tensor in here.items()
    )


def _settings_of(run: Run, options: Options, train: Any, validation: Any) -> dict[str, Any]:
    """Describe, in plain values, what must stay the same when a run is resumed.

    Names with a dot or "in full" may be missing in files of earlier versions.
    """
    loss = run.loss
    described = repr(loss)
    if type(loss).__repr__ is object.__repr__:
        described = f"{type(loss).__name__}(num_particles={getattr(loss, 'num_particles', 1)})"
    settings: dict[str, Any] = {
        "optimizer": run.optimizer.factory.described,
        "epochs": options.epochs,
        "batch_size": run.batches.batch_size,
    }
    for name in ("learning_rate", "clip_norm", "precision", "accumulate", "average"):
        settings[name] = getattr(options, name)
    settings["loss"] = described
    settings |= {f"loss.{name}": text for name, value in constants_of(loss).items() if (text := describe(value, DEPTH))}
    for name, function in (("transform", options.transform), ("schedule", options.schedule)):
        settings[name] = _function_name(function)
        settings[f"{name} in full"] = None if function is None else describe_callable(function)
    return settings | describe_data("train", train) | describe_data("validation", validation)


def describe_data(name: str, data: Any) -> dict[str, str | None]:
    """Describe data in plain values, each under a key that starts with their name."""
    if isinstance(data, DataLoader):
        found: dict[str, str | None] = {name: f"DataLoader with {len(data)} batches"}
        details = _of_loader(data)
    elif data is None or isinstance(data, Tensor | np.ndarray):
        return {name: None if data is None else checksum(data)}
    elif is_stream(data):
        found = {name: f"{type(data).__name__} of {len(data)}"}
        details = {"dataset.content": _checksum_of(data), "dataset.items": _checksum_of(_items(data))}
    else:
        return _of_arguments(name, data)
    return found | {f"{name}.{key}": text for key, text in details.items() if text is not None}


def _of_arguments(name: str, data: Any) -> dict[str, str | None]:
    """The arguments that data in memory are, each by its name."""
    # In float64, which rounds nothing.
    batch = as_batch(data, Numbers(torch.float64, converts=False), name)
    items = {f"argument {place}": value for place, value in enumerate(batch.args, 1)}
    items |= {f"argument {key!r}": value for key, value in batch.kwargs.items()}
    found: dict[str, str | None] = {name: ", ".join(items)}
    return found | {f"{name}.{place}": _checksum_of(value) for place, value in items.items()}


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
    with restored_after(dataset):
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
