"""The folder of a run, new or resumed, and the data that its options ask for. Each folder holds one run."""

import sys
from datetime import datetime
from pathlib import Path

from support import registry
from support.command_line import DEFAULTS
from support.metrics import report
from support.provenance import command, read_json, write_json

import pyrovae as pv
from pyrovae.training.checkpoint_file import earlier, locked, read

# Files: the state to resume from, the options, the results.
TRAINING, OPTIONS, METRICS = "training.pt", "options.json", "metrics.json"


def begin(options, held):
    """Return (device, data, folder) of a run, or exit with a one-line error; fill in the defaults for the data."""
    try:
        device = pv.pick_device(options.device)
        refuse_other_run(options)
        show_finished_run(options)
        data = load_data(options)
        defaults = DEFAULTS.get(data.name, DEFAULTS["image28"])
        if options.kl_warmup > (epochs := options.epochs or defaults["epochs"]):
            raise ValueError(f"--kl-warmup {options.kl_warmup} is longer than the run: {epochs} epochs")
        out = claim_folder(options, data, held)
    except (ValueError, RuntimeError, OSError) as error:  # a missing, damaged or locked file
        sys.exit(f"error: {error}")
    for name, value in defaults.items():  # last, because a resumed run is compared by the options as typed
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
    """Load images in the form that the likelihood needs.

    With dynamic binarisation, training pixels are drawn anew from their grey values at every use. Test images are drawn
    once, with a separate seed.
    """
    images = registry.LIKELIHOODS[options.likelihood].images
    data = pv.data.load(options.dataset, options.data_dir, binarization=None, train_on_all=options.train_on_all)
    if images == "binary":
        return data.binarized(options.binarization or "dynamic", options.data_seed)
    return data.dequantized(options.data_seed) if images == "continuous" else data


def claim_folder(options, data, held) -> Path:
    """Create the folder of the run and lock it until the run ends."""
    out = Path(options.out or f"runs/{data.name}-{datetime.now():%Y%m%d-%H%M%S}")
    if pv.distributed.rank() > 0:
        return out  # only the first process writes
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(out, "wait until it has ended, or give another --out"))
    write_json(out / OPTIONS, training_options(options))
    return out


def training_options(options) -> dict:
    """The options that must stay the same when a run is resumed."""
    free = {"data_dir", "device", "num_particles", "out", "quiet", "resume"}
    return {name: value for name, value in vars(options).items() if name not in free}


def refuse_other_run(options) -> None:
    """Raise ValueError if --out holds a run with other options, or a run and --resume is not given."""
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
    """If the run in --out is complete and was evaluated with as many particles, print its numbers and exit."""
    if not options.resume:
        return
    out = Path(options.out)
    first = pv.distributed.rank() == 0
    try:
        metrics = read_json(out / METRICS, "evaluating again from the checkpoint", "seconds", "test")
        # "total" is written last, when the run is finished.
        if "total" not in metrics["seconds"] or metrics["test"]["num_particles"] != options.num_particles:
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
    read(out / TRAINING)  # a damaged one is an error
    try:
        read(out / "checkpoint.pt")
    except (ValueError, OSError) as error:
        if first:
            print(f"note: {error}: evaluating again, to make it anew", file=sys.stderr)
        return
    if first:
        print(f"The run in {out} is finished; a different --num-particles evaluates it again.\n{shown}")
    sys.exit(0)


def how_to_go_on(options, out) -> str:
    """The message of a stopped run: where its state is, and the command that resumes it."""
    more = [] if options.out else ["--out", str(out)]
    if not (out / TRAINING).exists():
        return f"Stopped before training began. To start again: {command(*more, '--resume')}"
    if not options.resume:
        more.append("--resume")
    return f"Stopped; the state after the last finished epoch is in {out / TRAINING}. To go on: {command(*more)}"
