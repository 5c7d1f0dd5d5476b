"""Runs of Pyro programs and the log weights in them: a trace of the model, one of the guide -> (S, N) numbers."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyrovae.modules import checks_values

__all__ = [
    "Layout",
    "Program",
    "is_possible",
    "log_weights_of",
    "run_pair",
    "sample_sites",
    "select_data",
    "select_particle",
    "site_log_prob",
    "spread",
    "trace_program",
]

Program = Callable[..., Any]


class Layout(NamedTuple):
    """Where the data are in a pair of programs.

    plate: name of the plate that indexes the data; None: the whole program is one datum
    dim: its batch dimension, negative; None for a sequential plate, or without a plate
    num_data: the number of data N, of the subsample where the plate draws one
    subsampled: whether it draws one
    max_plate_nesting: how many batch dimensions, from the right, the programs' plates take up
    pinned: a trace that holds the subsample indices, drawn once
    """

    plate: str | None
    dim: int | None
    num_data: int
    subsampled: bool
    max_plate_nesting: int
    pinned: poutine.Trace

    @property
    def sequential(self) -> bool:
        return self.plate is not None and self.dim is None


def trace_program(program: Program, args: tuple, kwargs: dict, *replayed: poutine.Trace) -> poutine.Trace:
    """Trace of one run without gradients or validation, with the values of the `replayed` traces put in."""
    for trace in replayed:
        program = poutine.replay(program, trace=trace)
    with torch.no_grad(), pyro.validation_enabled(False):
        return poutine.trace(program).get_trace(*args, **kwargs)


def run_pair(
    model: Program, guide: Program, args: tuple, kwargs: dict, *replayed: poutine.Trace
) -> tuple[poutine.Trace, poutine.Trace]:
    """(model trace, guide trace), the model run on the guide's draws."""
    guide_trace = trace_program(guide, args, kwargs, *replayed)
    model_trace = trace_program(model, args, kwargs, *replayed, guide_trace)
    return model_trace, guide_trace


def sample_sites(trace: poutine.Trace) -> Iterator[tuple[str, dict]]:
    """The random choices and observations of a trace, without subsample indices and deterministic values."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site) or site["infer"].get("_deterministic"):
            continue
        yield name, site


def is_possible(site: dict) -> Tensor | None:
    """Where the site's value lies in its support, with the batch shape; masked elements do; None: always so."""
    distribution, value = site["fn"], site["value"]
    if site_is_factor(site):
        return None
    try:
        support = distribution.support
        possible = support.check(value)
    except (AttributeError, NotImplementedError, ValueError):  # no support, or one torch cannot check
        return None
    extra = len(distribution.event_shape) - support.event_dim
    if extra > 0:
        possible = possible.flatten(-extra).all(-1)
    for mask in (site["mask"], getattr(distribution, "_mask", None)):
        if mask is not None:
            possible = possible | ~torch.as_tensor(mask, dtype=torch.bool, device=possible.device)
    return possible


def log_weights_of(
    layout: Layout, model_trace: poutine.Trace, guide_trace: poutine.Trace, num_particles: int | None = None
) -> Tensor:
    """Log weights (S, N) of a pair of traces; (1, N) of traces without a particle plate."""
    latents = {name for name, site in sample_sites(model_trace) if not site["is_observed"]}
    if missing := sorted(latents - set(guide_trace.nodes)):
        raise ValueError(f"the guide left out the model's latent site(s) {missing} in one of its runs")
    terms = {
        (program, name): spread(site_log_prob(site), site, layout, num_particles)
        for program, trace in (("model", model_trace), ("guide", guide_trace))
        for name, site in sample_sites(trace)
    }
    for name in latents if layout.sequential else ():
        if _sequential_column(model_trace.nodes[name], layout) != _sequential_column(guide_trace.nodes[name], layout):
            raise ValueError(
                f"site '{name}' belongs to different data of plate '{layout.plate}' in model and guide: go through the "
                f"plate in one order in both"
            )
    total = sum(term if program == "model" else -term for (program, _), term in terms.items())
    # Where p(z) = 0 the weight is 0, whatever the likelihood makes of such a z.
    for name in latents:
        total = torch.where(terms["model", name] == -torch.inf, -torch.inf, total)
    if checks_values() and not (total < torch.inf).all():
        for (program, name), term in terms.items():
            if term.isnan().any() or (term == torch.inf).any():
                raise ValueError(
                    f"the log density of site '{name}' of the {program} is NaN or +inf, so there is no log weight: "
                    f"look for NaN in the data or parameters, or for a density without bound"
                )
        raise ValueError("a log weight is NaN or +inf: the guide drew a value to which it gives no density")
    return total


