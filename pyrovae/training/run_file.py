"""The checkpoint file of a run: saving its state during training and finding it to resume."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from pyrovae.programs.reach import modules_behind
from pyrovae.programs.traces import Program
from pyrovae.training.checkpoint_file import earlier, path_of, read, target_of, write
from pyrovae.training.description import describe_module, difference
from pyrovae.training.locks import locked
from pyrovae.training.saved_pair import described_in, pair_content, versions
from pyrovae.training.state import TrainingState
from pyrovae.training.values import describe_program, same_text

__all__ = ["RunFile", "run_file"]


class RunFile:
    """The checkpoint file of a run.

    Args:
        path: the file.
        every: seconds between two saves at least, except when told to save.
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
        """Raise ValueError if only the file before it is there, of this run: one that begins anew would replace it."""
        before = earlier(self.path)
        try:
            is_lost = not self.path.exists() and before.exists() and self._state_in(before) is not None
        except ValueError:  # of another run, or damaged: nothing to go on with
            return
        if is_lost:
            raise ValueError(
                f"{self.path} is not there, and {before} is, the state before it: move it to {self.path} to go on from that, "
                f"or move it away to begin anew"
            )

    def _state_in(self, path: Path) -> dict[str, Any]:
        content = read(path)
        if "training" not in content:
            raise ValueError(f"{path} holds a model and a guide, but no run to resume: give fit another path")
        for name, there in content["training"]["settings"].items():
            here = self.settings.get(name)
            known = name in self.settings or "." not in name  # versions differ in what they record of a loss or loader
            if known and here != there and not _same(there, here):
                raise ValueError(
                    f"{path} is of a run with {name}={there}, and this one has {name}={here}: call fit as before, or "
                    f"give it another path"
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
        """Write the captured state of now, and keep the previous file."""
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
    """Lock the file of a run inside the context; give None without a path.

    Raises:
        ValueError: if the file exists already and `resume` is False.
        RuntimeError: if another run is using the file.
    """
    if path is None:
        yield None
        return
    path = path_of(path)
    with locked(path):
        if path.exists() and not resume:
            raise ValueError(
                f"{path} is there already: resume=True goes on with its run, another checkpoint= starts a new one"
            )
        target = target_of(path)
        for kind in ("tmp", "link"):
            for leftover in target.parent.glob(f".{target.name}.*.{kind}"):  # left by runs killed while writing
                leftover.unlink(missing_ok=True)
        file = RunFile(path, every, settings, model, guide)
        if resume:
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
