"""Codes drawn from q(z|x) for each datum, and at each of them the densities q(z|x) summed over all data."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.common.reporting import progress_bar
from pyrovae.guides.base import Guide
from pyrovae.models.generative import LatentVariableModel

__all__ = ["ROWS", "Codes", "draw_codes", "marginals_of", "sum_over_data"]

ROWS = 500  # data that are encoded, and codes that are drawn, at once
_CPU_ELEMENTS, _GPU_ELEMENTS, _PAIR_SIZE = 2**20, 2**26, 64  # numbers at once; a pair (z, x) counts as at least 64

_Visit = Callable[[str, dist.TorchDistribution], Tensor]


class Codes(NamedTuple):
    values: dict[str, Tensor]  # by site, (S, N, its size)
    log_own: Tensor  # log q(z|x_n) (S, N)
    log_prior: Tensor  # (S, N)


def marginals_of(distribution: dist.TorchDistribution) -> dist.TorchDistribution | None:
    """Return the marginal of each dimension, batch shape (..., D); None if they have no closed form."""
    if isinstance(distribution, torch.distributions.Independent):
        base = distribution.base_dist
        return base if base.event_shape == () and distribution.reinterpreted_batch_ndims == 1 else None
    if isinstance(distribution, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal):
        return dist.Normal(distribution.mean, distribution.variance.sqrt())
    return None


def draw_codes(model: LatentVariableModel, guide: Guide, parameters: Tensor, num_draws: int) -> Codes:
    parts = []
    for some in parameters.split(ROWS):
        values, log_own = _draw_some(guide, some, num_draws)
        parts.append(Codes(values, log_own, _log_density(model.latents, values)))
    together = {name: torch.cat([part.values[name] for part in parts], 1) for name in parts[0].values}
    log_own, log_prior = (torch.cat(terms, 1) for terms in zip(*(part[1:] for part in parts), strict=True))
    return Codes(together, log_own, log_prior)


def _draw_some(guide: Guide, parameters: Tensor, num_draws: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return draws (S, B, size of the site) by site, and their log q (S, B) in float64."""
    drawn: dict[str, Tensor] = {}
    terms: list[Tensor] = []

    def visit(name: str, distribution: dist.TorchDistribution) -> Tensor:
        several = distribution.expand(torch.Size([num_draws, len(parameters)]))
        drawn[name] = several.sample()
        terms.append(several.log_prob(drawn[name]).double())
        return drawn[name]

    guide.latents(parameters, visit)
    return drawn, torch.stack(terms).sum(0)


def _log_density(latents: Callable[[_Visit], Tensor], values: dict[str, Tensor]) -> Tensor:
    """Return log p(z) or log q(z|x), whose sites `latents` visits, at values of all of them, in float64."""
    terms: dict[str, Tensor] = {}

    def visit(name: str, distribution: dist.TorchDistribution) -> Tensor:
        if name not in values:
            raise ValueError(f"model and guide must have the same latent sites: '{name}' is not in {sorted(values)}")
        if values[name].shape[-1:] != distribution.event_shape:
            raise ValueError(
                f"model and guide must have the same latent dimensions: site '{name}' has {tuple(values[name].shape[-1:])} "
                f"in the guide and {tuple(distribution.event_shape)} in the model"
            )
        terms[name] = distribution.log_prob(values[name]).double()
        return values[name]

    latents(visit)
    if missing := sorted(set(values) - set(terms)):
        raise ValueError(f"model and guide must have the same latent sites: the model has no {missing}")
    return torch.stack(list(terms.values())).sum(0)


def sum_over_data(
    guide: Guide, parameters: Tensor, drawn: Codes, marginals: bool, progress: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum densities at every draw over all data, in blocks of pairs.

    Returns log sum_(m != n) q(z_sn|x_m) (S, N), and log 1/N sum_m q(z_snd|x_m) (S, N, D) if marginals are wanted.
    """
    num_draws, num_data = drawn.log_own.shape
    values = {name: value.flatten(0, 1) for name, value in drawn.values.items()}  # draw s of datum n in row s N + n
    owner = torch.arange(num_data, device=parameters.device).repeat(num_draws)
    others = torch.full_like(drawn.log_own.flatten(), -torch.inf)
    latent_dim = sum(value.shape[-1] for value in values.values())
    of_dimensions = others.unsqueeze(-1).repeat(1, latent_dim) if marginals else None
    with progress_bar("aggregate posterior", num_data, "data", progress) as bar:
        for columns, rows in _blocks(num_data, len(owner), latent_dim, parameters.is_cuda):
            some = parameters[columns]
            at = {
                name: value[rows].unsqueeze(1).expand(-1, len(some), -1)  # flows do not broadcast one value
                for name, value in values.items()
            }
            is_own = owner[rows].unsqueeze(1) == torch.arange(columns.start, columns.stop, device=owner.device)
            pairs = _log_density(partial(guide.latents, some), at).masked_fill(is_own, -torch.inf)
            others[rows] = torch.logaddexp(others[rows], pairs.logsumexp(1))
            if of_dimensions is not None:
                (z,) = at.values()
                of_pairs = marginals_of(guide.distribution(some)).log_prob(z).double()  # type: ignore[union-attr]
                of_dimensions[rows] = torch.logaddexp(of_dimensions[rows], of_pairs.logsumexp(1))
            if rows.stop == len(owner):
                bar.update(len(some))
    if of_dimensions is not None:
        of_dimensions = of_dimensions.unflatten(0, (num_draws, num_data)) - math.log(num_data)
    return others.unflatten(0, (num_draws, num_data)), of_dimensions


def _blocks(num_data: int, num_rows: int, latent_dim: int, cuda: bool) -> Iterator[tuple[slice, slice]]:
    """Yield (data, draws) of each block of pairs, draws inner."""
    pairs = (_GPU_ELEMENTS if cuda else _CPU_ELEMENTS) // max(latent_dim, _PAIR_SIZE)
    width = min(num_data, max(1, math.isqrt(pairs)))
    height = max(1, pairs // width)
    for start in range(0, num_data, width):
        for top in range(0, num_rows, height):
            yield slice(start, min(start + width, num_data)), slice(top, min(top + height, num_rows))
