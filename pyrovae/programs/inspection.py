"""Inspects a pair of Pyro programs, and refuses pairs whose log weights would be wrong.

A Pyro program is a black box until it runs. `inspect_pair` runs model and guide on the data it is given, and returns
an `InspectedPair`, or raises an error that names the site.
"""

from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor
from torch import Tensor
from torch.distributions import constraints

from pyrovae.programs.auxiliary import refuse_other_dimensions, refuse_point_masses, refuse_wrong_jacobians
from pyrovae.programs.coupling import refuse_coupled_data, refuse_influence_of_masked
from pyrovae.programs.coverage import refuse_uncovered
from pyrovae.programs.enumeration import SummedOut, at_any, check_enumerable
from pyrovae.programs.latents import check_not_swapped, refuse_mass_against_density, refuse_repeated_angles
from pyrovae.programs.layout import find_layout, refuse_scales
from pyrovae.programs.log_densities import InspectedPair, site_log_prob
from pyrovae.programs.reach import find_modules, replaced_parameters
from pyrovae.programs.reruns import refuse_other_reruns, refuse_wrong_tables
from pyrovae.programs.supports import innermost, num_parts, possible_elements
from pyrovae.programs.traces import Layout, Program, run_pair, sample_sites, trace_program

__all__ = ["inspect_pair", "layout_for_training", "refuse_impossible_data"]


