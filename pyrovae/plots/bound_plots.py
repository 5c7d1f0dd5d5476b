"""Figures of bounds: over the epochs of a training, per datum, as particles grow, and from both sides."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyrovae.annealing.bidirectional import BidirectionalMonteCarlo
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.plots.canvas import (
    BLUE,
    GREY,
    ORANGE,
    as_array,
    axes_or_new,
    axis_top,
    check_alone,
    check_elbo,
    legend_below,
    stderr_of_mean,
    with_error,
)
from pyrovae.training.fit import FitResult

__all__ = ["bound_curve", "sandwich", "tightness", "training"]


def training(history: Any, *, axes: Any = None) -> Any:
    """Plot the bound over epochs, with its reconstruction and KL parts, in nats per datum.

    With 8 values or more, the lowest tenth may be cut off from the two rising curves if it would flatten the rest; the
    label says which epochs lie below the axis.

    Args:
        history: result of `fit`, or its `history`: rows with epoch, elbo, reconstruction, kl, and validation_elbo, ...
            if there are validation data
        axes: three axes to draw on

    Raises:
        TypeError: for anything else.
        ValueError: for a history without rows, or rows without these keys.
    """
    import matplotlib.pyplot as plt

    rows = history.history if isinstance(history, FitResult) else history
    if not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(f"training takes the result of fit, or its history; found {type(history).__name__}")
    labels = {"elbo": "ELBO", "reconstruction": r"reconstruction, $E_q \log p(x|z)$", "kl": r"KL(q(z|x) $\|$ p(z))"}
    missing = [key for key in ("epoch", *labels) if not all(key in row for row in rows)]
    if not rows or missing:
        raise ValueError(
            f"training takes the rows of fit(...).history, each with epoch, elbo, reconstruction and kl; found "
            f"{f'rows without {missing}' if rows else 'no rows'}"
        )
    if axes is None:
        _, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) <= 10 else None  # a line needs two points to show
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        values = np.array([row[name] for row in rows], dtype=float)
        checked = np.array([row.get(f"validation_{name}", np.nan) for row in rows], dtype=float)
        ax.plot(epochs, values, color=BLUE, marker=marker, markersize=4, label="training")
        if np.isfinite(checked).any():
            ax.plot(epochs, checked, color=ORANGE, linestyle="--", marker=marker, markersize=4, label="validation")
        if not np.isfinite([*values, *checked]).any():
            ax.text(0.5, 0.5, "unavailable", transform=ax.transAxes, ha="center", va="center")
            ax.set(xticks=[], yticks=[])
        bottom = _zoom(ax, np.concatenate([values, checked]), rising=name != "kl")
        below = (values < bottom) | (checked < bottom)
        ax.set(xlabel=_epochs_label(below), ylabel="nats per datum", title=label)
        ax.grid(alpha=0.3)
        if np.isfinite([*values, *checked]).any():
            ax.xaxis.get_major_locator().set_params(integer=True)
    if len(axes[0].get_lines()) > 1:
        legend_below(axes[0], columns=2)
    return axes


def _epochs_label(below: np.ndarray) -> str:
    """Return the label of the epochs, with those that have a value below the axis."""
    number = int(below.sum())
    if not number:
        return "epoch"
    if below[:number].all():
        which = "the first epoch lies" if number == 1 else f"the first {number} epochs lie"
    else:
        which = f"{number} of {len(below)} epochs {'lies' if number == 1 else 'lie'}"
    return f"epoch\n({which} below the axis)"


def _zoom(ax: Any, values: np.ndarray, *, rising: bool) -> float:
    """Cut off the first epochs' values if they would flatten the rest of a curve; return the lower limit of the axis."""
    values = values[np.isfinite(values)]
    if len(values) < 8:
        return -np.inf
    low, high = values.min(), values.max()
    if rising:
        low = np.quantile(values, 0.1)
    margin = 0.08 * (high - low) or 1.0
    ax.set_ylim(low - margin, high + margin)
    return low - margin


