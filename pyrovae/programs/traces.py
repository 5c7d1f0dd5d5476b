"""Runs Pyro programs, finds the sites in their traces, and arranges what belongs to a site by particle and datum."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrovae.common.reporting import plain_errors
from pyrovae.programs.enumeration import SummedOut, is_summed

__all__ = [
    "PARTICLES",
    "Layout",
    "Program",
    "arrange",
    "as_guide",
    "check_data",
    "latents_of",
    "place",
    "plate_size",
    "run_pair",
    "sample_sites",
    "select_data",
    "select_particle",
    "sequential_column",
    "spread",
    "trace_program",
    "under_particles",
]

Program = Callable[..., Any]

PARTICLES = "_pyrovae_particles"


class Layout(NamedTuple):
    """Where the data are in a pair of programs.

    Attributes:
        plate: Name of the plate that indexes the data; None if the whole program is one datum.
        dim: Its batch dimension, negative; None for a sequential plate, or without a plate.
        num_data: The number of data N, or of the subsample if the plate draws one.
        subsampled: Whether the plate draws a subsample.
        max_plate_nesting: The number of batch dimensions, from the right, that the programs' plates use.
        pinned: A trace with the subsample indices, drawn once.
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
    """Trace of one run without gradients or validation, with values replayed from the `replayed` traces."""
    for trace in map(program.clean, replayed) if isinstance(program, SummedOut) else replayed:
        program = poutine.replay(program, trace=trace)
    with torch.no_grad(), pyro.validation_enabled(False), plain_errors():
        return poutine.trace(program).get_trace(*args, **kwargs)


def run_pair(
    model: Program, guide: Program, args: tuple, kwargs: dict, *replayed: poutine.Trace
) -> tuple[poutine.Trace, poutine.Trace]:
    """(model trace, guide trace) with the model run on the guide's draws."""
    if isinstance(guide, SummedOut):  # it draws with one value of each summed site, and is evaluated with all
        drawn = trace_program(guide.drawn, args, kwargs, *replayed)
        guide_trace = trace_program(guide, args, kwargs, *replayed, drawn)
        model_trace = trace_program(model, args, kwargs, *replayed, guide.clean(guide_trace))
        return model_trace, guide_trace
    guide_trace = trace_program(guide, args, kwargs, *replayed)
    model_trace = trace_program(model, args, kwargs, *replayed, guide_trace)
    return model_trace, guide_trace


