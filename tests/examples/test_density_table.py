"""The table of density estimates: its rows run, its numbers are stored, a stopped run goes on, the table holds them."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pyro.infer import Trace_ELBO

import pyrovae as pv

FOLDER = Path(__file__).parents[2] / "examples/reproductions"
FIELDS = {
    *(
        "row",
        "nll",
        "nll_stderr",
        "sample_stderr",
        "mc_stderr",
        "bias_estimate",
        "elbo",
        "gap",
        "active_units",
        "share_of_k_too_high",
    ),
    *("particles", "test_images", "ais", "published", "target", "binarisation", "data_seed", "training_size", "seed"),
    *("device", "processor", "threads", "seconds", "versions", "git_revision", "command", "training", "model", "guide"),
}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import density_estimates
    import density_table

    monkeypatch.setattr(density_estimates, "NUM_CHAINS", 2)
    monkeypatch.setattr(density_estimates, "NUM_TEMPERATURES", 5)
    return density_table


@pytest.fixture
def run(table, monkeypatch, tmp_path):
    """The script with these words and small settings: the result of its row, from a folder."""

    def run(row, *words, folder="results"):
        small = ("--dataset", "digits", "--epochs", "1", "--particles", "30", "--images", "40", "--ais-images", "3")
        where = ("--runs", str(tmp_path / f"{folder}-runs"), "--results", str(tmp_path / folder), "--quiet")
        monkeypatch.setattr(sys, "argv", ["density_table.py", row, *small, *words, *where])
        table.main()
        name = row if "--seed" not in words else f"{row}-seed{words[words.index('--seed') + 1]}"
        return json.loads((tmp_path / folder / f"{name}.json").read_text())

    return run


def test_a_row_and_its_table(run, short_pilots, table, tmp_path, capsys):
    result = run("mlp300-standard")
    assert result.keys() >= FIELDS
    assert result["row"] == "mlp300-standard"
    assert result["nll"] == pytest.approx(-result["elbo"] - result["gap"])
    assert result["particles"] == 30
    assert (result["test_images"], result["of_test_images"], result["training_size"]) == (40, 300, 1197)
    assert result["training"]["epochs"] == 1
    assert (
        result["training"]["git_revision"] == result["git_revision"]
    )  # of the training, which a later evaluation keeps
    assert result["ais"]["images"] == 3
    assert result["seconds"]["training_cpu"] > 0
    assert str(tmp_path) not in json.dumps(result)  # no machine's paths
    run("mlp300-standard", "--seed", "1", "--ais-images", "0", "--table")
    written = (tmp_path / "results/density.md").read_text()
    row = "| MLP 300-300, standard normal prior (digits, 40 images, 30 particles, 1 epochs) |"
    assert f"{row} {result['nll']:.2f} ± {result['nll_stderr']:.2f} ± " in written
    assert "(seed 1, digits, 40 images, 30 particles, 1 epochs)" in written
    assert (
        "| residual, NSF prior and guide (`resnet-nsf-nsf`) | 79.00 | 79.63 | needs a GPU; none was available |"
        in written
    )
    assert "(`mlp300-standard`)" not in written  # run, so not among those that were not
    assert "(`mlp300-vamp`) | 82.40 | 82.43 | not yet |" in written


def test_all_images_from_a_sample_of_them(table, monkeypatch, tmp_path):
    """The difference estimator over repeated populations and samples: unbiased, its spread is what it says; all images: their mean."""
    import density_estimates

    class Bounds:
        def __init__(self, elbo, gap):
            self.elbo, self.gap = elbo, gap
            self.elbo_stderr = self.gap_stderr = torch.zeros(len(elbo))
            if gap is not None:
                self.mean, self.mean_stderr = (elbo + gap).mean().item(), (elbo + gap).std().item() / len(elbo) ** 0.5
                self.mean_mc_stderr = 0.0

        def __len__(self):
            return len(self.elbo)

    monkeypatch.setattr(density_estimates, "save", lambda path, lml, images: None)
    monkeypatch.setattr(density_estimates, "read", lambda path: Bounds(elbo, None))
    options, found = SimpleNamespace(seed=0), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        elbo = -90 + 20 * torch.randn(500, generator=generator)
        gap = 3 - 0.05 * (elbo + 90) + torch.rand(500, generator=generator)
        monkeypatch.setattr(pv, "log_marginal_likelihood", lambda *_, **__: None)
        sampled = Bounds(elbo[:100], gap[:100])
        result = density_estimates.of_all_images(options, tmp_path, None, None, elbo, sampled, lambda _: nullcontext())
        found.append(
            (-result["nll"], result["nll_stderr"], -result["nll"] - (elbo + gap).mean(), result["sample_stderr"])
        )
    estimate, stderr, error, sample_stderr = torch.tensor(found).T
    assert estimate.mean().item() == pytest.approx(-86.5, abs=4 * estimate.std().item() / 500**0.5)
    for errors, said in ((estimate, stderr), (error, sample_stderr)):  # the spread's own error is 1 / sqrt(2 x 500)
        assert errors.std().item() == pytest.approx(said.square().mean().sqrt().item(), rel=0.12)
    every = Bounds(elbo, gap)
    result = density_estimates.of_all_images(options, tmp_path, None, None, elbo, every, lambda _: nullcontext())
    assert -result["nll"] == pytest.approx((elbo + gap).mean().item())
    assert result["nll_stderr"] == pytest.approx((elbo + gap).std().item() / 500**0.5, rel=1e-4)
    assert result["sample_stderr"] == 0


def test_error_of_the_corrected_nll(table, monkeypatch, tmp_path):
    """The error that `sliced` gives is the spread of its estimates around the mean over all images."""
    density_estimates = sys.modules["density_estimates"]
    options = SimpleNamespace(seed=0, slice=20, quiet=True)
    generator = torch.Generator().manual_seed(0)
    errors, said = [], []
    for _ in range(500):
        gap = 3 + torch.rand(400, generator=generator)
        more = 0.2 * gap + 0.3 * torch.rand(400, generator=generator)
        annealed = SimpleNamespace(log_prob=more[:20], acceptance=torch.ones(20))
        monkeypatch.setattr(density_estimates, "kept", lambda *_, annealed=annealed: annealed)
        sampled = type("Sampled", (), {"log_prob": torch.zeros(100), "gap": gap[:100], "__len__": lambda _: 100})()
        nll = -gap[:100].mean().item()  # with an ELBO of 0
        found = density_estimates.sliced(
            options, tmp_path, None, None, torch.zeros(400, 1), sampled, nll, lambda _: None
        )
        errors.append(-found["nll"] - (gap + more).mean().item())
        said.append(found["sample_stderr"])
    errors, said = torch.tensor(errors), torch.tensor(said)
    assert errors.mean().item() == pytest.approx(0, abs=4 * errors.std().item() / 500**0.5)
    assert errors.std().item() == pytest.approx(said.square().mean().sqrt().item(), rel=0.12)


def test_a_stopped_run_goes_on(run, table, monkeypatch):
    """Stopped in training, in the evaluation and before the annealing: the numbers of a run that was not."""
    words = ("mlp300-vamp", "--epochs", "3", "--ais-images", "0")
    monkeypatch.setattr(sys.modules["density_estimates"], "IMAGES_PER_PIECE", 25)
    whole = run(*words)

    def stopped_after(calls, function):
        def stops(*args, **kwargs):
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return stops

    def fails(*args, **kwargs):
        raise AssertionError("done before")

    from pyrovae.training.state import TrainingState

    for module, name, calls in ((TrainingState, "finish_epoch", 2), (pv, "log_marginal_likelihood", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stopped_after(calls, getattr(module, name)))
            with pytest.raises(SystemExit, match="Stopped; the same command"):
                run(*words, folder="stopped")
    with monkeypatch.context() as patch:
        patch.setattr(pv, "fit", fails)
        patch.setattr(
            pv, "log_marginal_likelihood", stopped_after(2, pv.log_marginal_likelihood)
        )  # the second half, the bound
        stopped = run(*words, folder="stopped")
    for name in ("nll", "elbo", "mc_stderr", "active_units", "training"):
        assert stopped[name] == whole[name], name
    with pytest.raises(SystemExit, match="holds a run with"):
        run(*words[:1], "--epochs", "4", folder="stopped")


def test_a_training_in_two_parts(run, table, tmp_path):
    """A row that goes on from another takes its trained pair, trains it where that is not done, and leaves it as it is."""
    words = ("burda1-iwae5", "--ais-images", "0", "--table")
    first, last = ("trained.json", "training.pt")
    result = run(*words)
    before = {name: (tmp_path / "results-runs/burda1-vae" / name).read_bytes() for name in (first, last)}
    assert result["training"]["after"] == "burda1-vae"
    assert (
        "(digits, 40 images, 30 particles, 1 epochs, after those of `burda1-vae`)"
        in (tmp_path / "results/density.md").read_text()
    )
    vae = pv.load(tmp_path / "results-runs/burda1-vae/training.pt")
    iwae = pv.load(tmp_path / "results-runs/burda1-iwae5/training.pt")
    moved = [
        (a - b).abs().max().item() for a, b in zip(vae["model"].parameters(), iwae["model"].parameters(), strict=True)
    ]
    # Adam's steps are about as long as the rate at most, 1e-3; 15 of them were made.
    assert 0 < max(moved) <= 15 * 1.1e-3
    run("burda1-vae", "--ais-images", "0")
    assert (
        json.loads((tmp_path / "results-runs/burda1-iwae5/trained.json").read_text())["history"]["validation_bound"]
        is None
    )
    assert before == {name: (tmp_path / "results-runs/burda1-vae" / name).read_bytes() for name in (first, last)}
    (tmp_path / "results-runs/burda1-vae").rename(tmp_path / "away")
    assert run(*words)["nll"] == result["nll"]  # what is done needs its first part no more
    assert not (tmp_path / "results-runs/burda1-vae").exists()


def test_a_row_on_all_images_goes_on_from_one_on_fewer(run, table, monkeypatch):
    """Each is trained on images of its own; with a published draw, too, whose test images are the same for both."""
    fit, sizes = pv.fit, []

    def counted(model, guide, data, **settings):
        sizes.append((len(data), settings["validation"] is None))
        return fit(model, guide, data, **settings | {"compile": False})

    monkeypatch.setattr(pv, "fit", counted)
    result = run("gated300-maf-iwae-all", "--ais-images", "0")
    assert sizes == [(1197, False), (1497, True)]
    assert (result["training_size"], result["validation_size"], result["draw"]) == (1497, 0, "seed-777")
    options = SimpleNamespace(dataset="digits", data_dir=None, data_seed=0)
    fewer, every = (table.data_of(table.ROWS[f"gated300-maf{end}"], options) for end in ("", "-iwae-all"))
    assert torch.equal(fewer.test, every.test)
    assert torch.equal(every.train[: len(fewer.train)], fewer.train)
    assert len(every.train[len(fewer.train) :].unique()) == 17  # still grey


def test_names(table, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["density_table.py", "--list"])
    table.main()
    assert capsys.readouterr().out.count("\n") == len(table.ROWS)
    for words in (["wrong"], []):
        monkeypatch.setattr(sys, "argv", ["density_table.py", *words])
        with pytest.raises(SystemExit):
            table.main()


def test_every_row_is_a_pair_for_mnist(table):
    grey = torch.rand(600, 1, 28, 28)
    data = pv.data.Splits("mnist", grey, None, grey[:5], None, None, None).binarized("dynamic")
    for row in table.ROWS.values():
        model, guide = row.pair(data)
        nats_per_pixel = 2 if row.draw else 1  # the paper's initial weights are larger
        assert abs(Trace_ELBO().loss(model, guide, data.test)) < 5 * nats_per_pixel * 784, row.name
        assert (row.target is None) == (row.variant_of is not None)
        assert row.variant_of in {None, *table.ROWS}
        if row.after is not None:
            first = table.ROWS[row.after]
            assert repr(first.pair(data)) == repr((model, guide))
            for name in ("binarization", "draw", "device"):
                assert getattr(first, name) == getattr(row, name)
        assert row.published is None or row.source


def test_networks_are_as_published(table):
    """Burda 2016: 784 - 200 - 200 - 50, and the bias of the pixels."""
    grey = torch.rand(600, 1, 28, 28)
    data = pv.data.Splits("mnist", grey, None, grey[:5], None, None, None).binarized("dynamic")
    model, guide = table.ROWS["burda1-vae"].pair(data)
    up, down = [(784, 200), (200, 200), (200, 2 * 50)], [(50, 200), (200, 200), (200, 784)]
    for module, layers, extra in ((guide, up, 0), (model, down, 784)):
        assert sum(p.numel() for p in module.parameters()) == sum((a + 1) * b for a, b in layers) + extra


def test_monte_carlo_error_from_a_sample(table, monkeypatch, tmp_path):
    """The spread of the NLL over draws, images and pair being the same, is what it says."""
    import density_estimates

    monkeypatch.setattr(density_estimates, "save", lambda path, lml, images: None)
    monkeypatch.setattr(pv, "log_marginal_likelihood", lambda *_, **__: None)
    generator = torch.Generator().manual_seed(0)
    noise = 1.0 + torch.rand(50, generator=generator)  # of each image's ELBO with few particles
    elbo, gap, found = torch.randn(50, generator=generator), torch.rand(10, generator=generator), []
    for _ in range(200):
        bound = SimpleNamespace(elbo=elbo + noise * torch.randn(50, generator=generator), elbo_stderr=noise)
        sampled = SimpleNamespace(
            elbo=elbo[:10], gap=gap + 0.3 * torch.randn(10, generator=generator), gap_stderr=torch.full((10,), 0.3)
        )
        monkeypatch.setattr(density_estimates, "read", lambda path, bound=bound: bound)
        monkeypatch.setattr(density_estimates, "len", lambda x: 10 if x is sampled else len(x), raising=False)  # noqa: B023
        result = density_estimates.of_all_images(
            SimpleNamespace(seed=0), tmp_path, None, None, elbo, sampled, lambda _: nullcontext()
        )
        found.append((result["nll"], result["mc_stderr"]))
    nll, said = torch.tensor(found).T
    assert nll.std().item() == pytest.approx(said.mean().item(), rel=0.22)  # 4.5 / sqrt(2 x 200)


def test_what_ctrl_c_leaves_of_a_piece_is_not_kept(run, table, monkeypatch):
    """An estimator answers Ctrl-C with the images that are done; the program ends, and goes on with all of them."""
    words = ("short-mlp300", "--ais-images", "0")
    whole = run(*words)
    original = pv.log_marginal_likelihood
    with monkeypatch.context() as patch:
        patch.setattr(pv, "log_marginal_likelihood", lambda m, g, x, **options: original(m, g, x[:7], **options))
        with pytest.raises(SystemExit, match="Stopped; the same command resumes short-mlp300"):
            run(*words, folder="stopped")
    assert run(*words, folder="stopped")["nll"] == whole["nll"]


def test_another_network_under_the_same_name_is_another_run(run, table, monkeypatch):
    from dataclasses import replace

    run("short-mlp300", "--ais-images", "0")
    monkeypatch.setitem(
        table.ROWS, "short-mlp300", replace(table.ROWS["short-mlp300"], pair=table.ROWS["mlp300-maf"].pair)
    )
    with pytest.raises(SystemExit, match="holds a run with"):
        run("short-mlp300", "--ais-images", "0")


def test_a_variant_is_compared_with_what_was_measured_alike(table):
    from density_summary import ablations

    def result(row, seed, nll):
        base = {"dataset": "mnist", "data_seed": 0, "particles": 1000, "test_images": 1000, "sample_stderr": 0.05}
        training = {"epochs": 60, "validation_elbo": -90.0, "train_elbo": -89.0}
        more = {"bias_estimate": 0.1, "gap": 3.0, "active_units": 20, "seconds": {"training_cpu": 60.0}}
        return {"row": row, "seed": seed, "nll": nll, "training": training, **base, **more}

    results = [result("short-mlp300", 0, 90.0), result("short-mlp300", 1, 88.5), result("short-mlp300-gated", 0, 89.0)]
    lines = ablations(results)
    assert len(lines) == 3
    assert "| gated units (60 epochs, 1,000 particles) | 89.00 ± 0.05 | +1.00 |" in lines[2]


def test_the_table_and_the_figure_are_those_of_the_results(table, tmp_path):
    """The committed page is what the script writes of the committed numbers; the figure shows rows of MNIST only."""
    folder = FOLDER.parent / "results"
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert table.write_table(tmp_path).read_text() == (folder / "density.md").read_text()
    assert (tmp_path / "density.png").stat().st_size > 10_000
    import density_figure

    result = json.loads((folder / "gated300-standard.json").read_text())
    assert density_figure.draw_figure([result | {"dataset": "digits"}], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
    assert set(density_figure.LABELS) <= set(table.ROWS)


def test_labels_of_the_figure_are_readable_and_apart(table, tmp_path, monkeypatch):
    """Of the committed results, each label of at least 9 points, inside its panel, and over no other."""
    import density_figure

    drawn = []
    monkeypatch.setattr(density_figure.plt, "close", drawn.append)
    found = [json.loads(path.read_text()) for path in sorted((FOLDER.parent / "results").glob("*.json"))]
    rows = [result for result in found if result.get("row") in density_figure.LABELS]
    density_figure.draw_figure(rows, tmp_path / "density.png")
    monkeypatch.undo()
    (figure,) = drawn
    figure.canvas.draw()  # saved at another resolution
    labels = [(ax, text) for ax in figure.axes for text in ax.texts if text.get_text()]
    assert len(labels) == len(rows)
    for index, (ax, text) in enumerate(labels):
        extent = text.get_window_extent()
        assert text.get_fontsize() >= 9
        assert ax.bbox.x0 <= extent.x0 < extent.x1 <= ax.bbox.x1, text.get_text()
        for _, other in labels[index + 1 :]:
            assert not extent.overlaps(other.get_window_extent()), (text.get_text(), other.get_text())
    density_figure.plt.close(figure)


def test_minutes_add_up_over_rows_that_go_on(table):
    """A row trained further stands at its own minutes and those of all rows before it; without these, nowhere."""
    import density_figure

    by_row = {name: json.loads((FOLDER.parent / f"results/{name}.json").read_text()) for name in density_figure.LABELS}
    names = ("gated300-maf", "gated300-maf-iwae-all", "gated300-maf-iwae25-all")
    own = [by_row[name]["seconds"]["training_cpu"] / 60 for name in names]
    found = [density_figure.minutes_of(by_row[name], by_row) for name in names]
    assert found == pytest.approx([own[0], own[0] + own[1], sum(own)])
    last = by_row[names[2]]
    assert density_figure.minutes_of(last, {name: by_row[name] for name in names[1:]}) is None
