"""Run programs again and compare: the same numbers under the same seed, and the same density by another way.

In float32 rounding can hide a difference: at |log w| = 1,000 and with networks, correct weights differ by 0.01 nats
between batch sizes, and data that influence each other as weakly would pass. So both ways are run in float64, whatever
the program's dtype: a dispatch mode casts the inputs of each operation. If a program cannot run in float64, it is
compared in its own precision.

Every comparison uses its own random numbers, so that an evaluation draws the same numbers with and without it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae.common.random_numbers import seeded, states_under
from pyrovae.programs.auxiliary import is_delta
from pyrovae.programs.enumeration import SummedOut, summed_dims
from pyrovae.programs.log_densities import InspectedPair, log_weights_of, site_log_prob, summed_sites, values_of_sum
from pyrovae.programs.reach import changed_buffers, modules_behind
from pyrovae.programs.supports import innermost, support_of
from pyrovae.programs.traces import Layout, run_pair, sample_sites, trace_program

__all__ = [
    "equivalent",
    "in_float64",
    "refuse_other_reruns",
    "refuse_other_tables_in_training",
    "refuse_wrong_tables",
    "same_random_numbers",
]

_LOW = {torch.float32, torch.float16, torch.bfloat16}
_SEED = 20261126
_OTHER_SEED = _SEED + 1
_RARE = -14.0  # log of a probability at which equal draws are no accident
_LOOKS = 4  # draws of summed sites that are compared with their tables
_MOST_DIMENSIONS = 64  # of a tensor


def equivalent(both: Callable[[], tuple[Tensor, Tensor]], *, atol: float = 0.0) -> bool:
    """Whether the two log weights of `both()` agree up to rounding, or up to `atol` nats if that is more."""
    try:
        with in_float64():
            first, second = both()
    except Exception:  # the program does not run in float64: compare in its own precision
        first, second = both()
    if first.shape != second.shape:
        return False
    finite = first[first.isfinite()]
    scale = max(1.0, finite.abs().max().item()) if len(finite) else 1.0
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (first, second))
    tolerance = scale * (256 * eps if eps > 1e-12 else eps**0.5)
    return torch.allclose(first.double(), second.double(), rtol=0.0, atol=max(tolerance, atol), equal_nan=True)


class in_float64(TorchDispatchMode):
    """Context in which floating-point operations give float64: their inputs are cast, parameters and constants
    included.

    Views and in-place operations keep their dtype, because they would act on a copy.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; with True, torch imports its compiler, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if not func.is_view and not func._schema.is_mutable:
            args, named = tuple(map(_cast, args)), {name: _cast(value) for name, value in named.items()}
            if named.get("dtype") in _LOW:
                named["dtype"] = torch.float64
        return func(*args, **named)


def _cast(value: Any) -> Any:
    """The value with its floating-point tensors in float64; operations take tensors, and lists of them."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _LOW else value
    return [_cast(item) for item in value] if type(value) in (list, tuple) else value


@contextmanager
def same_random_numbers(*tensors: Tensor, seed: int = _SEED) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python with a constant, and restore them afterwards."""
    before = pyro.util.get_rng_state()
    with seeded(seed, *(tensor.device for tensor in tensors)):
        try:
            pyro.util.set_rng_state(states_under(seed))
            yield
        finally:
            pyro.util.set_rng_state(before)


def refuse_other_reruns(pair: InspectedPair) -> None:
    """Raise ValueError for a pair whose runs depend on more than the seed, or not on it.

    Such a pair changes a buffer in evaluation mode, gives other numbers under the same seed, or seeds itself.
    """

    def run() -> tuple[Tensor, _Draws]:
        with same_random_numbers(*pair.values()):
            draws = _draw(pair)
            return log_weights_of(pair.layout, *draws.traces), draws

    (first, draws), (second, _) = run(), run()
    # On a GPU, sums may round differently.
    same = torch.equal(first, second) or equivalent(lambda: (run()[0], run()[0]))
    if changed := changed_buffers():
        raise ValueError(
            f"running the programs changes buffers in evaluation mode ({', '.join(changed[:3])}), so an evaluation "
            f"would change what it measures; the buffers were restored. Update them only if self.training is set, and "
            f"call eval() on modules that the programs do not refer to"
        )
    if not same:
        raise ValueError(
            "the programs give other log weights when they are run again under the same seed, so their numbers cannot "
            "be reproduced: some state in them changes from run to run (a counter, a cache, a generator of their own). "
            "Keep such state out of model and guide, and draw from torch's generator"
        )
    _refuse_seeds(pair, draws)


