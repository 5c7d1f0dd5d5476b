"""Figures of comparisons and tests: pairs against the best, rank histograms, ROC curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyrovae.evaluation.calibration import Calibration
from pyrovae.evaluation.comparison import Comparison, ComparisonRow, compare
from pyrovae.evaluation.detection import Detection
from pyrovae.evaluation.detection import roc as measure
from pyrovae.plots.canvas import BLUE, COLORS, ORANGE, as_array, axes_or_new, legend_below, text_width, wrapped

__all__ = ["comparison", "rank_histograms", "roc"]


def comparison(rows: Any, *, ax: Any = None) -> Any:
    """Plot fitted pairs against the best of them: differences of log p(x) and of the ELBO, ± 2 standard errors.

        comparison(pv.compare({"vamp": lml, "normal": other}))
        comparison({"vamp": lml, "normal": other})

    The hatched bar to the right of a difference is the bias estimate: log p(x) of that pair may be higher by this or
    more. A difference that is not finite stands beside the name.

    Args:
        rows: result of `compare`, or its `rows`, or what `compare` takes: name -> result
        ax: axes to draw on

    Raises:
        TypeError: for anything else.
        ValueError: for no rows, and as `compare`.
    """
    if isinstance(rows, Mapping):
        rows = compare(rows)
    given = rows.rows if isinstance(rows, Comparison) else rows
    if not isinstance(given, Sequence) or not all(isinstance(row, ComparisonRow) for row in given):
        raise TypeError(
            f"comparison takes the result of compare, its rows, or results under their names; found {type(rows).__name__}"
        )
    if not given:
        raise ValueError("comparison takes the rows of a comparison; found none")
    columns = {
        name: np.array([getattr(row, name) for row in given], dtype=float)
        for name in ("difference", "difference_stderr", "elbo_difference", "elbo_difference_stderr", "bias_estimate")
    }
    known = np.isfinite(columns["difference"])
    names = [
        wrapped(row.name if finite else f"{row.name} (log p(x): {row.log_prob:.0f})")
        for row, finite in zip(given, known, strict=True)
    ]
    lines = sum(max(2, 1 + name.count("\n")) for name in names)
    ax = axes_or_new(ax, (5.4 + text_width("\n".join(names)), 2.2 + 0.26 * lines))
    positions = np.arange(len(given))
    biased = known & np.isfinite(columns["bias_estimate"])
    ax.barh(
        positions[biased] - 0.12,
        columns["bias_estimate"][biased],
        left=columns["difference"][biased],
        height=0.14,
        facecolor="none",
        edgecolor=BLUE,
        hatch="////",
        linewidth=0.6,
        label="bias: too low by >= this",
    )
    style = {"capsize": 3, "linewidth": 1.2}
    ax.errorbar(
        columns["difference"][known],
        positions[known] - 0.12,
        xerr=2 * columns["difference_stderr"][known],
        fmt="o",
        color=BLUE,
        label="log p(x)",
        **style,
    )
    with_elbo = np.isfinite(columns["elbo_difference"])
    if with_elbo.any():
        ax.errorbar(
            columns["elbo_difference"][with_elbo],
            positions[with_elbo] + 0.12,
            xerr=2 * columns["elbo_difference_stderr"][with_elbo],
            fmt="D",
            markerfacecolor="white",
            color=ORANGE,
            label="ELBO",
            **style,
        )
    ax.axvline(0.0, color="black", linewidth=0.8, linestyle=":")
    ax.set_yticks(positions, names)
    ax.set_ylim(len(given) - 0.5, -0.5)  # best on top
    label = [wrapped(f"nats per datum relative to '{given[0].name}'; higher is better", 54)]
    if np.isfinite(columns["difference_stderr"][1:]).any():
        label.append("lines: ± 2 standard errors, paired")
    ax.set_xlabel("\n".join(label))
    legend_below(ax, columns=3)
    ax.grid(axis="x", alpha=0.3)
    return ax


def rank_histograms(counts: Any, *, names: Sequence[str] | None = None, columns: int = 4, axes: Any = None) -> Any:
    """Plot the ranks of exact posterior draws among the guide's; flat if the two agree.

    There is one histogram per latent dimension. The grey band holds 99% of the bins of uniform ranks; bins outside it
    are orange and hatched. High bars at both ends mean that the guide is too narrow; in the middle, that it is too
    wide.

    Args:
        counts: result of `simulation_based_calibration`, or the number of data in each of B bins (D, B)
        names: of the D latent dimensions; by default those of the result
        columns: histograms per row
        axes: D axes to draw on

    Raises:
        TypeError: for anything else.
        ValueError: for counts of another shape, or another number of names or axes than D.
    """
    import matplotlib.pyplot as plt

    shares = None
    if isinstance(counts, Calibration):
        names = counts.names if names is None else names
        counts, shares = counts.counts, counts.bin_shares.numpy()
    forms = "rank_histograms takes a result of simulation_based_calibration, or counts"
    counts = as_array(forms, "counts", counts, "(D, B)")
    num_latents, num_bins = counts.shape
    shares = np.full(num_bins, 1 / num_bins) if shares is None else shares
    names = [str(index) for index in range(num_latents)] if names is None else names
    for what, found in (("names", names), ("axes", axes)):
        if found is not None and len(found) != num_latents:
            raise ValueError(f"{what} must be one for each of the {num_latents} latent dimensions, found {len(found)}")
    if axes is None:
        columns = min(columns, num_latents)
        rows = -(-num_latents // columns)
        size = (max(2.6 * columns + 0.6, 5.2), 2.0 * rows + 1.0)
        figure, grid = plt.subplots(
            rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        figure.supxlabel("rank of the exact draw among the guide's draws\n(grey: 99% of bins of uniform ranks)")
        figure.supylabel("number of simulated data")
        axes = grid.flatten()[:num_latents]
        for ax in grid.flatten()[num_latents:]:
            ax.set_axis_off()
        for ax in axes[-columns:]:
            ax.tick_params(labelbottom=True)  # also above an empty place
    middles = (np.arange(num_bins) + 0.5) / num_bins
    for ax, name, row in zip(axes, names, counts, strict=True):
        expected = row.sum() * shares
        reach = 2.576 * np.sqrt(expected * (1 - shares))  # 99% of a normal distribution
        outside = np.abs(row - expected) > reach
        bars = ax.bar(middles, row, width=1 / num_bins, color=BLUE, alpha=0.75, edgecolor="white", linewidth=0.4)
        for bar, out in zip(bars, outside, strict=True):
            if out:
                bar.set(color=ORANGE, hatch="////", edgecolor="white")
        edges, low, high = np.arange(num_bins + 1) / num_bins, expected - reach, expected + reach
        band = [np.append(limit, limit[-1]) for limit in (low, high)]
        ax.fill_between(edges, *band, step="post", color="black", alpha=0.15, linewidth=0, zorder=3)
        ax.set_title(f"{wrapped(name, 24)}\n{outside.sum()} of {num_bins} outside", fontsize="medium")
        ax.set_xticks([0, 0.5, 1], ["low", "", "high"])
    return axes


def roc(curves: Any, *, ax: Any = None) -> Any:
    """Plot ROC curves: the share of outside data caught against the share of false alarms among inside data.

        roc(pv.detection.roc(inside, outside))
        roc({"shuffled": pv.detection.roc(inside, outside), "inverted": (inside, other)})

    Args:
        curves: a `Detection`; or name of the outside set -> its `Detection`, or (inside, outside), the scores or results
            that `detection.roc` takes
        ax: axes to draw on

    Raises:
        TypeError: for anything else.
        ValueError: for no curves, and as `detection.roc`.
    """
    forms = "roc takes a result of detection.roc, or {name of the outside set: such a result, or (inside, outside)}"
    if isinstance(curves, Detection):
        curves = {"outside data": curves}
    if not isinstance(curves, Mapping):
        raise TypeError(f"{forms}; found {type(curves).__name__}")
    if not curves:
        raise ValueError(f"{forms}; found an empty one")
    measured = {}
    for name, found in curves.items():
        if isinstance(found, tuple | list) and len(found) == 2:
            found = measure(*found)
        if not isinstance(found, Detection):
            raise TypeError(f"{forms}; found {type(found).__name__} for '{name}'")
        measured[name] = found
    labels = [wrapped(f"{name}: AUC {found.auc:.3f} ± {found.stderr:.3f}", 44) for name, found in measured.items()]
    ax = axes_or_new(ax, (5.2, 5.2 + 0.24 * sum(1 + label.count("\n") for label in labels)))
    lines = ("-", "--", ":", "-.")
    for index, (found, label) in enumerate(zip(measured.values(), labels, strict=True)):
        color, line = COLORS[index % len(COLORS)], lines[index % len(lines)]
        ax.plot(found.false_alarms, found.caught, color=color, linestyle=line, label=label)
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    ax.set(
        xlabel="false alarms: inside data below the threshold",
        ylabel="caught: outside data below the threshold",
        aspect="equal",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
    )
    ax.set_anchor("N")  # leaves the room below to the legend
    legend_below(ax)
    ax.grid(alpha=0.3)
    return ax
