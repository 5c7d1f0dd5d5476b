"""Steps that are not finite, passed over: nothing is changed by them, they are counted, and one too many stops the run."""

import csv
import io
import logging

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from shared.not_finite import (
    OPTIONS,
    infinite_features,
    look_rarely,
    marked_data,
    nan_in_features,
    nan_in_gradient,
    pair_with,
)
from shared.runs import binary, make, parameters, same
from torch import nn

import pyrovae as pv
from pyrovae.compiled.record import Recording
from pyrovae.training.checkpoint_file import read
from pyrovae.training.non_finite import NotFiniteError
from pyrovae.training.optimization import OneOptimizer
from pyrovae.training.steps import Steps

WAYS = [("eager", 1), ("eager", 50), ("recorded", 1), ("recorded", 50)]


@pytest.fixture
def way(request, monkeypatch):
    """Options of `fit`; with 50 the guard is read at the epoch's end, as on a GPU."""
    kind, look_every = request.param
    monkeypatch.setattr(Recording, "compiler", staticmethod(lambda graph: graph))
    look_rarely(monkeypatch, look_every)
    return {**OPTIONS, "compile": kind == "recorded"}


def without_marked(x):
    return x[x.flatten(1)[:, 0] != 7.0]


@pytest.mark.parametrize("way", WAYS, indirect=True, ids=str)
@pytest.mark.parametrize("spoil", [nan_in_features, infinite_features, nan_in_gradient])
def test_a_skipped_step_is_counted_and_changes_nothing(spoil, way, monkeypatch, caplog):
    """Image 17 spoils a step of the second epoch and one of the third: the parameters do not move there, the others do."""
    model, guide = pair_with(spoil, 3)
    seen = []
    original = OneOptimizer.__call__

    def step(self, *arguments, **keywords):
        before = parameters(model, guide)
        original(self, *arguments, **keywords)
        seen.append((self.guard.was_made.item(), same(before, parameters(model, guide))))

    monkeypatch.setattr(OneOptimizer, "__call__", step)
    with caplog.at_level(logging.WARNING, "pyrovae"):
        result = pv.fit(model, guide, marked_data(), epochs=3, schedule=None, max_skipped_steps=2, **way)
    assert result.num_skipped_steps == 2
    assert [row["skipped_steps"] for row in result.history] == [0, 1, 1]
    assert "9 steps (2 skipped)" in repr(result)
    made, unchanged = zip(*seen, strict=True)
    assert [not flag for flag in made] == list(unchanged)
    assert sum(unchanged) == 2
    for row in result.history:
        assert all(torch.tensor(row[name]).isfinite() for name in ("objective", "elbo", "reconstruction", "kl"))
    for parameter in parameters(model, guide):
        assert parameter.isfinite().all()
    assert [f"{number} of at most 2" in record.message for number, record in enumerate(caplog.records, 1)] == [True] * 2
    for epoch, record in enumerate(caplog.records, 2):
        assert f"epoch {epoch}, step " in record.message
        if way["compile"] is False or "finite numbers" not in record.message:
            assert "for train[17] (1 of the batch)" in record.message


@pytest.mark.parametrize("way", WAYS, indirect=True, ids=str)
def test_one_more_stops_the_run_and_a_higher_limit_lets_it_go_on(way, tmp_path):
    path = tmp_path / "run.pt"
    model, guide = pair_with(nan_in_features, 3)
    match = (
        r"not finite at epoch 4, step \d: .*for train\[17\].*; 2 such steps were skipped before \(max_skipped_steps\)"
    )
    with pytest.raises(pv.training.non_finite.NotFiniteError, match=match):
        pv.fit(model, guide, marked_data(), epochs=5, max_skipped_steps=2, checkpoint=path, **way)
    assert [row["skipped_steps"] for row in read(path)["training"]["state"]["history"]] == [0, 1, 1]
    with pytest.raises(pv.training.non_finite.NotFiniteError, match="at epoch 5"):  # the count goes on where it was
        pv.fit(model, guide, marked_data(), epochs=5, max_skipped_steps=3, checkpoint=path, resume=True, **way)
    result = pv.fit(model, guide, marked_data(), epochs=5, max_skipped_steps=4, checkpoint=path, resume=True, **way)
    assert result.num_skipped_steps == 4
    assert [row["skipped_steps"] for row in result.history] == [0, 1, 1, 1, 1]
    again = pv.fit(
        model, guide, marked_data(), epochs=5, checkpoint=path, resume=True, **way
    )  # of a run that is complete
    assert again.num_skipped_steps == 4


