"""The state of a training run: what training changes, its progress, and the random generators."""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyrovae.common.arguments import map_tensors
from pyrovae.training.losses import bound_name
from pyrovae.training.optimization import OneAdam

__all__ = ["TrainingState"]

_STORE = "pyro.param "  # prefix of parameters in Pyro's store


class TrainingState:
    """The state of a training run between two epochs.

    `capture()` copies the state into plain values, and `restore()` restores such a copy. The state is made of
    parameters (those of the modules, and those in Pyro's store that the optimizer has), buffers, the optimizer's
    moments, the objective's own state, the state of every random generator (torch's on all devices, NumPy's, Python's),
    the history, and the tensors of the best epoch.

    Attributes:
        history: rows of the finished epochs.
        best_epoch: epoch with the best validation bound; 0 if there is none.
        full_size: size of a subsampled plate, as found in earlier epochs.
    """

    def __init__(self, loss: ELBO, optimizer: OneAdam, modules: Sequence[nn.Module], device: torch.device):
        self.loss, self.optimizer, self.device = loss, optimizer, device
        self.modules = nn.ModuleList(modules)
        self.history: list[dict[str, float]] = []
        self.full_size: int | None = None
        self.best_epoch = 0
        self._best: dict[str, Tensor] = {}

    @property
    def seconds(self) -> float:
        """Wall time of the finished epochs."""
        return self.history[-1]["seconds"] if self.history else 0.0

    @property
    def num_skipped_steps(self) -> int:
        """Skipped steps of the finished epochs."""
        return int(sum(row["skipped_steps"] for row in self.history))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that training changes: parameters and buffers of the modules, then parameters in Pyro's store."""
        found = dict(chain(self.modules.named_parameters(), self.modules.named_buffers()))
        known = {id(tensor) for tensor in found.values()}
        return found | {_STORE + str(_store_name(p)): p for p in self.optimizer.parameters if id(p) not in known}

    def finish_epoch(self, row: dict[str, float]) -> None:
        """Record the row of an epoch, and its state if it is the best so far."""
        best = self.history[self.best_epoch - 1]["validation_bound"] if self.best_epoch else -math.inf
        self.history.append(row)
        if row["validation_bound"] > best:
            self.best_epoch = len(self.history)
            self._best = _copied(self.tensors())

    def take_best(self) -> None:
        """Restore the tensors of the best epoch, if validation chose one."""
        _put(self._best, self.tensors())

    def best_of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A module's state dict (made with keep_vars=True) with the tensors that `take_best` would restore."""
        best = {id(tensor): self._best[name] for name, tensor in self.tensors().items() if name in self._best}
        return {name: best.get(id(tensor), tensor.detach()) for name, tensor in state.items()}

    def capture(self) -> dict[str, Any]:
        """Copy the state into plain values, which later training does not change."""
        names = {id(tensor): name for name, tensor in self.tensors().items()}
        adam = self.optimizer.adam
        return {
            "tensors": _copied(self.tensors()),
            "optimized": [names[id(parameter)] for parameter in self.optimizer.parameters],
            "adam": None if adam is None else _copied_tree(adam.state_dict()),
            "loss": _copied_tree(self.loss.state_dict()) if hasattr(self.loss, "state_dict") else {},
            "random": _random_state(self.device),
            "history": [dict(row) for row in self.history],
            "full_size": self.full_size,
            "best": {"epoch": self.best_epoch, "tensors": self._best},
        }

    def restore(self, captured: dict[str, Any]) -> None:
        """Restore what `capture` returned, here or in another process.

        Raises:
            ValueError: if it is the state of other modules; nothing is changed.
        """
        there = captured["tensors"]
        here = self.tensors() | _of_store(there)
        for name in sorted(here.keys() | there.keys()):
            if name.startswith(_STORE) and name not in there:
                continue  # created after that state
            shapes = [tuple(tensors[name].shape) if name in tensors else "none" for tensors in (there, here)]
            kinds = [tensors[name].dtype if name in tensors else "none" for tensors in (there, here)]
            if shapes[0] != shapes[1] or kinds[0] != kinds[1]:
                raise ValueError(
                    f"it is the state of another model and guide: '{name}' is {shapes[0]}, {kinds[0]} there and "
                    f"{shapes[1]}, {kinds[1]} here"
                )
        best_epoch, best = captured["best"]["epoch"], captured["best"]["tensors"]
        if (
            best_epoch
            and bound_name(self.loss) == "importance-weighted bound"
            and "validation_bound" not in captured["history"][0]
        ):
            raise ValueError(
                f"it is the state of an earlier version, in which {type(self.loss).__name__} chose the best epoch by the ELBO, "
                f"not by its own bound: start a new run, with another checkpoint"
            )
        _put(there, here)
        self.optimizer.restore([here[name] for name in captured["optimized"]], _copied_tree(captured["adam"]))
        if hasattr(self.loss, "load_state_dict"):
            self.loss.load_state_dict(captured["loss"])
        # Older checkpoints lack these columns.
        self.history = [
            row | {"validation_bound": row["validation_elbo"], "skipped_steps": 0} | row for row in captured["history"]
        ]
        self.optimizer.guard.restart(self.num_skipped_steps)
        self.full_size = captured["full_size"]
        self.best_epoch = best_epoch
        self._best = {name: tensor.to(here[name].device) for name, tensor in best.items()}
        _set_random_state(captured["random"], self.device)


@torch.no_grad()
def _put(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _copied_tree(tree: Any) -> Any:
    return map_tensors(lambda tensor: tensor.detach().clone(), tree)


def _store_name(parameter: Tensor) -> str | None:
    return pyro.get_param_store().param_name(parameter)


def _of_store(names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the named parameters that exist in Pyro's store."""
    store = pyro.get_param_store()
    wanted = {name: name.removeprefix(_STORE) for name in names if name.startswith(_STORE)}
    return {name: store[key].unconstrained() for name, key in wanted.items() if key in store}


def _random_state(device: torch.device) -> dict[str, Any]:
    state = pyro.util.get_rng_state()
    algorithm, keys, *rest = state["numpy"]
    return {
        "torch": state["torch"],
        "python": state["random"],
        "numpy": (algorithm, torch.as_tensor(keys.astype("int64")), *rest),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    algorithm, keys, *rest = state["numpy"]
    numpy_state = (algorithm, keys.numpy().astype("uint32"), *rest)
    pyro.util.set_rng_state({"torch": state["torch"], "random": state["python"], "numpy": numpy_state})
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
