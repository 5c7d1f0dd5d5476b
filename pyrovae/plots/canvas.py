"""Shared colours and axes of the figures.

The two colours (Okabe & Ito) are distinguishable for colour-blind readers and, with their line styles and markers, in
grey print.
"""

from typing import Any

import numpy as np

__all__ = ["BLUE", "GREY", "ORANGE", "axes_or_new", "stderr_of_mean"]

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.45"


def axes_or_new(ax: Any, size: tuple[float, float]) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def stderr_of_mean(values: np.ndarray) -> np.ndarray | float:
    """Return the standard error of the mean over the last axis; 0 for a single datum."""
    count = values.shape[-1]
    return values.std(-1, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(values.shape[:-1])
