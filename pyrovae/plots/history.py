"""Figures of a training history."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyrovae.plots.canvas import BLUE, ORANGE

__all__ = ["training"]


def training(history: Sequence[dict[str, float]], *, axes: Any = None) -> Any:
    """Plot the bound over epochs, with its reconstruction and KL parts, in nats per datum.

    With 8 values or more, the lowest tenth may be cut off from the two rising curves if it would flatten the rest; the
    label says how many epochs lie below the axis.

    Args:
        history: rows with epoch, elbo, reconstruction, kl, and validation_elbo, ... if there are validation data
        axes: three axes to draw on
    """
    import matplotlib.pyplot as plt

    if axes is None:
        _, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in history]
    labels = {"elbo": "ELBO", "reconstruction": r"reconstruction, $E_q \log p(x|z)$", "kl": "KL(q(z|x) || p(z))"}
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        values = np.array([row[name] for row in history])
        checked = np.array([row.get(f"validation_{name}", np.nan) for row in history])
        ax.plot(epochs, values, color=BLUE, label="training")
        if np.isfinite(checked).any():
            ax.plot(epochs, checked, color=ORANGE, linestyle="--", label="validation")
        bottom = _zoom(ax, np.concatenate([values, checked]), rising=name != "kl")
        below = int(((values < bottom) | (checked < bottom)).sum())
        ax.set(
            xlabel=f"epoch ({below} of {len(epochs)} lie below the axis)" if below else "epoch",
            ylabel="nats per datum",
            title=label,
        )
        ax.grid(alpha=0.3)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(loc="lower right")
    return axes


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
