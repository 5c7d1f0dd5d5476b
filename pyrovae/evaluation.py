"""Estimates of log p(x) from log weights, with the evidence of how far each can be trusted."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae import estimators
from pyrovae.guides.contract import Guide
from pyrovae.programs.modules import evaluation_mode
from pyrovae.programs.traces import Program
from pyrovae.weights.blocks import log_weight_blocks, until_interrupted

__all__ = ["LogMarginalLikelihood", "active_units", "log_marginal_likelihood"]


@dataclass(frozen=True, repr=False)
class LogMarginalLikelihood:
    """Estimates of log p(x) per datum: float64 tensors (N,) on the CPU, in nats.

    log_prob: log 1/S sum_s w, a lower bound of log p(x) on average
    stderr: its Monte Carlo standard error (NaN with one particle); it does not see the bias
    elbo, elbo_stderr: the mean log weight, with its Monte Carlo standard error
    gap, gap_stderr: log_prob - elbo, an estimate of KL(q(z|x) || p(z|x)): "at least" this
    jackknife: log_prob with its bias of order 1/S removed; not a bound
    ess: effective sample size, 1 to S
    pareto_k: tail shape of the weights (NaN below 25 particles); above `pareto_k_limit` the row cannot be trusted,
        above 0.5 its standard error may be too small
    curve_particles, curve: the bound at growing numbers of particles, (len(curve_particles), N)
    acceptance: of annealed importance sampling alone, where S counts chains and `elbo` and `gap` are NaN; else None
    """

    num_particles: int
    log_prob: Tensor
    stderr: Tensor
    elbo: Tensor
    elbo_stderr: Tensor
    gap: Tensor
    gap_stderr: Tensor
    jackknife: Tensor
    ess: Tensor
    pareto_k: Tensor
    curve_particles: list[int]
    curve: Tensor
    acceptance: Tensor | None = None

    @classmethod
    def from_log_weights(cls, log_weights: Tensor) -> "LogMarginalLikelihood":
        """All of it from weights (S, N)."""
        curve_particles, curve = estimators.bound_curve(log_weights)
        return cls(
            num_particles=len(log_weights),
            log_prob=estimators.importance_weighted_bound(log_weights).cpu(),
            stderr=estimators.importance_weighted_bound_stderr(log_weights).cpu(),
            elbo=estimators.elbo(log_weights).cpu(),
            elbo_stderr=estimators.elbo_stderr(log_weights).cpu(),
            gap=estimators.gap(log_weights).cpu(),
            gap_stderr=estimators.gap_stderr(log_weights).cpu(),
            jackknife=estimators.jackknife(log_weights).cpu(),
            ess=estimators.effective_sample_size(log_weights).cpu(),
            pareto_k=estimators.pareto_k(log_weights).cpu().double(),
            curve_particles=curve_particles,
            curve=curve.cpu(),
        )

    @classmethod
    def from_annealed(cls, log_weights: Tensor, acceptance: Tensor) -> "LogMarginalLikelihood":
        """Of annealed weights (S, N): their mean is no ELBO, so that `elbo` and `gap` are NaN."""
        result = cls.from_log_weights(log_weights)
        unknown = torch.full_like(result.elbo, math.nan)
        return replace(
            result,
            elbo=unknown,
            elbo_stderr=unknown,
            gap=unknown,
            gap_stderr=unknown,
            acceptance=acceptance.cpu().double(),
        )

    @classmethod
    def concatenate(cls, parts: "list[LogMarginalLikelihood]") -> "LogMarginalLikelihood":
        """One result of results for consecutive data: of a run that was interrupted, and of the rest of its data.

            partial = log_marginal_likelihood(model, guide, x)          # Ctrl-C: the first len(partial) data
            rest = log_marginal_likelihood(model, guide, x[len(partial):])
            whole = LogMarginalLikelihood.concatenate([partial, rest])

        Raises ValueError for results of different methods or numbers of particles, or none at all.
        """
        kinds = sorted({(part.method, part.num_particles) for part in parts})
        if len(kinds) != 1:
            raise ValueError(f"results of one method and one number of particles make one result, found {kinds}")
        first = parts[0]
        return cls(
            first.num_particles,
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in cls.per_datum()},
            curve_particles=first.curve_particles,
            curve=torch.cat([part.curve for part in parts], dim=1),
            acceptance=None if first.acceptance is None else torch.cat([part.acceptance for part in parts]),
        )

    @staticmethod
    def per_datum() -> tuple[str, ...]:
        """Names of the (N,) estimates."""
        return ("log_prob", "stderr", "elbo", "elbo_stderr", "gap", "gap_stderr", "jackknife", "ess", "pareto_k")

    def __len__(self) -> int:
        return len(self.log_prob)

    def __getitem__(self, index: slice | Tensor) -> "LogMarginalLikelihood":
        """The results of some of the data, by a slice, a mask or indices."""
        chosen = {name: getattr(self, name)[index] for name in self.per_datum()}
        acceptance = None if self.acceptance is None else self.acceptance[index]
        return replace(self, **chosen, curve=self.curve[:, index], acceptance=acceptance)

    @property
    def mean(self) -> float:
        """Mean of log_prob over the data, in nats per datum."""
        return self.log_prob.mean().item()

    @property
    def mean_stderr(self) -> float:
        """Standard error of `mean` as an estimate for new data, sd / sqrt(N); the Monte Carlo noise is part of it."""
        return self.log_prob.std().item() / math.sqrt(len(self)) if len(self) > 1 else math.nan

    @property
    def mean_mc_stderr(self) -> float:
        """Monte Carlo part of the error of `mean`, sqrt(sum stderr^2) / N: what other draws for the same data change."""
        return self.stderr.square().sum().sqrt().item() / len(self)

    @property
    def bias_estimate(self) -> float:
        """How much `mean` is too low, at least: mean(jackknife - log_prob), in nats.

        The error bars do not contain it, and averaging over data does not shrink it.
        """
        return (self.jackknife - self.log_prob).mean().item()

    @property
    def pareto_k_limit(self) -> float:
        """Largest Pareto k at which a row can be trusted; NaN with one particle."""
        return estimators.pareto_k_limit(self.num_particles) if self.num_particles > 1 else math.nan

    @property
    def method(self) -> str:
        """What estimated it: "importance sampling" or "annealed importance sampling"."""
        return "importance sampling" if self.acceptance is None else "annealed importance sampling"

    def share_of_bad_k(self, limit: float | None = None) -> float:
        """Share of data whose Pareto k is above `limit` (`pareto_k_limit` by default); NaN where k is not known."""
        if self.pareto_k.isnan().all():
            return math.nan
        return (self.pareto_k > (self.pareto_k_limit if limit is None else limit)).double().mean().item()

    def summary(self) -> str:
        """A few lines to print: bound, estimate, gap, their errors, and whether to trust them."""
        num_data = f"{len(self):,} {'datum' if len(self) == 1 else 'data'}"
        particles = f"{self.num_particles:,} {'particles' if self.acceptance is None else 'chains'}"
        lines = [
            f"log p(x) by {self.method}: {num_data}, {particles}; nats per datum",
            f"  log p(x)        {self.mean:10.3f}   +- {self.mean_stderr:.3f} over data, "
            f"+- {self.mean_mc_stderr:.3f} Monte Carlo; a lower bound, too low by at least {self.bias_estimate:.3f}",
        ]
        if self.acceptance is None:
            lines += [
                f"  ELBO            {self.elbo.mean():10.3f}",
                f"  gap             {self.gap.mean():10.3f}   at least: KL(q(z|x) || p(z|x))",
            ]
        else:
            lines.append(f"  acceptance      {self.acceptance.mean():10.2f}   of the trajectories")
        lines.append(f"  ESS             {self.ess.median():10.1f}   median, of {particles}")
        bad, doubtful = self.share_of_bad_k(), self.share_of_bad_k(0.5)
        if not math.isnan(bad):
            lines.append(f"  Pareto k        {self.pareto_k.median():10.2f}   median")
            if bad > 0:
                count = round(bad * len(self))
                lines.append(
                    f"  {count:,} of {num_data} have k > {self.pareto_k_limit:.2f}: their estimates are not to be trusted; "
                    f"take more particles, a better guide, or annealed importance sampling"
                )
            if doubtful > 0:
                lines.append(f"  {round(doubtful * len(self)):,} have k > 0.5: their standard errors may be too small")
        return "\n".join(lines)

    def __repr__(self) -> str:
        bound = f"ELBO {self.elbo.mean():.3f}, gap {self.gap.mean():.3f}" if self.acceptance is None else "annealed"
        return (
            f"LogMarginalLikelihood({len(self)} data, {self.num_particles} particles: log p(x) {self.mean:.3f} "
            f"+- {self.mean_stderr:.3f}, {bound})"
        )

    def to_inference_data(self, **kwargs: Any) -> Any:
        """This result as ArviZ's InferenceData (0.x) or DataTree (1.x); see `pyrovae.to_inference_data`."""
        from pyrovae.inference_data import to_inference_data

        return to_inference_data(self, **kwargs)


