"""Data sets: splits, binarisation, seeds, and files that are not what they should be."""

import gzip
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shared.idx import no_network, write_idx

import pyrovae as pv
from pyrovae.data import DataUnavailableError, Splits, binarize, data_dir, dequantize


@pytest.fixture
def fake_mnist(tmp_path):
    """MNIST's four files with few distinct images, at the sizes of the real ones."""
    raw = tmp_path / "MNIST/raw"
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images = torch.randint(0, 256, (100, 28, 28), dtype=torch.uint8).repeat(count // 100, 1, 1)
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", torch.arange(count).remainder(10).to(torch.uint8))
    return tmp_path


def test_digits_need_no_files():
    data = pv.data.digits()
    assert data.train.shape == (1197, 1, 8, 8)
    assert data.validation.shape == data.test.shape == (300, 1, 8, 8)
    assert data.data_shape == (1, 8, 8)
    assert 0 <= data.train.min() < data.train.max() <= 1
    assert set(data.test.unique().tolist()) == {0.0, 1.0}
    assert data.transform is binarize
    assert torch.equal(pv.data.digits().test, data.test)
    everything = pv.data.digits(train_on_all=True)
    assert len(everything.train) == 1497
    assert everything.validation is None
    assert torch.equal(everything.test, data.test), "the test set does not depend on the other splits"


def test_mnist_splits(fake_mnist):
    data = pv.data.mnist(fake_mnist)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [50_000, 10_000, 10_000]
    assert data.train.shape[1:] == (1, 28, 28)
    assert data.train_labels[:3].tolist() == [0, 1, 2]
    everything = pv.data.mnist(fake_mnist, train_on_all=True)
    assert len(everything.train) == 60_000
    assert everything.validation is None
    assert torch.equal(everything.test, data.test)


def test_real_mnist(mnist_root):
    data = pv.data.mnist(mnist_root, binarization=None)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [50_000, 10_000, 10_000]
    everything = pv.data.mnist(mnist_root, binarization=None, train_on_all=True).train
    assert everything.mean().item() == pytest.approx(0.1307, abs=5e-5)  # the mean that every tutorial subtracts
    assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_binarization():
    grey = pv.data.digits(binarization=None)
    assert grey.transform is None
    static, dynamic = grey.binarized("static", 3), grey.binarized("dynamic", 3)
    assert set(static.train.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(dynamic.train, grey.train)
    assert torch.equal(static.test, dynamic.test)
    assert not torch.equal(static.test, grey.binarized("static", 4).test)
    torch.manual_seed(1)
    assert torch.equal(grey.binarized("dynamic", 3).test, dynamic.test), "apart from the training seed"
    with pytest.raises(ValueError, match="'dynamic', 'static' or None, found 'both'"):
        grey.binarized("both")
    with pytest.raises(ValueError, match="already binarised"):
        static.binarized("static")


def test_binarize_draws_with_the_grey_values():
    grey = torch.tensor([0.0, 0.2, 0.7, 1.0]).expand(100_000, 4)
    mean = binarize(grey).mean(0)
    assert mean[0] == 0
    assert mean[3] == 1
    assert torch.allclose(mean, grey[0], atol=4.5 * 0.5 / 100_000**0.5)


def test_grey_levels_and_dequantisation():
    grey = pv.data.digits(binarization=None)
    assert grey.num_levels == 17
    likelihood = pv.likelihoods.DiscretizedLogistic(torch.nn.Identity(), grey.data_shape, num_levels=17)
    for part in (grey.train, grey.validation, grey.test):
        likelihood.check(part)
    assert grey.binarized().num_levels == 2
    continuous = grey.dequantized(3)
    assert torch.equal(continuous.train, grey.train), "redrawn at every use"
    for drawn, images in (
        (continuous.transform(grey.train), grey.train),
        (continuous.test, grey.test),
        (continuous.validation, grey.validation),
    ):
        assert torch.equal((drawn * 17).floor(), (images * 16).round()), "each within its level"
        assert 0 <= drawn.min() <= drawn.max() < 1
    assert continuous.test.unique().numel() > 10_000
    assert torch.equal(continuous.test, grey.dequantized(3).test)
    assert not torch.equal(continuous.test, grey.dequantized(4).test)
    assert (continuous.num_levels, continuous.is_dequantized, continuous.data_seed) == (17, True, 3)
    with pytest.raises(ValueError, match="already dequantised"):
        continuous.binarized()
    with pytest.raises(ValueError, match="already binarised"):
        grey.binarized("static").dequantized()


def test_dequantize_draws_evenly():
    uniform = dequantize(torch.full((100_000,), 5 / 255)).mul(256).sub(5)
    assert 0 <= uniform.min() <= uniform.max() <= 1
    for power in (1, 2):
        assert uniform.pow(power).mean().item() == pytest.approx(1 / (power + 1), abs=4.5 * 0.3 / 100_000**0.5)


@pytest.fixture
def fake_frey(tmp_path):
    np.savez(tmp_path / "freyfaces.npz", images=np.arange(1965 * 560).reshape(1965, 28, 20).astype(np.uint8))
    return tmp_path


def test_frey_faces(fake_frey):
    data = pv.data.load("freyfaces", fake_frey)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1565, 200, 200]
    assert (data.data_shape, data.num_levels, data.transform) == ((1, 28, 20), 256, None)
    assert data.train_labels is data.validation_labels is data.test_labels is None
    likelihood = pv.likelihoods.DiscretizedLogistic(torch.nn.Identity(), data.data_shape)
    likelihood.check(data.test)
    # Every image once, with its rows and columns where they were.
    everything = torch.cat([data.train, data.validation, data.test]).mul(255).round()
    assert (everything.flatten(1).diff() % 256 == 1).all()
    again = pv.data.frey_faces(fake_frey, train_on_all=True)
    assert len(again.train) == 1765
    assert again.validation is None
    assert torch.equal(again.test, data.test)
    assert set(pv.data.frey_faces(fake_frey, binarization="static").train.unique().tolist()) == {0.0, 1.0}


def test_real_frey_faces():
    root = os.environ.get("PYROVAE_DATA", "")
    if not (Path(root) / "freyfaces.npz").exists():
        pytest.skip(f"needs Frey faces: $PYROVAE_DATA={root!r} holds no freyfaces.npz")
    data = pv.data.frey_faces(root)
    assert torch.cat([data.train, data.validation, data.test]).mean().item() * 255 == pytest.approx(154.461, abs=1e-3)


@pytest.mark.parametrize("damage", ["absent", "truncated", "empty", "other array", "other shape", "other type"])
def test_frey_faces_that_are_not(fake_frey, damage):
    path = fake_frey / "freyfaces.npz"
    if damage == "absent":
        path.unlink()
        with pytest.raises(DataUnavailableError, match="not in .*put freyfaces.npz there.*--data-dir"):
            pv.data.frey_faces(fake_frey)
        return
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other array":
        np.savez(path, faces=np.zeros((1965, 28, 20), np.uint8))
    elif damage == "other shape":
        np.savez(path, images=np.zeros((1965, 560), np.uint8))
    else:
        np.savez(path, images=np.zeros((1965, 28, 20)))
    with pytest.raises(ValueError, match="freyfaces.npz"):
        pv.data.frey_faces(fake_frey)


def test_auto_goes_on_with_digits_and_says_so(tmp_path, monkeypatch, caplog):
    no_network(monkeypatch)
    with caplog.at_level(logging.WARNING, "pyrovae"):
        data = pv.data.load("auto", tmp_path)
    assert data.name == "digits"
    assert len(caplog.records) == 1
    assert str(tmp_path) in caplog.text
    assert "digits" in caplog.text


@pytest.mark.parametrize("name", ["mnist", "fashion", "kmnist"])
def test_an_explicit_name_without_data_is_an_error(name, tmp_path, monkeypatch):
    no_network(monkeypatch)
    with pytest.raises(DataUnavailableError, match="cannot be downloaded.*--data-dir"):
        pv.data.load(name, tmp_path)


def test_auto_takes_mnist_where_it_is(fake_mnist):
    assert pv.data.load("auto", fake_mnist).name == "mnist"
    assert isinstance(pv.data.load("digits"), Splits)
    with pytest.raises(ValueError, match="choose one of auto, mnist, fashion, kmnist, digits, freyfaces"):
        pv.data.load("cifar")


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "gzipped", "labels for images"])
def test_damaged_files_are_named(fake_mnist, damage):
    path = fake_mnist / "MNIST/raw/train-images-idx3-ubyte"
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-1000])
    elif damage == "longer":
        path.write_bytes(content + b"x")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "gzipped":
        path.write_bytes(gzip.compress(content[:10_000]))
    else:
        shutil.copy(path.with_name("train-labels-idx1-ubyte"), path)
    for name in ("mnist", "auto"):
        with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
            pv.data.load(name, fake_mnist)


