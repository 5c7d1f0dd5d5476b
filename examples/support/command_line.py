"""The command-line options of the examples, and the checks on them."""

import argparse
import math

from support import registry

import pyrovae as pv

# Defaults by data set; each setting has a command-line option.
DEFAULTS = {
    "image28": {"epochs": 40, "batch_size": 200, "learning_rate": 3e-3, "hidden": [400, 400], "latent_dim": 40},
    "digits": {"epochs": 300, "batch_size": 100, "learning_rate": 2e-3, "hidden": [200, 200], "latent_dim": 16},
    "freyfaces": {"epochs": 150, "batch_size": 50, "learning_rate": 2e-3, "hidden": [200, 200], "latent_dim": 20},
}


def parser_of(description) -> argparse.ArgumentParser:
    """A parser that reports an error in one line, without printing the usage."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help explains the options)\n")
    return parser


def parse_options(description) -> argparse.Namespace:
    parser = parser_of(description)
    add = parser.add_argument
    add("--prior", default="standard-normal", choices=registry.PRIORS, help="p(z) (default: standard-normal)")
    add("--guide", default="mean-field", choices=registry.GUIDES, help="q(z|x) (default: mean-field)")
    add("--likelihood", default="bernoulli", choices=registry.LIKELIHOODS, help="p(x|z) (default: bernoulli)")
    add("--scale", type=positive(float), help="standard deviation of --likelihood normal (default: 1)")
    add("--network", default="mlp", choices=registry.NETWORKS, help="networks of encoder and decoder (default: mlp)")
    add(
        "--objective",
        default="elbo",
        choices=registry.OBJECTIVES,
        help="objective that training maximises (default: elbo)",
    )
    add("--objective-particles", type=positive(int), default=1, help="particles per image in training (default: 1)")
    add("--beta", type=not_negative(float), default=1.0, help="weight of the KL in training (default: 1)")
    add(
        "--kl-warmup",
        type=not_negative(int),
        default=0,
        help="epochs over which the weight of the KL grows from 0 (default: 0)",
    )
    add(
        "--free-bits",
        type=not_negative(float),
        default=0.0,
        help="nats of KL per dimension left unpenalised (default: 0)",
    )
    add(
        "--dataset",
        default="auto",
        choices=pv.data.NAMES,
        help="auto (the default): MNIST, or digits if MNIST is unavailable",
    )
    add("--data-dir", help="data folder in torchvision's layout (default: $PYROVAE_DATA if set, else a cache folder)")
    add(
        "--binarization",
        choices=["dynamic", "static"],
        help="for --likelihood bernoulli: redraw binary training pixels at every use (dynamic, the default), or once (static)",
    )
    add(
        "--train-on-all",
        action="store_true",
        help="train on all 60,000 images without validation, and keep the last state",
    )
    add(
        "--latent-dim",
        type=positive(int),
        help="dimensions of z (default: 40; digits: 16; freyfaces: 20); with 2, manifold.png is drawn too",
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
        help="peak learning rate of Adam, with cosine decay (default: 0.003; digits, freyfaces: 0.002)",
    )
    add(
        "--num-particles",
        type=positive(int),
        default=1000,
        help="particles per test image to estimate log p(x) (default: 1000)",
    )
    add(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="auto (the default): CUDA if there is a GPU, else the CPU",
    )
    add("--seed", type=int, default=0, help="seed of initialisation, training and evaluation (default: 0)")
    add(
        "--data-seed",
        type=int,
        default=0,
        help="seed of the binary or dequantised validation and test images, independent of --seed (default: 0)",
    )
    add("--out", help="output folder for numbers and figures (default: a new folder under runs/)")
    add("--resume", action="store_true", help="resume the run in --out, or start it if there is none")
    add("--quiet", action="store_true", help="show no progress bars")
    options = parser.parse_args()
    if contradiction := contradiction_in(options):
        parser.error(contradiction)
    return options


def contradiction_in(options) -> str | None:
    """What is wrong with a combination of valid options; None if nothing is."""
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
    known = options.dataset != "auto"  # the data set that auto takes is known only after loading
    epochs = options.epochs or (DEFAULTS.get(options.dataset, DEFAULTS["image28"])["epochs"] if known else math.inf)
    if options.kl_warmup > epochs:
        return f"--kl-warmup {options.kl_warmup} is longer than the run: {epochs} epochs"
    if options.resume and not options.out:
        return "--resume needs --out, the folder of the run to resume"
    return None


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
