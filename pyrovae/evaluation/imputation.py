"""Missing values filled in by importance weights: posterior means and draws of what is missing, given what is observed."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae.common.arguments import check_count
from pyrovae.common.networks import check_mask, given
from pyrovae.evaluation.cells import Cells, ChosenLatents, WeightedSums, cells_of, check_site, drawn_cells
from pyrovae.evaluation.drawing import Drawn, draw, draw_blocks
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.evaluation.opening import SamplingOptions, opened
from pyrovae.programs.pair import Block, Pair
from pyrovae.programs.particles import collect_chunks
from pyrovae.programs.traces import Program, trace_program

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

    def with_mask(args: tuple, kwargs: dict[str, Any]) -> tuple[Program, Program, tuple, dict[str, Any]]:
        return model, guide, args, {"observed": check_mask(kwargs["observed"], args[0])}

    with opened(model, guide, (x, *more), {"observed": observed}, options, with_mask, evaluation=impute) as pair:
        _check_layout(pair, len(pair.args[0]))
        # Moments of all cells pass through at once, beside the latents.
        pair = replace(pair, row_size=max(pair.row_size, pair.args[0][0].numel()))
        of_block = partial(_impute_block, pair, options.num_particles, num_draws, site)
        blocks = list(draw_blocks(pair, options, of_block, "imputation"))
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


@torch.no_grad()
def _impute_block(
    pair: Pair, num_particles: int, num_draws: int, site: str, block: Block, start: int, chunk_size: int | None
) -> tuple[Imputation, int | None]:
    """The imputation of a block of data, and the chunk size that memory allows."""
    x, observed, layout = block.args[0], block.kwargs["observed"], block.layout
    sums, chosen = WeightedSums(), ChosenLatents(num_draws, layout)

    def chunk(size: int | None, is_first: bool) -> tuple[Drawn, Cells, int | None]:
        drawn = draw(pair, block, size)
        if is_first:
            check_site(drawn.model_trace, site, x, observed, layout, size)
        return drawn, cells_of(drawn.model_trace, site, layout, size), size

    def use(chunk: tuple[Drawn, Cells, int | None]) -> Tensor:
        drawn, cells, size = chunk
        weights = drawn.log_weights.double()
        sums.add(weights, cells)
        chosen.update(weights, drawn.guide_trace, size)
        return drawn.log_weights

    log_weights, chunk_size = collect_chunks(chunk, use, num_particles, chunk_size, layout.num_data)
    if (impossible := log_weights.isneginf().all(0)).any():
        raise ValueError(
            f"all {num_particles:,} weights are 0 for {int(impossible.sum()):,} data, the first of them row "
            f"{start + int(impossible.nonzero()[0])}: use more particles, or a guide that covers the model's mass"
        )
    mean, std, stderr, probabilities = sums.results()
    if num_particles == 1:
        stderr = torch.full_like(stderr, math.nan)

    def filled(cells: Tensor, known: Tensor | float) -> Tensor:
        return torch.where(observed, known, cells.reshape(x.shape).to(x.dtype)).cpu()

    flat, known = x.flatten(1), observed.flatten(1)
    for cell, shares in probabilities.items():
        mean[:, cell] = shares.argmax(-1).double()
        is_code = flat[:, cell, None] == torch.arange(shares.shape[-1], device=x.device)
        probabilities[cell] = torch.where(known[:, cell, None], is_code.to(x.dtype), shares.to(x.dtype)).cpu()
    draws = [
        filled(drawn_cells(trace_program(pair.model, block.args, block.kwargs, layout.pinned, trace), site, layout), x)
        for trace in chosen.traces()
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
