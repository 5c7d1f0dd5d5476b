"""Measure the test NLL of models of binarised MNIST, one table row per model.

    python examples/reproductions/density_table.py --list
    python examples/reproductions/density_table.py mlp300-standard mlp300-maf
    python examples/reproductions/density_table.py --all
    python examples/reproductions/density_table.py --table

Each row is trained, evaluated and stored as JSON. log p(x) of the test images, which are drawn once with a separate
seed, is estimated by importance sampling and, on some of them, by annealing, to see how loose importance sampling is.
If a run was stopped, the same command resumes it: training from the checkpoint, evaluation from the finished images.
`--table` writes density.md and density.png beside the results. Rows with a constant learning rate (`published-*`) also go on from a
finished training if `--epochs` is raised; what was stored is of the best epoch until then.

Times are recorded as wall time and as CPU time, because other work on the machine slows down only the former.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyro
import torch

sys.path.append(str(Path(__file__).parents[1]))  # examples/

from clock import Clock
from density_estimates import anneal, compared, estimate, of_all_images, sliced
from density_rows import ROWS, Row
from density_summary import write_table
from support import parts
from support.run_folder import locked
from support.script import git_revision, parser_of, positive, processor, read_json, versions, write_json

import pyrovae as pv

ORDER_SEED = 0  # seed of the order of the test images
AFTER_SEED = 1000  # offset, so that the second part of a training has other noise than the first


def main() -> None:
    options = parse_options()
    if options.list:
        print("\n".join(f"{row.name:24} {row.title}, {row.binarization}, {row.device}" for row in ROWS.values()))
    cuda = torch.cuda.is_available()
    runnable = [row for row in ROWS.values() if cuda or row.device == "cpu"]
    if options.all:
        options.rows += [row.name for row in runnable if row.variant_of is None]
    if options.ablations:
        options.rows += [row.name for row in runnable if row.variant_of]
    for name in options.rows:
        try:
            with run_folder(name, options) as folder:
                result = run(ROWS[name], options, folder)
        except KeyboardInterrupt:
            sys.exit(f"Stopped; the same command resumes {name}.")
        except (ValueError, RuntimeError, OSError) as error:  # a missing, damaged or locked file
            sys.exit(f"error: {name}: {error}")
        Path(options.results).mkdir(parents=True, exist_ok=True)
        write_json(Path(options.results) / f"{run_name(name, options.seed)}.json", result)
        print(
            f"{name}: NLL {result['nll']:.2f} ± {result['nll_stderr']:.2f} ({result['test_images']:,} images), target "
            f"{result['target'] or 'none'}, ELBO {result['elbo']:.2f}, {result['active_units']} active units",
            flush=True,
        )
    if options.table:
        print(f"{write_table(Path(options.results))}")


@contextmanager
def run_folder(row: str, options: argparse.Namespace) -> Iterator[Path]:
    """The folder of the row's run, locked inside the context."""
    folder = Path(options.runs) / run_name(row, options.seed)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "wait until it has ended, or give another --runs"):
        yield folder


def run_name(row: str, seed: int) -> str:
    return row if seed == 0 else f"{row}-seed{seed}"


