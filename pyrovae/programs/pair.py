"""A model/guide pair: inspects it, splits its data into blocks, and draws log weights.

Particles are drawn together under an outer plate if that gives the same weights as particles drawn one by one. Data are
passed in blocks if pieces of them give the same weights as the whole. Both are tested by comparison.
"""

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pyrovae.common.arguments import map_tensors
from pyrovae.programs.equivalence import equivalent
from pyrovae.programs.inspection import inspect_pair, refuse_impossible_data
from pyrovae.programs.parameters import check_program
from pyrovae.programs.particles import halved, reason_to_loop, run_particles
from pyrovae.programs.reach import modules_behind
from pyrovae.programs.traces import (
    Layout,
    Program,
    as_guide,
    log_weights_of,
    run_pair,
    sample_sites,
    select_data,
    trace_program,
)

__all__ = ["EncodesOnce", "Pair", "RecordedChunk"]

# Numbers that pass through the networks at once; a row (one particle of one datum) counts as at least _ROW_SIZE
# numbers. On a CPU the activations should fit into the cache, which decides the speed; a GPU should be filled.
_CPU_ELEMENTS, _GPU_ELEMENTS, _ROW_SIZE = 2**20, 2**26, 512
_CPU_WEIGHTS, _GPU_WEIGHTS = 2**18, 2**26  # weights kept at once: all S of each datum of a block
_FEWEST_PARTICLES = 16  # drawn at once, so that encoding takes a small share of the time
_HEAD = 32  # data used to inspect a program
_LOOK = 2**19  # numbers of data that pass through the program at once to inspect it
_OTHERS = 8  # further runs, all of which must find data impossible before they are reported
_OF_MODULES = "$$$"  # marks the parameters that Pyro's store has from a module


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


class RecordedChunk(NamedTuple):
    """A recorded function that draws a chunk of log weights.

    Attributes:
        sizes: The (data, particles) of the chunk.
        given: (encoded, args, kwargs) -> a function that draws the next chunk for these data.
    """

    sizes: tuple[int, int]
    given: Callable[..., Callable[[], Tensor]]


