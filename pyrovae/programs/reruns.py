"""Checks of repeated runs: same numbers under the same seed, unchanged buffers, and no coupling between data.

Every comparison uses its own random numbers, so that an evaluation draws the same numbers with and without it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyrovae.programs.auxiliary import is_delta
from pyrovae.programs.enumeration import SummedOut, summed_dims
from pyrovae.programs.equivalence import equivalent
from pyrovae.programs.log_densities import (
    InspectedPair,
    log_density_of_tables,
    log_joint_with,
    log_weights_of,
    site_log_prob,
    summed_sites,
    table_of,
    values_of_sum,
)
from pyrovae.programs.masks import SHARED, counted
from pyrovae.programs.reach import changed_buffers
from pyrovae.programs.supports import innermost, num_parts, support_of
from pyrovae.programs.traces import latents_of, run_pair, sample_sites, sequential_column, trace_program

__all__ = ["refuse_coupled_data", "refuse_influence_of_masked", "refuse_other_reruns", "same_random_numbers"]

_SEED = 20261126
_FEW = 16  # data that are told apart by all bits, whatever else shows
_BITS = 6  # length of the codes that tell data apart
_LOOKS = 4  # draws of summed sites that are compared with their tables
_MOST_DIMENSIONS = 64  # of a tensor
_NEGLIGIBLE = 1e-4  # nats; data may share the steps of an adaptive solver (a continuous flow)


@contextmanager
def same_random_numbers(*tensors: Tensor) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python with a constant, and restore them afterwards."""
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    before = pyro.util.get_rng_state()
    with torch.random.fork_rng(devices):
        try:
            pyro.util.set_rng_seed(_SEED)
            yield
        finally:
            pyro.util.set_rng_state(before)


def refuse_other_reruns(pair: InspectedPair) -> None:
    """Raise ValueError if a pair changes a buffer in evaluation mode, or gives other numbers under the same seed."""

    def run() -> Tensor:
        with same_random_numbers(*pair.values()):
            traces = run_pair(pair.model, pair.guide, pair.args, pair.kwargs, pair.layout.pinned)
            return log_weights_of(pair.layout, *traces)

    first, second = run(), run()
    same = torch.equal(first, second) or equivalent(lambda: (run(), run()))  # on a GPU, sums may round differently
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


def refuse_coupled_data(pair: InspectedPair, priors: Sequence[poutine.Trace], *, is_split: bool = False) -> None:
    """Raise ValueError if the model's density of a datum changes with the latents of other data.

    Then the joint density is no product over the data, and per-datum estimates do not add up to log p of the data.

    Args:
        pair: The model and the guide, with their traces.
        priors: Runs of the model alone, whose latents are tried too.
        is_split: Try fewer latents, because the caller also compares pieces of the data with the whole.

    Raises:
        ValueError: If the latents of some data change the density of others.
    """
    layout = pair.layout
    if layout.plate is None or layout.num_data < 2:
        return
    with same_random_numbers(*pair.values()):
        drawn = _drawn(pair)
        here, first, second = latents_of(pair.model_trace), _shaken(pair), _shaken(pair)
        # (values of all data, their density, values that some of the data get instead)
        density = _density(pair, here)
        swaps = [(here, density, drawn)]
        for trace in priors:
            swaps.append((here, density, {name: trace.nodes[name]["value"] for name in drawn if name in trace}))
        if any(first[name] is not value for name, value in here.items()):
            swaps.insert(1, (first, _density(pair, first), second))
        # Any two data differ in a bit of their codes (of more than 64 data, nearly all do).
        codes = torch.randperm(max(layout.num_data, 2**_BITS))[: layout.num_data] % 2**_BITS
    few = is_split and layout.num_data > _FEW
    if layout.num_data <= 2**_BITS and not few:
        codes = torch.arange(layout.num_data)
    bits = min(_BITS, (layout.num_data - 1).bit_length())
    trials = [(bit, side) for bit in range(min(bits, 2) if few else bits) for side in (0, 1)]
    for number, (bit, side) in enumerate(trials):
        changed = (codes >> bit) % 2 == side
        kept = (~changed).nonzero().squeeze(1)
        for values, before, others in swaps[number % len(swaps) :][:1] if few else swaps:
            if len(kept) and not _same_density(pair, values, before, _mixed(pair, values, others, changed), kept):
                raise ValueError(
                    f"the model couples the data of plate '{layout.plate}': the log density of a datum changes with "
                    f"the latents of other data (a factor over neighbours, attention or batch statistics across the "
                    f"plate), so per-datum estimates do not add up to log p of the data. Treat the data as a single "
                    f"datum by replacing the plate by .to_event(1) on its sites, or remove the coupling from the model"
                )