def run(row: Row, options: argparse.Namespace, folder: Path) -> dict:
    """Train and evaluate a row, resuming what is unfinished, and return its numbers."""
    revision = git_revision()  # at the start, because it may change during the run
    device = pv.pick_device("auto" if row.device == "cuda" else "cpu")
    data = data_of(row, options)
    clock = Clock(folder / "seconds.json")
    model, guide, history = train(row, options, folder, data, device, clock)
    if row.optimizer is not None:  # keep the estimates apart from those of an earlier best epoch
        folder = folder / f"best-epoch-{history['best_epoch']}"
        folder.mkdir(exist_ok=True)
    # Shuffle, so that the first images are a random sample.
    test = data.test[torch.randperm(len(data.test), generator=torch.Generator().manual_seed(ORDER_SEED))]
    lml = estimate(options, folder, model, guide, test[: options.images], clock)
    annealed = anneal(options, folder, model, test[: options.ais_images], clock)
    numbers = of_all_images(options, folder, model, guide, test, lml, clock)
    active = pv.active_units(guide, data.test)
    return {
        "row": row.name,
        "title": row.title,
        **numbers,
        "bias_estimate": lml.bias_estimate,
        "active_units": int(active.sum()),
        "latent_dim": len(active),
        "median_ess": lml.ess.median().item(),
        "pareto_k_limit": lml.pareto_k_limit,
        "share_of_k_too_high": lml.share_of_bad_k(),
        "particles": options.particles,
        "test_images": len(lml),
        "of_test_images": len(data.test),
        "ais": None if annealed is None else compared(annealed, lml),
        "slice": sliced(options, folder, model, guide, test, lml, numbers["nll"], clock),
        "units": "nats per image; stderr over images; gap and bias estimate are lower bounds, NLL is an upper bound",
        "published": row.published,
        "source": row.source,
        "target": row.target,
        "training": training_of(row, options) | history,
        "dataset": data.name,
        "binarisation": row.binarization,
        "data_seed": data.data_seed,
        "draw": data.draw,
        "training_size": len(data.train),
        "validation_size": 0 if data.validation is None else len(data.validation),
        "seed": options.seed,
        "device": str(device),
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "seconds": clock.seconds,
        "versions": versions(),
        "git_revision": revision,
        "command": command(row, options),
        "model": repr(model),
        "guide": repr(guide),
    }


def data_of(row: Row, options: argparse.Namespace) -> pv.data.Splits:
    """The row's images: those to train on are grey, or drawn once (static)."""
    joined = row.train_on_all and row.draw is not None  # a published draw needs the validation images
    all_of_it = row.train_on_all and not joined
    grey = pv.data.load(options.dataset, options.data_dir, binarization=None, train_on_all=all_of_it)
    data = grey.binarized(row.binarization, options.data_seed, row.draw)
    if not joined:
        return data
    train = torch.cat([grey.train, grey.validation])
    return replace(data, train=train, train_labels=None, validation=None, validation_labels=None)


def training_of(row: Row, options: argparse.Namespace) -> dict:
    settings = {name: value for name, value in vars(row).items() if name in TRAINING}
    settings["epochs"] = options.epochs or row.epochs
    # Only what is given, because earlier runs were stored without these names.
    more = {"after": row.after, "patience": row.patience, "draw": row.draw, "average": row.average}
    if row.precision != "float32":
        more["precision"] = row.precision
    if row.optimizer is not None:
        more |= {"optimizer": row.optimizer.__name__, "schedule": "constant"}
    return settings | {name: value for name, value in more.items() if value is not None}


TRAINING = ("objective", "particles", "epochs", "batch_size", "learning_rate", "clip_norm", "kl_warmup")


