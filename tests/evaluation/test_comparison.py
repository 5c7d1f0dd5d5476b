"""Comparisons: paired differences against known ones, and what the notes say."""

import math
from itertools import permutations

import pytest
import torch
from conftest import within

import pyrovae as pv
from pyrovae import LogMarginalLikelihood


def result(log_prob, spread=0.5, num_particles=200, gap=0.0):
    """Weights whose mean is exp(log_prob) in expectation: log-normal, shifted."""
    noise = torch.randn(num_particles, len(log_prob)).double()
    return LogMarginalLikelihood.from_log_weights(log_prob + spread * noise - spread**2 / 2)


def test_difference_of_known_models(double):
    truth = 10 * torch.randn(2000)
    shift = 0.3 + 0.1 * torch.randn(2000)
    table = pv.compare({"worse": result(truth), "better": result(truth + shift)})
    best, other = table.rows
    assert (best.name, best.rank, best.difference) == ("better", 0, 0.0)
    within(other.difference, -shift.mean().item(), math.sqrt(2 * (math.exp(0.25) - 1) / 200 / 2000))
    # Paired: the spread of the data themselves (10 nats) is not in it.
    assert other.difference_stderr == pytest.approx(
        math.sqrt((0.1**2 + 2 * (math.exp(0.25) - 1) / 200) / 2000), rel=0.15
    )
    assert other.stderr == pytest.approx(10 / math.sqrt(2000), rel=0.1)
    assert list(table.to_dataframe().index) == ["better", "worse"]
    assert "better" in repr(table)


def test_notes_say_that_the_winners_differ(double):
    truth = torch.randn(500)
    loose, tight = result(truth + 0.2, spread=1.0), result(truth, spread=0.1)
    table = pv.compare({"loose": loose, "tight": tight})
    assert table.rows[0].name == "loose"
    assert any("best ELBO is that of 'tight'" in note for note in table.notes)
    assert any("training seed" in note for note in table.notes)


def test_results_of_different_data_are_noted(double):
    """Of other data, or of the same in another order: log p(x) is not correlated."""
    truth = 3 * torch.randn(200)
    same, other = result(truth + 0.5 * torch.randn(200)), truth[torch.randperm(200)]
    for second, is_noted in ((same, False), (result(other), True), (result(truth)[:9], None)):
        first = result(truth) if is_noted is not None else result(truth)[:9]
        notes = [note for note in pv.compare({"a": first, "b": second}).notes if "hardly correlated" in note]
        assert bool(notes) == bool(is_noted)


def test_guides_of_one_model_are_ranked_by_their_elbo(double):
    truth = torch.randn(500)
    results = {"loose": result(truth + 0.2, spread=1.0), "tight": result(truth, spread=0.1)}
    table = pv.compare(results, by="elbo")
    assert [row.name for row in table.rows] == ["tight", "loose"]
    within(table.rows[1].elbo_difference, 0.2 - 0.5 + 0.005, math.sqrt((1.0 + 0.01) / 200 / 500))
    assert table.rows[1].difference > 0  # of log p(x), against the same pair
    assert any("best log p(x) that of 'loose'" in note for note in table.notes)
    with pytest.raises(ValueError, match="'log_prob' or 'elbo', found 'gap'"):
        pv.compare(results, by="gap")


def test_a_difference_smaller_than_the_bias_is_noted(double):
    truth = torch.randn(3000)
    table = pv.compare({"a": result(truth, spread=1.5, num_particles=40), "b": result(truth - 0.1, spread=0.1)})
    assert any("bias estimates of" in note and "'a'" in note and "'b'" in note for note in table.notes)


def test_bias_is_noted_for_the_rows_it_concerns(double):
    """Of three, one far below: its difference is larger than any bias; the other two are too close to call."""
    truth = torch.randn(3000)
    table = pv.compare(
        {
            "a": result(truth, spread=1.5, num_particles=40),
            "b": result(truth - 0.1, spread=0.1),
            "c": result(truth - 9, spread=0.1),
        }
    )
    notes = [note for note in table.notes if "bias" in note]
    assert len(notes) == 1
    assert "'a'" in notes[0]
    assert "'b'" in notes[0]


def test_an_unknown_bias_is_noted(double):
    table = pv.compare({"one": result(torch.zeros(50), num_particles=1), "many": result(torch.ones(50))})
    assert any("bias of 'one' is unknown" in note for note in table.notes)
    assert not any("'many'" in note and "bias" in note for note in table.notes)
    assert math.isnan(next(row for row in table.rows if row.name == "one").gap)


def test_a_mean_that_is_nan_is_ranked_last(double):
    """It must not scramble the order of the others, wherever it stands; nor does -inf."""
    truth = torch.randn(50)
    broken = result(truth)
    broken.log_prob[3] = torch.nan
    impossible = result(truth)
    impossible.log_prob[3] = -torch.inf
    good = {"c": result(truth), "a": result(truth + 2), "b": result(truth + 1)}
    for order in permutations(["broken", "a", "b", "c", "impossible"]):
        table = pv.compare({name: {**good, "broken": broken, "impossible": impossible}[name] for name in order})
        assert [row.name for row in table.rows] == ["a", "b", "c", "impossible", "broken"]
    assert any("'broken' is NaN: it is ranked last" in note for note in table.notes)
    assert not any("'impossible' is NaN" in note for note in table.notes)
    assert table.rows[1].difference == pytest.approx(-1, abs=0.1)
    assert "broken" in repr(table)


