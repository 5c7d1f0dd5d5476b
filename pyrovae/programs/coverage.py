"""Checks that a guide covers the latents that the model allows: mass that is never proposed is lost, and no weight
shows it.

A guide may be narrower than the prior if the data exclude the rest (the posterior of z under x ~ Uniform(0, z)). So a
latent value is missed only if q gives it no mass and p(x, z) does. Three kinds of values are tried: draws from the
prior; every value of a discrete latent with few values; points of a continuous latent between the bounds of the guide's
support and the prior's. An error is raised if the missed share of p(x) exceeds 1e-6, as estimated from these values.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyrovae.programs.auxiliary import is_delta
from pyrovae.programs.enumeration import SummedOut, at_best
from pyrovae.programs.latents import bounds_of, is_discrete, repeats
from pyrovae.programs.log_densities import (
    InspectedPair,
    log_joint_with,
    log_likelihood_of,
    site_log_prob,
)
from pyrovae.programs.masks import counted
from pyrovae.programs.reruns import same_random_numbers
from pyrovae.programs.supports import has_no_mass, innermost, is_possible, num_parts, support_of
from pyrovae.programs.traces import Layout, sample_sites, spread, trace_program

__all__ = ["refuse_uncovered"]

# Their support is the whole space.
_EVERYWHERE = (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal, dist.Laplace, dist.StudentT)
_LOG_SHARE = math.log(1e-6)  # share of p(x) that may be missed
_MOST_VALUES = 64  # values of a discrete latent that are tried
_TRIES = 3  # elements per datum that are tried
_POINTS = 32  # points on each side of a bound


def refuse_uncovered(pair: InspectedPair, prior_traces: Sequence[poutine.Trace]) -> None:
    """Raise ValueError if the guide gives no mass to latents that prior and data allow."""
    _refuse_uncovered_draws(pair, prior_traces)
    if isinstance(pair.guide, SummedOut):
        return  # what is never drawn at one value of a summed site may be drawn at another
    with same_random_numbers(*pair.values()):
        for name, site in sample_sites(pair.model_trace):
            if site["is_observed"] or is_delta(pair.guide_trace.nodes[name]):
                continue
            if is_discrete(site["fn"]):
                _refuse_uncovered_values(pair, name)
            else:
                _refuse_uncovered_ranges(pair, name)


def _refuse_uncovered_draws(pair: InspectedPair, prior_traces: Sequence[poutine.Trace]) -> None:
    missed: dict[str, Tensor] = {}
    likelihoods = []
    for prior_trace in prior_traces:
        guide_trace = trace_program(pair.guide, pair.args, pair.kwargs, pair.layout.pinned, prior_trace)
        likelihood = log_likelihood_of(pair.layout, prior_trace).double()
        likelihoods.append(likelihood)
        for name, site in sample_sites(guide_trace):
            if name not in prior_trace or is_delta(site):
                continue  # an auxiliary draw, or a Delta that transforms one onto the whole support
            uncovered = _uncovered(site, prior_trace.nodes[name], pair.layout)
            if uncovered is not None:
                mass = torch.where(uncovered, likelihood, -torch.inf)
                missed[name] = torch.logaddexp(missed[name], mass) if name in missed else mass
    if not missed:
        return
    count = math.log(len(prior_traces))
    evidence = torch.stack(likelihoods).logsumexp(0) - count
    drawn = pair.log_weights().double()
    evidence = torch.maximum(evidence, drawn)
    for name, mass in missed.items():
        if (mass - count > evidence + _LOG_SHARE).any():
            share = ((mass > -torch.inf) & (evidence > -torch.inf)).double().mean()
            raise ValueError(
                f"the guide does not cover the prior at site '{name}': for {share:.0%} of the data, the data are "
                f"possible under draws from the prior to which the guide gives no mass (its support: "
                f"{support_of(innermost(pair.guide_trace.nodes[name]['fn']))}), and what is never proposed is never "
                f"counted; give the guide the support of the prior, or of the posterior"
            )


def _uncovered(site: dict, prior: dict, layout: Layout) -> Tensor | None:
    """The data for which the guide cannot draw the value of a site, (1, N); None if there are none."""
    if type(innermost(site["fn"])) in _EVERYWHERE:
        return None
    try:
        log_prob = torch.where(_never_drawn(site), -torch.inf, site_log_prob(site))
    except Exception:  # planar flows, among others, only know the density of their own draws
        possible = is_possible(site)
        log_prob = torch.zeros(()) if possible is None else torch.where(possible, 0.0, -torch.inf)
    log_prob = at_best(log_prob, site)
    if (seen := counted(prior)) is not None:  # elements that the model masks need not be covered
        parts = num_parts(prior["fn"])
        log_prob = torch.where(seen.flatten(-parts).any(-1) if parts else seen, log_prob, 0.0)
    if (log_prob > -torch.inf).all():
        return None
    return spread(torch.where(log_prob == -torch.inf, -torch.inf, 0.0), site, layout, None) == -torch.inf


def _never_drawn(site: dict) -> Tensor:
    """Where a site's value has a density but is never drawn, with the batch shape.

    torch gives a class of probability 0 the log probability of a rounding error, and an angle beyond one turn the
    density of the equivalent angle within it.
    """
    distribution, value = site["fn"], site["value"]
    base, parts = innermost(distribution), num_parts(distribution)
    never = has_no_mass(base, value)
    never = never.expand(
        torch.broadcast_shapes(never.shape, distribution.batch_shape + distribution.event_shape[:parts])
    )
    seen = counted(site)
    never = never if seen is None else never & seen
    return never.flatten(-parts).any(-1) if parts else never


def _refuse_uncovered_values(pair: InspectedPair, name: str) -> None:
    """Sum p(x, z) over the values of one element of a discrete latent, and over those that the guide never draws."""
    proposal = pair.guide_trace.nodes[name]
    base, parts = innermost(proposal["fn"]), num_parts(proposal["fn"])
    shape = proposal["fn"].batch_shape + proposal["fn"].event_shape[:parts]
    event = (...,) + (None,) * len(base.event_shape)
    seen = counted(pair.model_trace.nodes[name])
    values, missed = [], []
    for value in _values_of(innermost(pair.model_trace.nodes[name]["fn"]), base):
        everywhere = value.to(proposal["value"]).expand(shape + base.event_shape)
        supported = base.support.check(everywhere).expand(shape)
        tried = torch.where(supported[event], everywhere, proposal["value"])
        never = ~supported | has_no_mass(base, tried) | (base.log_prob(tried) == -torch.inf)
        values.append(everywhere)
        missed.append(never & seen if seen is not None and seen.shape == never.shape else never)
    if not any(never.any() for never in missed):
        return
    for _ in range(_TRIES):
        here = _one_of_each(torch.stack(missed).any(0), parts, pair.layout)
        mass = [_log_joint(pair, name, torch.where(here[event], value, proposal["value"])) for value in values]
        lost = [
            _where_any(never & here, proposal, pair.layout, terms) for never, terms in zip(missed, mass, strict=True)
        ]
        share = (torch.stack(lost).logsumexp(0) - torch.stack(mass).logsumexp(0)).nan_to_num(-torch.inf)
        if (share > _LOG_SHARE).any():
            worst = max(range(len(values)), key=lambda index: lost[index].max().item())
            raise ValueError(
                f"the guide does not cover the prior at site '{name}': it never draws {_first(values[worst], base)}, "
                f"which prior and data allow, and what is never proposed is never counted; give each value a "
                f"probability above 0"
            )


def _where_any(elements: Tensor, site: dict, layout: Layout, terms: Tensor) -> Tensor:
    """The terms (1, N) of the data that have one of these elements of a site; -inf for the others."""
    dims = elements.ndim - len(site["fn"].batch_shape)
    marked = elements.flatten(-dims).any(-1) if dims else elements
    return torch.where(spread(marked.double(), site, layout, None) > 0, terms, -torch.inf)


def _first(value: Tensor, base: Any) -> Any:
    return value.reshape(-1, *base.event_shape)[0].tolist()


def _values_of(prior: Any, proposal: Any) -> Iterator[Tensor]:
    """Values of a discrete latent: all if they can be enumerated, else integers to just outside the guide's bounds."""
    with suppress(NotImplementedError):  # the total counts of the elements differ
        if prior.has_enumerate_support:
            yield from prior.enumerate_support(expand=False)[:_MOST_VALUES]
            return
    bounds, limits = bounds_of(proposal), bounds_of(prior)
    if bounds is None or limits is None or prior.event_shape or not (bounds[0].isfinite() & bounds[1].isfinite()).all():
        return
    low, high = int(max(bounds[0].min() - 4, limits[0].min())), int(min(bounds[1].max() + 4, limits[1].max()))
    yield from torch.arange(max(low, high - _MOST_VALUES), high + 1).to(torch.get_default_dtype())