def tightness(elbo: Any, log_prob: Any = None, particles: Any = None, curve: Any = None, *, axes: Any = None) -> Any:
    """Plot how tight the bound is: the gap against log p(x) per datum, and the mean bound as particles grow.

        tightness(lml)
        tightness(lml.elbo, lml.log_prob, lml.curve_particles, lml.curve)

    The right panel is `bound_curve`.

    Gaps so large that they would flatten the others are drawn as triangles at the top, with their number and size in the
    legend.

    Args:
        elbo: (N,), in nats, or a result of `log_marginal_likelihood`, which holds the other arrays, too
        log_prob: (N,), in nats
        particles: numbers of particles (P,)
        curve: the bound at each number of particles (P, N), in nats
        axes: two axes to draw on

    Raises:
        TypeError: for anything else, or if an array is missing.
        ValueError: for arrays of other shapes, and for a result of annealing, which has no ELBO.
    """
    import matplotlib.pyplot as plt

    forms = "tightness takes a result of log_marginal_likelihood, or elbo, log_prob, particles and curve"
    if isinstance(elbo, LogMarginalLikelihood):
        check_alone(forms, elbo, log_prob=log_prob, particles=particles, curve=curve)
        check_elbo(elbo)
        elbo, log_prob, particles, curve = elbo.elbo, elbo.log_prob, elbo.curve_particles, elbo.curve
    elbo, log_prob = as_array(forms, "elbo", elbo), as_array(forms, "log_prob", log_prob)
    particles, curve = as_array(forms, "particles", particles, "(P,)"), as_array(forms, "curve", curve, "(P, N)")
    if elbo.shape != log_prob.shape:
        raise ValueError(f"elbo and log_prob must be for the same data, found shapes {elbo.shape} and {log_prob.shape}")
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    left, right = axes
    with np.errstate(invalid="ignore"):  # -inf - -inf
        gap = log_prob - elbo
    finite = np.isfinite(gap) if particles.max() > 1 else np.zeros(len(gap), dtype=bool)
    left.set(xlabel="log p(x), importance sampled [nats]", ylabel="gap, log p(x) - ELBO [nats]")
    if finite.any():
        x, y = log_prob[finite], gap[finite]
        size, top = np.clip(3000 / len(y), 6, 40), axis_top(y)
        style = {"alpha": 0.4 if len(y) > 1 else 1.0, "color": BLUE, "edgecolors": "none", "rasterized": True}
        left.axhline(0.0, color=GREY, linewidth=1, label="no gap: q is the posterior")
        left.axhline(y.mean(), color=ORANGE, linestyle="--", label="mean")
        left.scatter(x[y <= top], y[y <= top], s=size, **style)
        above = y > top
        if above.any():
            left.set_ylim(top=1.05 * top)
            label = f"{above.sum():,} above the axis, up to {y.max():,.0f}"
            left.scatter(x[above], np.full(above.sum(), top), s=30, marker="^", color=ORANGE, label=label)
        left.set_title(f"gap per datum: mean {with_error(y.mean(), stderr_of_mean(y))} nats{_left_out(~finite)}")
        legend_below(left, columns=2)
    else:
        left.set_title("gap per datum")
        why = "unknown with one particle" if particles.max() == 1 else "none of the gaps is finite"
        left.text(0.5, 0.5, why, transform=left.transAxes, ha="center", va="center")
        left.set(xticks=[], yticks=[])
    left.grid(alpha=0.3)
    bound_curve(particles, curve, ax=right)
    return axes


def bound_curve(particles: Any, curve: Any = None, *, annealed: Any = None, ax: Any = None) -> Any:
    """Plot the mean bound as particles grow, and optionally the level of annealed importance sampling.

        bound_curve(lml, annealed=annealed)
        bound_curve(lml.curve_particles, lml.curve, annealed=annealed.log_prob)

    The curve starts from the ELBO at one particle.

    Bands are ± 2 standard errors over data of the rise from a point to the curve's last one. This rise is paired,
    because the data are the same throughout. (Over data, the curve itself is as uncertain as its last value, which the
    title gives.) A single datum has no bands, and those thinner than the line are left out. Data whose bounds are not
    all finite are left out, and counted in the title.

    Args:
        particles: numbers of particles (P,), or a result of `log_marginal_likelihood`, which holds the curve, too
        curve: the bound at each number of particles (P, N), in nats
        annealed: annealed estimates (N,) for the same data, in nats, or a result of `annealed_importance_sampling`
        ax: axes to draw on

    Raises:
        TypeError: for anything else.
        ValueError: if the curve or `annealed` is for other numbers of particles or data, if no datum is finite, and for
            a result of annealing as the curve.
    """
    forms = "bound_curve takes a result of log_marginal_likelihood, or particles and curve"
    if isinstance(particles, LogMarginalLikelihood):
        check_alone(forms, particles, curve=curve)
        check_elbo(particles)
        particles, curve = particles.curve_particles, particles.curve
    particles, curve = as_array(forms, "particles", particles, "(P,)"), as_array(forms, "curve", curve, "(P, N)")
    if len(particles) != len(curve):
        raise ValueError(f"{forms}; found {len(particles)} numbers of particles for {len(curve)} rows of the curve")
    finite = np.isfinite(curve).all(0)
    if annealed is not None:
        annealed = annealed.log_prob if isinstance(annealed, LogMarginalLikelihood) else annealed
        wanted = "annealed takes a result of annealed_importance_sampling, or its log_prob"
        annealed = as_array(wanted, "annealed", annealed)
        if annealed.shape != curve.shape[1:]:
            raise ValueError(f"annealed must be for the same {curve.shape[1]} data, found shape {annealed.shape}")
        finite &= np.isfinite(annealed)
        annealed = annealed[finite]
    if not finite.any():
        raise ValueError(f"none of the {len(finite)} data has a finite bound")
    curve = curve[:, finite]
    ax = axes_or_new(ax, (6.0, 4.8))
    mean, error = curve.mean(1), stderr_of_mean(curve - curve[-1])
    if 2 * np.nanmax(error, initial=0.0) > 0.02 * np.ptp(mean):  # else the line hides it
        label = "± 2 standard errors over data of the rise\nfrom a point to the last one"
        ax.fill_between(particles, mean - 2 * error, mean + 2 * error, color=BLUE, alpha=0.2, linewidth=0, label=label)
    ax.plot(particles, mean, color=BLUE, marker="o", markersize=4, label="importance-weighted bound")
    ax.axhline(mean[0], color=ORANGE, linestyle="--", label="ELBO (1 particle)")
    if annealed is not None:
        level, stderr = annealed.mean(), stderr_of_mean(annealed - curve[-1])
        if np.isfinite(stderr):
            ax.axhspan(level - 2 * stderr, level + 2 * stderr, color="black", alpha=0.12, linewidth=0)
        ax.axhline(level, color="black", linestyle=":", label=f"annealed importance sampling: {level:.2f}")
    ax.set(
        xscale="log",
        xlabel="particles",
        ylabel="mean over data [nats]",
        title=f"bound at {particles[-1]:,.0f} {'particle' if particles[-1] == 1 else 'particles'}: "
        f"{with_error(mean[-1], stderr_of_mean(curve[-1]))} nats{_left_out(~finite)}",
    )
    legend_below(ax)
    ax.grid(alpha=0.3)
    return ax


