"""Swap one part at a time: compare priors, and compare guides on one frozen model.

    python examples/compare_parts.py

This trains a VAE for each prior (same networks, data and epochs) and compares log p(x) of the same test images. It then
freezes the model of the standard normal prior, trains a new guide of each kind for it, and compares the guides. Because
the model is the same, log p(x) is the same, and a difference in ELBO is a difference in the gap, up to Monte Carlo
error and bias.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import pyro
import torch
from support import parts
from support.script import command, parser_of, positive, versions, write_json

import pyrovae as pv

HIDDEN, LATENT_DIM, BATCH_SIZE, LEARNING_RATE = [300, 300], 40, 200, 3e-3


def main() -> None:
    options = parse_options()
    data = pv.data.load(options.dataset, options.data_dir)
    test = data.test[: options.num_test]
    network = parts.NETWORKS["mlp"]

    def make_guide(name):
        return parts.GUIDES[name](network.encoder(data.data_shape, HIDDEN), LATENT_DIM)

    seconds = {}

    def train_and_evaluate(name, model, guide):
        pyro.set_rng_seed(options.seed)
        fitted = pv.fit(
            model,
            guide,
            data.train,
            transform=data.transform,
            validation=data.validation,
            epochs=options.epochs,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            progress=not options.quiet,
        )
        pyro.set_rng_seed(options.seed)
        started = time.perf_counter()
        lml = pv.log_marginal_likelihood(
            model, guide, test, num_particles=options.num_particles, progress=not options.quiet
        )
        seconds[name] = {"training": fitted.seconds, "evaluation": time.perf_counter() - started}
        print(
            f"{name}: log p(x) {lml.mean:.2f}, ELBO {lml.elbo.mean():.2f}; training {fitted.seconds:.0f} s, evaluation "
            f"{seconds[name]['evaluation']:.0f} s",
            flush=True,
        )
        return lml

    by_prior, by_guide = {}, {}
    for name in options.priors:
        pyro.set_rng_seed(options.seed)
        guide = make_guide("mean-field")
        decoder = network.decoder(LATENT_DIM, data.data_shape, HIDDEN)
        likelihood = pv.likelihoods.Bernoulli(decoder, data.data_shape, data_mean=data.train.mean(0))
        model = pv.GenerativeModel(parts.PRIORS[name](LATENT_DIM, guide, data.train), likelihood)
        by_prior[name] = train_and_evaluate(f"prior {name}", model, guide)
        if name == "standard-normal":
            frozen = model
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    for name in options.guides:
        pyro.set_rng_seed(options.seed)
        guide = make_guide(name)
        by_guide[name] = train_and_evaluate(f"guide {name}", frozen, guide)

    tables = {"priors": pv.compare(by_prior)}
    if by_guide:
        tables["guides, on one frozen model, ranked by ELBO"] = pv.compare(by_guide, by="elbo")
    for title, table in tables.items():
        print(f"\n{title}: {table}")
    if options.out:
        result = {title: [asdict(row) for row in table.rows] for title, table in tables.items()} | {
            "dataset": data.name,
            "num_test": len(test),
            "num_particles": options.num_particles,
            "epochs": options.epochs,
            "seed": options.seed,
            "seconds": seconds,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "command": command(),
        }
        write_json(Path(options.out), result)


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add(
        "--dataset",
        default="auto",
        choices=[name for name in pv.data.NAMES if name != "freyfaces"],  # their likelihood is another
        help="auto (the default): MNIST, or digits if unavailable",
    )
    add("--data-dir", help="data folder (default: $PYROVAE_DATA if set, else a cache folder)")
    add(
        "--priors",
        nargs="+",
        default=["standard-normal", "vamp", "realnvp"],
        choices=parts.PRIORS,
        help="priors to compare; include standard-normal, whose model is frozen for the guides",
    )
    add(
        "--guides",
        nargs="*",
        default=list(parts.GUIDES),
        choices=parts.GUIDES,
        help="guides to compare on the frozen model; none: compare priors only (default: all)",
    )
    add("--epochs", type=positive(int), default=15, help="epochs of each training (default: 15)")
    add("--num-test", type=positive(int), default=2000, help="number of test images (default: 2000)")
    add("--num-particles", type=positive(int), default=500, help="particles per test image (default: 500)")
    add("--seed", type=int, default=0, help="seed of each training and evaluation (default: 0)")
    add("--out", help="JSON file for the numbers")
    add("--quiet", action="store_true", help="show no progress bars")
    options = parser.parse_args()
    if "standard-normal" not in options.priors or len(options.priors) < 2 or len(options.guides) == 1:
        parser.error(
            "a comparison needs at least two priors, including standard-normal, and either no guide or at least two"
        )
    return options


if __name__ == "__main__":
    main()
