"""What `fit` needs of a loss: its value, the two parts of the ELBO, the bound that it trains, a form to record."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from types import new_class
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyrovae.objectives.base import Objective, Parts
from pyrovae.programs.layout import is_weighted, plate_scale, scaled_up_to
from pyrovae.programs.masks import align_masks
from pyrovae.programs.traces import Program, sample_sites

__all__ = [
    "EpochSums",
    "ReportingLoss",
    "bound_name",
    "check_loss",
    "default_loss",
    "differentiable",
    "elbo_of",
    "has_surrogate",
    "pyro_checks",
    "sums_out",
    "surrogate",
]

_JIT = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


def default_loss(model: Program) -> ELBO:
    """The loss that a model trains on if none is given: what the model says, otherwise `Trace_ELBO()`."""
    loss: ELBO = getattr(model, "default_loss", Trace_ELBO)()
    return loss


def check_loss(loss: ELBO) -> ELBO:
    """Return the loss; raise TypeError if it is no loss or cannot train modules."""
    if not isinstance(loss, ELBO):
        raise TypeError(f"loss must be a pyro.infer.ELBO, Trace_ELBO() for instance; found {loss!r}")
    if isinstance(loss, _JIT):
        name = type(loss).__name__
        raise TypeError(
            f"loss={name}() reads parameters only from Pyro's global store, which does not hold those of modules: take "
            f"{name.removeprefix('Jit')}(), with compile=True to record and compile the step"
        )
    if isinstance(loss, ReweightedWakeSleep | TraceTailAdaptive_ELBO):
        gives = "two losses" if isinstance(loss, ReweightedWakeSleep) else "gradients without a loss"
        raise TypeError(
            f"loss={type(loss).__name__}() gives {gives}, but fit needs one loss, to report it and to stop if it is not finite: take "
            f"RenyiELBO or an objective of pyrovae.objectives, or train with pyro.infer.SVI"
        )
    return loss


def pyro_checks(are_made: bool) -> AbstractContextManager[None]:
    """Turn Pyro's checks of distributions and traces on or off inside.

    They take a fifth of the time of a step, so training makes them in its first step only. Pyro has no switch but the
    global one, which this restores.
    """
    context: AbstractContextManager[None] = pyro.validation_enabled(are_made)
    return context


def bound_name(loss: ELBO) -> str:
    """The bound that validation measures: the one that is trained, with KL weights of 1."""
    if isinstance(loss, Objective):
        return loss.bound_name
    return "tensor Monte Carlo bound" if isinstance(loss, TraceTMC_ELBO) else "ELBO"


def elbo_of(loss: ELBO, elbo: float, objective: float) -> float:
    """The ELBO from its parts; from the loss if it sums latents out and so has no parts."""
    return objective if math.isnan(elbo) and sums_out(loss) and bound_name(loss) == "ELBO" else elbo


def sums_out(loss: ELBO) -> bool:
    """Whether the loss sums latents out; an objective knows after its first step."""
    return loss.sums_out if isinstance(loss, Objective) else isinstance(loss, TraceEnum_ELBO)


class ReportingLoss:
    """A loss whose calls return the parts of the ELBO beside its value.

    The parts come from what the loss computes anyway: the traces that Pyro's losses make by `_get_trace`, the method
    that each of them defines, and the parts that an `Objective` returns from `surrogate`. A subclass of the loss's own
    class overrides this method. Its instance shares the state of the loss, which itself stays as it is.
    """

    def __init__(self, loss: ELBO):
        self._parts: list[Parts] = []
        self._loss = _noting(loss, self._parts.append)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> tuple[float, list[Parts]]:
        """Return (loss, parts of each trace), and add the gradients, as `ELBO.loss_and_grads` does."""
        return self._run(self._loss.loss_and_grads, model, guide, *args, **kwargs)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> tuple[float, list[Parts]]:
        """Return (loss, parts of each trace) without gradients."""
        return self._run(self._loss.loss, model, guide, *args, **kwargs)

    def _run(self, method: Callable[..., float], *args: Any, **kwargs: Any) -> tuple[float, list[Parts]]:
        self._parts.clear()
        value = method(*args, **kwargs)
        return value, list(self._parts)


def _noting(loss: ELBO, note: Callable[[Parts], None]) -> ELBO:
    kind: Any = type(loss)
    is_objective = isinstance(loss, Objective)
    name = "surrogate" if is_objective else "_get_trace"

    def method(self: ELBO, *args: Any, **kwargs: Any) -> Any:
        result: Any = getattr(kind, name)(self, *args, **kwargs)
        note(result[1] if is_objective else _parts_of(result[0], result[1], self.num_particles, _num_rows(*args)))
        return result

    noting: ELBO = object.__new__(new_class(kind.__name__, (kind,), exec_body=lambda body: body.update({name: method})))
    noting.__dict__ = loss.__dict__
    return noting


def _num_rows(model: Program, guide: Program, args: tuple, kwargs: dict) -> int | None:
    """The number of data that the programs are called with: the rows of the first tensor."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    return len(tensors[0]) if tensors else None


def _parts_of(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, num_particles: int, num_rows: int | None
) -> Parts:
    for trace in (model_trace, guide_trace):
        # Enumerated in parallel, densities are tables; in sequence, each trace has another weight. Neither has parts.
        if any(site["infer"].keys() & {"_enumerate_dim", "_enum_total"} for _, site in sample_sites(trace)):
            return Parts(torch.tensor(math.nan), torch.tensor(math.nan), scaled_up_to(model_trace, num_rows))
    with torch.no_grad():
        reconstruction, kl = _reconstruction_and_kl(model_trace, guide_trace)
    return Parts(reconstruction / num_particles, kl / num_particles, scaled_up_to(model_trace, num_rows))


