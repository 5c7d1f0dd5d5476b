"""A variational autoencoder as two Pyro programs, trained by SVI, and how tight its bound on log p(x) is.

    python examples/mnist_svi.py

trains on MNIST, estimates log p(x) of the test images by importance sampling, and writes numbers and figures to a folder
under runs/. Without MNIST and without a network it takes the 8x8 digits that come with scikit-learn. Several processes,

    torchrun --nproc-per-node=2 examples/mnist_svi.py

share each batch and the evaluation: one for each GPU, for instance.
"""

import argparse
import csv
import json
import logging
import math
import platform
import subprocess
import sys
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # figures go to files

import matplotlib.pyplot as plt
import pyro
import torch

import pyrovae as pv

# Settings that suit the size of the data; each has its option.
DEFAULTS = {
    "image28": {"epochs": 40, "batch_size": 200, "learning_rate": 3e-3, "hidden": [400, 400], "latent_dim": 40},
    "digits": {"epochs": 300, "batch_size": 100, "learning_rate": 2e-3, "hidden": [200, 200], "latent_dim": 16},
    "freyfaces": {"epochs": 150, "batch_size": 50, "learning_rate": 2e-3, "hidden": [200, 200], "latent_dim": 20},
}


def main() -> None:
    options = parse_options()
    rank, num_ranks = pv.distributed.rank(), pv.distributed.num_ranks()  # 0 of 1, but under torchrun
    options.quiet |= rank > 0
    started = time.perf_counter()
    pyro.set_rng_seed(options.seed)
    device = pv.pick_device(options.device)

    # Data: images, made to suit the likelihood. Binary pixels are redrawn from the grey values of the training images at
    # every use (dynamic); the test images are drawn once, from a seed of their own.
    choice = pv.registry.LIKELIHOODS[options.likelihood]
    data = pv.data.load(options.dataset, options.data_dir, binarization=None, train_on_all=options.train_on_all)
    if choice.images == "binary":
        data = data.binarized(options.binarization, options.data_seed)
    elif choice.images == "continuous":
        data = data.dequantized(options.data_seed)
    defaults = DEFAULTS.get(data.name, DEFAULTS["image28"])
    latent_dim = options.latent_dim or defaults["latent_dim"]
    epochs = options.epochs or defaults["epochs"]
    batch_size = options.batch_size or defaults["batch_size"]
    learning_rate = options.learning_rate or defaults["learning_rate"]
    hidden, pixels = defaults["hidden"], data.data_shape.numel()
    if rank == 0:
        print(
            f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images of {pixels} {choice.images} "
            f"pixels, {device}"
        )

    # The model p(z) p(x|z) and the guide q(z|x): two Pyro programs made of exchangeable parts, here by their names.
    network = pv.registry.NETWORKS[options.network]
    guide = pv.registry.GUIDES[options.guide](network.encoder(data.data_shape, hidden), latent_dim)
    prior = pv.registry.PRIORS[options.prior](latent_dim, guide, data.train)
    likelihood = choice(lambda out_shape: network.decoder(latent_dim, out_shape, hidden), data, options.scale)
    model = pv.GenerativeModel(prior, likelihood)

    # The objective: the ELBO, unless another is asked for. Evaluation reports the real ELBO whatever it is.
    steps_per_epoch = -(-len(data.train) // batch_size)
    objective = pv.registry.make_objective(
        options.objective,
        options.objective_particles,
        beta=options.beta,
        kl_warmup_steps=options.kl_warmup * steps_per_epoch,
        free_bits=options.free_bits,
    )

    # Training: pyro.infer.SVI(model, guide, Adam, objective), one step per batch.
    result = pv.fit(
        model,
        guide,
        data.train,
        transform=data.transform,
        validation=data.validation,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        loss=objective,
        device=device,
        progress=not options.quiet,
    )

    # Evaluation: log p(x) of every test image, and with it the gap that the ELBO leaves.
    evaluation_started = time.perf_counter()
    share = data.test.tensor_split(num_ranks)[rank]
    lml = pv.log_marginal_likelihood(
        model, guide, share, num_particles=options.num_particles, progress=not options.quiet
    )
    lml = pv.LogMarginalLikelihood.concatenate(pv.distributed.gather(lml))
    if rank > 0:
        return  # the first process writes
    active = pv.active_units(guide, data.test)
    seconds = {"training": result.seconds, "evaluation": time.perf_counter() - evaluation_started}

    # Everything into one folder.
    out = Path(options.out or f"runs/{data.name}-{datetime.now():%Y%m%d-%H%M%S}")
    out.mkdir(parents=True, exist_ok=True)
    figures_started = time.perf_counter()
    write_figures(out, model, guide, data, result, lml, device)
    parts = {
        name: getattr(options, name)
        for name in ("prior", "guide", "likelihood", "network", "objective", "scale", "beta")
    }
    parts |= {name: getattr(options, name) for name in ("kl_warmup", "free_bits", "objective_particles")}
    pv.save(
        out / "checkpoint.pt",
        model,
        guide,
        latent_dim=latent_dim,
        hidden=hidden,
        data_shape=list(data.data_shape),
        parts=parts,
    )
    drawn = data.test[: min(100, len(data.test))]
    lml.to_inference_data(model=model, guide=guide, args=(drawn,)).to_netcdf(str(out / "evaluation.nc"))
    with (out / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, result.history[0])
        writer.writeheader()
        writer.writerows(result.history)
    seconds["figures and files"] = time.perf_counter() - figures_started
    seconds["total"] = time.perf_counter() - started
    metrics = {
        "dataset": data.name,
        "binarization": data.binarization,
        **parts,
        "data_seed": data.data_seed,
        "num_train": len(data.train),
        "num_validation": 0 if data.validation is None else len(data.validation),
        "seed": options.seed,
        "device": str(device),
        "latent_dim": latent_dim,
        "hidden": hidden,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
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
            "share_pareto_k_above_0.7": lml.share_of_bad_k(0.7),
            "active_units": int(active.sum()),
        },
        "seconds": seconds,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("pyrovae", "torch", "torchvision", "pyro-ppl", "arviz", "numpy")},
        "git_revision": git_revision(),
        "command": " ".join(["python", *sys.argv]),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(report(metrics, out))