def test_annealed_results_have_no_elbo(double):
    weights = torch.randn(30, 8)
    annealed = LogMarginalLikelihood.from_annealed(weights, torch.full((8,), 0.6))
    table = pv.compare({"annealed": annealed, "sampled": LogMarginalLikelihood.from_log_weights(weights - 1)})
    assert table.rows[0].name == "annealed"
    assert math.isnan(table.rows[0].elbo)
    assert not any("ELBO" in note for note in table.notes)


def test_what_cannot_be_compared_is_refused(double):
    few, many = result(torch.zeros(3)), result(torch.zeros(4))
    with pytest.raises(ValueError, match="different numbers of data"):
        pv.compare({"few": few, "many": many})
    with pytest.raises(ValueError, match="two results or more"):
        pv.compare({"few": few})
    with pytest.raises(TypeError, match="log_marginal_likelihood gives"):
        pv.compare({"few": few, "other": torch.zeros(3)})


@pytest.mark.parametrize("kind", ["list", "tuple", "result", "None"])
def test_results_come_under_their_names(kind):
    one = result(torch.zeros(4))
    given = {"list": [one, one], "tuple": (one, one), "result": one, "None": None}[kind]
    with pytest.raises(TypeError, match=r"takes the results under their names, \{'vamp': result.*; found \w+"):
        pv.compare(given)


def test_names_are_any_keys():
    table = pv.compare({1: result(torch.zeros(4)), 2: result(torch.ones(4))})
    assert [row.name for row in table.rows] == ["2", "1"]
    assert "log p(x)" in repr(table)


@pytest.mark.parametrize("other", [1.0, torch.zeros(4), "vamp", [result(torch.zeros(4))]])
def test_what_is_no_result_is_named(other):
    with pytest.raises(TypeError, match="'b' is a .*: pass what log_marginal_likelihood gives"):
        pv.compare({"a": result(torch.zeros(4)), "b": other})
    with pytest.raises(ValueError, match=r"different numbers of data, \{'a': 4, 'b': 5\}"):
        pv.compare({"a": result(torch.zeros(4)), "b": result(torch.zeros(5))})


def test_the_frame_is_what_arviz_gives(double):
    """The index holds the names, best first; the columns are numbers, the fields of a row."""
    truth = torch.randn(60)
    table = pv.compare({"worse": result(truth), 3: result(truth + 1), "middle": result(truth + 0.5)})
    frame = table.to_dataframe()
    assert list(frame.index) == ["3", "middle", "worse"]
    assert frame.index.name == "name"
    assert list(frame["rank"]) == [0, 1, 2]
    for row in table.rows:
        for column in frame.columns:
            assert frame.loc[row.name, column] == getattr(row, column)
    assert set(frame.columns) == set(vars(table.rows[0])) - {"name"}
    assert frame.dtypes.map(lambda kind: kind.kind in "if").all()
    assert len(table) == len(frame) == 3


def test_print_shows_each_number_beside_its_error(double):
    truth = torch.randn(60)
    one = LogMarginalLikelihood.from_log_weights((truth - 1).unsqueeze(0))
    table = pv.compare({"a pair of a long name": result(truth), "one <b>": one})
    lines = repr(table).split("\n")
    best, other = table.rows
    assert lines[0].startswith("2 model/guide pairs on 60 data; nats per datum")
    assert lines[1].split() == ["log", "p(x)", "difference", "bias", "ELBO", "ELBO", "difference", "gap", "bad", "k"]
    assert lines[2].startswith("a pair of a long name")
    for number in (f"{best.log_prob:.2f} ± {best.stderr:.2f}", "best", f">= {best.bias_estimate:.2f}"):
        assert number in lines[2]
    assert f"{other.difference:.2f} ± {other.difference_stderr:.2f}" in lines[3]
    assert lines[3].split()[-2:] == ["unknown", "unknown"]  # gap and k
    assert "nan" not in repr(table)
    assert "+-" not in repr(table)
    shown = table._repr_html_()
    assert "<table" in shown
    assert "one &lt;b&gt;" in shown
    assert "training seed" in shown


def test_one_datum_has_no_error_to_print():
    single = LogMarginalLikelihood.from_log_weights(torch.randn(30, 1))
    text = repr(pv.compare({"a": single, "b": LogMarginalLikelihood.from_log_weights(torch.randn(30, 1))}))
    assert "±" not in text
    assert "nan" not in text


def test_two_names_that_print_alike_are_both_shown():
    table = pv.compare({1: result(torch.zeros(4)), "1": result(torch.ones(4))})
    assert sum(line.startswith("1 ") for line in repr(table).split("\n")) == 2
