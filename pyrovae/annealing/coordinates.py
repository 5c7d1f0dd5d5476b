"""Unconstrained coordinates of a program's latents: its draws as u (chains, data, D), and u put back into its sites."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyrovae.programs.auxiliary import is_delta
from pyrovae.programs.supports import innermost, is_angle_or_direction
from pyrovae.programs.traces import Layout, sample_sites

__all__ = ["Coordinates", "Placed", "random_sites", "refuse_without_coordinates", "unconstrained"]

_TIES = 1e-3  # share of draws in one extreme point from which a density cannot describe them


class _Site(NamedTuple):
    shape: torch.Size  # of the unconstrained value: chains, plates, event
    data_axis: int | None
    width: int  # numbers per datum


class Coordinates:
    """Which columns of u are whose: made from a trace of the start density's program, whose draws are `u`, (S, N, D)."""

    def __init__(self, trace: poutine.Trace, layout: Layout, num_chains: int):
        self.num_chains, self.num_data = num_chains, layout.num_data
        self.sites: dict[str, _Site] = {}
        refuse_without_coordinates(trace)
        columns = []
        for name, site in random_sites(trace):
            value = biject_to(site["fn"].support).inv(site["value"])
            event_dim = value.ndim - len(site["fn"].batch_shape)
            missing = 1 + layout.max_plate_nesting + event_dim - value.ndim
            value = value.reshape((1,) * missing + value.shape)
            value = value.expand(num_chains, *value.shape[1:])
            axis = None if layout.dim is None else value.ndim - event_dim + layout.dim
            flat = flatten(value, axis)
            self.sites[name] = _Site(value.shape, axis, flat.shape[-1])
            columns.append(flat)
        self.u = torch.cat(columns, -1)

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """The unconstrained value of each site, in its own shape."""
        values, parts = {}, u.split([site.width for site in self.sites.values()], -1)
        for (name, site), part in zip(self.sites.items(), parts, strict=True):
            if site.data_axis is None:
                values[name] = part.reshape(site.shape)
            else:
                others = [size for axis, size in enumerate(site.shape) if axis not in (0, site.data_axis)]
                values[name] = part.reshape(self.num_chains, self.num_data, *others).movedim(1, site.data_axis)
        return values

    def join(self, values: dict[str, Tensor]) -> Tensor:
        """The way back: u (S, N, D)."""
        return torch.cat([flatten(value, self.sites[name].data_axis) for name, value in values.items()], -1)

    def warn_of_ties(self, draws: Tensor) -> None:
        """Warn where many of the draws (any, N, D) fall on the outermost value that their floating-point numbers reach.

        There they have no density in u, so that the kernels do not leave their distribution invariant, and the bounds are
        not strict. Ties at the extremes of a column show it: where numbers are fine enough there are none.
        """
        columns = draws.flatten(0, 1)
        extremes = torch.stack([columns.amin(0), columns.amax(0)])
        ties = (columns == extremes.unsqueeze(1)).sum(1).amax(0)
        ties = torch.where(extremes[1] > extremes[0], ties, 0)  # a column that does not vary is another matter
        for name, here in zip(self.sites, ties.split([site.width for site in self.sites.values()]), strict=True):
            if here.max() > max(2, _TIES * len(columns)):
                warnings.warn(
                    f"more than {_TIES:.1%} of the draws of site '{name}' fall on one outermost value, as {draws.dtype} has "
                    f"no finer numbers at the edge of their support, so that the bounds are not strict: take float64 if it "
                    f"is not that yet, or a distribution with less mass at its edge",
                    stacklevel=2,
                )


def flatten(value: Tensor, data_axis: int | None) -> Tensor:
    """(S, plates with N among them, event) -> (S, N, D)."""
    flat = value.unsqueeze(1) if data_axis is None else value.movedim(data_axis, 1)
    return flat.reshape(*flat.shape[:2], -1)


def random_sites(trace: poutine.Trace) -> Iterator[tuple[str, dict]]:
    """The sites that draw numbers: a Delta carries an auxiliary draw to a latent."""
    for name, site in sample_sites(trace):
        if not is_delta(site):
            yield name, site


def refuse_without_coordinates(trace: poutine.Trace) -> None:
    """Raise ValueError for a latent that no bijection takes to the real numbers: discrete, on a circle, on a sphere.

    torch calls the support of an angle real, and the density of a VonMises goes on beyond a turn for ever: a chain on the
    line would see the same mass again and again, and its "lower bound" lie above log p(x). That is known by the family,
    under whatever wrappers, in mixtures and under transforms; a family of one's own is not known.
    """
    for name, site in random_sites(trace):
        if site["is_observed"]:
            continue
        distribution = site["fn"]
        if is_angle_or_direction(distribution):
            raise ValueError(
                f"site '{name}' is an angle or a direction ({innermost(distribution)}), which has no coordinates on the "
                f"real line: write an angle as Uniform(-pi, pi) with its log density as a pyro.factor, or take "
                f"log_marginal_likelihood with a guide on the circle"
            )
        if distribution.support.is_discrete:
            raise ValueError(
                f"site '{name}' is discrete ({distribution}), and Hamiltonian dynamics need a gradient: sum it out in the "
                f"model, or take log_marginal_likelihood"
            )


@torch.no_grad()
def unconstrained(trace: poutine.Trace, layout: Layout, num_chains: int) -> Tensor:
    """u (S, N, D) of the draws in a guide's trace; single draws are repeated for S chains."""
    return Coordinates(trace, layout, num_chains).u


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
        transform = biject_to(msg["fn"].support)
        msg["value"], msg["done"] = transform(u), True
        log_jacobian = transform.log_abs_det_jacobian(u, msg["value"])
        self.log_jacobians[msg["name"]] = log_jacobian.reshape(
            *log_jacobian.shape[: len(msg["fn"].batch_shape)], -1
        ).sum(-1)
