"""Better guides for evaluation, made of a trained one: improved for each datum, or made wide enough everywhere."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints

from pyrovae.encoding import Guide
from pyrovae.modules import check_count, evaluation_mode

__all__ = ["DefensiveMixture", "Refined"]

_SEED = 815_462_973  # of the noise of refinement: far from the seeds people set, under which the particles are drawn

Draw = Callable[[Tensor], tuple[Tensor, Tensor]]


class Refined(Guide):
    """A guide improved for each datum by gradient steps on what its `encode` gives, the weights being left as they are.

    lambda_0 = guide.encode(x),   lambda_(t+1) = lambda_t + Adam( grad_lambda ELBO(x; lambda_t) ),
    ELBO(x; lambda) = E_q [ log p(x, z) - log q(z) ],   q = guide.distribution(lambda)

    guide: any guide with reparameterised draws; for a flow the context moves and the flow stays
    model: the model whose ELBO is raised: any Pyro program of x with the one latent site "z"
    num_steps: steps of Adam
    learning_rate: its rate at the first step, falling linearly to 0 at the last
    num_particles: draws per datum and step

    For evaluation, where it removes (most of) the amortisation gap: `log_marginal_likelihood(model, Refined(guide, model),
    x)` refines each datum once and draws its particles afterwards, so the estimate remains a lower bound on average. The
    refinement takes random numbers of its own, the same for every datum and every call: q(z|x) is a function of x, of
    no other datum and no seed. Model and guide run in eval mode and are not changed; `Refined` is not trained, as no
    gradient passes through the steps.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,).

    Raises ValueError for num_steps, num_particles or learning_rate out of range, a guide without reparameterised draws, a
    model whose latent sites are not just "z"; RuntimeError if the parameters stop being finite.

    Source: Kim, Wiseman, Miller, Sontag & Rush, Semi-Amortized Variational Autoencoders (2018); Cremer, Li & Duvenaud,
    Inference Suboptimality in Variational Autoencoders (2018).
    """

    def __init__(
        self,
        guide: Guide,
        model: Callable[..., Any],
        num_steps: int = 100,
        *,
        learning_rate: float = 0.05,
        num_particles: int = 8,
    ):
        _check_guide(guide)
        check_count("num_steps", num_steps)
        check_count("num_particles", num_particles)
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, found {learning_rate}")
        if not callable(model):
            raise TypeError(f"model must be a Pyro program, a GenerativeModel for instance; found {model!r}")
        super().__init__(guide.latent_dim)
        self.guide, self.model = guide, model
        self.num_steps, self.learning_rate, self.num_particles = num_steps, learning_rate, num_particles

    def encode(self, x: Tensor) -> Tensor:
        devices = [x.device] if x.is_cuda else []
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices),
            pyro.validation_enabled(False),
            evaluation_mode(self.guide, self.model),
            poutine.block(),  # the handlers around this guide are not to see the model's sites
        ):
            torch.manual_seed(_SEED)
            return self._refine(x.clone() if x.is_inference() else x)

    def _refine(self, x: Tensor) -> Tensor:
        parameters = self.guide.encode(x).detach().clone().requires_grad_()
        draw = self._draw(parameters)
        repeated = x.repeat(self.num_particles, *(1 for _ in x.shape[1:]))
        adam = torch.optim.Adam([parameters], lr=self.learning_rate)
        for step in range(self.num_steps):
            adam.param_groups[0]["lr"] = self.learning_rate * (1 - step / self.num_steps)
            z, log_q = draw(parameters)
            elbo = (self._log_joint(repeated, z.flatten(0, 1)) - log_q.sum()) / self.num_particles
            # A sum over data, so each row's gradient is that of its own datum; only the parameters get one.
            (parameters.grad,) = torch.autograd.grad(-elbo, parameters)
            adam.step()
        if not parameters.isfinite().all():
            raise RuntimeError(
                f"refinement ended at parameters that are not finite: lower learning_rate ({self.learning_rate:g}), and "
                f"look for NaN in the data"
            )
        return parameters.detach()

    def _draw(self, parameters: Tensor) -> Draw:
        """Parameters (N, P) -> z (S, N, D), log q(z) (S, N), with one noise for all data.

        With noise that depended on a datum's place in the batch, q would too, and data could not be cut into blocks.
        """

        def draw_one(row: Tensor) -> tuple[Tensor, Tensor]:
            posterior = self.guide.distribution(row.unsqueeze(0))
            z = posterior.rsample((self.num_particles,))
            return z.squeeze(1), posterior.log_prob(z).squeeze(1)

        def draw_in_turn(parameters: Tensor) -> tuple[Tensor, Tensor]:
            seed = int(torch.randint(2**62, ()))
            draws = []
            for row in parameters:
                torch.manual_seed(seed)
                draws.append(draw_one(row))
            return tuple(torch.stack(parts, 1) for parts in zip(*draws, strict=True))

        posterior = self.guide.distribution(parameters)
        if not posterior.has_rsample:
            raise ValueError(
                f"refinement needs reparameterised draws, and {type(self.guide).__name__} has none: refine a guide that "
                f"has (DefensiveMixture(Refined(guide, model), prior), not the other way round)"
            )
        together = torch.vmap(draw_one, out_dims=1, randomness="same")
        try:
            together(parameters)
        except RuntimeError:  # a draw that vmap cannot share (Gamma); slower, the same noise
            return draw_in_turn
        return together

    def _log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z), summed over data."""
        trace = poutine.trace(poutine.condition(self.model, data={"z": z})).get_trace(x)
        latents = [
            name
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        ]
        if latents or "z" not in trace.nodes:
            found = sorted({*latents, *({"z"} & set(trace.nodes))})
            raise ValueError(f"refinement needs a model whose one latent site is 'z', found {found}")
        return trace.log_prob_sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_steps={self.num_steps}"


class DefensiveMixture(Guide):
    """A guide mixed with the prior, so that no importance weight is ever large.

    q'(z|x) = (1 - weight) q(z|x) + weight p(z),   p(x, z) / q'(z|x) <= p(x|z) / weight

    guide: q; prior: p, the model's (any module whose `forward()` gives a distribution); weight: between 0 and 1

    For evaluation: where q is too narrow the weights of q alone have no finite variance, those of q' are bounded
    wherever p(x|z) is, at the price of the share `weight` of the draws. A draw is a choice of component and so not
    reparameterised: `rsample` and objectives that need it refuse it. The density of the prior's draws under q is needed;
    with an autoregressive flow that is an inversion, latent_dim times the cost of a draw.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,).

    Raises ValueError for a weight outside (0, 1) and for different numbers of latent dimensions.

    Source: Hesterberg, Weighted Average Importance Sampling and Defensive Mixture Distributions (1995).
    """

    def __init__(self, guide: Guide, prior: nn.Module, weight: float = 0.1):
        _check_guide(guide)
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

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight:g}"


class _Mixture(dist.TorchDistribution):
    """(1 - weight) narrow + weight wide: two distributions of whatever families, the second wherever the first is."""

    arg_constraints: dict[str, constraints.Constraint] = {}
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

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
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
    possible = distribution.support.check(value)
    if possible.all():
        return distribution.log_prob(value)
    inside = torch.where(possible.unsqueeze(-1), value, distribution.sample())
    return torch.where(possible, distribution.log_prob(inside), -torch.inf)


def _check_guide(guide: Any) -> None:
    if not isinstance(guide, Guide):
        raise TypeError(
            f"guide must be a pyrovae.guides.Guide, whose encode and distribution are used; found {type(guide).__name__}"
        )
