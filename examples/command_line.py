"""What the examples need besides their subject: options, the folder of a run, and the report."""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pyrovae as pv
from pyrovae.checkpoint.locks import locked

# Settings that suit the size of the data; each has its option.
DEFAULTS = {
    "image28": {"epochs": 40, "batch_size": 200, "learning_rate": 3e-3, "hidden": [400, 400], "latent_dim": 40},
    "digits": {"epochs": 300, "batch_size": 100, "learning_rate": 2e-3, "hidden": [200, 200], "latent_dim": 16},
    "freyfaces": {"epochs": 150, "batch_size": 50, "learning_rate": 2e-3, "hidden": [200, 200], "latent_dim": 20},
}

# In the folder of a run: what it goes on from, and its results.
TRAINING, OPTIONS, METRICS = "training.pt", "options.json", "metrics.json"


def parser_of(description) -> argparse.ArgumentParser:
    """A parser that says what is wrong in one line, without the whole of the usage above it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help explains the options)\n")
    return parser


def parse_options(description) -> argparse.Namespace:
    parser = parser_of(description)
    add = parser.add_argument
    add("--prior", default="standard-normal", choices=pv.registry.PRIORS, help="p(z) (default: standard-normal)")
    add("--guide", default="mean-field", choices=pv.registry.GUIDES, help="q(z|x) (default: mean-field)")
    add("--likelihood", default="bernoulli", choices=pv.registry.LIKELIHOODS, help="p(x|z) (default: bernoulli)")
    add("--scale", type=positive(float), help="standard deviation of --likelihood normal (default: 1)")
    add("--network", default="mlp", choices=pv.registry.NETWORKS, help="of encoder and decoder (default: mlp)")
    add("--objective", default="elbo", choices=pv.registry.OBJECTIVES, help="what training maximises (default: elbo)")
    add("--objective-particles", type=positive(int), default=1, help="particles per image in training (default: 1)")
    add("--beta", type=not_negative(float), default=1.0, help="weight of the KL in training (default: 1)")
    add(
        "--kl-warmup",
        type=not_negative(int),
        default=0,
        help="epochs over which the KL's weight grows from 0 (default: 0)",
    )
    add(
        "--free-bits",
        type=not_negative(float),
        default=0.0,
        help="nats of KL per dimension left unpenalised (default: 0)",
    )
    add("--dataset", default="auto", choices=pv.data.NAMES, help="auto: MNIST, or digits where it is not to be had")
    add("--data-dir", help="folder of the data, in torchvision's layout (default: $PYROVAE_DATA, else a cache folder)")
    add(
        "--binarization",
        choices=["dynamic", "static"],
        help="of images for --likelihood bernoulli: redraw training pixels at every use (the default), or once",
    )
    add(
        "--train-on-all",
        action="store_true",
        help="train on all 60,000 images, without validation (the last state is kept)",
    )
    add(
        "--latent-dim",
        type=positive(int),
        help="dimensions of z (default: 40; digits: 16; freyfaces: 20); 2 also draws manifold.png",
    )
    add(
        "--epochs",
        type=positive(int),
        help="passes over the training images (default: 40; digits: 300; freyfaces: 150)",
    )
    add("--batch-size", type=positive(int), help="images per SVI step (default: 200; digits: 100; freyfaces: 50)")
    add(
        "--learning-rate",
        type=positive(float),
        help="Adam's highest rate, decayed by half a cosine (default: 0.003; digits, freyfaces: 0.002)",
    )
    add(
        "--num-particles",
        type=positive(int),
        default=1000,
        help="particles per test image for log p(x) (default: 1000)",
    )
    add(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="auto: CUDA where there is a GPU, else the CPU",
    )
    add("--seed", type=int, default=0, help="of initialisation, training and evaluation (default: 0)")
    add(
        "--data-seed",
        type=int,
        default=0,
        help="of the test and validation images' binary or dequantised pixels, apart from --seed (default: 0)",
    )
    add("--out", help="folder for numbers and figures (default: a new one under runs/)")
    add("--resume", action="store_true", help="go on with the run in --out, or begin it where there is none yet")
    add("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    if contradiction := contradiction_in(options):
        parser.error(contradiction)
    return options


def contradiction_in(options) -> str | None:
    """What is wrong with options that are right each by itself; None if nothing is."""
    if options.scale is not None and options.likelihood != "normal":
        return f"--scale {options.scale:g} is for --likelihood normal, and --likelihood is {options.likelihood}"
    if options.binarization is not None and options.likelihood != "bernoulli":
        return (
            f"--binarization {options.binarization} is for --likelihood bernoulli, and --likelihood is "
            f"{options.likelihood}: its images are not binary"
        )
    if options.objective in ("iwae", "dreg"):
        typed = {
            "--beta": (options.beta, 1),
            "--kl-warmup": (options.kl_warmup, 0),
            "--free-bits": (options.free_bits, 0),
        }
        if weights := [f"{name} {value:g}" for name, (value, default) in typed.items() if value != default]:
            return f"--objective {options.objective} has no KL to weigh: leave out {', '.join(weights)}"
        if options.objective_particles < 2:
            return f"--objective {options.objective} needs --objective-particles of 2 or more: with one it is the ELBO"
    known = options.dataset != "auto"  # which data auto takes is seen when they are loaded
    epochs = options.epochs or (DEFAULTS.get(options.dataset, DEFAULTS["image28"])["epochs"] if known else math.inf)
    if options.kl_warmup > epochs:
        return f"--kl-warmup {options.kl_warmup} is longer than the run: {epochs} epochs"
    if options.resume and not options.out:
        return "--resume needs --out, the folder of the run to go on with"
    return None


def training_options(options) -> dict:
    """Those that a run has to keep when it is gone on with."""
    free = {"data_dir", "device", "num_particles", "out", "quiet", "resume"}
    return {name: value for name, value in vars(options).items() if name not in free}


def refuse_other_run(options) -> None:
    """Raise ValueError if --out holds a run that is not to be gone on with, or one with other options."""
    out = Path(options.out) if options.out else None
    if out is None or not any((out / name).exists() for name in (TRAINING, "checkpoint.pt", METRICS)):
        return
    if not options.resume:
        raise ValueError(f"{out} holds a run: --resume goes on with it, another --out begins a new one")
    if not (out / TRAINING).exists() or not (out / OPTIONS).exists():
        raise ValueError(
            f"{out} holds a run without {TRAINING} and {OPTIONS}, which cannot be gone on with: give another --out"
        )
    for name, there in json.loads((out / OPTIONS).read_text()).items():
        here = training_options(options).get(name)
        if here != there:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{out} holds a run with {option} {there}, and this one has {option} {here}: give another --out"
            )


def show_finished_run(options) -> None:
    """Exit with the numbers of the run in --out if it is finished, and was evaluated as asked for now."""
    if not options.resume:
        return
    try:
        metrics = json.loads((Path(options.out) / METRICS).read_text())
    except (OSError, ValueError):  # there is none yet, or it was cut
        return
    # The total is what is written last.
    if "total" in metrics["seconds"] and metrics["test"]["num_particles"] == options.num_particles:
        if pv.distributed.rank() == 0:
            print(
                f"The run in {options.out} is finished; another --num-particles evaluates it again.\n{report(metrics)}"
            )
        sys.exit(0)


def positive(kind):
    return checked(kind, "positive", lambda value: value > 0)


def not_negative(kind):
    return checked(kind, "0 or more", lambda value: value >= 0)


def checked(kind, name, accepts):
    def parse(text):
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {name}, found {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


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
        images = pv.registry.LIKELIHOODS[options.likelihood].images
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
    images = pv.registry.LIKELIHOODS[options.likelihood].images
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


def write_json(path, content) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)  # whole at any moment


def metrics_of(options, data, device, result, lml, active, seconds) -> dict:
    """All of a run in numbers."""
    return {
        "dataset": data.name,
        "binarization": data.binarization,
        **parts_of(options),
        "data_seed": data.data_seed,
        "num_train": len(data.train),
        "num_validation": 0 if data.validation is None else len(data.validation),
        "seed": options.seed,
        "device": str(device),
        "processes": pv.distributed.num_ranks(),
        "latent_dim": options.latent_dim,
        "hidden": options.hidden,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "best_epoch": result.best_epoch,
        "test": {
            "num_data": len(lml),
            "num_particles": lml.num_particles,
            "elbo": lml.elbo.mean().item(),
            "log_marginal_likelihood": lml.mean,
            "log_marginal_likelihood_stderr": lml.mean_stderr,
            "log_marginal_likelihood_mc_stderr": lml.mean_mc_stderr,
            "bias_estimate": lml.bias_estimate,
            "gap": lml.gap.mean().item(),
            "bits_per_pixel": bits_per_pixel(lml.mean, data),
            "median_ess": lml.ess.median().item(),
            "pareto_k_limit": lml.pareto_k_limit,
            "share_pareto_k_above_limit": lml.share_of_bad_k(),
            "share_pareto_k_above_0.7": lml.share_of_bad_k(0.7),
            "active_units": int(active.sum()),
        },
        "seconds": seconds,
        "versions": versions(),
        "git_revision": git_revision(),
        "command": command(),
    }


def parts_of(options) -> dict:
    """The parts of model, guide and objective, by name."""
    names = ("prior", "guide", "likelihood", "network", "objective", "beta", "kl_warmup", "free_bits")
    return {name: getattr(options, name) for name in (*names, "objective_particles")} | {"scale": options.scale or 1.0}


def command(*more) -> str:
    """How this program was called, and perhaps more."""
    return shlex.join([sys.executable, *sys.argv, *more])


def how_to_go_on(options, out) -> str:
    """What a run that was stopped has left, and the command that goes on with it."""
    more = [] if options.out else ["--out", str(out)]
    if not (out / TRAINING).exists():
        return f"Stopped before training began. To begin again: {command(*more, '--resume')}"
    if not options.resume:
        more.append("--resume")
    return f"Stopped; the state after the last finished epoch is in {out / TRAINING}. To go on: {command(*more)}"


def bits_per_pixel(log_prob, data) -> float:
    """-log2 mass per pixel; a density of dequantised images bounds the mass of their grey levels."""
    pixels = data.data_shape.numel()
    return -log_prob / pixels / math.log(2) + (math.log2(data.num_levels) if data.is_dequantized else 0.0)


def report(metrics) -> str:
    test, seconds = metrics["test"], metrics["seconds"]
    one = test["num_particles"] == 1
    rows = [
        ("ELBO", f"{test['elbo']:.2f} nats"),
        (
            "log p(x)",
            f"{test['log_marginal_likelihood']:.2f} +- {test['log_marginal_likelihood_stderr']:.2f} nats over images "
            f"({'one particle: the ELBO' if one else '+- {:.3f} Monte Carlo'.format(test['log_marginal_likelihood_mc_stderr'])})",
        ),
        ("gap, KL(q || posterior)", "unknown with one particle" if one else f"{test['gap']:.2f} nats or more"),
        (
            "bias of log p(x)",
            "unknown with one particle" if one else f"{test['bias_estimate']:.3f} nats too low or more",
        ),
        ("bits per pixel", f"{test['bits_per_pixel']:.4f}"),
        ("median ESS", f"{test['median_ess']:.1f} of {test['num_particles']}"),
        ("Pareto k too high", pareto_row(test)),
        ("active units", f"{test['active_units']} of {metrics['latent_dim']}"),
        *((f"seconds, {name}", f"{value:.1f}") for name, value in seconds.items()),
    ]
    table = "\n".join(f"  {name:24} {value}" for name, value in rows)
    binarization = f", {metrics['binarization']} binarisation" if metrics["binarization"] else ""
    meaning = (
        "With one particle log p(x) is not told from the ELBO: --num-particles 1000 shows the gap between them."
        if one
        else f"The ELBO lies {test['gap']:.2f} nats or more below log p(x): that gap is KL(q(z|x) || p(z|x)), what the guide "
        f"misses of the true posterior."
    )
    return (
        f"\n{metrics['dataset']}{binarization}: {metrics['prior']} prior, "
        f"{metrics['guide']} guide, {metrics['likelihood']} likelihood, {metrics['network']} networks; "
        f"{test['num_data']:,} test images, {test['num_particles']:,} particles each\n{table}\n{meaning}"
    )


def pareto_row(test) -> str:
    bad, worse, limit = (
        test[name] for name in ("share_pareto_k_above_limit", "share_pareto_k_above_0.7", "pareto_k_limit")
    )
    if math.isnan(bad):
        return "unknown below 25 particles"
    strict = f" (> 0.70: {worse:.1%})" if limit < 0.7 else ""
    return f"{bad:.1%} of the images > {limit:.2f}{strict}: not to be trusted" if bad else f"no image > {limit:.2f}"


def versions() -> dict[str, str]:
    packages = ("pyrovae", "torch", "torchvision", "pyro-ppl", "zuko", "arviz", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
