"""Training on a `DataLoader`: the batches of a tensor in memory, read from elsewhere, give the same training bit for bit."""

import itertools
import re
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.runs import Killed, binary, killed_after, make, parameters, same
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import pyrovae as pv
from pyrovae.compiled.record import Recording
from pyrovae.training.batches import batches_of
from pyrovae.training.non_finite import NotFiniteError


class AsFit(Sampler):
    """The order in which `fit` takes the data of a tensor."""

    def __init__(self, num_data):
        self.num_data = num_data

    def __len__(self):
        return self.num_data

    def __iter__(self):
        return iter(torch.randperm(self.num_data).tolist())


def loader(dataset, batch_size=10, **options):
    # A loader draws a seed for its workers whenever it is begun: from a generator of its own, so that fit's numbers stay.
    options = {"sampler": AsFit(len(dataset)), "generator": torch.Generator()} | options
    return DataLoader(dataset, batch_size, **options)


def train(data, **options):
    model, guide = make()
    torch.manual_seed(3)
    result = pv.fit(model, guide, data, epochs=3, progress=False, **options)
    return parameters(model, guide), [row["elbo"] for row in result.history]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("uncompiled")
def test_as_from_a_tensor(compile, workers):
    """With a ragged last batch, images alone or with labels that `transform` leaves out, in this process or a worker."""
    images = binary(33)
    expected = train(images, batch_size=10, compile=compile)
    for dataset, options in (
        (TensorDataset(images, torch.arange(33)), {"transform": lambda batch: batch[0]}),
        (TensorDataset(images), {}),
        (list(images), {}),
    ):
        found = train(loader(dataset, num_workers=workers), compile=compile, **options)
        assert same(expected[0], found[0])
        assert expected[1] == found[1]


@pytest.mark.usefixtures("uncompiled")
def test_full_batches_share_one_recording(monkeypatch):
    recordings = []
    original = Recording._record
    monkeypatch.setattr(Recording, "_record", lambda *a: recordings.append(1) or original(*a))
    train(loader(list(binary(33))), compile=True)
    assert len(recordings) == 1


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("uncompiled")
def test_resumes_bit_for_bit(compile, tmp_path, monkeypatch):
    data = DataLoader(list(binary(33)), batch_size=10, shuffle=True)  # its order comes from torch's generator
    expected = train(data, compile=compile)
    options = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 0.0, "compile": compile}
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            train(data, **options)
    found = train(data, resume=True, **options)
    assert same(expected[0], found[0])
    assert expected[1] == found[1]


def test_the_data_that_are_not_finite_are_named():
    images = binary(33)
    images[17, 0, 2, 1] = torch.nan
    model, guide = make()
    data = DataLoader(TensorDataset(images), batch_size=10)
    with pytest.raises(NotFiniteError, match=re.escape("batch[7] (1 of the batch)")) as error:
        pv.fit(model, guide, data, epochs=1, progress=False)
    assert (error.value.epoch, error.value.step) == (1, 2)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield binary(1)[0]


class Named(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"image": binary(1)[0]}


