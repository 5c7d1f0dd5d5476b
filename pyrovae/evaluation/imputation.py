"""Missing values filled in by importance weights: posterior means and draws of what is missing, given what is observed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Independent

from pyrovae.common.arguments import check_count
from pyrovae.common.networks import check_mask, given
from pyrovae.common.reporting import progress_bar
from pyrovae.distributions.binary import BinaryImages
from pyrovae.distributions.mixed import Categories, Mixed
from pyrovae.evaluation.log_weights import can_vectorise, draw
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.evaluation.options import SamplingOptions, evaluation_of
from pyrovae.programs.masks import counted
from pyrovae.programs.pair import Block, Pair
from pyrovae.programs.particles import halved, refuse_more_than_memory
from pyrovae.programs.splitting import inspect
from pyrovae.programs.supports import innermost
from pyrovae.programs.traces import Layout, Program, arrange, sample_sites, trace_program

__all__ = ["Imputation", "impute"]


@dataclass(frozen=True, repr=False, kw_only=True)
class Imputation:
    """Data whose missing cells are filled in, with the evidence of how far to trust them; on the CPU.

    A cell is one element of a datum. Observed cells are those of the data in `mean` and `draws`, and have `std` and
    `stderr` 0.

    Attributes:
        mean: E[x | observed part], (N, *data_shape). Cells of categories (`likelihoods.Categories`), which have no mean,
            hold the most probable one. NaN if p(x|z) has no mean (Student t with df <= 1): take `draws` instead
        std: posterior standard deviation of each cell, (N, *data_shape); NaN for categories
        stderr: Monte Carlo standard error of `mean`, (N, *data_shape); NaN for categories and with one particle. It is
            too small if the ESS is small
        draws: draws from p(missing part | observed part), (M, N, *data_shape): as many completed data sets
        probabilities: posterior probabilities of the categories, (N, K), by the number of the cell: the column of a
            table, or the place in the flattened data_shape. Empty if no cell holds categories
        observed: mask of what was known, (N, *data_shape)
        evidence: log p(observed part) of each datum from the same weights, with its diagnostics
    """

    mean: Tensor
    std: Tensor
    stderr: Tensor
    draws: Tensor
    probabilities: dict[int, Tensor]
    observed: Tensor
    evidence: LogMarginalLikelihood

    @property
    def ess(self) -> Tensor:
        """Effective sample size, from 1 to S, (N,). Draws are independent only if there are far fewer of them."""
        return self.evidence.ess

    @property
    def pareto_k(self) -> Tensor:
        """Tail shape of the weights, (N,). Above `evidence.pareto_k_limit` the datum's imputation cannot be trusted."""
        return self.evidence.pareto_k

    def __len__(self) -> int:
        return len(self.mean)

    def summary(self) -> str:
        """Return a few lines to print: how much was missing, and whether to trust what was filled in."""
        missing, cells = int((~self.observed).sum()), self.observed.numel()
        return (
            f"imputed {missing:,} of {cells:,} cells ({missing / cells:.1%}); of the observed part:\n"
            f"{self.evidence.summary()}"
        )

    def __repr__(self) -> str:
        return (
            f"Imputation({len(self)} data, {int((~self.observed).sum()):,} of {self.observed.numel():,} cells imputed, "
            f"{len(self.draws)} draws, median ESS {self.ess.median():.1f} of {self.evidence.num_particles})"
        )