class _Draws(NamedTuple):
    traces: tuple[poutine.Trace, poutine.Trace]
    after: Tensor  # the state of torch's generator

    def sites(self) -> dict[str, dict]:
        return {name: site for trace in self.traces for name, site in sample_sites(trace)}


def _draw(pair: InspectedPair) -> _Draws:
    traces = run_pair(pair.model, pair.guide, pair.args, pair.kwargs, pair.layout.pinned)
    return _Draws(traces, torch.get_rng_state())


def _refuse_seeds(pair: InspectedPair, draws: _Draws) -> None:
    """Raise ValueError if a program seeds the random numbers itself, so that all its particles would be the same draw."""
    with same_random_numbers(*pair.values(), seed=_OTHER_SEED):
        other = _draw(pair)
    others = other.sites()
    same = [name for name, site in draws.sites().items() if name in others and _is_same_draw(site, others[name])]
    if same or torch.equal(draws.after, other.after):
        found = (
            f"draw the same values of site(s) {sorted(same)[:3]}"
            if same
            else "leave torch's generator in the same state"
        )
        raise ValueError(
            f"the programs {found} under different seeds, so every particle would be the same draw: take "
            f"pyro.set_rng_seed, torch.manual_seed and poutine.seed out of model and guide, and seed before the call. Weights at given draws "
            f"(poutine.replay) are the difference of log_prob_sum() of the traces of model and guide"
        )


def _is_same_draw(site: dict, other: dict) -> bool:
    """Whether two independent draws of a latent are equal, which is no accident."""
    if site["is_observed"] or is_delta(site) or not site["value"].numel():
        return False
    if site["value"].shape != other["value"].shape or not torch.equal(site["value"], other["value"]):
        return False
    support = support_of(site["fn"])
    has_masses = getattr(support, "is_discrete", False) or isinstance(innermost(site["fn"]), dist.Empirical)
    return not has_masses or bool(site["fn"].log_prob(site["value"]).sum() < _RARE)


def refuse_wrong_tables(pair: InspectedPair) -> None:
    """Raise ValueError if a program gives another density with all values of its summed sites at once than with one.

    A program may mix values along the dimensions of other data or plates (y.roll, y.sum, `if y > 0`).
    """
    for program, words in ((pair.model, "model"), (pair.guide, "guide")):
        if not isinstance(program, SummedOut):
            continue
        run = pair.args, pair.kwargs, pair.layout.pinned, pair.guide_trace
        with same_random_numbers(*pair.values()):
            draws = [trace_program(program.drawn, *run) for _ in range(_LOOKS)]
        _refuse_too_many_dimensions(words, program, draws[0])
        try:
            tables = trace_program(program, *run)
        except Exception as error:
            raise ValueError(
                f"the {words} fails with all values of site(s) {sorted(program.names)} at once, along a new batch "
                f"dimension on the left ({type(error).__name__}: {' '.join(str(error).split())}): write it so that "
                f"these sites may have batch dimensions of their own, for example broadcast latents and labels before "
                f"torch.cat, or sample the sites in both programs without the mark for enumeration"
            ) from error
        with same_random_numbers(*pair.values()):  # values of small probability too
            draws += [trace_program(program.drawn, *run, _any_values(drawn, tables)) for drawn in draws]
        for drawn in draws:
            _refuse_wrong_tables_of(words, drawn, tables)


