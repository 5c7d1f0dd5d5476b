"""Checks for guides that draw auxiliary numbers and map them to the latents through Delta sites, as Pyro's autoguides
do.

For z = f(u), log q(z) is the log density of the auxiliary draw u plus the Delta's `log_density`, -log |dz/du|. This is
a density of z only if f is a bijection and `log_density` is right. Pyro checks neither, and an error gives wrong
weights silently, so both are checked here.
"""

import math
from functools import reduce
from operator import add

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyrovae.programs.log_densities import site_log_prob
from pyrovae.programs.supports import innermost, support_of
from pyrovae.programs.traces import Layout, Program, sample_sites, spread, trace_program

__all__ = ["is_delta", "refuse_other_dimensions", "refuse_point_masses", "refuse_wrong_jacobians"]

_DRAWS = 3  # most must disagree to raise an error, because a saturated transform may lose precision in one
_LARGEST = 256  # largest dimension per datum for which the Jacobian is computed


def is_delta(site: dict) -> bool:
    """Whether a site puts all mass on one point."""
    return isinstance(innermost(site["fn"]), dist.Delta)


def refuse_point_masses(guide: Program, guide_trace: poutine.Trace, args: tuple, kwargs: dict) -> None:
    """Raise ValueError if the guide has a point mass for a latent, without an auxiliary draw behind it."""
    sites = dict(sample_sites(guide_trace))
    points = [name for name, site in sites.items() if is_delta(site)]
    if not points:
        return
    again = trace_program(guide, args, kwargs).nodes
    auxiliary = any(site["infer"].get("is_auxiliary") for site in sites.values())
    for name in points:
        if not auxiliary or torch.equal(sites[name]["value"], again[name]["value"]):
            raise ValueError(
                f"the guide puts all its mass on one point at site '{name}' (Delta, as AutoDelta does): a point has no "
                f"density and no importance weight; use a guide with a density, for example AutoNormal"
            )