def _reconstruction_and_kl(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> tuple[Tensor, Tensor]:
    """The parts of the ELBO of one pair of traces: scaled by subsampled plates alone, with the masks of latents aligned.

    A loss may also have a weight (`poutine.scale`), of the KL for example, which is not a part of the ELBO.
    """
    # These take the dtype and device of what is added.
    reconstruction = kl = torch.zeros((), dtype=torch.long)
    in_model, in_guide = dict(sample_sites(model_trace)), dict(sample_sites(guide_trace))
    model, guide = align_masks(in_model, in_guide)
    for name, site in model.items():
        if site["is_observed"]:
            reconstruction = reconstruction + _term(site, in_model[name])
        else:
            kl = kl - _term(site, in_model[name])
    for name, site in guide.items():
        kl = kl + _term(site, in_guide[name])
    return reconstruction, kl


def _term(site: dict, before: dict) -> Tensor:
    """The log density of a site, without weights. `before` is the site before its mask was aligned."""
    if site["fn"] is not before["fn"]:
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    elif "unscaled_log_prob" in site and (site is not before or is_weighted(site)):
        log_prob = site["unscaled_log_prob"]
    else:
        return site["log_prob_sum"]
    return scale_and_mask(log_prob, plate_scale(site), site["mask"]).sum()


@dataclass
class EpochSums:
    """Sums over the steps of an epoch.

    Attributes:
        full_size: size of a subsampled plate, to which the sums are scaled; None without one.
        objective: minus the loss.
        reconstruction: of log p(x|z).
        kl: of log q(z|x) - log p(z).
        has_parts: whether the loss has these two.
        num_data: data that the sums count.
        num_rows: data that this process received.
        num_steps: steps of the optimizer, those that were skipped included.
    """

    full_size: int | None = None
    objective: Any = 0.0
    reconstruction: Any = 0.0
    kl: Any = 0.0
    has_parts: bool = False
    num_data: Any = 0
    num_rows: int = 0
    num_steps: int = 0

    def add(self, parts: list[Parts], batch_size: int, was_made: Tensor | None = None) -> None:
        """Add the parts of a step, unless it was skipped."""
        for part in parts:
            self.full_size = part.full_size or self.full_size
        size: Any = self.full_size or batch_size
        self.num_data = self.num_data + (size if was_made is None else was_made * size)
        for part in parts:
            reconstruction: Any = part.reconstruction
            kl: Any = part.kl
            if was_made is not None:
                reconstruction, kl = (
                    torch.where(was_made, torch.as_tensor(term, device=was_made.device), 0.0)
                    for term in (reconstruction, kl)
                )
            self._add_parts(reconstruction, kl)

    def add_rows(self, rows: Tensor, batch_size: int) -> None:
        """Add the sums over recorded steps: (loss, reconstruction, KL, number of steps made)."""
        value, reconstruction, kl, num_steps = rows.unbind()
        self.num_data = self.num_data + num_steps * (self.full_size or batch_size)
        self.objective = self.objective - value
        self._add_parts(reconstruction, kl)

    def _add_parts(self, reconstruction: Any, kl: Any) -> None:
        self.reconstruction = self.reconstruction + reconstruction
        self.kl = self.kl + kl
        self.has_parts = True

    def means(self) -> tuple[float, float, float]:
        """(elbo, reconstruction, kl) per datum; NaN without data or parts."""
        if not self.num_data or not self.has_parts:
            return math.nan, math.nan, math.nan
        reconstruction, kl = float(self.reconstruction) / self.num_data, float(self.kl) / self.num_data
        return reconstruction - kl, reconstruction, kl


def has_surrogate(loss: ELBO) -> bool:
    """Whether `surrogate` can give this loss."""
    return type(loss) is Trace_ELBO or isinstance(loss, Objective)


def surrogate(loss: ELBO, model: Program, guide: Program, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, reconstruction, kl) without synchronising with the host, to be recorded.

    Raises:
        TypeError: for a loss that reads its numbers.
        ValueError: if `Trace_ELBO` has draws that are not reparameterised.
    """
    if isinstance(loss, Objective):
        value, parts = loss.surrogate(model, guide, *args, **kwargs)
        return value, parts.reconstruction, parts.kl
    if type(loss) is not Trace_ELBO:
        raise TypeError(f"{type(loss).__name__} has no surrogate to record; Trace_ELBO and pyrovae.objectives have")
    # These take the dtype and device of what is added.
    observed = latent = reconstruction = kl = torch.zeros((), dtype=torch.long)
    for model_trace, guide_trace in loss._get_traces(model, guide, args, kwargs):
        for name, site in sample_sites(guide_trace):
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"guide site '{name}' ({site['fn']}) is not reparameterised: its gradient needs the eager loss"
                )
            latent = latent + site["log_prob_sum"] / loss.num_particles
        for _, site in sample_sites(model_trace):
            term = site["log_prob_sum"] / loss.num_particles
            if site["is_observed"]:
                observed = observed + term
            else:
                latent = latent - term
        own = _reconstruction_and_kl(model_trace, guide_trace)
        reconstruction, kl = reconstruction + own[0] / loss.num_particles, kl + own[1] / loss.num_particles
    return latent - observed, reconstruction, kl


def differentiable(loss: ELBO) -> Callable[..., Any]:
    """A function of model, guide and their arguments that returns the loss as a tensor, if the loss can give one."""
    if isinstance(loss, Objective):
        return lambda *args, **kwargs: loss.surrogate(*args, **kwargs)[0]

    def run(*args: Any, **kwargs: Any) -> Any:
        with suppress(NotImplementedError, AttributeError):  # not every Pyro loss has it
            return loss.differentiable_loss(*args, **kwargs)
        return loss.loss_and_grads(*args, **kwargs)

    return run
