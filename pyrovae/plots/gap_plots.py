"""Figures of the gap between ELBO and log p(x): its size, its causes, and how far to trust it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyrovae.plots.canvas import BLUE, ORANGE, axes_or_new, stderr_of_mean

__all__ = ["gap_decomposition", "gap_histogram", "k_against_gap"]


def gap_histogram(gap: Any, *, num_bins: int = 40, ax: Any = None) -> Any:
    """Plot a histogram of the gap between ELBO and log p(x).

    Args:
        gap: (N,), in nats; the title counts those that are not finite
        num_bins: number of bins
        ax: axes to draw on

    Raises:
        ValueError: if no gap is finite.
    """
    gap = np.asarray(gap, dtype=float)
    finite = gap[np.isfinite(gap)]
    if len(finite) == 0:
        raise ValueError(f"none of the {len(gap)} gaps is finite")
    ax = axes_or_new(ax, (5.5, 4.2))
    ax.hist(finite, bins=num_bins, color=BLUE, alpha=0.75, edgecolor="white", linewidth=0.4)
    ax.axvline(finite.mean(), color=ORANGE, linestyle="--", label=f"mean {finite.mean():.2f}")
    ax.axvline(np.median(finite), color="black", linestyle=":", label=f"median {np.median(finite):.2f}")
    left_out = f" ({len(gap) - len(finite):,} not finite)" if len(finite) < len(gap) else ""
    ax.set(
        xlabel="log p(x) - ELBO [nats], lower estimate",
        ylabel="number of data",
        title=f"gap of {len(finite):,} data{left_out}",
    )
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return ax


def k_against_gap(pareto_k: Any, gap: Any, *, limit: float = 0.7, ax: Any = None) -> Any:
    """Plot the Pareto k of each datum's weights against its gap, to show which gaps to trust.

    Args:
        pareto_k: (N,); the title counts data whose k is unknown or infinite
        gap: (N,), in nats
        limit: k above which a datum's estimates cannot be trusted: the result's `pareto_k_limit`
        ax: axes to draw on

    Raises:
        ValueError: if the shapes are not both (N,).
    """
    pareto_k, gap = (np.asarray(values, dtype=float) for values in (pareto_k, gap))
    if pareto_k.shape != gap.shape or gap.ndim != 1:
        raise ValueError(f"k and gap must both be (N,), found shapes {pareto_k.shape} and {gap.shape}")
    ax = axes_or_new(ax, (5.5, 4.2))
    known = np.isfinite(pareto_k) & np.isfinite(gap)
    bad = known & (pareto_k > limit)
    options = {"alpha": 0.5, "rasterized": True}
    ax.scatter(gap[known & ~bad], pareto_k[known & ~bad], color=BLUE, s=10, edgecolors="none", **options)
    ax.scatter(gap[bad], pareto_k[bad], color=ORANGE, marker="x", s=14, linewidths=0.8, **options)
    share = bad.sum() / max(1, known.sum())
    ax.axhline(limit, color=ORANGE, linestyle="--", label=f"limit {limit:.2f}: {share:.0%} of the data are above it")
    if limit > 0.5:
        ax.axhline(0.5, color="black", linestyle=":", label="0.5: above it, standard errors may be too small")
    left_out = f" ({len(gap) - known.sum():,} left out)" if not known.all() else ""
    ax.set(
        xlabel="log p(x) - ELBO [nats], lower estimate",
        ylabel="Pareto k",
        title=f"tail of the weights, one point per datum{left_out}",
    )
    ax.legend(loc="lower right", fontsize=8)
    ax.grid(alpha=0.3)
    return ax


def gap_decomposition(gaps: Mapping[str, tuple[Any, Any]], *, ax: Any = None) -> Any:
    """Plot the approximation and amortization gaps as stacked bars, one bar per pair.

    Bars are means over data. Error lines show ± 2 standard errors over data: of the approximation gap where the parts
    meet, and of the whole gap at the top. A negative part (noise around zero) is drawn below zero, with its number.

    Args:
        gaps: name -> (approximation (N,), amortization (N,)), in nats, from `inference_gaps`
        ax: axes to draw on
    """
    ax = axes_or_new(ax, (max(4.2, 1.8 + 1.4 * len(gaps)), 4.2))
    positions = np.arange(len(gaps))
    parts = [tuple(np.asarray(part, dtype=float) for part in pair) for pair in gaps.values()]
    approximation, amortization = (np.array([part[index].mean() for part in parts]) for index in (0, 1))
    errors = np.array([[stderr_of_mean(part[0]), stderr_of_mean(part[0] + part[1])] for part in parts])
    style = {"width": 0.6, "edgecolor": "black", "linewidth": 0.8}
    ax.bar(positions, approximation, color=BLUE, label="approximation: the guide's family (>=)", **style)
    bottom = np.where(amortization < 0, 0.0, approximation)
    ax.bar(
        positions,
        amortization,
        bottom=bottom,
        color="#E69F00",
        hatch="///",
        label="amortization: the encoder",
        **style,
    )
    lines = {"fmt": "none", "color": "black", "capsize": 3, "linewidth": 1}
    ax.errorbar(positions - 0.08, approximation, yerr=2 * errors[:, 0], **lines)
    ax.errorbar(positions + 0.08, bottom + amortization, yerr=2 * errors[:, 1], **lines)
    for position, first, second, low in zip(positions, approximation, amortization, bottom, strict=True):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        for value, base in ((first, 0.0), (second, low)):
            if abs(value) > 0.04 * np.abs(approximation + amortization).max():
                ax.text(position, base + value / 2, f"{value:.2f}", ha="center", va="center", fontsize=9, bbox=box)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.set_xticks(positions, list(gaps))
    ax.set(ylabel="nats per datum", title="log p(x) - ELBO\nlines: ± 2 standard errors")
    ax.title.set_size(10)
    top = (approximation + amortization + 2 * errors[:, 1]).max()
    ax.set_ylim(top=1.1 * top)
    ax.set_xlim(-0.6, len(gaps) - 0.4)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), fontsize=8, frameon=False)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    return ax
