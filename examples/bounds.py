"""Measure how tight bounds on log p(x) are, by importance sampling, annealing, and bidirectional Monte Carlo.

    python examples/mnist_svi.py --out runs/mnist
    python examples/bounds.py --run runs/mnist

This takes a trained pair and estimates log p(x) of the same test images twice: by importance sampling, which sees only
the regions that the guide covers, and by annealed importance sampling from the prior, which does not use the guide. It
then simulates as many images from the model. For these, bidirectional Monte Carlo bounds log p(x) from both sides, and
the distance between the bounds shows how accurate annealing is on this model. For some test images it also splits the
gap into the part due to the guide's family and the part due to its encoder.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # write figures to files, without a display

import matplotlib.pyplot as plt
import pyro
import torch
from support.run_folder import trained_pair
from support.script import command, parser_of, positive, versions, write_json

import pyrovae as pv


def main() -> None:
    options = parse_options()
    run = Path(options.run)
    try:
        trained, saved, data = trained_pair(run, options.data_dir, "git_revision", "epochs", "seed")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    model, guide = saved["model"], saved["guide"]
    out = Path(options.out or run)
    out.mkdir(parents=True, exist_ok=True)
    images = data.test[: options.num_images]
    annealing = {
        "num_chains": options.num_chains,
        "num_temperatures": options.num_temperatures,
        "progress": not options.quiet,
    }
    seconds = {}

    def timed(name, function, *args, **kwargs):
        pyro.set_rng_seed(options.seed)
        started = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[name] = time.perf_counter() - started
        return result

    sampled = timed(
        "importance sampling",
        pv.log_marginal_likelihood,
        *(model, guide, images),
        num_particles=options.num_particles,
        progress=not options.quiet,
    )
    annealed = timed("annealing", pv.annealed_importance_sampling, model, images, **annealing)
    both = timed("both sides, simulated", pv.bidirectional_monte_carlo, model, images, **annealing)
    gaps = timed(
        "gap decomposition",
        pv.inference_gaps,
        *(model, guide, images[: options.num_gaps]),
        annealed=annealed[: options.num_gaps],
        progress=not options.quiet,
    )
    simulated = timed(
        "importance sampling, simulated",
        pv.log_marginal_likelihood,
        *(model, guide, both.data["x"]),
        num_particles=options.num_particles,
        progress=not options.quiet,
    )

    result = {
        f"{len(images)} test images": {
            "ELBO": over_data(sampled.elbo),
            f"importance sampling, {options.num_particles:,} particles": over_data(sampled.log_prob),
            f"annealing from the prior, {options.num_chains} chains, {options.num_temperatures} temperatures": over_data(
                annealed.log_prob
            ),
            "annealing - importance sampling": over_data(annealed.log_prob - sampled.log_prob),
        },
        f"gap of the first {len(gaps)} test images": {
            "approximation gap: limits of the guide's family": over_data(gaps.approximation),
            "amortization gap: error of the encoder": over_data(gaps.amortization),
        },
        f"{len(images)} simulated images": {
            "ELBO": over_data(simulated.elbo),
            f"importance sampling, {options.num_particles:,} particles": over_data(simulated.log_prob),
            "lower bound, annealing from the prior": over_data(both.lower),
            "upper bound, annealing back from the posterior": over_data(both.upper),
            "upper - lower": over_data(both.width),
            "upper - importance sampling": over_data(both.upper - simulated.log_prob),
        },
    }
    # If annealing is higher than importance sampling by more than their errors, the guide misses part of the posterior.
    error = (annealed.stderr**2 + sampled.stderr**2).sqrt()
    missed = (annealed.log_prob - sampled.log_prob) > 3 * error
    for title, rows in result.items():
        print(f"\n{title}; nats per image, ± standard error over images")
        for name, (mean, stderr) in rows.items():
            print(f"  {name:57} {mean:9.3f} ± {stderr:.3f}")
    print(
        f"\n{int(missed.sum())} of {len(images)} test images: annealing is higher by more than 3 combined standard errors. "
        f"Bias estimate of importance sampling {sampled.bias_estimate:.3f}; acceptance {annealed.acceptance.mean():.2f}."
    )
    higher, error_of_mean = over_data(sampled.log_prob - annealed.log_prob)
    if higher > 3 * error_of_mean:
        print("Annealing is below importance sampling, so it is the looser bound here: increase --num-temperatures.")
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))

    write_figures(out, images, sampled, annealed, both, gaps)
    content = {
        "bounds": {
            title: {name: {"mean": mean, "stderr": stderr} for name, (mean, stderr) in rows.items()}
            for title, rows in result.items()
        },
        "images_where_annealing_is_higher": missed.nonzero().flatten().tolist(),
        "bias_estimate": sampled.bias_estimate,
        "acceptance": annealed.acceptance.mean().item(),
        "num_images": len(images),
        "num_particles": options.num_particles,
        "num_chains": options.num_chains,
        "num_temperatures": options.num_temperatures,
        "seed": options.seed,
        "trained": {
            name: trained[name] for name in ("dataset", "command", "git_revision", "epochs", "seed", "data_seed")
        },
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "command": command(),
    }
    write_json(out / "bounds.json", content)
    print(f"Numbers and figures: {out}")


def over_data(values) -> tuple[float, float]:
    """Mean over images and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan


def write_figures(out, images, sampled, annealed, both, gaps) -> None:
    def write(name):
        plt.savefig(out / name, dpi=150)
        plt.close()

    pv.plots.bound_curve(sampled.curve_particles, sampled.curve, annealed=annealed.log_prob)
    write("bounds_curve.png")
    pv.plots.sandwich(both.lower, both.upper)
    write("bounds_sandwich.png")
    axes = pv.plots.k_against_gap(sampled.pareto_k, annealed.log_prob - sampled.elbo, limit=sampled.pareto_k_limit)
    axes.set_xlabel("log p(x) by annealing - ELBO [nats]")
    write("bounds_k.png")
    pv.plots.gap_decomposition({f"mean of {len(gaps)} images": (gaps.approximation, gaps.amortization)})
    write("bounds_gap.png")
    axes = pv.plots.worst_images(images, annealed.log_prob - sampled.log_prob)
    axes.set_title("annealing - importance sampling in nats: the images with the largest difference", fontsize=10)
    write("bounds_missed.png")


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--run", required=True, help="folder of a run of mnist_svi.py (metrics.json and checkpoint.pt)")
    add("--data-dir", help="data folder (default: $PYROVAE_DATA if set, else a cache folder)")
    add(
        "--num-images",
        type=positive(int),
        default=200,
        help="number of test images and of simulated images (default: 200)",
    )
    add("--num-particles", type=positive(int), default=5000, help="particles of importance sampling (default: 5000)")
    add("--num-chains", type=positive(int), default=16, help="chains of annealing (default: 16)")
    add("--num-temperatures", type=positive(int), default=500, help="temperatures of annealing (default: 500)")
    add("--num-gaps", type=positive(int), default=50, help="number of test images whose gap is split (default: 50)")
    add("--seed", type=int, default=0, help="seed of each estimate (default: 0)")
    add("--out", help="output folder for numbers and figures (default: the folder of the run)")
    add("--quiet", action="store_true", help="show no progress bars")
    return parser.parse_args()


if __name__ == "__main__":
    main()
