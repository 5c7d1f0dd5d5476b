"""How a result declares an estimate, computes it from log weights, and words its line of the summary."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from pyrovae.estimators.weights import Weights

if TYPE_CHECKING:
    from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood

__all__ = [
    "Estimate",
    "estimate",
    "num_data",
    "num_particles",
    "of_acceptance",
    "of_ess",
    "of_gap",
    "of_jackknife",
    "of_log_prob",
    "of_precision",
    "of_tails",
]

_Text = Callable[["LogMarginalLikelihood"], str | None]


class Estimate(NamedTuple):
    """What `estimate` declares about a field."""

    compute: Callable[[Weights], Tensor] | None
    label: str | None
    text: str | _Text
    of_annealed: bool

    def line(self, result: "LogMarginalLikelihood", values: Tensor) -> str | None:
        """The line of the summary; None if there is none."""
        if isinstance(self.text, str):
            said = None if values.isnan().all() else f"{values.mean():10.3f}   {self.text}".rstrip()
        else:
            said = self.text(result)
        return None if self.label is None or said is None else f"  {self.label:16}{said}"


def estimate(
    compute: Callable[[Weights], Tensor] | None,
    label: str | None = None,
    text: str | _Text = "",
    *,
    of_annealed: bool = True,
) -> dict[str, Any]:
    """Metadata that declare a field of `LogMarginalLikelihood`: an estimate (N,) from log weights.

    Args:
        compute: log weights (S, N) -> (N,); None for numbers that do not come from weights
        label: name of its line in the summary; None if it has no line of its own
        text: what the summary's line says after the mean over data. Or a function from the result to everything after
            the label, or to None to leave out the line. If the mean is unknown, there is no line
        of_annealed: whether the estimate exists for annealed weights; if not, it is NaN
    """
    return {"estimate": Estimate(compute, label, text, of_annealed)}


def of_log_prob(result: "LogMarginalLikelihood") -> str:
    known = (
        f"Monte Carlo error and bias are unknown with one {_unit(result)}"
        if result.num_particles == 1
        else f"± {result.mean_mc_stderr:.3f} Monte Carlo; a lower bound, too low by >= {result.bias_estimate:.3f}"
    )
    return f"{result.mean:10.3f}   ± {result.mean_stderr:.3f} over data, {known}"


def of_jackknife(result: "LogMarginalLikelihood") -> str | None:
    if result.num_particles == 1:
        return None
    return (
        f"{result.jackknife.mean():10.3f}   jackknife; {result.jackknife_2.mean():.3f} of order 2, "
        f"{result.smoothed.mean():.3f} Pareto-smoothed; not bounds"
    )


def of_gap(result: "LogMarginalLikelihood") -> str | None:
    if result.acceptance is not None:
        return None
    if result.num_particles == 1:
        return "   unknown with one particle"
    return f"{result.gap.mean():10.3f}   a lower estimate of KL(q(z|x) || p(z|x))"


def of_acceptance(result: "LogMarginalLikelihood") -> str | None:
    return None if result.acceptance is None else f"{result.acceptance.mean():10.2f}   of the trajectories"


def of_ess(result: "LogMarginalLikelihood") -> str | None:
    return None if result.num_particles == 1 else f"{result.ess.median():10.1f}   median, of {num_particles(result)}"


def of_tails(result: "LogMarginalLikelihood") -> str | None:
    bad, doubtful = result.share_of_bad_k(), result.share_of_bad_k(0.5)
    if math.isnan(bad):
        return None
    limit, count = result.pareto_k_limit, len(result)
    lines = [f"{result.pareto_k.nanmedian():10.2f}   median; the limit is {limit:.2f}"]
    if bad > 0:
        lines.append(
            f"  {round(bad * count):,} of {num_data(count)} have k > {limit:.2f}, so their estimates cannot be trusted: "
            f"use more particles, a better guide, or annealed importance sampling"
        )
    if doubtful > 0:
        lines.append(f"  {round(doubtful * count):,} have k > 0.5: their standard errors may be too small")
    return "\n".join(lines)


_ROUNDED = {"medium": "medium products of float32 matrices", "bf16": "layers of the model in bfloat16"}


def of_precision(result: "LogMarginalLikelihood") -> str | None:
    if result.precision_error is None:
        return None
    errors = result.precision_error[~result.precision_error.isnan()]
    if not len(errors):
        found = "error not measured on these data"
    elif not errors.any():
        found = f"changed nothing in log p(x) of {num_data(len(errors))}"
    else:
        found = (
            f"log p(x) of {num_data(len(errors))} is off by {errors.mean():.2g} on average, "
            f"{errors.abs().max():.2g} at most"
        )
    return f"{result.precision:>10}   {_ROUNDED[result.precision]}: {found}"


def num_data(count: int) -> str:
    return f"{count:,} {'datum' if count == 1 else 'data'}"


def num_particles(result: "LogMarginalLikelihood") -> str:
    """Number of weights per datum, in words."""
    return f"{result.num_particles:,} {_unit(result)}"


def _unit(result: "LogMarginalLikelihood") -> str:
    unit = "particle" if result.acceptance is None else "population" if result.resampled else "chain"
    return unit if result.num_particles == 1 else f"{unit}s"
