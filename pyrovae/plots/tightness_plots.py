"""How tight the bounds are: against particles, against each other, and from both sides."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyrovae.plots.canvas import BLUE, GREY, ORANGE, axes_or_new, stderr_of_mean

__all__ = ["bound_curve", "sandwich", "tightness"]


def tightness(elbo: Any, log_prob: Any, particles: Sequence[int], curve: Any, *, axes: Any = None) -> Any:
    """How tight the bound is: ELBO against log p(x) per datum, and the mean bound as particles grow.

    Shapes: elbo, log_prob (N,); particles (P,); curve (P, N), the bound at each number of particles; in nats.
    The right half is `bound_curve`.
    axes: two axes; returns them
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
        title=f"each point an image; mean gap {np.mean((log_prob - elbo)[finite]):.2f} nats",
    )
    left.legend(loc="upper left", fontsize=8)

    bound_curve(particles, curve, ax=right)
    left.grid(alpha=0.3)
    return axes


def bound_curve(particles: Sequence[int], curve: Any, *, annealed: Any = None, ax: Any = None) -> Any:
    """The mean bound as particles grow, from the ELBO at one particle; and the level of annealed importance sampling.

    Shapes: particles (P,); curve (P, N), the bound at each number of particles; annealed (N,), of the same data; in nats.
    Bands are 2 standard errors over data of the distance from the curve's last value: paired, as the data are the same all
    along. (Over data the curve itself is as uncertain as its last value, which the title gives.)

    Raises ValueError if `annealed` is of other data.
    """
    curve = np.asarray(curve, dtype=float)
    ax = axes_or_new(ax, (5.5, 4.2))
    mean, error = curve.mean(1), stderr_of_mean(curve - curve[-1])
    ax.fill_between(particles, mean - 2 * error, mean + 2 * error, color=BLUE, alpha=0.2, linewidth=0)
    ax.plot(particles, mean, color=BLUE, marker="o", markersize=4, label="importance-weighted bound")
    ax.axhline(mean[0], color=ORANGE, linestyle="--", label="ELBO (1 particle)")
    note = "band: +- 2 standard errors of the distance from the last point"
    if annealed is not None:
        annealed = np.asarray(annealed, dtype=float)
        if annealed.shape != curve.shape[1:]:
            raise ValueError(f"annealed must be of the same {curve.shape[1]} data, found shape {annealed.shape}")
        level, width = annealed.mean(), 2 * stderr_of_mean(annealed - curve[-1])
        ax.axhspan(level - width, level + width, color="black", alpha=0.12, linewidth=0)
        ax.axhline(level, color="black", linestyle=":", label=f"annealed importance sampling: {level:.2f}")
        note = "bands: +- 2 standard errors of the distance from the last point"
    ax.set(
        xscale="log",
        xlabel=f"particles\n({note})",
        ylabel="mean over data [nats]",
        title=f"bound at {particles[-1]:,} particles: {mean[-1]:.2f} +- {stderr_of_mean(curve[-1]):.2f} nats",
    )
    ax.xaxis.label.set_size(9)
    ax.legend(loc="center right", fontsize=8)
    ax.grid(alpha=0.3)
    return ax


def sandwich(lower: Any, upper: Any, *, ax: Any = None) -> Any:
    """How far apart the bounds from both sides are, for each datum simulated from the model.

    Shapes: lower, upper (N,), in nats: of `bidirectional_monte_carlo`. Single data may cross, as both are bounds on average;
    the mean width, with 2 standard errors over data, is what bounds the error of either side.

    Raises ValueError if they differ in number.
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
    ax.axhline(mean, color=BLUE, linestyle="--", label=f"mean width: {mean:.3f} +- {error:.3f}")
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
