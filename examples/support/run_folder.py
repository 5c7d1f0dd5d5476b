"""The folder of a run of `mnist_svi.py`, new or resumed. Each folder holds one run."""

import sys
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout
from support import parts
from support.report import report
from support.script import command, read_json, write_json

import pyrovae as pv

# Files: the state to resume from, the options, the results.
TRAINING, OPTIONS, METRICS = "training.pt", "options.json", "metrics.json"


def claim(options, dataset: str, held) -> Path:
    """Create the folder of the run and lock it until `held` closes."""
    out = Path(options.out or f"runs/{dataset}-{datetime.now():%Y%m%d-%H%M%S}")
    if pv.distributed.rank() > 0:
        return out  # only the first process writes
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(out, "wait until it has ended, or give another --out"))
    write_json(out / OPTIONS, training_options(options))
    return out


def trained_pair(folder, data_dir, *needed: str):
    """Return (metrics, what `pv.load` gives, data) of a finished run.

    Args:
        folder: of the run.
        data_dir: data folder, or None for the default.
        needed: names that the metrics must hold.

    Raises:
        ValueError, RuntimeError, OSError: if the folder holds no finished run, or the data are not there.
    """
    folder = Path(folder)
    if not (folder / METRICS).exists():
        raise ValueError(f"{folder} holds no {METRICS}: --run takes the folder of a finished run of mnist_svi.py")
    needed = ("dataset", "likelihood", "binarization", "data_seed", "command", *needed)
    metrics = read_json(folder / METRICS, "mnist_svi.py --resume on that folder makes it again", *needed)
    saved = pv.load(folder / "checkpoint.pt")
    grey = pv.data.load(metrics["dataset"], data_dir, binarization=None)
    likelihood = parts.LIKELIHOODS[metrics["likelihood"]]
    return metrics, saved, likelihood.prepare(grey, metrics["binarization"], metrics["data_seed"])


def locked(folder: Path, remedy: str):
    """Lock the folder; return the context that releases it. The operating system releases the lock of a killed process.

    Raises:
        RuntimeError: if another run holds the lock.
    """
    try:
        return FileLock(folder / ".lock").acquire(blocking=False)
    except Timeout:
        raise RuntimeError(f"another run is writing to {folder}: {remedy}") from None


def training_options(options) -> dict:
    """The options that must stay the same when a run is resumed."""
    free = {"data_dir", "device", "num_particles", "num_test", "out", "quiet", "resume"}
    return {name: value for name, value in vars(options).items() if name not in free}


def refuse_other_run(options) -> None:
    """Raise ValueError if --out holds a run with other options, or a run and --resume is not given, or no run but files."""
    out = Path(options.out) if options.out else None
    if out is None or not out.is_dir():
        return
    if not any((out / name).exists() for name in (TRAINING, f"{TRAINING}.previous", "checkpoint.pt", METRICS)):
        files = {path.name for path in out.iterdir()} - {".lock", f".{OPTIONS}.tmp"}  # those that `claim` begins with
        if files and OPTIONS not in files:
            raise ValueError(f"{out} is not empty and holds no run ({OPTIONS} is missing): give another --out")
        return
    if not options.resume:
        raise ValueError(f"{out} holds a run: --resume goes on with it, another --out begins a new one")
    target = (out / TRAINING).resolve()  # of a symbolic link: the state before lies beside its target
    if not target.exists() and (before := target.with_name(f"{target.name}.previous")).exists():
        raise ValueError(
            f"{out} lacks {TRAINING}, and {before} is the state before it: move it to {TRAINING} to go on from it"
        )
    if not (out / TRAINING).exists() or not (out / OPTIONS).exists():
        raise ValueError(
            f"{out} holds a run without {TRAINING} or {OPTIONS}, which cannot be resumed: give another --out"
        )
    remedy = "the options of the run cannot be compared without it: put back a copy, or give another --out"
    for name, there in read_json(out / OPTIONS, remedy, "dataset", "likelihood", "seed").items():
        here = training_options(options).get(name)
        if here != there:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{out} holds a run with {option} {there}, and this one has {option} {here}: give another --out"
            )


def show_finished_run(options) -> None:
    """If the run in --out is complete and was evaluated as these options ask for, print its numbers and exit."""
    if not options.resume:
        return
    out = Path(options.out)
    first = pv.distributed.rank() == 0
    try:
        metrics = read_json(out / METRICS, "evaluating again from the checkpoint", "seconds", "test")
        # "total" is written last, when the run is finished.
        evaluated = metrics["test"]["num_particles"], metrics.get("num_test")
        if "total" not in metrics["seconds"]:
            return
        if evaluated != (options.num_particles, options.num_test):
            if first:
                images = f"--num-test {options.num_test}" if options.num_test else "all test images"
                print(
                    f"The run in {out}: training is finished; evaluating again with --num-particles "
                    f"{options.num_particles} and {images}"
                )
            return
        shown, files = report(metrics), [out / name for name in metrics.get("files", [])]
    except OSError:  # no file yet
        return
    except (ValueError, KeyError, TypeError) as error:
        if first:
            named = (
                error if isinstance(error, ValueError) else f"{out / METRICS} is damaged ({error!r}): evaluating again"
            )
            print(f"note: {named}", file=sys.stderr)
        return
    if missing := [path.name for path in files if not path.exists()]:
        if first:
            print(f"The run in {out} lacks {', '.join(missing)}: evaluating again to write them")
        return
    pv.load(out / TRAINING)  # a damaged one is an error
    try:
        pv.load(out / "checkpoint.pt")
    except (ValueError, OSError) as error:
        if first:
            print(f"note: {error}: evaluating again, to make it anew", file=sys.stderr)
        return
    if first:
        print(f"The run in {out} is finished; a different --num-particles or --num-test evaluates it again.\n{shown}")
    sys.exit(0)


def stop(options, out) -> NoReturn:
    """End a run that was interrupted, and say where its state is, and how to go on."""
    print(f"\n{how_to_go_on(options, out)}", file=sys.stderr)
    sys.exit(130)


def how_to_go_on(options, out) -> str:
    """The message of a stopped run: where its state is, and the command that resumes it."""
    more = ([] if options.out else ["--out", str(out)]) + ([] if options.resume else ["--resume"])
    if not (out / TRAINING).exists():
        return f"Stopped before training began. To start again: {command(*more)}"
    return f"Stopped; the state after the last finished epoch is in {out / TRAINING}. To go on: {command(*more)}"