def impute(
    model: Program,
    guide: Program,
    x: Tensor,
    context: Tensor | None = None,
    *,
    observed: Tensor,
    num_particles: int = 1000,
    num_draws: int = 5,
    site: str = "x",
    plate: str | None = None,
    vectorize_particles: bool | Literal["auto"] = "auto",
    data_batch_size: int | Literal["auto"] | None = "auto",
    particle_batch_size: int | Literal["auto"] = "auto",
    progress: bool = False,
) -> Imputation:
    """Fill in missing values by self-normalised importance sampling.

        E[x_mis | x_obs]  =  sum_s w[s, n] E[x_mis | z_sn] / sum_s w[s, n],   w = p(x_obs, z) / q(z | x_obs)

    Draws take z from the particles in proportion to w (sampling importance resampling), then x_mis ~ p(x_mis | z).

    The programs are called as `model(x, context, observed=observed)`. If they are Pyro programs of your own, the model
    observes x at the site `site`, whose mask leaves out the missing cells: `Normal(loc, scale).mask(observed).to_event(1)`.
    If the missing cells are latents of both programs, as in models of data that are not missing at random, name their
    site, of the shape of x.

    Args:
        model: Pyro model with the argument `observed`.
        guide: Pyro guide, likewise.
        x: Data (N, *data_shape); missing cells may hold anything, NaN too.
        context: What the pair is conditioned on, (N, ...).
        observed: Mask of what is known, shaped like x.
        num_particles: S, per datum.
        num_draws: M, completed data sets to draw; 0 for none.
        site: Site of the model that holds x.
        plate: As in `log_marginal_likelihood`.
        vectorize_particles: As in `log_marginal_likelihood`.
        data_batch_size: As in `log_marginal_likelihood`.
        particle_batch_size: As in `log_marginal_likelihood`. Memory does not grow with S beyond the weights.
        progress: Show a progress bar.

    Returns:
        An `Imputation`: `.mean`, `.std`, `.draws`, and the diagnostics `.ess` and `.pareto_k` of each datum.

    Raises:
        TypeError: The mask is no tensor.
        ValueError: The mask has another shape than x; the model has no such site, counts missing cells in log p, or has
            cells that depend on each other given z; all weights of a datum are 0; and everything that
            `log_marginal_likelihood` refuses.

    References:
        Mattei & Frellsen, MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets (2019).
        Rubin, The calculation of posterior distributions by data augmentation: Comment (1987), for the draws.
    """
    options = SamplingOptions(
        num_particles=num_particles,
        plate=plate,
        vectorize_particles=vectorize_particles,
        data_batch_size=data_batch_size,
        particle_batch_size=particle_batch_size,
        progress=progress,
    )
    num_draws = check_count("num_draws", num_draws, 0)
    more, _ = given(context)
    with evaluation_of(model, guide, args=(x, *more), kwargs={"observed": observed}) as (device, args, kwargs):
        kwargs["observed"] = check_mask(kwargs["observed"], args[0])
        refuse_more_than_memory("num_particles", options.num_particles, device)
        pair = inspect(model, guide, args, kwargs, options.plate, options.data_batch_size)
        _check_layout(pair, len(args[0]))
        # Moments of all cells pass through at once, beside the latents.
        pair = replace(pair, row_size=max(pair.row_size, args[0][0].numel()))
        blocks = list(_impute_blocks(pair, options, num_draws, site))
    first = blocks[0]
    joined: dict[str, Any] = {
        name: torch.cat([getattr(block, name) for block in blocks]) for name in ("mean", "std", "stderr", "observed")
    }
    return replace(
        first,
        **joined,
        draws=torch.cat([block.draws for block in blocks], 1),
        probabilities={
            cell: torch.cat([block.probabilities[cell] for block in blocks]) for cell in first.probabilities
        },
        evidence=LogMarginalLikelihood.concatenate([block.evidence for block in blocks]),
    )


def _check_layout(pair: Pair, num_data: int) -> None:
    layout = pair.layout
    if layout.dim is None or layout.subsampled or layout.num_data != num_data:
        found = (
            "no plate with a dimension" if layout.dim is None else f"{layout.num_data} data in plate '{layout.plate}'"
        )
        raise ValueError(
            f"imputation needs one plate over all {num_data} rows of x, found {found}: write pyro.plate('data', len(x), "
            f"dim=-1) without a subsample size around the latents and the site of x"
        )


def _impute_blocks(pair: Pair, options: SamplingOptions, num_draws: int, site: str) -> Iterator[Imputation]:
    num_particles = options.num_particles
    block_size, chunk_size = pair.sizes(num_particles, options.data_batch_size, options.particle_batch_size)
    vectorised = can_vectorise(pair, block_size, options.vectorize_particles)
    with progress_bar("imputation", pair.num_data, "data", options.progress) as bar:
        for start, stop in pair.blocks(block_size):
            done, chunk_size = _impute_block(
                pair, pair.block(start, stop), start, chunk_size, vectorised, options, num_draws, site
            )
            yield done
            bar.update(stop - start)


