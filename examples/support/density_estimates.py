"""What a row of `density_table.py` is measured by: log p(x) of test images, importance sampled and annealed, saved piece by piece."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import pyro
import torch

import pyrovae as pv
from pyrovae.estimators.standard_error import standard_error

IMAGES_PER_PIECE = 2000  # of the evaluation, each saved as it is done
BOUND_PARTICLES = 20  # for the ELBO of every test image
NUM_CHAINS, NUM_TEMPERATURES = 16, 500  # of annealing


def estimate(options, folder, model, guide, images, clock):
    """Importance sampling, in pieces that are saved."""
    parts = []
    for number, piece in enumerate(images.split(IMAGES_PER_PIECE)):
        path = folder / f"estimate-{options.particles}-{number}-{len(piece)}.pt"
        settings = {"num_particles": options.particles, "progress": not options.quiet}
        sampled = partial(pv.log_marginal_likelihood, model, guide, piece, **settings)
        parts.append(kept(path, sampled, piece, options.seed + number, clock("evaluation")))
    return pv.LogMarginalLikelihood.concatenate(parts)


def of_all_images(options, folder, model, guide, images, lml, clock) -> dict:
    """NLL of all the images where the first ones alone, a random sample, were importance sampled: the difference estimator.

    The ELBO of every image is cheap; log p(x) = ELBO + gap, and the gap differs far less from image to image than log p(x):
    mean over the N images of the ELBO + mean over the n sampled ones of the gap. Its error against the mean over all N:
    std(gap) sqrt(1/n - 1/N) (Cochran 1977, Sampling Techniques, section 7.3, with slope 1).
    """
    all_images, sampled = len(images), len(lml)
    if sampled == all_images:
        return {
            "nll": -lml.mean,
            "nll_stderr": lml.mean_stderr,
            "sample_stderr": 0.0,
            "mc_stderr": lml.mean_mc_stderr,
            "elbo": lml.elbo.mean().item(),
            "gap": lml.gap.mean().item(),
        }
    path = folder / f"bound-{BOUND_PARTICLES}.pt"
    cheap = partial(pv.log_marginal_likelihood, model, guide, images, num_particles=BOUND_PARTICLES, progress=False)
    bound = kept(path, cheap, images, options.seed, clock("evaluation"))
    elbo = bound.elbo
    log_prob = elbo.mean() + lml.gap.mean()
    noise = (bound.elbo_stderr.square().sum() / all_images**2 + lml.gap_stderr.square().sum() / sampled**2).sqrt()
    # Of images drawn anew: their ELBO and gap go together within the sample, and the ELBO's spread outside it counts as well.
    together = torch.stack([lml.elbo, lml.gap]).cov()[0, 1]
    variance = (elbo.var() + 2 * together) / all_images + lml.gap.var() / sampled
    return {
        "nll": -log_prob.item(),
        "nll_stderr": variance.sqrt().item(),
        "sample_stderr": lml.gap.std().item() * (1 / sampled - 1 / all_images) ** 0.5,
        "mc_stderr": noise.item(),
        "elbo": elbo.mean().item(),
        "gap": lml.gap.mean().item(),
    }


def anneal(options, folder, model, images, clock):
    """Annealed importance sampling from the prior; None without images."""
    if len(images) == 0:
        return None
    path = folder / f"annealed-{len(images)}.pt"
    settings = {"num_chains": NUM_CHAINS, "num_temperatures": NUM_TEMPERATURES, "progress": not options.quiet}
    annealed = partial(pv.annealed_importance_sampling, model, images, **settings)
    return kept(path, annealed, images, options.seed, clock("annealing"))


def compared(annealed, sampled) -> dict:
    """Both estimates for the same images, and their paired difference."""
    both = min(len(annealed), len(sampled))
    difference = annealed.log_prob[:both] - sampled.log_prob[:both]
    return {
        "images": both,
        "chains": NUM_CHAINS,
        "temperatures": NUM_TEMPERATURES,
        "nll_annealed": -annealed.log_prob[:both].mean().item(),
        "nll_importance_sampled": -sampled.log_prob[:both].mean().item(),
        "annealed_above_importance_sampled": difference.mean().item(),
        "its_stderr": standard_error(difference) if both > 1 else None,
        "acceptance": annealed.acceptance.mean().item(),
    }


def kept(path: Path, estimated, images, seed: int, timed):
    """The estimate in the file; where there is none, made from this seed, on the clock, and saved."""
    if not path.exists():
        pyro.set_rng_seed(seed)
        with timed:
            lml = estimated()
        save(path, lml, images)
    return read(path)


def save(path: Path, lml, images) -> None:
    """Of all the images, or not at all: after Ctrl-C an estimator answers with those that are done, and so does this program end."""
    if len(lml) < len(images):
        raise KeyboardInterrupt
    part = path.with_suffix(".part")
    torch.save(asdict(lml), part)
    part.replace(path)


def read(path: Path):
    return pv.LogMarginalLikelihood(**torch.load(path, weights_only=True))
