"""The example, run as a user runs it; and the README's commands are what CI and users run."""

import argparse
import csv
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from shared import processes

import pyrovae as pv

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import mnist_svi  # noqa: E402
from support import parts, run_folder, script  # noqa: E402
from support.report import report, slope_of, still_rising  # noqa: E402

FIGURES = ("report.png", "samples.png", "reconstructions.png", "training.png", "tightness.png")


def run(*options, cwd=None, script="mnist_svi.py", **environment):
    return processes.run(ROOT / "examples" / script, *options, cwd=cwd, **environment)


def test_every_example_is_tested():
    """Those at the top here; benchmarks and reproductions in files of their own."""
    found = {path for path in (ROOT / "examples").rglob("*.py") if "__main__" in path.read_text()}
    found = {str(path.relative_to(ROOT / "examples")) for path in found if path.parent.name != "benchmarks"}
    reproductions = {f"reproductions/{name}.py" for name in ("density_table", "small_data", "time_to_quality")}
    tops = {"bounds", "compare_estimates", "compare_parts", "deep_markov", "imputation", "mnist_svi", "semi_supervised"}
    assert found == {f"{name}.py" for name in tops} | reproductions


def test_the_main_example_is_short():
    assert len((ROOT / "examples/mnist_svi.py").read_text().splitlines()) <= 250


@pytest.fixture(scope="module")
def digits_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = ("--dataset", "digits", "--epochs", 3, "--num-particles", 30, "--latent-dim", 2, "--quiet")
    # The first as a user runs it, in an interpreter of its own.
    command = [sys.executable, "-W", "error", ROOT / "examples/mnist_svi.py", *options, "--out", folder / "first"]
    fresh = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    return [(fresh, folder / "first"), (run(*options, "--out", folder / "second"), folder / "second")]


def test_digits_end_in_a_result(digits_runs):
    done, out = digits_runs[0]
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("ELBO", "log p(x)", "gap", "bits per pixel", "median ESS", "Pareto k", "active units", "seconds"):
        assert word in done.stdout
    for name in (*FIGURES, "manifold.png", "checkpoint.pt", "evaluation.nc"):
        assert (out / name).stat().st_size > 1000, name
    with (out / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["validation_elbo"]) < 0
    metrics = json.loads((out / "metrics.json").read_text())
    test = metrics["test"]
    assert test["elbo"] <= test["log_marginal_likelihood"] < 0
    assert test["log_marginal_likelihood_mc_stderr"] < test["log_marginal_likelihood_stderr"]
    assert {"bias_estimate", "gap", "bits_per_pixel", "median_ess", "active_units", "num_particles"} <= test.keys()
    # Three epochs are too few, and both reasons are said.
    assert "the decoder hardly uses z" in test["verdict_on_z"] or "collapsed" in test["verdict_on_z"]
    assert test["kl"] < 0.69
    assert test["verdict_on_z"][1:] in done.stdout
    assert "he validation bound still rose by about" in metrics["still_rising"]
    assert metrics["still_rising"][1:] in done.stdout
    assert f"{test['units_above_a_tenth_of_the_prior']} above a tenth of the prior's variance" in done.stdout
    assert {"dataset", "binarization", "device", "seed", "versions", "git_revision", "seconds"} <= metrics.keys()


def test_reports_of_older_files(digits_runs):
    """Runs that were evaluated before z was."""
    _, out = digits_runs[0]
    metrics = json.loads((out / "metrics.json").read_text())
    shown = report(metrics)
    del metrics["still_rising"]
    for name in ("verdict_on_z", "units_above_a_tenth_of_the_prior"):
        del metrics["test"][name]
    older = report(metrics)
    assert len(older.splitlines()) == len(shown.splitlines()) - 2
    assert shown.startswith(older.partition("active units")[0])


def test_imputation(tmp_path):
    """Two seeds, hardly trained: a table, and the numbers in a file."""
    options = [
        "--seeds",
        "2",
        "--epochs",
        "2",
        "--num-particles",
        "50",
        "--training-particles",
        "3",
        "--quiet",
        "--out",
    ]
    done = run(*options, tmp_path / "numbers.json", script="imputation.py")
    assert done.returncode == 0, done.stderr
    assert "MIWAE's RMSE minus this, paired" in done.stdout
    assert len(json.loads((tmp_path / "numbers.json").read_text())["rows"]) == 2


