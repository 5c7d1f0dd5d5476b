"""What a batch is, the programs are called with: all forms of the same data give the same training bit for bit."""

import re
from functools import cache

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from shared.runs import Killed, killed_after, parameters, same
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

import pyrovae as pv
from pyrovae.compiled.record import Recording
from pyrovae.training.non_finite import NotFiniteError


class Model(nn.Module):
    """p(z) p(x|z, y); without labels, y is 0."""

    def __init__(self):
        super().__init__()
        self.net, self.slope = nn.Linear(2, 3), nn.Parameter(torch.ones(3))

    def forward(self, x, y=None, scale=None, known=None):
        pyro.module("model", self)
        y = torch.zeros(len(x)) if y is None else y
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.net(z) + y[:, None] * self.slope
            if known is not None:
                of_x = dist.Normal(loc, 0.5).mask(known).to_event(1)
            else:
                of_x = dist.Normal(loc, 0.5 if scale is None else scale).to_event(1)
            pyro.sample("x", of_x, obs=x)


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x, y=None, scale=None, known=None):
        pyro.module("guide", self)
        y = torch.zeros(len(x)) if y is None else y
        x = x if known is None else torch.where(known, x, 0.0)
        loc, log_scale = self.net(torch.cat([x, y[:, None].float()], -1)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class OnlyModel(Model):
    def forward(self, x):
        super().forward(x)


class OnlyGuide(Guide):
    def forward(self, x):
        super().forward(x)


def make():
    torch.manual_seed(0)
    return Model(), Guide()


def make_only():
    torch.manual_seed(0)
    return OnlyModel(), OnlyGuide()


def draw(num_data, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_data, 3, generator=generator), torch.randint(0, 5, (num_data,), generator=generator)


class AsFit(Sampler):
    """The order in which `fit` takes data in memory."""

    def __init__(self, num_data):
        self.num_data = num_data

    def __len__(self):
        return self.num_data

    def __iter__(self):
        return iter(torch.randperm(self.num_data).tolist())


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class LikeHuggingFace:
    """Columns that are read by a list of positions; no torch data set."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["x"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, index):
        return [self[place] for place in index]


def loader(rows, train, **options):
    # A loader draws a seed for its workers whenever it is begun: from a generator of its own, so that fit's numbers stay.
    if train:
        return DataLoader(Rows(rows), 10, sampler=AsFit(len(rows)), generator=torch.Generator(), **options)
    return DataLoader(Rows(rows), 500, **options)


def tuples(x, y):
    return list(zip(x, y, strict=True))


def dicts(x, y):
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def numpy_batch(rows):
    x, y = zip(*rows, strict=True)
    return np.stack([a.numpy().astype(np.float64) for a in x]), np.array([int(b) for b in y], dtype=np.uint8)


def frame(x):
    return pd.DataFrame(x.numpy(), columns=list("abc"))


# name -> (function of x, y and whether they are the training data, transform)
LABELLED = {
    "tuple": (lambda x, y, train: (x, y), None),
    "list": (lambda x, y, train: [x, y], None),
    "dict": (lambda x, y, train: {"x": x, "y": y}, None),
    "dict in another order": (lambda x, y, train: {"y": y, "x": x}, None),
    "TensorDataset": (lambda x, y, train: TensorDataset(x, y), None),
    "arrays": (lambda x, y, train: (x.double().numpy(), y.numpy().astype(np.uint8)), None),
    "float64 tensor": (lambda x, y, train: (x.double(), y.to(torch.uint8)), None),
    "frame and series": (lambda x, y, train: (frame(x), pd.Series(y.numpy())), None),
    "dict of frame and array": (lambda x, y, train: {"x": frame(x), "y": y.numpy()}, None),
    "Dataset of tuples": (lambda x, y, train: Rows(tuples(x, y)), None),
    "Dataset of dicts": (lambda x, y, train: Rows(dicts(x, y)), None),
    "like Hugging Face": (lambda x, y, train: LikeHuggingFace(x=x, y=y), None),
    "loader of tuples": (lambda x, y, train: loader(tuples(x, y), train), None),
    "loader of dicts": (lambda x, y, train: loader(dicts(x, y), train), None),
    "loader of arrays": (lambda x, y, train: loader(tuples(x, y), train, collate_fn=numpy_batch), None),
    "loader with indices": (
        lambda x, y, train: loader(list(enumerate(tuples(x, y))), train),
        lambda batch: tuple(batch[1]),
    ),
    "tuple with indices": (lambda x, y, train: (torch.arange(len(x)), x, y), lambda batch: batch[1:]),
    "dict of other names": (
        lambda x, y, train: {"image": x, "label": y},
        lambda batch: {"x": batch["image"], "y": batch["label"]},
    ),
}
ALONE = {
    "tensor": (lambda x, y, train: x, None),
    "array": (lambda x, y, train: x.double().numpy(), None),
    "frame": (lambda x, y, train: frame(x), None),
    "tuple of one": (lambda x, y, train: (x,), None),
    "TensorDataset of one": (lambda x, y, train: TensorDataset(x), None),
    "Dataset of tensors": (lambda x, y, train: Rows(list(x)), None),
    "loader of one": (lambda x, y, train: loader([(row,) for row in x], train), None),
    "labels left out": (lambda x, y, train: (x, y), lambda batch: batch[0]),
    "labels of a loader left out": (lambda x, y, train: loader(tuples(x, y), train), lambda batch: batch[0]),
}
FORMS = [("labelled", name) for name in LABELLED] + [("alone", name) for name in ALONE]


def run(kind, name, **options):
    """(parameters, history, next random number) of a run, and the log p of its pair for data that it has not seen."""
    forms, reference = (LABELLED, "tuple") if kind == "labelled" else (ALONE, "tensor")
    form, transform = forms[name or reference]
    pyro.clear_param_store()
    model, guide = make() if kind == "labelled" else make_only()
    train, validation = form(*draw(33), True), form(*draw(27, 2), False)
    if not isinstance(train, DataLoader):
        options["batch_size"] = 10
    torch.manual_seed(3)
    result = pv.fit(
        *(model, guide, train),
        **{"epochs": 4, "learning_rate": 0.02, "progress": False, "compile": False} | options,
        transform=transform,
        validation=validation,
    )
    following = torch.rand(3)
    x, y = draw(5, 7)
    torch.manual_seed(4)
    log_prob = pv.log_weights(model, guide, x, *([y] if kind == "labelled" else []), num_particles=3)
    rows = str([{k: v for k, v in row.items() if k not in ("seconds", "data_per_second")} for row in result.history])
    return [*parameters(model, guide), following, log_prob], rows


reference = cache(lambda kind: run(kind, None))


@pytest.mark.parametrize(("kind", "name"), FORMS)
def test_every_form_trains_resumes_and_is_evaluated_alike(kind, name, tmp_path, monkeypatch):
    """With validation data in the same form; bit for bit, with the order, the noise and what is drawn afterwards."""
    expected = reference(kind)
    found = run(kind, name)
    assert found[1] == expected[1]
    assert same(found[0], expected[0])
    options = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 0.0}
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(Killed):
            run(kind, name, **options)
    found = run(kind, name, resume=True, **options)
    assert found[1] == expected[1]
    assert same(found[0], expected[0])


def fit(data, pair=None, **options):
    pyro.clear_param_store()
    pair = make() if pair is None else pair
    torch.manual_seed(3)
    result = pv.fit(*pair, data, **{"epochs": 3, "learning_rate": 0.02, "progress": False} | options)
    return parameters(*pair), result


def test_labels_are_used():
    x, y = draw(33)
    assert not same(fit((x, y), batch_size=10)[0], fit((x, y.roll(1)), batch_size=10)[0])
    assert same(fit((x, torch.zeros(33)), batch_size=10)[0], fit(x, batch_size=10)[0])


# A constant of the length of a batch is none of its data.
@pytest.mark.parametrize("length", [3, 1])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("uncompiled")
def test_constants_stay_whole(length, compile):
    """Here scales of the columns, as many as there are data in a batch."""
    x, y = draw(9)
    scale = torch.tensor([0.3, 0.5, 1.4])[:length]

    class Held(Model):
        def forward(self, x, y):
            super().forward(x, y, scale)

    class HeldGuide(Guide):
        def forward(self, x, y):
            super().forward(x, y)

    torch.manual_seed(0)
    pair = Held(), HeldGuide()
    options = {"batch_size": 3, "compile": compile, "learning_rate": 0.05}
    expected = fit((x, y), pair, **options)[0]
    for data in ((x, y, scale), {"x": x, "y": y, "scale": scale}, (x, y, scale.numpy())):
        assert same(fit(data, **options)[0], expected)


def test_masks_go_with_their_data():
    """An unknown cell may hold any number: training does not depend on it."""
    x, y = draw(30)
    known = torch.rand(30, 3) < 0.7
    ends = [
        fit({"x": torch.where(known, x, fill), "y": y, "known": known.numpy()}, batch_size=7)[0] for fill in (0.0, 50.0)
    ]
    assert same(ends[0], ends[1])
    assert not same(ends[0], fit((x, y), batch_size=7)[0])


@pytest.mark.parametrize("transform", [None, lambda batch: (batch[0] + torch.rand_like(batch[0]), batch[1])])
@pytest.mark.usefixtures("uncompiled")
def test_a_recorded_step_is_the_eager_one(transform, monkeypatch):
    """Of a tuple, with constants; cut by the recording, and once."""
    recordings = []
    original = Recording._record
    monkeypatch.setattr(Recording, "_record", lambda *a: recordings.append(1) or original(*a))
    (x, y), scale = draw(33), torch.tensor([0.3, 0.5, 1.4])
    for data in ((x, y), (x, y, scale, None)) if transform is None else ((x, y),):
        eager, recorded = (
            fit(data, batch_size=10, transform=transform, compile=compile)[0] for compile in (False, True)
        )
        for first, second in zip(eager, recorded, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert len(recordings) == (2 if transform is None else 1)


@pytest.mark.usefixtures("uncompiled")
def test_a_constant_that_changes_is_not_recorded():
    """Here a number that each batch of a loader carries: the recording would keep that of the first."""

    class Scaled(OnlyModel):
        def forward(self, x, factor):
            Model.forward(self, x, scale=0.5 * factor)

    class ScaledGuide(OnlyGuide):
        def forward(self, x, factor):
            Guide.forward(self, x)

    x, _ = draw(30)
    data = DataLoader(Rows(list(range(30))), 10, collate_fn=lambda at: (x[at], 1.0 + at[0] / 10))
    ends = []
    for compile in (False, True):
        torch.manual_seed(0)
        ends.append(fit(data, (Scaled(), ScaledGuide()), compile=compile)[0])
    for first, second in zip(*ends, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_validation_goes_on_as_before_whatever_makes_its_batches():
    """A loader that shuffles, by its own generator or torch's: each epoch has the same order and noise."""
    x, y = draw(33)
    for generator in (None, torch.Generator()):
        held_out = DataLoader(TensorDataset(*draw(27, 2)), 10, shuffle=True, generator=generator)
        trained, result = fit((x, y), validation=held_out, learning_rate=1e-12)
        bounds = [row["validation_bound"] for row in result.history]
        assert bounds == pytest.approx([bounds[0]] * 3, rel=1e-7)
        assert same(trained, fit((x, y), validation=draw(27, 2), learning_rate=1e-12)[0])


def bad(place):
    x, y = draw(33)
    y = y.float()
    (x if place == 1 else y)[17] = torch.nan
    return x, y


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("make_data", [lambda x, y: (x, y), lambda x, y: {"x": x, "y": y}])
def test_the_argument_and_the_datum_that_are_not_finite_are_named(place, make_data):
    data = make_data(*bad(place))
    name = f"argument {place if isinstance(data, tuple) else repr('xy'[place - 1])}"
    match = rf"the data themselves are not finite in {name}, for train\[17\] \(1 of the batch\).*Leave these data out"
    with pytest.raises(NotFiniteError, match=match) as caught:
        fit(data, batch_size=10)
    assert caught.value.index.tolist() == [17]


@pytest.mark.parametrize("form", ["tuple", "dict", "Dataset of tuples", "like Hugging Face"])
def test_a_run_of_other_labels_is_not_resumed(form, tmp_path, monkeypatch):
    x, y = draw(33)
    make_data = LABELLED[form][0]
    options = {"batch_size": 10, "checkpoint": tmp_path / "run.pt", "resume": True}
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            fit(make_data(x, y, True), **options)
    other = y.clone()
    other[0] += 1
    found = {"tuple": "train.argument 2=", "dict": "train.argument 'y'="}.get(form, "train.dataset")
    with pytest.raises(ValueError, match=f"was written by a run with {re.escape(found)}"):
        fit(make_data(x, other, True), **options)
    fit(make_data(x, y, True), **options)


@pytest.mark.parametrize("by", ["weights", "table"])
def test_numbers_that_go_by_the_place_in_the_batch(by):
    """Weights that a program holds are refused; passed with the data, they train."""
    x, _ = draw(30)
    held = torch.rand(30) + 0.1

    class Weighted(OnlyModel):
        def forward(self, x, weights):
            with pyro.poutine.scale(scale=held[: len(x)] if by == "table" else weights):
                Model.forward(self, x)

    class WeightedGuide(OnlyGuide):
        def forward(self, x, weights):
            with pyro.poutine.scale(scale=held[: len(x)] if by == "table" else weights):
                Guide.forward(self, x)

    torch.manual_seed(0)
    pair = Weighted(), WeightedGuide()
    if by == "table":
        with pytest.raises(ValueError, match=r"numbers of site '[xz]' go by the place"):
            fit((x, held), pair, batch_size=10)
    else:
        fit((x, held), pair, batch_size=10)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(draw(5)[0])


X, Y = draw(20)
TEXT = pd.DataFrame({"a": [1.0, 2.0], "name": ["u", "v"], "c": [0.0, 1.0]})
EXACT = torch.full((20, 3), 0.1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (X[:0], {}, "train must hold at least one datum"),
        ((X, Y), {"validation": (X[:0], Y[:0])}, "validation must hold at least one datum"),
        (Rows([]), {}, "train must hold at least one datum, found an empty Rows"),
        (X, {"validation": Rows([])}, "validation must hold at least one datum, found an empty Rows"),
        (TEXT, {}, "train, column 'name' holds no numbers: found text|train, column 'name' holds no numbers: found Python"),
        (X, {"validation": TEXT}, "validation, column 'name' holds no numbers"),
        (EXACT, {}, r"train: found torch.float64 for programs in torch.float32.*0\.1 to.*\.to\(torch.float32\)"),
        ((X, EXACT), {}, r"train, argument 2: found torch.float64"),
        (X, {"validation": EXACT}, "validation: found torch.float64"),
        (DataLoader(EXACT, 5), {}, "a batch of train: found torch.float64"),
        (Stream(), {}, r"train is an IterableDataset.*DataLoader\(train, batch_size"),
        ((X, Y), {"validation": X}, r"validation has one item .*train have 2 items .*same arguments"),
        (X, {"validation": (X, Y)}, r"validation has 2 items .*train have one item"),
        ((X, Y), {"validation": {"x": X, "scale": torch.ones(20, 1)}}, "validation has 2 items.*same arguments"),
        ((X, Y, None, None, Y), {}, r"a batch of train has 5 items .*model takes \(x, y, scale, known\).*batch\[0\]"),
        ({"x": X, "label": Y}, {}, r"has 2 items \('x': Tensor .*, 'label': Tensor .*model takes \(x, y.*batch\['x'\]"),
        (DataLoader(dicts(X, Y), 5), {"transform": lambda batch: tuple(batch.values()) * 3}, "has 6 items"),
        (X, {"transform": lambda x: EXACT[: len(x)]}, "the result of transform: found torch.float64"),
        (3.0, {}, "train must be a tensor, an array, a frame"),
        ({1: X}, {}, "train is a mapping, whose keys name the arguments"),
    ],
)  # fmt: skip
def test_refuses(data, options, message):
    pair = make()
    before = parameters(*pair)
    with pytest.raises((TypeError, ValueError), match=message):
        fit(data, pair, **options)
    assert same(before, parameters(*pair))


