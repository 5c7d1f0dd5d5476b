"""The ELBO of data held out, measured alike at every epoch."""

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyrovae.programs.modules import evaluation_mode
from pyrovae.programs.traces import Program
from pyrovae.training.parts import parts_of

__all__ = ["validate"]

_ROWS, _SEED = 500, 20260101


def validate(model: Program, guide: Program, data: Tensor) -> tuple[float, float, float]:
    """(elbo, reconstruction, kl) per datum, one particle, under the same noise at every call."""
    elbo = Trace_ELBO()
    devices = [data.device] if data.is_cuda else []
    with (
        torch.random.fork_rng(devices),
        evaluation_mode(model, guide),
        torch.no_grad(),
        pyro.validation_enabled(False),
        parts_of(elbo) as parts,
    ):
        torch.manual_seed(_SEED)
        for batch in data.split(_ROWS):
            elbo.loss(model, guide, batch)
            parts.count(len(batch))
    return parts.means()
