"""The bounds of data held out, measured alike at every epoch."""

import math

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyrovae.objectives.weighted import WeightObjective
from pyrovae.programs.modules import evaluation_mode
from pyrovae.programs.traces import Program
from pyrovae.training.parts import parts_of

__all__ = ["bounds_otherwise", "validate"]

_COLUMNS = ("validation_bound", "validation_elbo", "validation_reconstruction", "validation_kl")
_ROWS, _SEED = 500, 20260101


def bounds_otherwise(loss: ELBO) -> bool:
    """Whether an objective is on the importance-weighted bound: what makes that tighter may lower the ELBO."""
    return isinstance(loss, WeightObjective) and loss.num_particles > 1


def validate(model: Program, guide: Program, data: Tensor | None, loss: ELBO, batch_size: int) -> dict[str, float]:
    """Columns of the history, per datum, under the same noise at every call; NaN without data.

    batch_size: of training: so many data with the particles of the loss are known to fit

    validation_bound: what to choose an epoch by: the importance-weighted bound, with as many particles, where that is trained
        (`bounds_otherwise`); else the ELBO, whatever the objective weighs its parts by
    validation_elbo, validation_reconstruction, validation_kl: of the same particles
    """
    if data is None:  # and no generator is touched
        return dict.fromkeys(_COLUMNS, math.nan)
    objective, rows = (loss, batch_size) if bounds_otherwise(loss) else (Trace_ELBO(), _ROWS)
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
            bound = -value / parts.num_data if objective is loss else elbo
            sums += len(batch) * torch.tensor([bound, elbo, reconstruction, kl], dtype=torch.float64)
    return dict(zip(_COLUMNS, (sums / len(data)).tolist(), strict=True))
