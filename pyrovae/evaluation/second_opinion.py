"""Which component of a defensive mixture carries the weights of each datum: does the guide miss a mode?"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae.evaluation.drawing import Drawn, draw, draw_blocks
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.evaluation.opening import SamplingOptions, opened
from pyrovae.guides.defensive import DefensiveMixture, MixtureOfProposals
from pyrovae.programs.pair import Block, Pair
from pyrovae.programs.particles import collect_chunks
from pyrovae.programs.traces import Program

__all__ = ["SecondOpinion", "second_opinion"]


@dataclass(frozen=True, repr=False)
class SecondOpinion:
    """log p(x) with a defensive mixture, and the share of the posterior that each of its components covers.

    Attributes:
        lml: the estimates with the mixture, as `log_marginal_likelihood` gives them
        components: names of the K components, "guide" first
        shares: (N, K), rows sum to 1: E[ w_k q_k(z) / q'(z) ] over the posterior p(z|x), by importance weights
    """

    lml: LogMarginalLikelihood
    components: tuple[str, ...]
    shares: Tensor

    def __len__(self) -> int:
        return len(self.shares)

    @property
    def misses(self) -> Tensor:
        """Bool (N,): the guide misses mass here. The other components carry more than half of the weights."""
        return self.shares[:, 0] < 0.5

    def summary(self) -> str:
        """Return a few lines to print."""
        shares = ", ".join(
            f"{name} {share:.2f}" for name, share in zip(self.components, self.shares.mean(0), strict=True)
        )
        count = int(self.misses.sum())
        lines = [self.lml.summary(), f"  {'carried by':16}{shares}   (mean share of the weights)"]
        if count:
            lines.append(
                f"  the guide misses mass at {count:,} of {len(self):,} data (`misses`): other components carry most of "
                f"their weights"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"SecondOpinion({self.lml!r}; the guide misses mass at {int(self.misses.sum())})"


def second_opinion(
    model: Program,
    guide: DefensiveMixture,
    *args: Any,
    num_particles: int = 1000,
    vectorize_particles: bool | Literal["auto"] = "auto",
    data_batch_size: int | Literal["auto"] | None = "auto",
    particle_batch_size: int | Literal["auto"] = "auto",
    progress: bool = False,
    **kwargs: Any,
) -> SecondOpinion:
    """Estimate log p(x) with a defensive mixture, and say which of its components carries the weights of each datum.

        share_k = sum_s w_s r_k(z_s) / sum_s w_s,   r_k(z) = w_k q_k(z) / q'(z),   q' = sum_k w_k q_k

    is the part of the posterior that lies where component k is dense. If the guide's part is below one half, it misses
    mass that another component found, and its own estimate is too low with no sign of it. The converse does not hold:
    a mode that no component reaches stays unseen.

    Args:
        model: as in `log_marginal_likelihood`
        guide: a `pyrovae.guides.DefensiveMixture`, whose arguments say what the other components are
        *args: arguments of both programs
        num_particles: S
        vectorize_particles: as in `log_marginal_likelihood`
        data_batch_size: as in `log_marginal_likelihood`
        particle_batch_size: as in `log_marginal_likelihood`
        progress: show a progress bar
        **kwargs: further arguments of both programs

    Returns:
        A `SecondOpinion`; its `lml` needs no further run.

    Raises:
        TypeError: if the guide is not a `DefensiveMixture`.
        ValueError: for everything that `log_marginal_likelihood` refuses.

    References:
        Owen & Zhou, Safe and Effective Importance Sampling (2000).
    """
    if not isinstance(guide, DefensiveMixture):
        raise TypeError(
            f"guide must be a pyrovae.guides.DefensiveMixture, whose components are compared; found "
            f"{type(guide).__name__}: DefensiveMixture(guide, model.prior, 0.3, widen=2, codes=..., model=model)"
        )
    options = SamplingOptions(
        num_particles=num_particles,
        vectorize_particles=vectorize_particles,
        data_batch_size=data_batch_size,
        particle_batch_size=particle_batch_size,
        progress=progress,
    )
    with opened(model, guide, args, kwargs, options, evaluation=second_opinion) as pair:
        of_block = partial(_of_block, pair, options.num_particles)
        results, names, shares = zip(*draw_blocks(pair, options, of_block, "second opinion"), strict=True)
    return SecondOpinion(LogMarginalLikelihood.concatenate(list(results)), names[0], torch.cat(shares))


def _of_block(
    pair: Pair, num_particles: int, block: Block, _: int, chunk_size: int | None
) -> tuple[tuple[LogMarginalLikelihood, tuple[str, ...], Tensor], int | None]:
    """Return (result, names, shares (B, K)) of a block of data, and the chunk size that memory allows."""
    carried: dict[str, Tensor] = {}

    def use(found: Drawn) -> Tensor:
        mixture, z = found.guide_trace.nodes["z"]["fn"], found.guide_trace.nodes["z"]["value"]
        assert isinstance(mixture, MixtureOfProposals)
        weights = found.log_weights.double()
        parts = mixture.log_parts(z).double().reshape(len(mixture.names), *weights.shape)
        responsibilities = (weights + parts - parts.logsumexp(0)).logsumexp(1)  # (components, B)
        for name, own in zip(mixture.names, responsibilities, strict=True):
            carried[name] = torch.logaddexp(carried[name], own) if name in carried else own
        return weights

    log_weights, chunk_size = collect_chunks(
        lambda size, _: draw(pair, block, size), use, num_particles, chunk_size, block.layout.num_data
    )
    shares = torch.stack(list(carried.values()), 1).softmax(1)
    return (LogMarginalLikelihood.from_log_weights(log_weights), tuple(carried), shares.cpu()), chunk_size
