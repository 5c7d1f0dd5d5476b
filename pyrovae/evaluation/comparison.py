"""Compare fitted pairs on the same data: paired differences of log p(x) and of the ELBO."""

import html
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae.estimators.reducers import standard_error
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood

__all__ = ["Comparison", "ComparisonRow", "compare"]

_FEWEST_TO_CORRELATE = 10  # data


@dataclass(frozen=True)
class ComparisonRow:
    """One model/guide pair in a comparison, in nats per datum.

    Attributes:
        name: of the pair
        rank: by `log_prob` or `elbo`, as requested; 0 is the best, and a NaN mean comes last
        log_prob: mean over the data
        stderr: its standard error as an estimate for new data
        difference: log_prob minus that of the best pair
        difference_stderr: standard error of this paired difference
        bias_estimate: log_prob is too low by at least this much
        elbo: mean ELBO; NaN for annealed results
        elbo_difference: elbo minus that of the best pair
        elbo_difference_stderr: standard error of this paired difference
        gap: log_prob - elbo, a lower estimate of KL(q(z|x) || p(z|x)); NaN with one particle
        bad_k: share of data whose Pareto k is above its limit
    """

    name: str
    rank: int
    log_prob: float
    stderr: float
    difference: float
    difference_stderr: float
    bias_estimate: float
    elbo: float
    elbo_difference: float
    elbo_difference_stderr: float
    gap: float
    bad_k: float


@dataclass(frozen=True, repr=False)
class Comparison:
    """Result of `compare`: a table of rows, as a pandas frame (`to_dataframe`), as text, and as HTML in a notebook.

    Attributes:
        rows: from best to worst
        num_data: number of data that all pairs were evaluated on
        notes: remarks on how to read the rows
    """

    rows: list[ComparisonRow]
    num_data: int
    notes: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def to_dataframe(self) -> Any:
        """Return the table as a pandas DataFrame, as `arviz.compare` does.

            table.to_dataframe().loc["vamp", "difference"]

        The index holds the names, best first; the columns are the attributes of `ComparisonRow`. Unlike ArviZ's
        `elpd_diff`, `difference` is negative for the worse pairs. ArviZ's `se` is `stderr`, for a mean over the data
        instead of their sum; its `dse` is `difference_stderr`.
        """
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows]).set_index("name")

    def _printed(self) -> Any:
        """Return the table as a pandas DataFrame of text, each number beside its error."""
        import pandas

        rows = [
            {
                "log p(x)": _with_error(row.log_prob, row.stderr),
                "difference": _with_error(row.difference, row.difference_stderr) if row.rank else "best",
                "bias": f">= {row.bias_estimate:.2f}" if math.isfinite(row.bias_estimate) else "unknown",
                "ELBO": _or_unknown(f"{row.elbo:.2f}"),
                "ELBO difference": _with_error(row.elbo_difference, row.elbo_difference_stderr) if row.rank else "",
                "gap": f">= {row.gap:.2f}" if math.isfinite(row.gap) else "unknown",
                "bad k": _or_unknown(f"{row.bad_k:.1%}"),
            }
            for row in self.rows
        ]
        return pandas.DataFrame(rows, index=[row.name for row in self.rows])

    def _title(self) -> str:
        return f"{len(self)} model/guide pairs on {self.num_data:,} data; nats per datum, differences paired"

    def __repr__(self) -> str:
        return "\n".join([self._title(), self._printed().to_string(), *self.notes])

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        notes = "".join(f"<br>{html.escape(line)}" for line in self.notes)
        return f"{html.escape(self._title())}{self._printed().to_html()}{notes}"


def _with_error(value: float, stderr: float) -> str:
    return _or_unknown(f"{value:.2f}" if math.isnan(stderr) else f"{value:.2f} ± {stderr:.2f}")


def _or_unknown(number: str) -> str:
    return "unknown" if number.startswith("nan") else number


