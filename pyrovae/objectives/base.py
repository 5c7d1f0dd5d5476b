"""Base class of objectives: a `pyro.infer.ELBO` whose loss is a tensor function of one set of particles.

Pyro's `Trace_ELBO` reads numbers back from the device at every site and has one joint weight per run. An objective here
draws all particles of a step (under an outer plate if the program supports it), computes its loss from their log
densities per datum, and never reads a value, so that a training step can be recorded (`pyrovae.compiled.record`).
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
from pyrovae.programs.enumeration import SummedOut
from pyrovae.programs.inspection import layout_for_training
from pyrovae.programs.particles import reason_to_loop
from pyrovae.programs.reach import evaluation_mode
from pyrovae.programs.reruns import refuse_other_tables_in_training
from pyrovae.programs.traces import Layout, Program, as_guide, sample_sites

__all__ = ["Objective", "Parts"]

_CAPACITY = 4  # number of pairs whose layout an objective caches


class Parts(NamedTuple):
    """The two parts of the unweighted ELBO, ELBO = reconstruction - kl, whatever weights the objective uses.

    Both are NaN if sites are summed out: log p(x, z) is then a log of a sum and has no parts.

    Attributes:
        reconstruction: E_q log p(x|z), summed over the data, averaged over the particles, times the scale of a
            subsampled plate
        kl: E_q [ log q(z|x) - log p(z) ], summed, averaged and scaled likewise
        full_size: size of the data if the plate is subsampled, to which the sums were scaled up; None otherwise
    """

    reconstruction: Tensor
    kl: Tensor
    full_size: int | None


class Objective(ELBO, ABC):
    """Contract of an objective: it turns runs of model and guide into a loss.

    `last` holds the `Parts` of the last step. Sites that the guide marks for enumeration, and those of the model that
    are marked and that the guide does not sample, are summed out exactly in both densities; `sums_out` says whether the
    last pair has such sites. The guide still draws the sites that it marks, with score-function gradients.

    Args:
        num_particles: S, drawn per datum and step
        plate: name of the plate that indexes the data. None: the one plate common to all sites; without one, the
            program is a single datum
        vectorize_particles: draw particles under an outer plate; "auto" does so if two particles drawn together equal
            two drawn separately, which is checked once per pair

    Raises:
        ValueError: naming the site, for pairs that the objective is not valid for.
    """

    is_linear: ClassVar[bool]  # in log densities, so that any scale of a site is valid
    has_score_terms: ClassVar[bool]  # accepts draws that are not reparameterised
    detaches_draws: ClassVar[bool] = False  # to separate the gradients of the guide's density

    def __init__(self, num_particles: int, plate: str | None, vectorize_particles: bool | Literal["auto"]):
        num_particles = check_count("num_particles", num_particles)
        if vectorize_particles not in (True, False, "auto"):
            raise ValueError(f"vectorize_particles must be True, False or 'auto', found {vectorize_particles!r}")
        super().__init__(num_particles=num_particles)
        self.plate = plate
        self.vectorize_particles = vectorize_particles
        self.last: Parts | None = None
        self.modules: list[nn.Module] = []  # modules whose buffers the loss depends on
        self.sums_out = False
        self._looked_at: dict[tuple[Program, Program], tuple[Layout, bool, Program, Program]] = {}

    @property
    def bound_name(self) -> str:
        """Name of the bound that is trained, if all weights of the KL are 1. `fit` validates by it."""
        return "ELBO"

    @abstractmethod
    def estimate(self, runs: Sequence[Run]) -> tuple[Tensor, Parts]:
        """Compute the loss, whose value is minus the bound and whose gradient is minus an estimate of the bound's.

        Args:
            runs: runs that hold S particles between them

        Returns:
            (loss, parts of the unweighted ELBO).
        """

    def surrogate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> tuple[Tensor, Parts]:
        """Return (loss to differentiate, parts of the unweighted ELBO), without reading a value or changing state.

        The first call for a pair inspects its programs (a few runs that do not affect the random state), so it cannot
        be recorded.
        """
        layout, vectorised, model, guide = self._look_at(model, guide, args, kwargs)
        self.sums_out = isinstance(model, SummedOut) or isinstance(guide, SummedOut)
        runs = draw_runs(model, guide, args, kwargs, layout, self.num_particles, vectorised, self.detaches_draws)
        if not self.has_score_terms:
            self._refuse_scores(runs[0])
        return self.estimate(runs)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of one training step as a differentiable tensor; counts as a step."""
        loss, self.last = self.surrogate(model, guide, *args, **kwargs)
        self.advance()
        return loss

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss of one training step and add its gradients to the parameters' `.grad`; counts as a step."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        value = loss.item()
        warn_if_nan(value, "loss")
        return value

    @torch.no_grad()
    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss without gradients; does not count as a step."""
        value = self.surrogate(model, guide, *args, **kwargs)[0].item()
        warn_if_nan(value, "loss")
        return value

    def advance(self) -> None:
        """Count a training step. `SVI` does so by itself; call this after differentiating `surrogate` yourself."""

    def state_dict(self) -> dict[str, Any]:
        """Return the plain values that a checkpoint must hold to continue training exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a `state_dict`.

        Args:
            state: result of `state_dict`

        Raises:
            ValueError: if the state is not that of such an objective.
        """
        if state:
            raise ValueError(f"{type(self).__name__} has no state, found {sorted(state)}")

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> tuple:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def refuse_sums(self, names: Sequence[str]) -> None:
        """Raise ValueError if the objective is not defined with sites summed out.

        Args:
            names: the sites
        """

    def _look_at(
        self, model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> tuple[Layout, bool, Program, Program]:
        key, guide = (model, guide), as_guide(guide)
        if key not in self._looked_at:
            if not checks_values():
                raise RuntimeError(
                    "the objective sees this pair for the first time: run one step eagerly before recording"
                )
            while len(self._looked_at) >= _CAPACITY:
                self._looked_at.pop(next(iter(self._looked_at)))
            devices: list[Any] = []
            map_tensors(lambda tensor: devices.append(tensor.device), (args, kwargs))
            with evaluation_mode(model, guide) as device:
                cuda = {device for device in (device, *devices) if device is not None and device.type == "cuda"}
                with torch.random.fork_rng(list(cuda)):
                    model, guide, layout = layout_for_training(
                        model, guide, args, kwargs, self.plate, scales=self.is_linear
                    )
                    sums = [program.names for program in (model, guide) if isinstance(program, SummedOut)]
                    if sums:
                        self.refuse_sums(sorted(frozenset().union(*sums)))
                    vectorised = self._vectorises(model, guide, args, kwargs, layout)
            if isinstance(guide, SummedOut):
                with torch.random.fork_rng(list(cuda)):
                    refuse_other_tables_in_training(guide, layout, args, kwargs)
            self._looked_at[key] = layout, vectorised, model, guide
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
        for name, site in sample_sites(run.drawn_trace):
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"{type(self).__name__} differentiates through the guide's draws, and site '{name}' "
                    f"({type(getattr(site['fn'], 'base_dist', site['fn'])).__name__}) is not reparameterised: take VIMCO "
                    f"or MonteCarloKL, which have score-function gradients, or a guide with rsample"
                )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_particles={self.num_particles})"
