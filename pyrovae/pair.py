"""A model/guide pair looked at once: how its data can be cut, how its particles can be drawn, and the drawing itself.

Particles are drawn under an outer plate where the program allows it, which is found by comparing with particles drawn
one by one; data are fed in blocks where the program allows that, which is found by comparing pieces with the whole.
"""

from itertools import pairwise
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyrovae.draws import RecordedDraw, record_draw
from pyrovae.guides import Guide
from pyrovae.inspection import inspect_pair, refuse_impossible_data
from pyrovae.modules import map_tensors
from pyrovae.traces import (
    Layout,
    Program,
    is_possible,
    log_weights_of,
    run_pair,
    sample_sites,
    select_data,
    select_particle,
)

__all__ = ["Pair"]

# Numbers that go through the networks at once, taking a row (one particle of one datum) for _ROW_SIZE or more. On a
# CPU the activations should stay in the cache, which is the whole story of its speed; a GPU should be filled.
_CPU_ELEMENTS, _GPU_ELEMENTS, _ROW_SIZE = 2**20, 2**26, 512
_CPU_WEIGHTS, _GPU_WEIGHTS = 2**18, 2**26  # weights kept at once: all S of each datum of a block
_FEWEST_PARTICLES = 16  # drawn at once, so that the encoder's share stays small
_HEAD = 32  # data used to look at a program
_PARTICLES = "_pyrovae_particles"


