"""Masks of latents: what the log weight is if one program masks a latent that the other does not, or part of it.

A masked latent has no log density in the program that masks it. Let z_m be the elements that the model masks, and let no other term
of the model depend on them (`pyrovae.programs.reruns` tries that). The weight is then that of the extended target

    p(x, z) q(z_m | x)

which integrates to p(x): the guide's density of z_m stands on both sides and is left out. If the guide's density cannot be
told apart by elements (a multivariate normal), the model's own density of z_m, without the mask, takes its place. Elements
that the guide alone masks are drawn by a density that is not counted, so there is no weight.
"""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Independent

from pyrovae.common.arguments import checks_values
from pyrovae.programs.supports import innermost, masks_of, num_parts

__all__ = ["SHARED", "align_masks", "counted", "unmasked"]

# How NeuTraReparam names a latent that it masks, and whose prior it puts into the log_density of Delta sites.
SHARED = "_shared_latent"

_Sites = dict[str, dict]


def counted(site: dict) -> Tensor | None:
    """Which elements of a site count, (*batch_shape, *parts) with the parts that `to_event` joined; None: all of them."""
    masks = [(mask, parts) for mask, parts in masks_of(site) if mask is not True]
    if not masks:
        return None
    distribution = site["fn"]
    shape = distribution.batch_shape + distribution.event_shape[: num_parts(distribution)]
    result = torch.ones(shape, dtype=torch.bool, device=site["value"].device)
    for mask, parts in masks:
        mask = torch.as_tensor(mask, dtype=torch.bool, device=result.device)
        result = result & mask[(...,) + (None,) * parts]
    return result


def unmasked(distribution: Any) -> Any:
    """The distribution without the masks inside its wrappers."""
    if isinstance(distribution, MaskedDistribution):
        return unmasked(distribution.base_dist)
    if isinstance(distribution, Independent):
        base = unmasked(distribution.base_dist)
        same = base is distribution.base_dist
        return distribution if same else base.to_event(distribution.reinterpreted_batch_ndims)
    if isinstance(distribution, ExpandedDistribution):
        base = unmasked(distribution.base_dist)
        return distribution if base is distribution.base_dist else base.expand(distribution.batch_shape)
    return distribution


def align_masks(model: _Sites, guide: _Sites) -> tuple[_Sites, _Sites]:
    """The sites of a pair with masks on latents such that log p - log q is a log weight.

    Raises ValueError for elements of a latent that the guide masks and the model does not.
    """
    model, guide = dict(model), dict(guide)
    for name, site in list(model.items()):
        if site["is_observed"] or name not in guide or name.endswith(SHARED):
            continue
        seen, carriers = counted(site), _carriers(name, guide)
        if checks_values():
            _refuse_masked_proposals(site, seen, [guide[carrier] for carrier in carriers or _auxiliary(guide)])
        if seen is None:
            continue
        parts, proposal = num_parts(site["fn"]), guide[name]
        if carriers and all(right == parts for _, right in masks_of(site)):  # whole events
            whole = seen.flatten(-parts)[..., 0] if parts else seen
            for carrier in carriers:
                before = guide[carrier]["mask"]
                guide[carrier] = {**guide[carrier], "mask": whole if before is None else whole & before}
        elif len(carriers) == 1 and num_parts(proposal["fn"]) == parts:  # elements of a product
            shape = proposal["fn"].batch_shape + proposal["fn"].event_shape[:parts]
            elements = innermost(proposal["fn"]).expand(shape).mask(seen).to_event(parts)
            guide[name] = {**proposal, "fn": elements, "mask": None}
        else:
            model[name] = _without_mask(site)
            for carrier in {name, *_auxiliary(guide)}:
                guide[carrier] = _without_mask(guide[carrier])
    return model, guide


def _without_mask(site: dict) -> dict:
    return {**site, "mask": None, "fn": unmasked(site["fn"])}


def _auxiliary(guide: _Sites) -> list[str]:
    return [name for name, site in guide.items() if site["infer"].get("is_auxiliary")]


def _carriers(name: str, guide: _Sites) -> list[str]:
    """The guide's sites that make up its density of one latent; none if an auxiliary draw is shared with other latents."""
    own = f"{name}_unconstrained"  # as Pyro's AutoNormal calls it
    if own in guide:
        return [name, own]
    is_carried = isinstance(innermost(guide[name]["fn"]), dist.Delta) and _auxiliary(guide)
    return [] if is_carried else [name]


def _refuse_masked_proposals(site: dict, seen: Tensor | None, proposals: Sequence[dict]) -> None:
    for proposal in proposals:
        proposed = counted(proposal)
        if proposed is None:
            continue
        needed = torch.ones((), dtype=torch.bool, device=proposed.device) if seen is None else seen
        if num_parts(proposal["fn"]) != num_parts(site["fn"]) or proposed.shape != needed.shape:
            parts = num_parts(proposal["fn"])
            proposed = proposed.flatten(-parts).all(-1) if parts else proposed
            parts = num_parts(site["fn"]) if seen is not None else 0
            needed = needed.flatten(-parts).any(-1) if parts else needed
        if proposal["name"] not in (site["name"], f"{site['name']}_unconstrained"):  # one draw for several latents
            proposed, needed = proposed.all(), needed.any()
        if (needed & ~proposed).any():
            raise ValueError(
                f"the guide masks site '{site['name']}' (or a part of it) and the model does not: what it draws there is not "
                f"counted in its density, so there is no importance weight; take the mask off the guide's site, or mask the "
                f"model's in the same way"
            )