def _refuse_uncovered_ranges(pair: InspectedPair, name: str) -> None:
    """Integrate p(x, z) over one element of a continuous latent, inside and outside the guide's bounds."""
    proposal, prior = (innermost(trace.nodes[name]["fn"]) for trace in (pair.guide_trace, pair.model_trace))
    bounds, limits = bounds_of(proposal), bounds_of(prior)
    value = pair.guide_trace.nodes[name]["value"]
    if bounds is None or limits is None or repeats(prior, value):
        return
    lower, upper, least, most = (bound.to(value).expand_as(value) for bound in (*bounds, *limits))
    width = torch.where(
        (upper - lower).isfinite(), upper - lower, torch.where(upper.isfinite(), upper, lower).abs().clamp_min(1)
    )
    for sign, bound, limit in ((1, upper, most), (-1, lower, least)):
        narrower = sign * (limit - bound) > 0
        if not narrower.any():
            continue
        event_dims = len(pair.guide_trace.nodes[name]["fn"].event_shape)
        here = _one_of_each(narrower, event_dims, pair.layout)
        outside = torch.where(limit.isfinite(), (limit - bound).abs(), 1e3 * width)
        inside = torch.where((upper - lower).isfinite(), width, 1e3 * width)
        missed = _log_integral(pair, name, here, bound, sign * outside)
        found = _log_integral(pair, name, here, bound, -sign * inside)
        share = (missed - torch.logaddexp(missed, found)).exp().nan_to_num(0.0).max().item()
        if share > math.exp(_LOG_SHARE):
            raise ValueError(
                f"the guide does not cover the prior at site '{name}': its support is {support_of(proposal)}, the "
                f"prior's {support_of(prior)}, and about {share:.2g} of p(x) lies between them for at least one datum; "
                f"what is never proposed is never counted, so give the guide the support of the prior, or of the "
                f"posterior"
            )