def refuse_other_tables_in_training(guide: SummedOut, layout: Layout, args: tuple, kwargs: dict) -> None:
    """Raise ValueError if the guide's density of its draws, from a second run, is not that of the run that drew them.

    Evaluation mode must be off, so that dropout and batch statistics are those of training. Buffers are restored.
    """
    buffers = [buffer for module in modules_behind(guide.drawn) for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        for _ in range(_LOOKS):
            drawn = trace_program(guide.drawn, args, kwargs, layout.pinned)
            tables = trace_program(guide, args, kwargs, layout.pinned, drawn)
            _refuse_wrong_tables_of("guide", drawn, tables)
        if not all(map(torch.equal, buffers, before)):
            raise ValueError("running the guide changes its buffers")
    except ValueError as error:
        raise ValueError(
            f"site(s) {sorted(guide.names)} of the guide are marked for enumeration, so that each step runs the guide once "
            f"to draw and once more for its density, and in training mode the two runs differ ({error}): take dropout and "
            f"BatchNorm out of the guide, or leave the site(s) out of the guide and mark them in the model"
        ) from error
    finally:
        with torch.no_grad():
            for buffer, kept in zip(buffers, before, strict=True):
                buffer.copy_(kept)


def _refuse_too_many_dimensions(words: str, program: SummedOut, drawn: poutine.Trace) -> None:
    """Raise ValueError if the values of all sites need more dimensions than a tensor has."""
    apart = [name for name in program.names if name in drawn and "_markov_scope" not in drawn.nodes[name]["infer"]]
    if len(apart) + program.max_plate_nesting + 1 > _MOST_DIMENSIONS:
        raise ValueError(
            f"the {words} has {len(apart):,} sites to sum out, each with a dimension of its own, and tensors have "
            f"{_MOST_DIMENSIONS} at most: write a chain as 'for t in pyro.markov(range(...))', whose steps share "
            f"dimensions, and the data as 'with pyro.plate(...)'"
        )


def _any_values(drawn: poutine.Trace, tables: poutine.Trace) -> poutine.Trace:
    """A trace to replay, with values of the summed sites that are all equally likely."""
    replayed = poutine.Trace()
    for name, source in summed_sites(tables).items():
        if name in drawn:
            site, values = drawn.nodes[name], values_of_sum(source)
            shape = site["value"].shape[: site["value"].ndim - len(site["fn"].event_shape)]
            replayed.add_node(name, **{**site, "value": values[torch.randint(len(values), shape)]})
    return replayed


def _refuse_wrong_tables_of(program: str, drawn: poutine.Trace, tables: poutine.Trace) -> None:
    summed = summed_sites(tables)
    of_id = {site["infer"]["_dim_to_id"][site["infer"]["_enumerate_dim"]]: site for site in summed.values()}
    all_sites = {**dict(sample_sites(tables)), **summed}
    for name, site in sample_sites(drawn):
        if name not in all_sites:
            different = name
            break
        one, table = site_log_prob(site), site_log_prob(all_sites[name])
        for dim in summed_dims(all_sites[name], table.shape):
            source = of_id[all_sites[name]["infer"]["_dim_to_id"][dim]]
            index = _position(drawn.nodes[source["name"]], source)
            index = index.reshape((1,) * (table.ndim - index.ndim) + index.shape)
            table = table.take_along_dim(index, dim) if index.shape[dim] == 1 else table[:0]
        if not torch.isclose(table, one, rtol=1e-4, atol=1e-3, equal_nan=True).all():
            different = name
            break
    else:
        if len(all_sites) == len(dict(sample_sites(drawn))):
            return
        different = next(name for name in all_sites if name not in drawn)
    raise ValueError(
        f"the {program}'s site '{different}' has another log density with all values of site(s) {sorted(summed)} at "
        f"once, along a new batch dimension on the left, than with one value: the program mixes data, or decides by a "
        f"value. Use operations that act on each element alone (no sum or roll over plates, no `if` on a value), "
        f"or sample the site in both programs without the mark for enumeration"
    )


def _position(site: dict, source: dict) -> Tensor:
    """The positions of drawn values, (batch shape), in the list of a summed site's values."""
    event_dim = len(site["fn"].event_shape)
    values = values_of_sum(source)
    values = values.reshape(len(values), *[1] * (site["value"].ndim - event_dim), *site["fn"].event_shape)
    equal = values == site["value"]
    return (equal.flatten(-event_dim).all(-1) if event_dim else equal).double().argmax(0)
