"""Unconstrained coordinates of a program's latents: its draws as u (chains, data, D), and u as values of its sites."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from pyrovae.common.reporting import warn_once
from pyrovae.distributions.zuko_adapter import support_of_flow
from pyrovae.programs.auxiliary import is_delta
from pyrovae.programs.supports import innermost, is_angle_or_direction
from pyrovae.programs.traces import Layout, Program, sample_sites

__all__ = ["Coordinates", "Placed", "check_coordinates", "random_sites", "unconstrained"]

_TIES = 1e-3  # share of draws on one extreme point above which a density no longer describes them


class _Site(NamedTuple):
    shape: torch.Size  # of one chain's unconstrained value in the program: plates, then event
    data_axis: int | None  # negative
    width: int  # numbers per datum


@dataclass(frozen=True)
class Coordinates:
    """Mapping between the columns of u (S, N, D) and the sites of the start density's program.

    Attributes:
        num_chains: S if chains run under a plate; None for one chain without that plate, S = 1
        sites: where the columns belong, by site
        u: the draws of the trace that the coordinates were read from
    """

    num_chains: int | None
    sites: dict[str, _Site]
    u: Tensor

    @classmethod
    def of(cls, trace: poutine.Trace, layout: Layout, num_chains: int | None) -> "Coordinates":
        """Read the coordinates from a trace of that program; its draws become `u`.

        Args:
            trace: trace of the program
            layout: plates of the program
            num_chains: S if the trace is under a plate of chains; None for one chain without that plate

        Raises:
            ValueError: naming the site, for a latent without a bijection from the real numbers; for a trace without
                latents.
        """
        check_coordinates(trace)
        sites: dict[str, _Site] = {}
        columns = []
        for name, site in random_sites(trace):
            value = _bijection_of(site).inv(site["value"])
            event_dim = value.ndim - len(site["fn"].batch_shape)
            if num_chains is None:
                value = value.unsqueeze(0)
            else:
                missing = 1 + layout.max_plate_nesting + event_dim - value.ndim
                value = value.reshape((1,) * missing + value.shape)
                value = value.expand(num_chains, *value.shape[1:])
            axis = None if layout.dim is None else layout.dim - event_dim
            flat = flatten(value, axis)
            sites[name] = _Site(value.shape[1:], axis, flat.shape[-1])
            columns.append(flat)
        if not columns:
            raise ValueError(
                "the model has no latent sites, so there is nothing to anneal and log p(x) is exact: take "
                "log_marginal_likelihood with a guide that draws nothing (lambda *args, **kwargs: None)"
            )
        return cls(num_chains, sites, torch.cat(columns, -1))

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """Return each site's unconstrained value in the program's shape; without chains if `num_chains` is None."""
        values, parts = {}, u.split([site.width for site in self.sites.values()], -1)
        for (name, site), part in zip(self.sites.items(), parts, strict=True):
            if site.data_axis is None:
                value = part.reshape(len(u), *site.shape)
            else:
                others = list(site.shape)
                others.pop(site.data_axis)
                value = part.reshape(*u.shape[:2], *others).movedim(1, site.data_axis)
            values[name] = value.squeeze(0) if self.num_chains is None else value
        return values

    def join(self, values: dict[str, Tensor]) -> Tensor:
        """Invert `values`: return u (S, N, D)."""
        return torch.cat(
            [
                flatten(value.unsqueeze(0) if self.num_chains is None else value, self.sites[name].data_axis)
                for name, value in values.items()
            ],
            -1,
        )

    def warn_of_ties(self, draws: Tensor, program: Program) -> None:
        """Warn if many of the draws (any, N, D) fall on the outermost value that their floating-point type has.

        Such draws have no density in u, so the kernels do not leave their distribution invariant and the bounds are not
        strict. They show as ties at the extremes of a column, which do not occur if the floating-point type is fine
        enough.
        """
        columns = draws.flatten(0, 1)
        extremes = torch.stack([columns.amin(0), columns.amax(0)])
        ties = (columns == extremes.unsqueeze(1)).sum(1).amax(0)
        ties = torch.where(extremes[1] > extremes[0], ties, 0)  # ignore constant columns
        for name, here in zip(self.sites, ties.split([site.width for site in self.sites.values()]), strict=True):
            if here.max() > max(2, _TIES * len(columns)):
                warn_once(
                    program,
                    f"more than {_TIES:.1%} of the draws of site '{name}' fall on one outermost value, because {draws.dtype} "
                    f"is too coarse at the edge of their support, so the bounds are not strict: use float64 if you do not "
                    f"yet, or a distribution with less mass at its edge",
                )


def flatten(value: Tensor, data_axis: int | None) -> Tensor:
    """Reshape (S, plates with N among them at a negative axis, event) to (S, N, D)."""
    flat = value.unsqueeze(1) if data_axis is None else value.movedim(data_axis, 1)
    return flat.reshape(*flat.shape[:2], -1)


def random_sites(trace: poutine.Trace) -> Iterator[tuple[str, dict]]:
    """Yield the sites that draw random numbers; a Delta, which maps an auxiliary draw to a latent, does not."""
    for name, site in sample_sites(trace):
        if not is_delta(site):
            yield name, site


def check_coordinates(trace: poutine.Trace) -> None:
    """Raise ValueError for a latent without a bijection to the real numbers: discrete, on a circle, or on a sphere.

    torch calls the support of an angle real, and the density of a VonMises is periodic: a chain on the line would see
    the same mass again and again, and its "lower bound" would lie above log p(x). Angles are recognised by their
    family, even wrapped, in mixtures and under transforms; custom families are not recognised.
    """
    for name, site in random_sites(trace):
        if site["is_observed"]:
            continue
        distribution = site["fn"]
        if is_angle_or_direction(distribution):
            raise ValueError(
                f"site '{name}' is an angle or a direction ({innermost(distribution)}), which has no coordinates on the "
                f"real line: write an angle as Uniform(-pi, pi) with its log density as a pyro.factor, or use "
                f"log_marginal_likelihood with a guide on the circle"
            )
        support = _support_of(distribution)
        if support is not None and support.is_discrete:
            raise ValueError(
                f"site '{name}' is discrete ({distribution}), and Hamiltonian dynamics need a gradient: mark it for "
                f"enumeration in the model (infer={{'enumerate': 'parallel'}}), which sums it out, or use "
                f"log_marginal_likelihood"
            )


def _bijection_of(site: dict[str, Any]) -> Any:
    """Return the map from the real numbers to a site's support; raise ValueError, naming the site, if none is known."""
    support, name = _support_of(site["fn"]), site["name"]
    if support is None:
        raise ValueError(
            f"the distribution of site '{name}' ({type(innermost(site['fn'])).__name__}) does not say what its support is, so "
            f"annealing has no coordinates for it: give its class a `support` (torch.distributions.constraints.real_vector "
            f"for all of R^D), or wrap a zuko flow in pyrovae.distributions.zuko_adapter.FlowDistribution(flow, support=...)"
        )
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"torch knows no bijection from the real numbers to the support of site '{name}' ({support}), so annealing has no "
            f"coordinates for it: register one with torch.distributions.biject_to, or use log_marginal_likelihood"
        ) from error


