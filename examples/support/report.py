"""The numbers of a run, and the report that `mnist_svi.py` prints."""

import math
from itertools import accumulate

from support.script import command, git_revision, versions

import pyrovae as pv


def described(data, device) -> str:
    """The line that a run begins with."""
    kind = "binary" if data.binarization else "continuous" if data.is_dequantized else f"{data.num_levels} grey levels"
    held_out = "no" if data.validation is None else f"{len(data.validation):,}"
    return (
        f"{data.name}: {len(data.train):,} training, {held_out} validation and {len(data.test):,} test images of "
        f"{data.data_shape.numel()} pixels ({kind}), {device}"
    )


def metrics_of(options, data, device, result, lml, annealed, active, use, seconds) -> dict:
    """All numbers of a run, as written to metrics.json."""
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
        "num_test": options.num_test,
        "test": {
            "num_data": len(lml),
            "of_test_images": len(data.test),
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
            "annealed": None if annealed is None else annealed_numbers(annealed),
            "active_units": int(active.sum()),
            "reconstruction": use.reconstruction,
            "kl": use.kl,
            "own_code_advantage": use.advantage,
            "own_code_advantage_stderr": use.advantage_stderr,
            "units_above_a_tenth_of_the_prior": int(use.active.sum()),
            "verdict_on_z": use.verdict,
        },
        "still_rising": still_rising(result.history),
        "seconds": seconds,
        "versions": versions(),
        "git_revision": git_revision(),
        "command": command(),
    }


def parts_of(options) -> dict:
    """The options that choose model, guide and objective."""
    names = ("prior", "guide", "likelihood", "network", "objective", "beta", "kl_warmup", "free_bits")
    return {name: getattr(options, name) for name in (*names, "objective_particles")} | {"scale": options.scale or 1.0}


def annealed_numbers(annealed) -> dict:
    """The numbers of `pv.anneal_a_slice`."""
    return {
        "num_images": len(annealed.index),
        "num_chains": annealed.annealed.num_particles,
        "difference": annealed.difference,
        "difference_stderr": annealed.difference_stderr,
        "log_marginal_likelihood": annealed.mean,
        "log_marginal_likelihood_mc_stderr": annealed.mean_mc_stderr,
        "log_marginal_likelihood_stderr": annealed.mean_stderr,
    }


def bits_per_pixel(log_prob, data) -> float:
    """-log2 probability per pixel; a density of dequantised images bounds the probability of their grey levels."""
    pixels = data.data_shape.numel()
    return -log_prob / pixels / math.log(2) + (math.log2(data.num_levels) if data.is_dequantized else 0.0)


def report(metrics) -> str:
    test, seconds = metrics["test"], metrics["seconds"]
    one = test["num_particles"] == 1
    rows = [
        ("ELBO", f"{test['elbo']:.2f} nats"),
        (
            "log p(x)",
            f"{test['log_marginal_likelihood']:.2f} ± {test['log_marginal_likelihood_stderr']:.2f} nats over images "
            f"({'one particle: the ELBO' if one else '± {:.3f} Monte Carlo'.format(test['log_marginal_likelihood_mc_stderr'])})",
        ),
        *annealed_row(test),
        ("gap, KL(q || posterior)", "unknown with one particle" if one else f">= {test['gap']:.2f} nats"),
        (
            "log p(x) is too low by",
            "unknown with one particle" if one else f">= {test['bias_estimate']:.3f} nats",
        ),
        ("bits per pixel", f"{test['bits_per_pixel']:.4f}"),
        ("median ESS", f"{test['median_ess']:.1f} of {test['num_particles']}"),
        ("Pareto k too high", pareto_row(test)),
        ("active units", active_row(test, metrics["latent_dim"])),
        *((f"seconds, {name}", f"{value:.1f}") for name, value in seconds.items()),
    ]
    table = "\n".join(f"  {name:24} {value}" for name, value in rows)
    chosen, images = test["num_data"], test.get("of_test_images", test["num_data"])  # absent from older files
    subset = f" of {images:,}" if chosen < images else ""
    drawn = ", a random subset" if chosen < images else ""
    binarization = f", {metrics['binarization']} binarisation" if metrics["binarization"] else ""
    meaning = (
        "With one particle the estimate of log p(x) is the ELBO: --num-particles 1000 shows the gap between them."
        if one
        else f"The ELBO lies at least {test['gap']:.2f} nats below log p(x). This gap is KL(q(z|x) || p(z|x)): how far the guide is "
        f"from the true posterior."
    )
    if annealed := test.get("annealed"):  # absent from older files
        meaning += (
            f"\nImportance weights cannot be trusted for {test['share_pareto_k_above_limit']:.0%} of the images. Annealing "
            f"{annealed['num_images']:,} of them, drawn at random, finds {annealed['difference']:.2f} ± "
            f"{annealed['difference_stderr']:.2f} nats more: log p(x) of these {chosen:,} images is then "
            f"{annealed['log_marginal_likelihood']:.2f} ± {annealed['log_marginal_likelihood_mc_stderr']:.2f}. This is a lower "
            f"bound on average, too; what annealing misses is unknown (examples/bounds.py --run FOLDER anneals longer, and "
            f"bounds it on simulated data)."
        )
    elif test["share_pareto_k_above_limit"] > 0.5:  # False if it is NaN
        meaning += (
            "\nFor most images the tail of the weights is too heavy to trust log p(x): the true value is higher, and the gap wider. "
            "More particles, a better guide, or annealing (examples/bounds.py --run FOLDER) show by how much."
        )
    for found in (test.get("verdict_on_z"), metrics.get("still_rising")):  # absent from older files
        meaning += f"\n{found[0].upper()}{found[1:]}." if found else ""
    return (
        f"\n{metrics['dataset']}{binarization}: {metrics['prior']} prior, "
        f"{metrics['guide']} guide, {metrics['likelihood']} likelihood, {metrics['network']} networks; "
        f"{chosen:,}{subset} test images{drawn}, {test['num_particles']:,} particles each\n{table}\n{meaning}"
    )


