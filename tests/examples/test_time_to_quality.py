"""Time to quality: the clock, the weights that each library hands over, the seconds to a mark."""

import json
import sys
from pathlib import Path

import pytest
import torch

import pyrovae as pv

FOLDER = Path(__file__).parents[2] / "examples/reproductions"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import time_to_quality

    return time_to_quality


@pytest.fixture
def trainers(quality):
    return quality.trainers


@pytest.fixture
def grey():
    return torch.rand(300, 784) ** 4


def measured(states, x):
    """(posterior, logits at its mean) of our pair with the weights that were handed over."""
    import trainers

    model, guide = trainers.pair()
    model.load_state_dict(states["model"])
    guide.load_state_dict(states["guide"])
    with torch.no_grad():
        posterior = guide.posterior(x)
        return posterior, model.likelihood(posterior.mean).base_dist.logits


def same(found, loc, log_scale, pixels):
    posterior, logits = found
    torch.testing.assert_close(posterior.mean, loc, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(posterior.base_dist.scale.log(), log_scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.sigmoid(), pixels, rtol=1e-4, atol=1e-5)


class Always:
    """Snapshots that keep the first one they are offered."""

    def __init__(self, enough):
        self.enough, self.found = enough, None

    def look(self, export, last=False):
        self.found = export()
        if not last:
            raise self.enough


def test_weights_of_pyro(trainers, grey):
    vae = trainers.programs.PyroVAE("deep", grey)
    with torch.no_grad():
        loc, scale = vae.encode(grey)
        same(measured(trainers.from_pyro(vae), grey), loc, scale.log(), vae.decoder(loc).sigmoid())


def test_weights_of_pythae(trainers, grey):
    pytest.importorskip("pythae")
    vae = trainers.programs.pythae_vae(grey, "deep")
    with torch.no_grad():
        code = vae.encoder(grey)
        pixels = vae.decoder(code.embedding).reconstruction
    same(measured(trainers.from_pythae(vae), grey), code.embedding, code.log_covariance / 2, pixels)


def test_weights_of_numpyro(trainers, grey):
    """Its densities at its parameters, against ours: the NLL of a step of both under a guide nearly a point."""
    pytest.importorskip("numpyro")
    import jax.numpy as jnp

    state, run, parameters = trainers.programs.numpyro_epoch(grey, 100, "deep", dynamic=True)
    _, state = run(state)
    found = parameters(state)

    def applied(layers, x):
        """The network again, by hand."""
        for layer in layers:
            if len(layer) == 0:
                x = x / (1 + jnp.exp(-x))
            elif layer[0].ndim == 2:
                x = x @ layer[0] + layer[1]
            else:
                x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * layer[0] + layer[1]
        return x

    heads = torch.as_tensor(jnp.array(applied(found["encoder$params"], jnp.asarray(grey.numpy()))).tolist())
    loc, log_scale = heads.chunk(2, -1)
    logits = torch.as_tensor(applied(found["decoder$params"], jnp.asarray(loc.numpy())).tolist())
    same(measured(trainers.from_numpyro(found), grey), loc, log_scale, logits.sigmoid())


@pytest.mark.parametrize("library", ["pyrovae", "pyro", "numpyro", "pythae"])
def test_each_library_trains(trainers, grey, library):
    if trainers.missing_package(library):
        pytest.skip(f"needs {trainers.missing_package(library)}")
    snapshots = Always(trainers.Enough)
    with pytest.raises(trainers.Enough):
        trainers.TRAINERS[library](grey, snapshots, 1)
    posterior, logits = measured(snapshots.found, pv.data.binarize(grey))
    assert posterior.mean.shape == (300, 40)
    assert logits.isfinite().all()


def test_the_clock_stands_still_while_weights_are_written(trainers, monkeypatch, tmp_path):
    now = 100.0
    monkeypatch.setattr(trainers, "cpu_seconds", lambda: now)
    snapshots = trainers.Snapshots(tmp_path, budget=20.0, first=5.0)

    def export():
        nonlocal now
        now += 1000.0  # which takes long
        return {"model": {}, "guide": {}}

    def train(seconds):
        nonlocal now
        now += seconds
        snapshots.look(export)

    train(4.0)
    train(2.0)  # 6: due since 5
    train(1.0)  # 7: the next is due at 7.5
    train(1.0)
    with pytest.raises(trainers.Enough):
        train(14.0)
    seconds = [torch.load(path)["seconds"] for path in sorted(tmp_path.glob("*.pt"))]
    assert seconds == [6.0, 8.0, 22.0]


def test_seconds_to_a_mark(quality):
    curve = [{"seconds": s, "nll": nll} for s, nll in ((10.0, 92.0), (40.0, 88.0), (50.0, 88.5), (60.0, 86.76))]
    found = quality.times(curve)
    assert found["90"] == pytest.approx(20.0)
    assert found["88"] == pytest.approx(40.0)
    assert found["86.76"] == pytest.approx(60.0)
    assert found["85"] is None
    assert quality.times(curve[1:])["90"] == 40.0


def test_table_and_figure(quality, tmp_path):
    def curve(*nll):
        return [{"seconds": 10.0 * 2**i, "wall": 1.0, "nll": n, "nll_stderr": 0.5} for i, n in enumerate(nll)]

    curves = {"pyrovae-40": curve(92, 89), "pyrovae-200": curve(95, 91, 84), "pyro": curve(99, 91)}
    content = {
        "curves": curves,
        "marks": {name: quality.times(points) for name, points in curves.items()},
        **{"num_particles": 5, "num_test": 7, "budget_seconds": 40.0, "processor": "a CPU", "command": "python x"},
    }
    table = quality.table(content)
    assert "| pyrovae, the best of its runs | 16 | 27 | 30 | 36 | 84.00 | 40 s |" in table
    assert "| pyrovae, 40 epochs | 16 | - | - | - | 89.00 | 20 s |" in table
    assert "| Pyro as in its example | - | - | - | - | 91.00 | 20 s |" in table
    axes = quality.draw(curves)
    assert len(axes.get_legend().get_texts()) == 3
    assert axes.get_xscale() == "log"
    styles = {(line.get_linestyle(), line.get_marker()) for line in axes.get_lines() if line.get_marker() != "None"}
    assert len(styles) == 3  # told apart in grey


@pytest.mark.slow
def test_all_of_it(quality, mnist_root, tmp_path, monkeypatch, capsys):
    words = ["--libraries", "pyrovae", "pyro", "--our-epochs", 1, "--epochs", 1, "--seconds", 1, "--num-test", 20]
    words += ["--num-particles", 10, "--data-dir", mnist_root, "--out", tmp_path / "time"]
    monkeypatch.setattr(sys, "argv", ["time_to_quality.py", *map(str, words)])
    quality.main()
    content = json.loads((tmp_path / "time/time_to_quality.json").read_text())
    assert content["curves"].keys() == content["marks"].keys() == {"pyrovae-1", "pyro"}
    assert str(tmp_path) not in json.dumps(content)
    assert str(mnist_root) not in json.dumps(content)
    for points in content["curves"].values():
        assert 80 < points[-1]["nll"] < 600
        assert points[-1]["seconds"] > 0
    assert (tmp_path / "time/time_to_quality.png").stat().st_size > 1000