def _log_integral(pair: InspectedPair, name: str, here: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Log integral of p(x, z) over one element of a latent, from `start` to `start + length`, (1, N).

    Uses the midpoint rule, with points denser near the start.
    """
    value = pair.guide_trace.nodes[name]["value"]
    edges = torch.cat([torch.zeros(1), torch.logspace(-4, 0, _POINTS)]).to(value)
    terms = []
    for near, far in pairwise(edges):
        other = torch.where(here, start + length * (near + far) / 2, value)
        size = torch.where(here, length.abs() * (far - near), 0.0)
        site = pair.model_trace.nodes[name]
        widths = spread(size.reshape(*size.shape[: len(site["fn"].batch_shape)], -1).sum(-1), site, pair.layout, None)
        terms.append(_log_joint(pair, name, other) + widths.log())
    return torch.stack(terms).logsumexp(0)


def _log_joint(pair: InspectedPair, name: str, value: Tensor) -> Tensor:
    """log p(x, z), (1, N), with this value of one latent; -inf if the result is NaN."""
    density = log_joint_with(pair, {name: value}).double()
    return density.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _one_of_each(marked: Tensor, event_dims: int, layout: Layout) -> Tensor:
    """Mark one random element per datum among the marked ones; none if a datum has none."""
    axis = None if layout.dim is None else marked.ndim - event_dims + layout.dim
    rows = marked.unsqueeze(0) if axis is None else marked.movedim(axis, 0)
    flat = rows.reshape(len(rows), -1)
    chosen = torch.where(flat, torch.rand(flat.shape, device=flat.device) + 1, 0.0).argmax(1, keepdim=True)
    one = torch.zeros_like(flat).scatter(1, chosen, True) & flat
    one = one.reshape(rows.shape)
    return one.squeeze(0) if axis is None else one.movedim(0, axis)
