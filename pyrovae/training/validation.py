"""The bounds of data held out, measured alike at every epoch."""

import math

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceTMC_ELBO
from torch import Tensor

from pyrovae.objectives.weighted import WeightObjective
from pyrovae.programs.reach import evaluation_mode
from pyrovae.programs.traces import Program
from pyrovae.training.elbo_parts import parts_of

__all__ = ["bounds_otherwise", "elbo_of", "validate"]

_COLUMNS = ("validation_bound", "validation_elbo", "validation_reconstruction", "validation_kl")
_ROWS, _SEED = 500, 20260101


def bounds_otherwise(loss: ELBO) -> bool:
    """Whether an objective is on the importance-weighted bound: what makes that tighter may lower the ELBO."""
    return isinstance(loss, WeightObjective) and loss.num_particles > 1


def elbo_of(loss: ELBO, elbo: float, objective: float) -> float:
    """The ELBO, from its parts, or where latents were summed out and there are none from the loss that did so."""
    return objective if math.isnan(elbo) and isinstance(loss, TraceEnum_ELBO) else elbo


def validate(model: Program, guide: Program, data: Tensor | None, loss: ELBO, batch_size: int) -> dict[str, float]:
    """Columns of the history, per datum, under the same noise at every call; NaN without data.

    batch_size: of training: so many data with the particles of the loss are known to fit

    validation_bound: what to choose an epoch by: the importance-weighted bound, with as many particles, where that is trained
        (`bounds_otherwise`); the loss itself for Pyro's losses that sum out latents; else the ELBO, whatever the objective
        weighs its parts by
    validation_elbo, validation_reconstruction, validation_kl: of the same particles; NaN for parts that latents summed out have
    """
    if data is None:  # and no generator is touched
        return dict.fromkeys(_COLUMNS, math.nan)
    # Drawn one by one, latents that the loss sums out would come from the prior, with nothing against them.
    by_loss = bounds_otherwise(loss) or isinstance(loss, TraceEnum_ELBO | TraceTMC_ELBO)
    objective, rows = (loss, batch_size) if by_loss else (Trace_ELBO(), _ROWS)
    sums = torch.zeros(len(_COLUMNS), dtype=torch.float64)
    with (
        torch.random.fork_rng([data.device] if data.is_cuda else []),
        evaluation_mode(model, guide),
        torch.no_grad(),
        pyro.validation_enabled(False),
    ):
        torch.manual_seed(_SEED)
        for batch in data.split(rows):
            with parts_of(objective) as parts:
                value = objective.loss(model, guide, batch)
                parts.count(len(batch))
            elbo, reconstruction, kl = parts.means()
            bound = -value / parts.num_data if by_loss else elbo
            elbo = elbo_of(loss, elbo, bound)
            sums += len(batch) * torch.tensor([bound, elbo, reconstruction, kl], dtype=torch.float64)
    return dict(zip(_COLUMNS, (sums / len(data)).tolist(), strict=True))