def annealed_row(test) -> list[tuple[str, str]]:
    found = test.get("annealed")
    if not found:
        return []
    mean, stderr = found["log_marginal_likelihood"], found["log_marginal_likelihood_mc_stderr"]
    over_images = found.get("log_marginal_likelihood_stderr")  # absent from older files
    images = "" if over_images is None else f" ± {over_images:.2f}"
    of_slice = f"(± {stderr:.2f} from annealing only {found['num_images']:,})"
    return [("log p(x), part annealed", f"{mean:.2f}{images} nats over images {of_slice}")]


def pareto_row(test) -> str:
    bad, worse, limit = (
        test[name] for name in ("share_pareto_k_above_limit", "share_pareto_k_above_0.7", "pareto_k_limit")
    )
    if math.isnan(bad):
        return "unknown below 25 particles"
    strict = f" (> 0.70: {worse:.1%})" if limit < 0.7 else ""
    return f"{bad:.1%} of the images > {limit:.2f}{strict}: do not trust these" if bad else f"no image > {limit:.2f}"


def active_row(test, latent_dim) -> str:
    row = f"{test['active_units']} of {latent_dim}"
    if "units_above_a_tenth_of_the_prior" not in test:  # an older file
        return row
    return f"{row} (variance > 0.01); {test['units_above_a_tenth_of_the_prior']} above a tenth of the prior's variance"


def still_rising(history) -> str | None:
    """Say that training ended long before the validation bound levelled off; None if it did not, or there is no bound.

    If the learning rate falls to 0, the last steps are small and the bound looks level, whether or not it is. So its
    slope is measured against the sum of the learning rates so far, over the last quarter of that sum. With twice as
    many epochs the bound ends higher by about the rise in this quarter (digits, 80, 160 and 300 epochs: rises of 0.73,
    0.39 and 0.36 nats; twice as many gain 0.60, 0.26 and 0.35). That is long before if the rise is more than 15% of the
    KL (what z tells of a datum so far), more than 0.05 nats, and more than twice its standard error.
    """
    known = [
        (so_far, row)
        for so_far, row in zip(sums_of_rates(history), history, strict=True)
        if math.isfinite(row["validation_bound"])
    ]
    if len(known) < 2:
        return (
            "one epoch cannot show whether the validation bound levels off: train longer (--epochs)" if known else None
        )
    total = known[-1][0]
    if total == 0:
        return None
    late = [(so_far / total, row["validation_bound"]) for so_far, row in known if so_far >= 0.75 * total]
    if len(late) < 3:
        late = [(so_far / total, row["validation_bound"]) for so_far, row in known[-3:]]
    slope, error = slope_of(late)
    last = known[-1][1]
    kl = last["validation_kl"] if math.isfinite(last["validation_kl"]) else last["kl"]
    if not (math.isfinite(kl) and slope / 4 > max(0.15 * kl, 0.05, 2 * error / 4)):
        return None
    return (
        f"the validation bound still rose by about {slope / 4:.2f} nats over the last {len(late)} of {len(history)} epochs: "
        f"train longer (--epochs)"
    )


def sums_of_rates(history) -> list[float]:
    """The sum of the learning rates up to the end of each epoch; a row holds the rate at the end of its epoch."""
    rates = [row["learning_rate"] for row in history]
    before = [*rates[:1], *rates[:-1]]
    return list(accumulate((first + last) / 2 for first, last in zip(before, rates, strict=True)))


def slope_of(points) -> tuple[float, float]:
    """Slope of the least-squares line through (x, y), with its standard error; 0 for points with one x."""
    count = len(points)
    mean_x, mean_y = (sum(values) / count for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread == 0:
        return 0.0, 0.0
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return slope, math.sqrt(rest / max(1, count - 2) / spread)
