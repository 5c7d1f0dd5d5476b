"""The bounds of data held out, measured alike at every epoch."""

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyrovae.objectives.weighted import WeightObjective
from pyrovae.programs.modules import evaluation_mode
from pyrovae.programs.traces import Program
from pyrovae.training.parts import parts_of

__all__ = ["validate"]

_ROWS, _SEED = 500, 20260101


def validate(model: Program, guide: Program, data: Tensor | None, loss: ELBO) -> dict[str, float]:
    """Columns of the history, per datum, under the same noise at every call; NaN without data.

    validation_bound: what to choose an epoch by. Of an objective on the importance-weighted bound, that bound with as many
        particles: what makes it tighter may lower the ELBO. Else the ELBO, whatever the objective weighs its parts by
    validation_elbo, validation_reconstruction, validation_kl: of the same particles
    """
    weighted = isinstance(loss, WeightObjective)
    objective = loss if weighted else Trace_ELBO()
    bound = 0.0
    with (
        torch.random.fork_rng([data.device] if data is not None and data.is_cuda else []),
        evaluation_mode(model, guide),
        torch.no_grad(),
        pyro.validation_enabled(False),
        parts_of(objective) as parts,
    ):
        torch.manual_seed(_SEED)
        for batch in () if data is None else data.split(max(1, _ROWS // objective.num_particles)):
            bound -= objective.loss(model, guide, batch)
            parts.count(len(batch))
    elbo, reconstruction, kl = parts.means()
    return {
        "validation_bound": bound / parts.num_data if weighted and parts.num_data else elbo,
        "validation_elbo": elbo,
        "validation_reconstruction": reconstruction,
        "validation_kl": kl,
    }
