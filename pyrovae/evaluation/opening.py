"""Begin an evaluation: check its options, and inspect the programs with the data that the user passed.

`opened` does all of it. The data are arguments of the programs, or a `DataLoader` or `Dataset` that memory does not hold,
whose batches `parts_of` gives one by one.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from pyrovae.common.arguments import check_count, map_tensors
from pyrovae.data.conversion import Numbers
from pyrovae.data.forms import as_arguments, as_batch, by_position, is_stream, takes_items
from pyrovae.programs.pair import Pair
from pyrovae.programs.parameters import check_arguments, check_names, numbers_of
from pyrovae.programs.particles import check_memory
from pyrovae.programs.precision import check_precision
from pyrovae.programs.reach import evaluation_mode
from pyrovae.programs.splitting import inspect
from pyrovae.programs.traces import Program

__all__ = ["Options", "Part", "SamplingOptions", "evaluation_of", "opened", "parts_of"]

_ROWS = 500  # data in a batch of a data set

Prepare = Callable[[tuple, dict[str, Any]], tuple[Program, Program, tuple, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every evaluation; see `log_marginal_likelihood` for their meaning."""

    plate: str | None = None
    data_batch_size: int | Literal["auto"] | None = "auto"
    compile: bool | Literal["auto"] = "auto"
    progress: bool = False

    counts: ClassVar[tuple[str, ...]] = ()  # options that are 1 or more; the first: weights per datum

    def __post_init__(self) -> None:
        for name in self.counts:
            self._check_count(name)
        if self.data_batch_size not in ("auto", None):
            self._check_count("data_batch_size")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', found {self.compile!r}")

    def _check_count(self, name: str) -> None:
        object.__setattr__(self, name, check_count(name, getattr(self, name)))  # the dataclass is frozen


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """Options of importance sampling."""

    num_particles: int
    vectorize_particles: bool | Literal["auto"] = "auto"
    particle_batch_size: int | Literal["auto"] = "auto"
    precision: Literal["float32", "medium", "bf16"] = "float32"

    counts: ClassVar[tuple[str, ...]] = ("num_particles",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_precision(self.precision)
        if self.particle_batch_size != "auto":
            self._check_count("particle_batch_size")
        if self.vectorize_particles not in (True, False, "auto"):
            raise ValueError(f"vectorize_particles must be True, False or 'auto', found {self.vectorize_particles!r}")


@contextmanager
def opened(
    model: Program,
    guide: Program | None,
    args: tuple,
    kwargs: dict[str, Any],
    options: Options,
    prepare: Prepare | None = None,
    evaluation: Callable | None = None,
) -> Iterator[Pair]:
    """Put the programs into evaluation mode, inspect them with the data, and yield the pair.

    Args:
        model: Pyro program.
        guide: Pyro program; None if `prepare` makes it.
        args: Their arguments, as the user passed them.
        kwargs: Their keyword arguments, likewise.
        options: The options of the evaluation.
        prepare: Maps the arguments, on the programs' device, to (model, guide, args, kwargs) to inspect.
        evaluation: The public function, whose options are named if one is misspelt; by default those in `options`.

    Raises:
        TypeError: A keyword argument is none of the programs'.
        ValueError: The weights of a single datum do not fit into memory; and everything that `inspect` refuses.
    """
    with evaluation_mode(model, guide) as device:
        names = [field.name for field in fields(options)] if evaluation is None else _options_of(evaluation)
        args, kwargs = _arguments((model, guide), args, kwargs, device, names)
        if options.counts:
            check_memory(options.counts[0], getattr(options, options.counts[0]), device)
        start: Any = guide  # if it is None, `inspect` raises the error
        if prepare is not None:
            model, start, args, kwargs = prepare(args, kwargs)
        yield inspect(model, start, args, kwargs, options.plate, options.data_batch_size)


@contextmanager
def evaluation_of(
    *programs: Any, args: tuple, kwargs: dict[str, Any], evaluation: Callable | None = None
) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Put the programs into evaluation mode, and yield the arguments to call them with; see `opened`."""
    with evaluation_mode(*programs) as device:
        yield _arguments(programs, args, kwargs, device, [] if evaluation is None else _options_of(evaluation))


def _options_of(evaluation: Callable) -> list[str]:
    """The names of the options of a public function."""
    parameters = signature(evaluation).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _arguments(
    programs: tuple, args: tuple, kwargs: dict[str, Any], device: torch.device | None, options: Collection[str]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments to call the programs with: the items of a batch, tensors in place of arrays, on their device."""
    called = [program for program in programs if program is not None]
    numbers = numbers_of(*called)
    are_ready = (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and (numbers.dtype in (None, value.dtype) and device in (None, value.device))
        and not getattr(value, "num_missing_cells", 0)  # a table's values, which may lack their mask
        for value in args
    )
    if args and not kwargs and all(are_ready):
        return args, kwargs
    check_names(called, kwargs, options)
    check_arguments(called, args, kwargs)
    if len(args) == 1 and not kwargs and isinstance(args[0], tuple | list | Mapping | TensorDataset):
        items = args[0].tensors if isinstance(args[0], TensorDataset) else args[0]
        if takes_items(called, items):
            args, kwargs = ((), dict(items)) if isinstance(items, Mapping) else (tuple(items), {})
    args, kwargs = as_arguments(*by_position(args, kwargs), numbers)
    if device is not None:
        args, kwargs = map_tensors(lambda tensor: tensor.to(device), (args, kwargs))
    return args, kwargs


class Part(NamedTuple):
    """A part of the data, as the arguments of the programs.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        before: How many data came before.
        num_data: How many data there are in all; None if this part holds all of them.
    """

    args: tuple
    kwargs: dict[str, Any]
    before: int
    num_data: int | None


def parts_of(args: tuple, kwargs: dict[str, Any], transform: Callable[[Any], Any] | None) -> Iterator[Part]:
    """Yield the batches of a `DataLoader` or `Dataset`, if that is the one argument; all arguments at once otherwise.

    Args:
        args: Arguments of an evaluation.
        kwargs: Keyword arguments.
        transform: Maps the argument, or each batch, to the data that the programs are called with.

    Raises:
        TypeError: `transform` is not a function, or is given with several arguments.
        ValueError: The loader shuffles, or drops its last data, so that the results would not be those of all data in
            order.
    """
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be a function of a batch, or None; found {transform!r}")
    if transform is not None and (len(args) != 1 or kwargs):
        raise TypeError(
            f"transform maps one argument, a batch; found {len(args)} arguments and the keywords {list(kwargs)}"
        )
    if len(args) != 1 or kwargs or isinstance(args[0], Tensor) or not is_stream(args[0]):
        yield Part(args if transform is None else (transform(args[0]),), kwargs, 0, None)
        return
    loader = args[0] if isinstance(args[0], DataLoader) else DataLoader(args[0], batch_size=_ROWS)
    _check_order(loader)
    before, num_data = 0, len(loader.dataset)  # type: ignore[arg-type]  # a data set with a sampler has a length
    for item in loader:
        batch = item[0] if isinstance(item, list | tuple) and len(item) == 1 else item
        batch = batch if transform is None else transform(batch)
        yield Part((batch,), {}, before, num_data)
        before += as_batch(batch, Numbers()).num_data


def _check_order(loader: DataLoader) -> None:
    """Raise ValueError unless the loader goes through all data once, in order: results have no other index."""
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    drops = getattr(batches, "drop_last", False)
    if type(sampler) is SequentialSampler and (batches is None or type(batches) is BatchSampler) and not drops:
        return
    how = "leaves data out (drop_last=True)" if drops else f"takes its data in the order of a {type(sampler).__name__}"
    raise ValueError(
        f"found a DataLoader that {how}, so that the results could not be matched to the data: make one with "
        f"shuffle=False and drop_last=False, without a sampler of its own"
    )
