"""Result of an estimate of log p(x): per-datum numbers from log weights, and diagnostics of how far to trust them."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrovae import estimators
from pyrovae.estimators.standard_error import standard_error
from pyrovae.estimators.weights import Weights

__all__ = ["LogMarginalLikelihood"]


@dataclass(frozen=True, repr=False)
class LogMarginalLikelihood:
    """Estimates of log p(x) per datum: float64 tensors (N,) on the CPU, in nats.

    Attributes:
        num_particles: S, particles per datum (chains for annealed importance sampling)
        log_prob: log 1/S sum_s w, a lower bound of log p(x) on average
        stderr: its Monte Carlo standard error (NaN with one particle), which does not include the bias
        elbo: mean log weight; NaN for annealed importance sampling
        elbo_stderr: its Monte Carlo standard error
        gap: log_prob - elbo, a lower estimate of KL(q(z|x) || p(z|x)); NaN for annealed importance sampling
        gap_stderr: its Monte Carlo standard error
        jackknife: log_prob with its bias of order 1/S removed; not a bound
        jackknife_2: log_prob with its bias of order 1/S^2 removed too; not a bound
        smoothed: log_prob from Pareto-smoothed weights; not a bound
        ess: effective sample size, from 1 to S
        pareto_k: tail shape of the weights (NaN if unknown, for instance below 25 particles). Above `pareto_k_limit`
            the datum's estimates cannot be trusted; above 0.5 its standard error may be too small
        curve_particles: numbers of particles of `curve`
        curve: the bound at these numbers of particles, (len(curve_particles), N)
        acceptance: acceptance rate of annealed importance sampling; None for importance sampling
    """

    num_particles: int
    log_prob: Tensor
    stderr: Tensor
    elbo: Tensor
    elbo_stderr: Tensor
    gap: Tensor
    gap_stderr: Tensor
    jackknife: Tensor
    jackknife_2: Tensor
    smoothed: Tensor
    ess: Tensor
    pareto_k: Tensor
    curve_particles: list[int]
    curve: Tensor
    acceptance: Tensor | None = None

    @classmethod
    def from_log_weights(cls, log_weights: Tensor) -> "LogMarginalLikelihood":
        """Compute all estimates from log weights.

        Args:
            log_weights: (S, N)
        """
        weights = Weights(log_weights)
        curve_particles, curve = estimators.bound_curve(weights)
        tail = estimators.pareto_tail(weights)
        return cls(
            num_particles=len(weights),
            log_prob=estimators.importance_weighted_bound(weights).cpu(),
            stderr=estimators.importance_weighted_bound_stderr(weights).cpu(),
            elbo=estimators.elbo(weights).cpu(),
            elbo_stderr=estimators.elbo_stderr(weights).cpu(),
            gap=estimators.gap(weights).cpu(),
            gap_stderr=estimators.gap_stderr(weights).cpu(),
            jackknife=estimators.jackknife(weights).cpu(),
            jackknife_2=estimators.jackknife_2(weights).cpu(),
            smoothed=tail.smoothed_bound.cpu(),
            ess=estimators.effective_sample_size(weights).cpu(),
            pareto_k=tail.k.cpu(),
            curve_particles=curve_particles,
            curve=curve.cpu(),
        )

    @classmethod
    def from_annealed(cls, log_weights: Tensor, acceptance: Tensor) -> "LogMarginalLikelihood":
        """Compute the estimates from annealed log weights; `elbo` and `gap` are NaN, because their mean is not an ELBO.

        Args:
            log_weights: (S, N)
            acceptance: mean acceptance rate per datum (N,)
        """
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
        """Join results for consecutive data, such as an interrupted run and the run on the rest of its data.

            partial = log_marginal_likelihood(model, guide, x)          # Ctrl-C: the first len(partial) data
            rest = log_marginal_likelihood(model, guide, x[len(partial):])
            whole = LogMarginalLikelihood.concatenate([partial, rest])

        Args:
            parts: results in the order of their data

        Raises:
            ValueError: for results of different methods or numbers of particles, or an empty list.
        """
        kinds = sorted({(part.method, part.num_particles) for part in parts})
        if len(kinds) != 1:
            raise ValueError(f"only results of one method and one number of particles can be joined, found {kinds}")
        first = parts[0]
        acceptances = [part.acceptance for part in parts if part.acceptance is not None]  # one per part, or none
        return cls(
            first.num_particles,
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in cls.per_datum()},
            curve_particles=first.curve_particles,
            curve=torch.cat([part.curve for part in parts], dim=1),
            acceptance=torch.cat(acceptances) if acceptances else None,
        )

    @staticmethod
    def per_datum() -> tuple[str, ...]:
        """Return the names of the (N,) estimates."""
        estimates = ("log_prob", "stderr", "elbo", "elbo_stderr", "gap", "gap_stderr", "jackknife", "jackknife_2")
        return (*estimates, "smoothed", "ess", "pareto_k")

    def __len__(self) -> int:
        return len(self.log_prob)

    def __getitem__(self, index: slice | Tensor) -> "LogMarginalLikelihood":
        """Select the results of some data by a slice, a mask or indices."""
        chosen = {name: getattr(self, name)[index] for name in self.per_datum()}
        acceptance = None if self.acceptance is None else self.acceptance[index]
        return replace(self, **chosen, curve=self.curve[:, index], acceptance=acceptance)

    @property
    def mean(self) -> float:
        """Mean of log_prob over the data, in nats per datum."""
        return self.log_prob.mean().item()

    @property
    def mean_stderr(self) -> float:
        """Standard error of `mean` as an estimate for new data, sd / sqrt(N); includes the Monte Carlo noise."""
        return standard_error(self.log_prob)

    @property
    def mean_mc_stderr(self) -> float:
        """Monte Carlo error of `mean`, sqrt(sum stderr^2) / N: its variation over repeated draws for the same data."""
        return self.stderr.square().sum().sqrt().item() / len(self)

    @property
    def bias_estimate(self) -> float:
        """Lower estimate of how much `mean` is too low: mean(jackknife - log_prob), in nats.

        The error bars do not include it, and averaging over data does not reduce it.
        """
        return (self.jackknife - self.log_prob).mean().item()

    @property
    def pareto_k_limit(self) -> float:
        """Largest Pareto k at which a datum's estimates can be trusted; NaN with one particle."""
        return estimators.pareto_k_limit(self.num_particles) if self.num_particles > 1 else math.nan

    @property
    def method(self) -> str:
        """Method of estimation: "importance sampling" or "annealed importance sampling"."""
        return "importance sampling" if self.acceptance is None else "annealed importance sampling"

    def share_of_bad_k(self, limit: float | None = None) -> float:
        """Return the share of data whose Pareto k is above `limit` (`pareto_k_limit` by default); NaN if k is unknown."""
        if self.pareto_k.isnan().all():
            return math.nan
        return (self.pareto_k > (self.pareto_k_limit if limit is None else limit)).double().mean().item()

    def summary(self) -> str:
        """Return a few lines to print: bound, corrected estimates, gap, their errors, and whether to trust them."""
        num_data = f"{len(self):,} {'datum' if len(self) == 1 else 'data'}"
        one = self.num_particles == 1
        what = ("particle" if one else "particles") if self.acceptance is None else ("chain" if one else "chains")
        counted = f"{self.num_particles:,} {what}"
        known = (
            f"Monte Carlo error and bias are unknown with one {what}"
            if one
            else f"± {self.mean_mc_stderr:.3f} Monte Carlo; a lower bound, too low by >= {self.bias_estimate:.3f}"
        )
        lines = [
            f"log p(x) by {self.method}: {num_data}, {counted}; nats per datum",
            f"  log p(x)        {self.mean:10.3f}   ± {self.mean_stderr:.3f} over data, {known}",
        ]
        if not one:
            lines.append(
                f"  corrected       {self.jackknife.mean():10.3f}   jackknife; {self.jackknife_2.mean():.3f} of order 2, "
                f"{self.smoothed.mean():.3f} Pareto-smoothed; not bounds"
            )
        if self.acceptance is None:
            gap = "   unknown with one particle"
            if not one:
                gap = f"{self.gap.mean():10.3f}   a lower estimate of KL(q(z|x) || p(z|x))"
            lines += [f"  ELBO            {self.elbo.mean():10.3f}", f"  gap             {gap}"]
        else:
            lines.append(f"  acceptance      {self.acceptance.mean():10.2f}   of the trajectories")
        if not one:
            lines.append(f"  ESS             {self.ess.median():10.1f}   median, of {counted}")
        return "\n".join([*lines, *self._about_tails(num_data)])

    def _about_tails(self, num_data: str) -> list[str]:
        bad, doubtful = self.share_of_bad_k(), self.share_of_bad_k(0.5)
        if math.isnan(bad):
            return []
        limit = self.pareto_k_limit
        lines = [f"  Pareto k        {self.pareto_k.nanmedian():10.2f}   median; the limit is {limit:.2f}"]
        if bad > 0:
            lines.append(
                f"  {round(bad * len(self)):,} of {num_data} have k > {limit:.2f}, so their estimates cannot be trusted: "
                f"use more particles, a better guide, or annealed importance sampling"
            )
        if doubtful > 0:
            lines.append(f"  {round(doubtful * len(self)):,} have k > 0.5: their standard errors may be too small")
        return lines

    def __repr__(self) -> str:
        gap = "unknown" if self.num_particles == 1 else f"{self.gap.mean():.3f}"
        bound = f"ELBO {self.elbo.mean():.3f}, gap {gap}" if self.acceptance is None else "annealed"
        return (
            f"LogMarginalLikelihood({len(self)} data, {self.num_particles} particles: log p(x) {self.mean:.3f} "
            f"± {self.mean_stderr:.3f}, {bound})"
        )

    def to_inference_data(self, **kwargs: Any) -> Any:
        """Export this result to ArviZ: InferenceData (0.x) or DataTree (1.x).

        Args:
            **kwargs: see `pyrovae.to_inference_data`
        """
        from pyrovae.evaluation.arviz_export import to_inference_data

        return to_inference_data(self, **kwargs)
