"""Objectives on the importance-weighted bound."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Literal

import torch
from torch import Tensor

from pyrovae.objectives.base import Objective, Parts
from pyrovae.objectives.runs import Run, Terms, pull_back, terms_of

__all__ = ["VIMCO", "DoublyReparameterised", "ImportanceWeighted", "WeightObjective"]


class WeightObjective(Objective):
    """Contract of an objective on the importance-weighted bound: log weights (S, N) in, gradient estimator out.

        loss = - scale sum_n L_n,   L_n = log( 1/S sum_s w[s, n] )

    The scale of a subsampled plate multiplies the bound of each datum. Pyro's `RenyiELBO` has it in the exponent,
    together with the sum over the data, where it does not give a bound on log p(x).

    Args:
        num_particles: S, drawn per datum and step
        plate: see `Objective`
        vectorize_particles: see `Objective`
    """

    is_linear = False

    def __init__(
        self,
        num_particles: int,
        *,
        plate: str | None = None,
        vectorize_particles: bool | Literal["auto"] = "auto",
    ):
        super().__init__(num_particles, plate, vectorize_particles)

    @property
    def bound_name(self) -> str:
        return "ELBO" if self.num_particles == 1 else "importance-weighted bound"

    @abstractmethod
    def bound(self, runs: Sequence[Run], terms: Terms, model: Tensor, guide: Tensor) -> Tensor:
        """Return the sum of L_n over the data, whose gradient is the estimator's.

        Args:
            runs: runs of model and guide
            terms: their log densities
            model: log p(x, z), (S, N)
            guide: log q(z|x), (S, N)
        """

    def estimate(self, runs: Sequence[Run]) -> tuple[Tensor, Parts]:
        terms = terms_of(runs, scaled=False)
        nothing = torch.zeros_like(terms.likelihood)  # without priors if sites are summed out
        prior, guide = (
            reduce(add, (term.sum(-1) for term in of.values()), nothing) for of in (terms.priors, terms.guides)
        )
        scale = runs[0].plate_scale
        loss = -scale * self.bound(runs, terms, terms.likelihood + prior, guide)
        scale = scale if terms.has_parts else math.nan
        reconstruction, kl = (scale * term.detach().mean(0).sum() for term in (terms.likelihood, guide - prior))
        return loss, Parts(reconstruction, kl, runs[0].full_size)


class ImportanceWeighted(WeightObjective):
    """Importance-weighted bound, differentiated through the draws.

        L_n = log( 1/S sum_s w[s, n] ),   ELBO_n <= E[L_n] <= log p(x_n),   grad = sum_s w~[s, n] grad log w[s, n]

    w~: weights normalised over the particles. The signal-to-noise ratio of the guide's gradient falls as 1/sqrt(S);
    DoublyReparameterised has the same mean without this decrease.

    Args:
        num_particles: S, drawn per datum and step
        plate: see `Objective`
        vectorize_particles: see `Objective`

    Raises:
        ValueError: for draws that are not reparameterised (VIMCO accepts them) and for scales other than the datum
            plate's.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).
    """

    has_score_terms = False

    def bound(self, runs: Sequence[Run], terms: Terms, model: Tensor, guide: Tensor) -> Tensor:
        return _bound(model - guide).sum()


class DoublyReparameterised(WeightObjective):
    """Importance-weighted bound with the doubly reparameterised gradient (DReG).

        grad_phi   = sum_s w~[s, n]^2 dz_sn/dphi d/dz log w[s, n]
        grad_theta = sum_s w~[s, n] d/dtheta log p(x_n, z_sn; theta)

    w~: weights normalised over the particles. The gradient is unbiased for the bound, and 0 for the guide if q is the
    posterior. Parameters that the prior shares with the guide (VampPrior) get both gradients: in the first line they
    are held fixed in both densities, in the second they are the prior's. Requires reparameterised draws and the guide's
    density at a given z: an autoregressive flow guide is inverted at every step, with one pass per dimension. Data must
    not influence each other: no BatchNorm in training mode.

    Args:
        num_particles: S, drawn per datum and step
        plate: see `Objective`
        vectorize_particles: see `Objective`

    Raises:
        ValueError: for draws that are not reparameterised and for scales other than the datum plate's.

    References:
        Tucker, Lawson, Gu & Maddison, Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (2019).
    """

    has_score_terms = False
    detaches_draws = True

    def bound(self, runs: Sequence[Run], terms: Terms, model: Tensor, guide: Tensor) -> Tensor:
        value = (model - guide).detach()
        normalised = value.softmax(0)
        path = pull_back(runs, (normalised.square() * guide).sum(), rate=normalised)
        return _bound(value).sum() + (normalised * (model - model.detach())).sum() - path


class VIMCO(WeightObjective):
    """Importance-weighted bound with score-function gradients, for discrete latents.

        grad = sum_s (L_n - L_n^(-s)) grad log q(z_sn|x_n) + sum_s w~[s, n] grad log w[s, n]

    w~: weights normalised over the particles. L_n^(-s): the bound with log w[s, n] replaced by the mean of the others,
    which does not depend on z_s and so leaves the gradient unbiased. Reparameterised latents are differentiated through
    their draws. Memory grows as S^2.

    Args:
        num_particles: S >= 2, drawn per datum and step
        plate: see `Objective`
        vectorize_particles: see `Objective`

    Raises:
        ValueError: for fewer than 2 particles and for scales other than the datum plate's.

    References:
        Mnih & Rezende, Variational Inference for Monte Carlo Objectives (2016).
    """

    has_score_terms = True

    def __init__(
        self,
        num_particles: int,
        *,
        plate: str | None = None,
        vectorize_particles: bool | Literal["auto"] = "auto",
    ):
        super().__init__(num_particles, plate=plate, vectorize_particles=vectorize_particles)
        if num_particles < 2:
            raise ValueError(
                f"VIMCO compares particles with each other: num_particles must be 2 or more, found {num_particles}"
            )

    def bound(self, runs: Sequence[Run], terms: Terms, model: Tensor, guide: Tensor) -> Tensor:
        bound = _bound(model - guide)
        if terms.score is None:
            return bound.sum()
        without = _without_each((model - guide).detach())
        # If all other weights are 0, all S may be, so that E[L] is -inf and has no gradient: use no signal.
        signal = torch.where(without == -math.inf, 0.0, bound.detach() - without)
        return bound.sum() + (signal * (terms.score - terms.score.detach())).sum()


def _bound(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def _without_each(log_weights: Tensor) -> Tensor:
    """Return (S, N): the bound with the particle's log weight replaced by the mean of the others.

    Sums over the others instead of subtracting from the total, because -inf - -inf is NaN.
    """
    number = len(log_weights)
    own = torch.eye(number, dtype=torch.bool, device=log_weights.device).unsqueeze(-1)
    each = log_weights.unsqueeze(1)
    others = torch.where(own, 0.0, each).sum(0) / (number - 1)
    return _bound(torch.where(own, others, each))
