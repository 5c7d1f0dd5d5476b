"""A variational autoencoder as two Pyro programs, trained by SVI, and how tight its bound on log p(x) is.

    python examples/mnist_svi.py

trains on MNIST, estimates log p(x) of the test images by importance sampling, and writes numbers and figures to a folder
under runs/. Without MNIST and without a network it takes the 8x8 digits that come with scikit-learn.
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
from pyro.infer import Trace_ELBO

import pyrovae as pv

# Settings that suit the size of the data; each has its option.
DEFAULTS = {
    "image28": {"epochs": 34, "batch_size": 200, "learning_rate": 3e-3, "hidden": [400, 400], "latent_dim": 40},
    "digits": {"epochs": 300, "batch_size": 100, "learning_rate": 2e-3, "hidden": [200, 200], "latent_dim": 16},
}


def main() -> None:
    options = parse_options()
    started = time.perf_counter()
    pyro.set_rng_seed(options.seed)
    device = pv.pick_device(options.device)

    # Data: images of binary pixels. The training images are redrawn from their grey values at every use (dynamic), the
    # test images are drawn once, from a seed of their own.
    data = pv.data.load(
        options.dataset,
        options.data_dir,
        binarization=options.binarization,
        data_seed=options.data_seed,
        train_on_all=options.train_on_all,
    )
    defaults = DEFAULTS["digits" if data.name == "digits" else "image28"]
    latent_dim = options.latent_dim or defaults["latent_dim"]
    epochs = options.epochs or defaults["epochs"]
    batch_size = options.batch_size or defaults["batch_size"]
    learning_rate = options.learning_rate or defaults["learning_rate"]
    hidden, pixels = defaults["hidden"], data.data_shape.numel()
    print(
        f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images of {pixels} binary pixels, {device}"
    )

    # The model p(z) p(x|z) and the guide q(z|x): two Pyro programs made of exchangeable parts.
    prior = pv.priors.StandardNormal(latent_dim)
    decoder = pv.nets.MLP(latent_dim, hidden, pixels, layer_norm=True)
    likelihood = pv.likelihoods.Bernoulli(decoder, data.data_shape, data_mean=data.train.mean(0))
    model = pv.GenerativeModel(prior, likelihood)
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(pixels, hidden, layer_norm=True), latent_dim)

    # Training: pyro.infer.SVI(model, guide, Adam, Trace_ELBO()), one step per batch.
    result = pv.fit(
        model,
        guide,
        data.train,
        transform=data.transform,
        validation=data.validation,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        loss=Trace_ELBO(),
        device=device,
        progress=not options.quiet,
    )

    # Evaluation: log p(x) of every test image, and with it the gap that the ELBO leaves.
    evaluation_started = time.perf_counter()
    lml = pv.log_marginal_likelihood(
        model, guide, data.test, num_particles=options.num_particles, progress=not options.quiet
    )
    active = pv.active_units(guide, data.test)
    seconds = {"training": result.seconds, "evaluation": time.perf_counter() - evaluation_started}

    # Everything into one folder.
    out = Path(options.out or f"runs/{data.name}-{datetime.now():%Y%m%d-%H%M%S}")
    out.mkdir(parents=True, exist_ok=True)
    figures_started = time.perf_counter()
    write_figures(out, model, guide, data, result, lml, device)
    pv.save(out / "checkpoint.pt", model, guide, latent_dim=latent_dim, hidden=hidden, data_shape=list(data.data_shape))
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
            "bits_per_pixel": -lml.mean / pixels / math.log(2),
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


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="auto", choices=pv.data.NAMES, help="auto: MNIST, or digits where it is not to be had")
    add("--data-dir", help="folder of the data, in torchvision's layout (default: $PYROVAE_DATA, else a cache folder)")
    add(
        "--binarization",
        default="dynamic",
        choices=["dynamic", "static"],
        help="redraw training pixels at every use, or once",
    )
    add(
        "--train-on-all",
        action="store_true",
        help="train on all 60,000 images, without validation (the last state is kept)",
    )
    add("--latent-dim", type=positive(int), help="dimensions of z (default: 40; digits: 16); 2 also draws manifold.png")
    add("--epochs", type=positive(int), help="passes over the training images (default: 34; digits: 300)")
    add("--batch-size", type=positive(int), help="images per SVI step (default: 200; digits: 100)")
    add(
        "--learning-rate",
        type=positive(float),
        help="Adam's highest rate, decayed by half a cosine (default: 0.003; digits: 0.002)",
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
        help="of the binary test and validation images, apart from --seed (default: 0)",
    )
    add("--out", help="folder for numbers and figures (default: a new one under runs/)")
    add("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args()


def positive(kind):
    def parse(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive, found {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


@torch.no_grad()
def write_figures(out, model, guide, data, result, lml, device):
    def write(name):
        plt.savefig(out / name, dpi=150)
        plt.close()

    pv.plots.image_grid(model.generate(128, mean=True).cpu(), title="means of p(x|z) for z drawn from the prior")
    write("samples.png")
    shown = data.test[:64]
    means = model.decode(guide.posterior(shown.to(device)).mean)
    pv.plots.reconstructions(shown, means.cpu())
    write("reconstructions.png")
    pv.plots.training(result.history)
    write("training.png")
    pv.plots.tightness(lml.elbo, lml.log_prob, lml.curve_particles, lml.curve)
    write("tightness.png")
    if model.prior.latent_dim == 2:
        # Equal steps of the prior's probability, so that each picture stands for as much of p(z).
        steps = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, 20))
        grid = torch.stack(torch.meshgrid(steps, steps.flip(0), indexing="xy"), -1)
        edges = (steps[0].item(), steps[-1].item())
        pv.plots.manifold(model.decode(grid.to(device)).cpu(), extent=(*edges, *edges))
        write("manifold.png")


def report(metrics, out) -> str:
    test, seconds = metrics["test"], metrics["seconds"]
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
        ("Pareto k > 0.7", f"{test['share_pareto_k_above_0.7']:.1%} of the images"),
        ("active units", f"{test['active_units']} of {metrics['latent_dim']}"),
        *((f"seconds, {name}", f"{value:.1f}") for name, value in seconds.items()),
    ]
    table = "\n".join(f"  {name:24} {value}" for name, value in rows)
    return (
        f"\n{metrics['dataset']}, {metrics['binarization']} binarisation: {test['num_data']:,} test images, "
        f"{test['num_particles']:,} particles each\n{table}\n"
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
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
