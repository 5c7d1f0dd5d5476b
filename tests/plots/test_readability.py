"""Figures can be read: no text is cut off or small, legends hide nothing, captions are of what is there, outliers are told."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

import pyrovae as pv
from pyrovae import plots

LONG = "a VampPrior of 500 pseudo-inputs below a flow of eight layers, seed 0, $x_1$ and more"


def lml(num_data=200, num_particles=30, level=-90.0):
    noise = 1.5 * torch.randn(num_particles, num_data).double()
    return pv.LogMarginalLikelihood.from_log_weights(noise + level + 5 * torch.randn(num_data))


def broken(num_data=200):
    """A result with one datum of each kind of trouble."""
    result = lml(num_data)
    result.pareto_k[:2] = torch.inf
    result.pareto_k[2] = torch.nan
    result.gap[3] = torch.nan
    result.log_prob[4] = result.elbo[4] = -torch.inf
    result.gap[4] = torch.nan
    result.curve[:, 4] = -torch.inf
    result.gap[5] = 400.0
    result.elbo[5] = result.log_prob[5] - 400.0
    return result


def one():
    return lml()[:1]


def curve_of(result):
    beta = torch.tensor([0.0, 0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
    rate = beta.sqrt().unsqueeze(1) * (10 + torch.rand(len(result), dtype=torch.float64))
    distortion = 90 + 50 / (beta.unsqueeze(1) + 0.01).expand_as(rate)
    error = torch.full_like(rate, 0.1)
    return pv.RateDistortion(8, beta, rate, distortion, error, error, error, error[0])


def history(epochs):
    names = ("elbo", "reconstruction", "kl", "validation_elbo", "validation_reconstruction", "validation_kl")
    return [{"epoch": n, **{name: -100 + 9 * np.log(n) for name in names}} for n in range(1, epochs + 1)]


def parts(*means):
    return {
        f"{LONG} {index}" if index == 1 else f"pair {index}": (
            mean + 0.1 * torch.randn(20),
            0.3 + 0.1 * torch.randn(20),
        )
        for index, mean in enumerate(means)
    }


CASES = {
    "tightness": lambda: plots.tightness(lml()),
    "tightness, broken": lambda: plots.tightness(broken()),
    "tightness, one datum": lambda: plots.tightness(one()),
    "tightness, one particle": lambda: plots.tightness(lml(num_particles=1)),
    "bound_curve": lambda: plots.bound_curve(lml(), annealed=lml(level=-89)),
    "bound_curve, broken": lambda: plots.bound_curve(broken(), annealed=broken()),
    "bound_curve, one datum": lambda: plots.bound_curve(one(), annealed=one()),
    "sandwich": lambda: plots.sandwich(x := torch.randn(30), x + 0.1 + 0.2 * torch.randn(30)),
    "sandwich, one datum": lambda: plots.sandwich([-3.0], [-2.0]),
    "sandwich, infinite": lambda: plots.sandwich([-3.0, -torch.inf, 0.0], [-2.0, 0.0, 1.0]),
    "training": lambda: plots.training(history(30)),
    "training, one epoch": lambda: plots.training([{"epoch": 1, "elbo": -1, "reconstruction": np.nan, "kl": np.nan}]),
    "comparison": lambda: plots.comparison({"a": lml(), "b": lml(level=-91)}),
    "comparison, many": lambda: plots.comparison(
        {LONG: lml(), "broken": broken()} | {f"{LONG} {n}": lml(level=-91 - n) for n in range(9)}
    ),
    "comparison, one datum": lambda: plots.comparison({"a": one(), "b": one()}),
    "gap_histogram": lambda: plots.gap_histogram(lml()),
    "gap_histogram, broken": lambda: plots.gap_histogram(broken()),
    "gap_histogram, one datum": lambda: plots.gap_histogram(one()),
    "k_against_gap": lambda: plots.k_against_gap(lml(num_particles=3000)),
    "k_against_gap, broken": lambda: plots.k_against_gap(broken()),
    "k_against_gap, one datum": lambda: plots.k_against_gap(one()),
    "gap_decomposition": lambda: plots.gap_decomposition(parts(1.0)),
    "gap_decomposition, many": lambda: plots.gap_decomposition(parts(-0.5, 0.0, 1.0, 2.0, 3.0)),
    "rank_histograms": lambda: plots.rank_histograms(
        torch.randint(0, 50, (8, 20)), names=[f"z[{n}]" for n in range(8)]
    ),
    "rank_histograms, one": lambda: plots.rank_histograms(torch.randint(0, 50, (1, 20)), names=[LONG]),
    "rank_histograms, odd": lambda: plots.rank_histograms(
        torch.randint(0, 50, (5, 20)), names=[f"site_of_a_long_name.latent[{n}]" for n in range(5)]
    ),
    "rate_distortion": lambda: plots.rate_distortion({"a model": curve_of(lml()), "another": curve_of(lml())}),
    "roc": lambda: plots.roc({"shuffled": (lml(), lml(level=-95))}),
    "roc, many": lambda: plots.roc({f"{LONG} {n}": (lml(), lml(level=-90 - n)) for n in range(6)}),
    "image_grid": lambda: plots.image_grid(torch.rand(2, 1, 8, 8), title="means of p(x|z) for z drawn from the prior"),
    "reconstructions": lambda: plots.reconstructions(*torch.rand(2, 3, 1, 8, 8)),
    "image_table": lambda: plots.image_table(
        torch.rand(2, 3, 1, 8, 8), row_labels=["a", "a long label"], column_labels=["long label"] * 3, title=LONG
    ),
    "manifold": lambda: plots.manifold(torch.rand(4, 3, 1, 8, 8), extent=(-2, 2, -2, 2)),
    "worst_images": lambda: plots.worst_images(torch.rand(200, 1, 8, 8), broken()),
    "worst_images, one": lambda: plots.worst_images(torch.rand(1, 1, 8, 8), one()),
    "report": lambda: plots.report(lml(), history=history(30), samples=torch.rand(48, 1, 8, 8), title=LONG * 3),
    "report, broken": lambda: plots.report(broken()),
    "report, one datum": lambda: plots.report(one()),
}


def test_every_figure_is_looked_at():
    assert {name.partition(",")[0] for name in CASES} == set(plots.__all__)


def texts(figure):
    """The texts that are drawn."""
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    outside_axis = set()
    for ax in figure.axes:
        if not ax.axison:
            outside_axis |= set(ax.xaxis.findobj(Text)) | set(ax.yaxis.findobj(Text))
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not min(limits) <= tick.get_loc() <= max(limits):
                    outside_axis |= {tick.label1, tick.label2}
    return [text for text in found if text not in outside_axis]


@pytest.mark.parametrize("name", CASES)
def test_text_is_whole_large_and_apart_from_the_points(name):
    CASES[name]()
    figure = plt.gcf()
    figure.canvas.draw()
    whole = Bbox([[-1, -1], [figure.bbox.width + 1, figure.bbox.height + 1]])
    shown = texts(figure)
    assert shown or name == "image_grid"
    for text in shown:
        extent = text.get_window_extent()
        inside = whole.x0 <= extent.x0 and whole.y0 <= extent.y0 and extent.x1 <= whole.x1 and extent.y1 <= whole.y1
        assert inside, f"cut off: {text.get_text()!r} at {extent}"
        small = 7 if text.get_text().startswith(r"$\mathdefault") else 10  # powers of ten have small exponents
        assert text.get_fontsize() >= small, text.get_text()
    for ax in figure.axes:
        legend = ax.get_legend()
        if legend is None:
            continue
        extent = legend.get_window_extent()
        for part in (ax.get_window_extent(), ax.xaxis.get_tightbbox(), ax.yaxis.label.get_window_extent()):
            assert not overlap(extent, part), f"the legend of {ax.get_title()!r} hides {part}"
        assert all(not overlap(extent, other.get_window_extent()) for other in figure.axes)
    for index, ax in enumerate(figure.axes):
        for other in figure.axes[index + 1 :]:
            if ax.axison and other.axison:
                assert not overlap(ax.get_tightbbox(), other.get_tightbbox()), (ax.get_title(), other.get_title())


def overlap(one, other, slack=1.0):
    """Whether two boxes share more than a pixel each way."""
    shared = Bbox.intersection(one, other)
    return shared is not None and shared.width > slack and shared.height > slack


def words(ax):
    legend = ax.get_legend()
    return " ".join([ax.get_title(), ax.get_xlabel(), *(text.get_text() for text in legend.get_texts())])


def test_captions_are_of_what_is_there():
    """One datum has no error: no band, no error line, and no ± in any word."""
    for name in ("tightness", "bound_curve", "sandwich", "comparison", "gap_histogram", "k_against_gap"):
        for ax in np.atleast_1d(CASES[f"{name}, one datum"]()):
            assert "±" not in words(ax), name
    assert "±" not in words(plots.gap_decomposition({"a": ([1.0], [2.0])}))
    words_of_report = plots.report(one()).get_suptitle()
    assert "nan" not in words_of_report
    for name in ("tightness", "bound_curve", "sandwich", "comparison", "gap_decomposition"):
        assert any("±" in words(ax) for ax in np.atleast_1d(CASES[name]())), name


def test_the_gap_stands_against_log_prob():
    result = lml()
    left, _ = plots.tightness(result)
    points = np.asarray(left.collections[0].get_offsets())
    np.testing.assert_allclose(points, np.stack([result.log_prob, result.log_prob - result.elbo], 1))
    low, high = left.get_ylim()
    assert high - low < 3 * result.gap.max()  # not the 30 nats of log p(x)
    assert low <= 0
    assert f"mean {result.gap.mean():.2f}" in left.get_title()


def test_titles_with_numbers_have_a_unit():
    for ax in plots.tightness(lml()):
        assert re.search(r"-?\d+\.\d\d ± \d+\.\d\d nats$", ax.get_title()), ax.get_title()


def cut_off(ax, label, most=2):
    """The number in the legend: of 200 data, at most 1%."""
    count = int(re.search(rf"(\d+) {label}", words(ax)).group(1))
    assert 1 <= count <= most
    return count


def test_outliers_are_cut_off_and_told():
    result = broken()
    left, _ = plots.tightness(result)
    assert left.get_ylim()[1] < 50
    above = cut_off(left, r"above the axis, up to 400")
    assert [len(points.get_offsets()) for points in left.collections] == [199 - above, above]
    assert "(1 of 200 data not finite)" in left.get_title()
    histogram = plots.gap_histogram(result)
    assert histogram.get_xlim()[1] < 50
    right = cut_off(histogram, "right of the axis, up to 400")
    assert sum(bar.get_height() for bar in histogram.patches) == 198 - right  # two are NaN
    drawn = plots.k_against_gap(result)
    assert drawn.get_xlim()[1] < 50
    outside = cut_off(drawn, "outside: k up to inf, gap up to 400", most=4)  # two for their k
    assert sum(len(points.get_offsets()) for points in drawn.collections) == 197
    assert len(drawn.collections[-1].get_offsets()) == outside
    assert "(3 left out)" in drawn.get_title()
    few = plots.gap_histogram([1.0, 2.0, 3.0])
    assert "right of the axis" not in words(few)


def test_an_infinite_k_counts_as_bad():
    k, gap = torch.tensor([0.1, 0.2, 0.3, torch.inf, torch.nan]), torch.ones(5)
    assert "25% of the data are above" in words(plots.k_against_gap(k, gap))


def test_differences_that_are_not_finite_stand_beside_the_name():
    bad = lml()
    bad.log_prob[0] = -torch.inf
    ax = plots.comparison({"good": lml(), "bad": bad})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["good", "bad (log p(x): -inf)"]


def test_unequal_bins_have_a_band_of_their_own():
    """23 ranks in 20 bins: uniform ranks fill three of the bins twice as high."""
    ranks = pv.Calibration(22, ["z"], torch.arange(23).repeat(100).unsqueeze(1))
    assert ranks.num_bins == 20
    (ax,) = plots.rank_histograms(ranks)
    assert ax.get_title() == "z\n0 of 20 outside"
    (ax,) = plots.rank_histograms(ranks.counts)  # taken for equal bins
    assert ax.get_title() == "0\n3 of 20 outside"


def test_axes_without_a_layout_keep_their_legend_in_the_figure():
    """Below the axes it would be cut off: only a layout engine makes room there."""
    for options, inside in (({}, True), ({"layout": "constrained"}, False)):
        figure, ax = plt.subplots(**options)
        plots.gap_histogram(lml(), ax=ax)
        figure.canvas.draw()
        extent = ax.get_legend().get_window_extent()
        assert extent.y0 >= 0
        assert overlap(extent, ax.get_window_extent()) == inside


def test_dollars_in_names_start_no_formula():
    ax = plots.comparison({"$x^$": lml(), "b$": lml()})
    ax.figure.canvas.draw()
    assert any(r"\$x^\$" in label.get_text() for label in ax.get_yticklabels())