def test_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path / "a"))
    assert data_dir() == tmp_path / "a"
    assert data_dir(tmp_path / "b") == tmp_path / "b"
    monkeypatch.setenv("PYROVAE_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_dir() == tmp_path / "cache/pyrovae"


@pytest.mark.parametrize("origin", ["root", "environment"])
@pytest.mark.parametrize("name", ["mnist", "kmnist", "freyfaces"])
def test_a_misspelt_folder_is_named_and_not_made(name, origin, tmp_path, monkeypatch, caplog):
    no_network(monkeypatch)
    folder, root = tmp_path / "mispelt", None
    if origin == "root":
        root = folder
    else:
        monkeypatch.setenv("PYROVAE_DATA", str(folder))
    where = {"root": r"\(root, --data-dir\)", "environment": r"\(\$PYROVAE_DATA\)"}[origin]
    with pytest.raises(DataUnavailableError, match=rf"mispelt {where} does not exist: make it, or correct its name"):
        pv.data.load(name, root)
    with caplog.at_level(logging.WARNING, "pyrovae"):
        assert pv.data.load("auto", root).name == "digits"
    assert len(caplog.records) == 1
    assert "mispelt" in caplog.text
    assert "does not exist" in caplog.text
    assert "using scikit-learn's embedded 8x8 digits instead" in caplog.text
    assert not folder.exists()


def test_the_default_cache_is_made(tmp_path, monkeypatch):
    no_network(monkeypatch)
    monkeypatch.delenv("PYROVAE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataUnavailableError, match="cannot be downloaded"):
        pv.data.mnist()
    assert (tmp_path / "cache/pyrovae").is_dir()


def test_a_data_set_says_what_it_is():
    data = pv.data.digits()
    assert repr(data) == "Splits(digits: 1,197 train, 300 validation, 300 test images of 1x8x8, binary (dynamic))"
    grey = pv.data.digits(binarization=None)
    assert repr(grey).endswith("17 grey levels)")
    assert repr(grey.dequantized()).endswith("17 grey levels, dequantised)")


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("change", ["short", "long", "no images"])
def test_a_label_for_each_image_of_a_part(part, change):
    data = pv.data.digits()
    labels = getattr(data, f"{part}_labels")
    changed = {f"{part}_labels": torch.zeros(3) if change == "short" else torch.cat([labels, labels])}
    if change == "no images":
        data, changed = replace(data, validation_labels=None), {"validation": None, "validation_labels": labels}
        part = "validation"
    num = 0 if change == "no images" else len(labels)
    with pytest.raises(
        ValueError, match=f"'digits' has {num:,} {part} images and .* {part} labels: give a label for each"
    ):
        replace(data, **changed)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("change", [lambda x: 255 * x, lambda x: 2 * x - 1, lambda x: x / 0])
def test_images_that_stay_grey_are_looked_at(part, change):
    data = pv.data.digits(binarization=None)
    changed = replace(data, **{part: change(getattr(data, part))})
    with pytest.raises(ValueError, match=rf"the {part} images of 'digits' must be values in \[0, 1\]"):
        changed.binarized(None)
    assert data.binarized(None) is data


@pytest.mark.parametrize("name", ["digits", "auto"])
def test_a_draw_of_other_data_sets(name, tmp_path, monkeypatch):
    """None is the default of all of them; the published one is of MNIST."""
    no_network(monkeypatch)
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    assert len(pv.data.load(name, draw=None).test) == 300
    with pytest.raises((ValueError, DataUnavailableError)):
        pv.data.load(name, draw="seed-777")
    with pytest.raises(ValueError, match="digits has none"):
        pv.data.load("digits", draw="seed-777")
