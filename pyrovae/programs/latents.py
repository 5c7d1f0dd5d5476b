"""Whether model and guide agree on their latents: the same sites, and for each a density of one kind (mass, density, angle)."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor
from torch import Tensor
from torch.distributions import AffineTransform, constraints

from pyrovae.programs.auxiliary import is_delta
from pyrovae.programs.log_densities import site_log_prob
from pyrovae.programs.supports import innermost, is_angle, is_angle_or_direction, support_of
from pyrovae.programs.traces import sample_sites

__all__ = [
    "bounds_of",
    "check_not_swapped",
    "check_same_sites",
    "is_discrete",
    "refuse_mass_against_density",
    "refuse_repeated_angles",
    "repeats",
]

_logger = logging.getLogger("pyrovae")

_TURN = 2 * math.pi


def check_not_swapped(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Raise ValueError if the guide observes data and the model does not."""
    in_model, in_guide = (
        sorted(name for name, site in sample_sites(trace) if site["is_observed"] and not site_is_factor(site))
        for trace in (model_trace, guide_trace)
    )
    if in_guide and not in_model:
        raise ValueError(
            f"the guide observes site(s) {in_guide}, and the model observes nothing: they are swapped. The model comes first: "
            f"(model, guide, data)"
        )


def check_same_sites(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Raise ValueError if the ELBO is not a bound: because only one program has a latent, or the guide observes a site.

    Pyro adds log p(u) for a latent u of the model that the guide lacks, which is then drawn from p(u), and subtracts no
    log q(u). A bound remains if this term is never positive: for discrete latents, which are logged.
    """
    check_not_swapped(model_trace, guide_trace)
    in_model, in_guide = dict(sample_sites(model_trace)), dict(sample_sites(guide_trace))
    for name, site in in_guide.items():
        if site["infer"].get("is_auxiliary") or site_is_factor(site):
            continue
        if site["is_observed"]:
            raise ValueError(
                f"site '{name}' of the guide is observed, so that training subtracts its log density, and the ELBO is no "
                f"bound: leave it out of the guide, which samples latents only"
            )
        if name not in in_model:
            raise ValueError(
                f"the guide samples site '{name}', which is no latent site of the model, so the ELBO is no bound: use the "
                f"model's names ({sorted(in_model)}), or mark a site that the model lacks on purpose, "
                f"infer={{'is_auxiliary': True}}"
            )
    for name, site in in_model.items():
        if site["is_observed"] or name in in_guide or site["infer"].get("enumerate"):
            continue
        if not site_log_prob(site).any():  # a constant, or masked out
            continue
        if innermost(site["fn"]).support.is_discrete:
            _logger.warning(
                "site '%s' of the model is drawn from its prior, because the guide lacks it: the ELBO stays a bound, but is "
                "loose by the entropy of the site or more; sample it in the guide, or sum it out "
                "(infer={'enumerate': 'parallel'} and TraceEnum_ELBO)",
                name,
            )
            continue
        raise ValueError(
            f"site '{name}' of the model is latent, and the guide does not sample it: training would draw it from the prior and "
            f"add its log density, and the ELBO is no bound. Sample it in the guide; or, if it is meant to follow its "
            f"prior, from that same distribution"
        )


def refuse_mass_against_density(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Raise ValueError if a latent has a mass in one program and a density in the other: the ratio is no weight."""
    auxiliary = [s for _, s in sample_sites(guide_trace) if s["infer"].get("is_auxiliary") and not is_delta(s)]
    for name, site in sample_sites(model_trace):
        if site["is_observed"]:
            continue
        proposal = guide_trace.nodes[name]
        drawn = auxiliary if is_delta(proposal) else [proposal]
        kinds = {is_discrete(site["fn"]), *(is_discrete(draw["fn"]) for draw in drawn)} - {None}
        if len(kinds) > 1:
            what = {True: "a mass (discrete)", False: "a density (continuous)"}
            raise ValueError(
                f"latent site '{name}' has {what[bool(is_discrete(site['fn']))]} in the model "
                f"({innermost(site['fn'])}) and {what[not is_discrete(site['fn'])]} in the guide "
                f"({innermost(drawn[0]['fn'])}), and their ratio is no importance weight: give the guide a "
                f"distribution of the model's kind; use a relaxed or straight-through guide for training only"
            )
        if isinstance(innermost(site["fn"]), dist.ZeroInflatedDistribution) and not is_discrete(site["fn"]):
            raise ValueError(
                f"latent site '{name}' of the model has a mass at 0 and a density elsewhere (ZeroInflatedDistribution), and "
                f"the ratio of either to the other is no importance weight: write the choice between them as a latent of "
                f"its own (Bernoulli)"
            )
        if _carries_another(proposal["value"]):
            raise ValueError(
                f"the guide's {type(innermost(proposal['fn'])).__name__} at site '{name}' gives the density of a "
                f"hidden number and not of the value it draws (straight-through), so there is no importance weight: "
                f"use the distribution without straight-through gradients"
            )


def is_discrete(distribution: Any) -> bool | None:
    support = support_of(distribution)
    return None if support is None else bool(support.is_discrete)


def _carries_another(value: Tensor) -> bool:
    """Whether a draw has other numbers in an attribute, as straight-through draws do; log_prob is that of these."""
    held = (other for other in vars(value).values() if isinstance(other, Tensor))
    return any(other.shape == value.shape and not torch.equal(other, value) for other in held)


def refuse_repeated_angles(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Raise ValueError if the guide draws an angle from more than one turn, over which the model's density repeats."""
    for name, site in sample_sites(model_trace):
        known = is_angle_or_direction(site["fn"])
        if site["is_observed"] or not (known or repeats(innermost(site["fn"]), site["value"])):
            continue
        prior, proposal = (innermost(trace.nodes[name]["fn"]) for trace in (model_trace, guide_trace))
        ranges = [bounds_of(distribution) for distribution in (prior, proposal)]
        turn, width = (None if bounds is None else float((bounds[1] - bounds[0]).max()) for bounds in ranges)
        if turn is None or math.isinf(turn):
            turn = _TURN
        if is_angle_or_direction(proposal) and (width is None or math.isinf(width)):
            continue
        found = f"{type(proposal).__name__} on the whole real line"
        if width is not None and math.isfinite(width):
            if width <= turn * (1 + 1e-5):
                continue
            found = f"{type(proposal).__name__} on an interval of {width / turn:.3g} turns"
        raise ValueError(
            f"site '{name}' of the model is an angle or a direction ({innermost(site['fn'])}), whose density repeats "
            f"beyond one turn, and the guide draws it from {found}, so the same mass would be counted once per turn: "
            f"give the guide a distribution of that family, or Uniform(-pi, pi)"
        )


def repeats(prior: Any, value: Tensor) -> bool:
    """Whether the density of a latent on the real line is the same one turn further on, as that of an angle is."""
    if support_of(prior) is not constraints.real:
        return False
    here, opposite, beyond = (prior.log_prob(value + turn) for turn in (0.0, _TURN / 2, _TURN))
    # A wide density is nearly the same everywhere, and is not that of an angle.
    is_angle = torch.allclose(here, beyond, rtol=0.0, atol=1e-4) and not torch.allclose(here, opposite, atol=1e-3)
    return is_angle and not is_angle_or_direction(prior)


def bounds_of(distribution: Any) -> tuple[Tensor, Tensor] | None:
    """(lower, upper) bounds of the numbers that a distribution draws; None if its support has no such bounds."""
    if is_angle(distribution):
        return torch.tensor(-math.pi), torch.tensor(math.pi)
    if isinstance(distribution, torch.distributions.TransformedDistribution) and (
        all(type(transform) is AffineTransform for transform in distribution.transforms)
    ):
        inner = bounds_of(innermost(distribution.base_dist))
        if inner is None:
            return None
        ends = [_transformed(bound, distribution.transforms) for bound in inner]
        low, high = torch.broadcast_tensors(*ends)
        return torch.minimum(low, high), torch.maximum(low, high)
    support = support_of(innermost(distribution))
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.real:
        return torch.tensor(-torch.inf), torch.tensor(torch.inf)
    lower, upper = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if lower is None and upper is None:
        return None
    low, high = (
        torch.as_tensor(-torch.inf if lower is None else lower),
        torch.as_tensor(torch.inf if upper is None else upper),
    )
    return low, high


def _transformed(value: Tensor, transforms: Sequence[Any]) -> Tensor:
    for transform in transforms:
        value = transform(value)
    return value
