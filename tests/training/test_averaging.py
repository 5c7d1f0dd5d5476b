"""`average=` and `accumulate=`: against the same numbers by hand, resumed bit for bit, recorded with the same numbers."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from shared.runs import Killed, binary, killed_after, make, parameters, same
from torch import nn

import pyrovae as pv
from pyrovae.compiled.record import Recording
from pyrovae.data.forms import as_batch
from pyrovae.training.averaging import Average
from pyrovae.training.optimization import OneOptimizer
from pyrovae.training.validation import validate

OPTIONS = {"epochs": 5, "batch_size": 15, "learning_rate": 0.05, "compile": False, "progress": False}


def with_batch_norm(seed=0):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.SiLU())
    torch.manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return make(seed)[0], pv.guides.MeanFieldNormal(net, 2, num_features=8)


def run(pair=None, seed=0, data=None, **more):
    pair = make(seed) if pair is None else pair
    pyro.set_rng_seed(5)
    result = pv.fit(*pair, binary() if data is None else data, **{**OPTIONS, **more})
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "data_per_second")} for row in result.history]
    buffers = [buffer.clone() for module in pair for buffer in module.buffers()]
    return str(rows), [*parameters(*pair), *buffers], result


def steps_of(monkeypatch):
    """The parameters after every step of the optimizer that was made, as the run goes on."""
    made = []
    original = OneOptimizer._step

    def step(self, is_made):
        original(self, is_made)
        if is_made:
            made.append({id(p): p.detach().clone() for p in self.parameters})

    monkeypatch.setattr(OneOptimizer, "_step", step)
    return made


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_the_weighted_mean_of_the_steps(decay, monkeypatch):
    """Without validation the pair returned has it, and the trajectory is that of a run without."""
    _, plain, _ = run()
    count = len(parameters(*make()))
    made = steps_of(monkeypatch)
    pair = make()
    names = [id(p) for module in pair for p in module.parameters()]
    _, found, _ = run(pair, average=decay)
    assert len(made) == 15
    weights = torch.tensor([decay ** (14 - i) for i in range(15)], dtype=torch.float64)
    for tensor, name, last in zip(found[:count], names, plain[:count], strict=True):
        steps = torch.stack([values[name] for values in made]).double()
        expected = torch.tensordot(weights / weights.sum(), steps, 1)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(made[-1][name], last), "training went on from the raw weights"


def test_validation_measures_the_averages_and_the_best_epoch_keeps_them(tmp_path):
    validation = binary(30, 2)
    options = {"average": 0.8, "validation": validation, "learning_rate": 0.3, "epochs": 12, "schedule": None}
    pair = with_batch_norm()
    seen = []

    def look(progress):
        seen.append([*parameters(*pair), *(buffer.clone() for module in pair for buffer in module.buffers())])

    path = tmp_path / "run.pt"
    _, found, result = run(pair, callback=look, checkpoint=path, **options)
    assert 1 <= result.best_epoch < 12
    assert same(found, seen[result.best_epoch - 1]), "a callback sees what is validated"
    measured = validate(*pair, as_batch(validation), Trace_ELBO(), 15)
    row = result.history[result.best_epoch - 1]
    assert {name: row[name] for name in measured} == measured
    loaded = with_batch_norm(3)
    pv.load(path, *loaded)
    assert same(parameters(*loaded), found[: len(parameters(*pair))])
    _, raw, plain = run(with_batch_norm(), **{**options, "average": None})
    assert [r["objective"] for r in plain.history] == [r["objective"] for r in result.history]
    assert [r["validation_bound"] for r in plain.history] != [r["validation_bound"] for r in result.history]
    count = len(parameters(*pair))
    assert not same(raw[:count], found[:count])


@pytest.mark.parametrize("options", [{"average": 0.7}, {"accumulate": 2}, {"average": 0.7, "accumulate": 2}])
@pytest.mark.parametrize("validated", [False, True])
def test_resumed_bit_for_bit_and_recorded(options, validated, tmp_path, monkeypatch):
    options = {**options, "validation": binary(20, 2) if validated else None, "clip_norm": 1.0}
    expected = run(**options)
    path = tmp_path / "run.pt"
    for seed, stop in enumerate((1, 3)):
        with monkeypatch.context() as patch:
            killed_after(patch, stop)
            with pytest.raises(Killed):
                run(seed=seed, checkpoint=path, checkpoint_every=0, resume=True, **options)
    for seed in (8, 9):  # goes on, then is finished
        found = run(seed=seed, checkpoint=path, resume=True, **options)
        assert found[0] == expected[0]
        assert same(found[1], expected[1])
    monkeypatch.setattr(Recording, "compiler", staticmethod(lambda graph: graph))
    for recorded, eager in zip(run(compile=True, **options)[1], expected[1], strict=True):
        torch.testing.assert_close(recorded, eager, rtol=1e-4, atol=1e-5)
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        with pytest.raises(Killed):
            run(compile=True, checkpoint=tmp_path / "recorded.pt", checkpoint_every=0, **options)
    resumed = run(seed=4, compile=True, checkpoint=tmp_path / "recorded.pt", resume=True, **options)
    assert same(resumed[1], run(compile=True, **options)[1])


def test_skipped_steps_do_not_enter_the_average():
    parameter = torch.tensor([1.0, 2.0])
    average, other = Average(0.9), Average(0.9)
    for each in (average, other):
        each.join([parameter])
    average.update(torch.tensor(False))  # before any step: it stays at the start
    assert torch.equal(average.values[parameter], parameter)
    for value, was_made in ((3.0, True), (50.0, False), (4.0, True), (7.0, False)):
        parameter.fill_(value)
        average.update(torch.tensor(was_made))
        if was_made:
            other.update(torch.tensor(True))
    assert same(average.values.values(), other.values.values())
    torch.testing.assert_close(average.values[parameter], torch.full((2,), (0.9 * 3 + 4) / 1.9))
    with average.applied():
        assert torch.equal(parameter, average.values[parameter])
    assert torch.equal(parameter, torch.full((2,), 7.0))


class Fixed(nn.Module):
    """A model and a guide without noise, in float64, so that a step is a function of its batch; the plate may be subsampled."""

    def __init__(self, full_size=None):
        super().__init__()
        torch.manual_seed(3)
        self.full_size = full_size
        self.encoder, self.decoder = nn.Linear(3, 2).double(), nn.Linear(2, 3).double()

    def plate(self, x):
        return pyro.plate("rows", self.full_size or len(x), subsample=torch.arange(len(x)) if self.full_size else None)

    def model(self, x):
        pyro.module("fixed", self)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z).tanh(), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("fixed", self)
        with self.plate(x):
            pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))


NUMBERS = torch.randn(46, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fixed(full_size=None, data=NUMBERS, **more):
    fixed = Fixed(full_size)
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    options = {"epochs": 4, "compile": False, "progress": False, **more}
    return pv.fit(fixed.model, fixed.guide, data, **options), parameters(fixed)


@pytest.mark.parametrize("full_size", [None, 46])
@pytest.mark.parametrize("sizes", [(2, 10, 20), (3, 6, 18), (4, 10, 40)])
@pytest.mark.parametrize("compile", [False, True])
def test_batches_together_are_one_larger_batch(full_size, sizes, compile, monkeypatch):
    """Also with ragged ends: 46 data in batches of 10 are 2 + 2 + 1, of 6 are 3 + 3 + 2, with 4 in the last."""
    recorded = []
    monkeypatch.setattr(Recording, "compiler", staticmethod(lambda graph: recorded.append(1) or graph))
    n, small, large = sizes
    scale = full_size or 1
    options = {"optimizer": partial(torch.optim.SGD, lr=2e-3 / scale, momentum=0.9), "clip_norm": 5.0 * scale}
    options |= {"schedule": None, "average": 0.6, "compile": compile}
    one, expected = fixed(full_size, batch_size=large, **options)
    several, found = fixed(full_size, batch_size=small, accumulate=n, **options)
    assert len(recorded) == 2 * compile
    assert one.num_steps == several.num_steps
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(found, parameters(Fixed()), strict=True))


def test_rates_and_means_with_full_groups():
    """With as many batches as full groups need, the schedule's rates are the same, too; each batch counts in the means."""
    options = {
        "optimizer": partial(torch.optim.SGD, lr=2e-3),
        "schedule": lambda done: 1 - done / 2,
        "data": NUMBERS[:40],
    }
    one, expected = fixed(batch_size=20, **options)
    several, found = fixed(batch_size=10, accumulate=2, **options)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    for a, b in zip(one.history, several.history, strict=True):
        for name in ("objective", "elbo", "reconstruction", "kl", "learning_rate"):
            assert a[name] == pytest.approx(b[name], rel=1e-9), name


