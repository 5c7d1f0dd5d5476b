"""A guide mixed with the prior, so that no importance weight is large; for evaluation."""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae.common.networks import given, takes_context
from pyrovae.guides.base import Guide, check_guide
from pyrovae.priors.base import ConditionalPrior

__all__ = ["DefensiveMixture"]


class DefensiveMixture(Guide):
    """A guide mixed with the prior, so that no importance weight is large.

        q'(z|x) = (1 - weight) q(z|x) + weight p(z),   p(x, z) / q'(z|x) <= p(x|z) / weight

    Use it to estimate log p(x). If q is too narrow, its weights have no finite variance. The weights of q' are bounded
    wherever p(x|z) is, at the cost of spending the share `weight` of the draws on the prior. ELBO and gap are those of
    the mixture, which are worse than those of q.

    A draw chooses a component, so it is not reparameterised: `rsample` and objectives that need it raise an error. The
    density of the prior's draws under q is needed; an autoregressive flow must be inverted for it, which costs
    latent_dim times as much as a draw.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,).

    Args:
        guide: q.
        prior: p, the prior of the model: any module whose `forward()` gives a distribution, or a prior p(z|c) with a
            `context_net`, whose features of the context then travel with the guide's parameters.
        weight: The share of the prior's draws, between 0 and 1.

    Raises:
        ValueError: If the weight is outside (0, 1), or prior and guide differ in their latent dimensions.
        TypeError: If `guide` is not a `Guide`, or a prior that takes a context is no `ConditionalPrior`.

    References:
        Hesterberg, Weighted Average Importance Sampling and Defensive Mixture Distributions (1995).
    """

    def __init__(self, guide: Guide, prior: nn.Module, weight: float = 0.1):
        check_guide(guide)
        if not 0 < weight < 1:
            raise ValueError(f"weight must lie between 0 and 1, the share of the prior's draws; found {weight}")
        is_conditional = takes_context(prior, inputs=0)
        if is_conditional and not isinstance(prior, ConditionalPrior):
            raise TypeError(
                f"a prior of a context must be a pyrovae.priors.ConditionalPrior, whose features are computed once for "
                f"each datum; found {type(prior).__name__}"
            )
        event_shape = (prior.latent_dim,) if is_conditional else tuple(prior().event_shape)
        if event_shape != (guide.latent_dim,):
            raise ValueError(
                f"prior and guide must have the same latent dimensions, found event shape {event_shape} and "
                f"latent_dim={guide.latent_dim}"
            )
        super().__init__(guide.latent_dim)
        self.guide, self.prior, self.weight = guide, prior, weight
        self._is_conditional = is_conditional

    def encode(self, x: Tensor, context: Tensor | None = None, *, observed: Tensor | None = None) -> Tensor:
        more, options = given(context, observed)
        encoded = self.guide.encode(x, *more, **options)
        prior: Any = self.prior
        return torch.cat([encoded, prior.features(context)], -1) if self._is_conditional else encoded

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        prior: Any = self.prior
        if not self._is_conditional:
            return _Mixture(self.guide.distribution(parameters), prior(), self.weight)
        of_guide, features = parameters.tensor_split([parameters.shape[-1] - prior.num_features], -1)
        return _Mixture(self.guide.distribution(of_guide), prior.distribution(features), self.weight)

    def outline(self) -> "DefensiveMixture":
        return DefensiveMixture(self.guide.outline(), self.prior, self.weight)

    def compiled(self, num_data: int) -> Guide:
        if type(self) is not DefensiveMixture:
            return self  # a subclass may do more than this
        return DefensiveMixture(self.guide.compiled(num_data), self.prior, self.weight)

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, {super().extra_repr()}"


class _Mixture(dist.TorchDistribution):
    """(1 - weight) narrow + weight wide, of any two families; the support of `wide` must contain that of `narrow`."""

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
    """Log density, -inf outside the support: each component is evaluated at the other's draws."""
    support = distribution.support
    if getattr(support, "base_constraint", support) is constraints.real:
        return distribution.log_prob(value)
    possible = support.check(value)
    inside = torch.where(possible.unsqueeze(-1), value, distribution.sample())
    return torch.where(possible, distribution.log_prob(inside), -torch.inf)
