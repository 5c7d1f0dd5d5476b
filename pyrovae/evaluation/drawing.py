"""Draw the particles of blocks of data: what every evaluation by importance sampling does."""

import warnings
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypeVar

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyrovae.common.reporting import progress_bar, warn_once
from pyrovae.evaluation.opening import SamplingOptions
from pyrovae.programs.log_densities import log_weights_of
from pyrovae.programs.pair import Block, Pair, guide_given
from pyrovae.programs.particles import run_particles

__all__ = ["Drawn", "can_vectorise", "draw", "draw_blocks", "run_programs", "until_interrupted"]

_Part = TypeVar("_Part")


class Drawn(NamedTuple):
    """Some particles of a block of data.

    Attributes:
        log_weights: (S, B); S = 1 without an outer plate.
        model_trace: Trace of the model, with the draws of all sites.
        guide_trace: Trace of the guide.
    """

    log_weights: Tensor
    model_trace: Trace
    guide_trace: Trace


@torch.no_grad()
def draw(pair: Pair, block: Block, num_particles: int | None) -> Drawn:
    """Draw all sites of a block, and their log weights: `num_particles` under an outer plate, or one if None."""
    traces = run_programs(pair, block, num_particles)
    return Drawn(log_weights_of(block.layout, *traces, num_particles), *traces)


def run_programs(pair: Pair, block: Block, num_particles: int | None) -> tuple[Trace, Trace]:
    guide = guide_given(pair.guide, block.encoded)
    return run_particles(pair.model, guide, block.args, block.kwargs, block.layout, num_particles)


def draw_blocks(
    pair: Pair,
    options: SamplingOptions,
    of_block: Callable[[Block, int, int | None], tuple[_Part, int | None]],
    label: str,
) -> Iterator[_Part]:
    """Yield the result of each block of data, in order, with a progress bar.

    Args:
        pair: The programs and their data.
        options: Sizes of blocks and chunks.
        of_block: Function (block, position of its first datum, particles per chunk) -> (result, particles per chunk that
            memory allows). A chunk size of None draws the particles one by one.
        label: What the progress bar shows.
    """
    block_size, size = pair.sizes(options.num_particles, options.data_batch_size, options.particle_batch_size)
    chunk_size = size if can_vectorise(pair, block_size, options.vectorize_particles) else None
    with progress_bar(label, pair.num_data, "data", options.progress) as bar:
        for start, stop in pair.blocks(block_size):
            result, chunk_size = of_block(pair.block(start, stop), start, chunk_size)
            yield result
            bar.update(stop - start)


def can_vectorise(pair: Pair, block_size: int, wanted: bool | Literal["auto"]) -> bool:
    """Whether to draw particles under an outer plate; warns if they must be drawn one by one."""
    if not wanted or not (reason := pair.reason_to_loop(block_size)):
        return bool(wanted)
    if wanted is True:
        raise ValueError(
            f"the program cannot draw its particles under an outer plate ({reason}); "
            f"vectorize_particles='auto' draws them one by one"
        )
    warn_once(
        pair.model,
        f"particles are drawn one by one, which is slow: under an outer plate the program fails ({reason}); "
        f"networks must keep leading dimensions, for instance (no view(-1, D), no fixed dim=1)",
    )
    return False


def until_interrupted(blocks: Iterator[tuple[_Part, int, int]]) -> list[_Part]:
    """Collect the results of blocks of data, all of them or those finished before Ctrl-C.

    Each item is (result, number of data done, number of data in all). An interruption gives a warning, or
    KeyboardInterrupt if nothing is done yet.
    """
    parts: list[_Part] = []
    reached = "", ""
    try:
        for part, done, num_data in blocks:
            parts.append(part)
            reached = f"{done:,}", f"{num_data:,}"
    except KeyboardInterrupt:
        if not parts:
            raise
        warnings.warn(
            f"interrupted: the result holds only the first {reached[0]} of {reached[1]} data; continue with "
            f"x[len(result):], and join both results with LogMarginalLikelihood.concatenate",
            RuntimeWarning,
            stacklevel=3,
        )
    return parts
