"""The file of a run: where its state is saved while it goes on, and found when it is resumed."""

import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyrovae.checkpoint.files import read, write
from pyrovae.checkpoint.locks import locked
from pyrovae.checkpoint.pair import pair_content, versions
from pyrovae.programs.traces import Program
from pyrovae.training.state import TrainingState

__all__ = ["RunFile", "run_file", "settings_of"]


class RunFile:
    """Where the state of a run is saved: at most every so many seconds, and when told to.

    settings: what must be the same when the run is resumed
    """

    def __init__(self, path: Path, every: float, settings: dict[str, Any], model: Program, guide: Program):
        self.path, self.every, self.settings = path, every, settings
        self.modules: dict[str, nn.Module] = {}
        self.pair: dict[str, Any] = {"versions": versions(), "model": None}
        if isinstance(model, nn.Module) and isinstance(guide, nn.Module):
            self.modules, self.pair = {"model": model, "guide": guide}, pair_content(model, guide)
        self.saved_at = -float("inf")

    def found(self) -> dict[str, Any] | None:
        """The state that was saved there, None where there is no file.

        Raises ValueError for a file that is damaged, is no run's, or that of a run with other settings.
        """
        if not self.path.exists():
            return None
        content = read(self.path)
        if "training" not in content:
            raise ValueError(f"{self.path} holds a model and a guide, but no run to go on with: give fit another path")
        for name, there in content["training"]["settings"].items():
            here = self.settings.get(name)
            if here != there:
                raise ValueError(
                    f"{self.path} is of a run with {name}={there}, and this one has {name}={here}: call fit as before, or "
                    f"give it another path"
                )
        return content["training"]["state"]

    def save(self, state: TrainingState, captured: dict[str, Any]) -> None:
        """Write what was captured of the state as it is now, the file before being kept."""
        content = {**self.pair, "training": {"settings": self.settings, "state": captured}}
        for name, module in self.modules.items():
            content[name] = state.best_of(module.state_dict(keep_vars=True))
        write(self.path, content, keep=True)
        self.saved_at = time.monotonic()

    def save_when_due(self, state: TrainingState, captured: dict[str, Any], *, is_last: bool) -> None:
        if is_last or time.monotonic() - self.saved_at >= self.every:
            self.save(state, captured)


@contextmanager
def run_file(
    path: str | os.PathLike | None, resume: bool, every: float, settings: dict[str, Any], model: Program, guide: Program
) -> Iterator[RunFile | None]:
    """The file of a run, locked; None without a path.

    Raises ValueError where one is there already and is not to be resumed, RuntimeError if another run has it.
    """
    if path is None:
        yield None
        return
    path = Path(path)
    with locked(path):
        if path.exists() and not resume:
            raise ValueError(
                f"{path} is there already: resume=True goes on with the run in it, another checkpoint= begins a new one"
            )
        for kind in ("tmp", "link"):
            for leftover in path.parent.glob(f".{path.name}.*.{kind}"):  # of runs that were killed as they wrote
                leftover.unlink(missing_ok=True)
        yield RunFile(path, every, settings, model, guide)


def settings_of(
    train: Tensor | DataLoader,
    validation: Tensor | None,
    loss: ELBO,
    transform: Callable | None,
    schedule: Callable | None,
) -> dict[str, Any]:
    """What a run must have in common with the one that it goes on with, beside numbers, in plain values."""
    described = repr(loss)
    if type(loss).__repr__ is object.__repr__:
        described = f"{type(loss).__name__}(num_particles={getattr(loss, 'num_particles', 1)})"
    functions = {"transform": transform, "schedule": schedule}
    return {
        "loss": described,
        **{name: _function_name(function) for name, function in functions.items()},
        "train": _fingerprint(train),
        "validation": None if validation is None else _fingerprint(validation),
    }


def _function_name(function: Callable | None) -> str | None:
    function = getattr(function, "func", function)  # of a partial
    return None if function is None else getattr(function, "__qualname__", type(function).__name__)


def _fingerprint(tensor: Tensor | DataLoader) -> str:
    if isinstance(tensor, DataLoader):
        return f"DataLoader with {len(tensor)} batches"
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)} {tensor.dtype} with checksum {zlib.crc32(data.data):08x}"
