"""`callback=`, `patience=`, more `epochs=` for a run that has ended, and the history as a frame."""

import random
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from shared.runs import Killed, binary, killed_after, make, parameters, same

import pyrovae as pv
from pyrovae import docs
from pyrovae.training.checkpoint_file import read
from pyrovae.training.fit import FitResult

OPTIONS = {"epochs": 6, "batch_size": 15, "learning_rate": 0.05, "compile": False, "progress": False}


def run(seed=0, **more):
    pair = make(seed)
    pyro.set_rng_seed(5)
    result = pv.fit(*pair, binary(), **{**OPTIONS, **more})
    return result, numbers(result), parameters(*pair)


def numbers(result):
    return [{k: v for k, v in row.items() if k not in ("seconds", "data_per_second")} for row in result.history]


def test_a_callback_sees_the_run():
    seen = []
    model, guide = make()
    result = pv.fit(model, guide, binary(), validation=binary(20, 2), callback=seen.append, **OPTIONS)
    assert [progress.epoch for progress in seen] == [1, 2, 3, 4, 5, 6]
    assert [progress.row for progress in seen] == result.history
    assert [list(progress.history) for progress in seen] == [result.history[:n] for n in range(1, 7)]
    assert all(progress.model is model and progress.guide is guide for progress in seen)
    assert all(isinstance(progress.optimizer, torch.optim.Adam) for progress in seen)
    bounds = [row["validation_bound"] for row in result.history]
    assert [progress.best_epoch for progress in seen] == [1 + int(np.argmax(bounds[:n])) for n in range(1, 7)]
    seen[0].row["elbo"] = seen[1].history[0]["elbo"] = 0.0
    assert result.history[0]["elbo"] != 0.0, "they are copies"
    with pytest.raises(AttributeError):
        seen[0].epoch = 3


def test_a_callback_that_draws_and_evaluates_changes_no_number():
    def evaluate(progress):
        progress.model.eval()
        torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
        pv.log_marginal_likelihood(progress.model, progress.guide, binary(5), num_particles=20, progress=False)

    _, expected, tensors = run()
    _, found, others = run(callback=evaluate)
    assert str(found) == str(expected)
    assert same(tensors, others)


def test_true_stops_the_run_which_is_then_finished(tmp_path):
    path = tmp_path / "run.pt"
    more = {"schedule": None, "checkpoint": path, "checkpoint_every": 1000.0}
    result, found, tensors = run(callback=lambda progress: progress.epoch == 3, **more)
    assert (len(result.history), result.best_epoch, result.num_steps) == (3, 3, 9)
    assert len(read(path)["training"]["state"]["history"]) == 3
    again, rows, others = run(9, resume=True, **more)
    assert str(rows) == str(found)
    assert same(tensors, others)
    assert again.num_steps == 9
    _, longer, others = run(9, resume=True, **more, epochs=7)
    _, expected, tensors = run(schedule=None, epochs=7)
    assert str(longer) == str(expected), "with more epochs, it continues"
    assert same(tensors, others)


@pytest.mark.parametrize("compile", [False, True])
def test_a_callback_changes_the_weight_of_the_kl(compile, tmp_path):
    """It holds from the next step on, eager or recorded, and in a resumed run, which starts with another objective."""

    def of(epochs, **more):
        loss = pv.objectives.AnalyticKL(kl_warmup_steps=5)

        def lower(progress):
            if progress.epoch == 2:
                loss.beta = 0.1

        _, rows, tensors = run(loss=loss, callback=lower, compile=compile, schedule=None, epochs=epochs, **more)
        assert loss.beta == (1.0 if epochs < 2 else 0.1)
        for row in rows:
            assert row["kl"] == pytest.approx(row["reconstruction"] - row["elbo"])
        return rows, tensors

    rows, tensors = of(6)
    kept = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 0.0}
    of(3, **kept)
    again, others = of(6, resume=True, **kept)
    assert str(again) == str(rows)
    assert same(tensors, others)
    before, expected = (
        run(loss=pv.objectives.AnalyticKL(beta=beta), compile=compile, schedule=None)[1] for beta in (1.0, 0.1)
    )
    assert rows[-1]["kl"] > 1.2 * before[-1]["kl"], "the weight is lower"
    assert expected[-1]["kl"] > 1.2 * before[-1]["kl"]