class Pair:
    """A model/guide pair with its arguments: inspected once, after which `block` draws weights for a range of data."""

    @torch.no_grad()
    def __init__(
        self, model: Program, guide: Program, args: tuple, kwargs: dict, plate: str | None, data_batch_size: Any
    ):
        check_program("model", model)
        check_program("guide", guide)
        self.model, self.guide, self.plate = model, as_guide(guide), plate
        self.args, self.kwargs = args, kwargs
        self.split_size: int | None = None
        self.most_particles = sys.maxsize  # drawn at once; reduced when memory runs out
        tensors: list[Tensor] = []
        map_tensors(tensors.append, (args, kwargs))
        self.cuda = any(tensor.is_cuda for tensor in tensors)
        if data_batch_size is not None and self._find_split(tensors, fewest=1 if data_batch_size == 1 else 2):
            return
        # A program that was refused on a few data is refused here on all of them, with the reason.
        try:
            self.layout, model_trace, _ = inspect_pair(
                model, self.guide_given(self.encode(args, kwargs)), args, kwargs, plate
            )
        except (TypeError, AttributeError) as error:
            _explain(error, (*args, *kwargs.values()))
            raise
        self.num_data = self.layout.num_data
        self.row_size = _row_size(model_trace, self.layout)
        if data_batch_size not in (None, "auto"):
            raise ValueError(
                f"data_batch_size={data_batch_size}, but the program cannot be fed its data in blocks: either its "
                f"plate does not take its size from the tensors passed, or data influence each other; pass "
                f"data_batch_size=None to evaluate them together"
            )

    def _find_split(self, tensors: list[Tensor], fewest: int) -> bool:
        """Whether tensors can be split into blocks of at least `fewest` rows."""
        sizes = {len(tensor): 0 for tensor in tensors if tensor.ndim and len(tensor) > 1}
        for tensor in tensors:
            if tensor.ndim and len(tensor) in sizes:
                sizes[len(tensor)] += tensor.numel() // len(tensor)
        # If the first call creates parameters, it must see all the data, not only the few that are inspected.
        if sizes and any(_is_unready(module) for root in modules_behind(self.guide) for module in root.modules()):
            trace_program(self.guide, self.args, self.kwargs)
        store = pyro.get_param_store()
        known = set(store.keys())
        found = any(self._try_to_split(length, row_size, fewest) for length, row_size in sizes.items())
        made = [name for name in store.keys() if name not in known and _OF_MODULES not in name]  # noqa: SIM118
        if not made:
            return found
        for name in made:
            del store[name]
        run_pair(self.model, self.guide, self.args, self.kwargs)
        return any(self._try_to_split(length, row_size, fewest) for length, row_size in sizes.items())

    def _try_to_split(self, length: int, row_size: int, fewest: int) -> bool:
        """Whether tensors of this length can be split into blocks, so that pieces give the same weights as the whole.

        Tested on a few rows drawn from all data, which are also inspected, and on as many of the first rows as run
        fast.
        """
        self.split_size = length
        head, many = min(length, _HEAD), min(length, max(_HEAD, _LOOK // row_size))
        try:
            rows = _some(length, head)
            args, kwargs = self.cut(rows)
            guide = self.guide_given(self.encode(args, kwargs))
            layout, *traces = inspect_pair(self.model, guide, args, kwargs, self.plate, is_split=True)
            # A subsample size such as min(32, len(x)) keeps these few data whole, but would subsample more data.
            asked = any(trace.nodes[layout.plate]["fn"].subsample_size for trace in traces if layout.plate in trace)
            if layout.dim is None or layout.subsampled or layout.num_data != head or asked:
                raise ValueError("the tensors passed do not set the size of the datum plate")
            looks = [(rows, torch.arange(head)), (torch.arange(many), _some(many, head))][: 1 + (length > head)]
            if not all(self._pieces_agree(layout, whole, part, fewest) for whole, part in looks):
                raise ValueError("data influence each other")
        except Exception:  # any error on a part of the data: the program is run again on all of them
            self.split_size = None
            return False
        self.layout, self.num_data = layout, length
        self.row_size = _row_size(traces[0], layout)
        return True

    def _pieces_agree(self, layout: Layout, rows: Tensor, part: Tensor, fewest: int) -> bool:
        """Whether the data at positions `part` of `rows` have the same weights in small pieces as in all `rows`."""
        pieces = _pieces(part, fewest)
        if len(pieces) == 1:  # one piece is the whole again, which tests nothing
            pieces = _pieces(part, 1)
        whole_cut, cuts = self.cut(rows), [self.cut(rows[piece]) for piece in pieces]
        guide = self.guide.outline() if isinstance(self.guide, EncodesOnce) else self.guide

        def both() -> tuple[Tensor, Tensor]:
            model_trace, guide_trace = run_pair(self.model, guide, *whole_cut)
            whole = log_weights_of(layout._replace(num_data=len(rows)), model_trace, guide_trace)
            apart = []
            for piece, cut in zip(pieces, cuts, strict=True):
                traces = run_pair(self.model, guide, *cut, select_data(guide_trace, layout, piece))
                apart.append(log_weights_of(layout._replace(num_data=len(piece)), *traces))
            return whole[:, part.to(whole.device)], torch.cat(apart, 1)

        return equivalent(both)

    def cut(self, rows: slice | Tensor) -> tuple[tuple, dict]:
        if self.split_size is None:
            return self.args, self.kwargs
        return map_tensors(
            lambda tensor: tensor[rows] if tensor.ndim and len(tensor) == self.split_size else tensor,
            (self.args, self.kwargs),
        )

    @property
    def rows(self) -> int:
        """Particles times data that pass through the networks at once."""
        elements = _GPU_ELEMENTS if self.cuda else _CPU_ELEMENTS
        return max(1, elements // max(self.row_size, _ROW_SIZE))

    def sizes(self, num_particles: int, data_batch_size: Any, particle_batch_size: Any) -> tuple[int, int]:
        """(data per block, particles per chunk)."""
        weights = _GPU_WEIGHTS if self.cuda else _CPU_WEIGHTS
        block = self.num_data
        if self.split_size is not None:
            if data_batch_size == "auto":
                fewest = min(num_particles, _FEWEST_PARTICLES)
                most = max(2, min(self.rows // fewest, weights // num_particles))
                # Make all blocks of one size if possible, because a recording is for one size.
                data_batch_size = -(-block // -(-block // most))
            block = min(block, data_batch_size)
        chunk = max(1, self.rows // block) if particle_batch_size == "auto" else particle_batch_size
        return block, min(chunk, num_particles)

    def blocks(self, size: int) -> Iterator[tuple[int, int]]:
        """Ranges of `size` data. A single row left over joins the last range: squeeze() in a program would drop it."""
        starts = list(range(0, self.num_data, size))
        if len(starts) > 1 and size > 1 and self.num_data - starts[-1] == 1:
            starts.pop()
        return pairwise([*starts, self.num_data])

    @torch.no_grad()
    def reason_to_loop(self, block_size: int) -> str | None:
        """Why particles must be drawn one by one; None if they can be drawn together."""
        heads = (
            {min(self.num_data, _HEAD)} if self.split_size is None else {min(self.num_data, _HEAD), min(block_size, 2)}
        )
        for head in sorted(heads, reverse=True):
            args, kwargs = self.cut(slice(head))
            guide = self.guide_given(self.encode(args, kwargs))
            if reason := reason_to_loop(self.model, guide, args, kwargs, self.layout_of(0, head)):
                return reason
        return None

    @torch.no_grad()
    def block(
        self,
        start: int,
        stop: int,
        num_particles: int,
        chunk_size: int,
        vectorised: bool,
        recorded: "RecordedChunk | None" = None,
    ) -> Tensor:
        """Log weights (S, stop - start) of a range of data, by the recording if it has this chunk size."""
        args, kwargs = self.cut(slice(start, stop))
        layout = self.layout_of(start, stop)
        encoded = self.encode(args, kwargs)
        # Allocate one array at the start: small arrays kept among large ones that are freed prevent the heap from
        # shrinking.
        log_weights = torch.empty(0)
        drawn = 0
        draw: Callable[[], Tensor] | None = None
        while drawn < num_particles:
            size = min(chunk_size, self.most_particles, num_particles - drawn) if vectorised else None
            too_many = None
            try:
                # The first chunk of each block is drawn eagerly, with every check.
                if drawn and recorded is not None and (layout.num_data, size) == recorded.sizes:
                    draw = draw or recorded.given(encoded, args, kwargs)
                    chunk = draw()
                else:
                    chunk = self._chunk(encoded, args, kwargs, layout, size, is_first=not drawn)
            except torch.OutOfMemoryError as error:
                too_many = error.with_traceback(None)  # the frames of the traceback keep large tensors alive
            if too_many is not None:
                self.most_particles = halved(size, layout.num_data, too_many)
                continue
            if not drawn:
                log_weights = chunk.new_empty(num_particles, chunk.shape[1])
            log_weights[drawn : drawn + len(chunk)] = chunk
            drawn += len(chunk)
        return log_weights

    def _chunk(
        self, encoded: Tensor | None, args: tuple, kwargs: dict, layout: Layout, size: int | None, is_first: bool
    ) -> Tensor:
        """Log weights (size, B) of some particles."""
        model_trace, guide_trace = self._run(encoded, args, kwargs, layout, size)
        if is_first and self.split_size is not None:
            self._refuse_impossible(model_trace, args, kwargs, layout, size)
        return log_weights_of(layout, model_trace, guide_trace, size)

    def chunk_of(self, num_data: int, num_particles: int) -> tuple[Callable[..., Tensor], tuple[Any, tuple, dict]]:
        """(draw, arguments) to record: draw(encoded, args, kwargs) gives the log weights of a chunk of this size."""
        args, kwargs = self.cut(slice(num_data))
        layout = self.layout_of(0, num_data)

        def draw(encoded: Tensor | None, args: tuple, kwargs: dict) -> Tensor:
            return log_weights_of(layout, *self._run(encoded, args, kwargs, layout, num_particles), num_particles)

        return draw, (self.encode(args, kwargs), args, kwargs)

    def _refuse_impossible(
        self, model_trace: Trace, args: tuple, kwargs: dict, layout: Layout, size: int | None
    ) -> None:
        others = (self._run(None, args, kwargs, layout, size)[0] for _ in range(_OTHERS))
        refuse_impossible_data(model_trace, others)

    def layout_of(self, start: int, stop: int) -> Layout:
        return self.layout if self.split_size is None else self.layout._replace(num_data=stop - start)

    def encode(self, args: tuple, kwargs: dict) -> Tensor | None:
        """The guide's encoding of these data; None if the guide does not encode once (`EncodesOnce`)."""
        guide = self.guide
        return guide.encode(*args, **kwargs) if isinstance(guide, EncodesOnce) and guide.encodes_once else None

    def guide_given(self, encoded: Tensor | None) -> Program:
        """The guide that draws from the encoding of `encode`."""
        if encoded is None:
            return self.guide
        assert isinstance(self.guide, EncodesOnce)  # `encode` has checked it
        return self.guide.given(encoded)

    def _run(
        self, encoded: Tensor | None, args: tuple, kwargs: dict, layout: Layout, num_particles: int | None
    ) -> tuple[Trace, Trace]:
        """Run the pair once: with `num_particles` under an outer plate, or with one particle if None."""
        return run_particles(self.model, self.guide_given(encoded), args, kwargs, layout, num_particles)


def _explain(error: Exception, arguments: tuple) -> None:
    """Raise TypeError if the programs may have failed because an argument is not a tensor."""
    for argument in arguments:
        if isinstance(argument, DataLoader | Dataset):
            advice = (
                "evaluate its batches one by one, log_marginal_likelihood(model, guide, batch), and join the results "
                "with LogMarginalLikelihood.concatenate"
            )
        elif hasattr(argument, "__array__") and not isinstance(argument, Tensor):
            advice = "convert it to a tensor of the programs' dtype, torch.as_tensor(x, dtype=torch.float32)"
        else:
            continue
        raise TypeError(
            f"the programs were called with a {type(argument).__name__} and failed ({type(error).__name__}: {error}); "
            f"they get the arguments as passed, and most programs need tensors: {advice}"
        ) from error


def _some(length: int, count: int) -> Tensor:
    """`count` random positions of 0 ... length - 1, in order."""
    return torch.randperm(length)[:count].sort().values


def _pieces(positions: Tensor, fewest: int) -> list[Tensor]:
    """Split positions into pieces of different sizes, none shorter than `fewest` if there are enough positions."""
    sizes: list[int] = []
    for size in (fewest, fewest, 3, 6, 5, 7):
        if sum(sizes) + size + fewest <= len(positions):
            sizes.append(size)
    return list(positions.split([*sizes, len(positions) - sum(sizes)]))


def _is_unready(module: nn.Module) -> bool:
    """Whether a module is an autoguide of Pyro that has not been called yet."""
    return hasattr(module, "prototype_trace") and module.prototype_trace is None


def _row_size(model_trace: Trace, layout: Layout) -> int:
    """Numbers per particle and datum at the largest site."""
    return max(site["value"].numel() for _, site in sample_sites(model_trace)) // layout.num_data
