"""Figures of images: grids, tables, latent manifolds, reconstructions, and the images with the largest gaps."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyrovae.plots.canvas import as_array, axes_or_new, text_width, to_numpy
from pyrovae.plots.gap_plots import gap_of

__all__ = ["image_grid", "image_table", "manifold", "reconstructions", "worst_images"]


def image_grid(
    images: Any, *, columns: int = 16, title: str | None = None, cmap: str = "gray_r", ax: Any = None
) -> Any:
    """Show images side by side.

    Args:
        images: (N, channels, height, width) with 1 or 3 channels, values in [0, 1] (others are clipped)
        columns: images per row
        title: of the figure
        cmap: matplotlib colour map for images with 1 channel; "gray_r" shows ink on paper, "gray" suits photographs
        ax: axes to draw on

    Raises:
        ValueError: for images of another shape.
    """
    images = _images(images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    tiled = _tile(images, rows, columns)
    width = max(columns * 0.5, text_width(title, title=True) if title else 0.0)
    ax = axes_or_new(ax, (width, rows * 0.5 + (0.3 + 0.2 * title.count("\n") if title else 0.05)))
    ax.imshow(tiled, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    if title:
        ax.set_title(title)
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
    """Show images in rows and columns with labels, for interpolations, traversals and edits.

    Args:
        images: (rows, columns, channels, height, width) with 1 or 3 channels, values in [0, 1] (others are clipped)
        row_labels: one per row
        column_labels: one per column
        title: of the figure
        cmap: see `image_grid`
        ax: axes to draw on

    Raises:
        ValueError: for images of another shape, or a wrong number of labels.
    """
    images = _pixels(images)
    if images.ndim != 5:
        raise ValueError(f"expected images (rows, columns, 1 or 3, height, width), found shape {images.shape}")
    rows, columns = images.shape[:2]
    for name, labels, count in (("row_labels", row_labels, rows), ("column_labels", column_labels, columns)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{name} must have {count} entries, found {len(labels)}")
    long, turned = (_longest(labels) for labels in (row_labels, column_labels))
    width = max(columns * 0.6, text_width(title, title=True) if title else 0.0)
    ax = axes_or_new(ax, (width + 0.3 + long, rows * 0.6 + 0.5 + (turned if turned > 0.6 else 0.0)))
    tiled = _tile(_images(images.reshape(-1, *images.shape[2:])), rows, columns)
    ax.imshow(tiled, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    height, width = tiled.shape[0] / rows, tiled.shape[1] / columns
    ax.set_xticks((np.arange(columns) + 0.5) * width, [""] * columns if column_labels is None else column_labels)
    ax.set_yticks((np.arange(rows) + 0.5) * height, [""] * rows if row_labels is None else row_labels)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    if turned > 0.6:  # inches of a column
        ax.tick_params(axis="x", labelrotation=90)
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title)
    return ax


def reconstructions(originals: Any, means: Any, *, columns: int = 16, cmap: str = "gray_r", ax: Any = None) -> Any:
    """Show data in odd rows and, below each, the mean of p(x|z) at the mean of q(z|x).

    Args:
        originals: (N, channels, height, width)
        means: reconstructions of the same shape
        columns: images per row
        cmap: see `image_grid`
        ax: axes to draw on

    Raises:
        ValueError: if the shapes differ.
    """
    originals, means = _images(originals), _images(means)
    if originals.shape != means.shape:
        raise ValueError(f"originals and reconstructions differ in shape: {originals.shape} and {means.shape}")
    columns = min(columns, len(originals))
    empty = np.zeros((-len(originals) % columns, *originals.shape[1:]), originals.dtype)  # the rest of the last row
    rows = [np.concatenate([part, empty]).reshape(-1, columns, *part.shape[1:]) for part in (originals, means)]
    pairs = np.stack(rows, axis=1)
    title = "odd rows: data; even rows: reconstructions"
    return image_grid(
        pairs.reshape(-1, *originals.shape[1:]).transpose(0, 3, 1, 2), columns=columns, title=title, cmap=cmap, ax=ax
    )


def manifold(
    images: Any, *, extent: tuple[float, float, float, float] | None = None, cmap: str = "gray_r", ax: Any = None
) -> Any:
    """Show decoded means over a grid of a 2-D latent.

    Args:
        images: (rows, columns, channels, height, width); row 0 is drawn at the top
        extent: (z_1 left, right, z_2 bottom, top), for the axes; the steps between may be uneven (quantiles)
        cmap: see `image_grid`
        ax: axes to draw on
    """
    images = _pixels(images)
    if images.ndim != 5:
        raise ValueError(f"expected images (rows, columns, 1 or 3, height, width), found shape {images.shape}")
    rows, columns = images.shape[:2]
    ax = axes_or_new(ax, (7, 7 * rows / columns))
    tiled = _tile(_images(images.reshape(-1, *images.shape[2:])), rows, columns, border=0)
    ax.imshow(tiled, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    ax.set(xlabel="$z_1$", ylabel="$z_2$", title=r"E[x|z] over the prior's quantiles of z", xticks=[], yticks=[])
    if extent is not None:
        height, width = tiled.shape[:2]
        ax.set_xticks([0, width - 1], [f"{value:.2f}" for value in extent[:2]])
        ax.set_yticks([height - 1, 0], [f"{value:.2f}" for value in extent[2:]])
    return ax


def worst_images(images: Any, gap: Any, *, num_images: int = 12, cmap: str = "gray_r", ax: Any = None) -> Any:
    """Show the images with the largest gaps, largest first, each below its gap in nats.

    Args:
        images: (N, channels, height, width)
        gap: (N,), in nats, or a result of `log_marginal_likelihood` or `inference_gaps`; NaN are left out
        num_images: number of images shown
        cmap: see `image_grid`
        ax: axes to draw on

    Raises:
        TypeError: for anything else.
        ValueError: if the numbers of images and gaps differ, or all gaps are NaN.
    """
    forms = "worst_images takes images, and their gaps or a result of log_marginal_likelihood or inference_gaps"
    images, gap = _pixels(images), as_array(forms, "gap", gap_of(gap))
    if len(images) != len(gap):
        raise ValueError(f"expected a gap for each image, found {len(images)} images and {len(gap)} gaps")
    known = np.flatnonzero(~np.isnan(gap))
    if len(known) == 0:
        raise ValueError(f"all of the {len(gap)} gaps are NaN")
    worst = known[np.argsort(-gap[known], kind="stable")][:num_images]
    labels = [f"{gap[index]:.1f}" for index in worst]
    title = f"largest gaps of {len(known):,} {'image' if len(known) == 1 else 'images'} [nats]"
    return image_table(images[worst][None], column_labels=labels, title=title, cmap=cmap, ax=ax)


def _longest(labels: Sequence[Any] | None) -> float:
    return text_width("\n".join(map(str, labels))) if labels is not None else 0.0


def _pixels(images: Any) -> np.ndarray:
    """Return images, tensors of any device or arrays, as an array.

    Raises:
        TypeError: for what holds no numbers.
    """
    try:
        return to_numpy(images)
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected images, a tensor or an array of numbers; found {type(images).__name__}") from error


def _images(images: Any) -> np.ndarray:
    """Convert images to (N, height, width, channels) with values in [0, 1]."""
    images = _pixels(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"expected images (N, 1 or 3, height, width), found shape {images.shape}")
    return images.clip(0, 1).transpose(0, 2, 3, 1)


def _tile(images: np.ndarray, rows: int, columns: int, border: int = 1) -> np.ndarray:
    _, height, width, channels = images.shape
    images = np.pad(images, ((0, rows * columns - len(images)), (border, 0), (border, 0), (0, 0)))
    images = images.reshape(rows, columns, height + border, width + border, channels)
    return images.transpose(0, 2, 1, 3, 4).reshape(rows * (height + border), columns * (width + border), channels)
