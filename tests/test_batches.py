"""Training on a `DataLoader`: the batches of a tensor in memory, read from elsewhere, give the same training bit for bit."""

import re

import pytest
import torch
from test_resume import Killed, killed_after
from test_training import binary, make, parameters, same
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

import pyrovae as pv
from pyrovae.programs.extract import Extracted
from pyrovae.training.numbers import NotFiniteError


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
    """With a ragged last batch, images alone or with their labels, in this process or a worker."""
    images = binary(33)
    expected = train(images, batch_size=10, compile=compile)
    for dataset in (TensorDataset(images, torch.arange(33)), list(images)):
        found = train(loader(dataset, num_workers=workers), compile=compile)
        assert same(expected[0], found[0])
        assert expected[1] == found[1]


@pytest.mark.usefixtures("uncompiled")
def test_full_batches_share_one_recording(monkeypatch):
    recordings = []
    original = Extracted._record
    monkeypatch.setattr(Extracted, "_record", lambda *a: recordings.append(1) or original(*a))
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


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (lambda: loader(list(binary(20))), {"batch_size": 10}, "leave it out"),
        (lambda: DataLoader(Endless(), batch_size=5), {}, "without a length"),
        (lambda: loader(list(binary(3)), drop_last=True), {}, "at least one batch"),
        (lambda: DataLoader(Named(), batch_size=2), {}, "must be a tensor of data, or begin with one, found dict"),
        (lambda: list(binary(20)), {}, "train must be"),
    ],
)
def test_refuses(data, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pv.fit(*make(), data(), epochs=1, progress=False, **options)
