"""Reconstruction and KL, the two parts of the ELBO, collected from what the loss computes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyrovae.programs.traces import sample_sites

__all__ = ["ElboParts", "parts_of"]


class ElboParts:
    """Sums of log p(x|z) and of log q(z|x) - log p(z) over the traces that a loss makes.

    Added values belong to the current step and enter the sums with `count`.
    """

    def __init__(self, full_size: int | None) -> None:
        self.reconstruction: Any = math.nan
        self.kl: Any = math.nan
        self.full_size = full_size  # size of a subsampled plate, to which its sites are scaled
        self.num_data: Any = 0
        self._of_step: list[tuple[Any, Any]] = []

    def add(self, reconstruction: Tensor | float, kl: Tensor | float) -> None:
        self._of_step.append((reconstruction, kl))

    def add_parts(self, parts: Any) -> None:
        """Add the parts that an objective of `pyrovae.objectives` reports for a step (`pyrovae.objectives.Parts`)."""
        self.full_size = parts.full_size or self.full_size
        self.add(parts.reconstruction, parts.kl)

    def add_traces(self, model_trace: poutine.Trace, guide_trace: poutine.Trace, num_particles: int) -> None:
        reconstruction: Tensor | float = 0.0
        kl: Tensor | float = 0.0
        for trace in (model_trace, guide_trace):
            # Enumerated in parallel, densities are tables; in sequence, each trace has another weight. Neither has
            # parts.
            if any(site["infer"].keys() & {"_enumerate_dim", "_enum_total"} for _, site in sample_sites(trace)):
                reconstruction = kl = torch.tensor(math.nan)
        for _, site in sample_sites(model_trace):
            if site["is_observed"]:
                reconstruction = reconstruction + site["log_prob_sum"].detach()
            else:
                kl = kl - site["log_prob_sum"].detach()
            for frame in site["cond_indep_stack"]:
                if frame.full_size not in (None, frame.size):
                    self.full_size = frame.full_size
        for _, site in sample_sites(guide_trace):
            kl = kl + site["log_prob_sum"].detach()
        self.add(reconstruction / num_particles, kl / num_particles)

    def count(self, batch_size: int, was_made: Tensor | None = None) -> None:
        """Count the last step, unless it was skipped."""
        size: Any = self.full_size or batch_size
        self.num_data = self.num_data + (size if was_made is None else was_made * size)
        for reconstruction, kl in self._of_step:
            started = self.reconstruction is not math.nan
            if was_made is not None:
                reconstruction, kl = (
                    torch.where(was_made, torch.as_tensor(part, device=was_made.device), 0.0)
                    for part in (reconstruction, kl)
                )
            self.reconstruction = (self.reconstruction if started else 0.0) + reconstruction
            self.kl = (self.kl if started else 0.0) + kl
        self.forget()

    def forget(self) -> None:
        """Drop what was added since the last count, because it does not belong to a step."""
        self._of_step.clear()

    def means(self) -> tuple[float, float, float]:
        """(elbo, reconstruction, kl) per datum; NaN without data."""
        if not self.num_data:
            return math.nan, math.nan, math.nan
        reconstruction, kl = float(self.reconstruction) / self.num_data, float(self.kl) / self.num_data
        return reconstruction - kl, reconstruction, kl


@contextmanager
def parts_of(loss: ELBO, full_size: int | None = None) -> Iterator[ElboParts]:
    """Collect both parts of the ELBO inside, from our objectives' `surrogate` or from the traces of Pyro's losses."""
    parts = ElboParts(full_size)
    name = "surrogate" if hasattr(loss, "surrogate") else "_get_trace"
    original = getattr(loss, name, None)
    if original is None:
        yield parts
        return

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if name == "surrogate":
            parts.add_parts(result[1])
        else:
            model_trace, guide_trace = result
            parts.add_traces(model_trace, guide_trace, loss.num_particles)
        return result

    setattr(loss, name, recording)
    try:
        yield parts
    finally:
        delattr(loss, name)
