"""Inspects a pair of Pyro programs: finds the plate of the data, and refuses pairs whose log weights would be wrong.

A Pyro program is a black box until it runs. `inspect_pair` runs model and guide on all the data, and returns a `Layout`
(which plate indexes the data, how deep plates nest) or raises an error that names the site. `pyrovae.weights` can then
draw without further checks.
"""

from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyrovae.programs.auxiliary import refuse_other_dimensions, refuse_point_masses, refuse_wrong_stretches
from pyrovae.programs.coverage import refuse_uncovered
from pyrovae.programs.kinds import refuse_mass_against_density, refuse_turns
from pyrovae.programs.reach import find_modules, replaced_parameters
from pyrovae.programs.reruns import refuse_coupled_data, refuse_influence_of_masked, refuse_other_reruns
from pyrovae.programs.supports import innermost, possible_elements
from pyrovae.programs.traces import (
    InspectedPair,
    Layout,
    Program,
    plate_size,
    run_pair,
    sample_sites,
    site_log_prob,
    trace_program,
)

__all__ = ["inspect_pair", "layout_for_training", "refuse_impossible_data"]


def inspect_pair(
    model: Program, guide: Program, args: tuple, kwargs: dict, plate: str | None = None, *, is_split: bool = False
) -> tuple[Layout, poutine.Trace, poutine.Trace]:
    """Inspect a model/guide pair, and raise an error if its log weights would be wrong.

    Args:
        model: A Pyro program.
        guide: A Pyro program.
        args: The arguments of both.
        kwargs: The keyword arguments of both.
        plate: Name of the plate that indexes the data; found from the programs by default.
        is_split: The caller compares pieces of the data with the whole, which shows whether data influence each other.

    Returns:
        The layout, and the traces of model and guide.

    Raises:
        ValueError: The message names the site. Raised for latent sites that only one program has; enumerated sites;
            observed sites or factors in the guide; a mass in one program and a density in the other; a guide that puts
            all its mass on one point, or carries auxiliary draws to the latents with a wrong density; scales other than
            the subsampling of the datum plate; no single datum axis; log densities with a dimension that no plate
            declares; programs that differ when run again, or change buffers; data whose latents the model couples; a
            guide that does not cover what prior and data allow; data outside the support of their likelihood.
    """
    with find_modules():
        model_trace, guide_trace = run_pair(model, guide, args, kwargs)
        prior_trace = _prior_trace(model, args, kwargs, model_trace)
    if replaced := replaced_parameters():
        raise ValueError(
            f"running the programs gives modules other parameters than their own ({', '.join(replaced[:3])}), those of "
            f"an earlier model that Pyro's store has under these names; the modules were restored. Clear the store, "
            f"pyro.clear_param_store(), or give the modules other names"
        )
    _refuse_enumeration(prior_trace, guide_trace)
    _refuse_mismatched_sites(model_trace, guide_trace, prior_trace)
    refuse_point_masses(guide, guide_trace, args, kwargs)
    refuse_mass_against_density(model_trace, guide_trace)
    refuse_turns(model_trace, guide_trace)
    refuse_other_dimensions(model_trace, guide_trace)
    layout = _find_layout(model_trace, guide_trace, plate)
    _refuse_scales(layout, model_trace, guide_trace)
    refuse_wrong_stretches(guide, layout, model_trace, guide_trace, args, kwargs)
    # About 256 draws from the prior in total, for many data or a single one.
    num_draws = max(1, min(32, 256 // layout.num_data))
    prior_traces = [trace_program(model, args, kwargs, layout.pinned) for _ in range(num_draws)]
    refuse_impossible_data(model_trace, prior_traces)
    pair = InspectedPair(model, guide, args, kwargs, layout, model_trace, guide_trace)
    refuse_other_reruns(pair)
    refuse_coupled_data(pair, prior_traces[:2], is_split=is_split)
    refuse_influence_of_masked(pair)
    refuse_uncovered(pair, prior_traces)
    return layout, model_trace, guide_trace


def _prior_trace(model: Program, args: tuple, kwargs: dict, model_trace: poutine.Trace) -> poutine.Trace:
    """Trace of the model without the guide's draws; ValueError if its prior cannot be drawn from."""
    try:
        return trace_program(model, args, kwargs)
    except NotImplementedError as error:
        latents = [(name, site) for name, site in sample_sites(model_trace) if not site["is_observed"]]
        improper = [name for name, site in latents if isinstance(innermost(site["fn"]), dist.ImproperUniform)]
        raise ValueError(
            f"latent site(s) {improper or [name for name, _ in latents]} of the model cannot be drawn from their prior "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): without draws (ImproperUniform, "
            f"SplitReparam) a guide cannot be checked, and with an improper prior p(x) is not normalised; give each "
            f"latent a prior with draws, for example a wide Normal"
        ) from error


def layout_for_training(
    model: Program, guide: Program, args: tuple, kwargs: dict, plate: str | None = None, *, scales: bool
) -> Layout:
    """Find the layout of a pair for training, with fewer checks than for an evaluation.

    Args:
        model: A Pyro program.
        guide: A Pyro program.
        args: The arguments of both.
        kwargs: The keyword arguments of both.
        plate: Name of the plate that indexes the data; found from the programs by default.
        scales: Allow any scale, for objectives that are linear in log densities.

    Returns:
        The layout.

    Raises:
        ValueError: If there are no latent sites, latent sites that only one program has, enumerated sites, observed
            sites in the guide, a mass in one program and a density in the other, no single datum axis, or, without
            scales, data whose latents the model couples.
    """
    model_trace, guide_trace = run_pair(model, guide, args, kwargs)
    if all(site["is_observed"] for _, site in sample_sites(model_trace)):
        raise ValueError("the model has no latent sites, so there is nothing for a guide to learn")
    prior_trace = _prior_trace(model, args, kwargs, model_trace)
    _refuse_enumeration(prior_trace, guide_trace)
    _refuse_mismatched_sites(model_trace, guide_trace, prior_trace)
    refuse_mass_against_density(model_trace, guide_trace)
    refuse_turns(model_trace, guide_trace)
    refuse_other_dimensions(model_trace, guide_trace)
    layout = _find_layout(model_trace, guide_trace, plate)
    if not scales:
        _refuse_scales(layout, model_trace, guide_trace)
        refuse_coupled_data(InspectedPair(model, guide, args, kwargs, layout, model_trace, guide_trace), [prior_trace])
    return layout


def _refuse_enumeration(prior_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    # Use the trace of the model alone, because a replayed site takes over the marks of the guide's site.
    for program, trace in (("model", prior_trace), ("guide", guide_trace)):
        for name, site in sample_sites(trace):
            if site["infer"].get("enumerate"):
                raise ValueError(
                    f"site '{name}' of the {program} is marked for enumeration, and log weights need values drawn by "
                    f"the guide: sum the site out inside the model, or sample it in both programs without the mark"
                )


def _refuse_mismatched_sites(model_trace: poutine.Trace, guide_trace: poutine.Trace, alone: poutine.Trace) -> None:
    model_sites, guide_sites = dict(sample_sites(model_trace)), dict(sample_sites(guide_trace))
    for name, site in guide_sites.items():
        if site["is_observed"]:
            kind = "a factor" if site_is_factor(site) else "observed"
            raise ValueError(
                f"site '{name}' of the guide is {kind}, so the guide is no normalised density: use sample sites only"
            )
    latents = {name for name, site in model_sites.items() if not site["is_observed"]}
    if marked := sorted(name for name in latents if alone.nodes[name]["infer"].get("is_auxiliary")):
        raise ValueError(
            f"latent site(s) {marked} of the model are marked as auxiliary (as StructuredReparam does): the model then "
            f"contains the guide's density, which cannot be separated from its own; evaluate the model without the "
            f"reparametrisation"
        )
    proposed = {name for name, site in guide_sites.items() if not site["infer"].get("is_auxiliary")}
    if missing := sorted(latents - set(guide_sites)):
        raise ValueError(
            f"the guide does not sample the model's latent site(s) {missing}; it samples {sorted(proposed)}: "
            f"add these sites to the guide, or sum them out in the model"
        )
    if extra := sorted(proposed - latents):
        raise ValueError(
            f"the guide samples site(s) {extra} that are not latent sites of the model, which has {sorted(latents)}: "
            f"use the model's names, or sum the extra sites out (a mixture: MixtureSameFamily)"
        )


def _plates_of(site: dict) -> dict[str, Any]:
    return {frame.name: frame for frame in site["cond_indep_stack"]}


def _find_layout(model_trace: poutine.Trace, guide_trace: poutine.Trace, plate: str | None) -> Layout:
    model_sites = [(name, _plates_of(site), "model") for name, site in sample_sites(model_trace)]
    guide_sites = [(name, _plates_of(site), "guide") for name, site in sample_sites(guide_trace)]
    sites = model_sites + guide_sites
    if not model_sites:
        raise ValueError("the model has no sample sites, so there is no log p(x) to estimate")
    nesting = max(
        (-frame.dim for _, plates, _ in sites for frame in plates.values() if frame.dim is not None), default=0
    )
    pinned = poutine.Trace()
    for trace in (guide_trace, model_trace):
        for name, site in trace.nodes.items():
            drawn = site["type"] == "sample" and site_is_subsample(site) and len(site["value"]) < site["fn"].size
            if drawn and name not in pinned:
                pinned.add_node(name, **site)

    def common(some_sites):
        vectorised = [{n for n, frame in plates.items() if frame.dim is not None} for _, plates, _ in some_sites]
        return set.intersection(*vectorised) if vectorised else set()

    if plate is None:
        candidates = common(sites)
        if len(candidates) > 1:
            raise ValueError(
                f"every site is in each of the plates {sorted(candidates)}, and only one of them indexes the data: "
                f"say which, plate={sorted(candidates)[0]!r} for example"
            )
        if not candidates:
            if guide_sites and common(model_sites) and common(guide_sites):
                raise ValueError(
                    f"all sites of the model are in plate {sorted(common(model_sites))}, all sites of the guide in "
                    f"{sorted(common(guide_sites))}: give the plate of the data the same name in both"
                )
            for trace, program, others in ((model_trace, "model", guide_sites), (guide_trace, "guide", model_sites)):
                if others and (shared := common(others)):
                    _refuse_undeclared_data(trace, program, min(shared))
            return Layout(None, None, 1, False, nesting, pinned)
        plate = candidates.pop()
    else:
        for name, plates, program in sites:
            if plate not in plates:
                found = sorted({n for _, p, _ in sites for n in p}) or "none"
                raise ValueError(
                    f"site '{name}' of the {program} is outside plate '{plate}', so log p(x) is no sum over the plate "
                    f"(plates found: {found}): put the site in the plate, or pass plate=None to treat the whole "
                    f"program as one datum"
                )
    frames = [plates[plate] for _, plates, _ in sites]
    dims, sizes = {frame.dim for frame in frames}, {frame.size for frame in frames}
    if -1 in sizes and len(dims) == 1 and None not in dims:  # a plate made without a size
        inside = (site for trace in (model_trace, guide_trace) for _, site in sample_sites(trace))
        sizes = sizes - {-1} or {plate_size(frames[0], *inside)}
    if len(dims) > 1 or len(sizes) > 1 or sizes == {-1}:
        raise ValueError(
            f"plate '{plate}' needs one known size and one dim in model and guide, found sizes {sorted(sizes)} and "
            f"dims {sorted(dims, key=str)}: write the same pyro.plate('{plate}', size, dim=...) in both"
        )
    full_sizes = {frame.full_size for frame in frames if frame.full_size not in (None, -1)}
    return Layout(plate, dims.pop(), sizes.copy().pop(), full_sizes - sizes != set(), nesting, pinned)


def _refuse_undeclared_data(trace: poutine.Trace, program: str, plate: str) -> None:
    """Raise ValueError if a program has batch shapes without plates, and the other has all its sites in a plate."""
    sites = dict(sample_sites(trace))
    if any(_plates_of(site) for site in sites.values()):
        return
    for name, site in sites.items():
        if shape := tuple(site["fn"].batch_shape):
            other = "guide" if program == "model" else "model"
            raise ValueError(
                f"site '{name}' of the {program} has batch shape {shape} and is in no plate, while all sites of the "
                f"{other} are in plate '{plate}': write 'with pyro.plate({plate!r}, {shape[-1]}, dim=-1)' around the "
                f"sites of the {program} too, or .to_event({len(shape)}) if all of it is a single datum"
            )


def _refuse_scales(layout: Layout, *traces: poutine.Trace) -> None:
    for trace in traces:
        for name, site in sample_sites(trace):
            frames = _plates_of(site)
            expected = 1.0
            if layout.plate is not None:
                frame = frames[layout.plate]
                expected = (frame.full_size or frame.size) / frame.size  # 1 for a plate without a size: both are -1
            scale = float(torch.as_tensor(site["scale"]).max())
            if not abs(scale - expected) <= 1e-6 * expected or torch.as_tensor(site["scale"]).numel() > 1:
                raise ValueError(
                    f"site '{name}' carries a scale of {scale:g}, and its datum plate explains {expected:g}; a scaled "
                    f"log density is no density (poutine.scale, or a subsampled plate other than the plate of the "
                    f"data): remove the scale for the evaluation"
                )


def refuse_impossible_data(model_trace: poutine.Trace, other_traces: Iterable[poutine.Trace]) -> None:
    """Raise ValueError if data are outside their likelihood's support; `other_traces`: the model at other latents."""
    suspects = {}
    for name, site in sample_sites(model_trace):
        elements = possible_elements(site, nan=True) if site["is_observed"] else None
        if elements is None:
            continue
        if site["value"].isnan().any() and (unknown := site_log_prob(site).isnan()).any():
            raise ValueError(
                f"observed site '{name}' has NaN among its data ({int(site['value'].isnan().sum()):,} numbers, in "
                f"{int(unknown.sum()):,} of its log densities): mask them, or give the site a distribution that masks "
                f"them itself (NanMaskedNormal)"
            )
        if not elements.all():
            suspects[name] = site, elements
    others = iter(other_traces) if suspects else iter(())
    while suspects and (other := next(others, None)) is not None:
        # If the support depends on the latents (Uniform(0, z)), a datum is impossible for some z only: weight 0.
        suspects = {
            name: found
            for name, found in suspects.items()
            if _same(found[0]["fn"].support, other.nodes[name]["fn"].support)
        }
    for name, (site, elements) in suspects.items():
        distribution = innermost(site["fn"])
        value = site["value"].expand(elements.shape + distribution.event_shape)[~elements][0]
        binary = isinstance(distribution, dist.Bernoulli)
        grey = binary and bool(((site["value"] >= 0) & (site["value"] <= 1)).all())
        advice = "change the data"
        if binary:
            advice += " (pyrovae.data.binarize makes grey images in [0, 1] binary)" if grey else " to 0 and 1"
        raise ValueError(
            f"observed site '{name}' has data outside the support of {type(distribution).__name__}: found "
            f"{value.tolist():{'' if value.ndim else 'g'}}, expected {distribution.support}; {advice} or the likelihood"
        )


def _same(first: Any, second: Any) -> bool:
    """Whether two constraints are equal, including their bounds."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return torch.equal(torch.as_tensor(first), torch.as_tensor(second))
    if isinstance(first, constraints.Constraint):
        return type(first) is type(second) and all(_same(v, vars(second)[k]) for k, v in vars(first).items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return first == second
