"""Runs Pyro programs and computes log weights (S, N) from a trace of the model and one of the guide."""

from collections.abc import Callable, Iterator
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyrovae.common.arguments import checks_values
from pyrovae.common.reporting import plain_errors
from pyrovae.programs.masks import align_masks
from pyrovae.programs.supports import innermost, is_possible, supported_elements

__all__ = [
    "InspectedPair",
    "Layout",
    "Program",
    "arrange",
    "as_guide",
    "latents_of",
    "log_joint_of",
    "log_joint_with",
    "log_likelihood_of",
    "log_weights_of",
    "place",
    "plate_size",
    "run_pair",
    "sample_sites",
    "select_data",
    "select_particle",
    "sequential_column",
    "site_log_prob",
    "spread",
    "trace_program",
    "under_particles",
]

Program = Callable[..., Any]

_PARTICLES = "_pyrovae_particles"
_HALF = (torch.float16, torch.bfloat16)


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


class InspectedPair(NamedTuple):
    """A model and a guide with their arguments, and one run of each: the model is run on the guide's draws."""

    model: Program
    guide: Program
    args: tuple
    kwargs: dict
    layout: Layout
    model_trace: poutine.Trace
    guide_trace: poutine.Trace

    def values(self) -> Iterator[Tensor]:
        """The values of the model's sites."""
        return (site["value"] for _, site in sample_sites(self.model_trace))


def trace_program(program: Program, args: tuple, kwargs: dict, *replayed: poutine.Trace) -> poutine.Trace:
    """Trace of one run without gradients or validation, with values replayed from the `replayed` traces."""
    for trace in replayed:
        program = poutine.replay(program, trace=trace)
    with torch.no_grad(), pyro.validation_enabled(False), plain_errors():
        return poutine.trace(program).get_trace(*args, **kwargs)


def run_pair(
    model: Program, guide: Program, args: tuple, kwargs: dict, *replayed: poutine.Trace
) -> tuple[poutine.Trace, poutine.Trace]:
    """(model trace, guide trace) with the model run on the guide's draws."""
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


def latents_of(trace: poutine.Trace) -> dict[str, Tensor]:
    """The values of the latent sites by name."""
    return {name: site["value"] for name, site in sample_sites(trace) if not site["is_observed"]}


def log_weights_of(
    layout: Layout, model_trace: poutine.Trace, guide_trace: poutine.Trace, num_particles: int | None = None
) -> Tensor:
    """Log weights (S, N) of a pair of traces; (1, N) of traces without a particle plate."""
    latents = {name for name, site in sample_sites(model_trace) if not site["is_observed"]}
    if missing := sorted(latents - set(guide_trace.nodes)):
        raise ValueError(f"the guide left out the model's latent site(s) {missing} in one of its runs")
    sites = align_masks(dict(sample_sites(model_trace)), dict(sample_sites(guide_trace)))
    terms = {
        (program, name): spread(site_log_prob(site), site, layout, num_particles)
        for program, of_program in zip(("model", "guide"), sites, strict=True)
        for name, site in of_program.items()
    }
    for name in latents if layout.sequential else ():
        if sequential_column(model_trace.nodes[name], layout) != sequential_column(guide_trace.nodes[name], layout):
            raise ValueError(
                f"site '{name}' belongs to different data of plate '{layout.plate}' in model and guide: iterate over "
                f"the plate in the same order in both"
            )
    total = reduce(add, (term if program == "model" else -term for (program, _), term in terms.items()))
    # If p(z) = 0 the weight is 0, whatever the likelihood gives for such a z.
    for name in latents:
        total = torch.where(terms["model", name] == -torch.inf, -torch.inf, total)
    if checks_values() and not (total < torch.inf).all():
        for (program, name), term in terms.items():
            if term.isnan().any() or (term == torch.inf).any():
                raise ValueError(
                    f"the log density of site '{name}' of the {program} is NaN or +inf, so there is no log weight: "
                    f"look for NaN in the data or parameters, or for an unbounded density"
                )
        raise ValueError("a log weight is NaN or +inf: the guide drew a value to which it gives no density")
    return total


