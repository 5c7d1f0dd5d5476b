"""Log importance weights of any Pyro model/guide pair: programs in, (S, N) arrays out.

The outer loop runs over blocks of data and the inner one over particles. All S weights of a block are then available at
once, which the reducers of `pyrovae.estimators` require. By default a block has fewer data if S is larger, so that
memory stays bounded.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyrovae.common.reporting import progress_bar
from pyrovae.compiled.compiler import float32_products
from pyrovae.compiled.policy import mark_compiled, pays_off
from pyrovae.evaluation.drawing import can_vectorise, draw, run_programs
from pyrovae.evaluation.opening import SamplingOptions, opened
from pyrovae.evaluation.recorded_draw import RecordedDraw, record_draw
from pyrovae.evaluation.rounding import measured_rounding
from pyrovae.guides.base import Guide
from pyrovae.programs.inspection import refuse_impossible_data
from pyrovae.programs.log_densities import log_weights_of
from pyrovae.programs.pair import Block, Pair
from pyrovae.programs.particles import collect_chunks
from pyrovae.programs.precision import in_precision
from pyrovae.programs.reach import modules_behind
from pyrovae.programs.traces import Program

__all__ = ["WeightedBlock", "log_weight_blocks", "log_weights"]

_OTHERS = 8  # further runs, all of which must find data impossible before they are reported

_EAGER_CHUNKS = 2  # chunks of a recording that are drawn at once eagerly, because Pyro's handlers take time for each


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 100,
    plate: str | None = None,
    vectorize_particles: bool | Literal["auto"] = "auto",
    data_batch_size: int | Literal["auto"] | None = "auto",
    particle_batch_size: int | Literal["auto"] = "auto",
    compile: bool | Literal["auto"] = "auto",
    precision: Literal["float32", "medium", "bf16"] = "float32",
    progress: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Compute the log importance weights of any Pyro model/guide pair, per datum.

        log w[s, n] = log p(x_n, z_sn) - log q(z_sn | x_n),   z_sn ~ q(. | x_n)

    The arguments and errors are those of `log_marginal_likelihood`, which suits results that do not fit in memory as
    one array, and measures the error that another `precision` than "float32" makes. Here it is not measured.

    Returns:
        The whole array (S, N) in nats, S = num_particles, N the size of the datum plate.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).
    """
    options = SamplingOptions(
        num_particles=num_particles,
        plate=plate,
        vectorize_particles=vectorize_particles,
        data_batch_size=data_batch_size,
        particle_batch_size=particle_batch_size,
        compile=compile,
        precision=precision,
        progress=progress,
    )
    blocks = log_weight_blocks(model, guide, args, kwargs, options, False)
    return torch.cat([block.log_weights for block, _, _ in blocks], dim=1)


class WeightedBlock(NamedTuple):
    """The log weights of a block of data.

    Attributes:
        log_weights: (S, B).
        rounding: (B,), as `measured_rounding` gives it; None if it was not measured.
    """

    log_weights: Tensor
    rounding: Tensor | None


