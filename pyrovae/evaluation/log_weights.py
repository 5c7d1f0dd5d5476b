"""Log importance weights of any Pyro model/guide pair: programs in, (S, N) arrays out.

The outer loop runs over blocks of data and the inner one over particles. All S weights of a block are then available at
once, which the reducers of `pyrovae.estimators` require, while memory does not grow with S.
"""

import warnings
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from pyrovae.common.arguments import check_count, map_tensors
from pyrovae.common.progress import progress_bar
from pyrovae.common.reporting import warn_once
from pyrovae.compiled.policy import pays_off
from pyrovae.evaluation.recorded_draw import record_draw
from pyrovae.guides.base import Guide
from pyrovae.programs.pair import Pair, RecordedChunk
from pyrovae.programs.particles import refuse_more_than_memory
from pyrovae.programs.reach import evaluation_mode, modules_behind
from pyrovae.programs.traces import Program

__all__ = ["log_weight_blocks", "log_weights", "until_interrupted"]

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
    progress: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Compute the log importance weights of any Pyro model/guide pair, per datum.

        log w[s, n] = log p(x_n, z_sn) - log q(z_sn | x_n),   z_sn ~ q(. | x_n)

    The arguments and errors are those of `log_marginal_likelihood`, which suits results that do not fit in memory as
    one array.

    Returns:
        The whole array (S, N) in nats, S = num_particles, N the size of the datum plate.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).
    """
    blocks = log_weight_blocks(
        model,
        guide,
        args,
        kwargs,
        num_particles=num_particles,
        plate=plate,
        vectorize_particles=vectorize_particles,
        data_batch_size=data_batch_size,
        particle_batch_size=particle_batch_size,
        compile=compile,
        progress=progress,
    )
    return torch.cat([block for block, _, _ in blocks], dim=1)


def log_weight_blocks(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    *,
    num_particles: int,
    plate: str | None,
    vectorize_particles: bool | Literal["auto"],
    data_batch_size: int | Literal["auto"] | None,
    particle_batch_size: int | Literal["auto"],
    compile: bool | Literal["auto"],
    progress: bool,
) -> Iterator[tuple[Tensor, int, int]]:
    """Yield the log weights in blocks of data, in order: (array (S, B), number of data done, number of data in all)."""
    num_particles = check_count("num_particles", num_particles)
    if data_batch_size not in ("auto", None):
        data_batch_size = check_count("data_batch_size", data_batch_size)
    if particle_batch_size != "auto":
        particle_batch_size = check_count("particle_batch_size", particle_batch_size)
    if vectorize_particles not in (True, False, "auto"):
        raise ValueError(f"vectorize_particles must be True, False or 'auto', found {vectorize_particles!r}")
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto', found {compile!r}")
    with evaluation_mode(model, guide) as device:
        refuse_more_than_memory("num_particles", num_particles, device)
        if device is not None:
            args, kwargs = map_tensors(lambda tensor: tensor.to(device), (args, kwargs))
        pair = Pair(model, guide, args, kwargs, plate, data_batch_size)
        block_size, chunk_size = pair.sizes(num_particles, data_batch_size, particle_batch_size)
        vectorised = bool(vectorize_particles)
        if vectorised and (reason := pair.reason_to_loop(block_size)):
            if vectorize_particles is True:
                raise ValueError(
                    f"the program cannot draw its particles under an outer plate ({reason}); "
                    f"vectorize_particles='auto' draws them one by one"
                )
            warn_once(
                model,
                f"particles are drawn one by one, which is slow: under an outer plate the program fails ({reason}); "
                f"use networks that keep leading dimensions (no view(-1, D), no fixed dim=1)",
            )
            vectorised = False
        modules = modules_behind(model, guide)
        if compile == "auto":
            compile = pays_off(num_particles, pair.num_data, repeated=[model], once=[guide])
        if compile and isinstance(pair.guide, Guide):
            pair.guide = pair.guide.compiled(block_size)
        recorded = None
        if vectorised and compile and chunk_size < num_particles:
            with torch.no_grad():
                draw, example = pair.chunk_of(block_size, chunk_size)
                recording = record_draw(draw, modules, *example)
            if recording is not None:
                recorded = RecordedChunk((block_size, chunk_size), recording.given)
        with progress_bar("log weights", pair.num_data, "data", progress) as bar:
            for start, stop in pair.blocks(block_size):
                yield pair.block(start, stop, num_particles, chunk_size, vectorised, recorded), stop, pair.num_data
                bar.update(stop - start)


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