def site_log_prob(site: dict) -> Tensor:
    """Log density with the site's batch shape: -inf outside the support, 0 where masked, scales left out."""
    distribution, value, mask = site["fn"], site["value"], site["mask"]
    possible = is_possible(site)
    try:
        log_prob = distribution.log_prob(value, *site["args"], **site["kwargs"])
    except ValueError:  # a distribution with validate_args=True refuses what we call -inf
        if possible is None or possible.all():
            raise
        event = (...,) + (None,) * len(distribution.event_shape)
        log_prob = distribution.log_prob(torch.where(possible[event], value, distribution.sample()))
    if possible is not None:
        log_prob = torch.where(possible, log_prob, -torch.inf)
    if mask is not None:
        log_prob = torch.where(torch.as_tensor(mask, device=log_prob.device), log_prob, 0.0)
    return log_prob


def spread(log_prob: Tensor, site: dict, layout: Layout, num_particles: int | None) -> Tensor:
    """Sum a site's log density over all dimensions but particles and data: (S, N), or (1, N) without particles."""
    depth = layout.max_plate_nesting
    log_prob = log_prob.reshape((1,) * (depth - log_prob.ndim) + log_prob.shape)
    if num_particles is None or log_prob.ndim == depth:
        log_prob = log_prob.unsqueeze(0)
    elif log_prob.ndim > depth + 1 or len(log_prob) not in (1, num_particles):
        raise ValueError(
            f"site '{site['name']}' has batch shape {tuple(log_prob.shape)} under {num_particles} particles and "
            f"{depth} plates"
        )
    if layout.dim is not None:
        per_datum = log_prob.movedim(layout.dim, 1).flatten(2).sum(2) if depth > 1 or log_prob.ndim > 2 else log_prob
        if per_datum.shape[1] != layout.num_data:
            raise ValueError(
                f"site '{site['name']}' has {per_datum.shape[1]} data where plate '{layout.plate}' has {layout.num_data}"
            )
        return per_datum
    joint = log_prob.flatten(1).sum(1, keepdim=True) if log_prob.ndim > 1 else log_prob.unsqueeze(1)
    if not layout.sequential:
        return joint
    spread = joint.new_zeros(len(joint), layout.num_data)
    spread[:, _sequential_column(site, layout)] = joint[:, 0]
    return spread


def _sequential_column(site: dict, layout: Layout) -> int:
    """Which datum of a sequential plate a site belongs to, by the plate's counter (1, 2, ... and on at a second pass)."""
    counter = next(frame.counter for frame in site["cond_indep_stack"] if frame.name == layout.plate)
    return (counter - 1) % layout.num_data


def _select(trace: poutine.Trace, choose: Callable[[Tensor, int], Tensor]) -> poutine.Trace:
    """The latents of a trace with `choose(value, event_dim)` applied, to be replayed."""
    selected = poutine.Trace()
    for name, site in sample_sites(trace):
        value = choose(site["value"], len(site["fn"].event_shape))
        selected.add_node(name, **{**site, "value": value})
    return selected


def select_data(trace: poutine.Trace, layout: Layout, start: int, stop: int) -> poutine.Trace:
    """The latents of a range of data, to be replayed."""
    dim = layout.dim
    assert dim is not None
    return _select(trace, lambda value, event_dim: value.narrow(dim - event_dim, start, stop - start))


def select_particle(trace: poutine.Trace, layout: Layout, particle: int) -> poutine.Trace:
    """The latents of one particle, to be replayed."""
    return _select(trace, lambda value, event_dim: value.select(-1 - layout.max_plate_nesting - event_dim, particle))
