"""Bounds on validation data, measured with the same noise at every epoch."""

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
    """Whether an objective trains the importance-weighted bound, which may improve while the ELBO falls."""
    return isinstance(loss, WeightObjective) and loss.num_particles > 1


def elbo_of(loss: ELBO, elbo: float, objective: float) -> float:
    """The ELBO from its parts; from the loss if it sums latents out and so has no parts."""
    return objective if math.isnan(elbo) and isinstance(loss, TraceEnum_ELBO) else elbo


def validate(model: Program, guide: Program, data: Tensor | None, loss: ELBO, batch_size: int) -> dict[str, float]:
    """Measure the bounds on validation data, with the same noise at every call.

    Args:
        model, guide: the programs.
        data: validation data, or None.
        loss: loss of the training.
        batch_size: batch size of the training, because that many data are known to fit with the particles of the loss.

    Returns:
        Columns of the history, in nats per datum; NaN without data. validation_bound chooses the best epoch. It is the
        importance-weighted bound, with as many particles, if that is trained (`bounds_otherwise`); the loss itself for
        Pyro's losses that sum latents out; otherwise the ELBO, however the objective weighs its parts. validation_elbo,
        validation_reconstruction and validation_kl use the same particles; the last two are NaN if latents are summed
        out.
    """
    if data is None:  # use no random numbers
        return dict.fromkeys(_COLUMNS, math.nan)
    # Latents that the loss sums out are not in the guide: drawing them would take them from the prior.
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
