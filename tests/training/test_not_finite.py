"""Numbers that stop being finite: the run stops at the step, says where they began, and is put back as it was."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
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
from torch.utils.data import DataLoader, IterableDataset

import pyrovae as pv
from pyrovae.compiled.record import Recording
from pyrovae.training.checkpoint_file import read
from pyrovae.training.non_finite import NotFiniteError


@pytest.mark.parametrize(
    ("way", "look_every", "clip_norm"), [("eager", 1, None), ("recorded", 1, 1.0), ("recorded", 50, None)]
)
@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (nan_in_features, r"site 'z' of the guide has a Normal whose loc is nan"),
        (infinite_features, r"site 'z' of the guide has a Normal whose (loc|scale) is (nan|inf|-inf)"),
        (nan_in_gradient, r"site '[xz]' of the (guide|model) has a log density whose gradient is not finite"),
    ],
)
def test_it_stops_at_the_step_and_names_site_and_data(spoil, what, way, look_every, clip_norm, tmp_path, monkeypatch):
    """In the third epoch, with two good ones before: their state is put back and saved, and no warning is given.

    look_every=50: the flag is read at the epoch's end, as on a GPU; the steps after the bad one change nothing.
    """
    monkeypatch.setattr(Recording, "compiler", staticmethod(lambda graph: graph))
    options = {**OPTIONS, "compile": way == "recorded", "clip_norm": clip_norm}
    look_rarely(monkeypatch, look_every)
    good, bad = pair_with(spoil, 10**6), pair_with(spoil, 2 * 3)
    pyro.set_rng_seed(1)
    pv.fit(*good, marked_data(), epochs=2, schedule=None, **options)
    pyro.set_rng_seed(1)
    path = tmp_path / "run.pt"
    match = rf"not finite at epoch 3, step \d: {what}, for train\[17\] \(1 of the batch\)\. Look at these data.*after epoch 2"
    with pytest.raises(NotFiniteError, match=match) as caught:
        pv.fit(*bad, marked_data(), epochs=5, schedule=None, checkpoint=path, **options)
    assert (caught.value.epoch, caught.value.index.tolist()) == (3, [17])
    assert caught.value.site in ("z", "x")
    assert same(parameters(*good), parameters(*bad))
    assert len(read(path)["training"]["state"]["history"]) == 2
    assert str(path) in str(caught.value)


class MoreThanIts(IterableDataset):
    """A stream that gives fewer or more data than its length says, the last one NaN."""

    def __init__(self, given):
        self.x = torch.cat([binary(given - 1), torch.full((1, 1, 4, 3), torch.nan)])

    def __len__(self):
        return 30

    def __iter__(self):
        return iter(self.x)


@pytest.mark.parametrize("given", [20, 30, 40])
@pytest.mark.parametrize("max_skipped", [0, 1])
def test_the_last_step_of_an_epoch_is_seen_whatever_the_loaders_length(given, max_skipped, monkeypatch, caplog):
    """The flag is read at the epoch's end, as on a GPU."""
    look_rarely(monkeypatch, 50)
    loader = DataLoader(MoreThanIts(given), batch_size=5)
    fit = partial(pv.fit, *make(), loader, epochs=1, max_skipped_steps=max_skipped, progress=False)
    if not max_skipped:
        with pytest.raises(NotFiniteError, match=f"step {given // 5}: the data"):
            fit()
        return
    result = fit()
    assert f"step {given // 5} was skipped" in caplog.text
    assert (result.num_steps, result.num_skipped_steps) == (given // 5, 1)


def test_nan_in_the_data_and_in_the_parameters():
    model, guide = pair_with(nan_in_features, 10**6)
    x = marked_data()
    x[3] = torch.nan
    with pytest.raises(NotFiniteError, match=r"the data themselves are not finite, for train\[3\]"):
        pv.fit(model, guide, x, epochs=1, **OPTIONS)
    model, guide = make()
    with torch.no_grad():
        guide.head.bias.fill_(torch.nan)
    match = r"epoch 1, step 1: site 'z' of the guide has a Normal .*; not finite before that step: \d\.head\.bias"
    with pytest.raises(NotFiniteError, match=match):
        pv.fit(model, guide, binary(), epochs=1, **OPTIONS)


def test_an_impossible_observation_of_a_plain_program():
    """A loss that is infinite, in the model, of one datum; the positions are those in the training data."""
    x = torch.linspace(0.1, 0.9, 20)
    x[5] = 3.0

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Beta(1.0 + z**2, 2.0, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    with pytest.raises(
        NotFiniteError, match=r"site 'x' of the model has the log density nan, for train\[5\]"
    ) as caught:
        pv.fit(model, guide, x, epochs=1, batch_size=7, learning_rate=0.01, progress=False)
    assert caught.value.site == "x"
    pyro.clear_param_store()


@pytest.mark.parametrize("loss", [pv.objectives.ImportanceWeighted(3), pyro.infer.RenyiELBO(num_particles=2)])
def test_other_losses_name_the_site_too(loss):
    with pytest.raises(NotFiniteError, match=r"site 'z' of the guide has a Normal whose loc is nan, for train\[17\]"):
        pv.fit(*pair_with(nan_in_features, 4), marked_data(), epochs=5, loss=loss, **OPTIONS)


def test_errors_that_are_not_about_numbers_come_as_they_are():
    model, guide = make()
    guide.head = nn.Linear(8, 7)
    with pytest.raises(RuntimeError, match="size") as caught:
        pv.fit(model, guide, binary(), epochs=1, **OPTIONS)
    assert not isinstance(caught.value, NotFiniteError)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu(compile, tmp_path):
    bad = pair_with(nan_in_gradient, 12)
    with pytest.raises(NotFiniteError, match=r"for train\[17\] \(1 of the batch\)"):
        pv.fit(*bad, marked_data(), epochs=9, compile=compile, checkpoint=tmp_path / "run.pt", **OPTIONS)
    assert all(parameter.isfinite().all() for module in bad for parameter in module.parameters())


def a_table(num_columns):
    model = pv.GenerativeModel(
        pv.priors.StandardNormal(2),
        pv.likelihoods.LearnedScaleNormal(pv.nets.MLP(2, [16], num_columns), (num_columns,)),
    )
    return model, pv.guides.MeanFieldNormal(pv.nets.MLP(num_columns, [16]), latent_dim=2)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: torch.randn(100, 5) * 1e3, r"and standard deviation (9\d\d|1(\.\d+)?e\+03), from"),
        (lambda: torch.randn(100, 5) + 1e4, r"have mean 1e\+04 and standard deviation"),
        (lambda: torch.cat([torch.randn(100, 4), 1e5 * torch.rand(100, 1)], 1), r"to (9[\d.]*e\+04|1e\+05): scale"),
    ],
)
def test_the_first_step_is_not_the_learning_rates(data, said):
    """Data that nobody scaled: nothing was learned yet, so the advice is to scale them, with what was found."""
    pair = a_table(5)
    before = parameters(*pair)
    with pytest.raises(NotFiniteError, match=said) as caught:
        pv.fit(*pair, data(), epochs=1, progress=False)
    assert "scale the data, (x - x.mean(0)) / x.std(0)" in str(caught.value)
    assert "without the columns whose x.std(0) is 0" in str(caught.value)
    assert "learning rate is not the cause" in str(caught.value)
    assert "clip_norm" not in str(caught.value)
    assert same(before, parameters(*pair))


def test_once_something_was_learned_it_may_be_the_learning_rate():
    with pytest.raises(NotFiniteError, match=r"epoch 2.*lower the learning rate \(.* clip gradients") as caught:
        pv.fit(*pair_with(nan_in_features, 3), marked_data(), epochs=3, **OPTIONS)
    assert "scale the data" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 15, 39])
def test_the_advice_for_data_that_are_not_finite_at_any_step(value, row):
    x = torch.randn(40, 3)
    x[row] = value

    def model(x):
        with pyro.plate("d", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1), obs=x)

    with pytest.raises(NotFiniteError, match="Leave these data out, or replace") as caught:
        pv.fit(model, lambda x: None, x, batch_size=10, epochs=1, progress=False)
    assert "learning rate" not in str(caught.value)