def log_likelihood_of(layout: Layout, model_trace: poutine.Trace) -> Tensor:
    """Log density (1, N) of observed sites and factors, in a trace without a particle plate; 0 if there are none."""
    terms = [
        spread(site_log_prob(site), site, layout, None) for _, site in sample_sites(model_trace) if site["is_observed"]
    ]
    return reduce(add, terms) if terms else torch.zeros(())


def log_joint_of(layout: Layout, model_trace: poutine.Trace) -> Tensor:
    """Log density (1, N) of all sites, in a trace without a particle plate."""
    return reduce(add, (spread(site_log_prob(site), site, layout, None) for _, site in sample_sites(model_trace)))


def log_joint_with(pair: InspectedPair, values: dict[str, Tensor]) -> Tensor:
    """Log density (1, N) of the model at the latents of its trace, those in `values` replaced."""
    replayed = poutine.Trace()
    for name, site in sample_sites(pair.model_trace):
        if not site["is_observed"]:
            replayed.add_node(name, **{**site, "value": values.get(name, site["value"])})
    trace = trace_program(pair.model, pair.args, pair.kwargs, pair.layout.pinned, replayed)
    return log_joint_of(pair.layout, trace)


def site_log_prob(site: dict) -> Tensor:
    """Log density with the site's batch shape: -inf outside the support, 0 for masked elements, scales left out."""
    distribution, value, mask = site["fn"], site["value"], site["mask"]
    _check_event(site)
    possible = is_possible(site, nan=True)
    try:
        log_prob = distribution.log_prob(value, *site["args"], **site["kwargs"])
    except ValueError:  # with validate_args=True, values outside the support are errors, even if masked
        supported = supported_elements(distribution, value)
        if supported is None or supported.all():
            raise
        event = (...,) + (None,) * len(innermost(distribution).event_shape)
        log_prob = distribution.log_prob(torch.where(supported[event], value, distribution.sample()))
    except NotImplementedError as error:
        raise ValueError(
            f"the distribution of site '{site['name']}' ({type(innermost(distribution)).__name__}) has no log density "
            f"of given values ({error or type(error).__name__}), for example because of a transform that is no "
            f"bijection (softmax): use a distribution with a log density"
        ) from error
    if log_prob.dtype in _HALF:
        raise ValueError(
            f"the log density of site '{site['name']}' is in {log_prob.dtype}, whose resolution is "
            f"{_half_step(log_prob.dtype)} nats at 100 nats, too coarse for an estimate: evaluate in float32, with "
            f"model.float(), guide.float() and x.float()"
        )
    if possible is not None:
        log_prob = torch.where(possible, log_prob, -torch.inf)
    if mask is not None:
        log_prob = torch.where(torch.as_tensor(mask, device=log_prob.device), log_prob, 0.0)
    return log_prob


def _half_step(dtype: torch.dtype) -> float:
    return 100 * torch.finfo(dtype).eps


def _check_event(site: dict) -> None:
    """Raise ValueError if value and distribution have different event shapes, which would be broadcast silently."""
    event_shape, shape = site["fn"].event_shape, tuple(site["value"].shape)
    found = shape[len(shape) - len(event_shape) :]
    shared = site["is_observed"]  # one parameter may be shared by all elements of a datum
    fits = len(found) == len(event_shape) and all(
        size == own or (shared and own == 1) for size, own in zip(found, event_shape, strict=True)
    )
    if event_shape and not fits and not site_is_factor(site):
        raise ValueError(
            f"site '{site['name']}' has values of shape {shape}, whose last {len(event_shape)} dimension(s) {found} "
            f"are not the event shape {tuple(event_shape)} of its distribution, so one would be broadcast against the "
            f"other: give the distribution the shape of its values (expand its parameters), or correct to_event(...)"
        )


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


def _check_declared(batch_shape: torch.Size, site: dict) -> None:
    """Raise ValueError if a site's log density has a batch dimension that no plate declares."""
    declared = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.dim is not None}
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
