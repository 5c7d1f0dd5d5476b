"""Figures from results or arrays, never from models.

Each takes `ax=` (or makes a figure) and returns the axes; `report` makes a page. Make your own axes with
`plt.subplots(layout="constrained")`: legends then stand below them, else inside.
"""

from pyrovae.plots.bound_plots import bound_curve, sandwich, tightness, training
from pyrovae.plots.comparisons import comparison, rank_histograms, roc
from pyrovae.plots.gap_plots import gap_decomposition, gap_histogram, k_against_gap
from pyrovae.plots.images import image_grid, image_table, manifold, reconstructions, worst_images
from pyrovae.plots.rate_curves import rate_distortion
from pyrovae.plots.report import report

__all__ = [
    "bound_curve",
    "comparison",
    "gap_decomposition",
    "gap_histogram",
    "image_grid",
    "image_table",
    "k_against_gap",
    "manifold",
    "rank_histograms",
    "rate_distortion",
    "reconstructions",
    "report",
    "roc",
    "sandwich",
    "tightness",
    "training",
    "worst_images",
]
