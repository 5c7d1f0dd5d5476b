"""Result of an estimate of log p(x): per-datum numbers from log weights, and diagnostics of how far to trust them.

A new estimate is one function in `pyrovae.estimators`, and one line among the fields of `LogMarginalLikelihood`: it is
then computed, joined, selected, exported to ArviZ and its file, and shown in the summary.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from pyrovae import estimators
from pyrovae.estimators.reducers import standard_error
from pyrovae.estimators.weights import Weights
from pyrovae.evaluation import declared
from pyrovae.evaluation.declared import Estimate, estimate

__all__ = ["LogMarginalLikelihood"]


@dataclass(frozen=True, repr=False, kw_only=True)
class LogMarginalLikelihood:
    """Estimates of log p(x) per datum: float64 tensors (N,) on the CPU, in nats.

    Attributes:
        num_particles: S, particles per datum; chains for annealed importance sampling, populations for sequential Monte
            Carlo
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
        resampled: whether the weights are those of populations (sequential Monte Carlo)
        precision: in which the model was computed, see `log_marginal_likelihood`
        precision_error: how much that precision changed log_prob, measured on some data with the same draws in float32
            (perhaps with fewer draws, which tends to overstate it); NaN for the other data. None in float32
    """

    num_particles: int
    log_prob: Tensor = field(metadata=estimate(estimators.importance_weighted_bound, "log p(x)", declared.of_log_prob))
    stderr: Tensor = field(metadata=estimate(estimators.importance_weighted_bound_stderr))
    jackknife: Tensor = field(metadata=estimate(estimators.jackknife, "corrected", declared.of_jackknife))
    jackknife_2: Tensor = field(metadata=estimate(estimators.jackknife_2))
    smoothed: Tensor = field(metadata=estimate(estimators.pareto_smoothed_bound))
    elbo: Tensor = field(metadata=estimate(estimators.elbo, "ELBO", of_annealed=False))
    elbo_stderr: Tensor = field(metadata=estimate(estimators.elbo_stderr, of_annealed=False))
    gap: Tensor = field(metadata=estimate(estimators.gap, "gap", declared.of_gap, of_annealed=False))
    gap_stderr: Tensor = field(metadata=estimate(estimators.gap_stderr, of_annealed=False))
    acceptance: Tensor | None = field(default=None, metadata=estimate(None, "acceptance", declared.of_acceptance))
    ess: Tensor = field(metadata=estimate(estimators.effective_sample_size, "ESS", declared.of_ess))
    pareto_k: Tensor = field(metadata=estimate(estimators.pareto_k, "Pareto k", declared.of_tails))
    precision_error: Tensor | None = field(default=None, metadata=estimate(None, "precision", declared.of_precision))
    curve_particles: list[int]
    curve: Tensor
    resampled: bool = False
    precision: str = "float32"

    @classmethod
    def from_log_weights(cls, log_weights: Tensor) -> "LogMarginalLikelihood":
        """Compute all estimates from log weights.

        Args:
            log_weights: (S, N)
        """
        return cls._of(log_weights, None)

    @classmethod
    def from_annealed(
        cls, log_weights: Tensor, acceptance: Tensor, *, resampled: bool = False
    ) -> "LogMarginalLikelihood":
        """Compute the estimates from annealed log weights; `elbo` and `gap` are NaN, because their mean is not an ELBO.

        Args:
            log_weights: (S, N)
            acceptance: mean acceptance rate per datum (N,)
            resampled: whether the weights are those of populations (sequential Monte Carlo), not of single chains
        """
        return replace(cls._of(log_weights, acceptance.cpu().double()), resampled=resampled)

    @classmethod
    def _of(cls, log_weights: Tensor, acceptance: Tensor | None) -> "LogMarginalLikelihood":
        weights = Weights(log_weights)
        estimates = {
            name: entry.compute(weights) if acceptance is None or entry.of_annealed else weights.unknown()
            for name, entry in cls._declared().items()
            if entry.compute is not None
        }
        curve_particles, curve = estimators.bound_curve(weights)
        return cls(
            num_particles=len(weights),
            **{name: values.cpu() for name, values in estimates.items()},  # type: ignore[arg-type]
            curve_particles=curve_particles,
            curve=curve.cpu(),
            acceptance=acceptance,
        )

    @classmethod
    def _declared(cls) -> dict[str, Estimate]:
        return {field.name: field.metadata["estimate"] for field in fields(cls) if "estimate" in field.metadata}

    @classmethod
    def concatenate(cls, parts: "list[LogMarginalLikelihood]") -> "LogMarginalLikelihood":
        """Join results for consecutive data, such as an interrupted run and the run on the rest of its data.

            partial = log_marginal_likelihood(model, guide, x)          # Ctrl-C: the first len(partial) data
            rest = log_marginal_likelihood(model, guide, x[len(partial):])
            whole = LogMarginalLikelihood.concatenate([partial, rest])

        Args:
            parts: results in the order of their data

        Raises:
            ValueError: for results of different methods, numbers of particles or precisions, or an empty list.
        """
        kinds = sorted({(part.method, part.num_particles, part.precision) for part in parts})
        if len(kinds) != 1:
            raise ValueError(
                f"only results of one method and one number of particles, in one precision, can be joined; found {kinds}"
            )
        joined: dict[str, Any] = {
            name: torch.cat([part.per_datum()[name] for part in parts]) for name in parts[0].per_datum()
        }
        return replace(parts[0], **joined, curve=torch.cat([part.curve for part in parts], dim=1))

    def per_datum(self) -> dict[str, Tensor]:
        """Return the estimates (N,) by name: `acceptance` only of annealing, `precision_error` only if not in float32."""
        return {name: getattr(self, name) for name in self._declared() if getattr(self, name) is not None}

    def __len__(self) -> int:
        return len(self.log_prob)

    def __getitem__(self, index: slice | Tensor) -> "LogMarginalLikelihood":
        """Select the results of some data by a slice, a mask or indices."""
        chosen: dict[str, Any] = {name: values[index] for name, values in self.per_datum().items()}
        return replace(self, **chosen, curve=self.curve[:, index])

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
        """Method of estimation: "importance sampling", "annealed importance sampling" or "sequential Monte Carlo"."""
        if self.acceptance is None:
            return "importance sampling"
        return "sequential Monte Carlo" if self.resampled else "annealed importance sampling"

    def bits_per_dim(self, num_dims: int, *, bin_width: float | Tensor = 1.0) -> Tensor:
        """Return the code length in bits per dimension of the data (N,); see `pyrovae.estimators.bits_per_dim`.

        Args:
            num_dims: numbers in a datum
            bin_width: width of a bin of discrete values in units of the data, 1/256 for bytes that
                `pyrovae.data.dequantize` made; one for all dimensions, or one each
        """
        return estimators.bits_per_dim(self.log_prob, num_dims, bin_width=bin_width)

    def share_of_bad_k(self, limit: float | None = None) -> float:
        """Return the share of data whose Pareto k is above `limit` (`pareto_k_limit` by default); NaN if k is unknown."""
        if self.pareto_k.isnan().all():
            return math.nan
        return (self.pareto_k > (self.pareto_k_limit if limit is None else limit)).double().mean().item()

    def summary(self) -> str:
        """Return a few lines to print: bound, corrected estimates, gap, their errors, and whether to trust them."""
        lines = [
            f"log p(x) by {self.method}: {declared.num_data(len(self))}, {declared.num_particles(self)}; nats per datum"
        ]
        shown = [self._declared()[name].line(self, values) for name, values in self.per_datum().items()]
        return "\n".join([*lines, *(line for line in shown if line is not None)])

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