def log_marginal_likelihood(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1000,
    plate: str | None = None,
    vectorize_particles: bool | Literal["auto"] = "auto",
    data_batch_size: int | Literal["auto"] | None = "auto",
    particle_batch_size: int | Literal["auto"] = "auto",
    compile: bool | Literal["auto"] = "auto",
    progress: bool = False,
    **kwargs: Any,
) -> LogMarginalLikelihood:
    """Importance-sampled log p(x) of any Pyro model/guide pair, per datum, in bounded memory.

    log p(x_n) ~ log 1/S sum_s p(x_n, z_sn) / q(z_sn | x_n),   z_sn ~ q(. | x_n),   s = 1 ... S

    model, guide: Pyro programs, called as model(*args, **kwargs); modules are put in eval mode meanwhile
    num_particles: S, drawn exactly
    plate: name of the plate that indexes the data. None: the one plate that all sample sites of both programs share;
        where they share none, the whole program is one datum. A sequential plate has to be named.
    vectorize_particles: draw particles under an outer plate. "auto" does so where two particles drawn together are
        the same as two drawn apart, and warns where they are not
    data_batch_size: data per block. "auto" cuts the tensors among the arguments whose first size is that of the plate,
        where pieces give what the whole gives (looked at for some data drawn from all and for the first ones, up to half a
        million numbers); None does not cut. A single datum left over joins the block before it
    particle_batch_size: particles per run of the programs
    compile: record the programs (see `pyrovae.programs.extract`) and let Inductor compile them: same draws, same numbers up to
        rounding. "auto" does so for parts of this library where there is work enough to win the compilation back
    progress: show a bar

    Returns a `LogMarginalLikelihood`, each array (N,) in nats. Plate subsampling is divided out (N is then the size of
    the subsample, drawn once); masks are honoured; `pyro.factor` counts as likelihood; a latent value outside the
    prior's support has weight 0. The estimate is a lower bound on average, by an unknown amount that the standard
    error does not contain: see `bias_estimate` and `pareto_k`. A guide that misses a mode of the posterior altogether
    is not noticed by either.

    Ctrl-C during a long run returns the result of the blocks of data that are done, with a RuntimeWarning that says how
    many; see `LogMarginalLikelihood.concatenate` for how to go on. In the first block it is a KeyboardInterrupt as ever.

    Raises ValueError, naming the site, for: latent sites that model and guide do not share, enumerated sites, factors
    or observations in the guide, guides with all mass on a point, Delta sites with a `log_density` that is not that of
    their change of variables, `poutine.scale`, data outside their support, a guide that does not cover the prior's draws
    where the data are possible, a latent outside the named plate, several plates to choose from, NaN.

    Source: Rezende, Mohamed & Wierstra, Stochastic Backpropagation (2014), appendix E; Burda, Grosse &
    Salakhutdinov, Importance Weighted Autoencoders (2016).
    """
    blocks = log_weight_blocks(
        model,
        guide,
        args,
        kwargs,
        num_particles=num_particles,
        plate=plate,
        vectorize_particles=vectorize_particles,
        data_batch_size=data_batch_size,
        particle_batch_size=particle_batch_size,
        compile=compile,
        progress=progress,
    )
    parts = ((LogMarginalLikelihood.from_log_weights(block), done, num_data) for block, done, num_data in blocks)
    return LogMarginalLikelihood.concatenate(until_interrupted(parts))


@torch.no_grad()
def active_units(guide: Guide, x: Tensor, *, threshold: float = 0.01, batch_size: int = 500) -> Tensor:
    """Which latent dimensions the guide uses.

    A_d = Var_x( E_q(z|x)[ z_d ] ) > threshold

    Shapes: x (N, *data_shape) -> bool (latent_dim,).

    Raises ValueError for fewer than 2 data.

    Source: Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).
    """
    if len(x) < 2:
        raise ValueError(f"a variance over data needs 2 data or more, found {len(x)}")
    with evaluation_mode(guide) as device:
        means = torch.cat([guide.posterior(batch.to(device)).mean for batch in x.split(batch_size)])
    return (means.double().var(0) > threshold).cpu()
