"""Whether model and guide give a latent a density of one kind: a mass or a density, an angle or a number, on which range."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import AffineTransform, constraints

from pyrovae.programs.auxiliary import is_delta
from pyrovae.programs.supports import innermost, is_angle, is_angle_or_direction, support_of
from pyrovae.programs.traces import sample_sites

__all__ = ["bounds_of", "is_discrete", "refuse_mass_against_density", "refuse_turns", "repeats"]

_TURN = 2 * math.pi


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
    """Whether a draw carries other numbers in an attribute, as straight-through draws do, whose density is then given."""
    held = (other for other in vars(value).values() if isinstance(other, Tensor))
    return any(other.shape == value.shape and not torch.equal(other, value) for other in held)


def refuse_turns(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
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
    # A wide density is nearly the same everywhere, and no angle.
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