def train(row, options, folder, data, device, clock):
    """Return (model, guide, history), from the checkpoint if training is finished."""
    checkpoint, done = folder / "training.pt", folder / "trained.json"
    settings = training_of(row, options)
    pyro.set_rng_seed(options.seed)
    model, guide = row.pair(data)
    of_run = {
        **settings,
        "binarization": row.binarization,
        "train_on_all": row.train_on_all,
        "model": repr(model),
        "guide": repr(guide),
        "seed": options.seed,
        "dataset": data.name,
        "data_seed": data.data_seed,
    }
    if done.exists():
        remedy = "delete it: it is made again from training.pt beside it"
        found = read_json(done, remedy, "run", "history")
        if found["run"] == of_run:
            pv.load(checkpoint, model, guide)
            return model.to(device), guide.to(device), found["history"]
        extended = found["run"] | {"epochs": max(found["run"]["epochs"], settings["epochs"])}
        if row.optimizer is None or extended != of_run:
            raise ValueError(f"{folder} holds a run with {found['run']}, not {of_run}: give another --runs")
        done.unlink()  # its history will not be that of the checkpoint
    if row.after is not None:
        first = ROWS[row.after]
        with run_folder(first.name, options) as before:
            own = data_of(first, options)  # it may have fewer training images
            model, guide, _ = train(first, options, before, own, device, Clock(before / "seconds.json"))
        pyro.set_rng_seed(options.seed + AFTER_SEED)
    steps_per_epoch = -(-len(data.train) // settings["batch_size"])
    objective = parts.make_objective(
        row.objective, row.particles, kl_warmup_steps=min(row.kl_warmup, settings["epochs"]) * steps_per_epoch
    )
    how = {"learning_rate": settings["learning_rate"]}
    if row.optimizer is not None:
        how = {"optimizer": partial(row.optimizer, lr=settings["learning_rate"], fused=True), "schedule": None}
    with clock("training"):
        result = pv.fit(
            model,
            guide,
            data.train,
            validation=data.validation,
            transform=data.transform,
            loss=objective,
            **{name: settings[name] for name in ("epochs", "batch_size", "clip_norm")},
            **how,
            patience=row.patience,
            average=row.average,
            precision=row.precision,
            # "auto" never records parts defined outside the library, such as those of the published recipe.
            compile=True if settings["epochs"] * settings["particles"] >= 50 else "auto",
            checkpoint=checkpoint,
            checkpoint_every=30.0,
            resume=True,
            device=device,
            progress=not options.quiet,
        )
    best, columns = result.history[result.best_epoch - 1], ("elbo", "validation_elbo", "validation_bound")
    every = max(1, len(result.history) // 20)
    history = {
        "best_epoch": result.best_epoch,
        "train_elbo": best["elbo"],
        "validation_elbo": best["validation_elbo"] if data.validation is not None else None,
        "validation_bound": best["validation_bound"] if data.validation is not None else None,
        "history": [
            {"epoch": epoch["epoch"]} | {name: epoch[name] for name in columns if epoch[name] == epoch[name]}
            for epoch in result.history[every - 1 :: every]
        ],
    }
    if row.patience is not None:  # training may have stopped before the last epoch
        history |= {"epochs": len(result.history), "most_epochs": settings["epochs"]}
    history["git_revision"] = git_revision()
    write_json(done, {"run": of_run, "history": history})
    return model, guide, history


def command(row: Row, options: argparse.Namespace) -> str:
    """The command that reproduces these numbers, without the paths of this machine."""
    words = ["python", "examples/reproductions/density_table.py", row.name]
    for name in ("dataset", "data_seed", "seed", "epochs", "particles", "images", "ais_images", "slice"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return f"OMP_NUM_THREADS={torch.get_num_threads()} {shlex.join(words)}"


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help="names of rows; --list shows them")
    add("--all", action="store_true", help="run every row; rows for a GPU only if there is one")
    add("--ablations", action="store_true", help="run every row that shows the effect of one change")
    add("--list", action="store_true", help="list the names of the rows")
    add("--table", action="store_true", help="write density.md and density.png in --results from the results there")
    add(
        "--dataset", default="mnist", choices=pv.data.NAMES, help="data set (default: mnist); others are for trying out"
    )
    add("--data-dir", help="data folder (default: $PYROVAE_DATA if set, else a cache folder)")
    add("--data-seed", type=int, default=0, help="seed of the pixels of test and validation images (default: 0)")
    add("--runs", default="runs/density", help="folder for the states of the runs (default: runs/density)")
    add(
        "--results",
        default=str(Path(__file__).parents[1] / "results"),
        help="folder for the numbers (default: examples/results)",
    )
    add("--particles", type=positive(int), default=5000, help="particles per test image (default: 5000)")
    add("--images", type=positive(int), help="use a random sample of this many test images (default: all)")
    add("--ais-images", type=int, default=100, help="number of these images to anneal as well (default: 100; 0: none)")
    add("--slice", type=int, default=0, help="number of these images to anneal from the guide, to correct the NLL")
    add("--epochs", type=positive(int), help="epochs, instead of those of the row")
    add("--seed", type=int, default=0, help="seed of initialisation, training and estimates (default: 0)")
    add("--quiet", action="store_true", help="show no progress bars")
    options = parser.parse_args()
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"no row {unknown[0]!r}: one of {', '.join(ROWS)}")
    if options.images == 1:
        parser.error("--images 1 has no standard error: give at least 2")
    if not (options.rows or options.all or options.ablations or options.list or options.table):
        parser.error("name a row, or give --all, --ablations, --list or --table")
    return options


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