@pytest.mark.parametrize("bad", [range(10), (0, 13, 44), range(46)])
def test_a_batch_that_is_not_finite_does_not_enter(bad):
    """Against gradients by hand: of the batches of a step, those that are finite count; a step of none is not made."""
    data = NUMBERS.clone()
    data[list(bad)] = float("nan")
    options = {"batch_size": 10, "accumulate": 2, "schedule": None, "max_skipped_steps": 100, "epochs": 1}
    rate = partial(torch.optim.SGD, lr=2e-3)
    if len(bad) == 46:
        with pytest.raises(RuntimeError, match="no step of this run was made"):
            fixed(data=data, optimizer=rate, **options)
        return
    result, found = fixed(data=data, optimizer=rate, **options)

    hand = Fixed()
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    batches = [data[index] for index in torch.randperm(46).split(10)]
    optimizer = rate(hand.parameters())
    for group in (batches[:2], batches[2:4], batches[4:]):
        good = [batch for batch in group if batch.isfinite().all()]
        if good:
            optimizer.zero_grad()
            Trace_ELBO().loss_and_grads(hand.model, hand.guide, torch.cat(good))
            optimizer.step()
    skipped = sum(not batch.isfinite().all() for batch in batches)
    assert result.num_skipped_steps == skipped > 0
    for a, b in zip(found, parameters(hand), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with pytest.raises(
        RuntimeError, match=rf"{skipped - 1} such steps were skipped before" if skipped > 1 else "not finite"
    ):
        fixed(data=data, optimizer=rate, **{**options, "max_skipped_steps": skipped - 1})