class Pair:
    """A model/guide pair with its arguments, looked at once; `block` then draws weights for a range of data."""

    @torch.no_grad()
    def __init__(
        self, model: Program, guide: Program, args: tuple, kwargs: dict, plate: str | None, data_batch_size: Any
    ):
        self.model, self.guide, self.plate = model, guide, plate
        self.args, self.kwargs = args, kwargs
        self.split_size: int | None = None
        self.recorded: RecordedDraw | None = None
        self.recorded_sizes = (0, 0)
        tensors: list[Tensor] = []
        map_tensors(tensors.append, (args, kwargs))
        self.cuda = any(tensor.is_cuda for tensor in tensors)
        lengths = [len(tensor) for tensor in tensors if tensor.ndim]
        if data_batch_size is not None:
            for length in dict.fromkeys(lengths):
                if length > 1 and self._try_to_split(length):
                    return
            if data_batch_size != "auto":
                raise ValueError(
                    f"data_batch_size={data_batch_size}, but the program cannot be fed its data in blocks: either its "
                    f"plate does not take its size from the tensors passed, or data influence each other; "
                    f"data_batch_size=None evaluates them together"
                )
        self.layout, model_trace, _ = inspect_pair(model, guide, args, kwargs, plate)
        self.num_data = self.layout.num_data
        self.row_size = _row_size(model_trace, self.layout)

    def _try_to_split(self, length: int) -> bool:
        """Whether tensors of this length can be cut into blocks of data: pieces give what the whole gives.

        Asked of the first rows and of rows drawn from all, in pieces of many sizes, a single row among them.
        """
        head = min(length, _HEAD)
        edges = sorted({0, head} | {edge for edge in (1, 2, 5, 11, 16, 23, head - 1) if edge < head})
        self.split_size = length
        try:
            for rows in (torch.randperm(length)[:head].sort().values, torch.arange(head)):
                layout, model_trace, guide_trace = inspect_pair(self.model, self.guide, *self.cut(rows), self.plate)
                if layout.dim is None or layout.subsampled or layout.num_data != head:
                    raise ValueError("the tensors passed do not set the size of the datum plate")
                whole = log_weights_of(layout, model_trace, guide_trace)
                pieces = []
                for start, stop in pairwise(edges):
                    replayed = select_data(guide_trace, layout, start, stop)
                    traces = run_pair(self.model, self.guide, *self.cut(rows[start:stop]), replayed)
                    pieces.append(log_weights_of(layout._replace(num_data=stop - start), *traces))
                if not _agree(whole, torch.cat(pieces, 1)):
                    raise ValueError("data influence each other")
        except Exception:  # whatever a program says to a slice of its data, it is asked again with all of them
            self.split_size = None
            return False
        self.layout, self.num_data = layout, length
        self.row_size = _row_size(model_trace, layout)
        return True

    def cut(self, rows: slice | Tensor) -> tuple[tuple, dict]:
        if self.split_size is None:
            return self.args, self.kwargs
        return map_tensors(
            lambda tensor: tensor[rows] if tensor.ndim and len(tensor) == self.split_size else tensor,
            (self.args, self.kwargs),
        )

    @property
    def rows(self) -> int:
        """Particles times data that go through the networks at once."""
        elements = _GPU_ELEMENTS if self.cuda else _CPU_ELEMENTS
        return max(1, elements // max(self.row_size, _ROW_SIZE))

    def sizes(self, num_particles: int, data_batch_size: Any, particle_batch_size: Any) -> tuple[int, int]:
        """(data per block, particles per chunk)."""
        weights = _GPU_WEIGHTS if self.cuda else _CPU_WEIGHTS
        block = self.num_data
        if self.split_size is not None:
            if data_batch_size == "auto":
                fewest = min(num_particles, _FEWEST_PARTICLES)
                data_batch_size = max(1, min(self.rows // fewest, weights // num_particles))
            block = min(block, data_batch_size)
        chunk = max(1, self.rows // block) if particle_batch_size == "auto" else particle_batch_size
        return block, min(chunk, num_particles)

    @torch.no_grad()
    def reason_to_loop(self) -> str | None:
        """Why particles must be drawn one by one; None where two drawn together are the same two drawn apart."""
        head = min(self.num_data, _HEAD)
        args, kwargs = self.cut(slice(head))
        layout = self.layout_of(0, head)
        try:
            model_trace, guide_trace = self._run(self.encode(args, kwargs), args, kwargs, layout, 2)
            together = log_weights_of(layout, model_trace, guide_trace, 2)
            apart = []
            for particle in range(2):
                replayed = select_particle(guide_trace, layout, particle)
                traces = run_pair(self.model, self.guide, args, kwargs, layout.pinned, replayed)
                apart.append(log_weights_of(layout, *traces))
        except Exception as error:
            # A program that fails for one particle too has another trouble than the plate, and says so itself.
            log_weights_of(layout, *run_pair(self.model, self.guide, args, kwargs, layout.pinned))
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if not _agree(together, torch.cat(apart)):
            return "two particles drawn together differ from the same two drawn apart"
        return None

    @torch.no_grad()
    def block(self, start: int, stop: int, num_particles: int, chunk_size: int, vectorised: bool) -> Tensor:
        """Log weights (S, stop - start) of a range of data."""
        args, kwargs = self.cut(slice(start, stop))
        layout = self.layout_of(start, stop)
        encoded = self.encode(args, kwargs)
        chunks: list[Tensor] = []
        drawn = 0
        while drawn < num_particles:
            size = min(chunk_size, num_particles - drawn) if vectorised else None
            # The first chunk of each block is drawn eagerly, with every check.
            if chunks and self.recorded is not None and (stop - start, size) == self.recorded_sizes:
                chunks.append(self.recorded(encoded, args, kwargs))
            else:
                model_trace, guide_trace = self._run(encoded, args, kwargs, layout, size)
                if not chunks and self.split_size is not None:
                    self._refuse_impossible(model_trace, args, kwargs, layout, size)
                chunks.append(log_weights_of(layout, model_trace, guide_trace, size))
            drawn += size or 1
        return torch.cat(chunks)

    @torch.no_grad()
    def record(self, modules: list[nn.Module], num_data: int, num_particles: int) -> None:
        """Record and compile the drawing of a chunk of that size, for `block` to use where it can."""
        args, kwargs = self.cut(slice(num_data))
        layout = self.layout_of(0, num_data)

        def draw(encoded: Tensor | None, args: tuple, kwargs: dict) -> Tensor:
            return log_weights_of(layout, *self._run(encoded, args, kwargs, layout, num_particles), num_particles)

        self.recorded = record_draw(draw, modules, self.encode(args, kwargs), args, kwargs)
        self.recorded_sizes = (num_data, num_particles)

    def _refuse_impossible(self, model_trace, args, kwargs, layout, size) -> None:
        for _, site in sample_sites(model_trace):
            if site["is_observed"] and (possible := is_possible(site)) is not None and not possible.all():
                other_trace, _ = self._run(None, args, kwargs, layout, size)
                refuse_impossible_data(model_trace, other_trace)

    def layout_of(self, start: int, stop: int) -> Layout:
        return self.layout if self.split_size is None else self.layout._replace(num_data=stop - start)

    def encode(self, args: tuple, kwargs: dict) -> Tensor | None:
        """The guide's encoding of these data, done once for all particles, where it offers that (`pyrovae.guides.Guide`)."""
        if isinstance(self.guide, Guide) and type(self.guide).forward is Guide.forward:  # its own forward is the user's
            return self.guide.encode(*args, **kwargs)
        return None

    def _run(self, encoded: Tensor | None, args: tuple, kwargs: dict, layout: Layout, num_particles: int | None):
        """One run of the pair: of `num_particles` under an outer plate, or of one without."""
        guide = self.guide if encoded is None else self.guide.given(encoded)
        if num_particles is None:
            return run_pair(self.model, guide, args, kwargs, layout.pinned)
        model_under, guide_under = (self.under_plate(p, layout, num_particles) for p in (self.model, guide))
        return run_pair(model_under, guide_under, args, kwargs, layout.pinned)

    @staticmethod
    def under_plate(program: Program, layout: Layout, num_particles: int) -> Program:
        """The program under an outer plate of particles."""

        def run(*args, **kwargs):
            with pyro.plate(_PARTICLES, num_particles, dim=-1 - layout.max_plate_nesting):
                return program(*args, **kwargs)

        return run


def _agree(first: Tensor, second: Tensor) -> bool:
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    scale = first[first.isfinite()].abs().max().item() if first.isfinite().any() else 1.0
    return first.shape == second.shape and torch.allclose(
        first, second, rtol=tolerance, atol=tolerance * max(1.0, scale)
    )


def _row_size(model_trace: Trace, layout: Layout) -> int:
    """Floats that one particle of one datum takes at the largest site."""
    return max(site["value"].numel() for _, site in sample_sites(model_trace)) // layout.num_data
