"""Objectives that separate the KL from the reconstruction, so that it can be weighted: beta, warm-up, free bits."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyrovae.common.arguments import check_count
from pyrovae.objectives.base import Objective, Parts
from pyrovae.objectives.runs import Run, Terms, arranged, factors, pull_back, terms_of, without_weights
from pyrovae.programs.traces import sample_sites

__all__ = ["AnalyticKL", "KLObjective", "MonteCarloKL", "StickingTheLanding"]


class KLWeight(nn.Module):
    """Weight of the KL as a tensor, beta * min(1, num_steps / warmup_steps); a recording reads its buffers at every
    step.
    """

    beta: Tensor
    num_steps: Tensor

    def __init__(self, beta: float, warmup_steps: int):
        super().__init__()
        self.warmup_steps = warmup_steps
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float64))
        self.register_buffer("num_steps", torch.tensor(0))

    def forward(self, like: Tensor) -> Tensor:
        if self.beta.device != like.device:
            self.to(like.device)
        if not self.warmup_steps:
            return self.beta.to(like.dtype)
        return (self.beta * (self.num_steps.double() / self.warmup_steps).clamp(max=1)).to(like.dtype)


class Piece(NamedTuple):
    """A piece of the KL to which free bits can be granted.

    Attributes:
        kl: (S, N, G), scaled; G: groups within it
        size: latent dimensions in all its groups together
        guides: names of the guide's sites that it comes from
    """

    kl: Tensor
    size: int
    guides: Sequence[str]


class KLObjective(Objective):
    """Contract of an objective on the ELBO with a weighted KL.

        loss = - [ E_q log p(x|z) - beta_t sum_j max( KL_j, N free_bits d_j ) ],
        beta_t = beta min(1, t / kl_warmup_steps)

    `last` and `fit` report the unweighted ELBO whatever the weights; `loss` is the weighted objective. The step t is
    the objective's state: it counts `differentiable_loss` and `SVI.step`, and continues through further calls of `fit`.

    Args:
        num_particles: S, drawn per datum and step
        beta: weight of the KL, >= 0 (Higgins 2017)
        kl_warmup_steps: training steps t over which the weight grows from 0 to beta (Sonderby 2016); 0: no warm-up
        free_bits: nats per latent dimension and datum below which a group's KL, averaged over the batch, is not reduced
            further (Kingma 2016, eq. 15). The groups j are the finest that the densities allow: a single dimension (d_j
            = 1) if prior and guide are both products over dimensions; the whole site (d_j its dimensions) if they are
            not; the whole guide if it has auxiliary draws. Prefer AnalyticKL with few particles and data, because noise
            in KL_j counts as bits
        plate: see `Objective`
        vectorize_particles: see `Objective`

    Raises:
        ValueError: for weights below 0 or not finite, and as for `Objective`.
    """

    is_linear = True

    def __init__(
        self,
        num_particles: int = 1,
        *,
        beta: float = 1.0,
        kl_warmup_steps: int = 0,
        free_bits: float = 0.0,
        plate: str | None = None,
        vectorize_particles: bool | Literal["auto"] = "auto",
    ):
        super().__init__(num_particles, plate, vectorize_particles)
        _check_weight("beta", beta)
        _check_weight("free_bits", free_bits)
        if kl_warmup_steps:
            kl_warmup_steps = check_count("kl_warmup_steps", kl_warmup_steps)
        self.free_bits = float(free_bits)
        self.kl_weight = KLWeight(float(beta), kl_warmup_steps)
        self.modules = [self.kl_weight]

    @property
    def beta(self) -> float:
        """Weight of the KL after its warm-up. A callback may set it: it holds from the next step on, recorded or not."""
        return self.kl_weight.beta.item()

    @beta.setter
    def beta(self, value: float) -> None:
        _check_weight("beta", value)
        self.kl_weight.beta.fill_(value)

    @property
    def kl_warmup_steps(self) -> int:
        """Steps over which the weight grows from 0 to beta. It cannot be set: make another objective."""
        return self.kl_weight.warmup_steps

    @abstractmethod
    def pieces(self, runs: Sequence[Run], terms: Terms) -> list[Piece]:
        """Split the KL into pieces.

        Args:
            runs: runs of model and guide
            terms: their log densities
        """

    def estimate(self, runs: Sequence[Run]) -> tuple[Tensor, Parts]:
        terms = terms_of(runs, scaled=True, by_dimension=self.free_bits > 0)
        weight = self.kl_weight(terms.likelihood)
        integrand, guide_term = terms.likelihood, torch.zeros_like(weight)
        floors = torch.zeros_like(weight)
        pieces = self.pieces(runs, terms)
        for piece in pieces:
            total = piece.kl.mean(0).sum(0)
            active, floor = self._free(total, piece, runs[0])
            floors = floors + ((1 - active) * floor).sum()
            integrand = integrand - weight * (active * piece.kl).sum(-1)
            for name in piece.guides if self.detaches_draws else ():
                guide_term = guide_term + weight * (active * terms.guides[name]).sum(-1).mean(0).sum()
        loss = weight * floors - integrand.mean(0).sum()
        if terms.score is not None:
            loss = loss - _score_function(integrand, terms.score)
        if self.detaches_draws:
            loss = loss + pull_back(runs, guide_term)
        return loss, self._parts(runs, terms, pieces)

    @torch.no_grad()
    def _parts(self, runs: Sequence[Run], terms: Terms, pieces: Sequence[Piece]) -> Parts:
        """The parts of the ELBO, without weights by `poutine.scale`."""
        plain = without_weights(runs)
        if plain is not runs:
            terms = terms_of(plain, scaled=True, by_dimension=self.free_bits > 0)
            pieces = self.pieces(plain, terms)
        reconstruction = terms.likelihood.mean(0).sum()
        kl = reduce(add, (piece.kl.mean(0).sum(0).sum() for piece in pieces), torch.zeros_like(reconstruction))
        if not terms.has_parts:
            reconstruction, kl = math.nan * reconstruction, math.nan * kl
        return Parts(reconstruction, kl, runs[0].full_size)

    def refuse_sums(self, names: Sequence[str]) -> None:
        if self.beta != 1 or self.kl_warmup_steps or self.free_bits:
            _refuse_sums(f"{self!r} weighs the KL", names)

    def _free(self, total: Tensor, piece: Piece, run: Run) -> tuple[Tensor, float]:
        """Return 1 for groups whose KL counts and 0 for those with free bits left, and the free bits per group."""
        if not self.free_bits:
            return torch.ones_like(total), 0.0
        if run.layout.sequential:
            raise ValueError("free_bits are averages over the data, and a sequential plate has a site for each datum")
        floor = self.free_bits * piece.size / len(total) * run.layout.num_data * run.plate_scale
        return (total.detach() > floor).to(total.dtype), floor

    def advance(self) -> None:
        self.kl_weight.num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": int(self.kl_weight.num_steps), "beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not {"num_steps"} <= set(state) <= {"num_steps", "beta"}:  # earlier files have no beta
            raise ValueError(
                f"the state of {type(self).__name__} is {{'num_steps': t, 'beta': b}}, found {sorted(state)}"
            )
        self.kl_weight.num_steps.fill_(state["num_steps"])
        self.beta = state.get("beta", self.beta)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_particles={self.num_particles}, beta={self.beta:g}, "
            f"kl_warmup_steps={self.kl_warmup_steps}, free_bits={self.free_bits:g})"
        )


def _check_weight(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be 0 or more, found {value}")


class MonteCarloKL(KLObjective):
    """ELBO with a sampled KL: the loss of Pyro's `Trace_ELBO`, recordable, and with weights on the KL.

        ELBO_n = 1/S sum_s [ log p(x_n|z_sn) - ( log q(z_sn|x_n) - log p(z_sn) ) ]

    Draws that are not reparameterised (discrete latents) get score-function gradients, with the mean of the other
    particles as baseline: use at least two particles, or the variance is large. `Trace_ELBO` has no baseline,
    `TraceGraph_ELBO` has learned ones, and `TraceEnum_ELBO` has the exact gradient if the values can be summed over;
    all three can be used as they are.

    The arguments are those of `KLObjective`.

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes (2014).
        Kool, van Hoof & Welling, Buy 4 REINFORCE Samples, Get a Baseline for Free! (2019), for the baseline.
    """

    has_score_terms = True

    def pieces(self, runs: Sequence[Run], terms: Terms) -> list[Piece]:
        return _sampled(terms, terms.guides, list(terms.priors))


class AnalyticKL(KLObjective):
    """ELBO with a closed-form KL if torch or Pyro has one, and a sampled KL otherwise.

        ELBO_n = 1/S sum_s [ log p(x_n|z_sn) - sum_l KL( q(z_l|x_n, z_<l,sn) || p(z_l|z_<l,sn) ) ]

    The closed form of a site is valid if all sites before it in the model also come before it in the guide. A layer
    whose prior depends on a latent that the guide draws later is sampled (Pyro's `TraceMeanField_ELBO` warns and
    continues). A site that is a transform of an auxiliary draw (AutoNormal) is sampled too. Draws that are not
    reparameterised get score-function gradients as in MonteCarloKL.

    The arguments are those of `KLObjective`.

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes (2014), appendix B.
    """

    has_score_terms = True

    def refuse_sums(self, names: Sequence[str]) -> None:
        _refuse_sums("AnalyticKL takes the KL of each site", names)

    def pieces(self, runs: Sequence[Run], terms: Terms) -> list[Piece]:
        by_dimension = self.free_bits > 0
        analytic = {
            name: kl for name in _ordered_alike(runs[0]) if (kl := _analytic(runs, name, by_dimension)) is not None
        }
        rest = {name: guide for name, guide in terms.guides.items() if name not in analytic}
        pieces = [Piece(kl, terms.sizes[name], [name]) for name, kl in analytic.items()]
        return pieces + _sampled(terms, rest, [name for name in terms.priors if name not in analytic])


class StickingTheLanding(KLObjective):
    """ELBO whose gradient omits the guide's score and keeps only the path through the draws.

        grad_phi = 1/S sum_s dz_sn/dphi d/dz [ log p(x_n, z) - log q(z|x_n; phi') ],   phi' = phi held fixed

    The omitted score has mean 0 (under any weight of the KL), so the gradient stays unbiased, and the rest is 0 for
    every draw if q is the posterior. This holds for the ELBO only: on an importance-weighted bound the same omission is
    biased (use DoublyReparameterised there). Parameters that the prior shares with the guide (VampPrior) keep the
    prior's gradient. Requires reparameterised draws and the guide's density at a given z: an autoregressive flow guide
    is inverted at every step, with one pass per dimension.

    The arguments are those of `KLObjective`.

    References:
        Roeder, Wu & Duvenaud, Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational
        Inference (2017).
    """

    has_score_terms = False
    detaches_draws = True

    def pieces(self, runs: Sequence[Run], terms: Terms) -> list[Piece]:
        held = {name: guide.detach() for name, guide in terms.guides.items()}
        return _sampled(terms, held, list(terms.priors))


def _refuse_sums(found: str, names: Sequence[str]) -> NoReturn:
    raise ValueError(
        f"{found}, and with site(s) {list(names)}, marked for enumeration, summed out, log p(x, z) is a log of "
        f"a sum that has no KL apart from its reconstruction: take MonteCarloKL or StickingTheLanding with beta=1 and "
        f"neither warm-up nor free bits, or sample the site(s) in both programs without the mark"
    )


def _sampled(terms: Terms, guides: dict[str, Tensor], latents: Sequence[str]) -> list[Piece]:
    """Return log q - log p of these sites, in one piece per latent if each latent has its own guide site."""
    if any(name not in latents for name in guides):  # the density of auxiliary draws belongs to no single latent
        if not guides:
            return []
        total = reduce(
            add, [guide.sum(-1) for guide in guides.values()] + [-terms.priors[name].sum(-1) for name in latents]
        )
        return [Piece(total.unsqueeze(-1), sum(terms.sizes[name] for name in latents), list(guides))]
    return [Piece(_difference(guides[name], terms.priors[name]), terms.sizes[name], [name]) for name in latents]


def _difference(guide: Tensor, prior: Tensor) -> Tensor:
    if guide.shape[-1] == prior.shape[-1]:
        return guide - prior
    return guide.sum(-1, keepdim=True) - prior.sum(-1, keepdim=True)


def _ordered_alike(run: Run) -> list[str]:
    """Return the latents whose prior cannot depend on a latent that the guide draws after them."""
    model = [name for name, site in sample_sites(run.model_trace) if not site["is_observed"]]
    guide = [name for name, _ in sample_sites(run.guide_trace)]
    return [name for rank, name in enumerate(model) if set(model[:rank]) <= set(guide[: guide.index(name)])]


def _analytic(runs: Sequence[Run], name: str, by_dimension: bool) -> Tensor | None:
    """Return the KL (S, N, G) of a site, or None without a closed form."""
    kls = []
    for run in runs:
        guide, prior = run.guide_trace.nodes[name], run.model_trace.nodes[name]
        if type(guide["fn"]).__name__ == "Delta":  # a transform of an auxiliary draw, not a point
            return None
        q, p, depth = guide["fn"], prior["fn"], 0
        if by_dimension and factors(q)[1] == factors(p)[1]:
            (q, depth), (p, _) = factors(q), factors(p)
        try:
            kl = kl_divergence(q, p)
        except NotImplementedError:
            return None
        kls.append(arranged(kl.flatten(kl.ndim - depth) if depth else kl.unsqueeze(-1), guide, run, scaled=True))
    return torch.cat(kls)


def _score_function(integrand: Tensor, score: Tensor) -> Tensor:
    """Return zero, with the gradient  1/S sum_s (f_s - mean of the other f) d score_s."""
    signal = integrand.detach()
    if len(signal) > 1:
        signal = signal - (signal.sum(0) - signal) / (len(signal) - 1)
    return (signal * (score - score.detach())).mean(0).sum()
