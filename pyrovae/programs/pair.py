"""A model/guide pair that was inspected: where its data are, how they are cut, and how many pass through at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyrovae.common.arguments import map_tensors
from pyrovae.common.networks import encoding_of
from pyrovae.programs.particles import reason_to_loop
from pyrovae.programs.traces import Layout, Program

__all__ = ["HEAD", "Block", "EncodesOnce", "Pair", "choose_rows", "encode_once", "guide_given"]

HEAD = 32  # data used to inspect a program

# Numbers that pass through the networks at once; a row (one particle of one datum) counts as at least _ROW_SIZE
# numbers. On a CPU the activations should fit into the cache, which decides the speed; a GPU should be filled.
_CPU_ELEMENTS, _GPU_ELEMENTS, _ROW_SIZE = 2**20, 2**26, 512
_CPU_WEIGHTS, _GPU_WEIGHTS = 2**18, 2**26  # weights kept at once: all S of each datum of a block
_FEWEST_PARTICLES = 16  # drawn at once, so that encoding takes a small share of the time


@runtime_checkable
class EncodesOnce(Protocol):
    """A guide that computes its parameters once for all particles, as `pyrovae.guides.Guide` does."""

    @property
    def encodes_once(self) -> bool:
        """Whether `given(encode(x))` draws what the guide itself draws."""

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        """The parameters of q, one row for each datum."""

    def given(self, parameters: Tensor) -> Program:
        """The guide that draws from these parameters."""

    def outline(self) -> Program:
        """A guide that uses the data as this one does, but is quicker to run."""


@torch.no_grad()
def encode_once(guide: Program, args: tuple, kwargs: dict) -> Tensor | None:
    """The guide's encoding of these data; None if the guide does not encode once (`EncodesOnce`)."""
    return encoding_of(guide, args, kwargs) if isinstance(guide, EncodesOnce) and guide.encodes_once else None


def guide_given(guide: Program, encoded: Tensor | None) -> Program:
    """The guide that draws from the encoding of `encode_once`."""
    if encoded is None:
        return guide
    assert isinstance(guide, EncodesOnce)  # `encode_once` has checked it
    return guide.given(encoded)


def choose_rows(length: int, rows: slice | Tensor) -> Callable[[Tensor], Tensor]:
    """A function for `map_tensors`: these rows of each tensor of this length."""
    return lambda tensor: tensor[rows] if tensor.ndim and len(tensor) == length else tensor


class Block(NamedTuple):
    """A range of a pair's data, as the programs take them.

    Attributes:
        args: The arguments of both programs.
        kwargs: Their keyword arguments.
        layout: The layout, for as many data.
        encoded: What the guide computes once for all particles; None if it does not.
    """

    args: tuple
    kwargs: dict
    layout: Layout
    encoded: Tensor | None


@dataclass(frozen=True)
class Pair:
    """A model/guide pair with its arguments, after `pyrovae.programs.splitting.inspect` has checked it.

    Attributes:
        model: A Pyro program.
        guide: A Pyro program without observed sites.
        args: The arguments of both.
        kwargs: The keyword arguments of both.
        layout: Where the data are.
        split_size: The first size of the tensors that can be cut into blocks of data; None if none can be.
        row_size: Numbers per particle and datum at the largest site.
        draws: Whether particles differ; not if all latents are summed out.
        is_cuda: Whether an argument is on a GPU.
    """

    model: Program
    guide: Program
    args: tuple
    kwargs: dict
    layout: Layout
    split_size: int | None
    row_size: int
    draws: bool
    is_cuda: bool

    @property
    def num_data(self) -> int:
        """N."""
        return self.layout.num_data

    def cut(self, rows: slice | Tensor) -> tuple[tuple, dict]:
        """The arguments for a range of data, or for the data at some positions."""
        if self.split_size is None:
            return self.args, self.kwargs
        return map_tensors(choose_rows(self.split_size, rows), (self.args, self.kwargs))

    def layout_of(self, start: int, stop: int) -> Layout:
        """The layout for a range of data."""
        return self.layout if self.split_size is None else self.layout._replace(num_data=stop - start)

    def block(self, start: int, stop: int) -> Block:
        """A range of data, encoded."""
        args, kwargs = self.cut(slice(start, stop))
        return Block(args, kwargs, self.layout_of(start, stop), encode_once(self.guide, args, kwargs))

    @property
    def rows(self) -> int:
        """Particles times data that pass through the networks at once."""
        elements = _GPU_ELEMENTS if self.is_cuda else _CPU_ELEMENTS
        return max(1, elements // max(self.row_size, _ROW_SIZE))

    def sizes(
        self,
        num_particles: int,
        data_batch_size: int | Literal["auto"] | None,
        particle_batch_size: int | Literal["auto"],
    ) -> tuple[int, int]:
        """(data per block, particles per chunk)."""
        weights = _GPU_WEIGHTS if self.is_cuda else _CPU_WEIGHTS
        block = self.num_data
        if self.split_size is not None and data_batch_size is not None:
            if data_batch_size == "auto":
                fewest = min(num_particles, _FEWEST_PARTICLES)
                data_batch_size = max(2, min(self.rows // fewest, weights // num_particles))
            # Make all blocks of one size if possible, because a recording is for one size.
            block = -(-block // -(-block // data_batch_size))
        chunk = max(1, self.rows // block) if particle_batch_size == "auto" else particle_batch_size
        return block, min(chunk, num_particles)

    def blocks(self, size: int) -> Iterator[tuple[int, int]]:
        """Ranges of `size` data. A single row left over joins the last range: squeeze() in a program would drop it."""
        starts = list(range(0, self.num_data, size))
        if len(starts) > 1 and size > 1 and self.num_data - starts[-1] == 1:
            starts.pop()
        return pairwise([*starts, self.num_data])

    def reason_to_loop(self, block_size: int) -> str | None:
        """Why particles must be drawn one by one; None if they can be drawn together."""
        heads = {min(self.num_data, HEAD)}
        if self.split_size is not None:
            heads.add(min(block_size, 2))
        for head in sorted(heads, reverse=True):
            block = self.block(0, head)
            guide = guide_given(self.guide, block.encoded)
            if reason := reason_to_loop(self.model, guide, block.args, block.kwargs, block.layout):
                return reason
        return None
