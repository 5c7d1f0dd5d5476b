"""p(y | x) of a class that is summed out of the model, by importance weights."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae.evaluation.drawing import draw, draw_blocks
from pyrovae.evaluation.opening import SamplingOptions, opened
from pyrovae.programs.enumeration import SummedOut
from pyrovae.programs.log_densities import summed_posterior, values_of_sum
from pyrovae.programs.pair import Block, Pair
from pyrovae.programs.particles import collect_chunks
from pyrovae.programs.traces import Program

__all__ = ["Classification", "classify"]


@dataclass(frozen=True, repr=False)
class Classification:
    """Probabilities of the values of a discrete site given the data: tensors on the CPU.

    Attributes:
        site: name of the site
        num_particles: number of particles per datum
        values: values of the site, (K, *event_shape)
        probs: p(y = k | x_n), (N, K), float64; for a site in plates inside the datum, (N, elements, K)
        stderr: Monte Carlo standard error of `probs`, of the same shape; NaN for one particle, unless `probs` is exact
        ess: effective number of particles behind each datum, (N,)
    """

    site: str
    num_particles: int
    values: Tensor
    probs: Tensor
    stderr: Tensor
    ess: Tensor

    def __len__(self) -> int:
        return len(self.probs)

    @property
    def predicted(self) -> Tensor:
        """The most probable value of each datum, (N, *event_shape)."""
        return self.values[self.probs.argmax(-1)]

    def summary(self) -> str:
        """Return a few lines to print."""
        best = self.probs.amax(-1)
        return (
            f"p({self.site} | x) by importance weights: {len(self):,} data, {self.probs.shape[-1]} values, "
            f"{self.num_particles:,} particles\n"
            f"  probability of the most probable value  {best.mean():.3f} on average, {best.min():.3f} at least\n"
            f"  Monte Carlo standard error              {self.stderr.amax(-1).mean():.4f} on average, "
            f"{self.stderr.max():.4f} at most\n"
            f"  effective number of particles           {self.ess.median():.1f} (median), {self.ess.min():.1f} at least"
        )

    def __repr__(self) -> str:
        return f"Classification({self.site}: {len(self)} data, {self.probs.shape[-1]} values, {self.num_particles} particles)"


def classify(
    model: Program,
    guide: Program,
    *args: Any,
    site: str | None = None,
    num_particles: int = 100,
    plate: str | None = None,
    vectorize_particles: bool | Literal["auto"] = "auto",
    data_batch_size: int | Literal["auto"] | None = "auto",
    particle_batch_size: int | Literal["auto"] = "auto",
    progress: bool = False,
    **kwargs: Any,
) -> Classification:
    """Estimate p(y | x) for a site y that is summed out of the model (marked for enumeration), per datum.

        p(y | x_n) ~ sum_s w_sn p(y | x_n, z_sn) / sum_s w_sn,   w_sn = p(x_n, z_sn) / q(z_sn | x_n),   z_sn ~ q(. | x_n)

    p(y | x, z) is exact. Without latents that the guide draws, so is the result. Otherwise it is consistent, with a
    bias of order 1 / S: it is only as good as the guide reaches all classes, see `ess`, and `pareto_k` of
    `log_marginal_likelihood`.

    Args:
        model: as in `log_marginal_likelihood`
        guide: as in `log_marginal_likelihood`
        *args: arguments of both programs
        site: name of y; None if only one site is summed out
        num_particles: S
        plate: as in `log_marginal_likelihood`
        vectorize_particles: as in `log_marginal_likelihood`
        data_batch_size: as in `log_marginal_likelihood`
        particle_batch_size: as in `log_marginal_likelihood`
        progress: show a progress bar
        **kwargs: further arguments of both programs

    Returns:
        The probabilities, as a `Classification`.

    Raises:
        ValueError: if no site is summed out, or several and none is named; if y is masked out for some data, as
            `obs_mask` does where it is known; for a sequential datum plate; and for everything that
            `log_marginal_likelihood` refuses.
    """
    options = SamplingOptions(
        num_particles=num_particles,
        plate=plate,
        vectorize_particles=vectorize_particles,
        data_batch_size=data_batch_size,
        particle_batch_size=particle_batch_size,
        progress=progress,
    )
    with opened(model, guide, args, kwargs, options, evaluation=classify) as pair:
        name = _site_of(pair, site)
        first = draw(pair, pair.block(0, min(2, pair.num_data)), None)
        values = values_of_sum(first.model_trace.nodes[name])
        # Each weight brings one probability for each value.
        rows = replace(pair, row_size=pair.row_size * len(values))
        if not pair.draws:
            options = replace(options, vectorize_particles=False)
        parts = list(draw_blocks(rows, options, partial(_of_block, rows, name, options.num_particles), "classes"))
    probs, stderr, ess = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    if not pair.draws:
        ess = ess * options.num_particles
    return Classification(name, options.num_particles, values.cpu(), probs, stderr, ess)


def _site_of(pair: Pair, site: str | None) -> str:
    """The site whose values are asked for; ValueError if it is not summed out."""
    names = sorted(pair.model.names) if isinstance(pair.model, SummedOut) else []
    if not names:
        raise ValueError(
            "no site is summed out of the model, so there is no class to give probabilities of: mark the class in the "
            'model, infer={"enumerate": "parallel"} (or pyro.infer.config_enumerate(model)), and mark it in the guide '
            "too or leave it out there"
        )
    if site is None and len(names) > 1:
        raise ValueError(f"several sites are summed out of the model, {names}: say which one, site={names[0]!r}")
    if site is not None and site not in names:
        raise ValueError(f"site '{site}' is not summed out of the model; found {names}")
    if pair.layout.sequential:
        raise ValueError(
            f"plate '{pair.layout.plate}' is sequential, and each of its data has a site of its own: write it with "
            f"'with pyro.plate(...)'"
        )
    return names[0] if site is None else site


def _check_not_masked(site: dict) -> None:
    """Raise ValueError if the site is masked out for some data, which would get the probabilities of its prior."""
    mask = site["mask"]
    if mask is None or mask is True:
        return
    if mask is False or not mask.all():
        raise ValueError(
            f"site '{site['name']}' is masked out for some data, so it says nothing about them; with obs_mask=, their values "
            f"are known: classify data of unknown values alone, or pass an obs_mask that is False for all"
        )


def _of_block(
    pair: Pair, site: str, num_particles: int, block: Block, _: int, chunk_size: int | None
) -> tuple[tuple[Tensor, ...], int | None]:
    """(probs, stderr, ess) of a block of data, and the chunk size that memory allows; None draws one by one."""
    num_particles = num_particles if pair.draws else 1  # every particle is the same
    shares: list[Tensor] = []

    def chunk(size: int | None, _: bool) -> tuple[Tensor, Tensor]:
        found = draw(pair, block, size)
        _check_not_masked(found.model_trace.nodes[site])
        share = summed_posterior(block.layout, found.model_trace, found.guide_trace, site, size).double()
        return found.log_weights, share.expand(len(found.log_weights), -1, -1, -1)

    def use(chunk: tuple[Tensor, Tensor]) -> Tensor:
        log_weights, share = chunk
        shares.append(share)
        return log_weights

    log_weights, chunk_size = collect_chunks(chunk, use, num_particles, chunk_size, block.layout.num_data)
    log_weight, share = log_weights.double(), torch.cat(shares)
    if (impossible := (log_weight == -torch.inf).all(0)).any():
        raise ValueError(
            f"all {num_particles:,} particles have weight 0 for {int(impossible.sum()):,} of {len(impossible):,} data, so "
            f"there are no probabilities: use a guide that reaches the posterior, or more particles"
        )
    weight = log_weight.softmax(0)
    probs = (weight[..., None, None] * share).sum(0)
    stderr = (weight[..., None, None] * (share - probs)).square().sum(0).sqrt()
    if pair.draws and num_particles == 1:
        stderr = torch.full_like(stderr, torch.nan)
    probs, stderr = (part.squeeze(1) if part.shape[1] == 1 else part for part in (probs, stderr))
    return (probs, stderr, 1 / weight.square().sum(0)), chunk_size