@pytest.mark.parametrize("way", WAYS, indirect=True, ids=str)
def test_resumed_bit_for_bit(way, tmp_path, monkeypatch):
    """Stopped after the epoch of the first skipped step; the count, too, goes on as if it had not been."""

    def run(seed, **more):
        pair = pair_with(nan_in_gradient, 3)
        pyro.set_rng_seed(seed)
        return pair, pv.fit(*pair, marked_data(), epochs=4, max_skipped_steps=3, **way, **more)

    expected, whole = run(3)
    path = tmp_path / "run.pt"
    original = Steps.epoch

    def epoch(self, number, *arguments):
        if number == 3:
            raise KeyboardInterrupt
        return original(self, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "epoch", epoch)
        with pytest.raises(KeyboardInterrupt):
            run(3, checkpoint=path)
    found, resumed = run(99, checkpoint=path, resume=True)
    assert same(parameters(*found), parameters(*expected))
    assert resumed.num_skipped_steps == whole.num_skipped_steps == 3
    assert [row["elbo"] for row in resumed.history] == [row["elbo"] for row in whole.history]


@pytest.mark.parametrize("way", WAYS, indirect=True, ids=str)
def test_nothing_changes_where_nothing_is_skipped(way):
    results = []
    for max_skipped in (0, 5):
        pair = make()
        pyro.set_rng_seed(1)
        history = pv.fit(*pair, binary(), epochs=3, max_skipped_steps=max_skipped, validation=binary(9), **way).history
        results.append((parameters(*pair), [(row["elbo"], row["validation_elbo"]) for row in history]))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_running_means_do_not_see_a_skipped_step():
    """A NaN among the data would stay in the means of a BatchNorm for ever."""

    def train(x, **options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8))
        model, guide = make()[0], pv.guides.MeanFieldNormal(net, 2, num_features=8)
        pyro.set_rng_seed(2)
        result = pv.fit(model, guide, x, epochs=2, batch_size=10, progress=False, compile=False, **options)
        return net[2], result

    x = binary(30)
    x[4, 0, 0, 0] = torch.nan
    for check in (True, False):
        with pv.common.arguments.without_checks() if not check else pyro.validation_enabled(True):
            norm, result = train(x, max_skipped_steps=2)
        assert result.num_skipped_steps == 2
        assert norm.running_mean.isfinite().all()
        assert norm.running_var.isfinite().all()
        assert norm.num_batches_tracked == 4, "of six batches"


def test_an_infinite_loss_with_finite_gradients_is_not_taken():
    """The gradient of log 0 by a mask is 0: only the loss tells, and SVI would make the step."""

    class Lost(pyro.infer.Trace_ELBO):
        calls = 0

        def loss_and_grads(self, *arguments):
            Lost.calls += 1
            value = super().loss_and_grads(*arguments)
            return float("inf") if Lost.calls == 3 else value

    for limit in (0, 1):
        Lost.calls = 0
        model, guide = make()
        moved, original = [], OneOptimizer.__call__

        def step(self, *arguments, pair=(model, guide), moved=moved, original=original):
            before = parameters(*pair)
            original(self, *arguments)
            moved.append(not same(before, parameters(*pair)))

        OneOptimizer.__call__ = step
        try:
            if limit:
                result = pv.fit(model, guide, binary(), epochs=1, loss=Lost(), max_skipped_steps=limit, **OPTIONS)
                assert (result.num_skipped_steps, moved) == (1, [True, True, False, True])
            else:
                with pytest.raises(pv.training.non_finite.NotFiniteError, match="epoch 1, step 3"):
                    pv.fit(model, guide, binary(), epochs=1, loss=Lost(), schedule=None, **OPTIONS)
                assert moved == [True, True, False]
        finally:
            OneOptimizer.__call__ = original