def log_weight_blocks(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    options: SamplingOptions,
    measures_rounding: bool,
) -> Iterator[tuple[WeightedBlock, int, int]]:
    """Yield the log weights in blocks of data, in order: (block, number of data done, number of data in all)."""
    num_particles, medium = options.num_particles, options.precision == "medium"
    with opened(model, guide, args, kwargs, options) as pair:
        block_size, chunk_size = pair.sizes(num_particles, options.data_batch_size, options.particle_batch_size)
        vectorised = pair.draws and can_vectorise(pair, block_size, options.vectorize_particles)
        # Programs are inspected in float32, because rounding may differ between a whole and its parts.
        rounded = replace(pair, model=in_precision(options.precision, pair.model)[0])
        rounding = None
        if measures_rounding and options.precision != "float32":
            rounding = measured_rounding(pair, rounded, num_particles if pair.draws else 1, vectorised, medium)
        pair = rounded

        def of_block(weights: Tensor, start: int, stop: int) -> tuple[WeightedBlock, int, int]:
            own = None if rounding is None else rounding[start:stop]
            return WeightedBlock(weights, own), stop, pair.num_data

        if not pair.draws:  # all latents are summed out: every particle has the same weight, log p(x)
            for start, stop in pair.blocks(block_size):
                weights, _ = _draw_block(pair, pair.block(start, stop), 1, 1, False, None, medium)
                yield of_block(weights.expand(num_particles, -1), start, stop)
            return
        compile = options.compile
        modules = modules_behind(model, guide)
        described = (*modules, block_size, chunk_size, pair.is_cuda, options.precision)
        if compile == "auto":
            compile = pays_off(num_particles, pair.num_data, repeated=[model], once=[guide], described=described)
        if compile and isinstance(pair.guide, Guide):
            pair = replace(pair, guide=pair.guide.compiled(block_size))
        recorded = None
        if vectorised and compile and chunk_size < num_particles:
            recorded = _record(pair, modules, block_size, chunk_size, medium)
            if recorded is not None:
                mark_compiled(described)
        if recorded is None and options.particle_batch_size == "auto" and not pair.is_cuda:
            chunk_size = min(_EAGER_CHUNKS * chunk_size, num_particles)
        with progress_bar("log weights", pair.num_data, "data", options.progress) as bar:
            for start, stop in pair.blocks(block_size):
                # A shorter last block is drawn with data of the block before it, so that it has the recorded size.
                first = start if pair.split_size is None else min(start, stop - block_size)
                block = pair.block(first, stop)
                weights, chunk_size = _draw_block(pair, block, num_particles, chunk_size, vectorised, recorded, medium)
                yield of_block(weights[:, start - first :], start, stop)
                bar.update(stop - start)


class _RecordedChunk(NamedTuple):
    sizes: tuple[int, int]  # (data, particles)
    draw: RecordedDraw


def _record(
    pair: Pair, modules: list[nn.Module], block_size: int, chunk_size: int, medium: bool
) -> _RecordedChunk | None:
    """Record the draw of a chunk of this size, if possible."""
    example = pair.block(0, block_size)

    def chunk(encoded: Tensor | None, args: tuple, kwargs: dict) -> Tensor:
        return draw(pair, example._replace(encoded=encoded, args=args, kwargs=kwargs), chunk_size).log_weights

    with torch.no_grad():
        recording = record_draw(chunk, modules, example.encoded, example.args, example.kwargs, medium)
    return None if recording is None else _RecordedChunk((block_size, chunk_size), recording)


@torch.no_grad()
def _draw_block(
    pair: Pair,
    block: Block,
    num_particles: int,
    chunk_size: int,
    vectorised: bool,
    recorded: _RecordedChunk | None,
    medium: bool,
) -> tuple[Tensor, int]:
    """Log weights (S, B) of a block, by the recording if it has this chunk size; and the chunk size that memory allows."""
    next_chunk: Callable[[], Tensor] | None = None

    def chunk(size: int | None, is_first: bool) -> Tensor:
        nonlocal next_chunk
        if is_first:  # drawn eagerly, with every check
            return _draw_checked(pair, block, size)
        if recorded is None or (block.layout.num_data, size) != recorded.sizes:
            return draw(pair, block, size).log_weights
        next_chunk = next_chunk or recorded.draw.given(block.encoded, block.args, block.kwargs)
        return next_chunk()

    size = chunk_size if vectorised else None
    with float32_products(medium):  # eager chunks use the same products as recorded ones
        log_weights, fits = collect_chunks(chunk, lambda weights: weights, num_particles, size, block.layout.num_data)
    return log_weights, fits or chunk_size


def _draw_checked(pair: Pair, block: Block, size: int | None) -> Tensor:
    """Log weights of the first chunk of a block; ValueError if its data are impossible (`inspect` checked only a few)."""
    model_trace, guide_trace = run_programs(pair, block, size)
    if pair.split_size is not None:
        others = (run_programs(pair, block._replace(encoded=None), size)[0] for _ in range(_OTHERS))
        refuse_impossible_data(model_trace, others)
    return log_weights_of(block.layout, model_trace, guide_trace, size)