def test_semi_supervised(tmp_path):
    """Digits, hardly trained: errors and log p(x), in print and in a file, and a figure."""
    numbers, figure = tmp_path / "numbers.json", tmp_path / "classes.png"
    options = {"--dataset": "digits", "--epochs": 2, "--num-labels": 50, "--num-test": 40, "--num-particles": 20}
    options |= {"--hidden": 16, "--latent-dim": 2, "--copies": 3, "--out": numbers, "--figure": figure}
    flat = [word for option in options.items() for word in option]
    done = run(*flat, "--quiet", script="semi_supervised.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "digits, 50 labels, seed 0: error on the test images" in done.stdout
    assert "Kingma" not in done.stdout  # whose number is of MNIST with 100 labels
    assert figure.stat().st_size > 1000
    found = json.loads(numbers.read_text())
    assert len(found["error_by_epoch"]) == 2
    assert 0 < found["test_error_of_guide"] < 1
    assert found["log_prob"]["elbo"] <= found["log_prob"]["mean"] < 0
    assert {"command", "versions", "options", "seconds", "processor"} <= found.keys()


@pytest.mark.slow
def test_images_are_annealed_if_many_weights_cannot_be_trusted(tmp_path):
    """25 particles of 30 latents: k is too high for many, and the report says what annealing finds."""
    done = run(
        *[
            "--dataset",
            "digits",
            "--epochs",
            "15",
            "--num-particles",
            "25",
            "--latent-dim",
            "30",
            "--num-test",
            "60",
            "--quiet",
            "--out",
        ],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    test = json.loads((tmp_path / "metrics.json").read_text())["test"]
    assert test["share_pareto_k_above_limit"] > 0.05
    found = test["annealed"]
    assert found["num_images"] == 10
    assert found["log_marginal_likelihood"] == pytest.approx(test["log_marginal_likelihood"] + found["difference"])
    for words in ("log p(x), part annealed", "from annealing only 10)", "drawn at random, finds", "of these 60 images"):
        assert words in done.stdout


def test_the_errors_of_the_annealed_row(digits_runs):
    """Over images, as in the row above it; and from annealing few. Older files lack the former."""
    _, out = digits_runs[0]
    metrics = json.loads((out / "metrics.json").read_text())
    found = {"num_images": 113, "log_marginal_likelihood": -88.36, "difference": 0.38, "difference_stderr": 0.07}
    found |= {"log_marginal_likelihood_mc_stderr": 0.07, "log_marginal_likelihood_stderr": 0.24}
    metrics["test"]["annealed"] = found
    shown = report(metrics)
    assert "log p(x), part annealed  -88.36 ± 0.24 nats over images (± 0.07 from annealing only 113)\n" in shown
    assert f"log p(x) of these {metrics['test']['num_data']:,} images is then -88.36 ± 0.07." in shown
    del found["log_marginal_likelihood_stderr"]
    assert "part annealed  -88.36 nats over images (± 0.07 from annealing only 113)\n" in report(metrics)


def history_of(bounds, rates=None, kl=20.0):
    rates = rates or [1e-3] * len(bounds)
    rows = zip(bounds, rates, strict=True)
    return [{"validation_bound": bound, "learning_rate": rate, "validation_kl": kl, "kl": kl} for bound, rate in rows]


def falling(epochs):
    """The learning rates at the ends of the epochs under half a cosine."""
    return [1e-3 * (1 + math.cos(math.pi * (epoch + 1) / epochs)) / 2 for epoch in range(epochs)]


def noisy(bounds, scale, seed=0):
    noise = torch.randn(len(bounds), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [bound + scale * more for bound, more in zip(bounds, noise.tolist(), strict=True)]


def saturating(epochs, speed, rates=None):
    """-100 + 30 (1 - exp(-speed * share of the training done)), done in learning rates."""
    rates = rates or [1.0] * epochs
    done = torch.tensor(rates).cumsum(0) / sum(rates)
    return (-100 + 30 * (1 - (-speed * done).exp())).tolist()


NOT_KNOWN = math.nan
CURVES = {
    "levelled": (history_of(saturating(100, 20)), None),
    "levelled, noisy": (history_of(noisy(saturating(100, 20), 1.0)), None),
    "level from the start": (history_of([-90.0] * 50), None),
    "rising": (history_of(saturating(100, 1)), 30 * (math.exp(-0.75) - math.exp(-1))),
    "rising, noisy": (history_of(noisy(saturating(100, 1), 0.3)), 30 * (math.exp(-0.75) - math.exp(-1))),
    "a line": (history_of([-100 + epoch / 4 for epoch in range(101)]), 25 / 4),
    "noise as large as the rise": (history_of(noisy([-100 + epoch / 25 for epoch in range(100)], 10.0), kl=1.0), None),
    "falling, after its best": (history_of([-90 - abs(epoch - 20) / 2 for epoch in range(60)]), None),
    "too little to matter": (history_of([-100 + epoch / 1000 for epoch in range(100)], kl=0.01), None),
    "little against the KL": (history_of([-100 + epoch / 100 for epoch in range(101)], kl=5.0), None),
    "the same against a KL of 1": (history_of([-100 + epoch / 100 for epoch in range(101)], kl=1.0), 0.25),
    "two epochs": (history_of([-100.0, -90.0]), 5.0),
    "three epochs": (history_of([-100.0, -90.0, -80.0]), 7.5),
    "three epochs, level": (history_of([-90.0, -90.0, -90.0]), None),
    "NaN at first": (history_of([NOT_KNOWN] * 10 + [-100 + epoch / 4 for epoch in range(90)]), 25 / 4),
    "NaN at last": (history_of([-100 + epoch / 4 for epoch in range(90)] + [NOT_KNOWN] * 10), 90 / 16),
    "no validation": (history_of([NOT_KNOWN] * 50), None),
    "no KL": (history_of([-100 + epoch / 4 for epoch in range(101)], kl=NOT_KNOWN), None),
    "no learning after the first epoch": (history_of([-100.0, -90.0, -80.0], rates=[1e-3, 0.0, 0.0]), None),
    "never any learning": (history_of([-100.0, -90.0, -80.0], rates=[0.0, 0.0, 0.0]), None),
    "no epoch": ([], None),
}


@pytest.mark.parametrize("name", CURVES)
def test_training_that_ended_too_early(name):
    history, rise = CURVES[name]
    found = still_rising(history)
    if rise is None:
        assert found is None
        return
    number = float(
        re.search(r"still rose by about ([\d.]+) nats over the last \d+ of \d+ epochs: train longer", found)[1]
    )
    # A line through a bend: within 5% of the rise between its ends; the noise of 26 epochs is 0.3.
    assert number == pytest.approx(rise, rel=0.05, abs=0.3 if "noisy" in name else 0.006)


def test_one_epoch_shows_nothing():
    assert still_rising(history_of([-90.0])).startswith("one epoch cannot show whether the validation bound levels off")
    assert still_rising(history_of([NOT_KNOWN])) is None


@pytest.mark.parametrize("epochs", [5, 40, 300])
def test_a_falling_learning_rate_hides_nothing(epochs):
    """The same bound as a function of the learning done: the last tenth of the epochs looks level either way."""
    rates = falling(epochs)
    for speed, rises in ((1, True), (20, False)):
        bounds = saturating(epochs, speed, rates)
        assert bounds[-1] - bounds[-1 - max(1, epochs // 10)] < (0.35 if epochs < 10 else 0.3)
        assert (still_rising(history_of(bounds, rates, kl=5.0)) is not None) == rises


def test_noise_alone_is_seldom_a_rise():
    """A level bound with noise of 1 nat: slopes above two standard errors in 1 of 40 curves, plus the tails of few points."""
    found = [still_rising(history_of(noisy([-90.0] * 40, 1.0, seed), kl=0.0)) for seed in range(400)]
    assert sum(text is not None for text in found) < 40


def test_slope_and_its_error():
    """Against numpy's least squares."""
    points = [(x / 10, y) for x, y in enumerate(noisy([0.3 * x for x in range(20)], 0.5))]
    x, y = np.array(points).T
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    assert slope_of(points) == pytest.approx((slope, covariance[0, 0] ** 0.5))
    assert slope_of([(1.0, 2.0), (1.0, 5.0)]) == (0.0, 0.0)
    assert slope_of([(1.0, 2.0), (2.0, 5.0)]) == (3.0, 0.0)


def test_same_seed_same_numbers(digits_runs):
    first, second = (json.loads((out / "metrics.json").read_text()) for _, out in digits_runs)
    for metrics in (first, second):
        del metrics["seconds"], metrics["command"]
    assert first == second


def test_auto_without_mnist_and_network(tmp_path):
    """Proxies that refuse stand for no network."""
    proxies = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    (tmp_path / "empty").mkdir()
    options = ("--epochs", 1, "--num-particles", 5, "--quiet", "--data-dir", tmp_path / "empty")
    done = run(*options, cwd=tmp_path, no_proxy="", NO_PROXY="", **proxies)
    assert done.returncode == 0, done.stderr
    assert "using scikit-learn's embedded 8x8 digits instead" in done.stderr
    assert len(list((tmp_path / "runs").glob("digits-*"))) == 1
    done = run("--dataset", "mnist", *options, cwd=tmp_path, no_proxy="", NO_PROXY="", **proxies)
    assert done.returncode == 1
    assert "error: MNIST is not in" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("--dataset", "mnist", "--data-dir", tmp_path / "mispelt", cwd=tmp_path)
    assert done.returncode == 1
    assert f"error: the data folder {tmp_path / 'mispelt'} (root, --data-dir) does not exist" in done.stderr
    assert not (tmp_path / "mispelt").exists()


ROLES = {
    "prior": parts.PRIORS,
    "guide": parts.GUIDES,
    "likelihood": parts.LIKELIHOODS,
    "network": parts.NETWORKS,
    "objective": parts.OBJECTIVES,
}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(max(map(len, ROLES.values()))))
def test_every_part_by_its_name(number, tmp_path):
    """As many runs as the longest table has names; between them each name is used."""
    places = {role: number for role in ROLES}
    places["guide"] += 4  # so that no flow meets the VampPrior, whose density of 500 of them takes minutes
    chosen = {role: list(table)[places[role] % len(table)] for role, table in ROLES.items()}
    options = [f"--{role}={name}" for role, name in chosen.items()]
    if "elbo" in chosen["objective"] or chosen["objective"] == "stl":
        options += ["--beta", 0.5, "--kl-warmup", 1, "--free-bits", 0.1]
    elif chosen["objective"] in ("iwae", "dreg"):
        options += ["--objective-particles", 3]
    options += ["--scale", 0.5] if chosen["likelihood"] == "normal" else []
    small = ("--dataset", "digits", "--epochs", 1, "--num-particles", 5, "--latent-dim", 3, "--quiet")
    done = run(*small, *options, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert {role: metrics[role] for role in chosen} == chosen
    assert metrics["test"]["gap"] > 0
    for name in FIGURES:
        assert (tmp_path / "run" / name).stat().st_size > 1000, name


@pytest.mark.slow
def test_bounds(digits_runs, tmp_path):
    _, trained = digits_runs[0]
    small = ("--num-images", 6, "--num-particles", 50, "--num-chains", 4, "--num-temperatures", 20, "--num-gaps", 3)
    done = run("--run", trained, *small, "--quiet", "--out", tmp_path / "bounds", script="bounds.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for row in ("annealing - importance sampling", "amortization", "upper - lower"):
        assert row in done.stdout
    bounds = json.loads((tmp_path / "bounds/bounds.json").read_text())["bounds"]
    assert (
        bounds["6 test images"]["ELBO"]["mean"] < bounds["6 test images"]["importance sampling, 50 particles"]["mean"]
    )
    for name in ("curve", "sandwich", "k", "gap", "missed"):
        assert (tmp_path / f"bounds/bounds_{name}.png").stat().st_size > 1000, name
    done = run("--run", tmp_path / "nowhere", script="bounds.py")
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_compare_estimates(digits_runs, tmp_path):
    _, trained = digits_runs[0]
    small = ("--num-images", 3, "--num-chains", 4, "--num-temperatures", 10, "--num-leapfrog-steps", 2)
    out = tmp_path / "estimates.json"
    done = run("--run", trained, *small, "--out", out, script="compare_estimates.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = json.loads(out.read_text())["rows"]
    assert [len(row["log_prob"]) for row in rows] == [3] * 5
    # With 10 temperatures and two dimensions, all of them are near log p(x).
    means = [sum(row["log_prob"]) / 3 for row in rows]
    assert max(means) - min(means) < 1
    # Two pilots of 50 - 1 + 2 * 40 kernels and 10 kernels, each of 1 or 2 steps and a gradient to begin with.
    assert 4 * 2 * 268 <= rows[0]["gradients"] <= 4 * (3 * 268 + 10)
    done = run("--run", tmp_path / "nowhere", script="compare_estimates.py")
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_compare_parts(tmp_path):
    options = ("--dataset", "digits", "--epochs", 2, "--num-test", 50, "--num-particles", 30, "--quiet")
    done = run(*options, "--out", tmp_path / "parts.json", script="compare_parts.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "priors: 3 model/guide pairs on 50 data" in done.stdout
    assert "guides, on one frozen model, ranked by ELBO: 5 model/guide pairs" in done.stdout
    result = json.loads((tmp_path / "parts.json").read_text())
    assert {row["name"] for row in result["priors"]} == {"standard-normal", "vamp", "realnvp"}
    assert run("--priors", "vamp", "nsf", script="compare_parts.py").returncode == 2


def test_wrong_names_list_the_right_ones():
    for role, table in ROLES.items():
        message = run(f"--{role}=wrong").stderr
        assert "invalid choice: 'wrong'" in message
        assert all(name in message for name in table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--scale 0.5", "--scale 0.5 is for --likelihood normal, and --likelihood is bernoulli"),
        ("--likelihood normal --binarization static", "--binarization static is for --likelihood bernoulli"),
        ("--epochs 10 --kl-warmup 11", "--kl-warmup 11 is longer than the run: 10 epochs"),
        ("--dataset digits --kl-warmup 301", "--kl-warmup 301 is longer than the run: 300 epochs"),
        ("--objective iwae", "--objective iwae needs --objective-particles of 2 or more"),
        ("--objective dreg --objective-particles 1", "--objective dreg needs --objective-particles of 2 or more"),
        (
            "--objective iwae --objective-particles 5 --beta 2",
            "--objective iwae has no KL to weigh: leave out --beta 2",
        ),
        ("--objective dreg --kl-warmup 3 --free-bits 0.5", "leave out --kl-warmup 3, --free-bits 0.5"),
        ("--resume", "--resume needs --out"),
        ("--num-test 1", "--num-test 1 is too few for a standard error over images: give at least 2"),
    ],
)
def test_options_that_contradict_each_other(options, message, monkeypatch, capsys):
    """Refused as they are read, before any data are looked for."""
    monkeypatch.setattr(sys, "argv", ["mnist_svi.py", *options.split()])
    with pytest.raises(SystemExit) as stop:
        mnist_svi.parse_options()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_gone_on_with_or_left_alone(digits_runs, tmp_path):
    """Killed or not, --resume ends in the numbers of a run never stopped; without it nothing is written over."""
    _, whole = digits_runs[0]
    options = ("--dataset", "digits", "--epochs", 3, "--num-particles", 30, "--latent-dim", 2, "--quiet")

    def numbers(folder):
        return json.loads((folder / "metrics.json").read_text())["test"]

    out = tmp_path / "run"
    done = run(*options, "--out", out, "--resume")  # nothing there yet: it begins
    assert done.returncode == 0, done.stderr
    assert numbers(out) == numbers(whole)
    for name in ("metrics.json", "checkpoint.pt", "evaluation.nc"):
        (out / name).unlink()
    done = run(*options, "--out", out)
    assert done.returncode == 1
    assert "holds a run" in done.stderr
    assert "--resume" in done.stderr
    done = run(*options, "--seed", 1, "--out", out, "--resume")
    assert done.returncode == 1
    assert "holds a run with --seed 0, and this one has --seed 1" in done.stderr
    assert run(*options, "--out", out, "--resume").returncode == 0
    assert numbers(out) == numbers(whole)
    drawn = (out / "samples.png").stat().st_mtime_ns
    done = run(
        *options, "--out", out, "--resume", "--data-dir", tmp_path / "nowhere"
    )  # finished: nothing is done again
    assert done.returncode == 0, done.stderr
    assert f"The run in {out} is finished" in done.stdout
    assert f"{numbers(out)['elbo']:.2f} nats" in done.stdout
    assert (out / "samples.png").stat().st_mtime_ns == drawn
    assert run(*options, "--out", out, "--resume", "--num-particles", 31).returncode == 0  # evaluated again
    assert numbers(out)["num_particles"] == 31
    (out / "metrics.json").write_text('{"test": {')  # a file that was cut
    assert run(*options, "--out", out, "--resume").returncode == 0
    assert numbers(out) == numbers(whole)
    (out / "metrics.json").unlink()  # not finished
    with run_folder.locked(out, "wait"):
        done = run(*options, "--out", out, "--resume")
    assert done.returncode == 1
    assert f"another run is writing to {out}" in done.stderr


def test_num_test(digits_runs, tmp_path):
    """A random subset, the same for every seed of the training; the report says so, and so does the resumed run."""
    _, whole = digits_runs[0]
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    options = ("--dataset", "digits", "--epochs", 3, "--num-particles", 30, "--latent-dim", 2, "--quiet", "--resume")
    done = run(*options, "--out", out, "--num-test", 40)
    assert done.returncode == 0, done.stderr
    assert "; 40 of 300 test images, a random subset, 30 particles each" in done.stdout
    test = json.loads((out / "metrics.json").read_text())["test"]
    assert (test["num_data"], test["of_test_images"]) == (40, 300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    saved = pv.load(out / "checkpoint.pt")
    found = pv.log_marginal_likelihood(
        saved["model"], saved["guide"], pv.data.digits().test[order[:40]], num_particles=30
    )
    # The same images, with other particles: far apart images (sd 5 nats) would show.
    error = (found.mean_mc_stderr**2 + test["log_marginal_likelihood_mc_stderr"] ** 2) ** 0.5
    bias = found.bias_estimate + test["bias_estimate"]
    assert abs(found.mean - test["log_marginal_likelihood"]) < 4.5 * error + bias
    done = run(*options, "--out", out, "--num-test", 40)
    assert "is finished" in done.stdout
    assert "40 of 300 test images" in done.stdout
    done = run(*options, "--out", out, "--num-test", 1000)  # more than there are: all
    assert done.returncode == 0, done.stderr
    assert "; 300 test images, 30 particles each" in done.stdout


@pytest.mark.parametrize("lost", [FIGURES, ("evaluation.nc",), ("manifold.png", "history.csv")])
def test_a_finished_run_makes_lost_files_again(digits_runs, tmp_path, lost):
    _, whole = digits_runs[0]
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    files = sorted(path.name for path in out.iterdir())
    for name in lost:
        (out / name).unlink()
    options = ("--dataset", "digits", "--epochs", 3, "--num-particles", 30, "--latent-dim", 2, "--quiet")
    done = run(*options, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert (
        f"lacks {', '.join(name for name in json.loads((whole / 'metrics.json').read_text())['files'] if name in lost)}"
        in (done.stdout)
    )
    assert sorted(path.name for path in out.iterdir()) == files
    tests = [json.loads((folder / "metrics.json").read_text())["test"] for folder in (out, whole)]
    assert tests[0] == tests[1]
    done = run(*options, "--out", out, "--resume")
    assert "is finished" in done.stdout


DAMAGES = {"cut": '{"seed": 0, "data', "no text": b"\xff\xfe\x00", "no dict": "[1, 2]", "lacking": "{}", "empty": ""}


def damage(path, how):
    content = DAMAGES[how]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_options_are_named_and_kept(how, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "training.pt").write_bytes(b"state")
    damage(out / "options.json", how)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    options = argparse.Namespace(out=str(out), resume=True, seed=0, dataset="digits", likelihood="bernoulli")
    with pytest.raises(ValueError, match=r"options\.json is damaged \(.*put back a copy, or give another --out"):
        run_folder.refuse_other_run(options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_command_on_damaged_options_ends_in_one_line(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "training.pt").write_bytes(b"state")
    damage(out / "options.json", "cut")
    done = run("--dataset", "digits", "--out", out, "--resume")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {out}/options.json is damaged (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("how", [*DAMAGES, "other numbers"])
def test_damaged_metrics_are_named_and_evaluated_again(how, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    if how == "other numbers":
        (out / "metrics.json").write_text(json.dumps({"seconds": {"total": 1.0}, "test": {"num_particles": 30}}))
    else:
        damage(out / "metrics.json", how)
    run_folder.show_finished_run(
        argparse.Namespace(out=str(out), resume=True, num_particles=30, num_test=None)
    )  # does not exit
    assert f"note: {out}/metrics.json is damaged (" in capsys.readouterr().err
    done = run("--run", out, script="bounds.py")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {out}/metrics.json is damaged (")
    assert "mnist_svi.py --resume on that folder makes it again" in done.stderr


def test_json_is_written_through_a_link(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    script.write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert script.read_json(tmp_path / "target.json", "", "a") == {"a": 1}


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    """With --resume or without; an empty folder, or one that a run has just begun with, is none."""
    out = tmp_path / "run"
    for resume in (True, False):
        options = argparse.Namespace(out=str(out), resume=resume, seed=0, dataset="digits", likelihood="bernoulli")
        run_folder.refuse_other_run(options)  # not there yet
        out.mkdir()
        (out / ".lock").touch()
        run_folder.refuse_other_run(options)
        (out / "setup.py").touch()
        with pytest.raises(ValueError, match=r"is not empty and holds no run \(options\.json is missing\)"):
            run_folder.refuse_other_run(options)
        (out / "options.json").write_text("{}")  # stopped before training began
        run_folder.refuse_other_run(options)
        shutil.rmtree(out)
    (tmp_path / "package").mkdir()
    (tmp_path / "package/code.py").write_text("x = 1\n")
    done = run("--dataset", "digits", "--out", tmp_path / "package", "--resume")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'package'} is not empty and holds no run")
    assert [path.name for path in (tmp_path / "package").iterdir()] == ["code.py"]


@pytest.mark.parametrize("began", [False, True])
@pytest.mark.parametrize("given", [[], ["--resume"]])
def test_a_stopped_run_names_resume_once(began, given, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mnist_svi.py", "--out", str(tmp_path), *given])
    if began:
        (tmp_path / "training.pt").touch()
    message = run_folder.how_to_go_on(argparse.Namespace(out=str(tmp_path), resume=bool(given)), tmp_path)
    assert message.startswith("Stopped; the state" if began else "Stopped before training began")
    assert message.endswith(f"mnist_svi.py --out {tmp_path} --resume")
    assert message.count("--resume") == 1


@pytest.mark.parametrize(
    ("changed", "said"), [({"num_particles": 31}, "31 and all test"), ({"num_test": 40}, "30 and --num-test 40")]
)
def test_a_finished_run_says_that_it_is_evaluated_again(changed, said, digits_runs, capsys):
    _, out = digits_runs[0]
    options = {"out": str(out), "resume": True, "num_particles": 30, "num_test": None} | changed
    run_folder.show_finished_run(argparse.Namespace(**options))  # does not exit
    printed = capsys.readouterr().out
    assert printed.startswith(f"The run in {out}: training is finished; evaluating again with --num-particles {said}")
    assert printed.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path):
    command = [
        Path(sys.executable).name,
        str(ROOT / "examples/mnist_svi.py"),
        "--dataset",
        "digits",
        "--out",
        str(tmp_path / "run"),
    ]
    process = processes.Program(Path(command[1]), *command[2:], "--quiet")
    while not (tmp_path / "run/training.pt").exists():
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "the state after the last finished epoch is in" in stderr
    assert stderr.count("To go on: ") == 1
    assert "fit(" not in stderr
    again = shlex.split(stderr.partition("To go on: ")[2].strip())
    assert again == [*command, "--quiet", "--resume"]
    assert pv.load(tmp_path / "run/training.pt")["model"].prior.latent_dim == 16


def test_frey_faces(tmp_path, mnist_root):
    if not (Path(mnist_root) / "freyfaces.npz").exists():
        pytest.skip(f"needs Frey faces: {mnist_root} holds no freyfaces.npz")
    options = (
        "--dataset",
        "freyfaces",
        "--likelihood",
        "normal-per-pixel",
        "--epochs",
        1,
        "--num-particles",
        5,
        "--quiet",
    )
    done = run(*options, "--out", tmp_path / "frey", "--data-dir", mnist_root)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "frey/metrics.json").read_text())
    assert metrics["test"]["num_data"] == 200
    assert 0 < metrics["test"]["bits_per_pixel"] < 8


def test_real_mnist(tmp_path, mnist_root):
    done = run("--epochs", 1, "--num-particles", 2, "--quiet", "--out", tmp_path / "m", "--data-dir", mnist_root)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "m/metrics.json").read_text())
    assert metrics["dataset"] == "mnist"
    assert metrics["test"]["num_data"] == 10_000
    assert -160 < metrics["test"]["log_marginal_likelihood"] < -90


def test_options():
    done = run("--help")
    for option in (
        *("--dataset", "--data-dir", "--binarization", "--latent-dim", "--epochs", "--batch-size", "--learning-rate"),
        *("--num-particles", "--device", "--seed", "--data-seed", "--out", "--train-on-all"),
    ):
        assert option in done.stdout
    done = run("--epochs", "0")
    assert done.returncode == 2
    assert done.stderr == "error: argument --epochs: must be positive, found 0 (--help explains the options)\n"
    assert "invalid choice: 'cifar'" in run("--dataset", "cifar").stderr
    for program in ("mnist_svi.py", "deep_markov.py"):
        done = run("--epoch", "5", script=program)  # not taken for --epochs
        assert done.returncode == 2
        assert "unrecognized arguments: --epoch 5" in done.stderr


def test_readme_commands():
    readme = (ROOT / "README.md").read_text()
    assert "python -m pip install -e . && python examples/mnist_svi.py" in readme
    assert 'python -m pip install -e ".[test]" && python -m pytest -n 2' in readme
    assert "python -m pytest -n 2" in (ROOT / ".ci/run").read_text()


def test_readme_code_runs(tmp_path, monkeypatch):
    """The README's Python blocks, in order, in one namespace, with fewer epochs and particles."""
    readme = (ROOT / "README.md").read_text()
    blocks = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    assert blocks
    code = "\n".join(blocks).replace("pv.data.mnist()", "pv.data.digits()")
    code = code.replace("epochs=30", "epochs=1, progress=False").replace("num_particles=1000", "num_particles=20")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_an_importance_weighted_objective_has_no_kl_to_weigh():
    for weights in ({"beta": 2.0}, {"kl_warmup_steps": 5}, {"free_bits": 0.1}):
        with pytest.raises(ValueError, match="objective 'iwae' has no KL to weigh"):
            parts.make_objective("iwae", 5, **weights)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK junk"])
def test_a_finished_run_with_a_damaged_checkpoint(content, digits_runs, tmp_path, capsys, monkeypatch):
    _, whole = digits_runs[0]
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    options = argparse.Namespace(out=str(out), resume=True, num_particles=30, num_test=None)
    monkeypatch.setattr(run_folder, "report", lambda metrics: "")
    with pytest.raises(SystemExit):
        run_folder.show_finished_run(options)
    (out / "checkpoint.pt").write_bytes(content)
    run_folder.show_finished_run(options)  # does not exit: it is made again
    assert f"note: {out}/checkpoint.pt is damaged" in capsys.readouterr().err
    (out / "training.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"training\.pt is damaged"):
        run_folder.show_finished_run(options)
    (out / "training.pt").rename(out / "training.pt.previous")
    options = argparse.Namespace(out=str(out), resume=True, seed=0, dataset="digits", likelihood="bernoulli")
    with pytest.raises(ValueError, match=r"lacks training\.pt, and .*training\.pt\.previous is the state before it"):
        run_folder.refuse_other_run(options)
