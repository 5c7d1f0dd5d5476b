"""Particles of a model/guide pair with gradients, for the objectives to differentiate.

Estimators that omit the guide's score (sticking the landing, DReG) need d log q(z; phi) / dz at fixed phi, for any
guide, whoever owns its parameters. Detached copies of the parameters would require a second run of the guide, and a
VampPrior shares these parameters. Instead, each draw is cut: the guide continues with a leaf in its place, and the
model receives the draw through `_Bridge`, which passes the gradient at the leaf back to the draw. This takes one run,
so dropout and batch statistics are the same in draw and density. Its cost: the density is evaluated at the leaf, which
is not the tensor drawn, so a flow that caches the density of its own draw must invert it (an autoregressive flow in D
passes).
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution

from pyrovae.programs.enumeration import SummedOut, holds_sums
from pyrovae.programs.layout import is_subsampled, is_weighted, plate_scale, scaled_up_to
from pyrovae.programs.log_densities import log_density_of, summed_sites
from pyrovae.programs.masks import align_masks
from pyrovae.programs.traces import Layout, Program, arrange, place, plate_size, sample_sites, under_particles

__all__ = ["Run", "Terms", "arranged", "draw_runs", "factors", "pull_back", "terms_of", "without_weights"]

_ALL = "all sites"  # name of the item of a guide whose sites are summed out


class Run(NamedTuple):
    """One run of guide and model: of all particles under an outer plate, or of a single particle.

    Attributes:
        layout: plates of the program, with the number of data of this run
        num_particles: number of particles under the outer plate; None without it
        full_size: size of the data if the plate is subsampled; None otherwise
        model_trace: trace of the model
        guide_trace: trace of the guide
        drawn_trace: the same, unless the guide's sites are summed out: then the run that drew one value of each
        paths: how gradients get from cut draws to the guide; None if nothing was cut
        link: a zero that carries the gradient of `pull_back`; None if nothing was cut
    """

    layout: Layout
    num_particles: int | None
    full_size: int | None
    model_trace: poutine.Trace
    guide_trace: poutine.Trace
    drawn_trace: poutine.Trace
    paths: "_Paths | None"
    link: Tensor | None

    @property
    def plate_scale(self) -> float:
        """Factor that scales sums over the data of this run to the full data."""
        if self.layout.plate is None or self.full_size is None:
            return 1.0
        return self.full_size / self.layout.num_data


def draw_runs(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    layout: Layout,
    num_particles: int,
    vectorised: bool,
    cut: bool,
) -> list[Run]:
    """Return runs that hold `num_particles` particles between them, all of the same subsample of the data."""
    size = num_particles if vectorised and num_particles > 1 else None
    if size is not None:
        model, guide = (under_particles(program, layout, size) for program in (model, guide))
    clean = model.clean if isinstance(model, SummedOut) else lambda trace: trace
    sums, drawing = (guide, guide.drawn) if isinstance(guide, SummedOut) else (None, guide)
    runs: list[Run] = []
    for _ in range(num_particles if size is None else 1):
        if len(runs) == 1:  # once: a thousand wrappers are more than Python can call through
            pinned = clean(_subsamples(runs[0].model_trace, runs[0].guide_trace))
            model, drawing = (poutine.replay(program, trace=pinned) for program in (model, drawing))
        with _Cut(cut) as draws:
            guide_trace = drawn_trace = poutine.trace(drawing).get_trace(*args, **kwargs)
        if sums is not None:
            density = poutine.replay(sums, trace=sums.clean(drawn_trace))
            guide_trace = poutine.trace(density).get_trace(*args, **kwargs)
        _keep_densities(guide_trace)
        paths, link, replayed = None, None, drawn_trace if sums is None else sums.clean(drawn_trace)
        if draws.drawn:
            paths = _Paths(draws.drawn, draws.leaves)
            *values, link = _Bridge.apply(paths, *paths.drawn)
            replayed = _changed(
                replayed, {name: {"value": value} for name, value in zip(paths.names, values, strict=True)}
            )
        model_trace = poutine.trace(poutine.replay(model, trace=clean(replayed))).get_trace(*args, **kwargs)
        aligned = align_masks(dict(sample_sites(model_trace)), dict(sample_sites(guide_trace)))
        for trace, sites in zip((model_trace, guide_trace), aligned, strict=True):
            trace.nodes.update(sites)
        present, full_size = _present_layout(layout, model_trace)
        runs.append(Run(present, size, full_size, model_trace, guide_trace, drawn_trace, paths, link))
    return runs


def _keep_densities(trace: poutine.Trace) -> None:
    """Compute the densities of flows at their draws now: a flow without an inverse (planar) knows only that of its last draw."""
    for name, site in sample_sites(trace):
        if isinstance(site["fn"], TransformedDistribution):
            trace.nodes[name]["kept"] = site["fn"], _density(site)


def _present_layout(layout: Layout, trace: poutine.Trace) -> tuple[Layout, int | None]:
    """Return the layout with the datum plate's size in this run (the last batch may be smaller), and the full size."""
    if layout.plate is None:
        return layout, scaled_up_to(trace)
    sites = [site for _, site in sample_sites(trace)]
    frames = (frame for site in sites for frame in site["cond_indep_stack"])
    frame = next(frame for frame in frames if frame.name == layout.plate)
    full_size = frame.full_size if is_subsampled(frame) else None
    return layout._replace(num_data=plate_size(frame, *sites)), full_size


