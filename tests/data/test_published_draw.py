"""The published binary validation and test images of MNIST."""

import hashlib

import numpy as np
import pytest
import torch
from pyro.util import get_rng_state

import pyrovae as pv
from pyrovae.data import DataUnavailableError, Splits, binarize

# SHA-256 of the images as bytes 0 and 1.
DIGESTS = {
    "validation": "bf03dc576557652dfc5251be95c792c593a5003e0b9704bd4688048b34b12723",
    "test": "a700b0d972959b58f1603f074199fd8e80fa8cb858cbf1a908eaaf1b93e1117a",
}


@pytest.fixture
def grey():
    """A small data set with every grey level, in no order."""
    levels = torch.arange(256).repeat(14)[torch.randperm(256 * 14)].float().div(255).reshape(14, 1, 16, 16)
    return Splits("grey", levels[:4], levels[4:8], levels[8:], None, None, None)


def test_digests_of_mnist(mnist_root):
    data = pv.data.mnist(mnist_root, draw="seed-777")
    found = {
        part: hashlib.sha256(getattr(data, part).numpy().astype(np.uint8).tobytes()).hexdigest() for part in DIGESTS
    }
    assert found == DIGESTS
    levels = pv.data.mnist(mnist_root, binarization=None)
    assert torch.equal(data.train, levels.train)
    assert torch.equal(data.test_labels, levels.test_labels)


def test_one_uniform_number_for_each_pixel(grey):
    """The draw by its definition, inversion of a single uniform number, with the validation images first."""
    probability = torch.cat([grey.validation, grey.test]).double().numpy()
    uniform = np.random.RandomState(777).random_sample(probability.shape)
    expected = np.where(probability <= 0.5, uniform > 1 - probability, uniform <= probability)
    data = grey.binarized(draw="seed-777")
    assert torch.cat([data.validation, data.test]).numpy().tolist() == expected.astype(float).tolist()


def test_a_published_draw_says_so(grey):
    before = get_rng_state()["numpy"][1].tolist()
    data = grey.binarized(draw="seed-777")
    assert get_rng_state()["numpy"][1].tolist() == before
    assert (data.draw, data.data_seed, data.binarization, data.num_levels) == ("seed-777", None, "dynamic", 2)
    assert data.transform is binarize
    assert data.test.dtype == grey.test.dtype
    assert torch.equal(data.train, grey.train)
    assert grey.binarized().draw is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draw": "seed-778"}, "draw must be 'seed-777' or None, found 'seed-778'"),
        ({"draw": "seed-777", "binarization": "static"}, "binarization='static' and data_seed=0: leave both out"),
        ({"draw": "seed-777", "binarization": None}, "binarization=None and data_seed=0: leave both out"),
        ({"draw": "seed-777", "data_seed": 1}, "data_seed=1: leave both out"),
    ],
)
def test_arguments_that_exclude_each_other(grey, arguments, message):
    with pytest.raises(ValueError, match=message):
        grey.binarized(**arguments)


def test_no_draw_without_validation_images(grey):
    everything = Splits("grey", grey.train, None, grey.test, None, None, None)
    with pytest.raises(ValueError, match="'grey' has none: set train_on_all=False"):
        everything.binarized(draw="seed-777")


def test_digits_do_not_replace_published_images(tmp_path, monkeypatch):
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path / "missing"))
    with pytest.raises(DataUnavailableError):
        pv.data.load("auto", draw="seed-777")
