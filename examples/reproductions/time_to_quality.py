"""Compare the training time to reach a given NLL: this library, Pyro's own example, NumPyro and Pythae.

    pip install -e ".[bench]" && python examples/reproductions/time_to_quality.py --out runs/time

All train the network of `mnist_svi.py` (784-400-400-40 and back, LayerNorm, SiLU) on MNIST, binarised anew at every
use, each with its own defaults for batch size, learning rate and schedule. Weights are saved during training, and one
estimator measures all of them: importance sampling of log p(x) of every fifth test image. The cosine schedule of
`pyrovae` needs the number of epochs in advance, so there is one run for each of `--our-epochs`; the time to a mark is
the shortest of them.

Seconds are CPU time of the process and of the compilers it calls, on one thread. Other work on the machine and
evaluation do not count.
"""

import argparse
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # write figures to files, without a display

import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.ticker import NullFormatter

sys.path.append(str(Path(__file__).parents[1]))  # examples/

import trainers
from support.script import git_revision, parser_of, positive, processor, versions, write_json

import pyrovae as pv

MARKS = (90.0, 88.0, 86.76, 85.0)  # nats; 86.76 is the VAE of Burda 2016
NAMES = {
    "pyrovae": "pyrovae",
    "pyro": "Pyro as in its example",
    "numpyro": "NumPyro as in its example",
    "pythae": "Pythae",
}
# Colours and line styles that differ in greyscale too.
LINES = {"pyrovae": ("black", "-"), "pyro": ("#0072B2", "--"), "numpyro": ("#D55E00", "-."), "pythae": ("0.5", ":")}
MARKERS = "osD^v"
WORST_SHOWN = 110.0  # nats; the figure leaves out larger NLLs
TICKS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
THREADS = {  # one thread for every library
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def main() -> None:
    options = parse_options()
    if options.train:
        train(*options.train, options)
        return
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    data = pv.data.mnist(options.data_dir)
    test = data.test[:: len(data.test) // options.num_test][: options.num_test].flatten(1)
    curves = {}
    for library in options.libraries:
        for epochs in options.our_epochs if library == "pyrovae" else [options.epochs]:
            name = f"{library}-{epochs}" if library == "pyrovae" else library
            folder = out / name
            if not (folder / "done").exists() and (why := run_training(library, epochs, folder, options)):
                print(f"{name}: {why}")
                continue
            curves[name] = measure(folder, test, options.num_particles)
            print(f"{name}: NLL {min(point['nll'] for point in curves[name]):.2f} at best", flush=True)
    content = {
        "unit": "NLL in nats per image; seconds of the process on one thread",
        "marks": {name: times(curve) for name, curve in curves.items()},
        "curves": curves,
        "num_test": len(test),
        "num_particles": options.num_particles,
        "training_size": len(data.train),
        "budget_seconds": options.seconds,
        "seed": options.seed,
        "data_seed": data.data_seed,
        "processor": processor(),
        "threads": 1,
        "versions": versions(),
        "git_revision": git_revision(),
        "command": command(options),
    }
    write_json(out / "time_to_quality.json", content)
    (out / "time_to_quality.md").write_text(table(content))
    draw(curves)
    plt.savefig(out / "time_to_quality.png", dpi=150)
    print(table(content))


def run_training(library: str, epochs: int, folder: Path, options: argparse.Namespace) -> str | None:
    """Train in a separate process with empty compiler caches; return an error message, or None."""
    if found := trainers.missing_package(library):
        return f"not installed: {found}"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.pt"):
        old.unlink()
    (folder / "measured.json").unlink(missing_ok=True)
    words = [sys.executable, __file__, "--train", library, str(epochs), str(folder)]
    words += ["--seconds", str(options.seconds), "--seed", str(options.seed)]
    words += ["--data-dir", options.data_dir] if options.data_dir else []
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, **THREADS, "TORCHINDUCTOR_CACHE_DIR": empty}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    (folder / "done").touch()
    return None


def train(library: str, epochs: str, folder: str, options: argparse.Namespace) -> None:
    data = pv.data.mnist(options.data_dir, binarization="dynamic")
    pyro.set_rng_seed(options.seed)
    more = {"validation": data.validation.flatten(1)} if library == "pyrovae" else {}
    for package in trainers.PACKAGES.get(library, ()):
        importlib.import_module(package)
    budget = math.inf if library == "pyrovae" else options.seconds  # ours stops at the end of its schedule
    snapshots = trainers.Snapshots(Path(folder), budget)
    with suppress(trainers.Enough):
        trainers.TRAINERS[library](data.train.flatten(1), snapshots, int(epochs), **more)


def measure(folder: Path, test: torch.Tensor, num_particles: int) -> list[dict]:
    """Measure the NLL of every snapshot; results of earlier calls are read from the file."""
    path = folder / "measured.json"
    points = json.loads(path.read_text()) if path.exists() else []
    model, guide = trainers.pair()
    for snapshot in sorted(folder.glob("*.pt"))[len(points) :]:
        found = torch.load(snapshot, weights_only=True)
        model.load_state_dict(found["model"])
        guide.load_state_dict(found["guide"])
        pyro.set_rng_seed(0)
        lml = pv.log_marginal_likelihood(model, guide, test, num_particles=num_particles)
        point = {"seconds": found["seconds"], "wall": found["wall"], "nll": -lml.mean, "elbo": lml.elbo.mean().item()}
        points.append(point | {"nll_stderr": lml.mean_stderr})
        write_json(path, points)
    return points


def times(curve: list[dict]) -> dict[str, float | None]:
    """Seconds to each mark, by linear interpolation between snapshots over the logarithm of seconds."""
    found = {}
    for mark in MARKS:
        found[f"{mark:g}"] = None
        for before, after in zip([None, *curve], curve, strict=False):
            if after["nll"] > mark:
                continue
            if before is None:
                found[f"{mark:g}"] = after["seconds"]
            else:
                share = (before["nll"] - mark) / (before["nll"] - after["nll"])
                found[f"{mark:g}"] = before["seconds"] * (after["seconds"] / before["seconds"]) ** share
            break
    return found


def table(content: dict) -> str:
    """Markdown table of the seconds to each mark, with the shortest times of our runs first."""
    marks, curves = content["marks"], content["curves"]
    ours = [name for name in marks if name.startswith("pyrovae")]
    rows = {}
    if ours:
        least = {mark: min((marks[name][mark] or math.inf, name) for name in ours) for mark in marks[ours[0]]}
        rows["pyrovae, the best of its runs"] = {mark: None if s == math.inf else s for mark, (s, _) in least.items()}
    rows |= {title(name): marks[name] for name in marks}
    lines = [
        f"| seconds to NLL of | {' | '.join(f'{mark:g}' for mark in MARKS)} | best NLL | after |",
        "|---" * 7 + "|",
    ]
    for name, found in rows.items():
        cells = ["-" if found[f"{mark:g}"] is None else f"{found[f'{mark:g}']:.0f}" for mark in MARKS]
        mine = [curve for key, curve in curves.items() if title(key) == name] or [curves[key] for key in ours]
        best = min((point for curve in mine for point in curve), key=lambda point: point["nll"])
        lines.append(f"| {name} | {' | '.join(cells)} | {best['nll']:.2f} | {best['seconds']:.0f} s |")
    about = (
        f"Test NLL in nats by importance sampling, {content['num_particles']} particles, {content['num_test']:,} test images "
        f"(of 10,000, evenly spaced); -: not reached in the budget of {content['budget_seconds']:g} s (pyrovae: in its epochs). "
        f"{content['processor']}, one thread, CPU seconds of the process, interpolated between snapshots 25% apart. `{content['command']}`"
    )
    return "\n".join(["# Time to quality\n", *lines, "", about]) + "\n"


def title(name: str) -> str:
    library, _, epochs = name.partition("-")
    return NAMES[library] + (f", {epochs} epochs" if epochs else "")


def draw(curves: dict[str, list[dict]]):
    """Plot NLL against seconds on a logarithmic scale."""
    _, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    points = [point for curve in curves.values() for point in curve]
    # If no run comes near a mark, show all points.
    worst = WORST_SHOWN if any(point["nll"] < WORST_SHOWN for point in points) else float("inf")
    seen = [point for point in points if point["nll"] < worst]
    for number, (name, curve) in enumerate(curves.items()):
        color, style = LINES[name.partition("-")[0]]
        shown = [point for point in curve if point["nll"] < worst]
        seconds, nll = ([point[key] for point in shown] for key in ("seconds", "nll"))
        marker = MARKERS[number % len(MARKERS)]
        width = 0.8 if name.startswith("pyrovae-") and number else 1.5  # thinner lines for our later runs
        axes.plot(
            seconds, nll, color=color, linestyle=style, linewidth=width, marker=marker, markersize=4, label=title(name)
        )
    for mark in MARKS:
        axes.axhline(mark, color="0.75", linewidth=0.8, zorder=0)
        axes.annotate(
            f"{mark:g}", (0.995, mark), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7
        )
    axes.set(xscale="log", xlabel="CPU seconds of training, one thread", ylabel="test NLL [nats], lower is better")
    if len(seen) < len(points):
        axes.set_title(f"NLLs above {WORST_SHOWN:g} are not shown", fontsize=8, loc="right")
    if seen:
        axes.set_ylim(min(84.0, min(point["nll"] for point in seen) - 1), max(point["nll"] for point in seen) + 2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(TICKS)
    if seen:
        first, last = (choose(point["seconds"] for point in seen) for choose in (min, max))
        axes.set_xlim(first / 1.1, last * 1.1)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.2, axis="x")
    return axes


def command(options: argparse.Namespace) -> str:
    """The command that reproduces these numbers, without the data folder of this machine."""
    words = [
        "python",
        "examples/reproductions/time_to_quality.py",
        "--libraries",
        *options.libraries,
        "--our-epochs",
        *options.our_epochs,
    ]
    words += ["--seconds", f"{options.seconds:g}", "--num-test", options.num_test]
    words += ["--num-particles", options.num_particles, "--seed", options.seed]
    return shlex.join(map(str, words))


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--libraries", nargs="+", default=list(NAMES), choices=NAMES, help="libraries to compare (default: all)")
    add(
        "--our-epochs",
        nargs="+",
        type=positive(int),
        default=[40, 150],
        help="epochs of the runs of pyrovae (default: 40 150)",
    )
    add(
        "--seconds",
        type=positive(float),
        default=600.0,
        help="training time of each other library, in seconds (default: 600)",
    )
    add("--epochs", type=positive(int), default=100_000, help=argparse.SUPPRESS)  # the time budget ends training first
    add("--num-test", type=positive(int), default=2000, help="number of test images, evenly spaced (default: 2000)")
    add("--num-particles", type=positive(int), default=500, help="particles per test image (default: 500)")
    add("--data-dir", help="folder of MNIST (default: $PYROVAE_DATA if set, else a cache folder)")
    add("--seed", type=int, default=0, help="seed of initialisation and training (default: 0)")
    add("--out", default="runs/time", help="output folder for weights, numbers, table and figure (default: runs/time)")
    add("--train", nargs=3, metavar=("LIBRARY", "EPOCHS", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
