"""Figures take the library's results or arrays, draw the same from both, and refuse anything else by its name."""

import types

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import pyrovae as pv
from pyrovae import plots


def lml(num_data=40, num_particles=30):
    noise = 1.5 * torch.randn(num_particles, num_data).double()
    return pv.LogMarginalLikelihood.from_log_weights(noise - 90 + 5 * torch.randn(num_data))


def annealed(num_data=40):
    return pv.LogMarginalLikelihood.from_annealed(torch.randn(30, num_data) - 88, torch.full((num_data,), 0.6))


def both_sides(num_data=40):
    lower = torch.randn(num_data).double()
    upper = lower + 0.1 + 0.2 * torch.randn(num_data).double()
    half = torch.full((num_data,), 0.5)
    return pv.BidirectionalMonteCarlo(2, lower, half, upper, half, half, {}, {})


def gaps(num_data=40):
    parts = 1 + torch.rand(11, num_data).double()
    return pv.InferenceGaps(100, *parts, torch.full((num_data,), 100), torch.ones(num_data, dtype=torch.bool))


def ranks():
    return pv.Calibration(99, ["z[0]", "z[1]"], torch.randint(0, 100, (200, 2)))


def fitted(epochs=12):
    parts = {"elbo": -3.0, "reconstruction": -2.0, "kl": 1.0}
    rows = [{"epoch": n, **parts, **{f"validation_{k}": v - 1 / n for k, v in parts.items()}} for n in range(1, epochs)]
    return pv.FitResult(rows, best_epoch=len(rows), num_steps=10, seconds=1.0, device=torch.device("cpu"))


def drawn(axes):
    """Everything that stands in the axes, as numbers and text."""
    found = []
    for ax in np.atleast_1d(np.asarray(axes, dtype=object)):
        found += [line.get_xydata() for line in ax.get_lines()]
        found += [np.asarray(points.get_offsets()) for points in ax.collections]
        found += [np.array([p.get_x(), p.get_width(), p.get_height()]) for p in ax.patches if hasattr(p, "get_x")]
        found += [np.asarray(image.get_array()) for image in ax.get_images()]
        found += [ax.get_title(), ax.get_xlabel(), *(label.get_text() for label in ax.get_yticklabels())]
        legend = ax.get_legend()
        found += [text.get_text() for text in legend.get_texts()] if legend else []
    return found


# name -> a function that returns the arguments with results and those with arrays
FORMS = {
    "tightness": lambda: ((r := lml(),), (r.elbo, r.log_prob, r.curve_particles, r.curve)),
    "bound_curve": lambda: ((r := lml(),), (r.curve_particles, r.curve)),
    "sandwich": lambda: ((r := both_sides(),), (r.lower, r.upper)),
    "training": lambda: ((r := fitted(),), (r.history,)),
    "comparison": lambda: ((r := pv.compare({"a": lml(), "b": lml()}),), (r.rows,)),
    "gap_histogram": lambda: ((r := lml(),), (r.gap,)),
    "gap_histogram of the causes": lambda: ((r := gaps(),), (r.total,)),
    "gap_decomposition": lambda: (({"a": (r := gaps())},), ({"a": (r.approximation, r.amortization)},)),
    "rank_histograms": lambda: ((r := ranks(),), (r.counts.numpy(), r.names)),
    "roc": lambda: (
        ({"a": pv.detection.roc(r := lml(), s := lml())},),
        ({"a": (r.log_prob.tolist(), s.log_prob.tolist())},),
    ),
    "worst_images": lambda: ((x := torch.rand(40, 1, 5, 5), r := lml()), (x.numpy(), r.gap.numpy())),
    "worst_images of the causes": lambda: ((x := torch.rand(40, 1, 5, 5), r := gaps()), (x, r.total.tolist())),
}


def draw(name, *args, **options):
    draws = getattr(plots, name.split()[0])
    if name == "rank_histograms" and len(args) == 2:
        return draws(args[0], names=args[1], **options)
    return draws(*args, **options)


@pytest.mark.parametrize("name", FORMS)
def test_results_and_arrays_draw_the_same(name):
    result, arrays = FORMS[name]()
    first, second = drawn(draw(name, *result)), drawn(draw(name, *arrays))
    assert len(first) == len(second) > 3
    for one, other in zip(first, second, strict=True):
        if isinstance(one, str):
            assert one == other
        else:
            np.testing.assert_array_equal(one, other)


def test_k_takes_its_limit_from_the_result():
    result = lml()
    assert result.pareto_k_limit < 0.6
    given = drawn(plots.k_against_gap(result.pareto_k, result.gap, limit=result.pareto_k_limit))
    for one, other in zip(drawn(plots.k_against_gap(result)), given, strict=True):
        np.testing.assert_array_equal(one, other)
    lines = plots.k_against_gap(result.pareto_k, result.gap).get_lines()
    assert lines[0].get_ydata()[0] == 0.7


def test_names_are_given_for_a_lone_result():
    bars = plots.gap_decomposition(gaps())
    assert [label.get_text() for label in bars.get_xticklabels()] == ["mean of 40 data"]
    curve = plots.roc(pv.detection.roc(lml(), lml()))
    assert "outside data: AUC" in curve.get_legend().get_texts()[0].get_text()
    table = plots.comparison({"a": lml(), "b": lml()})
    assert {label.get_text() for label in table.get_yticklabels()} == {"a", "b"}


