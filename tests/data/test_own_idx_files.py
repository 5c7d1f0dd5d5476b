"""Images of one's own in MNIST's layout: files that do not belong together, are too few, or lie elsewhere."""

import gzip
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.idx import no_network, write_idx

import pyrovae as pv

NAMES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def write_all(raw, num_train=10_050, num_test=30, size=(4, 3), labels=(None, None), test_size=None):
    for part, count, num_labels, pixels in (
        ("train", num_train, labels[0], size),
        ("t10k", num_test, labels[1], test_size or size),
    ):
        images = torch.randint(0, 256, (count, *pixels), dtype=torch.uint8)
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(
            raw / f"{part}-labels-idx1-ubyte",
            torch.zeros(count if num_labels is None else num_labels, dtype=torch.uint8),
        )


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "MNIST/raw"


def test_own_images_are_loaded(tmp_path, raw):
    write_all(raw)
    data = pv.data.mnist(tmp_path, binarization=None)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [50, 10_000, 30]
    assert data.data_shape == (1, 4, 3)


@pytest.mark.parametrize("num_train", [1, 9_999, 10_000])
def test_too_few_to_keep_any_for_validation(tmp_path, raw, num_train):
    write_all(raw, num_train)
    with pytest.raises(
        ValueError,
        match=rf"mnist: found {num_train:,} training images, but needs more than 10,000.*train_on_all=True",
    ):
        pv.data.mnist(tmp_path)
    assert len(pv.data.mnist(tmp_path, train_on_all=True).train) == num_train


@settings(max_examples=25, deadline=None)
@given(counts=st.tuples(*[st.integers(1, 40)] * 4))
def test_a_label_for_each_image(counts, tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    train, labels, test, test_labels = counts
    write_all(root / "MNIST/raw", train, test, labels=(labels, test_labels))
    if train == labels and test == test_labels:
        assert len(pv.data.mnist(root, train_on_all=True).test_labels) == test
        return
    part, images, number = ("train", train, labels) if train != labels else ("t10k", test, test_labels)
    match = rf"{part}-images-idx3-ubyte holds {images} images and .*{part}-labels-idx1-ubyte {number} labels: use matching files"
    with pytest.raises(ValueError, match=match):
        pv.data.mnist(root, train_on_all=True)


def test_parts_that_do_not_belong_together(tmp_path, raw):
    write_all(raw, test_size=(3, 4))
    with pytest.raises(
        ValueError, match=r"train-images.* of \(4, 3\) pixels and .*t10k-images.* of \(3, 4\): use images of one size"
    ):
        pv.data.mnist(tmp_path)
    write_all(raw, num_test=0)
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte holds no images, \(0, 4, 3\)"):
        pv.data.mnist(tmp_path)
    write_all(raw, num_train=0)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte holds no images"):
        pv.data.mnist(tmp_path, train_on_all=True)


# How each of the four files may be called, and where they may lie, below the data folder.
SPELLINGS = {
    "dot": lambda name: name.replace("-idx", ".idx"),
    "underscores": lambda name: name.replace("-", "_"),
    "test": lambda name: name.replace("t10k", "test"),
    "capitals": str.upper,
    "extension": lambda name: f"{name}.idx",
    "its own": lambda name: name,
}
PLACES = ["", "raw", "MNIST", "mnist", "MNIST/raw", "mnist/raw", "MNIST/raw/more"]


@pytest.mark.parametrize(
    ("spelling", "place"),
    [case for case in itertools.product(SPELLINGS, PLACES) if case != ("its own", "MNIST/raw")],
)
@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_files_elsewhere_are_named(tmp_path, raw, monkeypatch, spelling, place, name):
    no_network(monkeypatch)
    folder = tmp_path / place
    write_all(folder, 12, 3)
    moves = [(folder / SPELLINGS[spelling](file), raw / file) for file in NAMES]
    for file, (source, _) in zip(NAMES, moves, strict=True):
        (folder / file).rename(source)
    with pytest.raises(ValueError, match="MNIST must be in .*MNIST/raw") as caught:
        pv.data.load(name, tmp_path)
    assert "network" not in str(caught.value)
    raw.mkdir(parents=True, exist_ok=True)
    for source, target in moves:
        if source == target:
            continue
        verb = "rename" if place == "MNIST/raw" else "move"
        assert f"{verb} {source} to {target}" in str(caught.value)
        source.rename(target)
    assert len(pv.data.mnist(tmp_path, train_on_all=True).train) == 12, "the advice helps"


@pytest.mark.parametrize("end", [".gz", ""])
def test_compressed_files_are_named(tmp_path, raw, monkeypatch, end):
    no_network(monkeypatch)
    write_all(raw, 12, 3)
    for file in NAMES:
        content = gzip.compress((raw / file).read_bytes())
        (raw / file).unlink()
        (raw / f"{file}{end}").write_bytes(content)
    with pytest.raises(ValueError, match=r"decompress.*gunzip") as caught:
        pv.data.mnist(tmp_path)
    assert str(raw / NAMES[0]) in str(caught.value)


def test_folders_of_the_names_of_their_files(tmp_path, raw, monkeypatch):
    no_network(monkeypatch)
    for file in NAMES:
        write_all(tmp_path / "unpacked", 12, 3)
        (raw / file).mkdir(parents=True)
        (tmp_path / "unpacked" / file).rename(raw / file / file)
    match = f"move [^;]*/{NAMES[0]}/{NAMES[0]} out of the folder [^;]*/{NAMES[0]}, delete the folder, and give the file the folder's name"
    with pytest.raises(ValueError, match=match):
        pv.data.mnist(tmp_path)


@pytest.mark.parametrize("depth", ["MNIST", "MNIST/raw"])
def test_a_folder_too_deep_is_named(tmp_path, raw, depth, monkeypatch):
    no_network(monkeypatch)
    write_all(raw, 12, 3)
    with pytest.raises(ValueError, match=rf"is found with root={re.escape(str(tmp_path))} \(root=, --data-dir"):
        pv.data.mnist(tmp_path / depth)


def test_own_files_are_not_written_over(tmp_path, raw, monkeypatch):
    """torchvision downloads all four, however many are there."""
    no_network(monkeypatch)
    write_all(raw, 12, 3)
    for file in (raw / NAMES[2], raw / NAMES[3]):
        file.unlink()
    with pytest.raises(ValueError, match=r"holds 12 data of your own, but .*t10k-images-idx3-ubyte.* missing"):
        pv.data.mnist(tmp_path)


@pytest.mark.parametrize("name", ["fashion", "kmnist"])
def test_files_of_other_data_sets_are_theirs(tmp_path, raw, name, monkeypatch):
    no_network(monkeypatch)
    write_all(raw, 12, 3)
    with pytest.raises(pv.data.DataUnavailableError, match="cannot be downloaded"):
        pv.data.load(name, tmp_path)


@pytest.mark.parametrize("between", ["data", "datasets", "my files"])
def test_a_root_that_is_too_high(tmp_path, monkeypatch, between):
    no_network(monkeypatch)
    write_all(tmp_path / between / "MNIST/raw", 12, 3)
    with pytest.raises(ValueError, match=f"found with root={re.escape(str(tmp_path / between))} "):
        pv.data.mnist(tmp_path)
    assert len(pv.data.mnist(tmp_path / between, train_on_all=True).train) == 12