class _KeptPriors(Messenger):
    """Keeps the prior that a `GuideMessenger` stores at each site, which replaying another trace would drop."""

    def __init__(self) -> None:
        super().__init__()
        self.priors: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if "prior" in msg["infer"]:
            self.priors[msg["name"]] = msg["infer"]["prior"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.priors:
            msg["infer"] = {**msg["infer"], "prior": self.priors[msg["name"]]}


def as_guide(program: Program) -> Program:
    """The guide without observed sites: a `GuideMessenger` of Pyro (AutoNormalMessenger, ...) runs the whole model."""
    if not isinstance(program, GuideMessenger):
        return program

    def guide(*args: Any, **kwargs: Any) -> Any:
        with poutine.block(hide_fn=lambda site: site["type"] == "sample" and site["is_observed"]), _KeptPriors():
            return program(*args, **kwargs)

    return guide


def under_particles(program: Program, layout: Layout, num_particles: int) -> Program:
    """The program under an outer plate of particles, left of all its own plates."""
    if isinstance(program, SummedOut):
        return program.around(under_particles(program.drawn, layout, num_particles))

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(PARTICLES, num_particles, dim=-1 - layout.max_plate_nesting):
            return program(*args, **kwargs)

    return run


def sample_sites(trace: poutine.Trace) -> Iterator[tuple[str, dict]]:
    """The random choices and observations of a trace, without subsample indices, deterministic values and sums."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site) or site["infer"].get("_deterministic"):
            continue
        if not is_summed(site):
            yield name, site


def latents_of(trace: poutine.Trace) -> dict[str, Tensor]:
    """The values of the latent sites by name."""
    return {name: site["value"] for name, site in sample_sites(trace) if not site["is_observed"]}


def spread(log_prob: Tensor, site: dict, layout: Layout, num_particles: int | None) -> Tensor:
    """Sum a site's log density over all dimensions but particles and data: (S, N), or (1, N) without particles."""
    terms = arrange(log_prob.unsqueeze(-1), site, layout, num_particles)
    return terms.squeeze(-1) if terms.shape[-1] == 1 else terms.sum(-1)


def arrange(terms: Tensor, site: dict, layout: Layout, num_particles: int | None) -> Tensor:
    """Move the particle and data dimensions of terms (*batch_shape, any) to the front, and flatten the rest.

    Returns (S, N, the rest), or (1, N, the rest) without particles or for a site without a particle dimension.
    """
    _check_declared(terms.shape[:-1], site)
    depth = layout.max_plate_nesting
    terms = terms.reshape((1,) * (depth + 1 - terms.ndim) + terms.shape)
    if num_particles is None or terms.ndim == depth + 1:
        terms = terms.unsqueeze(0)
    else:
        terms = terms.reshape(terms.shape[terms.ndim - depth - 2 :])  # dimensions further left have size 1
    if layout.dim is not None:
        per_datum = terms.movedim(layout.dim - 1, 1).flatten(2)
        if per_datum.shape[1] != layout.num_data:
            raise ValueError(
                f"site '{site['name']}' has {per_datum.shape[1]} data, but plate '{layout.plate}' has {layout.num_data}"
            )
        return per_datum
    joint = terms.flatten(1).unsqueeze(1)
    if not layout.sequential:
        return joint
    spread = joint.new_zeros(len(joint), layout.num_data, joint.shape[-1])
    spread[:, sequential_column(site, layout)] = joint[:, 0]
    return spread


def check_data(log_prob: Tensor, site: dict, layout: Layout) -> None:
    """Raise ValueError if a site's log density has an undeclared dimension, or not as many data as the plate."""
    _check_declared(log_prob.shape, site)
    if layout.dim is not None:
        num_data = log_prob.shape[layout.dim] if log_prob.ndim >= -layout.dim else 1
        if num_data != layout.num_data:
            raise ValueError(
                f"site '{site['name']}' has {num_data} data, but plate '{layout.plate}' has {layout.num_data}"
            )


def _check_declared(batch_shape: torch.Size, site: dict) -> None:
    """Raise ValueError if a site's log density has a batch dimension that no plate declares."""
    declared = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.dim is not None}
    declared.update(dict.fromkeys(site["infer"].get("_dim_to_id", ()), -1))  # values of a summed site
    for dim, size in zip(range(-len(batch_shape), 0), batch_shape, strict=True):
        if size == 1 or declared.get(dim) in (size, -1):
            continue
        distribution, name = site["fn"], site["name"]
        shapes = (
            f"values of shape {tuple(site['value'].shape)} against a distribution of batch shape "
            f"{tuple(distribution.batch_shape)} and event shape {tuple(distribution.event_shape)}"
        )
        if dim in declared:
            plate = next(frame.name for frame in site["cond_indep_stack"] if frame.dim == dim)
            raise ValueError(
                f"site '{name}' has {size} data, but plate '{plate}' has {declared[dim]} ({shapes}): give the site the "
                f"shape of its plate"
            )
        raise ValueError(
            f"the log density of site '{name}' has shape {tuple(batch_shape)}, and no plate declares its dimension "
            f"{dim} of size {size} ({shapes}), so its elements would be summed. If they belong to one event, write "
            f".to_event(...); if value and parameters differ by a dimension of size 1, as x (N,) and loc (N, 1), "
            f"remove that dimension; if they are independent data, put the site in a plate"
        )


def plate_size(frame: Any, *sites: dict) -> int:
    """The size of a plate; if it was made without one, the size in the batch shapes of the sites inside."""
    if frame.size != -1:
        return frame.size
    shapes = (site["fn"].batch_shape for site in sites)
    return max((shape[frame.dim] for shape in shapes if len(shape) >= -frame.dim), default=1)


def place(array: Tensor, site: dict, layout: Layout, num_particles: int | None) -> Tensor:
    """Reshape an array (S, N), or (1, N) without particles, so that it broadcasts with a site's value."""
    if layout.sequential:
        array = array[:, sequential_column(site, layout)].unsqueeze(1)
    shape = [1] * layout.max_plate_nesting
    if layout.dim is not None:
        shape[layout.dim] = array.shape[1]
    placed = array.reshape(
        *(() if num_particles is None else (len(array),)), *shape, *[1] * len(site["fn"].event_shape)
    )
    return placed.reshape(placed.shape[max(0, placed.ndim - site["value"].ndim) :])


def sequential_column(site: dict, layout: Layout) -> int:
    """The datum of a sequential plate that a site belongs to; the plate's counter continues in a second pass."""
    counter = next(frame.counter for frame in site["cond_indep_stack"] if frame.name == layout.plate)
    return (counter - 1) % layout.num_data


def _select(trace: poutine.Trace, choose: Callable[[Tensor, int], Tensor]) -> poutine.Trace:
    """A trace to replay, with `choose(value, event_dim)` of each latent."""
    selected = poutine.Trace()
    for name, site in sample_sites(trace):
        value = choose(site["value"], len(site["fn"].event_shape))
        selected.add_node(name, **{**site, "value": value})
    return selected


def select_data(trace: poutine.Trace, layout: Layout, data: Tensor) -> poutine.Trace:
    """A trace to replay, with the latents of the data at these positions."""
    dim = layout.dim
    assert dim is not None
    return _select(trace, lambda value, event_dim: value.index_select(dim - event_dim, data.to(value.device)))


def select_particle(trace: poutine.Trace, layout: Layout, particle: int) -> poutine.Trace:
    """A trace to replay, with the latents of one particle."""
    return _select(trace, lambda value, event_dim: value.select(-1 - layout.max_plate_nesting - event_dim, particle))
