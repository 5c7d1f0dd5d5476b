"""Figures of the gap between ELBO and log p(x): its size, its causes, and how far to trust it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyrovae.evaluation.inference_gaps import InferenceGaps
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.plots.canvas import (
    BLUE,
    ORANGE,
    as_array,
    axes_or_new,
    axis_top,
    check_alone,
    check_elbo,
    legend_below,
    stderr_of_mean,
    wrapped,
)

__all__ = ["gap_decomposition", "gap_histogram", "k_against_gap"]


def gap_histogram(gap: Any, *, num_bins: int = 40, ax: Any = None) -> Any:
    """Plot a histogram of the gap between ELBO and log p(x).

    Gaps so large that they would flatten the others are left out, with their number and size in the legend.

    Args:
        gap: (N,), in nats, or a result of `log_marginal_likelihood` or `inference_gaps`; the title counts those that
            are not finite
        num_bins: number of bins
        ax: axes to draw on

    Raises:
        TypeError: for anything else.
        ValueError: for another shape, if no gap is finite, and for a result of annealing or with one particle, whose
            gap is unknown.
    """
    gap = as_array(
        "gap_histogram takes a result of log_marginal_likelihood or inference_gaps, or the gaps", "gap", gap_of(gap)
    )
    finite = gap[np.isfinite(gap)]
    if len(finite) == 0:
        raise ValueError(f"none of the {len(gap)} gaps is finite")
    ax = axes_or_new(ax, (6.0, 4.6))
    top = axis_top(finite)
    ax.hist(finite[finite <= top], bins=num_bins, color=BLUE, alpha=0.75, edgecolor="white", linewidth=0.4)
    ax.axvline(finite.mean(), color=ORANGE, linestyle="--", label=f"mean {finite.mean():.2f}")
    ax.axvline(np.median(finite), color="black", linestyle=":", label=f"median {np.median(finite):.2f}")
    if (finite > top).any():
        ax.plot([], [], " ", label=f"{(finite > top).sum():,} right of the axis, up to {finite.max():,.0f}")
    left_out = f" ({len(gap) - len(finite):,} not finite)" if len(finite) < len(gap) else ""
    ax.set(
        xlabel="log p(x) - ELBO [nats], lower estimate",
        ylabel="number of data",
        title=f"gap of {len(finite):,} {'datum' if len(finite) == 1 else 'data'}{left_out}",
    )
    ax.yaxis.get_major_locator().set_params(integer=True)
    legend_below(ax, columns=2)
    ax.grid(alpha=0.3)
    ax.set_axisbelow(True)
    return ax


def k_against_gap(pareto_k: Any, gap: Any = None, *, limit: float | None = None, ax: Any = None) -> Any:
    """Plot the Pareto k of each datum's weights against its gap, to show which gaps to trust.

        k_against_gap(lml)
        k_against_gap(lml.pareto_k, lml.gap, limit=lml.pareto_k_limit)

    Triangles at the edges are data with an infinite k, or with a gap so large that it would flatten the others.

    Args:
        pareto_k: (N,), or a result of `log_marginal_likelihood`, which holds the gap and the limit, too; the title
            counts data whose k is unknown or whose gap is not finite
        gap: (N,), in nats
        limit: k above which a datum's estimates cannot be trusted: by default the result's `pareto_k_limit`, or 0.7 for
            arrays
        ax: axes to draw on

    Raises:
        TypeError: for anything else.
        ValueError: if the shapes are not both (N,), and for a result of annealing or with one particle, whose gap is
            unknown.
    """
    forms = "k_against_gap takes a result of log_marginal_likelihood, or pareto_k and gap"
    if isinstance(pareto_k, LogMarginalLikelihood):
        check_alone(forms, pareto_k, gap=gap)
        limit = pareto_k.pareto_k_limit if limit is None else limit
        pareto_k, gap = pareto_k.pareto_k, gap_of(pareto_k)
    limit = 0.7 if limit is None else limit
    pareto_k, gap = as_array(forms, "pareto_k", pareto_k), as_array(forms, "gap", gap)
    if pareto_k.shape != gap.shape:
        raise ValueError(f"k and gap must both be (N,), found shapes {pareto_k.shape} and {gap.shape}")
    known = ~np.isnan(pareto_k)
    drawn = known & np.isfinite(gap)
    if not drawn.any():
        raise ValueError(f"none of the {len(gap)} data has a known k and a finite gap")
    ax = axes_or_new(ax, (6.0, 4.8))
    right = axis_top(gap[drawn])
    bad, outside = drawn & (pareto_k > limit), drawn & (np.isposinf(pareto_k) | (gap > right))
    size, style = np.clip(3000 / len(gap), 12, 40), {"alpha": 0.5 if len(gap) > 1 else 1.0, "rasterized": True}
    for chosen, look in ((~bad, {"color": BLUE, "edgecolors": "none"}), (bad, {"color": ORANGE, "marker": "x"})):
        chosen = chosen & drawn & ~outside
        ax.scatter(gap[chosen], pareto_k[chosen], s=size, **look, **style)
    share = (pareto_k > limit)[known].mean()
    ax.axhline(limit, color=ORANGE, linestyle="--", label=f"limit {limit:.2f}: {share:.0%} of the data are above it")
    if limit > 0.5:
        ax.axhline(0.5, color="black", linestyle=":", label="0.5: above it, standard errors may be too small")
    if outside.any():
        low, top = ax.get_ylim()
        ax.set_ylim(low, top + 0.05 * (top - low))
        if (gap[drawn] > right).any():
            ax.set_xlim(right=1.05 * right)
        label = f"{outside.sum():,} outside: k up to {pareto_k[outside].max():.1f}, gap up to {gap[outside].max():,.0f}"
        x, y = np.minimum(gap[outside], right), np.minimum(pareto_k[outside], top)
        ax.scatter(x, y, s=30, color="black", marker="^", zorder=3, label=label)
    left_out = f"\n({(~drawn).sum():,} left out)" if not drawn.all() else ""
    ax.set(
        xlabel="log p(x) - ELBO [nats], lower estimate",
        ylabel="Pareto k",
        title=f"tail of the weights, one point per datum{left_out}",
    )
    legend_below(ax)
    ax.grid(alpha=0.3)
    return ax


def gap_of(given: Any) -> Any:
    """Return the gaps that a result holds, or what was given.

    Raises:
        ValueError: for a result whose gap is unknown.
    """
    if isinstance(given, InferenceGaps):
        return given.total
    if not isinstance(given, LogMarginalLikelihood):
        return given
    check_elbo(given)
    if given.num_particles == 1:
        raise ValueError("the gap is unknown with one particle: evaluate with num_particles=1000, for instance")
    return given.gap


def gap_decomposition(gaps: Any, *, ax: Any = None) -> Any:
    """Plot the approximation and amortization gaps as stacked bars, one bar per pair.

        gap_decomposition({"mean-field": gaps, "flow": other})

    Bars are means over data. Error lines show ± 2 standard errors over data: of the approximation gap where the parts
    meet, and of the whole gap at the top. A negative part (noise around zero) is drawn below zero, with its number.

    Args:
        gaps: a result of `inference_gaps`; or name -> such a result, or (approximation (N,), amortization (N,)) in nats
        ax: axes to draw on

    Raises:
        TypeError: for anything else.
        ValueError: for no pairs, or parts that are not of one shape (N,).
    """
    forms = (
        "gap_decomposition takes a result of inference_gaps, or {name: such a result, or (approximation, amortization)}"
    )
    if isinstance(gaps, InferenceGaps):
        gaps = {f"mean of {len(gaps):,} {'datum' if len(gaps) == 1 else 'data'}": gaps}
    if not isinstance(gaps, Mapping):
        raise TypeError(f"{forms}; found {type(gaps).__name__}")
    if not gaps:
        raise ValueError(f"{forms}; found an empty one")
    parts = [_parts(forms, name, found) for name, found in gaps.items()]
    names = [wrapped(name, 18) for name in gaps]
    ax = axes_or_new(ax, (max(5.2, 1.8 + 1.5 * len(gaps)), 5.0))
    positions = np.arange(len(gaps))
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
    ax.errorbar(positions - 0.2, approximation, yerr=2 * errors[:, 0], **lines)
    ax.errorbar(positions + 0.2, bottom + amortization, yerr=2 * errors[:, 1], **lines)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    for position, first, second, low in zip(positions, approximation, amortization, bottom, strict=True):
        for value, base in ((first, 0.0), (second, low)):
            if abs(value) > 0.06 * np.nanmax(np.abs([*approximation, *amortization])):
                ax.text(position, base + value / 2, f"{value:.2f}", ha="center", va="center", bbox=box)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.set_xticks(positions, names)
    note = "\nlines: ± 2 standard errors" if np.isfinite(errors).any() else ""
    ax.set(ylabel="nats per datum", title=f"log p(x) - ELBO{note}")
    ax.margins(y=0.08)
    ax.set_xlim(-0.6, len(gaps) - 0.4)
    legend_below(ax)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    return ax


def _parts(forms: str, name: Any, found: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(found, InferenceGaps):
        found = (found.approximation, found.amortization)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise TypeError(f"{forms}; found {type(found).__name__} for '{name}'")
    parts = [
        as_array(forms, f"{part} of '{name}'", values)
        for part, values in zip(("approximation", "amortization"), found, strict=True)
    ]
    if parts[0].shape != parts[1].shape:
        raise ValueError(f"{forms}; found shapes {parts[0].shape} and {parts[1].shape} for '{name}'")
    return parts[0], parts[1]