def test_validation_may_have_the_same_arguments_in_another_form():
    validation = draw(27, 2)
    ends = [
        fit(draw(33), validation=of)[1].history[-1]["validation_bound"]
        for of in (validation, dict(zip("xy", validation, strict=True)), TensorDataset(*validation))
    ]
    assert ends[0] == ends[1] == ends[2]


def test_programs_without_parameters_of_modules_keep_the_dtype():
    def model(x):
        loc = pyro.param("loc", torch.zeros(3, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    pv.fit(model, lambda x: None, EXACT, epochs=1, progress=False)
    assert pyro.param("loc").dtype == torch.float64


def test_a_data_set_trains_with_every_loss():
    for loss in (Trace_ELBO(num_particles=2), pv.objectives.ImportanceWeighted(3)):
        ends = [fit(data, batch_size=10, loss=loss)[0] for data in (draw(33), Rows(tuples(*draw(33))))]
        assert same(*ends)


def constant_first(w, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = pyro.param("scale", torch.tensor(1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * w * scale, 1.0).to_event(1), obs=x)


def guide_of_constant_first(w, x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.mean(-1), pyro.param("s", torch.tensor(0.5))))


def test_the_data_are_those_of_the_plate():
    """A constant in front was taken for the data, shuffled, and its length for N: 500 times the right ELBO."""
    x, w = torch.randn(60, 3), torch.tensor([1.0, -2.0, 3.0])
    found = []
    for data in ({"w": w, "x": x}, {"x": x, "w": w}):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        result = pv.fit(
            constant_first, guide_of_constant_first, data, validation=data, epochs=2, batch_size=20, progress=False
        )
        found.append((result.num_steps, result.history[-1]["elbo"], result.history[-1]["validation_elbo"]))
    assert found[0] == found[1]
    assert found[0][0] == 6
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="first tensor has 3 rows.*argument 2.*put the data first"):
        pv.fit(constant_first, guide_of_constant_first, (w, x), epochs=1, progress=False)
