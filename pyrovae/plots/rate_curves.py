"""Figure of rate-distortion curves."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyrovae.plots.canvas import BLUE, ORANGE, axes_or_new, legend_below

__all__ = ["rate_distortion"]

_STYLES = [(BLUE, "-"), (ORANGE, "--"), ("black", ":"), (BLUE, "-."), (ORANGE, "-"), ("black", "--")]
_MARKED = (0.01, 0.03, 0.1, 0.3, 1.0)  # temperatures with a marker


def rate_distortion(results: Any, *, bounds: Any = None, ax: Any = None) -> Any:
    """Plot mean rate against mean distortion, one curve for each result; lower and further left is better.

    The distortion is -log p(x|z) of the model itself: compare models of one likelihood (all Bernoulli, or normals of one
    scale) on the same data.

    Each curve is an upper bound of what a code needs. Markers stand at beta = 0.01, 0.03, 0.1, 0.3 and 1 (filled: the
    posterior, where rate + distortion = -log p(x)), with ± 2 standard errors over data in both directions.

    Args:
        results: a `RateDistortion`, or name -> `RateDistortion`
        bounds: a `BidirectionalMonteCarlo` for the same simulated data, or name -> one; draws the line of slope -1 below
            which no code lies, down to the rate 0
        ax: axes to draw on

    Raises:
        ValueError: for bounds whose name is not among the results', or an empty mapping.
    """
    results = results if isinstance(results, Mapping) else {"": results}
    bounds = {} if bounds is None else bounds if isinstance(bounds, Mapping) else {"": bounds}
    if not results or not set(bounds) <= set(results):
        raise ValueError(
            f"expected one curve or more, and bounds under the names of curves; found curves {list(results)} and bounds "
            f"{list(bounds)}"
        )
    ax = axes_or_new(ax, (5.8, 4.4))
    for index, (name, result) in enumerate(results.items()):
        color, line = _STYLES[index % len(_STYLES)]
        beta, rate, distortion, rate_error, distortion_error = (
            np.asarray(values, dtype=float)
            for values in (
                result.beta,
                result.mean_rate,
                result.mean_distortion,
                result.mean_rate_stderr,
                result.mean_distortion_stderr,
            )
        )
        label = f"{name + ': ' if name else ''}log p(x) ≥ {-(rate[-1] + distortion[-1]):.2f}"
        known = np.isfinite(rate) & np.isfinite(distortion)  # the prior's distortion may be infinite
        ax.plot(distortion[known], rate[known], color=color, linestyle=line, linewidth=1.3, label=label)
        for mark in sorted({int(np.abs(beta - wanted).argmin()) for wanted in _MARKED}):
            ax.errorbar(
                distortion[mark],
                rate[mark],
                xerr=2 * np.nan_to_num(distortion_error[mark]),
                yerr=2 * np.nan_to_num(rate_error[mark]),
                fmt="o",
                color=color,
                markersize=4.5,
                markerfacecolor=color if mark == len(beta) - 1 else "white",
                linewidth=0.9,
                capsize=2,
            )
            if len(results) == 1:
                ax.annotate(
                    f"β = {beta[mark]:.1g}",
                    (distortion[mark], rate[mark]),
                    xytext=(5, 5),
                    textcoords="offset points",
                )
        if name in bounds:
            ends = np.array([distortion[-1], distortion[-1] + rate[-1]])
            least = np.maximum(-float(bounds[name].upper.mean()) - ends, 0)
            note = "no code lies below" if name == next(iter(bounds)) else None
            ax.plot(ends, least, color=color, linewidth=0.8, alpha=0.7, label=note)
    few = min(len(result.beta) for result in results.values()) - 1
    first = next(iter(results.values()))
    ax.set(
        xlabel="distortion E[-log p(x|z)] [nats]",
        ylabel="rate KL(q(z) || p(z)), upper bound [nats]",
        title=f"means of {len(first):,} data, {few:,} temperatures\nbars: ± 2 standard errors over data",
    )
    ax.title.set_size(10)
    legend_below(ax)
    ax.grid(alpha=0.3)
    return ax
