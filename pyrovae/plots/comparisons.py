"""Figures of comparisons and tests: pairs against the best, rank histograms, ROC curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyrovae.plots.canvas import BLUE, ORANGE, axes_or_new

__all__ = ["comparison", "rank_histograms", "roc"]


def comparison(rows: Sequence[Any], *, ax: Any = None) -> Any:
    """Plot fitted pairs against the best of them: differences of log p(x) and of the ELBO, ± 2 standard errors.

    The hatched bar to the right of a difference is the bias estimate: log p(x) of that pair may be higher by this or
    more.

    Args:
        rows: of a `Comparison`, best first
        ax: axes to draw on
    """
    ax = axes_or_new(ax, (6.5, 1.6 + 0.55 * len(rows)))
    positions = np.arange(len(rows))
    columns = {
        name: np.array([getattr(row, name) for row in rows], dtype=float)
        for name in ("difference", "difference_stderr", "elbo_difference", "elbo_difference_stderr", "bias_estimate")
    }
    known = np.isfinite(columns["bias_estimate"])
    ax.barh(
        positions[known] - 0.12,
        columns["bias_estimate"][known],
        left=columns["difference"][known],
        height=0.14,
        facecolor="none",
        edgecolor=BLUE,
        hatch="////",
        linewidth=0.6,
        label="bias estimate: too low by >= this",
    )
    style = {"capsize": 3, "linewidth": 1.2}
    ax.errorbar(
        columns["difference"],
        positions - 0.12,
        xerr=2 * columns["difference_stderr"],
        fmt="o",
        color=BLUE,
        label="log p(x)",
        **style,
    )
    if np.isfinite(columns["elbo_difference"]).any():
        ax.errorbar(
            columns["elbo_difference"],
            positions + 0.12,
            xerr=2 * columns["elbo_difference_stderr"],
            fmt="D",
            markerfacecolor="white",
            color=ORANGE,
            label="ELBO",
            **style,
        )
    ax.axvline(0.0, color="black", linewidth=0.8, linestyle=":")
    ax.set_yticks(positions, [row.name for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)  # best on top
    ax.set_xlabel(
        f"nats per datum relative to '{rows[0].name}'; higher is better\nbars: ± 2 standard errors of paired differences",
        fontsize=9,
    )
    ax.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    ax.grid(axis="x", alpha=0.3)
    return ax


def rank_histograms(counts: Any, *, names: Sequence[str] | None = None, columns: int = 4, axes: Any = None) -> Any:
    """Plot the ranks of exact posterior draws among the guide's; flat if the two agree.

    There is one histogram per latent dimension. The grey band holds 99% of the bins of uniform ranks; bins outside it
    are orange and hatched. High bars at both ends mean that the guide is too narrow; in the middle, that it is too
    wide.

    Args:
        counts: data in each of B bins (D, B), from a `Calibration`
        names: of the D latent dimensions
        columns: histograms per row
        axes: D axes to draw on

    Raises:
        ValueError: for counts of another shape.
    """
    import matplotlib.pyplot as plt

    counts = np.asarray(counts)
    if counts.ndim != 2:
        raise ValueError(f"expected counts (D, B), found shape {counts.shape}")
    num_latents, num_bins = counts.shape
    if axes is None:
        columns = min(columns, num_latents)
        rows = -(-num_latents // columns)
        size = (2.4 * columns + 0.6, 1.7 * rows + 0.7)
        figure, grid = plt.subplots(
            rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        figure.supxlabel("rank of the exact draw among the guide's draws", fontsize=10)
        figure.supylabel("number of simulated data", fontsize=10)
        axes = grid.flatten()[:num_latents]
        for ax in grid.flatten()[num_latents:]:
            ax.set_axis_off()
    middles = (np.arange(num_bins) + 0.5) / num_bins
    for index, ax in enumerate(axes):
        expected = counts[index].sum() / num_bins
        reach = 2.576 * np.sqrt(expected * (1 - 1 / num_bins))  # 99% of a normal distribution
        low, high = expected - reach, expected + reach
        outside = (counts[index] < low) | (counts[index] > high)
        bars = ax.bar(
            middles, counts[index], width=1 / num_bins, color=BLUE, alpha=0.75, edgecolor="white", linewidth=0.4
        )
        for bar, out in zip(bars, outside, strict=True):
            if out:
                bar.set(color=ORANGE, hatch="////", edgecolor="white")
        ax.axhspan(low, high, color="black", alpha=0.15, linewidth=0, zorder=3)
        ax.set_title(
            f"{names[index] if names is not None else index}: {outside.sum()} of {num_bins} outside", fontsize=9
        )
        ax.set_xticks([0, 0.5, 1], ["low", "", "high"], fontsize=8)
    return axes


def roc(curves: Mapping[str, Any], *, ax: Any = None) -> Any:
    """Plot ROC curves: the share of outside data caught against the share of false alarms among inside data.

    Args:
        curves: name of the outside set -> its `Detection` (false_alarms, caught, auc, stderr)
        ax: axes to draw on
    """
    ax = axes_or_new(ax, (4.6, 5.1 + 0.2 * len(curves)))
    styles = [(BLUE, "-"), (ORANGE, "--"), ("black", ":"), (BLUE, "-."), (ORANGE, "-"), ("black", "--")]
    for index, (name, curve) in enumerate(curves.items()):
        color, line = styles[index % len(styles)]
        label = f"{name}: AUC {curve.auc:.3f} ± {curve.stderr:.3f}"
        ax.plot(curve.false_alarms, curve.caught, color=color, linestyle=line, label=label)
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    ax.set(
        xlabel="inside data below the threshold (false alarms)",
        ylabel="outside data below the threshold (caught)",
        aspect="equal",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
    )
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8, frameon=False)
    ax.grid(alpha=0.3)
    return ax