def test_a_weight_of_the_kl_that_cannot_be():
    loss = pv.objectives.MonteCarloKL(beta=0.5)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beta must be 0 or more"):
            loss.beta = wrong
    assert loss.beta == 0.5
    with pytest.raises(AttributeError, match="kl_warmup_steps"):
        loss.kl_warmup_steps = 100
    loss.load_state_dict({"num_steps": 3})  # as earlier versions stored it
    assert loss.state_dict() == {"num_steps": 3, "beta": 0.5}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_a_callback_keeps_the_epoch(error, tmp_path):
    path = tmp_path / "run.pt"

    def fail(progress):
        if progress.epoch == 4:
            for parameter in progress.model.parameters():
                parameter.data.fill_(float("nan"))
            raise error("in the callback")

    with pytest.raises(error, match="in the callback"):
        run(callback=fail, checkpoint=path, checkpoint_every=1000.0)
    assert len(read(path)["training"]["state"]["history"]) == 4
    _, expected, tensors = run()
    seen = []
    _, found, others = run(3, callback=seen.append, checkpoint=path, resume=True)
    assert [progress.epoch for progress in seen] == [5, 6]
    assert str(found) == str(expected)
    assert same(tensors, others)


def test_what_a_callback_changes_is_resumed(tmp_path, monkeypatch):
    """A rate that is lowered by hand is part of the state."""

    def lower(progress):
        if progress.epoch == 2:
            progress.optimizer.param_groups[0]["initial_lr"] *= 0.1

    result, expected, tensors = run(callback=lower, schedule=None)
    assert [row["learning_rate"] for row in result.history] == pytest.approx([0.05] * 2 + [0.005] * 4)
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(Killed):
            run(callback=lower, schedule=None, checkpoint=tmp_path / "run.pt", checkpoint_every=0)
    _, found, others = run(3, callback=lower, schedule=None, checkpoint=tmp_path / "run.pt", resume=True)
    assert str(found) == str(expected)
    assert same(tensors, others)


def overfitting(**more):
    """Few data and a high rate: the validation bound falls after its best epoch."""
    pair = make()
    pyro.set_rng_seed(5)
    options = {**OPTIONS, "learning_rate": 0.3, "epochs": 60, "schedule": None, "validation": binary(200, 2)}
    return pv.fit(*pair, binary(15), **{**options, **more}), parameters(*pair)


@pytest.mark.parametrize("patience", [1, 4])
def test_patience_counts_epochs_without_a_better_bound(patience, tmp_path, monkeypatch):
    full, _ = overfitting()
    bounds = [row["validation_bound"] for row in full.history]
    bests = [1 + int(np.argmax(bounds[:n])) for n in range(1, 61)]
    expected = next(n for n in range(1, 61) if n - bests[n - 1] >= patience)
    assert 2 < expected < 60
    result, tensors = overfitting(patience=patience)
    assert len(result.history) == expected
    assert result.best_epoch == bests[expected - 1]
    with monkeypatch.context() as patch:
        killed_after(patch, expected - 1)
        with pytest.raises(Killed):
            overfitting(patience=patience, checkpoint=tmp_path / "run.pt", checkpoint_every=0)
    more = {"checkpoint": tmp_path / "run.pt", "resume": True}
    for _ in range(2):  # goes on, then is finished
        resumed, others = overfitting(patience=patience, **more)
        assert str(numbers(resumed)) == str(numbers(result))
        assert same(tensors, others)
    longer, _ = overfitting(patience=patience + 3, **more)
    assert str(numbers(longer)) == str(numbers(full)[: len(longer.history)])
    assert len(longer.history) > expected