def test_annealed_levels_are_results_or_arrays():
    result, level = lml(), annealed()
    first, second = (drawn(plots.bound_curve(result, annealed=given)) for given in (level, level.log_prob))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_tensors_of_any_kind_are_arrays():
    """Also those that ask for gradients, and those whose dtype NumPy lacks."""
    gap = torch.rand(9, requires_grad=True)
    assert plots.gap_histogram(gap).get_title() == "gap of 9 data"
    assert plots.gap_histogram(gap.bfloat16()).get_title() == "gap of 9 data"
    assert plots.image_grid(torch.rand(3, 1, 5, 5, requires_grad=True).bfloat16()) is not None


WRONG = {
    "tightness": [("text",), "tightness takes a result of log_marginal_likelihood, or elbo.*found str for elbo"],
    "tightness of too few": [(torch.zeros(3),), r"log_prob \(N,\) is missing"],
    "tightness of too much": [(lml(), torch.zeros(40)), "LogMarginalLikelihood and log_prob, which it holds already"],
    "bound_curve": [({"a": lml()},), "bound_curve takes a result.*found dict"],
    "sandwich": [(lml(), torch.zeros(40)), "sandwich takes a result of bidirectional_monte_carlo.*found LogMarg"],
    "training": [(lml(),), "the result of fit, or its history; found LogMarginalLikelihood"],
    "comparison": [(lml(),), "the result of compare, its rows, or results under their names; found LogMarg"],
    "comparison of others": [({"a": lml(), "b": "text"},), "'b' is a str"],
    "gap_histogram": [(both_sides(),), "gap_histogram takes a result.*found BidirectionalMonteCarlo"],
    "k_against_gap": [(gaps(), torch.zeros(40)), "k_against_gap takes a result.*found InferenceGaps"],
    "gap_decomposition": [(lml(),), "gap_decomposition takes a result of inference_gaps.*found LogMarginalLikelihood"],
    "gap_decomposition of others": [({"a": lml()},), "found LogMarginalLikelihood for 'a'"],
    "rank_histograms": [(ranks,), "rank_histograms takes a result.*found function"],
    "roc": [(torch.zeros(3),), "roc takes a result of detection.roc.*found Tensor"],
    "roc of others": [({"a": torch.zeros(3)},), "found Tensor for 'a'"],
    "image_grid": [("text",), "expected images.*found str"],
    "worst_images": [(torch.rand(40, 1, 5, 5), "text"), "worst_images takes images.*found str for gap"],
    "report": [(torch.zeros(3),), "report takes a result of log_marginal_likelihood, found Tensor"],
}


@pytest.mark.parametrize("name", WRONG)
def test_anything_else_is_refused_by_name(name):
    args, match = WRONG[name]
    number = len(plt.get_fignums())
    with pytest.raises(TypeError, match=match):
        draw(name, *args)
    assert len(plt.get_fignums()) == number  # no empty figure is left


EMPTY_OR_UNEQUAL = {
    "tightness": [(annealed(),), "has no ELBO, because annealed"],
    "tightness of unequal": [(torch.zeros(3), torch.zeros(4), [1], torch.zeros(1, 3)), "the same data"],
    "bound_curve": [([1, 2], torch.zeros(3, 4)), "2 numbers of particles for 3 rows"],
    "bound_curve of infinities": [([1], torch.full((1, 4), -torch.inf)), "none of the 4 data has a finite bound"],
    "bound_curve of annealing": [(annealed(),), "has no ELBO"],
    "sandwich": [(torch.zeros(2), torch.full((2,), torch.inf)), "none of the 2 data has two finite bounds"],
    "training": [([],), "found no rows"],
    "training of losses": [([{"epoch": 1, "elbo": -1.0}],), r"rows without \['reconstruction', 'kl'\]"],
    "comparison": [([],), "found none"],
    "gap_histogram": [(lml(num_particles=1),), "unknown with one particle: evaluate with num_particles"],
    "gap_histogram of tables": [(torch.zeros(2, 3),), r"found shape \(2, 3\) for gap \(N,\)"],
    "k_against_gap": [(annealed(),), "has no ELBO"],
    "k_against_gap of few": [(lml(num_particles=5),), "none of the 40 data has a known k"],
    "gap_decomposition": [({},), "found an empty one"],
    "gap_decomposition of unequal": [({"a": (torch.zeros(3), torch.zeros(4))},), r"\(3,\) and \(4,\) for 'a'"],
    "rank_histograms": [(torch.ones(2, 10), ["z"]), "names must be one for each of the 2 latent dimensions, found 1"],
    "roc": [({},), "found an empty one"],
    "manifold": [(torch.rand(4, 1, 5, 5),), r"\(rows, columns, 1 or 3, height, width\), found shape"],
    "worst_images": [(torch.rand(4, 1, 5, 5), torch.full((4,), torch.nan)), "all of the 4 gaps are NaN"],
}


@pytest.mark.parametrize("name", EMPTY_OR_UNEQUAL)
def test_what_cannot_be_drawn_says_why(name):
    args, match = EMPTY_OR_UNEQUAL[name]
    with pytest.raises(ValueError, match=match):
        draw(name, *args)


def test_a_report_takes_results():
    with pytest.raises(TypeError, match="gaps takes a result of inference_gaps, found Tensor"):
        plots.report(lml(), gaps=torch.zeros(3))
    with pytest.raises(TypeError, match="training takes the result of fit, or its history; found SimpleNamespace"):
        plots.report(lml(), history=types.SimpleNamespace())
    assert len(plots.report(lml(), history=fitted(), gaps=gaps()).axes) == 8
