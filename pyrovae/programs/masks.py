"""Masks of latents: the log weight if one program masks a latent, or part of it, and the other does not.

A masked latent has no log density in the program that masks it. Let z_m be the elements that the model masks, and let
no other term of the model depend on them (`pyrovae.programs.coupling` checks this). The log weight is then that of the
extended target

    p(x, z) q(z_m | x)

which integrates to p(x): the guide's density of z_m cancels and is left out. If the guide's density does not factorise
over elements (a multivariate normal), the model's density of z_m, without the mask, is used instead. Elements that only
the guide masks are drawn from a density that is not counted, so there is no weight.
"""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Independent

from pyrovae.common.arguments import checks_values
from pyrovae.programs.enumeration import without_sums
from pyrovae.programs.supports import innermost, masks_of, num_parts

__all__ = ["SHARED", "align_masks", "counted", "refuse_unaligned_masks", "unmasked"]

# Suffix of NeuTraReparam for a latent that it masks; its prior is in the log_density of Delta sites.
SHARED = "_shared_latent"

_Sites = dict[str, dict]


def counted(site: dict) -> Tensor | None:
    """Which elements of a site are not masked, (*batch_shape, *parts), parts being joined by `to_event`; None: all."""
    masks = [(mask, parts) for mask, parts in masks_of(site) if mask is not True]
    if not masks:
        return None
    distribution = site["fn"]
    shape = distribution.batch_shape + distribution.event_shape[: num_parts(distribution)]
    result = torch.ones(shape, dtype=torch.bool, device=site["value"].device)
    for mask, parts in masks:
        mask = torch.as_tensor(mask, dtype=torch.bool, device=result.device)
        result = result & mask[(...,) + (None,) * parts]
    if "_dim_to_id" in site["infer"]:  # the program has summed sites
        return without_sums(result, site, num_parts(distribution))
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
    """Align the masks on the latents of a pair, so that log p - log q is a log weight.

    Args:
        model: The sites of the model by name.
        guide: The sites of the guide by name.

    Returns:
        The sites of the model and of the guide, with aligned masks.

    Raises:
        ValueError: If the guide masks elements of a latent that the model does not mask.
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


def refuse_unaligned_masks(model: _Sites, guide: _Sites) -> None:
    """Raise ValueError if the guide counts what the model masks, or the other way: a loss that does not align masks is no bound.

    Args:
        model: The sites of the model by name.
        guide: The sites of the guide by name.
    """
    in_model, in_guide = align_masks(model, guide)
    changed = [name for name in model if in_model[name] is not model[name]]
    for name, site in in_guide.items():
        before, after = counted(guide[name]), counted(site)
        if after is not None and (before is None or not torch.equal(before, after)):
            changed.append(name)
    if changed:
        raise ValueError(
            f"the model masks latent site '{changed[0].removesuffix('_unconstrained')}' (or a part of it), and the guide counts the density of what it draws there, "
            f"so the ELBO is no bound: mask the guide's site in the same way (poutine.mask), or take "
            f"loss=pyrovae.objectives.MonteCarloKL(), which leaves out of the guide what the model masks"
        )


def _without_mask(site: dict) -> dict:
    return {**site, "mask": None, "fn": unmasked(site["fn"])}


def _auxiliary(guide: _Sites) -> list[str]:
    return [name for name, site in guide.items() if site["infer"].get("is_auxiliary")]


def _carriers(name: str, guide: _Sites) -> list[str]:
    """The guide's sites whose densities give that of one latent; none if latents share an auxiliary draw."""
    own = f"{name}_unconstrained"  # the name in Pyro's AutoNormal
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
                f"the guide masks site '{site['name']}' (or a part of it) and the model does not: the guide's density "
                f"does not count what it draws there, so there is no importance weight; remove the mask from the "
                f"guide's site, or mask the model's site in the same way"
            )
