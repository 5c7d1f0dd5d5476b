"""The folder of a run: one run in each, begun or gone on with; and the data that suit its options."""

import sys
from datetime import datetime
from pathlib import Path

from support import registry
from support.command_line import DEFAULTS
from support.metrics import report
from support.provenance import command, read_json, write_json

import pyrovae as pv
from pyrovae.training.checkpoint_file import earlier, read
from pyrovae.training.locks import locked

# What a run goes on from, and its results.
TRAINING, OPTIONS, METRICS = "training.pt", "options.json", "metrics.json"


def begin(options, held):
    """(device, data, folder) of a run, or an error in one line; options not given become those that suit the data."""
    try:
        device = pv.pick_device(options.device)
        refuse_other_run(options)
        show_finished_run(options)
        data = load_data(options)
        defaults = DEFAULTS.get(data.name, DEFAULTS["image28"])
        if options.kl_warmup > (epochs := options.epochs or defaults["epochs"]):
            raise ValueError(f"--kl-warmup {options.kl_warmup} is longer than the run: {epochs} epochs")
        out = claim_folder(options, data, held)
    except (ValueError, RuntimeError, OSError) as error:  # not there, damaged, taken: the message says what to do
        sys.exit(f"error: {error}")
    for name, value in defaults.items():  # only now: what was typed is what a resumed run is compared with
        setattr(options, name, getattr(options, name, None) or value)
    if pv.distributed.rank() == 0:
        images = registry.LIKELIHOODS[options.likelihood].images
        kind = f"{data.num_levels} grey levels" if images == "levels" else images
        held_out = "no" if data.validation is None else f"{len(data.validation):,}"
        print(
            f"{data.name}: {len(data.train):,} training, {held_out} validation and {len(data.test):,} test images of "
            f"{data.data_shape.numel()} pixels ({kind}), {device}"
        )
    return device, data, out


def load_data(options):
    """Images made to suit the likelihood.

    Binary pixels are redrawn from the grey values of the training images at every use (dynamic); the test images are drawn
    once, from a seed of their own.
    """
    images = registry.LIKELIHOODS[options.likelihood].images
    data = pv.data.load(options.dataset, options.data_dir, binarization=None, train_on_all=options.train_on_all)
    if images == "binary":
        return data.binarized(options.binarization or "dynamic", options.data_seed)
    return data.dequantized(options.data_seed) if images == "continuous" else data


def claim_folder(options, data, held) -> Path:
    """One folder for everything, for this run alone until it ends."""
    out = Path(options.out or f"runs/{data.name}-{datetime.now():%Y%m%d-%H%M%S}")
    if pv.distributed.rank() > 0:
        return out  # the first process writes
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(out, "wait until it has ended, or give another --out"))
    write_json(out / OPTIONS, training_options(options))
    return out


def training_options(options) -> dict:
    """Those that a run has to keep when it is gone on with."""
    free = {"data_dir", "device", "num_particles", "out", "quiet", "resume"}
    return {name: value for name, value in vars(options).items() if name not in free}


def refuse_other_run(options) -> None:
    """Raise ValueError if --out holds a run that is not to be gone on with, or one with other options."""
    out = Path(options.out) if options.out else None
    if out is None or not any(
        (out / name).exists() for name in (TRAINING, f"{TRAINING}.previous", "checkpoint.pt", METRICS)
    ):
        return
    if not options.resume:
        raise ValueError(f"{out} holds a run: --resume goes on with it, another --out begins a new one")
    if not (out / TRAINING).exists() and (before := earlier(out / TRAINING)).exists():
        raise ValueError(
            f"{out} lacks {TRAINING}, and {before} is the state before it: move it to {TRAINING} to go on from it"
        )
    if not (out / TRAINING).exists() or not (out / OPTIONS).exists():
        raise ValueError(
            f"{out} holds a run without {TRAINING} and {OPTIONS}, which cannot be gone on with: give another --out"
        )
    remedy = "without it nobody knows what the run was: put back a copy, or give another --out"
    for name, there in read_json(out / OPTIONS, remedy, "dataset", "likelihood", "seed").items():
        here = training_options(options).get(name)
        if here != there:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{out} holds a run with {option} {there}, and this one has {option} {here}: give another --out"
            )


def show_finished_run(options) -> None:
    """Exit with the numbers of the run in --out if it is finished, all its files are there, and it was evaluated as asked for now."""
    if not options.resume:
        return
    out = Path(options.out)
    first = pv.distributed.rank() == 0
    try:
        metrics = read_json(out / METRICS, "the run is evaluated again, from its checkpoint", "seconds", "test")
        # The total is what is written last.
        if "total" not in metrics["seconds"] or metrics["test"]["num_particles"] != options.num_particles:
            return
        shown, files = report(metrics), [out / name for name in metrics.get("files", [])]
    except OSError:  # there is none yet
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
            print(f"The run in {out} lacks {', '.join(missing)}: evaluating again, to make them anew")
        return
    read(out / TRAINING)  # a damaged one is an error
    try:
        read(out / "checkpoint.pt")
    except (ValueError, OSError) as error:
        if first:
            print(f"note: {error}: evaluating again, to make it anew", file=sys.stderr)
        return
    if first:
        print(f"The run in {out} is finished; another --num-particles evaluates it again.\n{shown}")
    sys.exit(0)


def how_to_go_on(options, out) -> str:
    """What a run that was stopped has left, and the command that goes on with it."""
    more = [] if options.out else ["--out", str(out)]
    if not (out / TRAINING).exists():
        return f"Stopped before training began. To begin again: {command(*more, '--resume')}"
    if not options.resume:
        more.append("--resume")
    return f"Stopped; the state after the last finished epoch is in {out / TRAINING}. To go on: {command(*more)}"
