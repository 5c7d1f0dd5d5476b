"""Log importance weights of any Pyro model/guide pair: programs in, (S, N) arrays out.

The outer loop runs over blocks of data and the inner one over particles. All S weights of a block are then available at
once, which the reducers of `pyrovae.estimators` require. By default a block has fewer data if S is larger, so that
memory stays bounded.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyrovae.common.reporting import progress_bar, warn_once
from pyrovae.compiled.compiler import float32_products
from pyrovae.compiled.policy import mark_compiled, pays_off
from pyrovae.evaluation.opening import SamplingOptions, opened
from pyrovae.evaluation.recorded_draw import RecordedDraw, record_draw
from pyrovae.guides.base import Guide
from pyrovae.programs.inspection import refuse_impossible_data
from pyrovae.programs.log_densities import log_weights_of
from pyrovae.programs.pair import Block, EncodesOnce, Pair, encode_once, guide_given
from pyrovae.programs.particles import collect_chunks, run_particles
from pyrovae.programs.precision import in_precision
from pyrovae.programs.reach import modules_behind
from pyrovae.programs.traces import Program

__all__ = ["Drawn", "WeightedBlock", "can_vectorise", "draw", "log_weight_blocks", "log_weights", "until_interrupted"]

_OTHERS = 8  # further runs, all of which must find data impossible before they are reported

_EAGER_CHUNKS = 2  # chunks of a recording that are drawn at once eagerly, because Pyro's handlers take time for each

# Rounding is measured with 1 % as many weights as the evaluation has, at least one chunk and at most _MOST_MEASURED,
# because all are kept at once. Each is drawn eagerly in both precisions, which takes about 4 % of the time.
_MEASURED_DATA, _MEASURED_PART, _MOST_MEASURED = 32, 100, 2**19

_Part = TypeVar("_Part")


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
        rounding: (B,), see `_measured_rounding`; None if it was not measured.
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
            rounding = _measured_rounding(pair, rounded, num_particles if pair.draws else 1, vectorised, medium)
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
        f"use networks that keep leading dimensions (no view(-1, D), no fixed dim=1)",
    )
    return False


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
    traces = _run(pair, block, num_particles)
    return Drawn(log_weights_of(block.layout, *traces, num_particles), *traces)


def _run(pair: Pair, block: Block, num_particles: int | None) -> tuple[Trace, Trace]:
    guide = guide_given(pair.guide, block.encoded)
    return run_particles(pair.model, guide, block.args, block.kwargs, block.layout, num_particles)


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
    model_trace, guide_trace = _run(pair, block, size)
    if pair.split_size is not None:
        others = (_run(pair, block._replace(encoded=None), size)[0] for _ in range(_OTHERS))
        refuse_impossible_data(model_trace, others)
    return log_weights_of(block.layout, model_trace, guide_trace, size)


@torch.no_grad()
def _measured_rounding(exact: Pair, rounded: Pair, num_particles: int, vectorised: bool, medium: bool) -> Tensor:
    """How much rounding changes log p(x): the estimate with rounding minus the one without, from the same draws.

    Measured on some data, evenly spaced, with fewer particles than the evaluation if all would take too long. The
    differences are then larger than those of the evaluation, because rounding averages out over fewer particles. torch's
    generators keep their state.

    Returns:
        (N,) in nats; NaN for data on which it is not measured.
    """
    positions, block = _some_data(exact)
    count = len(positions)
    total = max(min(exact.num_data * num_particles // _MEASURED_PART, _MOST_MEASURED), exact.rows)
    size = max(1, min(num_particles, total // count))
    if not vectorised:  # a particle takes a run of its own, in which the number of data matters little
        size = min(size, max(1, num_particles // _MEASURED_PART))
    devices = list(range(torch.cuda.device_count())) if exact.is_cuda else []

    def chunk(size: int | None, _: bool) -> Tensor:
        with torch.random.fork_rng(devices), float32_products():
            without = draw(exact, block, size).log_weights
        with float32_products(medium):
            return torch.cat([without, draw(rounded, block, size).log_weights], 1)

    chunk_size = max(1, exact.rows // count) if vectorised else None
    with torch.random.fork_rng(devices):
        weights, _ = collect_chunks(chunk, lambda weights: weights, size, chunk_size, count)
    without, log_prob = weights.double().cpu().logsumexp(0).split(count)
    rounding = torch.full((exact.num_data,), torch.nan, dtype=torch.float64)
    rounding[positions] = torch.where(log_prob == without, 0.0, log_prob - without)  # -inf is equal to -inf
    return rounding


def _some_data(pair: Pair) -> tuple[Tensor, Block]:
    """Some data of a pair, evenly spaced: their positions, and a block of them. All data if they cannot be cut."""
    if pair.split_size is None:
        return torch.arange(pair.num_data), pair.block(0, pair.num_data)
    count = min(pair.num_data, _MEASURED_DATA)
    positions = torch.arange(count) * (pair.num_data - 1) // max(1, count - 1)
    args, kwargs = pair.cut(positions)
    guide = pair.guide.outline() if isinstance(pair.guide, EncodesOnce) else pair.guide  # any proposals will do
    return positions, Block(args, kwargs, pair.layout_of(0, count), encode_once(guide, args, kwargs))


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
