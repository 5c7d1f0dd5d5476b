"""Refuse models in which the density of a datum depends on other data, or on latents that are masked."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyrovae.programs.auxiliary import is_delta
from pyrovae.programs.enumeration import SummedOut
from pyrovae.programs.log_densities import (
    InspectedPair,
    log_density_of_tables,
    log_joint_with,
    summed_sites,
    table_of,
)
from pyrovae.programs.masks import SHARED, counted
from pyrovae.programs.reruns import equivalent, same_random_numbers
from pyrovae.programs.supports import innermost, num_parts, support_of
from pyrovae.programs.traces import latents_of, sample_sites, sequential_column, trace_program

__all__ = ["refuse_coupled_data", "refuse_influence_of_masked"]

_FEW = 16  # up to this many data, all bits of the codes are tried, even if `is_split`
_BITS = 6  # length of the codes that tell data apart
_NEGLIGIBLE = 1e-4  # nats; data may share the steps of an adaptive solver (a continuous flow)


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
        here, first, second = latents_of(pair.model_trace), _far_values(pair), _far_values(pair)
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


def _far_values(pair: InspectedPair) -> dict[str, Tensor]:
    """Random values of the model's latents, whatever their probability: discrete ones uniform, real ones far apart."""
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
