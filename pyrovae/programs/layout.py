"""Finds the axis of the data in a pair of programs: the plate that all their sites share."""

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from pyrovae.programs.traces import Layout, plate_size, sample_sites

__all__ = ["find_layout", "is_subsampled", "plate_scale", "refuse_scales", "scaled_up_to"]


def find_layout(model_trace: poutine.Trace, guide_trace: poutine.Trace, plate: str | None) -> Layout:
    """The layout of a pair, whose datum plate may be named; ValueError if there is no single datum axis."""
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
                    f"site '{name}' of the {program} is outside plate '{plate}', so log p(x) is not a sum over the plate "
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


def refuse_scales(layout: Layout, *traces: poutine.Trace) -> None:
    """Raise ValueError if a site is scaled by more than the subsampling of the datum plate."""
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
                    f"site '{name}' carries a scale of {scale:g}, and its datum plate accounts for {expected:g}; a scaled "
                    f"log density is not normalised (poutine.scale, or a subsampled plate other than the plate of the "
                    f"data): remove the scale for the evaluation"
                )


def is_subsampled(frame: Any) -> bool:
    """Whether a plate draws some of its data, so that the sums in it are scaled up to all of them."""
    return frame.full_size not in (None, frame.size)


def plate_scale(site: dict) -> float:
    """The scale of a site that its subsampled plates account for."""
    scale = 1.0
    for frame in site["cond_indep_stack"]:
        if is_subsampled(frame):
            scale *= frame.full_size / frame.size
    return scale


def is_weighted(site: dict) -> bool:
    """Whether a site has a weight (`poutine.scale`) besides the scale of its subsampled plates."""
    scale, expected = site["scale"], plate_scale(site)
    # The values of a tensor are not read, because they may change after a recording.
    return isinstance(scale, torch.Tensor) or abs(scale - expected) > 1e-6 * expected


def scaled_up_to(trace: poutine.Trace, num_rows: int | None = None) -> int | None:
    """The number of data to which a trace's sums are scaled up, by a subsampled plate of the data; None without one.

    The plate of the data holds all sites that are in any plate. Other subsampled plates, of pixels for instance, scale
    up within a datum.

    Args:
        trace: Trace of the model.
        num_rows: Number of data that the model was called with, if that is known.
    """
    stacks = [plates for _, site in sample_sites(trace) if (plates := _plates_of(site))]
    common = [frame for name, frame in stacks[0].items() if all(name in plates for plates in stacks)] if stacks else []
    scaled = list(filter(is_subsampled, common))
    if num_rows is not None and (of_rows := [frame for frame in common if frame.size == num_rows]):
        scaled = list(filter(is_subsampled, of_rows))
    elif num_rows is not None:  # the plate itself draws some of the rows, to which its sums are scaled, or of more data
        scaled = [frame for frame in scaled if frame.full_size > num_rows]
    return scaled[0].full_size if scaled else None


def _plates_of(site: dict) -> dict[str, Any]:
    return {frame.name: frame for frame in site["cond_indep_stack"]}
