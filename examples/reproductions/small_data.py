"""Measure the test NLL of small data sets: digits, Frey faces and two tables, with three priors and two seeds.

    python examples/reproductions/small_data.py --out small_data.json

All models have two hidden layers of 200 with LayerNorm in encoder and decoder, and are trained by Adam with a cosine; the
state with the best validation ELBO is kept. log p(x) is importance sampled for all test data. For the tables, the
multivariate normal of the training rows shows what a model without latents reaches.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))  # examples/

from support import parts
from support.script import git_revision, parser_of, positive, processor, versions, write_json

import pyrovae as pv

HIDDEN, BATCH_SIZE, LEARNING_RATE, NUM_PSEUDO_INPUTS = [200, 200], 100, 2e-3, 100


class Task(NamedTuple):
    """Data to model.

    Attributes:
        train, validation, test: what the programs are called with, after `transform` for `train`.
        likelihood: decoder -> likelihood.
        outputs: numbers that the decoder returns for a datum.
        latent_dim: latents.
        epochs: epochs of training.
        transform: argument of `pv.fit`.
        unit: what log p(x) is a density of.
        without_latents: NLL of the multivariate normal of the training rows, or None.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    likelihood: Callable
    outputs: int
    latent_dim: int
    epochs: int
    transform: Callable | None = None
    unit: str = ""
    without_latents: float | None = None


def digits(options) -> Task:
    data = pv.data.digits()
    likelihood = partial(pv.likelihoods.Bernoulli, data_shape=data.data_shape, data_mean=data.train.mean(0))
    of_data = data.train, data.validation, data.test
    return Task(*of_data, likelihood, data.data_shape.numel(), 10, 200, data.transform, "binary pixels, 8 x 8")


def frey_faces(options) -> Task:
    data = pv.data.load("freyfaces", options.data_dir, binarization=None)
    likelihood = partial(pv.likelihoods.DiscretizedLogistic, data_shape=data.data_shape, num_levels=data.num_levels)
    of_data = data.train, data.validation, data.test
    outputs = 2 * data.data_shape.numel()  # location and scale of each pixel
    return Task(*of_data, likelihood, outputs, 20, 150, unit="256 grey levels, 28 x 20")


def table(load, latent_dim: int, options) -> Task:
    """The logarithms of a table of positive numbers, in units of the standard deviations of the training rows."""
    data = load()
    logs = [(split.values + 1e-3).log().double() for split in (data.train, data.validation, data.test)]
    mean, std = logs[0].mean(0), logs[0].std(0)
    train, validation, test = ((rows - mean) / std for rows in logs)
    normal = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov(correction=0))
    columns = train.shape[1]
    return Task(
        *(rows.float() for rows in (train, validation, test)),
        partial(pv.likelihoods.LearnedScaleNormal, data_shape=columns),
        columns,
        latent_dim,
        400,
        unit=f"{columns} columns, logarithms in standard deviations",
        without_latents=-normal.log_prob(test).mean().item(),
    )


TASKS = {
    "digits": digits,
    "freyfaces": frey_faces,
    "breast_cancer": partial(table, pv.data.breast_cancer, 8),
    "wine": partial(table, pv.data.wine, 4),
}


def main() -> None:
    options = parse_options()
    rows = []
    for name in options.tasks:
        try:
            task = TASKS[name](options)
        except pv.data.DataUnavailableError as error:
            sys.exit(f"error: {name}: {error}")
        for prior in options.priors:
            for seed in range(options.seeds):
                rows.append({"task": name, "prior": prior, "seed": seed, **measure(task, prior, seed, options)})
                print(line(rows[-1]), flush=True)
    if options.out:
        about = {"versions": versions(), "processor": processor(), "threads": torch.get_num_threads()}
        write_json(
            options.out,
            {"rows": rows, "command": shlex.join(["python", *sys.argv]), "git_revision": git_revision(), **about},
        )


def measure(task: Task, prior: str, seed: int, options) -> dict:
    """Train a model and estimate log p(x) of all test data."""
    pyro.set_rng_seed(seed)
    encoder = pv.nets.MLP(task.train[0].numel(), HIDDEN, layer_norm=True)
    guide = pv.guides.MeanFieldNormal(encoder, task.latent_dim)
    decoder = pv.nets.MLP(task.latent_dim, HIDDEN, task.outputs, layer_norm=True)
    latents = parts.PRIORS[prior](task.latent_dim, guide, task.train[:NUM_PSEUDO_INPUTS])
    model = pv.GenerativeModel(latents, task.likelihood(decoder))
    started = time.process_time()
    result = pv.fit(
        *(model, guide, task.train),
        validation=task.validation,
        transform=task.transform,
        epochs=options.epochs or task.epochs,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        device="cpu",
        progress=False,
    )
    trained = time.process_time()
    lml = pv.log_marginal_likelihood(model, guide, task.test, num_particles=options.num_particles, progress=False)
    return {
        "nll": -lml.mean,
        "nll_stderr": lml.mean_stderr,
        "mc_stderr": lml.mean_mc_stderr,
        "bias_estimate": lml.bias_estimate,
        "elbo": lml.elbo.mean().item(),
        "share_of_k_too_high": lml.share_of_bad_k(),
        "without_latents": task.without_latents,
        "unit": task.unit,
        "sizes": [len(task.train), len(task.validation), len(task.test)],
        "latent_dim": task.latent_dim,
        "particles": options.num_particles,
        "epochs": options.epochs or task.epochs,
        "best_epoch": result.best_epoch,
        "cpu_seconds": {"training": trained - started, "evaluation": time.process_time() - trained},
    }


def line(row: dict) -> str:
    normal = "" if row["without_latents"] is None else f", multivariate normal {row['without_latents']:.2f}"
    return (
        f"{row['task']}, {row['prior']}, seed {row['seed']}: NLL {row['nll']:.2f} ± {row['nll_stderr']:.2f} (Monte Carlo "
        f"{row['mc_stderr']:.3f}), ELBO {row['elbo']:.2f}, k too high {row['share_of_k_too_high']:.0%}, best epoch "
        f"{row['best_epoch']} of {row['epochs']}{normal}"
    )


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="data sets (default: all)")
    add("--priors", nargs="+", default=["standard-normal", "vamp", "maf"], choices=parts.PRIORS, help="priors")
    add("--seeds", type=positive(int), default=2, help="seeds 0, 1, ... of each (default: 2)")
    add("--num-particles", type=positive(int), default=5000, help="particles per datum (default: 5000)")
    add("--epochs", type=positive(int), help="epochs, instead of those of the data set")
    add("--data-dir", help="data folder (default: $PYROVAE_DATA if set, else a cache folder)")
    add("--out", help="JSON file of all numbers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