@pytest.mark.parametrize("validated", [False, True])
def test_more_epochs_continue_a_finished_run(validated, tmp_path):
    """Bit for bit one long run at a constant rate; otherwise with the schedule of the new total."""
    more = {"validation": binary(20, 2)} if validated else {}
    path = tmp_path / "run.pt"
    _, expected, tensors = run(schedule=None, epochs=9, **more)
    for epochs in (2, 6, 9):
        _, found, others = run(epochs - 2, schedule=None, epochs=epochs, checkpoint=path, resume=True, **more)
    assert str(found) == str(expected)
    assert same(tensors, others)
    with pytest.raises(ValueError, match="with epochs=9, and this one has epochs=8"):
        run(schedule=None, epochs=8, checkpoint=path, resume=True, **more)

    path = tmp_path / "scheduled.pt"
    shape = {"schedule": lambda done: 1 - done / 2, **more}
    run(epochs=2, checkpoint=path, **shape)
    result, _, _ = run(epochs=4, checkpoint=path, resume=True, **shape)
    rates = [0.05 * (1 - (epoch - 0.5 / 3) / total / 2) for epoch, total in ((1, 2), (2, 2), (3, 4), (4, 4))]
    assert [row["learning_rate"] for row in result.history] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("option", "error", "match"),
    [
        ({"patience": 2}, ValueError, "patience=2 without validation data"),
        ({"patience": 0}, ValueError, "patience must be"),
        ({"callback": 3}, TypeError, "callback must be a function of the progress"),
        (
            {"callback": lambda progress: progress.row},
            TypeError,
            "callback must return True to stop the run.*after epoch 1",
        ),
        ({"average": 1.0}, ValueError, "between 0 and 1, 0.999 for example; found 1.0"),
        ({"average": "much"}, TypeError, "average must be a number"),
        ({"accumulate": 0}, ValueError, "accumulate must be"),
    ],
)
def test_what_cannot_be_used_is_refused(option, error, match):
    with pytest.raises(error, match=match):
        run(**option)


def test_the_history_is_a_frame():
    result, rows, _ = run(validation=binary(20, 2))
    frame = result.to_pandas()
    assert frame.index.name == "epoch"
    assert list(frame.index) == [1, 2, 3, 4, 5, 6]
    assert frame["validation_bound"].idxmax() == result.best_epoch
    for row in rows:
        assert {name: frame.loc[row["epoch"], name] for name in row if name != "epoch"} == {
            name: value for name, value in row.items() if name != "epoch"
        }
    assert FitResult.to_pandas.__doc__


def blocks_of_page():
    page = (Path(docs.__file__).parent / "training.md").read_text(encoding="utf-8")
    return [part.split("```")[0] for part in page.split("```python\n")[1:]]


def run_block(block):
    """Run one block after the first one, which makes the pair and the data of all."""
    namespace = {}
    exec(compile(blocks_of_page()[0] + block, "training.md", "exec"), namespace)
    return namespace["result"]


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in blocks_of_page()[1:] if "tensorboard" not in block]
    assert [len(run_block(block).history) for block in blocks] == [3, 3, 5, 4]


def test_tensorboard_in_five_lines(tmp_path, monkeypatch):
    """The lines of the page, with the real writer: what its files hold is what the history holds."""
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed; the extra test has it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks_of_page() if "tensorboard" in block]
    history = run_block(block).history
    events = EventAccumulator(str(tmp_path / "runs" / "vae")).Reload()
    for name in ("elbo", "validation_bound", "learning_rate"):
        found = events.Scalars(name)
        assert [event.step for event in found] == [row["epoch"] for row in history]
        assert [event.value for event in found] == pytest.approx([row[name] for row in history], rel=1e-6)


def change_betas(progress):
    progress.optimizer.param_groups[0]["betas"] = (0.1, 0.2)


def change_decay(progress):
    progress.optimizer.param_groups[0]["weight_decay"] = 0.5


def change_rate(progress):
    progress.optimizer.param_groups[0]["initial_lr"] = 0.3


def clear_moments(progress):
    state = progress.optimizer.state
    for parameter in state:
        state[parameter] = {name: torch.zeros_like(value) for name, value in state[parameter].items()}


def double_gradients(progress):
    progress.optimizer.register_step_pre_hook(_double)


def _double(optimizer, *_):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.mul_(2)


@pytest.mark.parametrize("change", [change_betas, change_decay, change_rate, clear_moments, double_gradients])
def test_what_a_callback_changes_in_the_optimizer_holds_recorded_too(uncompiled, caplog, change):
    def callback(progress):
        if progress.epoch == 3:
            change(progress)

    # With a small eps, Adam would hardly notice that gradients are doubled.
    optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, eps=1.0, fused=True)
    unchanged, expected, found = (
        run(optimizer=optimizer, learning_rate=None, compile=compile, callback=how)[2]
        for compile, how in ((False, None), (False, callback), (True, callback))
    )
    assert "runs eagerly" not in caplog.text
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not all(map(torch.allclose, expected, unchanged))