@torch.no_grad()
def _impute_block(
    pair: Pair,
    block: Block,
    start: int,
    chunk_size: int,
    vectorised: bool,
    options: SamplingOptions,
    num_draws: int,
    site: str,
) -> tuple[Imputation, int]:
    """The imputation of a block of data, and the chunk size that memory allows."""
    x, observed, layout = block.args[0], block.kwargs["observed"], block.layout
    log_weights = torch.empty(0)
    sums, chosen, drawn = _Sums(), _Chosen(num_draws, layout), 0
    while drawn < options.num_particles:
        size = min(chunk_size, options.num_particles - drawn) if vectorised else None
        too_many = None
        try:
            chunk = draw(pair, block, size)
            if not drawn:
                _check_site(chunk.model_trace, site, x, observed, layout, size)
            cells = _cells(chunk.model_trace, site, layout, size)
        except torch.OutOfMemoryError as error:
            too_many = error.with_traceback(None)  # the frames of the traceback keep large tensors alive
        if too_many is not None:
            chunk_size = halved(size, layout.num_data, too_many)
            continue
        weights = chunk.log_weights.double()
        sums.add(weights, cells)
        chosen.update(weights, chunk.guide_trace, size)
        if not drawn:
            log_weights = chunk.log_weights.new_empty(options.num_particles, layout.num_data)
        log_weights[drawn : drawn + len(weights)] = chunk.log_weights
        drawn += len(weights)
    if (impossible := log_weights.isneginf().all(0)).any():
        raise ValueError(
            f"all {options.num_particles:,} weights are 0 for {int(impossible.sum()):,} data, the first of them row "
            f"{start + int(impossible.nonzero()[0])}: use more particles, or a guide that covers the model's mass"
        )
    mean, std, stderr, probabilities = sums.results()
    if options.num_particles == 1:
        stderr = torch.full_like(stderr, math.nan)

    def filled(cells: Tensor, known: Tensor | float) -> Tensor:
        return torch.where(observed, known, cells.reshape(x.shape).to(x.dtype)).cpu()

    flat, known = x.flatten(1), observed.flatten(1)
    for cell, shares in probabilities.items():
        mean[:, cell] = shares.argmax(-1).double()
        is_code = flat[:, cell, None] == torch.arange(shares.shape[-1], device=x.device)
        probabilities[cell] = torch.where(known[:, cell, None], is_code.to(x.dtype), shares.to(x.dtype)).cpu()
    draws = [
        filled(_sampled(trace_program(pair.model, block.args, block.kwargs, layout.pinned, latents), site, layout), x)
        for latents in chosen.traces()
    ]
    result = Imputation(
        mean=filled(mean, x),
        std=filled(std, 0.0),
        stderr=filled(stderr, 0.0),
        draws=torch.stack(draws) if draws else x.new_empty(0, *x.shape).cpu(),
        probabilities=probabilities,
        observed=observed.cpu(),
        evidence=LogMarginalLikelihood.from_log_weights(log_weights),
    )
    return result, chunk_size


class _Cells(NamedTuple):
    """What p(x|z) says of the D cells of each particle and datum, in float64.

    Attributes:
        mean: (S, B, D); NaN if there is none.
        variance: (S, B, D); NaN if there is none.
        categories: Probabilities (S, B, K) by cell.
    """

    mean: Tensor
    variance: Tensor
    categories: dict[int, Tensor]


def _check_site(
    trace: Trace, name: str, x: Tensor, observed: Tensor, layout: Layout, num_particles: int | None
) -> None:
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


def _cells(trace: Trace, name: str, layout: Layout, num_particles: int | None) -> _Cells:
    site = trace.nodes[name]
    if not site["is_observed"]:
        value = _arranged(site["value"], site, layout, num_particles).double()
        return _Cells(value, torch.zeros_like(value), {})
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
    return _Cells(mean, variance, categories)


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


def _sampled(trace: Trace, name: str, layout: Layout) -> Tensor:
    """A draw of the cells of one particle, (B, D)."""
    site = trace.nodes[name]
    shape = site["fn"].batch_shape + site["fn"].event_shape
    value = _elements(site).expand(shape).sample() if site["is_observed"] else site["value"]
    return _arranged(value, site, layout, None)[0]


class _Sums:
    """Weighted sums over the particles so far, relative to the largest weight so far.

    Means are shifted by those of the first chunk, so that their squares lose no digits.
    """

    def __init__(self) -> None:
        self.by_weight: list[Tensor] = []
        self.by_square: list[Tensor] = []

    def add(self, log_weights: Tensor, cells: _Cells) -> None:
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


class _Chosen:
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