def without_weights(runs: Sequence[Run]) -> Sequence[Run]:
    """The same runs with the scales of their subsampled plates alone; `runs` itself if no site has another (`poutine.scale`)."""
    sites = [site for trace in (runs[0].model_trace, runs[0].guide_trace) for _, site in sample_sites(trace)]
    if not any(map(is_weighted, sites)):
        return runs
    return [
        run._replace(model_trace=_by_plates(run.model_trace), guide_trace=_by_plates(run.guide_trace)) for run in runs
    ]


def _by_plates(trace: poutine.Trace) -> poutine.Trace:
    return _changed(trace, {name: {"scale": plate_scale(site)} for name, site in sample_sites(trace)})


def _subsamples(*traces: poutine.Trace) -> poutine.Trace:
    pinned = poutine.Trace()
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and site_is_subsample(site) and name not in pinned:
                pinned.add_node(name, **site)
    return pinned


def _changed(trace: poutine.Trace, fields: dict[str, dict[str, Any]]) -> poutine.Trace:
    """A copy of the trace with other fields of some of its sites."""
    changed = poutine.Trace()
    for name, site in trace.nodes.items():
        changed.add_node(name, **{**site, **fields.get(name, {})})
    return changed


class _Cut(Messenger):
    """Replaces every draw that carries a gradient by a leaf; enter it outside the trace, which then records the leaf."""

    def __init__(self, cut: bool):
        super().__init__()
        self.cut = cut
        self.drawn: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}

    def _pyro_post_sample(self, message: Any) -> None:
        name, value = message["name"], message["value"]
        if self.cut and not message["is_observed"] and isinstance(value, Tensor) and value.requires_grad:
            self.drawn[name] = value
            self.leaves[name] = message["value"] = value.detach().requires_grad_()


