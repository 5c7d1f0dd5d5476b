"""Detect programs whose numbers depend on a datum's place in the batch, which shuffling changes at every step.

Causes are parameters per datum (an automatic guide of local latents has one for each place) and data that a program
holds itself instead of receiving them as an argument.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyrovae.compiled.signature import Snapshot
from pyrovae.data.forms import Batch
from pyrovae.programs.auxiliary import is_delta
from pyrovae.programs.log_densities import site_log_prob
from pyrovae.programs.reach import evaluation_mode
from pyrovae.programs.reruns import equivalent, in_float64
from pyrovae.programs.supports import innermost
from pyrovae.programs.traces import Program, run_pair, sample_sites

__all__ = ["by_position", "site_by_position"]

_FEW = 32  # rows that suffice, if the program accepts so few


def by_position(site: str) -> str:
    """The error message for a site whose numbers depend on the place of a datum in the batch."""
    return (
        f"the numbers of site '{site}' go by the place of a datum in the batch, but fit shuffles the data, so each place gets "
        f"other data at every step. If the guide has parameters per datum (an automatic guide of local latents does), use a "
        f"guide that computes them from the datum with a network. If a program holds data itself, pass them with the rest. "
        f"Or keep the order, with all data in one batch: pass DataLoader(TensorDataset(x), batch_size=len(x)) instead of x"
    )


def site_by_position(
    model: Program, guide: Program, batch: Batch, parameters: Sequence[Tensor], modules: Sequence[nn.Module]
) -> str | None:
    """Find a site in the datum plate whose numbers depend on the place in the batch instead of the datum.

    The programs run on some rows and on the same rows in another order, with the latents reordered alike. Parameters
    are perturbed meanwhile, because those of all places may start equal. Random state, parameters and buffers are
    restored.

    Returns:
        The name of the site. None if all numbers move with their data, and for programs that cannot be judged: without
        a plate of the data, with randomness outside sample sites, or with sites that change from run to run.
    """
    if batch.num_data < 2:
        return None
    devices = [batch.device] if batch.device.type == "cuda" else []
    with evaluation_mode(*modules), torch.random.fork_rng(devices), _perturbed(parameters, modules):
        for rows in dict.fromkeys((min(batch.num_data, _FEW), batch.num_data)):
            found = []
            # What NumPy rounds to float32 differs in float64, so a site must be found in both precisions.
            for precision in (in_float64, nullcontext):
                try:
                    with precision():
                        found.append(_look(model, guide, batch.rows(slice(rows)).detach()))
                except Exception:  # a program for whole batches only, or one that fails in float64
                    continue
                if found[-1] is None:
                    return None
            if found:
                return found[0]
    return None


def _look(model: Program, guide: Program, batch: Batch) -> str | None:
    rows = batch.num_data
    order = torch.arange(rows, device=batch.device).roll(1)
    traces, others = (run_pair(model, guide, batch.args, batch.kwargs) for _ in range(2))
    # A subsample that the program draws itself stays the same; one that it is given moves with the data.
    given = {name for name, site in traces[0].nodes.items() if _is_same_subsample(site, others[0].nodes.get(name))}
    latents = [site for _, site in sample_sites(traces[0]) if not site["is_observed"]]
    found = None
    plates = _plates(traces[0], rows)
    if not plates:
        raise ValueError(f"no plate of {rows} rows")
    for plate in plates:
        outside = [site["value"].numel() for site in latents if plate not in _dims(site, rows)]
        # Latents per datum outside any plate cannot be reordered.
        if len(outside) >= rows or any(numel > 1 and numel % rows == 0 for numel in outside):
            return None
        carried = [_carried(trace, plate, order, given) for trace in traces]
        moved = batch.rows(order)
        other = run_pair(model, guide, moved.args, moved.kwargs, *carried)
        # The last run detects state beyond the arguments: a count of runs, randomness outside sites.
        again = run_pair(
            *(model, guide, batch.args, batch.kwargs),
            *(_carried(trace, plate, order.sort().values, given) for trace in traces),
        )
        found = _first_apart(traces, again, other, plate, order)
        if found is None:
            return None
    return found


def _first_apart(
    traces: Sequence[poutine.Trace],
    again: Sequence[poutine.Trace],
    other: Sequence[poutine.Trace],
    plate: str,
    order: Tensor,
) -> str | None:
    """The first site whose numbers repeat in a second run but do not move with their data."""
    for first, second, moved in zip(traces, again, other, strict=True):
        for name, site in sample_sites(first):
            dim = _dims(site, len(order)).get(plate)
            if dim is None:
                continue
            numbers, repeated, there = (
                _per_datum(trace.nodes[name], dim, len(order)) for trace in (first, second, moved)
            )
            if _close(numbers, repeated) and not _close(numbers[order], there):
                return name.removesuffix("_unconstrained")  # the suffix that automatic guides give to auxiliary sites
    return None


def _close(first: Tensor, second: Tensor) -> bool:
    return equivalent(lambda: (first, second))


def _per_datum(site: dict, dim: int, rows: int) -> Tensor:
    """Numbers (rows, any) of a site: its log density, or the point of a Delta, and its scale; 0 for what is not finite."""
    scale = torch.as_tensor(site["scale"], device=site["value"].device)
    if is_delta(site):
        numbers = _by_row(innermost(site["fn"]).v, dim - len(site["fn"].event_shape), rows)
    else:
        numbers = _by_row(site_log_prob(site), dim, rows)
    numbers = torch.cat([numbers, _by_row(scale, dim, rows)], 1)
    return torch.where(numbers.isfinite(), numbers, 0.0)


def _by_row(numbers: Tensor, dim: int, rows: int) -> Tensor:
    shape = [1] * max(numbers.ndim, -dim)
    shape[dim] = rows
    return numbers.expand(torch.broadcast_shapes(numbers.shape, shape)).movedim(dim, 0).reshape(rows, -1)


def _plates(trace: poutine.Trace, rows: int) -> list[str]:
    """Plates whose size is the number of rows."""
    return list(dict.fromkeys(plate for _, site in sample_sites(trace) for plate in _dims(site, rows)))


def _dims(site: dict, rows: int) -> dict[str, int]:
    return {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.dim is not None and frame.size == rows}


def _is_same_subsample(site: dict, other: dict | None) -> bool:
    is_subsample = site["type"] == "sample" and site_is_subsample(site)
    return is_subsample and other is not None and torch.equal(site["value"], other["value"])


def _carried(trace: poutine.Trace, plate: str, order: Tensor, left_out: set[str]) -> poutine.Trace:
    """A trace to replay, with the values in a plate reordered."""
    carried = poutine.Trace()
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or name in left_out:
            continue
        dim = _dims(site, len(order)).get(plate)
        value = site["value"]
        if dim is not None:
            dim -= len(site["fn"].event_shape)
            if value.ndim >= -dim and value.shape[dim] == len(order):
                value = value.index_select(dim, order)
        carried.add_node(name, **{**site, "value": value})
    return carried


@contextmanager
@torch.no_grad()
def _perturbed(parameters: Sequence[Tensor], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Perturb the parameters inside, each number by at most a tenth of itself, so that it keeps its sign.

    Afterwards parameters, buffers and attributes of the modules are restored, with what was assigned to them meanwhile.
    """
    of_modules = Snapshot(nn.ModuleList(modules))
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        for parameter in parameters:
            noise = torch.rand_like(parameter) * 0.2 - 0.1
            parameter += torch.where(parameter == 0, noise, noise * parameter)
        yield
    finally:
        of_modules.put_back()
        for parameter, before in kept:
            parameter.copy_(before)
