"""A one-page report: training, bounds, diagnostics and pictures."""

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np

from pyrovae.evaluation.inference_gaps import InferenceGaps
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.plots.bound_plots import tightness, training
from pyrovae.plots.canvas import check_elbo, with_error
from pyrovae.plots.gap_plots import gap_decomposition, gap_histogram, k_against_gap
from pyrovae.plots.images import image_grid, reconstructions

__all__ = ["report"]

_WIDTH = 12.0  # inches
_COLUMNS = 12  # images per row, in each half


def report(
    result: LogMarginalLikelihood,
    *,
    history: Any = None,
    gaps: InferenceGaps | None = None,
    samples: Any = None,
    originals: Any = None,
    means: Any = None,
    title: str | None = None,
    cmap: str = "gray_r",
) -> Any:
    """Show everything known about a fitted pair on one page.

    Args:
        result: of `log_marginal_likelihood`. Drawn as the gap against log p(x), the bound as particles grow, Pareto k
            against the gap (left out below 25 particles, because k is then unknown), and the histogram of gaps (left
            out with one particle)
        history: result of `fit`, or its `history`, drawn as a row of training curves
        gaps: of `inference_gaps`, drawn as the causes of the gap
        samples: images (M, channels, height, width) from `model.generate(M, mean=True)`; at most 48 are shown
        originals: images (N, channels, height, width); at most 24 are shown
        means: `uses.reconstruct` of `originals`, of the same shape
        title: of the page
        cmap: see `image_grid`

    Returns:
        The matplotlib Figure.

    Raises:
        TypeError: for anything else as `result`, `history` or `gaps`.
        ValueError: for a result of annealing, which has no ELBO (compare it by `bound_curve(annealed=)`), and for
            `originals` without `means` or the reverse.
    """
    import matplotlib.pyplot as plt

    if not isinstance(result, LogMarginalLikelihood):
        raise TypeError(f"report takes a result of log_marginal_likelihood, found {type(result).__name__}")
    if gaps is not None and not isinstance(gaps, InferenceGaps):
        raise TypeError(f"gaps takes a result of inference_gaps, found {type(gaps).__name__}")
    check_elbo(result)
    if (originals is None) != (means is None):
        raise ValueError("originals and means come together: pass images, and pyrovae.models.uses.reconstruct of them")
    draw_gaps: list[Callable[[Any], Any]] = []
    widths = []
    if np.isfinite(np.asarray(result.pareto_k)).any():
        draw_gaps.append(lambda ax: k_against_gap(result, ax=ax))
        widths.append(1.0)
    if result.num_particles > 1 and np.isfinite(np.asarray(result.gap)).any():
        draw_gaps.append(lambda ax: gap_histogram(result, ax=ax))
        widths.append(1.0)
    if gaps is not None:
        draw_gaps.append(lambda ax: gap_decomposition(gaps, ax=ax))
        widths.append(0.8)
    draw_images: list[Callable[[Any], Any]] = []
    if samples is not None:
        name = "E[x | z], z drawn from the prior"
        draw_images.append(
            lambda ax: image_grid(samples[: 4 * _COLUMNS], columns=_COLUMNS, title=name, cmap=cmap, ax=ax)
        )
    if means is not None:
        shown = 2 * _COLUMNS
        draw_images.append(
            lambda ax: reconstructions(originals[:shown], means[:shown], columns=_COLUMNS, cmap=cmap, ax=ax)
        )

    heights = [3.6] * (history is not None) + [4.6] + [5.0] * bool(draw_gaps) + [2.6] * bool(draw_images)
    figure = plt.figure(figsize=(_WIDTH, sum(heights) + 1.0), layout="constrained")
    lines = [*([title] if title else []), *_in_words(result)]
    figure.suptitle("\n".join(textwrap.fill(line, 110).replace("$", r"\$") for line in lines))
    rows = iter(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if history is not None:
        training(history, axes=next(rows).subplots(1, 3))
    tightness(result, axes=next(rows).subplots(1, 2))
    for drawings, ratios in ((draw_gaps, widths), (draw_images, [1.0] * len(draw_images))):
        if drawings:
            axes = next(rows).subplots(1, len(drawings), squeeze=False, width_ratios=ratios)[0]
            for draw, ax in zip(drawings, axes, strict=True):
                draw(ax)
    return figure


def _in_words(result: LogMarginalLikelihood) -> list[str]:
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
        f"log p(x) {with_error(result.mean, result.mean_stderr)} over {data} (± {result.mean_mc_stderr:.3f} Monte Carlo; too "
        f"low by >= {result.bias_estimate:.3f}), in nats per datum",
        f"ELBO {result.elbo.mean():.2f}, gap >= {result.gap.mean():.2f}; {result.num_particles:,} particles; {trust}",
    ]
