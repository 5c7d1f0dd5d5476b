"""Inspects a model/guide pair with all its data: `inspect` returns the `Pair` from which particles are drawn.

Data are passed in blocks if pieces of them give the same weights as the whole, which is tested by comparison.
"""

import math
from contextlib import suppress
from typing import Literal, NamedTuple

import pyro
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pyrovae.common.arguments import map_tensors
from pyrovae.programs.enumeration import SummedOut
from pyrovae.programs.inspection import inspect_pair
from pyrovae.programs.log_densities import InspectedPair, log_weights_of, summed_sites
from pyrovae.programs.pair import HEAD, EncodesOnce, Pair, choose_rows, encode_once, guide_given
from pyrovae.programs.parameters import check_program
from pyrovae.programs.reach import modules_behind
from pyrovae.programs.reruns import equivalent
from pyrovae.programs.traces import Layout, Program, as_guide, run_pair, sample_sites, select_data, trace_program

__all__ = ["inspect"]

_LOOK = 2**19  # numbers of data that pass through the program at once to inspect it
_OF_MODULES = "$$$"  # marks the parameters that Pyro's store has from a module


class _Programs(NamedTuple):
    model: Program
    guide: Program
    args: tuple
    kwargs: dict
    plate: str | None


@torch.no_grad()
def inspect(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    plate: str | None = None,
    data_batch_size: int | Literal["auto"] | None = "auto",
) -> Pair:
    """Inspect a model/guide pair with all its data, and raise an error if its log weights would be wrong.

    Args:
        model: A Pyro program.
        guide: A Pyro program.
        args: The arguments of both, on their device.
        kwargs: The keyword arguments of both.
        plate: Name of the plate that indexes the data; found from the programs by default.
        data_batch_size: Data per block, as the caller asks for it; None does not cut the data.

    Returns:
        The pair, with its layout and whether its data can be cut.

    Raises:
        ValueError: For everything that `inspect_pair` refuses, and for blocks of data if they cannot be cut.
        TypeError: For programs that cannot be called, or that fail on arguments that are not tensors.
    """
    check_program("model", model)
    check_program("guide", guide)
    programs = _Programs(model, as_guide(guide), args, kwargs, plate)
    tensors: list[Tensor] = []
    map_tensors(tensors.append, (args, kwargs))
    sizes: dict[int, int] = {}  # numbers in a row of all tensors of one length, by that length
    for tensor in tensors:
        if tensor.ndim and len(tensor) > 1 and data_batch_size is not None:
            sizes[len(tensor)] = sizes.get(len(tensor), 0) + tensor.numel() // len(tensor)
    # If the first call creates parameters, it must see all the data, not only the few that are inspected.
    if sizes and any(_is_unready(module) for root in modules_behind(programs.guide) for module in root.modules()):
        trace_program(programs.guide, args, kwargs)
    store = pyro.get_param_store()
    known = set(store.keys())
    found = None
    for is_second in (False, True):
        for length, row_size in sizes.items():
            with suppress(Exception):  # any error on a part of the data: the program is run again on all of them
                found = length, _inspect_some(programs, length, row_size, 1 if data_batch_size == 1 else 2)
                break
        made = [name for name in store.keys() if name not in known and _OF_MODULES not in name]  # noqa: SIM118
        if is_second or not made:
            break
        # Parameters made on a few data may have their size: make them again on all of the data.
        found = None
        for name in made:
            del store[name]
        run_pair(model, programs.guide, args, kwargs)
    # A program that was refused on a few data is refused here on all of them, with the reason.
    split_size, pair = found or (None, _inspect_whole(programs))
    is_one = pair.layout.plate is not None and pair.layout.num_data == 1  # the last batch of a loader may be one datum
    if split_size is None and data_batch_size not in (None, "auto") and not is_one:
        raise ValueError(
            f"data_batch_size={data_batch_size}, but the program cannot be fed its data in blocks: either its "
            f"plate does not take its size from the tensors passed, or data influence each other; pass "
            f"data_batch_size=None to evaluate them together"
        )
    return _with_all_data(pair, programs, split_size, is_cuda=any(tensor.is_cuda for tensor in tensors))


def _with_all_data(pair: InspectedPair, programs: _Programs, split_size: int | None, is_cuda: bool) -> Pair:
    """The pair that was inspected, perhaps on some of the data, with all of them."""
    return Pair(
        pair.model,
        pair.guide.around(programs.guide) if isinstance(pair.guide, SummedOut) else programs.guide,
        *(programs.args, programs.kwargs),
        layout=pair.layout._replace(num_data=split_size or pair.layout.num_data),
        split_size=split_size,
        row_size=_row_size(pair),
        draws=any(not site["is_observed"] for _, site in sample_sites(pair.model_trace))
        or not isinstance(pair.model, SummedOut),
        is_cuda=is_cuda,
    )


