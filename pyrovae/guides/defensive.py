"""A guide made wide enough everywhere, for evaluation: mixed with the prior, so that no importance weight is large."""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae.guides.base import Guide, check_guide

__all__ = ["DefensiveMixture"]


class DefensiveMixture(Guide):
    """A guide mixed with the prior, so that no importance weight is ever large.

    q'(z|x) = (1 - weight) q(z|x) + weight p(z),   p(x, z) / q'(z|x) <= p(x|z) / weight

    guide: q; prior: p, the model's (any module whose `forward()` gives a distribution); weight: between 0 and 1

    For evaluation: where q is too narrow the weights of q alone have no finite variance, those of q' are bounded
    wherever p(x|z) is, at the price of the share `weight` of the draws. Its ELBO and gap are those of the mixture, worse
    than q's: what it is for is log p(x). A draw is a choice of component and so not reparameterised: `rsample` and
    objectives that need it refuse it. The density of the prior's draws under q is needed; with an autoregressive flow
    that is an inversion, latent_dim times the cost of a draw.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,).

    Raises ValueError for a weight outside (0, 1) and for different numbers of latent dimensions.

    Source: Hesterberg, Weighted Average Importance Sampling and Defensive Mixture Distributions (1995).
    """

    def __init__(self, guide: Guide, prior: nn.Module, weight: float = 0.1):
        check_guide(guide)
        if not 0 < weight < 1:
            raise ValueError(f"weight must lie between 0 and 1, the share of the prior's draws; found {weight}")
        if prior().event_shape != (guide.latent_dim,):
            raise ValueError(
                f"prior and guide must have the same latent dimensions, found event shape {tuple(prior().event_shape)} "
                f"and latent_dim={guide.latent_dim}"
            )
        super().__init__(guide.latent_dim)
        self.guide, self.prior, self.weight = guide, prior, weight

    def encode(self, x: Tensor) -> Tensor:
        return self.guide.encode(x)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return _Mixture(self.guide.distribution(parameters), self.prior(), self.weight)

    def outline(self) -> "DefensiveMixture":
        return DefensiveMixture(self.guide.outline(), self.prior, self.weight)

    def compiled(self, num_data: int) -> Guide:
        if type(self) is not DefensiveMixture:
            return self  # what a class of the user's does beside this is not known
        return DefensiveMixture(self.guide.compiled(num_data), self.prior, self.weight)

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, {super().extra_repr()}"


class _Mixture(dist.TorchDistribution):
    """(1 - weight) narrow + weight wide: two distributions of whatever families, the second wherever the first is."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(self, narrow: dist.TorchDistribution, wide: dist.TorchDistribution, weight: float):
        self.narrow, self.wide, self.weight = narrow, wide.expand(narrow.batch_shape), weight
        super().__init__(narrow.batch_shape, narrow.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return self.wide.support

    @property
    def mean(self) -> Tensor:
        return (1 - self.weight) * self.narrow.mean + self.weight * self.wide.mean

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "_Mixture":
        return _Mixture(self.narrow.expand(batch_shape), self.wide, self.weight)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            narrow, wide = self.narrow.sample(sample_shape), self.wide.sample(sample_shape)
            is_wide = torch.rand(narrow.shape[:-1], device=narrow.device) < self.weight
            return torch.where(is_wide.unsqueeze(-1), wide, narrow)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.logaddexp(
            math.log1p(-self.weight) + _log_prob_anywhere(self.narrow, value),
            math.log(self.weight) + _log_prob_anywhere(self.wide, value),
        )


def _log_prob_anywhere(distribution: dist.TorchDistribution, value: Tensor) -> Tensor:
    """Log density, -inf outside the support: each component is asked about the other's draws."""
    support = distribution.support
    if getattr(support, "base_constraint", support) is constraints.real:
        return distribution.log_prob(value)
    possible = support.check(value)
    inside = torch.where(possible.unsqueeze(-1), value, distribution.sample())
    return torch.where(possible, distribution.log_prob(inside), -torch.inf)
