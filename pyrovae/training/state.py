"""The state of a training run: what training changes, its progress, and the random generators."""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyrovae.common import distributed
from pyrovae.common.arguments import map_tensors
from pyrovae.training.generators import Generator, set_state, state_of, with_arrays, with_tensors
from pyrovae.training.losses import bound_name
from pyrovae.training.optimization import OneOptimizer

__all__ = ["TrainingState", "random_state", "set_random_state"]

_STORE = "pyro.param "  # prefix of parameters in Pyro's store


class TrainingState:
    """The state of a training run between two epochs.

    `capture()` copies the state into plain values, and `restore()` restores such a copy. The state is made of
    parameters (those of the modules, and those in Pyro's store that the optimizer has), their moving average, buffers, the
    optimizer's state, the objective's own state, the state of every random generator (torch's on all devices, NumPy's,
    Python's, those of a loader; of every process), the history, and the tensors of the best epoch. If there are several
    processes, all of them capture and restore together.

    Attributes:
        history: rows of the finished epochs.
        best_epoch: epoch with the best validation bound; 0 if there is none.
        stopped_of: epochs of the run that a callback stopped; 0 if none did.
        num_steps: steps of the optimizer, those that were skipped included.
        full_size: size of a subsampled plate, as found in earlier epochs.
    """

    def __init__(
        self,
        loss: ELBO,
        optimizer: OneOptimizer,
        modules: Sequence[nn.Module],
        device: torch.device,
        generators: Sequence[Generator] = (),
    ):
        self.loss, self.optimizer, self.device, self.generators = loss, optimizer, device, generators
        self.modules = nn.ModuleList(modules)
        self.history: list[dict[str, float]] = []
        self.num_steps = 0
        self.full_size: int | None = None
        self.best_epoch = self.stopped_of = 0
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

    def is_finished(self, epochs: int, patience: int | None) -> bool:
        """Whether the run has reached its number of epochs, was stopped by its callback, or ran out of patience."""
        done = len(self.history)
        ran_out = patience is not None and done - self.best_epoch >= patience
        return done >= epochs or self.stopped_of >= epochs or ran_out

    def averaged(self) -> AbstractContextManager[None]:
        """Give the parameters their moving averages inside, if there are any."""
        average = self.optimizer.average
        return nullcontext() if average is None else average.applied()

    def finish_epoch(self, row: dict[str, float]) -> None:
        """Record the row of an epoch, and its state if it is the best so far."""
        best = self.history[self.best_epoch - 1]["validation_bound"] if self.best_epoch else -math.inf
        self.history.append(row)
        if row["validation_bound"] > best:
            self.best_epoch = len(self.history)
            self._best = _copied(self.tensors()) | _copied(self._averages())

    def take_best(self) -> None:
        """Restore the tensors of the best epoch, if validation chose one; otherwise take the averages, if there are any."""
        _put(self._kept(), self.tensors())

    def _kept(self) -> dict[str, Tensor]:
        return self._best if self.best_epoch else self._averages()

    def _averages(self) -> dict[str, Tensor]:
        average = self.optimizer.average
        if average is None:
            return {}
        return {name: average.values[tensor] for name, tensor in self.tensors().items() if tensor in average.values}

    def best_of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A module's state dict (made with keep_vars=True) with the tensors that `take_best` would restore."""
        kept = self._kept()
        best = {id(tensor): kept[name] for name, tensor in self.tensors().items() if name in kept}
        return {name: best.get(id(tensor), tensor.detach()) for name, tensor in state.items()}

    def capture(self) -> dict[str, Any]:
        """Copy the state into plain values, which later training does not change."""
        names = {id(tensor): name for name, tensor in self.tensors().items()}
        inner, average = self.optimizer.inner, self.optimizer.average
        return {
            "tensors": _copied(self.tensors()),
            "optimized": [names[id(parameter)] for parameter in self.optimizer.parameters],
            "optimizer": None if inner is None else _copied_tree(inner.state_dict()),
            "has_moved": self.optimizer.has_moved,
            "average": {}
            if average is None
            else {"steps": float(average.num_steps), "tensors": _copied(self._averages())},
            "loss": _copied_tree(self.loss.state_dict()) if hasattr(self.loss, "state_dict") else {},
            "random": distributed.gather_soon(random_state(self.device, self.generators)),
            "history": [dict(row) for row in self.history],
            "num_steps": self.num_steps,
            "full_size": self.full_size,
            "stopped_of": self.stopped_of,
            "best": {"epoch": self.best_epoch, "tensors": self._best},
        }

    def restore(self, captured: dict[str, Any]) -> None:
        """Restore what `capture` returned, here or in another process.

        Raises:
            ValueError: if it is the state of other modules or of another number of processes; nothing is changed.
        """
        # Earlier versions saved the generators of one process, without a list.
        random = [captured["random"]] if isinstance(captured["random"], dict) else captured["random"]
        if len(random) != distributed.num_ranks():
            raise ValueError(
                f"it is the state of {len(random)} process(es), each with its own random numbers, and this run has "
                f"{distributed.num_ranks()}: resume with as many"
            )
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
        if "optimizer" not in captured and not self.optimizer.is_default:
            raise ValueError(
                "it is the state of an earlier version, which trained with a fused Adam only, without accumulate= and average=: "
                "start a new run, with another checkpoint"
            )
        _put(there, here)
        self._restore_optimizer([here[name] for name in captured["optimized"]], captured, here)
        if hasattr(self.loss, "load_state_dict"):
            self.loss.load_state_dict(captured["loss"])
        # Older checkpoints lack these columns.
        self.history = [
            row | {"validation_bound": row["validation_elbo"], "skipped_steps": 0} | row for row in captured["history"]
        ]
        self.optimizer.guard.restart(self.num_skipped_steps)
        self.num_steps = captured.get("num_steps", 0)
        self.full_size = captured["full_size"]
        self.best_epoch, self.stopped_of = best_epoch, captured.get("stopped_of", 0)
        self._best = {name: tensor.to(here[name].device) for name, tensor in best.items()}
        set_random_state(random[distributed.rank()], self.device, self.generators)

    def _restore_optimizer(self, parameters: list[Tensor], captured: dict[str, Any], here: dict[str, Tensor]) -> None:
        # Files of earlier versions name Adam, which was the only optimizer.
        state = _copied_tree(captured["optimizer"] if "optimizer" in captured else captured["adam"])
        has_moved = captured.get("has_moved", bool(state and state["state"]))
        self.optimizer.restore(parameters, state, has_moved)
        if self.optimizer.average is not None and (kept := captured.get("average")):
            self.optimizer.average.num_steps.fill_(kept["steps"])
            self.optimizer.average.join(here[name] for name in kept["tensors"])
            for name, tensor in kept["tensors"].items():
                self.optimizer.average.values[here[name]].copy_(tensor)


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


def random_state(device: torch.device, generators: Sequence[Generator] = ()) -> dict[str, Any]:
    state = pyro.util.get_rng_state()
    return {
        "torch": state["torch"],
        "python": state["random"],
        "numpy": with_tensors(state["numpy"]),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "loader": [state_of(generator) for generator in generators],
    }


def set_random_state(state: dict[str, Any], device: torch.device, generators: Sequence[Generator] = ()) -> None:
    pyro.util.set_rng_state(
        {"torch": state["torch"], "random": state["python"], "numpy": with_arrays(tuple(state["numpy"]))}
    )
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    # Files of earlier versions lack these.
    for generator, its_state in zip(generators, state.get("loader", ()), strict=False):
        set_state(generator, its_state)