def refuse_influence_of_masked(pair: InspectedPair) -> None:
    """Raise ValueError if other terms of the model change with a latent, or part of it, that the model masks."""
    if isinstance(pair.model, SummedOut):
        _refuse_influence_of_masked_sums(pair)
    hidden = {}
    for name, site in sample_sites(pair.model_trace):
        seen = None if site["is_observed"] else counted(site)
        if seen is not None and not seen.all():
            hidden[name] = ~seen
    # A Delta outside plates may carry the prior of masked elements (NeuTraReparam). In a plate, Pyro would count that
    # prior once for each datum.
    carried = [site for _, site in sample_sites(pair.model_trace) if is_delta(site)]
    reparametrised = carried and any(name.endswith(SHARED) for name in hidden)
    if not hidden or (reparametrised and not any(site["cond_indep_stack"] for site in carried)):
        return
    with same_random_numbers(*pair.values()):
        other = _drawn(pair)
    for name, elements in hidden.items():
        site = pair.model_trace.nodes[name]
        inner = len(site["fn"].event_shape) - num_parts(site["fn"])
        values = {name: torch.where(elements[(...,) + (None,) * inner], other[name], site["value"])}
        if not _same_density(pair, {}, _density(pair, {}), values, slice(None)):
            _refuse_masked(name)


def _drawn(pair: InspectedPair) -> dict[str, Tensor]:
    """Draws of the guide."""
    program = pair.guide.drawn if isinstance(pair.guide, SummedOut) else pair.guide
    latents = latents_of(trace_program(program, pair.args, pair.kwargs, pair.layout.pinned))
    return {name: value for name, value in latents.items() if name in pair.guide_trace}


def _refuse_influence_of_masked_sums(pair: InspectedPair) -> None:
    """`refuse_influence_of_masked` for summed sites: masked elements may have any probabilities that sum to 1."""
    trace = trace_program(pair.model, pair.args, pair.kwargs, pair.layout.pinned, pair.guide_trace)
    summed = summed_sites(trace)
    tables = {name: (site, table_of(site)) for name, site in {**dict(sample_sites(trace)), **summed}.items()}
    before = log_density_of_tables(pair.layout, list(tables.values()))
    for name, site in summed.items():
        seen = counted(site)
        if seen is None or seen.all():
            continue
        table, dim = tables[name][1], site["infer"]["_enumerate_dim"]
        others = torch.arange(table.shape[dim]).to(table).log_softmax(0).reshape(-1, *[1] * (-1 - dim))
        changed = {**tables, name: (site, torch.where(seen, table, others))}
        after = log_density_of_tables(pair.layout, list(changed.values()))
        if not torch.allclose(before, after, rtol=1e-5, atol=_NEGLIGIBLE, equal_nan=True):
            _refuse_masked(name)


def _refuse_masked(name: str) -> NoReturn:
    raise ValueError(
        f"the model masks latent site '{name}' (or a part of it), and sites that are not masked depend on it: "
        f"without its prior there is no p(x). Mask these sites too, or remove the mask"
    )


def _shaken(pair: InspectedPair) -> dict[str, Tensor]:
    """Values of the model's latents whatever their probability: discrete ones by chance, real ones far apart."""
    values = latents_of(pair.model_trace)
    for name, value in values.items():
        base = innermost(pair.model_trace.nodes[name]["fn"])
        try:
            support = base.enumerate_support(expand=False) if base.has_enumerate_support else None
        except NotImplementedError:  # the total counts of the elements differ
            continue
        if support is not None:
            shape = value.shape[: value.ndim - len(base.event_shape)]
            values[name] = support.reshape(-1, *base.event_shape)[torch.randint(len(support), shape)].to(value)
        elif support_of(base) in (constraints.real, constraints.real_vector):
            values[name] = value + 3 * value.std(correction=0).clamp_min(1.0) * torch.randn_like(value)
    return values


def _density(pair: InspectedPair, values: dict[str, Tensor]) -> Tensor:
    with same_random_numbers(*pair.values()):  # hold fixed what the model draws outside of sample sites
        return log_joint_with(pair, values)


def _same_density(
    pair: InspectedPair, values: dict[str, Tensor], before: Tensor, others: dict[str, Tensor], data: Tensor | slice
) -> bool:
    """Whether the model's log density of some data is the same for other values of its latents as for `values`: `before`."""
    return torch.equal(before[:, data], _density(pair, others)[:, data]) or equivalent(
        lambda: (_density(pair, values)[:, data], _density(pair, others)[:, data]), atol=_NEGLIGIBLE
    )


def _mixed(
    pair: InspectedPair, values: dict[str, Tensor], other: dict[str, Tensor], changed: Tensor
) -> dict[str, Tensor]:
    """Values of the model's latents; the data marked in `changed` have the other ones."""
    layout, mixed = pair.layout, {}
    for name, value in values.items():
        site = pair.model_trace.nodes[name]
        if layout.dim is None:
            mixed[name] = other[name] if changed[sequential_column(site, layout)] else value
            continue
        shape = [1] * value.ndim
        shape[layout.dim - len(site["fn"].event_shape)] = layout.num_data
        mixed[name] = torch.where(changed.reshape(shape).to(value.device), other[name], value)
    return mixed
