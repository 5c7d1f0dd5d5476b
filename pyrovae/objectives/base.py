"""What an objective is: a `pyro.infer.ELBO` whose loss is a tensor function of one set of particles.

Pyro's `Trace_ELBO` asks the host for numbers at every site and knows one joint weight per run. An objective here draws all
particles of a step (under an outer plate where the program allows that), computes its loss from their log densities per
datum, and never looks at a value, so that a training step can be recorded (`pyrovae.compiled.record`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.util import warn_if_nan
from torch import Tensor, nn

from pyrovae.common.arguments import check_count, checks_values, map_tensors
from pyrovae.objectives.runs import Run, draw_runs
from pyrovae.programs.inspection import layout_for_training
from pyrovae.programs.particles import reason_to_loop
from pyrovae.programs.reach import evaluation_mode
from pyrovae.programs.traces import Layout, Program, as_guide, sample_sites

__all__ = ["Objective", "Parts"]

_CAPACITY = 4  # pairs that an objective remembers the layout of


class Parts(NamedTuple):
    """The two parts of the real ELBO, ELBO = reconstruction - kl, whatever the objective weighs them by.

    reconstruction: E_q log p(x|z), summed over the data, averaged over the particles; times the scale of a subsampled plate
    kl: E_q [ log q(z|x) - log p(z) ], likewise
    full_size: of a subsampled plate, which the sums were scaled up to; None without one
    """

    reconstruction: Tensor
    kl: Tensor
    full_size: int | None


class Objective(ELBO, ABC):
    """Contract of an objective: runs in, loss out.

    num_particles: S, drawn per datum and step
    plate: of the data; by default the one plate common to all sites, and without one the program is a single datum
    vectorize_particles: draw particles under an outer plate; "auto" does so where two drawn together are the same two drawn
        apart, which is tried out once per pair

    `last` holds the `Parts` of the last step.

    Raises ValueError for pairs that the objective is not right for, naming the site.
    """

    linear: ClassVar[bool]  # in log densities, so that any scale of a site can be let through
    scores: ClassVar[bool]  # takes draws that are not reparameterised
    cuts: ClassVar[bool] = False  # needs draws that gradients of the guide's density can be told apart at

    def __init__(self, num_particles: int, plate: str | None, vectorize_particles: bool | Literal["auto"]):
        num_particles = check_count("num_particles", num_particles)
        if vectorize_particles not in (True, False, "auto"):
            raise ValueError(f"vectorize_particles must be True, False or 'auto', found {vectorize_particles!r}")
        super().__init__(num_particles=num_particles)
        self.plate = plate
        self.vectorize_particles = vectorize_particles
        self.last: Parts | None = None
        self.modules: list[nn.Module] = []  # whose buffers the loss depends on
        self._looked_at: dict[tuple[Program, Program], tuple[Layout, bool]] = {}

    @abstractmethod
    def estimate(self, runs: Sequence[Run]) -> tuple[Tensor, Parts]:
        """The loss, whose value is minus the bound and whose gradient estimates the bound's, and its parts."""

    def surrogate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> tuple[Tensor, Parts]:
        """(loss to differentiate, parts of the real ELBO); no value is looked at, and no state changes.

        The first call for a pair looks at its programs (some runs, without effect on the noise), so it cannot be recorded.
        """
        layout, vectorised = self._look_at(model, guide, args, kwargs)
        runs = draw_runs(model, as_guide(guide), args, kwargs, layout, self.num_particles, vectorised, self.cuts)
        if not self.scores:
            self._refuse_scores(runs[0])
        return self.estimate(runs)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of one training step, to be differentiated; counts as a step."""
        loss, self.last = self.surrogate(model, guide, *args, **kwargs)
        self.advance()
        return loss

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss of one training step, its gradients added to the parameters' `.grad`; counts as a step."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        value = loss.item()
        warn_if_nan(value, "loss")
        return value

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss, without gradients; no step."""
        value = self.surrogate(model, guide, *args, **kwargs)[0].item()
        warn_if_nan(value, "loss")
        return value

    def advance(self) -> None:
        """Count a training step. `SVI` need not: who differentiates `surrogate` himself does."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold for training to go on as it would have: plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, found {sorted(state)}")

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> tuple:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def _look_at(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> tuple[Layout, bool]:
        key, guide = (model, guide), as_guide(guide)
        if key not in self._looked_at:
            if not checks_values():
                raise RuntimeError("the objective sees this pair for the first time: run one step eagerly, then record")
            while len(self._looked_at) >= _CAPACITY:
                self._looked_at.pop(next(iter(self._looked_at)))
            devices: list[Any] = []
            map_tensors(lambda tensor: devices.append(tensor.device), (args, kwargs))
            with evaluation_mode(model, guide) as device:
                cuda = {device for device in (device, *devices) if device is not None and device.type == "cuda"}
                with torch.random.fork_rng(list(cuda)):
                    layout = layout_for_training(model, guide, args, kwargs, self.plate, scales=self.linear)
                    vectorised = self._vectorises(model, guide, args, kwargs, layout)
            self._looked_at[key] = layout, vectorised
        return self._looked_at[key]

    def _vectorises(self, model: Program, guide: Program, args: tuple, kwargs: dict, layout: Layout) -> bool:
        if self.num_particles == 1 or not self.vectorize_particles:
            return False
        reason = reason_to_loop(model, guide, args, kwargs, layout)
        if reason and self.vectorize_particles is True:
            raise ValueError(
                f"the program cannot draw its particles under an outer plate ({reason}); vectorize_particles='auto' "
                f"draws them one by one"
            )
        return not reason

    def _refuse_scores(self, run: Run) -> None:
        for name, site in sample_sites(run.guide_trace):
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"{type(self).__name__} differentiates through the guide's draws, and site '{name}' "
                    f"({type(getattr(site['fn'], 'base_dist', site['fn'])).__name__}) is not reparameterised: take VIMCO "
                    f"or MonteCarloKL, which have score-function gradients, or a guide with rsample"
                )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_particles={self.num_particles})"
