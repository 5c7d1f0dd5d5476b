"""Log importance weights of any Pyro model/guide pair: programs in, (S, N) arrays out.

Data are the outer loop and particles the inner one, so that for one block of data all S weights are at hand (the
reducers of `pyrovae.estimators` need them together) while memory stays flat in S. Particles are drawn under an outer
plate where the program allows it, which is found by comparing with particles drawn one by one; data are fed in blocks
where the program allows that, which is found by comparing pieces with the whole.
"""

import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor
from tqdm import tqdm

from pyrovae.guides import Guide
from pyrovae.inspection import inspect_pair, refuse_impossible_data
from pyrovae.modules import check_count, evaluation_mode
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

__all__ = ["log_weight_blocks", "log_weights"]

# Numbers that go through the networks at once, taking a row (one particle of one datum) for _ROW_SIZE or more. On a
# CPU the activations should stay in the cache, which is the whole story of its speed; a GPU should be filled.
_CPU_ELEMENTS, _GPU_ELEMENTS, _ROW_SIZE = 2**20, 2**26, 512
_CPU_WEIGHTS, _GPU_WEIGHTS = 2**18, 2**26  # weights kept at once: all S of each datum of a block
_FEWEST_PARTICLES = 16  # drawn at once, so that the encoder's share stays small
_HEAD = 32  # data used to look at a program
_PARTICLES = "_pyrovae_particles"


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 100,
    plate: str | None = None,
    vectorize_particles: bool | Literal["auto"] = "auto",
    data_batch_size: int | Literal["auto"] | None = "auto",
    particle_batch_size: int | Literal["auto"] = "auto",
    progress: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Log importance weights of any Pyro model/guide pair, per datum.

    log w[s, n] = log p(x_n, z_sn) - log q(z_sn | x_n),   z_sn ~ q(. | x_n)

    Shapes: (S, N), S = num_particles, N the size of the datum plate; in nats. The whole array is returned; take
    `log_marginal_likelihood` where it would not fit. Arguments and errors are those of `log_marginal_likelihood`.

    Source: Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).
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
        progress=progress,
    )
    return torch.cat(list(blocks), dim=1)


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
    progress: bool,
) -> Iterator[Tensor]:
    """The log weights of `log_weights` in blocks of data: (S, B) arrays, in the order of the data."""
    check_count("num_particles", num_particles)
    if data_batch_size not in ("auto", None):
        check_count("data_batch_size", data_batch_size)
    if particle_batch_size != "auto":
        check_count("particle_batch_size", particle_batch_size)
    if vectorize_particles not in (True, False, "auto"):
        raise ValueError(f"vectorize_particles must be True, False or 'auto', found {vectorize_particles!r}")
    with evaluation_mode(model, guide) as device:
        if device is not None:
            args, kwargs = _map_tensors(lambda tensor: tensor.to(device), (args, kwargs))
        pair = _Pair(model, guide, args, kwargs, plate, data_batch_size)
        vectorised = bool(vectorize_particles)
        if vectorised and (reason := pair.reason_to_loop()):
            if vectorize_particles is True:
                raise ValueError(
                    f"the program cannot draw its particles under an outer plate ({reason}); "
                    f"vectorize_particles='auto' draws them one by one"
                )
            warnings.warn(
                f"particles are drawn one by one, which is slow: under an outer plate the program fails ({reason}); "
                f"networks that keep leading dimensions (no view(-1, D), no fixed dim=1) allow it",
                stacklevel=3,
            )
            vectorised = False
        block_size, chunk_size = pair.sizes(num_particles, data_batch_size, particle_batch_size)
        with tqdm(total=pair.num_data, unit=" data", desc="log weights", disable=not progress) as bar:
            for start in range(0, pair.num_data, block_size):
                stop = min(start + block_size, pair.num_data)
                yield pair.block(start, stop, num_particles, chunk_size, vectorised)
                bar.update(stop - start)


