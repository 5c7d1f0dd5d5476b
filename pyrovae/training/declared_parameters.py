"""Record what the first step of a run declares and uses.

Pyro trains the parameters that the programs declare (`pyro.param`, `pyro.module`, a `PyroModule`), whether or not the
loss depends on them. The check compares the declared parameters with the tensors that the log densities of the first
step depend on.
"""

import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, TraceEnum_ELBO, TraceTMC_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyrovae.common.arguments import map_tensors
from pyrovae.programs.layout import is_subsampled
from pyrovae.programs.masks import counted
from pyrovae.programs.traces import Program
from pyrovae.training.non_finite_source import leaves_of

__all__ = ["FirstStep"]

_logger = logging.getLogger("pyrovae")
_SHOWN = 4  # names in a message
_OF_MODULES = "$$$"  # separator in the names that Pyro's store gives to a module's parameters


class FirstStep(Messenger):
    """Record what the first step declares and uses.

    modules: those behind the programs, as found before the step
    restored: the values of all parameters are put back from a checkpoint after the step
    """

    def __init__(self, modules: Sequence[nn.Module], restored: bool = False):
        super().__init__()
        self.modules, self.restored = modules, restored
        self.slots = dict(_slots(modules))
        self.stored = set(dict(pyro.get_param_store().named_parameters()).values())
        self.declared: dict[str, Tensor] = {}
        self.used: list[weakref.ref[Tensor]] = []
        self.observed: set[str] = set()
        self.plate_sizes: set[int] = set()  # of the plates around observed sites
        self.data_plates: dict[str, Any] = {}  # those plates, by name
        self.latent_plates: dict[str, set[str]] = {}  # names of the plates around each latent
        self.masked: set[str] = set()  # observed, with every element masked out
        self.observed_first: set[str] = set()  # before the model's latents are replayed: by the guide, if it has any
        self.replayed: set[str] = set()
        self.auxiliary: set[str] = set()
        self.enumerated: dict[str, bool] = {}
        self.masks_latents = False
        self._seen: set[Any] = set()

    def _pyro_post_param(self, message: dict[str, Any]) -> None:
        if not hasattr(message["value"], "unconstrained"):
            raise ValueError(
                f"parameter '{message['name']}' is not in Pyro's store, which pyro.infer.SVI trains from: call "
                f"pyro.settings.set(module_local_params=False) before fit"
            )
        self.declared[message["name"]] = message["value"].unconstrained()

    def _pyro_sample(self, message: dict[str, Any]) -> None:
        if message["value"] is not None and not message["is_observed"]:
            self.replayed.add(message["name"])

    def _pyro_post_sample(self, message: dict[str, Any]) -> None:
        name, infer = message["name"], message["infer"]
        if site_is_subsample(message) or infer.get("_deterministic"):
            return
        if message["is_observed"]:
            seen = counted(message)
            (self.observed if seen is None or seen.any() else self.masked).add(name)
            if not self.replayed:
                self.observed_first.add(name)
            self.plate_sizes.update(frame.size for frame in message["cond_indep_stack"] if frame.size > 0)
            self.data_plates |= {frame.name: frame for frame in message["cond_indep_stack"]}
        else:
            if not infer.get("is_auxiliary"):
                self.latent_plates[name] = {frame.name for frame in message["cond_indep_stack"]}
            self.masks_latents |= counted(message) is not None
            self.enumerated[name] = bool(infer.get("enumerate"))
            if infer.get("is_auxiliary"):
                self.auxiliary.add(name)
        if torch.is_grad_enabled():
            self._use(message["value"])
            with suppress(Exception):  # the loss asks the same, and says what is wrong
                self._use(message["fn"].log_prob(message["value"]))

    def _use(self, value: Any) -> None:
        # Weak, so that leaves made inside a program (of a gradient that it computes) end with the step.
        self.used += map(weakref.ref, leaves_of(value, self._seen))

    def run(
        self, step: Callable[..., tuple[float, Any]], model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> tuple[float, Any]:
        """Run the first step and return its result. Gradients from before fit are dropped; those of the step stay."""
        self.drop_gradients()
        # Data may have gradients of their own.
        map_tensors(lambda tensor: leaves_of(tensor, self._seen), (args, kwargs))
        try:
            with self:
                return step(model, guide, *args, **kwargs)
        finally:
            self._seen.clear()  # which keeps leaves alive

    def drop_gradients(self) -> None:
        for parameter in (*self.slots.values(), *self.declared.values()):
            if parameter is not None:
                parameter.grad = None

    def check(self, loss: ELBO) -> None:
        """Raise ValueError, naming sites or parameters, for programs that the step cannot train.

        Refused are a model that observes nothing; latents marked for enumeration that the loss would draw from the
        prior; parameters that the loss depends on and no program declares; and parameters taken from another model.
        """
        self._check_sites(loss)
        if taken := self._taken():
            names = _some(_name(module, name, self.modules) for module, name in taken)
            self._give_back(taken)
            raise ValueError(
                f"Pyro's store has parameters of another model under the names of this one's, and the programs used those "
                f"instead of their own: {names}. Training one model would change the other. Call pyro.clear_param_store() before "
                f"fit, once the other is no longer used; or give each PyroModule a name, super().__init__(name=...). To start from "
                f"the values in the store, run the model and the guide on a batch before fit"
            )
        if not self.declared:  # the optimizer reports this
            return
        trained = set(self.declared.values())
        if self._left_out(trained):
            gc.collect()
            if left_out := self._left_out(trained):
                raise ValueError(self._not_trained(left_out))
        still = [name for name, parameter in self.declared.items() if parameter.grad is None]
        if len(still) == len(self.declared):
            raise ValueError(
                f"no parameter gets a gradient, so training would change nothing: {_some(still)}. Look for detach(), "
                f"torch.no_grad(), .item() or .numpy() between the parameters and the sample sites"
            )
        if still:
            _logger.warning(
                "%d of %d parameters get no gradient in the first step, and stay as they are until they do: %s",
                *(len(still), len(self.declared), _some(name.replace(_OF_MODULES, ".") for name in still)),
            )

    def drawn_alone(self) -> set[str]:
        """Latents that one program alone has, and that no loss sums out."""
        return {
            name
            for name, marked in self.enumerated.items()
            if not marked and name not in self.replayed and name not in self.auxiliary
        }

    def outside_data(self, num_data: int) -> tuple[list[str], str, bool]:
        """Latents that lie outside the plate of the data, its name, and whether it scales a batch up to all data."""
        plates = {name: frame for name, frame in self.data_plates.items() if frame.size == num_data}
        latents = [name for name, around in self.latent_plates.items() if plates and not around & plates.keys()]
        return latents, next(iter(plates), ""), any(map(is_subsampled, plates.values()))

    def _left_out(self, trained: set[Tensor]) -> list[Tensor]:
        alive = [leaf for reference in self.used if (leaf := reference()) is not None]
        return [leaf for leaf in dict.fromkeys(alive) if leaf not in trained]

    def _check_sites(self, loss: ELBO) -> None:
        if not self.observed:
            raise ValueError(
                f"the model observes nothing (latent sites: {sorted(self.enumerated) or 'none'}), so there is nothing to learn "
                f"from: "
                + (
                    f"all data are masked out at {sorted(self.masked)}; look at the mask"
                    if self.masked
                    else "give pyro.sample its data, obs=; it is missing, or None"
                )
            )
        drawn = [name for name, marked in self.enumerated.items() if marked and name not in self.replayed]
        if drawn and not isinstance(loss, TraceEnum_ELBO | TraceTMC_ELBO):
            raise ValueError(
                f"site '{drawn[0]}' of the model is marked for enumeration, the guide does not sample it, and "
                f"{type(loss).__name__} would draw it from the prior, which gives no bound: use "
                f"loss=TraceEnum_ELBO(max_plate_nesting=...), or an objective of pyrovae.objectives, which sum it out"
            )

    def _not_trained(self, left_out: list[Tensor]) -> str:
        names = {id(slot): _name(*where, self.modules) for where, slot in _slots(self.modules).items()}
        known = [names[number] for number in names if number in {id(leaf) for leaf in left_out}]
        unknown = [f"a tensor of shape {tuple(leaf.shape)}" for leaf in left_out if id(leaf) not in names]
        shown = _some(known + unknown)
        shapes = {leaf.shape for leaf in left_out}
        others = [
            name
            for name, parameter in self.declared.items()
            if parameter.grad is None and parameter in self.stored and parameter.shape in shapes
        ]
        said = f"the loss goes through {len(left_out)} parameters that training would not change: {shown}. "
        if others:
            return said + (
                f"Pyro's store has those of another model under their names ({_some(others)}): call pyro.clear_param_store() "
                f"before fit, or give the modules of each model unique names"
            )
        return said + (
            "No program declares them: call pyro.module(name, module) in the model or the guide, or requires_grad_(False) on "
            "parameters that training should not change"
        )

    def _taken(self) -> list[tuple[nn.Module, str]]:
        """The modules' parameters that were in Pyro's store before, and not theirs.

        If their values are restored, only those that another living module has.
        """
        before = {id(slot) for slot in self.slots.values()}
        return [
            where
            for where, slot in _slots(self.modules).items()
            if slot is not None
            and id(slot) not in before
            and slot in self.stored
            and (not self.restored or self._is_elsewhere(slot))
        ]

    def _is_elsewhere(self, parameter: Tensor) -> bool:
        gc.collect()
        ours = {id(module._parameters) for root in self.modules for module in root.modules()}
        for slots in gc.get_referrers(parameter):
            if isinstance(slots, dict) and id(slots) not in ours:
                for holder in gc.get_referrers(slots):
                    attributes = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
                    if attributes.get("_parameters") is slots:
                        return True
        return False

    def _give_back(self, taken: list[tuple[nn.Module, str]]) -> None:
        """Restore the modules' own parameters; a module that had none yet gets a copy."""
        for module, name in taken:
            own = self.slots.get((module, name))
            there = module._parameters[name]
            assert there is not None
            module._parameters[name] = nn.Parameter(there.detach().clone()) if own is None else own


def _slots(modules: Sequence[nn.Module]) -> dict[tuple[nn.Module, str], nn.Parameter | None]:
    return {
        (module, name): slot
        for root in modules
        for module in root.modules()
        for name, slot in module._parameters.items()
    }


def _name(module: nn.Module, name: str, modules: Sequence[nn.Module]) -> str:
    """Name of a parameter, for example `VAE.decoder.weight`."""
    for root in modules:
        for path, part in root.named_modules():
            if part is module:
                return ".".join(word for word in (type(root).__name__, path, name) if word)
    return name


def _some(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
