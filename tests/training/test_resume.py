"""Runs that stop and go on: bit for bit what a run never stopped gives."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from shared.runs import Killed, binary, killed_after, make, parameters, same
from torch import nn

import pyrovae as pv
from pyrovae.compiled.record import Recording
from pyrovae.training import run_file
from pyrovae.training.checkpoint_file import read, write


def history(result):
    """What does not depend on the clock, with all digits; as text, in which NaN equals NaN."""
    return str([{k: v for k, v in row.items() if k not in ("seconds", "data_per_second")} for row in result.history])


def vamp_and_flow(seed=0):
    torch.manual_seed(seed)
    guide = pv.guides.InverseAutoregressiveFlow(pv.nets.MLP(12, [8]), 2, hidden_features=(8,), num_context=3)
    likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 12), (1, 4, 3))
    return pv.GenerativeModel(pv.priors.VampPrior(guide, torch.rand(4, 1, 4, 3)), likelihood), guide


def with_batch_norm(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.SiLU())
    return make(seed)[0], pv.guides.MeanFieldNormal(net, 2, num_features=8)


def noisy(batch):
    """Random numbers of torch, NumPy and Python, as an augmentation may draw them."""
    import random

    keep = torch.rand_like(batch) < 0.9
    return torch.where(keep, batch, float(np.random.rand() + random.random() > 1.0))  # noqa: NPY002


PAIRS = {"plain": make, "vamp and flow": vamp_and_flow, "batch norm": with_batch_norm}
LOSSES = {
    "elbo": pyro.infer.Trace_ELBO,
    "warm-up": lambda: pv.objectives.AnalyticKL(kl_warmup_steps=11, free_bits=0.1),
    "iwae": lambda: pv.objectives.ImportanceWeighted(3),
}


@pytest.mark.parametrize(
    ("pair", "loss", "compile"),
    [
        ("plain", "elbo", False),
        ("vamp and flow", "warm-up", False),
        ("batch norm", "iwae", False),
        ("plain", "warm-up", "recorded"),
        pytest.param("plain", "warm-up", True, marks=pytest.mark.slow),
        pytest.param("vamp and flow", "elbo", True, marks=pytest.mark.slow),
        pytest.param("batch norm", "iwae", True, marks=pytest.mark.slow),
    ],
)
def test_resumed_runs_are_the_same_bit_for_bit(pair, loss, compile, tmp_path, monkeypatch):
    """Stopped before each of five epochs, in eager and compiled runs; other modules and seeds in the second process."""
    if compile == "recorded":  # run as recorded, without the seconds that Inductor takes
        monkeypatch.setattr(Recording, "compiler", staticmethod(lambda graph: graph))
    options = {"epochs": 5, "batch_size": 15, "learning_rate": 0.02, "compile": bool(compile), "progress": False}
    options |= {"validation": binary(20, 2), "transform": noisy if not compile else None}

    def run(seed, checkpoint, **more):
        model, guide = PAIRS[pair](seed)
        pyro.set_rng_seed(seed + 11)
        result = pv.fit(model, guide, binary(), loss=LOSSES[loss](), checkpoint=checkpoint, **options, **more)
        tensors = [*parameters(model, guide), *(buffer.clone() for m in (model, guide) for buffer in m.buffers())]
        return history(result), tensors, torch.rand(3)

    expected = run(0, None)
    path = tmp_path / "run.pt"
    stops = (3,) if compile else range(5)
    for seed, num_epochs in enumerate(stops):
        with monkeypatch.context() as patch:
            killed_after(patch, num_epochs)
            with pytest.raises(Killed):
                run(seed, path, checkpoint_every=0, resume=True)
        assert len(read(path)["training"]["state"]["history"]) == num_epochs
    found = run(99, path, checkpoint_every=0, resume=True)
    assert found[0] == expected[0]
    assert same(found[1], expected[1])
    assert torch.equal(found[2], expected[2]), "what is drawn after training is the same, too"
    again = run(123, path, resume=True)  # of a run that is complete
    assert again[0] == expected[0]
    assert same(again[1], expected[1])
    assert torch.equal(again[2], expected[2])


def test_a_program_with_global_parameters_resumes(tmp_path, monkeypatch):
    x = torch.randn(60) + 3

    def model(x):
        loc = pyro.param("test_loc", torch.tensor(0.0))
        scale = pyro.param("test_scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", 60, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", 60, subsample_size=len(x)):
            pyro.sample("z", dist.Normal((x + pyro.param("test_loc", torch.tensor(0.0))) / 2, 0.5**0.5))

    def run(**more):
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        result = pv.fit(model, guide, x, epochs=4, batch_size=20, learning_rate=0.1, progress=False, **more)
        return history(result), pyro.param("test_loc").item(), pyro.param("test_scale").item()

    expected = run()
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(Killed):
            run(checkpoint=tmp_path / "run.pt")
    assert run(checkpoint=tmp_path / "run.pt", resume=True) == expected, "from the start, the one state saved so far"
    (tmp_path / "run.pt").unlink()
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(Killed):
            run(checkpoint=tmp_path / "run.pt", checkpoint_every=0)
    assert run(checkpoint=tmp_path / "run.pt", resume=True) == expected
    with pytest.raises(ValueError, match="holds no model and guide: a run on plain functions"):
        pv.load(tmp_path / "run.pt")
    pyro.clear_param_store()


def test_a_checkpoint_of_a_run_loads_as_what_fit_returns(tmp_path):
    model, guide = make()
    path = tmp_path / "run.pt"
    result = pv.fit(
        model, guide, binary(10), epochs=60, batch_size=5, learning_rate=0.05, validation=binary(200, 2), checkpoint=path,
        progress=False,
    )  # fmt: skip
    assert result.best_epoch < 60
    content = pv.load(path)
    assert same(parameters(model, guide), parameters(content["model"], content["guide"]))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    options = {"epochs": 4, "batch_size": 15, "checkpoint": path, "progress": False}

    whole = make()
    pv.fit(*whole, binary(), **{**options, "checkpoint": None})
    original, calls = pyro.infer.SVI.step, []

    def step(self, *arguments):
        calls.append(1)
        if len(calls) == 8:  # the second of the third epoch's
            raise KeyboardInterrupt
        return original(self, *arguments)

    stopped = make()
    with monkeypatch.context() as patch:
        patch.setattr(pyro.infer.SVI, "step", step)
        with pytest.raises(
            KeyboardInterrupt, match=r"after epoch 2 was restored and is in .*run\.pt.*resume=True\) resumes from it"
        ):
            pv.fit(*stopped, binary(), **options)
    assert len(read(path)["training"]["state"]["history"]) == 2, "though ten seconds had not passed"
    pv.fit(*stopped, binary(), resume=True, **options)
    assert same(parameters(*stopped), parameters(*whole))
    calls.clear()
    monkeypatch.setattr(pyro.infer.SVI, "step", step)
    with pytest.raises(KeyboardInterrupt) as caught:
        pv.fit(*make(), binary(), **{**options, "checkpoint": None})
    assert str(caught.value) == ""


def test_a_stopped_run_names_its_best_epoch(tmp_path, monkeypatch):
    """A run that overfits, stopped long after its best epoch."""
    path = tmp_path / "run.pt"
    original, calls = pyro.infer.SVI.step, []

    def step(self, *arguments):
        calls.append(1)
        if len(calls) == 2 * 50 + 1:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(pyro.infer.SVI, "step", step)
    with pytest.raises(KeyboardInterrupt, match="after epoch 50 was restored") as caught:
        pv.fit(
            *make(), binary(10), epochs=60, batch_size=5, learning_rate=0.05, validation=binary(200, 2), checkpoint=path,
            progress=False,
        )  # fmt: skip
    best = read(path)["training"]["state"]["best"]["epoch"]
    assert 0 < best < 50
    assert str(caught.value).endswith(f"pyrovae.load gives the pair after epoch {best}, the best so far")
    content = pv.load(path)
    found = read(path)["training"]["state"]["best"]["tensors"]
    assert all(
        any(torch.equal(parameter, tensor) for tensor in found.values())
        for parameter in (*content["model"].parameters(), *content["guide"].parameters())
    )


def test_what_is_not_the_same_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    options = {"epochs": 2, "batch_size": 20, "checkpoint": path, "progress": False}
    pv.fit(*make(), binary(), **options)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"run\.pt already exists: resume=True resumes its run"):
        pv.fit(*make(), binary(), **options)
    for change, match in (
        ({"epochs": 1}, "with epochs=2, and this one has epochs=1"),
        ({"learning_rate": 0.1}, "with learning_rate=0.001, and this one has learning_rate=0.1"),
        ({"clip_norm": 1.0}, "clip_norm=None"),
        ({"loss": pv.objectives.ImportanceWeighted(2)}, r"loss=Trace_ELBO\(num_particles=1\).*ImportanceWeighted"),
        ({"transform": noisy}, "transform=None, and this one has transform=noisy"),
        ({"schedule": None}, "schedule=cosine_schedule"),
        ({"validation": binary(3)}, "validation=None"),
    ):
        with pytest.raises(ValueError, match=match):
            pv.fit(*make(), binary(), resume=True, **{**options, **change})
    with pytest.raises(ValueError, match=r"train=\(40, 1, 4, 3\) torch.float32 with checksum"):
        pv.fit(*make(), 1 - binary(), resume=True, **options)
    other = make(latent_dim=3)
    kept = copy.deepcopy(other)
    with pytest.raises(ValueError, match=r"does not fit this run: it is the state of another model and guide: '0\.\w+"):
        pv.fit(*other, binary(), resume=True, **options)
    assert same(parameters(*other), parameters(*kept))
    pv.save(tmp_path / "pair.pt", *make())
    with pytest.raises(ValueError, match="holds a model and a guide, but no run to resume"):
        pv.fit(*make(), binary(), resume=True, **{**options, "checkpoint": tmp_path / "pair.pt"})
    assert path.read_bytes() == before


def test_saving_costs_no_random_numbers_and_keeps_to_its_seconds(tmp_path, monkeypatch):
    runs, writes = [], []
    original = run_file.write
    monkeypatch.setattr(run_file, "write", lambda *a, **k: writes.append(1) or original(*a, **k))
    for path, every in ((None, 0), (tmp_path / "a.pt", 0), (tmp_path / "b.pt", 1000.0)):
        writes.clear()
        pyro.set_rng_seed(5)
        pair = make()
        pv.fit(*pair, binary(), epochs=3, batch_size=7, checkpoint=path, checkpoint_every=every, progress=False)
        runs.append((parameters(*pair), len(writes)))
    assert same(runs[0][0], runs[1][0])
    assert same(runs[0][0], runs[2][0])
    assert [count for _, count in runs] == [0, 4, 2], "at the start, after each epoch or the last"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a.pt.previous", "b.pt", "b.pt.previous"]


def test_a_full_disk_ends_the_run_and_leaves_the_last_state(tmp_path, monkeypatch):
    original, writes, path = run_file.write, [], tmp_path / "run.pt"

    def full(*arguments, **options):
        writes.append(1)
        if len(writes) == 4:
            raise OSError(28, f"cannot write {path} (No space left on device)")
        original(*arguments, **options)

    options = {"epochs": 5, "batch_size": 20, "checkpoint": path, "checkpoint_every": 0, "progress": False}

    whole = make()
    pv.fit(*whole, binary(), **{**options, "checkpoint": None})
    stopped = make()
    with monkeypatch.context() as patch:
        patch.setattr(run_file, "write", full)
        with pytest.raises(OSError, match="No space left"):
            pv.fit(*stopped, binary(), **options)
    assert len(read(path)["training"]["state"]["history"]) == 2
    pv.fit(*stopped, binary(), resume=True, **options)
    assert same(parameters(*stopped), parameters(*whole))


def test_an_older_run_that_chose_its_epoch_by_the_elbo(tmp_path):
    """Without its own bound in the history: nothing to tell from for the ELBO, refused for an objective that now goes by it."""
    path, x = tmp_path / "run.pt", binary()

    def run(loss, epochs=2):
        options = {"epochs": epochs, "batch_size": 20, "progress": False, "validation": binary(20, 2)}
        return pv.fit(*make(), x, loss=loss, checkpoint=path, resume=True, **options)

    for loss in (Trace_ELBO(), pv.objectives.ImportanceWeighted(3)):
        path.unlink(missing_ok=True)
        whole = run(loss)
        content = read(path)
        for row in content["training"]["state"]["history"]:
            del row["validation_bound"]
        write(path, content)
        if isinstance(loss, Trace_ELBO):
            again = run(loss)
            assert again.best_epoch == whole.best_epoch
            assert again.history == whole.history
        else:
            with pytest.raises(
                ValueError, match="chose the best epoch by the ELBO, not by its own bound: start a new run"
            ):
                run(loss)