def compare(
    results: Mapping[str, LogMarginalLikelihood], *, by: Literal["log_prob", "elbo"] = "log_prob"
) -> Comparison:
    """Compare fitted pairs on the same data.

        difference_k = mean_n( log p_k(x_n) - log p_best(x_n) ),   standard error sd_n / sqrt(N)

    The standard errors are for a new draw of data and include Monte Carlo noise. They do not include the bias of each
    estimate (unequal tightness looks like a difference between models: see `bias_estimate`), nor the effect of another
    training seed.

    Args:
        results: name -> result of `log_marginal_likelihood` or `annealed_importance_sampling`, all for the same data in
            the same order. A result does not hold its data: only their number is checked, and a note says if log p(x) of
            two results is hardly correlated over the data
        by: quantity to rank by. "elbo" suits guides of one model, which share one log p(x): differences of the ELBO are
            then differences of the gap

    Returns:
        The pairs from best to worst, as a `Comparison`.

    Raises:
        ValueError: for fewer than two results, an unknown `by`, or results for different numbers of data.
        TypeError: if `results` is not a mapping of such results.

    References:
        Vehtari, Gelman & Gabry, Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation and WAIC
        (2017), section 5, for paired differences.
    """
    if by not in ("log_prob", "elbo"):
        raise ValueError(f"by must be 'log_prob' or 'elbo', found {by!r}")
    if not isinstance(results, Mapping):
        raise TypeError(
            f"compare takes the results under their names, {{'vamp': result, 'normal': other}}; found {type(results).__name__}"
        )
    for name, result in results.items():
        if not isinstance(result, LogMarginalLikelihood):
            raise TypeError(f"'{name}' is a {type(result).__name__}: pass what log_marginal_likelihood gives")
    if len(results) < 2:
        raise ValueError(f"a comparison needs two results or more; found {len(results)}")
    lengths = {name: len(result) for name, result in results.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"the results are for different numbers of data, {lengths}: evaluate all pairs on the same data"
        )
    num_data = len(next(iter(results.values())))
    means = {name: getattr(result, by).mean().item() for name, result in results.items()}
    order = sorted(results, key=lambda name: (math.isnan(means[name]), -means[name]))
    best = results[order[0]]
    rows = []
    for rank, name in enumerate(order):
        result = results[name]
        difference, difference_stderr = _paired(result.log_prob, best.log_prob)
        elbo_difference, elbo_difference_stderr = _paired(result.elbo, best.elbo)
        rows.append(
            ComparisonRow(
                name=str(name),
                rank=rank,
                log_prob=result.mean,
                stderr=result.mean_stderr,
                difference=difference,
                difference_stderr=difference_stderr if rank else 0.0,
                bias_estimate=result.bias_estimate,
                elbo=result.elbo.mean().item(),
                elbo_difference=elbo_difference,
                elbo_difference_stderr=elbo_difference_stderr if rank else 0.0,
                gap=result.gap.mean().item() if result.num_particles > 1 else math.nan,
                bad_k=result.share_of_bad_k(),
            )
        )
    return Comparison(rows, num_data, _notes(rows) + _notes_on_pairing({name: results[name] for name in order}))


def _paired(first: Tensor, second: Tensor) -> tuple[float, float]:
    difference = first - second
    return difference.mean().item(), standard_error(difference)


def _notes_on_pairing(results: Mapping[str, LogMarginalLikelihood]) -> list[str]:
    """Results of the same data, which are harder or easier for all models, have a clear correlation."""
    (best_name, best), *others = results.items()
    if len(best) < _FEWEST_TO_CORRELATE:
        return []
    notes = []
    for name, result in others:
        correlation = torch.corrcoef(torch.stack([best.log_prob, result.log_prob]))[0, 1].item()
        if correlation < 2 / math.sqrt(len(best)):
            notes.append(
                f"log p(x) of '{name}' and '{best_name}' is hardly correlated over the data ({correlation:.2f}): make sure that both "
                f"are results of the same data in the same order."
            )
    return notes


def _notes(rows: list[ComparisonRow]) -> list[str]:
    notes = []
    with_elbo = [row for row in rows if not math.isnan(row.elbo)]
    if with_elbo and len(with_elbo) == len(rows):
        tightest, likeliest = max(rows, key=lambda row: row.elbo), max(rows, key=lambda row: row.log_prob)
        if tightest is not likeliest:
            notes.append(
                f"The best ELBO is that of '{tightest.name}', the best log p(x) that of '{likeliest.name}': the ELBO also "
                f"rewards a guide that fits."
            )
    for row in rows:
        if math.isnan(row.log_prob):
            notes.append(
                f"The mean log p(x) of '{row.name}' is NaN: it is ranked last, and its differences are undefined."
            )
        elif not math.isfinite(row.bias_estimate):
            notes.append(f"The bias of '{row.name}' is unknown: use more particles.")
    for row in rows[1:]:
        unequal = abs(row.bias_estimate - rows[0].bias_estimate)
        if math.isfinite(unequal) and unequal > abs(row.difference):
            notes.append(
                f"The bias estimates of '{row.name}' and '{rows[0].name}' differ by {unequal:.2f} nats, their log p(x) by "
                f"{abs(row.difference):.2f}: use more particles before you conclude which is better."
            )
    notes.append("Standard errors are for new data; they do not include the effect of another training seed.")
    return notes