def sandwich(lower: Any, upper: Any = None, *, ax: Any = None) -> Any:
    """Plot the distance between the upper and the lower bound, for each datum simulated from the model.

        sandwich(pv.bidirectional_monte_carlo(model, x))
        sandwich(lower, upper)

    The bounds of a single datum may cross, because both are bounds on average. The mean width, with ± 2 standard errors
    over data, bounds the error of either side. Data with a bound that is not finite are left out, and counted in the
    title.

    Args:
        lower: (N,), in nats, or a result of `bidirectional_monte_carlo`, which holds both bounds
        upper: (N,), in nats
        ax: axes to draw on

    Raises:
        TypeError: for anything else.
        ValueError: if the shapes are not both (N,), or no datum has two finite bounds.
    """
    forms = "sandwich takes a result of bidirectional_monte_carlo, or lower and upper"
    if isinstance(lower, BidirectionalMonteCarlo):
        check_alone(forms, lower, upper=upper)
        lower, upper = lower.lower, lower.upper
    lower, upper = as_array(forms, "lower", lower), as_array(forms, "upper", upper)
    if lower.shape != upper.shape:
        raise ValueError(f"both bounds must be (N,), found shapes {lower.shape} and {upper.shape}")
    finite = np.isfinite(lower) & np.isfinite(upper)
    if not finite.any():
        raise ValueError(f"none of the {len(finite)} data has two finite bounds")
    lower, upper = lower[finite], upper[finite]
    ax = axes_or_new(ax, (6.0, 4.6))
    width, middle = upper - lower, (lower + upper) / 2
    crossed = width < 0
    options = {"s": 16, "linewidths": 0.8, "rasterized": True}
    ax.scatter(middle[~crossed], width[~crossed], color=BLUE, marker="o", alpha=0.5, **options)
    if crossed.any():
        label = f"crossed: {crossed.sum():,} of {len(width):,}"
        ax.scatter(middle[crossed], width[crossed], color=ORANGE, marker="x", label=label, **options)
    mean, error = width.mean(), stderr_of_mean(width)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.axhline(mean, color=BLUE, linestyle="--", label=f"mean width: {with_error(mean, error, 3)}")
    if np.isfinite(error):
        ax.axhspan(mean - 2 * error, mean + 2 * error, color=BLUE, alpha=0.2, linewidth=0, label="± 2 standard errors")
    ax.set(
        xlabel="log p(x), between the bounds [nats]",
        ylabel="upper - lower bound [nats]",
        title=f"simulated data: means {lower.mean():.2f} to {upper.mean():.2f}{_left_out(~finite)}",
    )
    legend_below(ax, columns=2)
    ax.grid(alpha=0.3)
    return ax


def _left_out(without: np.ndarray) -> str:
    """Return the words for data that are not finite, or nothing."""
    return f"\n({without.sum():,} of {len(without):,} data not finite)" if without.any() else ""
