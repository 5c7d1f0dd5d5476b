"""Figures from arrays, never from models. Each takes `ax=` (or makes a figure) and returns the axes it drew on.

Two colours of Okabe & Ito that stay apart for the colour-blind and, with their line styles, in grey print.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["image_grid", "image_table", "manifold", "reconstructions", "tightness", "training"]

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "0.45"


def image_grid(
    images: Any, *, columns: int = 16, title: str | None = None, cmap: str = "gray_r", ax: Any = None
) -> Any:
    """Show images side by side.

    Shapes: images (N, channels, height, width) with 1 or 3 channels, values in [0, 1] (others are clipped).
    cmap: matplotlib's colour map of images with 1 channel; "gray_r" is ink on paper, "gray" suits photographs

    Raises ValueError for other shapes.
    """
    images = _images(images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    tiled = _tile(images, rows, columns)
    ax = _axes(ax, (columns * 0.5, rows * 0.5 + (0.35 if title else 0.05)))
    ax.imshow(tiled, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    if title:
        ax.set_title(title, fontsize=10)
    return ax


def image_table(
    images: Any,
    *,
    row_labels: Sequence[Any] | None = None,
    column_labels: Sequence[Any] | None = None,
    title: str | None = None,
    cmap: str = "gray_r",
    ax: Any = None,
) -> Any:
    """Show images in rows and columns with their labels: interpolations, traversals, edits.

    Shapes: images (rows, columns, channels, height, width) with 1 or 3 channels, values in [0, 1] (others are clipped);
    a label for each row, and for each column.

    Raises ValueError for other shapes.
    """
    images = np.asarray(images)
    if images.ndim != 5:
        raise ValueError(f"expected images (rows, columns, 1 or 3, height, width), found shape {images.shape}")
    rows, columns = images.shape[:2]
    for name, labels, count in (("row_labels", row_labels, rows), ("column_labels", column_labels, columns)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{name} must be {count}, found {len(labels)}")
    ax = _axes(ax, (columns * 0.6 + 0.8, rows * 0.6 + 0.5))
    tiled = _tile(_images(images.reshape(-1, *images.shape[2:])), rows, columns)
    ax.imshow(tiled, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    height, width = tiled.shape[0] / rows, tiled.shape[1] / columns
    ax.set_xticks((np.arange(columns) + 0.5) * width, [""] * columns if column_labels is None else column_labels)
    ax.set_yticks((np.arange(rows) + 0.5) * height, [""] * rows if row_labels is None else row_labels)
    ax.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title, fontsize=10)
    return ax


def reconstructions(originals: Any, means: Any, *, columns: int = 16, cmap: str = "gray_r", ax: Any = None) -> Any:
    """Show data above the mean of p(x|z) at the mean of q(z|x), in pairs of rows.

    Shapes: both (N, channels, height, width).
    """
    originals, means = _images(originals), _images(means)
    if originals.shape != means.shape:
        raise ValueError(f"originals and reconstructions differ in shape: {originals.shape} and {means.shape}")
    columns = min(columns, len(originals))
    whole = len(originals) // columns * columns
    pairs = np.stack([part[:whole].reshape(-1, columns, *part.shape[1:]) for part in (originals, means)], axis=1)
    title = "odd rows: data    even rows: reconstructions, E[x | z = E q(z|x)]"
    return image_grid(
        pairs.reshape(-1, *originals.shape[1:]).transpose(0, 3, 1, 2), columns=columns, title=title, cmap=cmap, ax=ax
    )


def training(history: Sequence[dict[str, float]], *, axes: Any = None) -> Any:
    """Bound over epochs, and its two parts: reconstruction and KL, in nats per datum.

    history: rows with epoch, elbo, reconstruction, kl, and validation_elbo, ... where there is validation data
    axes: three axes; returns them
    """
    import matplotlib.pyplot as plt

    if axes is None:
        _, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in history]
    labels = {"elbo": "ELBO", "reconstruction": r"reconstruction, $E_q \log p(x|z)$", "kl": "KL(q(z|x) || p(z))"}
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        values = np.array([row[name] for row in history])
        checked = np.array([row.get(f"validation_{name}", np.nan) for row in history])
        ax.plot(epochs, values, color=_BLUE, label="training")
        if np.isfinite(checked).any():
            ax.plot(epochs, checked, color=_ORANGE, linestyle="--", label="validation")
        _zoom(ax, np.concatenate([values, checked]), rising=name != "kl")
        ax.set(xlabel="epoch", ylabel="nats per image", title=label)
        ax.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    return axes


def tightness(elbo: Any, log_prob: Any, particles: Sequence[int], curve: Any, *, axes: Any = None) -> Any:
    """How tight the bound is: ELBO against log p(x) per datum, and the mean bound as particles grow.

    Shapes: elbo, log_prob (N,); particles (P,); curve (P, N), the bound at each number of particles; in nats.
    The band is the standard error over data of the curve's distance from its last value: paired, as the data are the
    same all along. (Over data the curve itself is as uncertain as its last value, which the title gives.)
    axes: two axes; returns them
    """
    import matplotlib.pyplot as plt

    elbo, log_prob, curve = (np.asarray(values, dtype=float) for values in (elbo, log_prob, curve))
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    left, right = axes
    left.scatter(log_prob, elbo, s=6, alpha=0.25, color=_BLUE, edgecolors="none", rasterized=True)
    finite = np.isfinite(elbo) & np.isfinite(log_prob)
    low, high = min(elbo[finite].min(), log_prob[finite].min()), log_prob[finite].max()
    left.plot([low, high], [low, high], color=_GREY, linewidth=1, label="no gap: q is the posterior")
    left.set(
        xlabel="log p(x), importance sampled [nats]",
        ylabel="ELBO [nats]",
        title=f"each point an image; mean gap {np.mean((log_prob - elbo)[finite]):.2f} nats",
    )
    left.legend(loc="upper left", fontsize=8)

    mean = curve.mean(1)
    error = (curve - curve[-1]).std(1, ddof=1) / np.sqrt(curve.shape[1]) if curve.shape[1] > 1 else np.zeros(len(curve))
    right.fill_between(
        particles, mean - 2 * error, mean + 2 * error, color=_BLUE, alpha=0.2, label="+- 2 standard errors"
    )
    right.plot(particles, mean, color=_BLUE, marker="o", markersize=4, label="importance-weighted bound")
    right.axhline(mean[0], color=_ORANGE, linestyle="--", label="ELBO (1 particle)")
    over_data = curve[-1].std(ddof=1) / np.sqrt(curve.shape[1]) if curve.shape[1] > 1 else float("nan")
    right.set(
        xscale="log",
        xlabel="particles",
        ylabel="mean over images [nats]",
        title=f"bound at {particles[-1]:,} particles: {mean[-1]:.2f} +- {over_data:.2f} nats",
    )
    right.legend(loc="center right", fontsize=8)
    for ax in axes:
        ax.grid(alpha=0.3)
    return axes


def manifold(
    images: Any, *, extent: tuple[float, float, float, float] | None = None, cmap: str = "gray_r", ax: Any = None
) -> Any:
    """Decoded means over a grid of a 2-D latent.

    Shapes: images (rows, columns, channels, height, width); row 0 is drawn at the top.
    extent: (z_1 left, right, z_2 bottom, top), for the axes; the steps between may be uneven (quantiles)
    """
    images = np.asarray(images)
    rows, columns = images.shape[:2]
    ax = _axes(ax, (7, 7 * rows / columns))
    tiled = _tile(_images(images.reshape(-1, *images.shape[2:])), rows, columns, border=0)
    ax.imshow(tiled, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    ax.set(xlabel="$z_1$", ylabel="$z_2$", title=r"E[x|z] over the prior's quantiles of z", xticks=[], yticks=[])
    if extent is not None:
        height, width = tiled.shape[:2]
        ax.set_xticks([0, width - 1], [f"{value:.2f}" for value in extent[:2]])
        ax.set_yticks([height - 1, 0], [f"{value:.2f}" for value in extent[2:]])
    return ax


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _images(images: Any) -> np.ndarray:
    """(N, height, width, channels) in [0, 1]."""
    images = np.asarray(images, dtype=float)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"expected images (N, 1 or 3, height, width), found shape {images.shape}")
    return images.clip(0, 1).transpose(0, 2, 3, 1)


def _tile(images: np.ndarray, rows: int, columns: int, border: int = 1) -> np.ndarray:
    _, height, width, channels = images.shape
    images = np.pad(images, ((0, rows * columns - len(images)), (border, 0), (border, 0), (0, 0)))
    images = images.reshape(rows, columns, height + border, width + border, channels)
    return images.transpose(0, 2, 1, 3, 4).reshape(rows * (height + border), columns * (width + border), channels)


def _zoom(ax: Any, values: np.ndarray, *, rising: bool) -> None:
    """Cut off the first epochs' values where they would press the rest of a curve into a line."""
    values = values[np.isfinite(values)]
    if len(values) < 8:
        return
    low, high = values.min(), values.max()
    if rising:
        low = np.quantile(values, 0.1)
    margin = 0.08 * (high - low) or 1.0
    ax.set_ylim(low - margin, high + margin)
