"""Log densities of a trace, per datum: those of each site, the joint, and the log weights (S, N) of model and guide."""

import math
from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyrovae.common.arguments import checks_values
from pyrovae.programs.enumeration import SummedOut, contracted, holds_sums, is_summed, summed_dims
from pyrovae.programs.masks import align_masks, unmasked
from pyrovae.programs.supports import has_no_mass, innermost, is_possible, supported_elements
from pyrovae.programs.traces import (
    PARTICLES,
    Layout,
    Program,
    arrange,
    check_data,
    run_pair,
    sample_sites,
    sequential_column,
    spread,
    trace_program,
)

__all__ = [
    "InspectedPair",
    "log_density_of",
    "log_density_of_tables",
    "log_joint_of",
    "log_joint_with",
    "log_likelihood_of",
    "log_weights_of",
    "site_log_prob",
    "summed_posterior",
    "summed_sites",
    "table_of",
    "values_of_sum",
]

_HALF = (torch.float16, torch.bfloat16)


class InspectedPair(NamedTuple):
    """A model and a guide with their arguments, and one run of each: the model is run on the guide's draws.

    A program with sites to sum out is a `SummedOut`; its trace is of a run at drawn values of these sites, left out.
    """

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

    def log_weights(self) -> Tensor:
        """Log weights (1, N) of the traces."""
        if isinstance(self.model, SummedOut) or isinstance(self.guide, SummedOut):
            traces = run_pair(self.model, self.guide, self.args, self.kwargs, self.layout.pinned, self.guide_trace)
            return log_weights_of(self.layout, *traces)
        return log_weights_of(self.layout, self.model_trace, self.guide_trace)


def log_weights_of(
    layout: Layout, model_trace: poutine.Trace, guide_trace: poutine.Trace, num_particles: int | None = None
) -> Tensor:
    """Log weights (S, N) of a pair of traces; (1, N) of traces without a particle plate."""
    latents = {name for name, site in sample_sites(model_trace) if not site["is_observed"]}
    if missing := sorted(latents - set(guide_trace.nodes)):
        raise ValueError(f"the guide left out the model's latent site(s) {missing} in one of its runs")
    sites = align_masks(dict(sample_sites(model_trace)), dict(sample_sites(guide_trace)))
    if holds_sums(model_trace) or holds_sums(guide_trace):
        return _log_weights_of_sums(layout, (model_trace, guide_trace), sites, num_particles)
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


def _log_weights_of_sums(
    layout: Layout, traces: tuple[poutine.Trace, poutine.Trace], sites: tuple[dict, dict], num_particles: int | None
) -> Tensor:
    model, guide = (
        log_density_of(layout, {**own, **summed_sites(trace)}, num_particles)
        for trace, own in zip(traces, sites, strict=True)
    )
    total = torch.where(model == -torch.inf, model, model - guide)
    if checks_values() and not (total < torch.inf).all():
        for program, trace, own in zip(("model", "guide"), traces, sites, strict=True):
            for name, site in {**own, **summed_sites(trace)}.items():
                if not (table_of(site) < torch.inf).all():
                    raise ValueError(
                        f"the log density of site '{name}' of the {program} is NaN or +inf, so there is no log weight: "
                        f"look for NaN in the data or parameters (also at values of a summed site that are impossible), "
                        f"or for an unbounded density"
                    )
        raise ValueError("a log weight is NaN or +inf: the guide drew a value to which it gives no density")
    return total


def summed_sites(trace: poutine.Trace) -> dict[str, dict]:
    """The sites of a trace that are summed out, by name."""
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample" and is_summed(site)}


def log_density_of(layout: Layout, sites: dict[str, dict], num_particles: int | None) -> Tensor:
    """Log density (S, N) of sites of one program, or (1, N); sums over the values of those that are summed out."""
    if not any(map(is_summed, sites.values())):
        terms = (spread(site_log_prob(site), site, layout, num_particles) for site in sites.values())
        return reduce(add, terms, torch.zeros(()))
    return log_density_of_tables(layout, [(site, table_of(site)) for site in sites.values()])


