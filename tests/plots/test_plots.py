"""Figures of bounds, gaps and verdicts: what they draw is what they were given, on the axes they were given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import pyrovae as pv
from pyrovae import plots


@pytest.fixture
def lml():
    return pv.LogMarginalLikelihood.from_log_weights(1.5 * torch.randn(200, 30) - 90 + 5 * torch.randn(30))


def ax():
    return plt.subplots()[1]


def curve_of(lml):
    """A curve that falls to the rate 0 and an infinite distortion, as a hard constraint has it at the prior."""
    beta = torch.tensor([0.0, 0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
    rate = beta.sqrt().unsqueeze(1) * (10 + torch.rand(30, dtype=torch.float64))
    distortion = -lml.log_prob + 50 / (beta.unsqueeze(1) + 0.01 * (beta > 0).unsqueeze(1))
    error = torch.full_like(rate, 0.1)
    return pv.RateDistortion(8, beta, rate, distortion, error, error, error, error[0])


# name -> draw(result, ax): each function that draws on one pair of axes
FIGURES = {
    "bound_curve": lambda lml, ax: plots.bound_curve(lml.curve_particles, lml.curve, annealed=lml.jackknife, ax=ax),
    "comparison": lambda lml, ax: plots.comparison(
        pv.compare({"a": lml, "b": lml[torch.arange(29, -1, -1)]}).rows, ax=ax
    ),
    "gap_decomposition": lambda lml, ax: plots.gap_decomposition({"a": (lml.gap, lml.gap / 2)}, ax=ax),
    "gap_histogram": lambda lml, ax: plots.gap_histogram(lml.gap, ax=ax),
    "image_grid": lambda lml, ax: plots.image_grid(torch.rand(4, 1, 5, 5), ax=ax),
    "image_table": lambda lml, ax: plots.image_table(torch.rand(2, 3, 1, 5, 5), ax=ax),
    "k_against_gap": lambda lml, ax: plots.k_against_gap(lml.pareto_k, lml.gap, limit=lml.pareto_k_limit, ax=ax),
    "manifold": lambda lml, ax: plots.manifold(torch.rand(2, 3, 1, 5, 5), ax=ax),
    "rate_distortion": lambda lml, ax: plots.rate_distortion({"a": curve_of(lml), "b": curve_of(lml)}, ax=ax),
    "reconstructions": lambda lml, ax: plots.reconstructions(*torch.rand(2, 4, 1, 5, 5), ax=ax),
    "roc": lambda lml, ax: plots.roc({"shuffled": pv.detection.roc(lml.log_prob, lml.log_prob - 3)}, ax=ax),
    "sandwich": lambda lml, ax: plots.sandwich(lml.log_prob, lml.log_prob + 0.2 * torch.randn(30), ax=ax),
    "worst_images": lambda lml, ax: plots.worst_images(torch.rand(30, 1, 5, 5), lml.gap, ax=ax),
}
SEVERAL_AXES = {"rank_histograms", "report", "tightness", "training"}


def test_every_figure_is_listed():
    assert set(FIGURES) | SEVERAL_AXES == set(plots.__all__)


@pytest.mark.parametrize("name", FIGURES)
def test_draws_on_the_given_axes_or_its_own(name, lml):
    given = ax()
    assert FIGURES[name](lml, given) is given
    number = len(plt.get_fignums())
    drawn = FIGURES[name](lml, None)
    assert len(plt.get_fignums()) == number + 1
    drawn.figure.canvas.draw()


def test_values_are_in_nats_and_say_so(lml):
    named = ("bound_curve", "comparison", "gap_decomposition", "gap_histogram", "k_against_gap", "rate_distortion")
    for name in (*named, "sandwich"):
        drawn = FIGURES[name](lml, ax())
        assert "nats" in drawn.get_xlabel() + drawn.get_ylabel() + drawn.get_title(), name


def test_a_band_is_drawn_and_explained_only_if_it_can_be_seen():
    """Thinner than the line, it would be a word of the legend without a picture."""
    curve = torch.tensor([-10.0, -8.0, -7.0]).unsqueeze(1).expand(3, 100)
    for spread, seen in ((1.0, True), (0.01, False)):
        noise = spread * torch.linspace(-1, 1, 100).expand(3, 100) * torch.tensor([[1.0], [0.5], [0.0]])
        ax = plots.bound_curve([1, 10, 100], curve + noise)
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert len(ax.collections) == seen
        assert any("standard errors" in label for label in labels) == seen


def test_bound_curve_against_annealing(lml):
    drawn = plots.bound_curve(lml.curve_particles, lml.curve, annealed=lml.log_prob + 0.5, ax=ax())
    lines = {line.get_label(): line.get_ydata() for line in drawn.get_lines()}
    assert np.allclose(lines["importance-weighted bound"], lml.curve.mean(1))
    level = (lml.log_prob + 0.5).mean().item()
    assert np.allclose(lines[f"annealed importance sampling: {level:.2f}"], level)
    with pytest.raises(ValueError, match="same 30 data"):
        plots.bound_curve(lml.curve_particles, lml.curve, annealed=torch.zeros(3))


def test_rate_distortion_draws_means_and_the_line_below(lml):
    curve = curve_of(lml)
    upper = -(curve.rate[-1] + curve.distortion[-1]) + 0.5
    rest = {"lower_stderr": upper, "upper_stderr": upper, "acceptance": upper, "data": {}, "latents": {}}
    bounds = pv.BidirectionalMonteCarlo(8, lower=upper, upper=upper, **rest)
    drawn = plots.rate_distortion(curve, bounds=bounds, ax=ax())
    line, below = (line for line in drawn.get_lines() if line.get_linestyle() == "-")
    assert np.allclose(line.get_xdata(), curve.mean_distortion[1:])  # without the prior's infinite distortion
    assert np.allclose(line.get_ydata(), curve.mean_rate[1:])
    assert np.allclose(below.get_ydata(), [curve.mean_rate[-1] - 0.5, 0])
    assert line.get_label() == f"log p(x) ≥ {curve.log_prob.mean():.2f}"
    with pytest.raises(ValueError, match=r"found curves \['a'\] and bounds \['b'\]"):
        plots.rate_distortion({"a": curve}, bounds={"b": bounds})


def test_sandwich_counts_what_crosses():
    lower = torch.tensor([-3.0, -2.0, -1.0, 0.0])
    drawn = plots.sandwich(lower, lower + torch.tensor([0.5, -0.1, 0.3, 0.1]), ax=ax())
    labels = [text.get_text() for text in drawn.get_legend().get_texts()]
    assert "crossed: 1 of 4" in labels
    assert any("mean width: 0.200" in label for label in labels)
    with pytest.raises(ValueError, match="both bounds"):
        plots.sandwich(lower, lower[:2])


def test_gaps_that_are_not_finite_are_counted():
    gap = torch.tensor([1.0, 2.0, torch.inf, torch.nan])
    assert "2 data (2 not finite)" in plots.gap_histogram(gap, ax=ax()).get_title()
    with pytest.raises(ValueError, match="none of the 1 gaps"):
        plots.gap_histogram([torch.inf])
    k = torch.tensor([0.9, 0.2, 0.3, torch.inf])
    drawn = plots.k_against_gap(k, gap, limit=0.7, ax=ax())
    assert "(2 left out)" in drawn.get_title()
    assert any("50% of the data are above" in text.get_text() for text in drawn.get_legend().get_texts())
    with pytest.raises(ValueError, match="must both be"):
        plots.k_against_gap(k, gap[:2])


def test_stacked_bars_add_up():
    parts = {"a": (torch.full((9,), 1.5), torch.full((9,), 0.5)), "b": (torch.full((9,), 1.0), torch.full((9,), -0.25))}
    drawn = plots.gap_decomposition(parts, ax=ax())
    family, encoder = drawn.containers[0], drawn.containers[1]
    assert [bar.get_height() for bar in family] == pytest.approx([1.5, 1.0])
    assert [bar.get_y() for bar in encoder] == pytest.approx([1.5, 0.0])
    assert [bar.get_height() for bar in encoder] == pytest.approx([0.5, -0.25])
    assert all(bar.get_hatch() for bar in encoder)  # apart in grey print


def test_worst_images_come_first():
    gap = torch.tensor([1.0, 7.0, torch.nan, 3.0])
    drawn = plots.worst_images(torch.rand(4, 1, 5, 5), gap, num_images=2, ax=ax())
    assert [label.get_text() for label in drawn.get_xticklabels()] == ["7.0", "3.0"]
    with pytest.raises(ValueError, match="a gap for each image"):
        plots.worst_images(torch.rand(3, 1, 5, 5), gap)


def test_rank_histograms_mark_what_is_not_uniform():
    flat, narrow = torch.full((10,), 50), torch.tensor([200] + [33] * 8 + [36])
    axes = plots.rank_histograms(torch.stack([flat, narrow]), names=["flat", "narrow"])
    assert axes[0].get_title() == "flat\n0 of 10 outside"
    assert len(axes) == 2
    hatched = [bool(bar.get_hatch()) for bar in axes[1].containers[0]]
    assert hatched[0]
    given = [ax(), ax()]
    assert plots.rank_histograms(torch.stack([flat, narrow]), axes=given) is given
    with pytest.raises(ValueError, match=r"counts \(D, B\)"):
        plots.rank_histograms(flat)


def test_comparison_has_the_best_on_top(lml):
    worse = pv.LogMarginalLikelihood.from_annealed(torch.randn(30, 30) - 99, torch.full((30,), 0.6))
    table = pv.compare({"worse": worse, "better": lml})
    drawn = plots.comparison(table.rows, ax=ax())
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["better", "worse"]
    bottom, top = drawn.get_ylim()
    assert bottom > top
    assert "relative to 'better'" in drawn.get_xlabel()


def history(epochs):
    rows = range(1, epochs + 1)
    row = {"reconstruction": -80.0, "kl": 20.0, "validation_reconstruction": -81.0, "validation_kl": 20.0}
    return [{"epoch": n, "elbo": -100 - 900 / n**3, "validation_elbo": -101 - 900 / n**3, **row} for n in rows]


def test_training_says_what_it_cuts_off():
    axes = plots.training(history(20))
    bottom, _ = axes[0].get_ylim()
    below = sum(row["validation_elbo"] < bottom for row in history(20))
    assert 0 < below < 5
    which = "the first epoch lies" if below == 1 else f"the first {below} epochs lie"
    assert axes[0].get_xlabel() == f"epoch\n({which} below the axis)"
    assert axes[2].get_xlabel() == "epoch"
    rows = history(20)
    rows[0], rows[9] = rows[9] | {"epoch": 1}, rows[0] | {"epoch": 10}  # a late epoch is the lowest
    assert (
        plots.training(rows)[0].get_xlabel()
        == f"epoch\n({below} of 20 epochs {'lies' if below == 1 else 'lie'} below the axis)"
    )
    assert [ax.get_xlabel() for ax in plots.training(history(3))] == ["epoch"] * 3  # few are all shown


def test_report_shows_what_it_is_given(lml):
    smallest = plots.report(lml)
    assert len(smallest.axes) == 4
    words = smallest.get_suptitle()
    assert f"log p(x) {lml.mean:.2f} ± {lml.mean_stderr:.2f} over 30 data" in words
    assert f"gap >= {lml.gap.mean():.2f}" in words
    gaps = pv.inference_gaps(*digits_pair(), torch.ones(5, 6), num_particles=30, max_num_steps=1)
    images = torch.rand(60, 1, 5, 5)
    whole = plots.report(
        lml, history=history(9), gaps=gaps, samples=images, originals=images, means=images, title="a pair"
    )
    assert len(whole.axes) == 10
    assert whole.get_suptitle().startswith("a pair\n")
    for ax in whole.axes[:8]:
        assert "nats" in ax.get_xlabel() + ax.get_ylabel() + ax.get_title(), ax.get_title()
    assert [image.get_array().shape[:2] for ax in whole.axes[8:] for image in ax.get_images()] == [(24, 72), (24, 72)]
    whole.canvas.draw()


def digits_pair():
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 6), 6))
    return model, pv.guides.MeanFieldNormal(pv.nets.MLP(6, [4]), 2)


def test_report_of_few_particles_and_of_what_it_cannot_show(lml):
    few = plots.report(pv.LogMarginalLikelihood.from_log_weights(torch.randn(5, 30)))
    assert len(few.axes) == 3
    assert "unknown below 25" in few.get_suptitle()
    one = plots.report(pv.LogMarginalLikelihood.from_log_weights(torch.randn(1, 30)))
    assert "gap is unknown" in one.get_suptitle()
    one.canvas.draw()
    annealed = pv.LogMarginalLikelihood.from_annealed(torch.randn(30, 30), torch.full((30,), 0.6))
    with pytest.raises(ValueError, match=r"annealed weights have none.*bound_curve"):
        plots.report(annealed)
    with pytest.raises(ValueError, match="come together"):
        plots.report(lml, means=torch.rand(4, 1, 5, 5))


def test_reconstructions_show_every_image():
    """10 images in rows of 8 are two rows, the second with empty places."""
    greys = np.arange(1, 11) / 16
    originals = torch.tensor(greys, dtype=torch.float32).reshape(10, 1, 1, 1).expand(10, 1, 4, 4)
    axes = plots.reconstructions(originals, originals / 16, columns=8)
    shown = set(np.asarray(axes.images[0].get_array()).ravel().tolist())
    assert {*greys, *(greys / 16)} <= shown