@pytest.mark.parametrize(("num_data", "epochs", "at"), [(10, 1, (1, 1)), (10, 5, (2, 1)), (30, 5, (1, 3))])
def test_a_run_without_a_step_is_no_training(num_data, epochs, at):
    """One bad step may be an accident: the next epoch is waited for."""
    x = binary(num_data)
    x[:, 0, 0, 0] = torch.nan
    pair = make()
    before = parameters(*pair)
    match = "no step of this run was made, and nothing was trained.*the data themselves are not finite.*replace their values that are not"
    with pytest.raises(NotFiniteError, match=match) as caught:
        pv.fit(*pair, x, epochs=epochs, max_skipped_steps=1000, **OPTIONS)
    assert (caught.value.epoch, caught.value.step) == at
    assert same(before, parameters(*pair))


def test_an_epoch_without_a_step_has_no_numbers():
    class Lost(Trace_ELBO):
        calls = 0

        def loss_and_grads(self, *arguments):
            Lost.calls += 1
            value = super().loss_and_grads(*arguments)
            return float("inf") if Lost.calls == 1 else value

    x = binary(10)
    result = pv.fit(*make(), x, epochs=3, max_skipped_steps=2, loss=Lost(), **OPTIONS)
    assert str(result.history[0]["objective"]) + str(result.history[0]["elbo"]) == "nannan"
    assert [row["skipped_steps"] for row in result.history] == [1, 0, 0]
    file = io.StringIO()
    writer = csv.DictWriter(file, result.history[0])
    writer.writerows(result.history)
    x[2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="0 or 1, found nan"):  # the first step looks at the data
        pv.log_marginal_likelihood(*make(), x, num_particles=2)


def test_errors_that_are_not_about_numbers_come_as_they_are():
    model, guide = make()
    with pytest.raises(ValueError, match="found 0.5: binarise"):
        pv.fit(model, guide, 0.5 * binary(), epochs=1, max_skipped_steps=100, **OPTIONS)
    for wrong, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="max_skipped_steps must be"):
            pv.fit(model, guide, binary(), epochs=1, max_skipped_steps=wrong, **OPTIONS)


def test_in_a_hand_written_svi():
    """The optimizer alone: a gradient that is not finite is passed over, and after one too many nothing moves."""
    model, guide = pair_with(nan_in_gradient, 0)
    x = marked_data()
    optimizer = OneOptimizer([*model.parameters(), *guide.parameters()], 0.01, max_skipped=2)
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    moved = []
    for rows in (x[:10], x[10:20], x[20:], x[10:20], x[:10], x[10:20], x[:10]):
        before = parameters(model, guide)
        svi.step(rows)
        moved.append(not same(before, parameters(model, guide)))
    assert moved == [True, False, True, False, True, False, False]
    assert (optimizer.guard.num_skipped.item(), optimizer.guard.is_running.item()) == (3, False)
    assert optimizer.inner.state[guide.head.weight]["step"] == 3
    optimizer.guard.restart()
    svi.step(x[:10])
    assert optimizer.inner.state[guide.head.weight]["step"] == 4


@pytest.mark.slow
def test_compiled(caplog):
    result = pv.fit(
        *pair_with(nan_in_features, 3), marked_data(), epochs=3, compile=True, max_skipped_steps=2, **OPTIONS
    )
    assert [row["skipped_steps"] for row in result.history] == [0, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu(compile):
    pair = pair_with(nan_in_gradient, 3)
    result = pv.fit(*pair, marked_data(), epochs=4, compile=compile, max_skipped_steps=3, **OPTIONS)
    assert [row["skipped_steps"] for row in result.history] == [0, 1, 1, 1]
    assert all(parameter.isfinite().all() for parameter in parameters(*pair))
