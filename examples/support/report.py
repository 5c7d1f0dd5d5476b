"""The numbers of a run, and the report that `mnist_svi.py` prints."""

import math

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


def metrics_of(options, data, device, result, lml, active, seconds) -> dict:
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
            "active_units": int(active.sum()),
        },
        "seconds": seconds,
        "versions": versions(),
        "git_revision": git_revision(),
        "command": command(),
    }


def parts_of(options) -> dict:
    """The options that choose model, guide and objective."""
    names = ("prior", "guide", "likelihood", "network", "objective", "beta", "kl_warmup", "free_bits")
    return {name: getattr(options, name) for name in (*names, "objective_particles")} | {"scale": options.scale or 1.0}


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
        ("gap, KL(q || posterior)", "unknown with one particle" if one else f">= {test['gap']:.2f} nats"),
        (
            "log p(x) is too low by",
            "unknown with one particle" if one else f">= {test['bias_estimate']:.3f} nats",
        ),
        ("bits per pixel", f"{test['bits_per_pixel']:.4f}"),
        ("median ESS", f"{test['median_ess']:.1f} of {test['num_particles']}"),
        ("Pareto k too high", pareto_row(test)),
        ("active units", f"{test['active_units']} of {metrics['latent_dim']}"),
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
    if test["share_pareto_k_above_limit"] > 0.5:  # False if it is NaN
        meaning += (
            "\nFor most images the tail of the weights is too heavy to trust log p(x): the true value is higher, and the gap wider. "
            "More particles, a better guide, or annealing (examples/bounds.py --run FOLDER) show by how much."
        )
    return (
        f"\n{metrics['dataset']}{binarization}: {metrics['prior']} prior, "
        f"{metrics['guide']} guide, {metrics['likelihood']} likelihood, {metrics['network']} networks; "
        f"{chosen:,}{subset} test images{drawn}, {test['num_particles']:,} particles each\n{table}\n{meaning}"
    )


def pareto_row(test) -> str:
    bad, worse, limit = (
        test[name] for name in ("share_pareto_k_above_limit", "share_pareto_k_above_0.7", "pareto_k_limit")
    )
    if math.isnan(bad):
        return "unknown below 25 particles"
    strict = f" (> 0.70: {worse:.1%})" if limit < 0.7 else ""
    return f"{bad:.1%} of the images > {limit:.2f}{strict}: do not trust these" if bad else f"no image > {limit:.2f}"
