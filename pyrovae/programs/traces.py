"""Runs of Pyro programs and the log weights in them: a trace of the model, one of the guide -> (S, N) numbers."""

from collections.abc import Callable, Iterator
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrovae.programs.modules import checks_values, plain_errors
from pyrovae.programs.supports import innermost, is_possible, supported_elements

__all__ = [
    "Layout",
    "Program",
    "arrange",
    "log_likelihood_of",
    "log_weights_of",
    "place",
    "run_pair",
    "sample_sites",
    "select_data",
    "select_particle",
    "site_log_prob",
    "spread",
    "trace_program",
    "under_particles",
]

Program = Callable[..., Any]

_PARTICLES = "_pyrovae_particles"


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
    with torch.no_grad(), pyro.validation_enabled(False), plain_errors():
        return poutine.trace(program).get_trace(*args, **kwargs)


def run_pair(
    model: Program, guide: Program, args: tuple, kwargs: dict, *replayed: poutine.Trace
) -> tuple[poutine.Trace, poutine.Trace]:
    """(model trace, guide trace), the model run on the guide's draws."""
    guide_trace = trace_program(guide, args, kwargs, *replayed)
    model_trace = trace_program(model, args, kwargs, *replayed, guide_trace)
    return model_trace, guide_trace


def under_particles(program: Program, layout: Layout, num_particles: int) -> Program:
    """The program under an outer plate of particles, left of all its own plates."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(_PARTICLES, num_particles, dim=-1 - layout.max_plate_nesting):
            return program(*args, **kwargs)

    return run


def sample_sites(trace: poutine.Trace) -> Iterator[tuple[str, dict]]:
    """The random choices and observations of a trace, without subsample indices and deterministic values."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site) or site["infer"].get("_deterministic"):
            continue
        yield name, site


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
    total = reduce(add, (term if program == "model" else -term for (program, _), term in terms.items()))
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


def log_likelihood_of(layout: Layout, model_trace: poutine.Trace) -> Tensor:
    """Log density (1, N) of what is observed, and of factors, in a trace without a particle plate; () of nothing."""
    terms = [
        spread(site_log_prob(site), site, layout, None) for _, site in sample_sites(model_trace) if site["is_observed"]
    ]
    return reduce(add, terms) if terms else torch.zeros(())


def site_log_prob(site: dict) -> Tensor:
    """Log density with the site's batch shape: -inf outside the support, 0 where masked, scales left out."""
    distribution, value, mask = site["fn"], site["value"], site["mask"]
    possible = is_possible(site)
    try:
        log_prob = distribution.log_prob(value, *site["args"], **site["kwargs"])
    except ValueError:  # a distribution with validate_args=True refuses what we call -inf, or what is masked
        supported = supported_elements(distribution, value)
        if supported is None or supported.all():
            raise
        event = (...,) + (None,) * len(innermost(distribution).event_shape)
        log_prob = distribution.log_prob(torch.where(supported[event], value, distribution.sample()))
    if possible is not None:
        log_prob = torch.where(possible, log_prob, -torch.inf)
    if mask is not None:
        log_prob = torch.where(torch.as_tensor(mask, device=log_prob.device), log_prob, 0.0)
    return log_prob


def spread(log_prob: Tensor, site: dict, layout: Layout, num_particles: int | None) -> Tensor:
    """Sum a site's log density over all dimensions but particles and data: (S, N), or (1, N) without particles."""
    terms = arrange(log_prob.unsqueeze(-1), site, layout, num_particles)
    return terms.squeeze(-1) if terms.shape[-1] == 1 else terms.sum(-1)


def arrange(terms: Tensor, site: dict, layout: Layout, num_particles: int | None) -> Tensor:
    """Terms of a site (*batch_shape, any) with particles and data in front and the rest flat.

    Shapes: (S, N, the rest), or (1, N, the rest) without particles, or of a site that has none.
    """
    depth = layout.max_plate_nesting
    terms = terms.reshape((1,) * (depth + 1 - terms.ndim) + terms.shape)
    if num_particles is None or terms.ndim == depth + 1:
        terms = terms.unsqueeze(0)
    elif terms.ndim > depth + 2 or len(terms) not in (1, num_particles):
        raise ValueError(
            f"site '{site['name']}' has batch shape {tuple(terms.shape[:-1])} under {num_particles} particles and "
            f"{depth} plates"
        )
    if layout.dim is not None:
        per_datum = terms.movedim(layout.dim - 1, 1).flatten(2)
        if per_datum.shape[1] != layout.num_data:
            raise ValueError(
                f"site '{site['name']}' has {per_datum.shape[1]} data where plate '{layout.plate}' has {layout.num_data}"
            )
        return per_datum
    joint = terms.flatten(1).unsqueeze(1)
    if not layout.sequential:
        return joint
    spread = joint.new_zeros(len(joint), layout.num_data, joint.shape[-1])
    spread[:, _sequential_column(site, layout)] = joint[:, 0]
    return spread


def place(array: Tensor, site: dict, layout: Layout, num_particles: int | None) -> Tensor:
    """What an array (S, N), or (1, N) without particles, has for each element of a site's value; broadcasts with it."""
    if layout.sequential:
        array = array[:, _sequential_column(site, layout)].unsqueeze(1)
    shape = [1] * layout.max_plate_nesting
    if layout.dim is not None:
        shape[layout.dim] = array.shape[1]
    placed = array.reshape(
        *(() if num_particles is None else (len(array),)), *shape, *[1] * len(site["fn"].event_shape)
    )
    return placed.reshape(placed.shape[max(0, placed.ndim - site["value"].ndim) :])


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


def select_data(trace: poutine.Trace, layout: Layout, data: Tensor) -> poutine.Trace:
    """The latents of the data at these positions, to be replayed."""
    dim = layout.dim
    assert dim is not None
    return _select(trace, lambda value, event_dim: value.index_select(dim - event_dim, data.to(value.device)))


def select_particle(trace: poutine.Trace, layout: Layout, particle: int) -> poutine.Trace:
    """The latents of one particle, to be replayed."""
    return _select(trace, lambda value, event_dim: value.select(-1 - layout.max_plate_nesting - event_dim, particle))
