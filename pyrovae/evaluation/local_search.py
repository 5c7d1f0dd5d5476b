"""Search for the best parameters of a guide's family for each datum: refinement until more of it gains nothing."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyrovae.common.networks import Inputs
from pyrovae.common.random_numbers import seeded
from pyrovae.compiled.policy import pays_off
from pyrovae.evaluation.log_weights import log_weights
from pyrovae.evaluation.opening import Options
from pyrovae.guides.base import Guide
from pyrovae.guides.program_guide import ProgramGuide
from pyrovae.guides.refinement import Refined
from pyrovae.programs.traces import Program

__all__ = ["Search", "SearchOptions", "given_encoding", "search_for"]

_FIRST_STEPS = 100  # of refinement; doubled until the gain is small
_DRAWS = 8  # per datum and step
_PILOT_PARTICLES = 100  # to measure the gain


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    """Options of `inference_gaps`; its docstring explains them."""

    num_particles: int
    data_batch_size: int
    max_num_steps: int
    tolerance: float
    learning_rate: float

    counts: ClassVar[tuple[str, ...]] = ("max_num_steps", "data_batch_size", "num_particles")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_particles < 2:
            raise ValueError("the gap is unknown with one particle: num_particles must be 2 or more")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, in nats per datum; found {self.tolerance}")


def search_for(model: Program, guide: Guide, num_data: int, options: SearchOptions) -> "Search":
    """Set up the search, with its gradients recorded if that pays."""
    compile = options.compile
    if compile == "auto":
        # At least these steps; the gradient of a draw costs about as much as three weights.
        num_runs, num_rows = min(3 * _FIRST_STEPS, options.max_num_steps), 3 * num_data * _DRAWS
        program = guide.program if isinstance(guide, ProgramGuide) else guide
        compile = pays_off(num_runs, num_rows, repeated=[model], once=[program])
    batch_size = min(options.data_batch_size, num_data)
    refined = Refined(guide, model, num_particles=_DRAWS, learning_rate=options.learning_rate)
    compiled = refined.compiled(batch_size) if compile else refined
    limits = options.tolerance, options.max_num_steps
    return Search(model, guide, refined, compiled, batch_size, *limits, options.plate)


@dataclass(frozen=True)
class Search:
    """Search for the best parameters.

    Attributes:
        model: Pyro program of x
        guide: its guide
        refined: the guide, refined
        compiled: the same, with its gradients recorded for full batches
        batch_size: number of data refined at once
        tolerance: gain below which refinement stops
        max_num_steps: steps after which it stops
        plate: name of the plate that indexes the data, if the caller names it
    """

    model: Program
    guide: Guide
    refined: Refined
    compiled: Refined
    batch_size: int
    tolerance: float
    max_num_steps: int
    plate: str | None

    @torch.no_grad()
    def best(self, data: Inputs, settle: Callable[[int], Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (parameters (N, P), steps (N,), converged (N,)), and report to `settle` how many data are done."""
        x = data.x
        batches = (_rows(data, some) for some in torch.arange(len(x), device=x.device).split(self.batch_size))
        parameters = torch.cat([self.guide.encode(*batch.args, **batch.kwargs) for batch in batches])
        num_steps = torch.zeros(len(x), dtype=torch.long, device=x.device)
        converged = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        open_rows = torch.arange(len(x), device=x.device)
        steps = min(_FIRST_STEPS, self.max_num_steps)
        while len(open_rows) and steps <= self.max_num_steps:
            left = []
            for some in open_rows.split(self.batch_size):
                rows = _rows(data, some)
                refined = self._refine(rows, steps)
                gain = self._gain(rows, parameters[some], refined)
                # Keep the old parameters if the new ones are worse: the result is never below the encoder's own.
                parameters[some] = torch.where((gain > 0).unsqueeze(1), refined, parameters[some])
                num_steps[some] = steps
                # A large loss does not count as convergence: steps that are too large end below where they began.
                settled = gain.abs() < self.tolerance if steps > _FIRST_STEPS else torch.zeros_like(gain).bool()
                converged[some[settled]] = True
                left.append(some[~settled])
                settle(len(some) - len(left[-1]))
            open_rows = torch.cat(left)
            steps *= 2
        settle(len(open_rows))
        return parameters, num_steps, converged

    def _refine(self, data: Inputs, num_steps: int) -> Tensor:
        refined = self.compiled if len(data.x) == self.batch_size else self.refined
        refined.num_steps = num_steps
        return refined.encode(*data.args, **data.kwargs)

    def _gain(self, data: Inputs, before: Tensor, after: Tensor) -> Tensor:
        """Return the ELBO of parameters `after` (N, P) minus that of `before`, (N,), under the same noise."""
        seed = int(torch.randint(2**62, ()))
        elbos = []
        for parameters in (before, after):
            with seeded(seed, before.device):
                alone, encoded = given_encoding(self.model, self.guide)
                sampling: dict[str, Any] = {"num_particles": _PILOT_PARTICLES, "plate": self.plate, **data.kwargs}
                drawn = log_weights(alone, encoded, data.x, parameters, *data.args[1:], **sampling)
            elbos.append(drawn.double().mean(0))
        return (elbos[1] - elbos[0]).nan_to_num(nan=-math.inf)


def given_encoding(model: Program, guide: Guide) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return model and guide as functions of data and parameters, so that both are cut into blocks together."""
    return functools.partial(_model_alone, model), functools.partial(_guide_given, guide)


def _model_alone(model: Program, x: Tensor, parameters: Tensor, *args: Tensor, **kwargs: Tensor) -> Any:
    return model(x, *args, **kwargs)


def _guide_given(guide: Guide, x: Tensor, parameters: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
    return guide.given(parameters)(x, *args, **kwargs)


def _rows(data: Inputs, rows: Tensor) -> Inputs:
    return data.map(lambda part: part[rows])