def _inspect_whole(programs: _Programs) -> InspectedPair:
    model, guide, args, kwargs, plate = programs
    try:
        return inspect_pair(model, guide_given(guide, encode_once(guide, args, kwargs)), args, kwargs, plate)
    except (TypeError, AttributeError) as error:
        _explain(error, (*args, *kwargs.values()))
        raise


def _inspect_some(programs: _Programs, length: int, row_size: int, fewest: int) -> InspectedPair:
    """Inspect the pair on some rows of the tensors of this length; ValueError if pieces do not give the whole's weights.

    Tested on a few rows drawn from all data, which are also inspected, and on as many of the first rows as run fast.
    """
    model, guide, args, kwargs, plate = programs
    head, many = min(length, HEAD), min(length, max(HEAD, _LOOK // row_size))
    rows = _some(length, head)
    args, kwargs = map_tensors(choose_rows(length, rows), (args, kwargs))
    if isinstance(guide, EncodesOnce):
        guide = guide_given(guide, encode_once(guide, args, kwargs))
    pair = inspect_pair(model, guide, args, kwargs, plate, is_split=True)
    layout, traces = pair.layout, (pair.model_trace, pair.guide_trace)
    # A subsample size such as min(32, len(x)) keeps these few data whole, but would subsample more data.
    asked = any(trace.nodes[layout.plate]["fn"].subsample_size for trace in traces if layout.plate in trace)
    if layout.dim is None or layout.subsampled or layout.num_data != head or asked:
        raise ValueError("the tensors passed do not set the size of the datum plate")
    looks = [(rows, torch.arange(head)), (torch.arange(many), _some(many, head))][: 1 + (length > head)]
    programs = programs._replace(model=pair.model)
    if isinstance(pair.guide, SummedOut):
        programs = programs._replace(guide=pair.guide.around(programs.guide))
    if not all(_pieces_agree(programs, length, layout, whole, part, fewest) for whole, part in looks):
        raise ValueError("data influence each other")
    return pair


def _pieces_agree(programs: _Programs, length: int, layout: Layout, rows: Tensor, part: Tensor, fewest: int) -> bool:
    """Whether the data at positions `part` of `rows` have the same weights in small pieces as in all `rows`."""
    model, guide, args, kwargs, _ = programs
    pieces = _pieces(part, fewest)
    if len(pieces) == 1:  # one piece is the whole again, which tests nothing
        pieces = _pieces(part, 1)
    whole_cut, *cuts = (
        map_tensors(choose_rows(length, some), (args, kwargs)) for some in (rows, *(rows[piece] for piece in pieces))
    )
    outline = guide.outline() if isinstance(guide, EncodesOnce) else guide

    def both() -> tuple[Tensor, Tensor]:
        model_trace, guide_trace = run_pair(model, outline, *whole_cut)
        whole = log_weights_of(layout._replace(num_data=len(rows)), model_trace, guide_trace)
        apart = []
        for piece, cut in zip(pieces, cuts, strict=True):
            traces = run_pair(model, outline, *cut, select_data(guide_trace, layout, piece))
            apart.append(log_weights_of(layout._replace(num_data=len(piece)), *traces))
        return whole[:, part.to(whole.device)], torch.cat(apart, 1)

    return equivalent(both)


def _explain(error: Exception, arguments: tuple) -> None:
    """Raise TypeError if the programs may have failed because an argument is not a tensor."""
    for argument in arguments:
        if isinstance(argument, DataLoader | Dataset):
            advice = (
                "pass it as the only argument to log_marginal_likelihood, which goes through its batches, or evaluate "
                "them one by one"
            )
        elif isinstance(argument, tuple | list | dict) and len(arguments) == 1:
            first = next(iter(argument), 0) if isinstance(argument, dict) else 0
            advice = (
                f"a batch of {len(argument)} items goes to a program of {len(argument)} arguments item by item, and to "
                f"one of a single argument whole. Choose what the program takes with transform=, for example "
                f"transform=lambda batch: batch[{first!r}]"
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


def _row_size(pair: InspectedPair) -> int:
    """Numbers per particle and datum at the largest site, or in the largest table of a summed one."""
    sizes = [site["value"].numel() for _, site in sample_sites(pair.model_trace)]
    if isinstance(pair.model, SummedOut):
        trace = trace_program(pair.model, pair.args, pair.kwargs, pair.layout.pinned, pair.guide_trace)
        sites = (*dict(sample_sites(trace)).values(), *summed_sites(trace).values())
        sizes += [math.prod(site["fn"].batch_shape + site["fn"].event_shape) for site in sites]
    return max(sizes) // pair.layout.num_data