def log_density_of_tables(layout: Layout, tables: list[tuple[dict, Tensor]]) -> Tensor:
    """`log_density_of` for sites of which some are summed out, each with its log density."""
    for site, table in tables:
        check_data(table, site, layout)
    if not layout.sequential:
        kept = [PARTICLES, "" if layout.plate is None else layout.plate]
        return contracted(tables, kept)
    apart: dict[int, list[tuple[dict, Tensor]]] = {column: [] for column in range(layout.num_data)}
    for site, table in tables:
        apart[sequential_column(site, layout)].append((site, table))
    columns = [contracted(own, [PARTICLES]) for own in apart.values()]
    return torch.stack(torch.broadcast_tensors(*columns), 1)


def table_of(site: dict) -> Tensor:
    """`site_log_prob`; for a summed site unmasked, so that masked elements sum to 1, and -inf at probability 0."""
    if not is_summed(site):
        return site_log_prob(site)
    distribution = unmasked(site["fn"])
    log_prob = site_log_prob({**site, "fn": distribution, "mask": None})
    # torch rounds a probability of 0 up to eps.
    rounded = log_prob > math.log(torch.finfo(log_prob.dtype).tiny)
    return torch.where(has_no_mass(innermost(distribution), site["value"]) & rounded, -torch.inf, log_prob)


def summed_posterior(
    layout: Layout, model_trace: poutine.Trace, guide_trace: poutine.Trace, name: str, num_particles: int | None
) -> Tensor:
    """p(y | x, z) of a summed site y at the values of the other latents, (S, N, elements of y per datum, K).

    It is the derivative of log p(x, z), a log of a sum, with respect to the terms log p(y).
    """
    model, _ = align_masks(dict(sample_sites(model_trace)), dict(sample_sites(guide_trace)))
    tables = {key: (site, table_of(site)) for key, site in {**model, **summed_sites(model_trace)}.items()}
    site, table = tables[name]
    dim = site["infer"]["_enumerate_dim"]
    with torch.enable_grad():
        table = table.detach().reshape((1,) * (-dim - table.ndim) + table.shape).requires_grad_()
        total = log_density_of_tables(layout, list({**tables, name: (site, table)}.values()))
        (share,) = torch.autograd.grad(total.sum(), table)
    for other in summed_dims(site, table.shape):  # values of its parents
        share = share if other == dim else share.sum(other, keepdim=True)
    num_values = share.shape[dim]
    return arrange(share.movedim(dim, -1), site, layout, num_particles).unflatten(2, (-1, num_values))


def values_of_sum(site: dict) -> Tensor:
    """The list of a summed site's values, (K, *event_shape)."""
    shape = site["fn"].event_shape
    return site["value"].movedim(site["infer"]["_enumerate_dim"] - len(shape), 0).reshape(-1, *shape)


def log_likelihood_of(layout: Layout, model_trace: poutine.Trace) -> Tensor:
    """Log density (1, N) of observed sites and factors, in a trace without a particle plate; 0 if there are none."""
    terms = [
        spread(site_log_prob(site), site, layout, None) for _, site in sample_sites(model_trace) if site["is_observed"]
    ]
    return reduce(add, terms) if terms else torch.zeros(())


def log_joint_of(layout: Layout, model_trace: poutine.Trace) -> Tensor:
    """Log density (1, N) of all sites, in a trace without a particle plate."""
    if holds_sums(model_trace):
        return log_density_of(layout, {**dict(sample_sites(model_trace)), **summed_sites(model_trace)}, None)
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
        if (inside := is_possible(site)) is not None:  # NaN has no density, which `possible` does not say
            log_prob = torch.where(inside, log_prob, torch.nan)
    except NotImplementedError as error:
        raise ValueError(
            f"the distribution of site '{site['name']}' ({type(innermost(distribution)).__name__}) has no log density "
            f"of given values ({error or type(error).__name__}), for example because of a transform that is no "
            f"bijection (softmax): use a distribution with a log density"
        ) from error
    except KeyError as error:  # of Pyro's transforms without an inverse (planar, radial, Sylvester)
        raise ValueError(
            f"the density of site '{site['name']}' can be computed at its own latest draw alone, because its transform "
            f"has no inverse, and it is needed at other values ({error}): use a flow with an inverse, such as "
            f"pyrovae.guides.NeuralSplineFlow or Pyro's spline_coupling"
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
