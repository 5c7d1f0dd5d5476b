"""The elements of x, called cells: moments of each under p(x|z), summed over weighted particles, and draws of them."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Independent

from pyrovae.distributions.binary import BinaryImages
from pyrovae.distributions.mixed import Categories, Mixed
from pyrovae.programs.masks import counted
from pyrovae.programs.supports import innermost
from pyrovae.programs.traces import Layout, arrange, sample_sites

__all__ = ["Cells", "ChosenLatents", "WeightedSums", "cells_of", "check_site", "drawn_cells"]


class Cells(NamedTuple):
    """What p(x|z) says of the D cells of each particle and datum, in float64.

    Attributes:
        mean: (S, B, D); NaN if there is none.
        variance: (S, B, D); NaN if there is none.
        categories: Probabilities (S, B, K) by cell.
    """

    mean: Tensor
    variance: Tensor
    categories: dict[int, Tensor]


def check_site(trace: Trace, name: str, x: Tensor, observed: Tensor, layout: Layout, num_particles: int | None) -> None:
    """Raise ValueError if the site does not hold x, or counts cells that are missing."""
    sites = dict(sample_sites(trace))
    if name not in sites:
        raise ValueError(f"the model has no site '{name}' that would hold x: found {sorted(sites)}; pass site=")
    site = sites[name]
    shape = site["fn"].batch_shape + site["fn"].event_shape
    rest = x[0].numel()
    if shape.numel() != (num_particles or 1) * x.numel():
        raise ValueError(
            f"site '{name}' has {shape.numel() // ((num_particles or 1) * len(x))} numbers per datum, and x has {rest}: "
            f"pass the site= that holds x, of its shape {tuple(x.shape)}"
        )
    if not site["is_observed"]:
        return
    value = _arranged(site["value"].expand(shape), site, layout, num_particles)[0]
    known = observed.flatten(1)
    if not torch.equal(torch.where(known, value, 0), torch.where(known, x.flatten(1).to(value), 0)):
        raise ValueError(f"site '{name}' does not observe x as it was passed: pass the site= that does")
    mask = counted(site)
    mask = torch.ones(shape, dtype=torch.bool, device=x.device) if mask is None else mask
    mask = mask[(...,) + (None,) * (len(shape) - mask.ndim)].expand(shape)
    if (_arranged(mask, site, layout, num_particles) & ~known).any():
        raise ValueError(
            f"site '{name}' counts cells in log p that observed= calls missing: mask its elements, for example "
            f"Normal(loc, scale).mask(observed).to_event(1)"
        )
    if (elements := _elements(site)).event_shape:
        raise ValueError(
            f"the cells of site '{name}' depend on each other given z ({type(elements).__name__} of event shape "
            f"{tuple(elements.event_shape)}), so the missing ones depend on the observed ones beyond z: use a "
            f"distribution of single cells, with .to_event({len(site['fn'].event_shape)})"
        )


def _elements(site: dict) -> Any:
    """The distribution of the single cells of a site."""
    elements = innermost(site["fn"])
    while isinstance(elements, Independent | BinaryImages):
        elements = innermost(elements.base_dist)
    return elements


def _arranged(values: Tensor, site: dict, layout: Layout, num_particles: int | None) -> Tensor:
    """Values of a site's batch and event shape, and any more dimensions, as (S, B, flattened rest)."""
    return arrange(values.reshape(*site["fn"].batch_shape, -1), site, layout, num_particles)


def cells_of(trace: Trace, name: str, layout: Layout, num_particles: int | None) -> Cells:
    site = trace.nodes[name]
    if not site["is_observed"]:
        value = _arranged(site["value"], site, layout, num_particles).double()
        return Cells(value, torch.zeros_like(value), {})
    shape = site["fn"].batch_shape + site["fn"].event_shape
    elements = _elements(site)
    mean, variance = (
        _arranged(moment.expand(shape), site, layout, num_particles).double() for moment in _moments(elements)
    )
    categories = {}
    for cell, part in enumerate(elements.parts if isinstance(elements, Mixed) else ()):
        if isinstance(part, Categories):
            categories[cell] = _arranged(part.logits.softmax(-1), site, layout, num_particles).double()
    if isinstance(elements, Categories):
        shares = elements.logits.softmax(-1).expand(*shape, -1)
        shares = _arranged(shares, site, layout, num_particles).double().unflatten(-1, (-1, elements.num_categories))
        categories = dict(enumerate(shares.unbind(-2)))
    return Cells(mean, variance, categories)


