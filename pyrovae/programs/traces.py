"""Runs of Pyro programs and the log weights in them: a trace of the model, one of the guide -> (S, N) numbers."""

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


class InspectedPair(NamedTuple):
    """A model and a guide with their arguments, and one run of each, the model on the guide's draws."""

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


class _KeptPriors(Messenger):
    """Keeps what a `GuideMessenger` notes of each site, which replaying another trace's values would drop."""

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
    """The guide as a program of latents alone: a `GuideMessenger` of Pyro (AutoNormalMessenger, ...) runs the model whole."""
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
    """The values that were drawn, by site."""
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


def log_joint_of(layout: Layout, model_trace: poutine.Trace) -> Tensor:
    """Log density (1, N) of all sites, in a trace without a particle plate."""
    return reduce(add, (spread(site_log_prob(site), site, layout, None) for _, site in sample_sites(model_trace)))


def site_log_prob(site: dict) -> Tensor:
    """Log density with the site's batch shape: -inf outside the support, 0 where masked, scales left out."""
    distribution, value, mask = site["fn"], site["value"], site["mask"]
    _check_event(site)
    possible = is_possible(site, nan=True)
    try:
        log_prob = distribution.log_prob(value, *site["args"], **site["kwargs"])
    except ValueError:  # a distribution with validate_args=True refuses what we call -inf, or what is masked
        supported = supported_elements(distribution, value)
        if supported is None or supported.all():
            raise
        event = (...,) + (None,) * len(innermost(distribution).event_shape)
        log_prob = distribution.log_prob(torch.where(supported[event], value, distribution.sample()))
    except NotImplementedError as error:
        raise ValueError(
            f"the distribution of site '{site['name']}' ({type(innermost(distribution)).__name__}) has no log density of given values "
            f"({error or type(error).__name__}), as one behind a transform that is no bijection (softmax) has none: take a "
            f"distribution that has one"
        ) from error
    if log_prob.dtype in _HALF:
        raise ValueError(
            f"the log density of site '{site['name']}' is in {log_prob.dtype}, whose steps are {_half_step(log_prob.dtype)} "
            f"nats at 100 nats, so there is no estimate to be made of it: evaluate in float32, by model.float(), "
            f"guide.float() and x.float()"
        )
    if possible is not None:
        log_prob = torch.where(possible, log_prob, -torch.inf)
    if mask is not None:
        log_prob = torch.where(torch.as_tensor(mask, device=log_prob.device), log_prob, 0.0)
    return log_prob


def _half_step(dtype: torch.dtype) -> float:
    return 100 * torch.finfo(dtype).eps


def _check_event(site: dict) -> None:
    """Raise ValueError if an event of the value has another shape than the distribution's: it would be broadcast, unseen."""
    event_shape, shape = site["fn"].event_shape, tuple(site["value"].shape)
    found = shape[len(shape) - len(event_shape) :]
    shared = site["is_observed"]  # one parameter may stand for all elements of a datum
    fits = len(found) == len(event_shape) and all(
        size == own or (shared and own == 1) for size, own in zip(found, event_shape, strict=True)
    )
    if event_shape and not fits and not site_is_factor(site):
        raise ValueError(
            f"site '{site['name']}' has values of shape {shape}, whose last {len(event_shape)} dimension(s) {found} are not the "
            f"event shape {tuple(event_shape)} of its distribution, so that one would be broadcast against the other: give "
            f"the distribution the shape of its values (expand its parameters), or correct to_event(...)"
        )


def spread(log_prob: Tensor, site: dict, layout: Layout, num_particles: int | None) -> Tensor:
    """Sum a site's log density over all dimensions but particles and data: (S, N), or (1, N) without particles."""
    terms = arrange(log_prob.unsqueeze(-1), site, layout, num_particles)
    return terms.squeeze(-1) if terms.shape[-1] == 1 else terms.sum(-1)


def arrange(terms: Tensor, site: dict, layout: Layout, num_particles: int | None) -> Tensor:
    """Terms of a site (*batch_shape, any) with particles and data in front and the rest flat.

    Shapes: (S, N, the rest), or (1, N, the rest) without particles, or of a site that has none.
    """
    _check_declared(terms.shape[:-1], site)
    depth = layout.max_plate_nesting
    terms = terms.reshape((1,) * (depth + 1 - terms.ndim) + terms.shape)
    if num_particles is None or terms.ndim == depth + 1:
        terms = terms.unsqueeze(0)
    else:
        terms = terms.reshape(terms.shape[terms.ndim - depth - 2 :])  # what lies further left is of size 1
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
    spread[:, sequential_column(site, layout)] = joint[:, 0]
    return spread


def _check_declared(batch_shape: torch.Size, site: dict) -> None:
    """Raise ValueError if a site's log density has a batch dimension that no plate (and no particle) declares."""
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
                f"site '{name}' has {size} data where plate '{plate}' has {declared[dim]} ({shapes}): give the site the shape "
                f"of its plate"
            )
        raise ValueError(
            f"the log density of site '{name}' has shape {tuple(batch_shape)}, and no plate declares its dimension {dim} of size "
            f"{size} ({shapes}): its elements would all be added up. If they belong to one event, write .to_event(...); "
            f"if value and parameters differ by a dimension of size 1, as x (N,) and loc (N, 1), remove it; if they are "
            f"independent data, put the site in a plate"
        )


def plate_size(frame: Any, *sites: dict) -> int:
    """The size of a plate, taken from the batch shapes of sites inside if the plate was made without one."""
    if frame.size != -1:
        return frame.size
    shapes = (site["fn"].batch_shape for site in sites)
    return max((shape[frame.dim] for shape in shapes if len(shape) >= -frame.dim), default=1)


def place(array: Tensor, site: dict, layout: Layout, num_particles: int | None) -> Tensor:
    """What an array (S, N), or (1, N) without particles, has for each element of a site's value; broadcasts with it."""
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
