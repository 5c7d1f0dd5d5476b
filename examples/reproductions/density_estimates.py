"""Estimate log p(x) for a row of `density_table.py`, by importance sampling and by annealing, piece by piece."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import pyro
import torch

import pyrovae as pv

IMAGES_PER_PIECE = 2000  # the evaluation saves each piece when it is done
BOUND_PARTICLES = 20  # to estimate the ELBO of every test image
NUM_CHAINS, NUM_TEMPERATURES = 16, 500  # of annealed importance sampling from the prior
SLICE_CHAINS, SLICE_TEMPERATURES = 8, 200  # from the guide, which is near the posterior


def estimate(options, folder, model, guide, images, clock):
    """Estimate log p(x) by importance sampling; each piece of the images is saved."""
    parts = []
    for number, piece in enumerate(images.split(IMAGES_PER_PIECE)):
        path = folder / f"estimate-{options.particles}-{number}-{len(piece)}.pt"
        settings = {"num_particles": options.particles, "progress": not options.quiet}
        sampled = partial(pv.log_marginal_likelihood, model, guide, piece, **settings)
        parts.append(kept(path, sampled, piece, options.seed + number, clock("evaluation")))
    return pv.LogMarginalLikelihood.concatenate(parts)


def of_all_images(options, folder, model, guide, images, lml, clock) -> dict:
    """NLL over all N images if only the first n, a random sample, were importance sampled: the difference estimator.

    log p(x) = ELBO + gap. The ELBO of every image is cheap to estimate, and the gap varies far less between images than
    log p(x) does. The estimate is therefore the mean ELBO over the N images plus the mean gap over the n sampled ones.
    Its error against the mean over all N is std(gap) sqrt(1/n - 1/N).

    References:
        Cochran, Sampling Techniques (1977), section 7.3, with slope 1.
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
    # Over new images: ELBO and gap covary within the sample, and the ELBO also varies outside it.
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
    """Estimate log p(x) by annealed importance sampling from the prior; None without images."""
    if len(images) == 0:
        return None
    path = folder / f"annealed-{len(images)}.pt"
    settings = {"num_chains": NUM_CHAINS, "num_temperatures": NUM_TEMPERATURES, "progress": not options.quiet}
    annealed = partial(pv.annealed_importance_sampling, model, images, **settings)
    return kept(path, annealed, images, options.seed, clock("annealing"))


def sliced(options, folder, model, guide, images, sampled, nll, clock) -> dict | None:
    """Correct the NLL by annealing from the guide on the first n images: the difference estimator in two phases.

    log p(x) = ELBO + gap + d, d what annealing finds more than importance sampling. ELBO is averaged over all N images,
    gap over the n' importance sampled ones, d over n of these. The error against the mean over all N is
    sqrt(var(gap + d) (1/n' - 1/N) + var(d) (1/n - 1/n')).

    Args:
        options, folder, model, guide, clock: as in `estimate`.
        images: all N images in their random order.
        sampled: results of importance sampling, of the first n' images.
        nll: the NLL to correct, from `of_all_images`.

    Returns:
        The corrected NLL, its error against the mean over all images, and how it was found; None without a slice.

    References:
        Cochran, Sampling Techniques (1977), sections 12.1 and 12.2, with slopes 1.
    """
    if options.slice < 2:
        return None
    part = images[: min(options.slice, len(sampled))]
    path = folder / f"sliced-{len(part)}.pt"
    settings = {"num_chains": SLICE_CHAINS, "num_temperatures": SLICE_TEMPERATURES, "progress": not options.quiet}
    annealing = partial(pv.annealed_importance_sampling, model, part, guide=guide, **settings)
    annealed = kept(path, annealing, part, options.seed, clock("slice"))
    more = annealed.log_prob - sampled.log_prob[: len(part)]
    gap = more + sampled.gap[: len(part)]
    first, second = 1 / len(sampled) - 1 / len(images), 1 / len(part) - 1 / len(sampled)
    return {
        "images": len(part),
        "chains": SLICE_CHAINS,
        "temperatures": SLICE_TEMPERATURES,
        "annealed_above_importance_sampled": more.mean().item(),
        "its_stderr": more.std().item() / len(part) ** 0.5,
        "nll": nll - more.mean().item(),
        "sample_stderr": (gap.var().item() * first + more.var().item() * second) ** 0.5,
        "acceptance": annealed.acceptance.mean().item(),
    }


def compared(annealed, sampled) -> dict:
    """Both estimates on the same images, and their paired difference."""
    both = min(len(annealed), len(sampled))
    difference = annealed.log_prob[:both] - sampled.log_prob[:both]
    return {
        "images": both,
        "chains": NUM_CHAINS,
        "temperatures": NUM_TEMPERATURES,
        "nll_annealed": -annealed.log_prob[:both].mean().item(),
        "nll_importance_sampled": -sampled.log_prob[:both].mean().item(),
        "annealed_above_importance_sampled": difference.mean().item(),
        "its_stderr": difference.std().item() / both**0.5 if both > 1 else None,
        "acceptance": annealed.acceptance.mean().item(),
    }


def kept(path: Path, estimated, images, seed: int, timed):
    """Read the estimate from the file; if there is none, compute it with this seed, time it and save it."""
    if not path.exists():
        pyro.set_rng_seed(seed)
        with timed:
            lml = estimated()
        save(path, lml, images)
    return read(path)


def save(path: Path, lml, images) -> None:
    """Save an estimate of all images; stop if some are missing, as they are after Ctrl-C in an estimator."""
    if len(lml) < len(images):
        raise KeyboardInterrupt
    part = path.with_suffix(".part")
    torch.save(asdict(lml), part)
    part.replace(path)


def read(path: Path):
    return pv.LogMarginalLikelihood(**torch.load(path, weights_only=True))