def _moments(elements: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of the cells; NaN if there is none."""
    if isinstance(elements, Mixed):
        moments = [_moments(part) for part in elements.parts]
        mean, variance = (torch.cat(torch.broadcast_tensors(*parts), -1) for parts in zip(*moments, strict=True))
        return mean, variance
    if isinstance(elements, Categories):
        unknown = elements.logits[..., 0] * math.nan
        return unknown, unknown
    try:
        mean = elements.mean
    except (NotImplementedError, AttributeError):
        mean = elements.sample() * math.nan
    try:
        variance = elements.variance
    except (NotImplementedError, AttributeError):
        variance = (elements.sample() - mean).square()  # right on average over the particles
    mean, variance = torch.broadcast_tensors(mean, variance)
    return mean, variance


def drawn_cells(trace: Trace, name: str, layout: Layout) -> Tensor:
    """A draw of the cells of one particle, (B, D)."""
    site = trace.nodes[name]
    shape = site["fn"].batch_shape + site["fn"].event_shape
    value = _elements(site).expand(shape).sample() if site["is_observed"] else site["value"]
    return _arranged(value, site, layout, None)[0]


class WeightedSums:
    """Weighted sums over the particles so far, relative to the largest weight so far.

    Means are shifted by those of the first chunk, so that their squares lose no digits.
    """

    def __init__(self) -> None:
        self.by_weight: list[Tensor] = []
        self.by_square: list[Tensor] = []

    def add(self, log_weights: Tensor, cells: Cells) -> None:
        """Add a chunk of particles with its log weights (S, B)."""
        if not self.by_weight:
            self.centre = cells.mean.mean(0)
            self.shift = torch.full_like(log_weights[0], -math.inf)
            self.cells = list(cells.categories)
        largest = torch.maximum(self.shift, log_weights.amax(0))
        finite = torch.where(largest.isneginf(), 0, largest)  # all weights are 0 so far
        weights, decay = (log_weights - finite).exp(), (self.shift - finite).exp()
        away = cells.mean - self.centre
        squared, one = away.square(), torch.ones_like(away[..., :1])
        first = [one, away, squared + cells.variance, *cells.categories.values()]
        self.by_weight = _added(self.by_weight, decay, weights, first)
        self.by_square = _added(self.by_square, decay.square(), weights.square(), [one, away, squared])
        self.shift = largest

    def results(self) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
        """Mean (B, D), posterior standard deviation, standard error of the mean, probabilities (B, K) by cell."""
        total, first, second, *shares = self.by_weight
        away = first / total
        std = (second / total - away.square()).clamp_min(0).sqrt()
        zeroth, linear, square = self.by_square
        spread = (square - 2 * away * linear + away.square() * zeroth).clamp_min(0)
        probabilities = {cell: share / total for cell, share in zip(self.cells, shares, strict=True)}
        return self.centre + away, std, spread.sqrt() / total, probabilities


def _added(sums: list[Tensor], decay: Tensor, weights: Tensor, values: list[Tensor]) -> list[Tensor]:
    new = [torch.einsum("sb,sbd->bd", weights, value) for value in values]
    return [old * decay[:, None] + part for old, part in zip(sums, new, strict=True)] if sums else new


class ChosenLatents:
    """Latents of M particles per datum, drawn in proportion to the weights of all particles so far.

    After each chunk, every one of the M is replaced by one of the chunk with the chunk's share of all weights, so that
    the particles need not be kept.
    """

    def __init__(self, num_draws: int, layout: Layout):
        self.num_draws, self.layout = num_draws, layout
        self.sites: dict[str, dict] = {}
        self.values: dict[str, Tensor] = {}  # each (M, *shape for one particle)
        self.log_total: Tensor | None = None

    def update(self, log_weights: Tensor, guide_trace: Trace, num_particles: int | None) -> None:
        """Choose among the particles so far and a chunk with log weights (S, B)."""
        if not self.num_draws:
            return
        log_sum = log_weights.logsumexp(0)
        log_total = log_sum if self.log_total is None else torch.logaddexp(self.log_total, log_sum)
        share = (log_sum - log_total).exp().nan_to_num(0)  # NaN: all weights are 0 so far
        weights = (log_weights - log_sum).exp().nan_to_num(1)
        particle = weights.T.multinomial(self.num_draws, replacement=True).T
        replaced = torch.rand_like(particle, dtype=share.dtype) < share
        for name, site in sample_sites(guide_trace):
            value, event_dim = site["value"], len(site["fn"].event_shape)
            if num_particles is None:
                value = value.unsqueeze(0)
            else:
                value = value.movedim(-1 - self.layout.max_plate_nesting - event_dim, 0)
            placed = [1] * value.ndim
            placed[0], placed[value.ndim + self.layout.dim - event_dim] = particle.shape
            candidates = value.take_along_dim(particle.reshape(placed), 0)
            if self.log_total is not None:
                candidates = torch.where(replaced.reshape(placed), candidates, self.values[name])
            self.values[name], self.sites[name] = candidates, site
        self.log_total = log_total

    def traces(self) -> Iterator[Trace]:
        """A trace to replay for each of the M."""
        for place in range(self.num_draws):
            trace = Trace()
            for name, site in self.sites.items():
                trace.add_node(name, **{**site, "value": self.values[name][place]})
            yield trace