def inspect_pair(
    model: Program, guide: Program, args: tuple, kwargs: dict, plate: str | None = None, *, is_split: bool = False
) -> InspectedPair:
    """Inspect a model/guide pair, and raise an error if its log weights would be wrong.

    Args:
        model: A Pyro program.
        guide: A Pyro program.
        args: The arguments of both.
        kwargs: The keyword arguments of both.
        plate: Name of the plate that indexes the data; found from the programs by default.
        is_split: The caller compares pieces of the data with the whole, which shows whether data influence each other.

    Returns:
        The pair, with its layout and a trace of each program.

    Raises:
        ValueError: The message names the site. Raised for latent sites that only one program has; sites marked for
            enumeration whose values cannot be summed out; observed sites or factors in the guide; a mass in one program
            and a density in the other; a guide that puts all its mass on one point, or maps auxiliary draws to the
            latents with a wrong density; scales other than the subsampling of the datum plate; no single datum axis;
            log densities with a dimension that no plate declares; programs that differ when run again, or change
            buffers; data whose latents the model couples; a guide that does not cover what prior and data allow; data
            outside the support of their likelihood.
    """
    with find_modules():
        guide_trace = trace_program(guide, args, kwargs)
        model_trace = trace_program(model, args, kwargs, guide_trace)
        prior_trace = _prior_trace(model, args, kwargs, model_trace)
    if replaced := replaced_parameters():
        raise ValueError(
            f"running the programs gives modules other parameters than their own ({', '.join(replaced[:3])}), those of "
            f"an earlier model that Pyro's store has under these names; the modules were restored. Clear the store, "
            f"pyro.clear_param_store(), or give the modules other names"
        )
    in_model, in_guide = _marked_sites(prior_trace, guide_trace)
    layout = None
    if in_model or in_guide:
        layout = find_layout(model_trace, guide_trace, plate)
        refuse_scales(layout, model_trace, guide_trace)
        model_trace, guide_trace = _without(in_model, model_trace), _without(in_guide, guide_trace)
    _refuse_mismatched_sites(model_trace, guide_trace, prior_trace)
    refuse_point_masses(guide, guide_trace, args, kwargs)
    refuse_mass_against_density(model_trace, guide_trace)
    refuse_repeated_angles(model_trace, guide_trace)
    refuse_other_dimensions(model_trace, guide_trace)
    if layout is None:
        layout = find_layout(model_trace, guide_trace, plate)
        refuse_scales(layout, model_trace, guide_trace)
    refuse_wrong_jacobians(guide, layout, model_trace, guide_trace, args, kwargs)
    # About 256 draws from the prior in total, for many data or a single one.
    num_draws = max(1, min(32, 256 // layout.num_data))
    prior_traces = [trace_program(model, args, kwargs, layout.pinned) for _ in range(num_draws)]
    refuse_impossible_data(model_trace, prior_traces)
    pair = InspectedPair(
        _summed_out(model, in_model, layout),
        _summed_out(guide, in_guide, layout),
        *(args, kwargs, layout, model_trace, guide_trace),
    )
    refuse_wrong_tables(pair)
    refuse_other_reruns(pair)
    refuse_coupled_data(pair, prior_traces[:2], is_split=is_split)
    refuse_influence_of_masked(pair)
    refuse_uncovered(pair, prior_traces)
    return pair


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
) -> tuple[Program, Program, Layout]:
    """Find the layout of a pair for training, with fewer checks than for an evaluation.

    Args:
        model: A Pyro program.
        guide: A Pyro program.
        args: The arguments of both.
        kwargs: The keyword arguments of both.
        plate: Name of the plate that indexes the data; found from the programs by default.
        scales: Allow any scale, for objectives that are linear in log densities; programs with summed sites are not.

    Returns:
        Model and guide, each as a `SummedOut` if it has sites to sum out, and the layout.

    Raises:
        ValueError: If there are no latent sites, latent sites that only one program has, sites marked for enumeration
            that cannot be summed out, observed sites in the guide, a mass in one program and a density in the other, no
            single datum axis, or, without scales, data whose latents the model couples.
    """
    model_trace, guide_trace = run_pair(model, guide, args, kwargs)
    if all(site["is_observed"] for _, site in sample_sites(model_trace)):
        raise ValueError("the model has no latent sites, so there is nothing for a guide to learn")
    prior_trace = _prior_trace(model, args, kwargs, model_trace)
    in_model, in_guide = _marked_sites(prior_trace, guide_trace)
    layout, sums = None, in_model or in_guide
    if sums:
        layout = find_layout(model_trace, guide_trace, plate)
        refuse_scales(layout, model_trace, guide_trace)
        model_trace, guide_trace = _without(in_model, model_trace), _without(in_guide, guide_trace)
    _refuse_mismatched_sites(model_trace, guide_trace, prior_trace)
    refuse_mass_against_density(model_trace, guide_trace)
    refuse_repeated_angles(model_trace, guide_trace)
    refuse_other_dimensions(model_trace, guide_trace)
    if layout is None:
        layout = find_layout(model_trace, guide_trace, plate)
    model, guide = _summed_out(model, in_model, layout), _summed_out(guide, in_guide, layout)
    pair = InspectedPair(model, guide, args, kwargs, layout, model_trace, guide_trace)
    if sums:
        refuse_wrong_tables(pair)
        refuse_influence_of_masked(pair)
    elif not scales:
        refuse_scales(layout, model_trace, guide_trace)
    if sums or not scales:
        refuse_coupled_data(pair, [prior_trace])
    return model, guide, layout


def _marked_sites(prior_trace: poutine.Trace, guide_trace: poutine.Trace) -> tuple[frozenset[str], frozenset[str]]:
    """The sites to sum out of (the model, the guide): those that the guide marks, and those of the model it leaves out.

    A site that the model alone marks and the guide samples is a latent like others.
    """
    # Use the trace of the model alone, because a replayed site takes over the marks of the guide's site.
    latents = {name: site for name, site in sample_sites(prior_trace) if not site["is_observed"]}
    proposed = dict(sample_sites(guide_trace))
    in_guide = {name for name, site in proposed.items() if site["infer"].get("enumerate")}
    in_model = {name for name, site in latents.items() if site["infer"].get("enumerate") and name not in proposed}
    in_model |= in_guide & latents.keys()
    for program, sites, names in (("model", latents, in_model), ("guide", proposed, in_guide)):
        for name in sorted(names):
            check_enumerable(sites[name], program)
    return frozenset(in_model), frozenset(in_guide)


def _summed_out(program: Program, names: frozenset[str], layout: Layout) -> Program:
    """The program with some sites summed out, or itself if there are none."""
    return SummedOut(program, names, layout.max_plate_nesting) if names else program


def _without(names: frozenset[str], trace: poutine.Trace) -> poutine.Trace:
    """A trace without some of its sites."""
    rest = poutine.Trace()
    for name, site in trace.nodes.items():
        if name not in names:
            rest.add_node(name, **site)
    return rest


def _refuse_mismatched_sites(model_trace: poutine.Trace, guide_trace: poutine.Trace, alone: poutine.Trace) -> None:
    check_not_swapped(model_trace, guide_trace)
    model_sites, guide_sites = dict(sample_sites(model_trace)), dict(sample_sites(guide_trace))
    for name, site in guide_sites.items():
        if site["is_observed"]:
            kind = "a factor" if site_is_factor(site) else "observed"
            raise ValueError(
                f"site '{name}' of the guide is {kind}, so the guide is not a normalised density: use sample sites only"
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
            f"add these sites to the guide, or sum them out in the model (discrete ones: infer={{'enumerate': 'parallel'}})"
        )
    if extra := sorted(proposed - latents):
        raise ValueError(
            f"the guide samples site(s) {extra} that are not latent sites of the model, which has {sorted(latents)}: "
            f"use the model's names, or sum the extra sites out (a mixture: MixtureSameFamily)"
        )


def refuse_impossible_data(model_trace: poutine.Trace, other_traces: Iterable[poutine.Trace]) -> None:
    """Raise ValueError if data are outside their likelihood's support; `other_traces`: the model at other latents."""
    suspects = {}
    for name, site in sample_sites(model_trace):
        elements = possible_elements(site, nan=True) if site["is_observed"] else None
        if elements is None:
            continue
        elements = at_any(elements, site, num_parts(site["fn"]))
        if site["value"].isnan().any() and (unknown := site_log_prob(site).isnan()).any():
            raise ValueError(
                f"observed site '{name}' has NaN among its data ({int(site['value'].isnan().sum()):,} numbers, in "
                f"{int(unknown.sum()):,} of its log densities): mask them, or give the site a distribution that masks "
                f"them itself (NanMaskedNormal); parts of this library take the mask as observed=~x.isnan(), and "
                f"pyrovae.data.table makes values and mask of a frame"
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
