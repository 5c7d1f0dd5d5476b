"""Figures of how tight the bounds are: ELBO against log p(x), the bound as particles grow, and bounds from both sides."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyrovae.plots.canvas import BLUE, GREY, ORANGE, axes_or_new, stderr_of_mean

__all__ = ["bound_curve", "sandwich", "tightness"]


def tightness(elbo: Any, log_prob: Any, particles: Sequence[int], curve: Any, *, axes: Any = None) -> Any:
    """Plot how tight the bound is: ELBO against log p(x) per datum, and the mean bound as particles grow.

    The right panel is `bound_curve`.

    Args:
        elbo: (N,), in nats
        log_prob: (N,), in nats
        particles: numbers of particles (P,)
        curve: the bound at each number of particles (P, N), in nats
        axes: two axes to draw on
    """
    import matplotlib.pyplot as plt

    elbo, log_prob, curve = (np.asarray(values, dtype=float) for values in (elbo, log_prob, curve))
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    left, right = axes
    left.scatter(log_prob, elbo, s=6, alpha=0.25, color=BLUE, edgecolors="none", rasterized=True)
    finite = np.isfinite(elbo) & np.isfinite(log_prob)
    low, high = min(elbo[finite].min(), log_prob[finite].min()), log_prob[finite].max()
    left.plot([low, high], [low, high], color=GREY, linewidth=1, label="no gap: q is the posterior")
    left.set(
        xlabel="log p(x), importance sampled [nats]",
        ylabel="ELBO [nats]",
        title=f"one point per datum; mean gap {np.mean((log_prob - elbo)[finite]):.2f} nats",
    )
    left.legend(loc="upper left", fontsize=8)

    bound_curve(particles, curve, ax=right)
    left.grid(alpha=0.3)
    return axes


def bound_curve(particles: Sequence[int], curve: Any, *, annealed: Any = None, ax: Any = None) -> Any:
    """Plot the mean bound as particles grow, and optionally the level of annealed importance sampling.

    The curve starts from the ELBO at one particle.

    Bands are ± 2 standard errors over data of the distance from the curve's last value. This distance is paired,
    because the data are the same throughout. (Over data, the curve itself is as uncertain as its last value, which the
    title gives.)

    Args:
        particles: numbers of particles (P,)
        curve: the bound at each number of particles (P, N), in nats
        annealed: annealed estimates (N,) for the same data, in nats
        ax: axes to draw on

    Raises:
        ValueError: if `annealed` is for other data.
    """
    curve = np.asarray(curve, dtype=float)
    ax = axes_or_new(ax, (5.5, 4.2))
    mean, error = curve.mean(1), stderr_of_mean(curve - curve[-1])
    ax.fill_between(particles, mean - 2 * error, mean + 2 * error, color=BLUE, alpha=0.2, linewidth=0)
    ax.plot(particles, mean, color=BLUE, marker="o", markersize=4, label="importance-weighted bound")
    ax.axhline(mean[0], color=ORANGE, linestyle="--", label="ELBO (1 particle)")
    note = "band: ± 2 standard errors of the distance from the last point"
    if annealed is not None:
        annealed = np.asarray(annealed, dtype=float)
        if annealed.shape != curve.shape[1:]:
            raise ValueError(f"annealed must be for the same {curve.shape[1]} data, found shape {annealed.shape}")
        level, width = annealed.mean(), 2 * stderr_of_mean(annealed - curve[-1])
        ax.axhspan(level - width, level + width, color="black", alpha=0.12, linewidth=0)
        ax.axhline(level, color="black", linestyle=":", label=f"annealed importance sampling: {level:.2f}")
        note = "bands: ± 2 standard errors of the distance from the last point"
    ax.set(
        xscale="log",
        xlabel=f"particles\n({note})",
        ylabel="mean over data [nats]",
        title=f"bound at {particles[-1]:,} particles: {mean[-1]:.2f} ± {stderr_of_mean(curve[-1]):.2f} nats",
    )
    ax.xaxis.label.set_size(9)
    ax.legend(loc="center right", fontsize=8)
    ax.grid(alpha=0.3)
    return ax


def sandwich(lower: Any, upper: Any, *, ax: Any = None) -> Any:
    """Plot the distance between the upper and the lower bound, for each datum simulated from the model.

    The bounds of a single datum may cross, because both are bounds on average. The mean width, with ± 2 standard errors
    over data, bounds the error of either side.

    Args:
        lower: (N,), in nats, from `bidirectional_monte_carlo`
        upper: (N,), in nats, likewise
        ax: axes to draw on

    Raises:
        ValueError: if the shapes are not both (N,).
    """
    lower, upper = (np.asarray(values, dtype=float) for values in (lower, upper))
    if lower.shape != upper.shape or lower.ndim != 1:
        raise ValueError(f"both bounds must be (N,), found shapes {lower.shape} and {upper.shape}")
    ax = axes_or_new(ax, (5.5, 4.2))
    width, middle = upper - lower, (lower + upper) / 2
    crossed = width < 0
    options = {"s": 16, "linewidths": 0.8, "rasterized": True}
    ax.scatter(middle[~crossed], width[~crossed], color=BLUE, marker="o", alpha=0.5, **options)
    if crossed.any():
        label = f"crossed: {crossed.sum():,} of {len(width):,}"
        ax.scatter(middle[crossed], width[crossed], color=ORANGE, marker="x", label=label, **options)
    mean, error = width.mean(), stderr_of_mean(width)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.axhline(mean, color=BLUE, linestyle="--", label=f"mean width: {mean:.3f} ± {error:.3f}")
    ax.axhspan(mean - 2 * error, mean + 2 * error, color=BLUE, alpha=0.2, linewidth=0)
    ax.set(
        xlabel="log p(x), between the bounds [nats]",
        ylabel="upper - lower bound [nats]",
        title=f"simulated data; means {lower.mean():.2f} to {upper.mean():.2f} nats",
    )
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.2 * (high - low))  # room for the legend
    ax.legend(loc="upper left", fontsize=8, ncols=2)
    ax.grid(alpha=0.3)
    return ax