def refuse_other_dimensions(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Raise ValueError if a guide with auxiliary draws has another dimension than the latents.

    If the guide has more dimensions, q(z) is an integral, and dividing by q(auxiliary, z) gives no importance weight:
    the "bound" may exceed log p(x). If it has fewer, q has no density (for example with a Delta conditional).
    """
    drawn = [site for _, site in sample_sites(guide_trace)]
    if all(not site["infer"].get("is_auxiliary") for site in drawn):
        return
    latents = [site for _, site in sample_sites(model_trace) if not site["is_observed"]]
    proposed = sum(_dimensions(site) for site in drawn if not is_delta(site))
    needed = sum(map(_dimensions, latents))
    names = [site["name"] for site in drawn if site["infer"].get("is_auxiliary")]
    if proposed > needed:
        raise ValueError(
            f"the guide draws {proposed} numbers (auxiliary sites {names}) for {needed} latent ones, so its density of "
            f"the latents is an unknown integral: sum the auxiliary variable out (a mixture: MixtureSameFamily), or "
            f"sample it in the model too"
        )
    if proposed < needed:
        points = [site["name"] for site in drawn if is_delta(site)]
        raise ValueError(
            f"the guide draws {proposed} numbers (auxiliary sites {names}) for {needed} latent ones, so its Delta "
            f"sites {points} put all mass on a surface, which has no density (for example a 'delta' conditional of "
            f"AutoStructured): draw as many numbers as the latents have"
        )


def refuse_wrong_jacobians(
    guide: Program, layout: Layout, model_trace: poutine.Trace, guide_trace: poutine.Trace, args: tuple, kwargs: dict
) -> None:
    """Raise ValueError if the `log_density` of Delta sites does not fit their change of variables.

    It is compared with the Jacobian from autograd, per datum. Discrete sites and more than 256 dimensions per datum are
    not checked.
    """
    latents = {name: site for name, site in sample_sites(model_trace) if not site["is_observed"]}
    carried = [name for name, site in sample_sites(guide_trace) if is_delta(site) and name in latents]
    auxiliary = [n for n, s in sample_sites(guide_trace) if s["infer"].get("is_auxiliary") and not is_delta(s)]
    sites = [*map(guide_trace.nodes.__getitem__, auxiliary), *map(latents.__getitem__, carried)]
    supports = [support_of(site["fn"]) for site in sites]
    if not carried or any(support is None or support.is_discrete for support in supports):
        return
    if layout.dim is None:  # treat a sequential plate as one datum
        layout = layout._replace(plate=None, num_data=1)
    disagree = []
    for _ in range(_DRAWS):
        densities = _claimed_and_found(guide, layout, latents, guide_trace, auxiliary, carried, args, kwargs)
        if densities is None:
            return
        claimed, found = densities
        finite = claimed.isfinite() & found.isfinite()
        claimed, found = claimed[finite], found[finite]
        disagree.append((claimed - found).abs() > 0.01 + 1e-3 * (claimed.abs() + found.abs()))
        guide_trace = trace_program(guide, args, kwargs, layout.pinned)
    wrong = torch.cat(disagree).double().mean().item()
    if wrong > 0.5 and len(claimed):
        raise ValueError(
            f"the Delta sites {carried} of the guide carry the auxiliary draws {auxiliary} to the latents with a "
            f"log_density of {claimed[0]:.4g}, but minus the log determinant of the Jacobian is {found[0]:.4g} (first "
            f"datum; {wrong:.0%} of the data differ): write Delta(f(u), log_density=-log|df/du|)"
        )


def _claimed_and_found(
    guide: Program,
    layout: Layout,
    latents: dict[str, dict],
    guide_trace: poutine.Trace,
    auxiliary: list[str],
    carried: list[str],
    args: tuple,
    kwargs: dict,
) -> tuple[Tensor, Tensor] | None:
    """(log density that the Delta sites claim, the right one), each (N,); None if the Jacobian is too large."""
    replayed, leaves = poutine.Trace(), []
    log_jacobian: Tensor | float = 0.0
    for name, site in sample_sites(guide_trace):
        if name in auxiliary:
            transform = biject_to(site["fn"].support)
            leaf = transform.inv(site["value"]).detach().requires_grad_()
            with torch.enable_grad():
                site = {**site, "value": transform(leaf)}
            leaves.append((leaf, site))
            log_jacobian = log_jacobian + _log_jacobian(leaf, site, layout)
        if not is_delta(site):  # Delta sites are computed again from the leaves
            replayed.add_node(name, **site)
    program = poutine.replay(poutine.replay(guide, trace=layout.pinned), trace=replayed)
    with torch.enable_grad(), pyro.validation_enabled(False):
        trace = poutine.trace(program).get_trace(*args, **kwargs)
        ends = [{**latents[name], "value": trace.nodes[name]["value"]} for name in carried]
        free = [biject_to(site["fn"].support).inv(site["value"]) for site in ends]
        columns = torch.cat([_per_datum(value, site, layout) for value, site in zip(free, ends, strict=True)], 1)
        sums = columns.sum(0).unbind()
    if len(sums) > _LARGEST:
        return None
    jacobian = []
    for total in sums:
        gradients = torch.autograd.grad(total, [leaf for leaf, _ in leaves], retain_graph=True, materialize_grads=True)
        row = [_per_datum(gradient, site, layout) for gradient, (_, site) in zip(gradients, leaves, strict=True)]
        jacobian.append(torch.cat(row, 1))
    right = log_jacobian - torch.linalg.slogdet(torch.stack(jacobian, 1)).logabsdet
    for value, site in zip(free, ends, strict=True):
        right = right - _log_jacobian(value, site, layout)
    points = (site for _, site in sample_sites(trace) if is_delta(site))
    claimed = reduce(add, (spread(site_log_prob(site), site, layout, None)[0] for site in points))
    return claimed.detach(), right.detach()


def _per_datum(value: Tensor, site: dict, layout: Layout) -> Tensor:
    """An unconstrained value of a site as a matrix (N, dimensions per datum); (1, all) without a plate."""
    if layout.dim is None:
        return value.reshape(1, -1)
    num_event_dims = value.ndim - len(site["fn"].batch_shape)
    return value.movedim(layout.dim - num_event_dims, 0).flatten(1) if value.ndim > 1 else value.unsqueeze(1)


@torch.no_grad()
def _log_jacobian(free: Tensor, site: dict, layout: Layout) -> Tensor:
    """log |d value / d free|, (N,), with `free` the unconstrained form of a site's value."""
    log_jacobian = biject_to(site["fn"].support).log_abs_det_jacobian(free, site["value"])
    extra = log_jacobian.ndim - len(site["fn"].batch_shape)
    return spread(log_jacobian.flatten(-extra).sum(-1) if extra > 0 else log_jacobian, site, layout, None)[0]


def _dimensions(site: dict) -> int:
    """The number of unconstrained dimensions of a site."""
    support = support_of(site["fn"])
    if support is None or support.is_discrete:
        return site["value"].numel()
    return math.prod(biject_to(support).inverse_shape(site["value"].shape))