def labelled(num_data):
    return DataLoader(TensorDataset(binary(num_data), torch.arange(num_data)), batch_size=num_data)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (lambda: loader(list(binary(20))), {"batch_size": 10}, "leave it out"),
        (lambda: DataLoader(Endless(), batch_size=5), {}, "has no length"),
        (lambda: loader(list(binary(3)), drop_last=True), {}, "at least one batch"),
        (
            lambda: DataLoader(Named(), batch_size=2),
            {},
            r"has 1 item \('image': Tensor \(2, 1, 4, 3\)\).*model takes \(x.*transform=lambda batch: batch\['image'\]",
        ),
        (
            lambda: labelled(20),
            {},
            r"context of shape \(20,\).*neither its prior.*labels of a data loader.*transform=lambda batch: batch\[0\]",
        ),
        (
            lambda: labelled(20),
            {"transform": lambda batch: batch},
            r"context of shape \(20,\).*neither its prior",
        ),
        (lambda: DataLoader([(binary(1)[0], "name")] * 4), {}, r"context must be a tensor.*batch\[0\]"),
        (
            lambda: list(binary(20)),
            {},
            r"has 20 items \(Tensor \(1, 4, 3\), .*, \.\.\.\).*torch\.stack",
        ),
        (lambda: pv.data.digits(), {}, r"pass its \.train"),
    ],
)
def test_refuses(data, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pv.fit(*make(), data(), epochs=1, progress=False, **options)


@pytest.mark.parametrize("item", ["tuple", "dict", "namedtuple"])
def test_a_transform_is_given_all_items_of_a_batch(item):
    """Here it joins them: each label stays with its image."""
    images, labels = binary(33), torch.arange(33).float()
    seen = []

    def join(batch):
        x, y = batch.values() if item == "dict" else batch
        seen.append((x, y))
        return x

    kind = {
        "tuple": tuple,
        "dict": lambda pair: dict(zip("xy", pair, strict=True)),
        "namedtuple": lambda pair: Pair(*pair),
    }
    dataset = [kind[item](pair) for pair in zip(images, labels, strict=True)]
    assert same(train(loader(dataset), transform=join)[0], train(images, batch_size=10)[0])
    assert [len(x) for x, _ in seen] == [10, 10, 10, 3] * 3
    for x, y in seen:
        assert torch.equal(images[y.long()], x)


class Pair(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


class Blocks(Dataset):
    """Gives batches by itself, of 7, 7 and 2."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return binary(16).split(7)[index]


class Stream(IterableDataset):
    def __len__(self):
        return 33

    def __iter__(self):
        return iter(binary(33))


LOADERS = {
    "weighted": (lambda x: DataLoader(x, 5, sampler=WeightedRandomSampler(torch.ones(33), 12)), 12),
    "subset": (lambda x: DataLoader(x, 5, sampler=SubsetRandomSampler(range(8))), 8),
    "more than there are": (lambda x: DataLoader(x, 5, sampler=WeightedRandomSampler(torch.ones(33), 50)), 50),
    "drop_last": (lambda x: DataLoader(x, 10, drop_last=True), 30),
    "batch_sampler": (lambda x: DataLoader(x, batch_sampler=BatchSampler(SequentialSampler(x), 10, True)), 30),
    "own batch_sampler": (lambda x: DataLoader(x, batch_sampler=[[1, 2, 3], [4, 5]]), 5),
    "blocks": (lambda x: DataLoader(Blocks(), batch_size=None), 16),
    "stream": (lambda x: DataLoader(Stream(), 10, drop_last=True), 30),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_drawn_counts_not_the_data_set(kind, capfd):
    """In the bar and in data per second; the parts are per datum drawn."""
    make_loader, number = LOADERS[kind]
    result = pv.fit(*make(), make_loader(list(binary(33))), epochs=2, progress=True)
    assert f" {2 * number}/{2 * number} [" in capfd.readouterr().err
    last, before = result.history[1], result.history[0]
    seconds = last["seconds"] - before["seconds"]
    assert number / seconds <= last["data_per_second"] < 20 * number / seconds
    assert last["objective"] == pytest.approx(last["elbo"], rel=1e-4)


@given(num_data=st.integers(1, 60), batch_size=st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_no_datum_is_left_over_alone(num_data, batch_size):
    batches = batches_of(torch.arange(num_data), batch_size, None, torch.device("cpu"))
    parts = [data.rows(index).data for data, index in batches.epoch(1)]
    assert sorted(torch.cat(parts).tolist()) == list(range(num_data))
    assert len(parts) == batches.per_epoch
    sizes = [len(part) for part in parts]
    ragged = [size for size in sizes if size != batch_size]
    assert len(ragged) <= 1
    assert ragged in ([], [num_data % batch_size], [batch_size + 1])
    assert (1 in sizes) == (num_data == 1 or batch_size == 1)


def normed():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8))
    return make()[0], pv.guides.MeanFieldNormal(net, 2, num_features=8)


@pytest.mark.parametrize(("num_data", "batch_size"), [(21, 10), (11, 10), (3, 2), (201, None)])
def test_a_datum_left_over_trains_with_batch_norm(num_data, batch_size):
    pair = normed()
    result = pv.fit(*pair, binary(num_data), batch_size=batch_size, epochs=2, progress=False)
    full = num_data // (batch_size or 200)
    assert result.num_steps == 2 * full
    assert pair[1].encoder_net[2].num_batches_tracked == 2 * full


def test_a_loader_that_leaves_one_over_is_told_what_to_do():
    with pytest.raises(ValueError, match=r"BatchNorm got a batch of a single datum.*drop_last=True"):
        pv.fit(*normed(), DataLoader(list(binary(21)), 10), epochs=1, progress=False)
    pv.fit(*normed(), DataLoader(list(binary(21)), 10, drop_last=True), epochs=1, progress=False)


def fixed(x):
    loc = pyro.param("loc", torch.zeros(3))
    with pyro.plate("d", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    "transform",
    [lambda x: torch.cat([x, x, x]), lambda x: x[::2], lambda x: x[:1], lambda x: x.repeat_interleave(2, 0)],
)
@pytest.mark.parametrize("batch_size", [4, 7, 20])
def test_a_transform_that_makes_another_number_of_rows(transform, batch_size):
    """The history is per row that the programs were given: of rows that are all alike, the same as without."""
    row = torch.tensor([0.5, -1.0, 2.0])
    exact = dist.Normal(0.0, 1.0).log_prob(row).sum().item()
    result = pv.fit(
        fixed,
        lambda x: None,
        row.expand(20, 3).clone(),
        epochs=2,
        batch_size=batch_size,
        transform=transform,
        learning_rate=1e-12,
        progress=False,
    )
    for name in ("objective", "elbo", "reconstruction"):
        assert [epoch[name] for epoch in result.history] == pytest.approx([exact, exact], rel=1e-6)


def test_a_bad_datum_among_more_rows_is_found():
    x = torch.randn(20, 3)
    x[13] = torch.nan
    with pytest.raises(NotFiniteError, match="the data themselves are not finite, for train") as caught:
        pv.fit(fixed, lambda x: None, x, batch_size=20, transform=lambda x: torch.cat([x, x]), progress=False)
    assert 13 in caught.value.index


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (None, "NoneType"),
        ((1, 2), "tuple of numbers"),
        (torch.tensor(1.0), r"shape \(\)"),
        ([[1.0]], "list"),
    ],
)
def test_a_transform_that_makes_no_data(made, found):
    with pytest.raises((TypeError, ValueError), match=f"the result of transform must .*{found}"):
        pv.fit(fixed, lambda x: None, torch.randn(20, 3), transform=lambda x: made, progress=False)


class UsedUp(IterableDataset):
    """Its iterator ends with the first epochs."""

    def __init__(self, num_epochs):
        rows = [row for _ in range(num_epochs) for row in torch.randn(20, 3)]
        self.rows, self.left = iter(rows), num_epochs

    def __iter__(self):
        return itertools.islice(self.rows, 20)

    def __len__(self):
        return 20


@pytest.mark.parametrize("num_epochs", [0, 1, 2])
def test_a_stream_that_is_used_up(num_epochs):
    with pytest.raises(ValueError, match=rf"gave no batch in epoch {num_epochs + 1}: .*must start again"):
        pv.fit(fixed, lambda x: None, DataLoader(UsedUp(num_epochs), batch_size=5), epochs=3, progress=False)