def _support_of(distribution: Any) -> Constraint | None:
    try:
        return distribution.support
    except (AttributeError, NotImplementedError, ValueError):  # undeclared, or dependent on unknown parameters
        inside, adapter = innermost(distribution), sys.modules.get("pyro.contrib.zuko")  # slow to import
        return support_of_flow(inside.dist) if adapter and isinstance(inside, adapter.ZukoToPyro) else None


@torch.no_grad()
def unconstrained(trace: poutine.Trace, layout: Layout, num_chains: int | None) -> Tensor:
    """Return the draws of a trace as u: (S, N, D) under a plate of S chains, (1, N, D) without that plate."""
    return Coordinates.of(trace, layout, num_chains).u


class Placed(Messenger):
    """Put unconstrained values into sample sites, through the bijection to the support that the site has in this run."""

    def __init__(self, unconstrained: dict[str, Tensor]):
        super().__init__()
        self.unconstrained = unconstrained
        self.log_jacobians: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        u = self.unconstrained.get(msg["name"])
        if u is None:
            return
        transform = _bijection_of(msg)
        msg["value"], msg["done"] = transform(u), True
        log_jacobian = transform.log_abs_det_jacobian(u, msg["value"])
        num_batch_dims = msg["value"].ndim - len(msg["fn"].event_shape)
        if msg["value"].shape[:num_batch_dims].numel() > u.numel():
            raise ValueError(
                f"the support of site '{msg['name']}' depends on a site that is summed out, so it has no coordinates that "
                f"hold for all values: use log_marginal_likelihood"
            )
        self.log_jacobians[msg["name"]] = log_jacobian.reshape(*log_jacobian.shape[:num_batch_dims], -1).sum(-1)
