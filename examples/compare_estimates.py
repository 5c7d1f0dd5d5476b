"""Compare estimates of log p(x) at equal cost: importance sampling, annealing and sequential Monte Carlo.

    python examples/mnist_svi.py --out runs/normal
    python examples/mnist_svi.py --out runs/vamp --prior vamp
    python examples/compare_estimates.py --run runs/normal runs/vamp

Each estimate is a lower bound of log p(x) on average, so the highest one is the best. The cost is counted in gradient
evaluations of log p(x, z) for each image, with those of the pilot runs that tune the chains. A particle of importance
sampling needs no gradient, which halves the arithmetic: it gets two particles for each gradient of the estimate that it
is compared with.
"""

import argparse
import sys
import time
from pathlib import Path

import pyro
import torch
from support.run_folder import trained_pair
from support.script import command, parser_of, positive, processor, versions, write_json

import pyrovae as pv

PARTICLES_PER_GRADIENT = 2


def main() -> None:
    options = parse_options()
    rows = []
    for folder in map(Path, options.run):
        try:
            trained, saved, data = trained_pair(folder, options.data_dir, "prior")
        except (ValueError, RuntimeError, OSError) as error:
            sys.exit(f"error: {error}")
        images = data.test[: options.num_images]
        for row in compared(saved["model"], saved["guide"], images, options):
            rows.append({"run": folder.name, "trained": trained["command"], **row})
        show(
            [row for row in rows if row["run"] == folder.name], f"{folder.name}: {trained['prior']} prior", len(images)
        )
        if options.out:
            made = {"command": command(), "seed": options.seed, "versions": versions(), "processor": processor()}
            write_json(
                options.out, {"rows": rows, "num_images": len(images), "threads": torch.get_num_threads(), **made}
            )


def compared(model, guide, images, options) -> list[dict]:
    """Estimate log p(x) of the images in every way at every cost; the rows hold log_prob of each image."""
    rows = []
    for num_temperatures in options.num_temperatures:
        annealing = {"num_temperatures": num_temperatures, "num_leapfrog_steps": options.num_leapfrog_steps}
        half = {"num_populations": 2, "num_chains": options.num_chains // 2}
        ways = {
            "annealing, from the guide": (pv.annealed_importance_sampling, guide, {"num_chains": options.num_chains}),
            "annealing, from the prior": (pv.annealed_importance_sampling, None, {"num_chains": options.num_chains}),
            "SMC, from the guide": (pv.sequential_monte_carlo, guide, half),
            "SMC, from the prior": (pv.sequential_monte_carlo, None, half),
        }
        gradients = count_gradients(model, images[:1], annealing | {"num_chains": options.num_chains}, options.seed)
        for name, (estimate, start, chains) in ways.items():
            rows.append(
                row_of(name, gradients, options.seed, estimate, model, images, guide=start, **chains, **annealing)
            )
        rows.append(
            row_of(
                *("importance sampling", gradients, options.seed, pv.log_marginal_likelihood, model, guide, images),
                num_particles=PARTICLES_PER_GRADIENT * gradients,
            )
        )
    return rows


def row_of(name, gradients, seed, estimate, *args, **kwargs) -> dict:
    pyro.set_rng_seed(seed)
    started = time.process_time()
    log_prob = estimate(*args, **kwargs).log_prob
    seconds = time.process_time() - started
    return {"estimate": name, "gradients": gradients, "cpu_seconds": seconds, "log_prob": log_prob.tolist()}


def count_gradients(model, image, annealing, seed) -> int:
    """Count the gradient evaluations for one image, by running the chains of one without a recording."""
    calls = []
    hook = model.likelihood.decoder_net.register_forward_hook(lambda net, inputs, outputs: calls.append(1))
    pyro.set_rng_seed(seed)
    try:
        pv.annealed_importance_sampling(model, image, compile=False, **annealing)
    finally:
        hook.remove()
    return len(calls) * annealing["num_chains"]


def show(rows, title, num_images) -> None:
    """Print how far each estimate is below the highest mean, paired over images."""
    values = torch.tensor([row["log_prob"] for row in rows], dtype=torch.float64)
    best = values.mean(1).argmax()
    print(f"\n{title}; {num_images} images; best: {values[best].mean():.3f} nats")
    print(f"  {'estimate':27} {'gradients':>9} {'CPU s':>7}  nats below the best, ± standard error over images")
    for row, below in zip(rows, values[best] - values, strict=True):
        error = below.std().item() / len(below) ** 0.5
        print(
            f"  {row['estimate']:27} {row['gradients']:9,} {row['cpu_seconds']:7.0f}  {below.mean():.3f} ± {error:.3f}"
            f" (most {below.max():.2f})"
        )


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--run", required=True, nargs="+", help="folders of runs of mnist_svi.py (metrics.json and checkpoint.pt)")
    add("--data-dir", help="data folder (default: $PYROVAE_DATA if set, else a cache folder)")
    add("--num-images", type=positive(int), default=24, help="number of test images (default: 24)")
    add(
        "--num-chains",
        type=positive(int),
        default=16,
        help="chains of annealing, and of SMC's two populations (default: 16)",
    )
    add(
        "--num-temperatures",
        type=positive(int),
        nargs="+",
        default=[50, 200, 800],
        help="numbers of temperatures, one level of cost each (default: 50 200 800)",
    )
    add("--num-leapfrog-steps", type=positive(int), default=5, help="most steps at a temperature (default: 5)")
    add("--seed", type=int, default=0, help="seed of each estimate (default: 0)")
    add("--out", help="JSON file for the numbers (default: none)")
    options = parser.parse_args()
    if options.num_chains < 4 or options.num_chains % 2:
        parser.error(f"--num-chains must be even and at least 4, found {options.num_chains}")
    return options


if __name__ == "__main__":
    main()