def bits_per_pixel(log_prob, data) -> float:
    """-log2 mass per pixel; a density of dequantised images bounds the mass of their grey levels."""
    pixels = data.data_shape.numel()
    return -log_prob / pixels / math.log(2) + (math.log2(data.num_levels) if data.is_dequantized else 0.0)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prior", default="standard-normal", choices=pv.registry.PRIORS, help="p(z) (default: standard-normal)")
    add("--guide", default="mean-field", choices=pv.registry.GUIDES, help="q(z|x) (default: mean-field)")
    add("--likelihood", default="bernoulli", choices=pv.registry.LIKELIHOODS, help="p(x|z) (default: bernoulli)")
    add("--scale", type=positive(float), default=1.0, help="standard deviation of --likelihood normal (default: 1)")
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
        default="dynamic",
        choices=["dynamic", "static"],
        help="of images for --likelihood bernoulli: redraw training pixels at every use, or once",
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
    add("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args()


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


@torch.no_grad()
def write_figures(out, model, guide, data, result, lml, device):
    def write(name):
        plt.savefig(out / name, dpi=150)
        plt.close()

    cmap = "gray" if data.name == "freyfaces" else "gray_r"
    pv.plots.image_grid(
        model.generate(128, mean=True).cpu(), title="means of p(x|z) for z drawn from the prior", cmap=cmap
    )
    write("samples.png")
    shown = data.test[:64]
    means = model.decode(guide.posterior(shown.to(device)).mean)
    pv.plots.reconstructions(shown, means.cpu(), cmap=cmap)
    write("reconstructions.png")
    pv.plots.training(result.history)
    write("training.png")
    pv.plots.tightness(lml.elbo, lml.log_prob, lml.curve_particles, lml.curve)
    write("tightness.png")
    if model.prior.latent_dim == 2 and isinstance(model.prior, pv.priors.StandardNormal):
        # Equal steps of the prior's probability, so that each picture stands for as much of p(z).
        steps = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, 20))
        grid = torch.stack(torch.meshgrid(steps, steps.flip(0), indexing="xy"), -1)
        edges = (steps[0].item(), steps[-1].item())
        pv.plots.manifold(model.decode(grid.to(device)).cpu(), extent=(*edges, *edges), cmap=cmap)
        write("manifold.png")


def report(metrics, out) -> str:
    test, seconds = metrics["test"], metrics["seconds"]
    bad_k = test["share_pareto_k_above_0.7"]
    rows = [
        ("ELBO", f"{test['elbo']:.2f} nats"),
        (
            "log p(x)",
            f"{test['log_marginal_likelihood']:.2f} +- {test['log_marginal_likelihood_stderr']:.2f} nats over images "
            f"(+- {test['log_marginal_likelihood_mc_stderr']:.3f} Monte Carlo)",
        ),
        ("gap, KL(q || posterior)", f"{test['gap']:.2f} nats or more"),
        ("bias of log p(x)", f"{test['bias_estimate']:.3f} nats too low or more"),
        ("bits per pixel", f"{test['bits_per_pixel']:.4f}"),
        ("median ESS", f"{test['median_ess']:.1f} of {test['num_particles']}"),
        ("Pareto k > 0.7", f"{bad_k:.1%} of the images" if bad_k == bad_k else "unknown below 25 particles"),
        ("active units", f"{test['active_units']} of {metrics['latent_dim']}"),
        *((f"seconds, {name}", f"{value:.1f}") for name, value in seconds.items()),
    ]
    table = "\n".join(f"  {name:24} {value}" for name, value in rows)
    binarization = f", {metrics['binarization']} binarisation" if metrics["binarization"] else ""
    return (
        f"\n{metrics['dataset']}{binarization}: {metrics['prior']} prior, "
        f"{metrics['guide']} guide, {metrics['likelihood']} likelihood, {metrics['network']} networks; "
        f"{test['num_data']:,} test images, {test['num_particles']:,} particles each\n{table}\n"
        f"The ELBO lies {test['gap']:.2f} nats or more below log p(x): that gap is KL(q(z|x) || p(z|x)), what the guide "
        f"misses of the true posterior.\nNumbers and figures: {out}"
    )


def git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    try:
        with pv.distributed.joined():
            main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
