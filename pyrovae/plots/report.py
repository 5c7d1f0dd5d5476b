"""A one-page report: training, bounds, diagnostics and pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyrovae.plots.gap_plots import gap_decomposition, gap_histogram, k_against_gap
from pyrovae.plots.history import training
from pyrovae.plots.images import image_grid, reconstructions
from pyrovae.plots.tightness_plots import tightness

__all__ = ["report"]

_WIDTH = 11.0  # inches
_COLUMNS = 12  # images per row, in each half


def report(
    result: Any,
    *,
    history: Sequence[dict[str, float]] | None = None,
    gaps: Any = None,
    samples: Any = None,
    originals: Any = None,
    means: Any = None,
    title: str | None = None,
    cmap: str = "gray_r",
) -> Any:
    """Show everything known about a fitted pair on one page.

    Args:
        result: of `log_marginal_likelihood`. Drawn as ELBO against log p(x), the bound as particles grow, Pareto k
            against the gap (left out below 25 particles, because k is then unknown), and the histogram of gaps
        history: `fit(...).history`, drawn as a row of training curves
        gaps: of `inference_gaps`, drawn as the causes of the gap
        samples: images (M, channels, height, width) from `model.generate(M, mean=True)`; at most 48 are shown
        originals: images (N, channels, height, width); at most 24 are shown
        means: `uses.reconstruct` of `originals`, of the same shape
        title: of the page
        cmap: see `image_grid`

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: for a result of annealing, which has no ELBO (compare it by `bound_curve(annealed=)`), and for
            `originals` without `means` or the reverse.
    """
    import matplotlib.pyplot as plt

    elbo, log_prob = (np.asarray(values, dtype=float) for values in (result.elbo, result.log_prob))
    if np.isnan(elbo).all():
        raise ValueError(
            "the result has no ELBO, because annealed weights have none: pass the importance-sampled result of the pair, and "
            "add the annealed log_prob with bound_curve(..., annealed=)"
        )
    if (originals is None) != (means is None):
        raise ValueError("originals and means come together: pass images, and pyrovae.models.uses.reconstruct of them")
    pictures = [images is not None for images in (samples, means)]
    heights = [3.2] * (history is not None) + [4.2, 4.2] + [2.3] * any(pictures)
    figure = plt.figure(figsize=(_WIDTH, sum(heights) + 0.7), layout="constrained")
    figure.suptitle("\n".join([*([title] if title else []), *_in_words(result)]), fontsize=11)
    rows = iter(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])

    if history is not None:
        training(history, axes=next(rows).subplots(1, 3))
    tightness(elbo, log_prob, result.curve_particles, result.curve, axes=next(rows).subplots(1, 2))
    known = bool(np.isfinite(np.asarray(result.pareto_k)).any())
    widths = [1.0] * known + [1.0] + [0.7] * (gaps is not None)
    axes = list(next(rows).subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    if known:
        k_against_gap(result.pareto_k, result.gap, limit=result.pareto_k_limit, ax=axes.pop(0))
    gap_histogram(result.gap, ax=axes.pop(0))
    if gaps is not None:
        gap_decomposition({f"mean of {len(gaps):,} data": (gaps.approximation, gaps.amortization)}, ax=axes.pop(0))
    if any(pictures):
        axes = list(next(rows).subplots(1, sum(pictures), squeeze=False)[0])
        if samples is not None:
            name = "E[x | z], z drawn from the prior"
            image_grid(samples[: 4 * _COLUMNS], columns=_COLUMNS, title=name, cmap=cmap, ax=axes.pop(0))
        if means is not None:
            shown = 2 * _COLUMNS
            reconstructions(originals[:shown], means[:shown], columns=_COLUMNS, cmap=cmap, ax=axes.pop(0))
    return figure


def _in_words(result: Any) -> list[str]:
    """Return the headline numbers as lines of text."""
    data = f"{len(result):,} {'datum' if len(result) == 1 else 'data'}"
    if result.num_particles == 1:
        return [f"{data}, one particle: ELBO {result.mean:.2f} nats per datum; the gap is unknown"]
    bad = result.share_of_bad_k()
    trust = (
        "Pareto k unknown below 25 particles"
        if np.isnan(bad)
        else f"k > {result.pareto_k_limit:.2f}, so not trustworthy: {bad:.1%} of the data"
    )
    return [
        f"log p(x) {result.mean:.2f} ± {result.mean_stderr:.2f} over {data} (± {result.mean_mc_stderr:.3f} Monte Carlo; too "
        f"low by >= {result.bias_estimate:.3f}), in nats per datum",
        f"ELBO {result.elbo.mean():.2f}, gap >= {result.gap.mean():.2f}; {result.num_particles:,} particles; {trust}",
    ]