class _Paths:
    """The cut draws of a run, and how gradients at the leaves become gradients of the draws.

    It must not refer to anything computed after the bridge, which refers to it: autograd never frees a reference cycle
    through its graph.
    """

    def __init__(self, drawn: dict[str, Tensor], leaves: dict[str, Tensor]):
        self.names, self.drawn, self.leaves = list(drawn), list(drawn.values()), list(leaves.values())
        self.rates: list[Tensor | None] = [None] * len(self.names)
        self.added: list[Tensor | None] = [None] * len(self.names)

    def back(self, gradients: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
        """Return the loss's gradient with respect to each draw, from the gradients that the model sends to its values.

        factor: coefficient of the link in the loss

        A leaf also affects later draws of a guide with several layers, so the last draw comes first.
        """
        total = [
            (gradient if rate is None else rate * gradient) + (0.0 if added is None else factor * added)
            for gradient, rate, added in zip(gradients, self.rates, self.added, strict=True)
        ]
        for later in range(len(total) - 1, 0, -1):
            earlier = torch.autograd.grad(
                self.drawn[later], self.leaves[:later], total[later], retain_graph=True, allow_unused=True
            )
            for index, gradient in enumerate(earlier):
                if gradient is not None:
                    total[index] = total[index] + gradient
        return total


class _Bridge(torch.autograd.Function):
    """Passes the draws on unchanged; in the backward pass, their gradients go through `_Paths.back`."""

    @staticmethod
    def forward(context: Any, paths: _Paths, *drawn: Tensor) -> tuple[Tensor, ...]:
        context.paths = paths
        return *(value.clone() for value in drawn), drawn[0].new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple:
        return None, *context.paths.back(gradients[:-1], gradients[-1])


def pull_back(runs: Sequence[Run], guide_term: Tensor, rate: Tensor | None = None) -> Tensor:
    """Return zero, with the gradient of `guide_term` through the cut draws alone, the guide's parameters held fixed.

        d pull_back / d phi = sum dz/dphi d guide_term/dz

    Without this term in the loss, no gradient gets from the model to the guide.

    Args:
        runs: runs with cut draws
        guide_term: a sum over the guide's log densities at the leaves
        rate: (S, N), factor on the gradient that the loss's model terms send to the draws
    """
    leaves = [leaf for run in runs if run.paths is not None for leaf in run.paths.leaves]
    if not leaves:
        return guide_term.new_zeros(())
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if guide_term.requires_grad:
        gradients = torch.autograd.grad(guide_term, leaves, retain_graph=True, allow_unused=True)
    added = iter(gradients)
    for particle, run in enumerate(runs):
        if run.paths is None:
            continue
        rows = rate if rate is None or run.num_particles is not None else rate[particle : particle + 1]
        for index, name in enumerate(run.paths.names):
            run.paths.added[index] = next(added)
            if rows is not None:
                run.paths.rates[index] = place(rows, run.guide_trace.nodes[name], run.layout, run.num_particles)
    return torch.stack([run.link for run in runs if run.link is not None]).sum()


class Terms(NamedTuple):
    """Log densities of all particles, by site. G: number of factors that a site's density is split into.

    Attributes:
        likelihood: (S, N); log p(x, z) if sites are summed out, because such a sum has no parts
        priors: latent site -> (S, N, G), with fewer than S rows if the density does not depend on the particle; empty
            if sites are summed out
        guides: guide site -> (S, N, G), likewise; one item for all of a guide with sites that are summed out
        score: (S, N), the guide's log density of draws that are not reparameterised, unscaled; None without such draws
        sizes: latent site -> its latent dimensions per datum
        has_parts: whether no site is summed out
    """

    likelihood: Tensor
    priors: dict[str, Tensor]
    guides: dict[str, Tensor]
    score: Tensor | None
    sizes: dict[str, int]
    has_parts: bool


def terms_of(runs: Sequence[Run], *, scaled: bool, by_dimension: bool = False) -> Terms:
    """Compute the log densities of runs, with masks applied.

    Args:
        runs: runs of model and guide
        scaled: multiply by the scale of each site (subsampled plates, poutine.scale)
        by_dimension: split a density into single latent dimensions if it is a product over dimensions
    """

    def gather(trace: str, name: str, scaled: bool = scaled, by_dimension: bool = by_dimension) -> Tensor:
        sites = [(run, getattr(run, trace).nodes[name]) for run in runs]
        return torch.cat([arranged(_log_prob(site, by_dimension), site, run, scaled) for run, site in sites])

    model, guide = dict(sample_sites(runs[0].model_trace)), dict(sample_sites(runs[0].guide_trace))
    guide_sums = holds_sums(runs[0].guide_trace)
    has_parts = not guide_sums and not holds_sums(runs[0].model_trace)
    latents = [name for name, site in model.items() if has_parts and not site["is_observed"]]
    if has_parts:
        likelihoods = [gather("model_trace", name, by_dimension=False).sum(-1) for name in model if name not in latents]
    else:
        likelihoods = [torch.cat([_log_density(run, run.model_trace, scaled) for run in runs])]
    scores = [
        gather("drawn_trace", name, False, False).sum(-1)
        for name, site in sample_sites(runs[0].drawn_trace)
        if not site["fn"].has_rsample
    ]
    per_run = (runs[0].num_particles or 1) * runs[0].layout.num_data
    priors = {name: gather("model_trace", name) for name in latents}
    if guide_sums:
        guides = {_ALL: torch.cat([_log_density(run, run.guide_trace, scaled) for run in runs]).unsqueeze(-1)}
    else:
        guides = {name: gather("guide_trace", name) for name in guide}
    return Terms(
        reduce(add, likelihoods) if likelihoods else torch.zeros_like(next(iter(priors.values()))[..., 0]),
        priors,
        guides,
        reduce(add, scores) if scores else None,
        {name: max(1, guide[name]["value"].numel() // per_run) for name in latents},
        has_parts,
    )


def _log_density(run: Run, trace: poutine.Trace, scaled: bool) -> Tensor:
    """Return log p(x, z) or log q(z|x), (S, N), with all values of the summed sites added up."""
    sites = {**dict(sample_sites(trace)), **summed_sites(trace)}
    total = log_density_of(run.layout, sites, run.num_particles)
    total = total.expand(run.num_particles or 1, run.layout.num_data)
    # No other scale is accepted for programs with sums.
    return run.plate_scale * total if scaled else total


def _log_prob(site: dict, by_dimension: bool) -> Tensor:
    """Return the log density of a site (*batch_shape, G)."""
    distribution, depth = site["fn"], 0
    if by_dimension:
        distribution, depth = factors(distribution)
    kept_of, kept = site.get("kept", (None, None))
    log_prob = kept if distribution is kept_of else _density({**site, "fn": distribution})
    if log_prob.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"the log density of site '{site['name']}' is in {log_prob.dtype}, whose steps are "
            f"{100 * torch.finfo(log_prob.dtype).eps:g} nats at 100 nats, too coarse for an objective: use model.float(), "
            f"guide.float() and float32 data; precision='bf16' of fit computes the layers alone in bfloat16"
        )
    return log_prob.flatten(log_prob.ndim - depth) if depth else log_prob.unsqueeze(-1)


def _density(site: dict) -> Tensor:
    try:
        return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except KeyError as error:  # of Pyro's transforms without an inverse
        raise ValueError(
            f"the density of site '{site['name']}' cannot be computed at a given value, as its transform has no "
            f"inverse: take MonteCarloKL or ImportanceWeighted, or a flow with an inverse ({error})"
        ) from error


def factors(distribution: Any) -> tuple[Any, int]:
    """Return the distribution of single dimensions and its number of axes; `distribution` and 0 if it is no product."""
    inner, depth = distribution, 0
    while isinstance(inner, Independent):
        inner, depth = inner.base_dist, depth + inner.reinterpreted_batch_ndims
    return (inner, depth) if len(inner.event_shape) == 0 else (distribution, 0)


def arranged(terms: Tensor, site: dict, run: Run, scaled: bool) -> Tensor:
    """Arrange terms (*batch_shape, G) of a site as (S, N, G), masked and scaled as the site is."""
    scale, mask = (
        tensor.unsqueeze(-1) if isinstance(tensor, Tensor) and tensor.ndim else tensor
        for tensor in (site["scale"] if scaled else 1.0, site["mask"])
    )
    return arrange(scale_and_mask(terms, scale, mask), site, run.layout, run.num_particles)