class _Pair:
    """A model/guide pair with its arguments, looked at once; `block` then draws weights for a range of data."""

    @torch.no_grad()
    def __init__(self, model, guide, args, kwargs, plate, data_batch_size):
        self.model, self.guide, self.plate = model, guide, plate
        self.args, self.kwargs = args, kwargs
        self.split_size: int | None = None
        tensors: list[Tensor] = []
        _map_tensors(tensors.append, (args, kwargs))
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
                layout, model_trace, guide_trace = inspect_pair(self.model, self.guide, *self._cut(rows), self.plate)
                if layout.dim is None or layout.subsampled or layout.num_data != head:
                    raise ValueError("the tensors passed do not set the size of the datum plate")
                whole = log_weights_of(layout, model_trace, guide_trace)
                pieces = []
                for start, stop in pairwise(edges):
                    replayed = select_data(guide_trace, layout, start, stop)
                    traces = run_pair(self.model, self.guide, *self._cut(rows[start:stop]), replayed)
                    pieces.append(log_weights_of(layout._replace(num_data=stop - start), *traces))
                if not _agree(whole, torch.cat(pieces, 1)):
                    raise ValueError("data influence each other")
        except Exception:  # whatever a program says to a slice of its data, it is asked again with all of them
            self.split_size = None
            return False
        self.layout, self.num_data = layout, length
        self.row_size = _row_size(model_trace, layout)
        return True

    def _cut(self, rows: slice | Tensor) -> tuple[tuple, dict]:
        if self.split_size is None:
            return self.args, self.kwargs
        return _map_tensors(
            lambda tensor: tensor[rows] if tensor.ndim and len(tensor) == self.split_size else tensor,
            (self.args, self.kwargs),
        )

    def sizes(self, num_particles: int, data_batch_size: Any, particle_batch_size: Any) -> tuple[int, int]:
        """(data per block, particles per chunk)."""
        elements, weights = (_GPU_ELEMENTS, _GPU_WEIGHTS) if self.cuda else (_CPU_ELEMENTS, _CPU_WEIGHTS)
        rows = max(1, elements // max(self.row_size, _ROW_SIZE))
        block = self.num_data
        if self.split_size is not None:
            if data_batch_size == "auto":
                fewest = min(num_particles, _FEWEST_PARTICLES)
                data_batch_size = max(1, min(rows // fewest, weights // num_particles))
            block = min(block, data_batch_size)
        chunk = max(1, rows // block) if particle_batch_size == "auto" else particle_batch_size
        return block, min(chunk, num_particles)

    @torch.no_grad()
    def reason_to_loop(self) -> str | None:
        """Why particles must be drawn one by one; None where two drawn together are the same two drawn apart."""
        head = min(self.num_data, _HEAD)
        args, kwargs = self._cut(slice(head))
        layout = self._layout_of(0, head)
        try:
            model_trace, guide_trace = self._run(args, kwargs, _amortised(self.guide, args, kwargs), layout, 2)
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
        args, kwargs = self._cut(slice(start, stop))
        layout = self._layout_of(start, stop)
        guide = _amortised(self.guide, args, kwargs)
        chunks = []
        drawn = 0
        while drawn < num_particles:
            size = min(chunk_size, num_particles - drawn) if vectorised else None
            model_trace, guide_trace = self._run(args, kwargs, guide, layout, size)
            if not chunks and self.split_size is not None:
                self._refuse_impossible(model_trace, args, kwargs, layout, size)
            chunks.append(log_weights_of(layout, model_trace, guide_trace, size))
            drawn += size or 1
        return torch.cat(chunks)

    def _refuse_impossible(self, model_trace, args, kwargs, layout, size) -> None:
        for _, site in sample_sites(model_trace):
            if site["is_observed"] and (possible := is_possible(site)) is not None and not possible.all():
                other_trace, _ = self._run(args, kwargs, self.guide, layout, size)
                refuse_impossible_data(model_trace, other_trace)

    def _layout_of(self, start: int, stop: int) -> Layout:
        return self.layout if self.split_size is None else self.layout._replace(num_data=stop - start)

    def _run(self, args, kwargs, guide, layout: Layout, num_particles: int | None):
        """One run of the pair: of `num_particles` under an outer plate, or of one without."""
        if num_particles is None:
            return run_pair(self.model, guide, args, kwargs, layout.pinned)

        def under_plate(program):
            def run(*args, **kwargs):
                with pyro.plate(_PARTICLES, num_particles, dim=-1 - layout.max_plate_nesting):
                    return program(*args, **kwargs)

            return run

        return run_pair(under_plate(self.model), under_plate(guide), args, kwargs, layout.pinned)


def _amortised(guide: Program, args: tuple, kwargs: dict) -> Program:
    """The guide with its encoding of these data done once, where it offers that (see `pyrovae.guides.Guide`)."""
    if isinstance(guide, Guide) and type(guide).forward is Guide.forward:  # a forward of its own is the user's guide
        return guide.amortised_at(*args, **kwargs)
    return guide


def _agree(first: Tensor, second: Tensor) -> bool:
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    scale = first[first.isfinite()].abs().max().item() if first.isfinite().any() else 1.0
    return first.shape == second.shape and torch.allclose(
        first, second, rtol=tolerance, atol=tolerance * max(1.0, scale)
    )


def _row_size(model_trace: Trace, layout: Layout) -> int:
    """Floats that one particle of one datum takes at the largest site."""
    return max(site["value"].numel() for _, site in sample_sites(model_trace)) // layout.num_data


def _map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply `function` to the tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(function, value) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_map_tensors(function, value) for value in tree)
    return tree
