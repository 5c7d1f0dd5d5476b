"""Particles of a model/guide pair: drawn together under an outer plate if the program allows it and memory suffices."""

import logging
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyrovae.programs.log_densities import log_weights_of
from pyrovae.programs.reruns import equivalent
from pyrovae.programs.traces import Layout, Program, run_pair, select_particle, under_particles

__all__ = ["check_memory", "collect_chunks", "reason_to_loop", "run_particles"]

_logger = logging.getLogger("pyrovae")

_Chunk = TypeVar("_Chunk")


def run_particles(
    model: Program, guide: Program, args: tuple, kwargs: dict, layout: Layout, num_particles: int | None
) -> tuple[Trace, Trace]:
    """Run a pair once: with `num_particles` under an outer plate, or with one particle if None."""
    if num_particles is not None:
        model, guide = (under_particles(program, layout, num_particles) for program in (model, guide))
    return run_pair(model, guide, args, kwargs, layout.pinned)


@torch.no_grad()
def reason_to_loop(model: Program, guide: Program, args: tuple, kwargs: dict, layout: Layout) -> str | None:
    """Why a pair must draw its particles one by one; None if two drawn together agree with the same two drawn apart."""

    def both() -> tuple[Tensor, Tensor]:
        model_trace, guide_trace = run_particles(model, guide, args, kwargs, layout, 2)
        together = log_weights_of(layout, model_trace, guide_trace, 2)
        apart = []
        for particle in range(2):
            replayed = select_particle(guide_trace, layout, particle)
            apart.append(log_weights_of(layout, *run_pair(model, guide, args, kwargs, layout.pinned, replayed)))
        return together, torch.cat(apart)

    try:
        return None if equivalent(both) else "two particles drawn together differ from the same two drawn apart"
    except Exception as error:
        # If the program fails for one particle too, the plate is not the reason: raise that error.
        log_weights_of(layout, *run_pair(model, guide, args, kwargs, layout.pinned))
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


_BYTES_PER_WEIGHT = 16  # each weight is kept in the programs' precision and in float64


def check_memory(name: str, number: int, device: torch.device | None) -> None:
    """Raise ValueError if `number` weights of one datum do not fit into the memory of the device or machine."""
    if device is not None and device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        memory = 2**40
    if number * _BYTES_PER_WEIGHT > memory:
        raise ValueError(
            f"{name}={number:,} takes {number * _BYTES_PER_WEIGHT / 2**30:,.0f} GiB for the weights of a single datum, "
            f"and there are {memory / 2**30:,.0f} GiB: take {memory // _BYTES_PER_WEIGHT:,} or fewer"
        )


def collect_chunks(
    draw: Callable[[int | None, bool], _Chunk],
    use: Callable[[_Chunk], Tensor],
    num_particles: int,
    chunk_size: int | None,
    num_data: int,
) -> tuple[Tensor, int | None]:
    """Draw the particles of a block of data in chunks that fit into memory.

    Args:
        draw: Draws a chunk: draw(number of particles, or None for one without an outer plate; whether it is the first).
            It is called again with fewer particles if memory does not suffice.
        use: Takes each chunk once, and gives its log weights (chunk, B).
        num_particles: S.
        chunk_size: Particles per chunk, at most; None draws them one by one.
        num_data: B.

    Returns:
        The log weights (S, B), and the chunk size that memory allows.

    Raises:
        RuntimeError: A single particle does not fit.
    """
    # Allocate one array at the start: small arrays kept among large ones that are freed prevent the heap from
    # shrinking.
    log_weights = torch.empty(0)
    drawn = 0
    while drawn < num_particles:
        size = None if chunk_size is None else min(chunk_size, num_particles - drawn)
        too_many = None
        try:
            chunk = draw(size, not drawn)
        except torch.OutOfMemoryError as error:
            too_many = error.with_traceback(None)  # the frames of the traceback keep large tensors alive
        if too_many is not None:
            chunk_size = _halved(size, num_data, too_many)
            continue
        weights = use(chunk)
        if not drawn:
            log_weights = weights.new_empty(num_particles, weights.shape[1])
        log_weights[drawn : drawn + len(weights)] = weights
        drawn += len(weights)
    return log_weights, chunk_size


def _halved(num_particles: int | None, num_data: int, error: torch.OutOfMemoryError) -> int:
    """Halve a number of particles that did not fit into memory, and log it; RuntimeError if it was one particle."""
    if num_particles is None or num_particles == 1:
        raise RuntimeError(
            f"one particle of {num_data:,} data together does not fit into the device's memory: pass a smaller "
            f"data_batch_size="
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _logger.warning(
        "out of memory with %d particles of %d data at once: continuing with %d",
        *(num_particles, num_data, num_particles // 2),
    )
    return num_particles // 2
