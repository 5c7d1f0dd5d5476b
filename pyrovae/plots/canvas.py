"""What the figures share: colours, and the axes to draw on.

Two colours of Okabe & Ito that stay apart for the colour-blind and, with their line styles and markers, in grey print.
"""

from typing import Any

__all__ = ["BLUE", "GREY", "ORANGE", "axes_or_new"]

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.45"


def axes_or_new(ax: Any, size: tuple[float, float]) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax
