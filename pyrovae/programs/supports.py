"""Supports of distributions and the values inside them, seen through Pyro's wrappers (`to_event`, `mask`, `expand`)."""

import math
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.poutine.util import site_is_factor
from torch import Tensor
from torch.distributions import Independent, constraints

__all__ = [
    "has_no_mass",
    "innermost",
    "is_angle",
    "is_angle_or_direction",
    "is_possible",
    "masks_of",
    "num_parts",
    "possible_elements",
    "support_of",
    "supported_elements",
]

# Their log_prob is periodic (angles), or constant along a ray (directions).
_ANGLES_AND_DIRECTIONS = (
    dist.ProjectedNormal,
    dist.SineBivariateVonMises,
    dist.SineSkewed,
    torch.distributions.VonMises,
    dist.VonMises3D,
)
_ANGLES = (torch.distributions.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
# Attributes in which transforms, mixtures and MaskedMixture keep their components.
_PARTS = ("base_dist", "component_distribution", "component0", "component1")
_WRAPPERS = (Independent, MaskedDistribution, ExpandedDistribution)


def innermost(distribution: Any) -> Any:
    """The distribution inside `to_event`, `mask` and `expand`."""
    while isinstance(distribution, _WRAPPERS):
        distribution = distribution.base_dist
    return distribution


def is_angle_or_direction(distribution: Any) -> bool:
    """Whether a density repeats at each turn, or is constant along rays; known for the families of Pyro and torch."""
    distribution = innermost(distribution)
    parts = (getattr(distribution, name, None) for name in _PARTS)
    return isinstance(distribution, _ANGLES_AND_DIRECTIONS) or any(
        is_angle_or_direction(part) for part in parts if isinstance(part, torch.distributions.Distribution)
    )


def support_of(distribution: Any) -> Any:
    """The support of a distribution; None if it defines none (`ZukoToPyro`)."""
    try:
        return distribution.support
    except (AttributeError, NotImplementedError):
        return None


def is_angle(distribution: Any) -> bool:
    """Whether a distribution draws angles in [-pi, pi), with a density that repeats beyond one turn."""
    return isinstance(innermost(distribution), _ANGLES)


def is_possible(site: dict, *, nan: bool = False) -> Tensor | None:
    """Where a site's value is in its support, with the batch shape; masked elements count as inside. None: everywhere.

    Args:
        site: A sample site of a trace.
        nan: Count NaN as inside, because some distributions have a log density for it (`NanMaskedNormal`).
    """
    if nan and _is_real(innermost(site["fn"])):  # only NaN lies outside, so that there is nothing to compute
        return None
    possible = possible_elements(site, nan=nan)
    parts = num_parts(site["fn"])
    return possible.flatten(-parts).all(-1) if possible is not None and parts else possible


def possible_elements(site: dict, *, nan: bool = False) -> Tensor | None:
    """Like `is_possible`, for each element that `to_event` joined into one event and that a mask may leave out."""
    distribution = site["fn"]
    elements = None if site_is_factor(site) else supported_elements(distribution, site["value"])
    if elements is None:
        return None
    if nan and site["value"].is_floating_point():
        unknown = site["value"].isnan()
        if dims := len(innermost(distribution).event_shape):
            unknown = unknown.flatten(-dims).any(-1)
        elements = elements | unknown
    for mask, parts in masks_of(site):
        mask = torch.as_tensor(mask, dtype=torch.bool, device=elements.device)
        elements = elements | ~mask[(...,) + (None,) * parts]
    return elements


def _is_real(base: Any) -> bool:
    """Whether a distribution's support is all real numbers or vectors, and each of them is reached."""
    is_transformed = isinstance(base, torch.distributions.TransformedDistribution)
    return not is_transformed and support_of(base) in (constraints.real, constraints.real_vector)


def supported_elements(distribution: Any, value: Tensor) -> Tensor | None:
    """Like `possible_elements`, without masks: the value in the support of the innermost distribution."""
    base = innermost(distribution)
    try:
        support = base.support
        elements = support.check(value)
    except (AttributeError, NotImplementedError, ValueError):  # no support, or torch cannot check it
        return None
    if isinstance(base, torch.distributions.TransformedDistribution):
        elements = elements & _is_reached(base, value, support.event_dim)
    extra = len(base.event_shape) - support.event_dim
    if extra > 0:
        elements = elements.flatten(-extra).all(-1)
    if parts := num_parts(distribution):  # a value with fewer dimensions is broadcast over all parts
        shape = distribution.batch_shape + distribution.event_shape[:parts]
        elements = elements.expand(torch.broadcast_shapes(elements.shape, shape))
    return elements


def _is_reached(distribution: Any, value: Tensor, event_dim: int) -> Tensor:
    """Whether elementwise transforms reach a value from the support of their base distribution.

    torch's support may be too large: that of a shift is all real numbers.
    """
    always = torch.ones((), dtype=torch.bool, device=value.device)
    transforms = distribution.transforms
    if event_dim or any(transform.domain.event_dim or transform.codomain.event_dim for transform in transforms):
        return always
    reached = value
    for transform in reversed(transforms):
        reached = transform.inv(reached)
    again = reached
    for transform in transforms:
        again = transform(again)
    # Compare with a tolerance, because sigmoids clamp their inverses.
    close = (again - value).abs() <= 1e-3 * (1 + value.abs())
    support = support_of(innermost(distribution.base_dist))
    if support is None or support.event_dim:
        return close
    return close & support.check(reached)


def num_parts(distribution: Any) -> int:
    """The number of dimensions that `to_event` made part of the event."""
    return len(distribution.event_shape) - len(innermost(distribution).event_shape)


def masks_of(site: dict) -> Iterator[tuple[Any, int]]:
    """All masks of a site and its distribution, each with the number of event dimensions to the right of the mask."""
    distribution = site["fn"]
    if site["mask"] is not None:
        yield site["mask"], num_parts(distribution)
    while isinstance(distribution, _WRAPPERS):
        if isinstance(distribution, MaskedDistribution):
            yield distribution._mask, num_parts(distribution)
        distribution = distribution.base_dist


def has_no_mass(base: Any, value: Tensor) -> Tensor:
    """Where a distribution has a density but never draws the value, because a probability is 0 or an angle beyond a turn."""
    nowhere = torch.zeros((), dtype=torch.bool, device=value.device)
    if is_angle(base):
        shape = base.batch_shape + base.event_shape
        beyond = (value.abs() > math.pi * (1 + 1e-6)) & torch.ones(shape, dtype=torch.bool, device=value.device)
        return beyond.flatten(-len(base.event_shape)).any(-1) if base.event_shape else beyond
    if isinstance(base, torch.distributions.MixtureSameFamily):
        return _no_component_has_mass(base, value)
    probs = getattr(base, "probs", None)
    if not isinstance(probs, Tensor):
        return nowhere
    if isinstance(base, torch.distributions.Categorical):
        index = value.long().clamp(0, probs.shape[-1] - 1)
        index, probs = torch.broadcast_tensors(index.unsqueeze(-1), probs)
        return probs.gather(-1, index[..., :1]).squeeze(-1) == 0
    if isinstance(base, torch.distributions.OneHotCategorical | torch.distributions.Multinomial):
        return ((probs == 0) & (value > 0)).any(-1)
    if isinstance(base, torch.distributions.Geometric):
        return (probs == 1) & (value > 0)
    if isinstance(base, torch.distributions.NegativeBinomial):
        return (probs == 0) & (value > 0)
    if isinstance(base, torch.distributions.Bernoulli | torch.distributions.Binomial):
        most = getattr(base, "total_count", 1)
        return ((probs == 0) & (value > 0)) | ((probs == 1) & (value < most))
    return nowhere


def _no_component_has_mass(mixture: Any, value: Tensor) -> Tensor:
    components, event_dims = mixture.component_distribution, len(mixture.event_shape)
    never = has_no_mass(innermost(components), value.unsqueeze(-1 - event_dims))
    if (parts := num_parts(components)) and never.ndim:
        never = never.flatten(-parts).any(-1)
    return (never | (mixture.mixture_distribution.probs == 0)).all(-1)
