"""What the figures share: colours, axes, legends, and how results and arrays come in.

The colours (Okabe & Ito) are distinguishable for colour-blind readers and, with their line styles and markers, in grey
print. Text has the sizes of matplotlib's `rcParams` (10 points or more by default), so that a style sheet applies.
"""

import textwrap
from typing import Any

import numpy as np
from torch import Tensor

from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood

__all__ = [
    "BLUE",
    "COLORS",
    "GREY",
    "ORANGE",
    "as_array",
    "axes_or_new",
    "axis_top",
    "check_alone",
    "check_elbo",
    "legend_below",
    "stderr_of_mean",
    "text_width",
    "to_numpy",
    "with_error",
    "wrapped",
]

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.45"
COLORS = (BLUE, ORANGE, "black", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def axes_or_new(ax: Any, size: tuple[float, float]) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def as_array(forms: str, name: str, values: Any, shape: str = "(N,)") -> np.ndarray:
    """Return `values` as an array of float64.

    Args:
        forms: what the figure takes, to begin an error with
        name: of the argument
        values: numbers, in an array, a tensor or a list
        shape: the expected shape, such as "(P, N)"

    Raises:
        TypeError: if `values` is missing or holds no numbers.
        ValueError: if the shape is another, or an axis is empty.
    """
    if values is None:
        raise TypeError(f"{forms}; {name} {shape} is missing")
    try:
        array = to_numpy(values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{forms}; found {type(values).__name__} for {name} {shape}") from error
    if array.ndim != len(shape.strip("(,)").split(",")) or array.size == 0:
        raise ValueError(f"{forms}; found shape {array.shape} for {name} {shape}")
    return array


def to_numpy(values: Any) -> np.ndarray:
    """Return numbers as an array of float64: tensors of any device and dtype, arrays, lists."""
    return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=float)


def check_alone(forms: str, result: Any, **others: Any) -> None:
    """Raise TypeError if arrays were passed beside a result, which holds them already."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise TypeError(f"{forms}; found a {type(result).__name__} and {', '.join(given)}, which it holds already")


def check_elbo(result: LogMarginalLikelihood) -> None:
    """Raise ValueError for a result of annealing."""
    if result.acceptance is not None:
        raise ValueError(
            "the result has no ELBO, because annealed weights have none: pass the importance-sampled result of the pair, and "
            "add the annealed one with bound_curve(..., annealed=)"
        )


def axis_top(values: np.ndarray) -> float:
    """Return the end of an axis: at most 1% of the values lie above it, if they would flatten the others; else inf."""
    high = 1.2 * np.quantile(values, 0.99)
    return high if 0 < 2.5 * high < values.max() else np.inf


def stderr_of_mean(values: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over the last axis; NaN for a single datum."""
    count = values.shape[-1]
    return values.std(-1, ddof=1) / np.sqrt(count) if count > 1 else np.full(values.shape[:-1], np.nan)


def with_error(value: float, stderr: Any, digits: int = 2) -> str:
    """Return "value ± stderr", or the value alone if its error is unknown."""
    return f"{value:.{digits}f} ± {stderr:.{digits}f}" if np.isfinite(stderr) else f"{value:.{digits}f}"


def wrapped(name: Any, width: int = 28) -> str:
    """Return a name from the caller in lines of at most `width` characters; `$` does not start a formula."""
    return textwrap.fill(str(name), width).replace("$", r"\$")


def text_width(text: str, *, title: bool = False) -> float:
    """Return about how many inches the longest line of a text takes, for the size of a new figure."""
    import matplotlib as mpl
    from matplotlib.font_manager import FontProperties

    font = FontProperties(size=mpl.rcParams["axes.titlesize"] if title else mpl.rcParams["font.size"])
    return 0.62 * font.get_size_in_points() / 72 * max(map(len, text.split("\n")))


def legend_below(ax: Any, columns: int = 1, **options: Any) -> None:
    """Put the legend below the axes and their labels, so that it hides no points.

    Axes of the caller's in a figure without a layout engine have no room there: their legend stands inside.
    """
    from matplotlib.transforms import ScaledTranslation

    if ax.figure.get_layout_engine() is None:
        ax.legend(loc="best", **options)
        return
    extent = ax.xaxis.get_tightbbox()  # of the tick labels and the label; their distance from the axes is fixed
    depth = (ax.bbox.y0 - extent.y0) / ax.figure.dpi if extent is not None else 0.0
    below = ax.transAxes + ScaledTranslation(0, -depth - 0.04, ax.figure.dpi_scale_trans)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "bbox_transform": below}
    ax.legend(**place, ncols=columns, frameon=False, borderaxespad=0.0, **options)
