"""Log densities of a trace, per datum: those of each site, the joint, and the log weights (S, N) of model and guide."""

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyrovae.common.arguments import checks_values
from pyrovae.programs.masks import align_masks
from pyrovae.programs.supports import innermost, is_possible, supported_elements
from pyrovae.programs.traces import Layout, Program, sample_sites, sequential_column, spread, trace_program

__all__ = [
    "InspectedPair",
    "log_joint_of",
    "log_joint_with",
    "log_likelihood_of",
    "log_weights_of",
    "site_log_prob",
]

_HALF = (torch.float16, torch.bfloat16)


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
