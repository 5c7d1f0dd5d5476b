"""Importance-sampling estimates of log p(x), the number of particles they need, and the latent dimensions in use."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae.common.arguments import check_count
from pyrovae.common.reporting import progress_bar
from pyrovae.evaluation.drawing import until_interrupted
from pyrovae.evaluation.log_weights import WeightedBlock, log_weight_blocks
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.evaluation.opening import SamplingOptions, parts_of
from pyrovae.guides.base import Guide
from pyrovae.models.guide_inputs import batches, inputs_of
from pyrovae.programs.reach import evaluation_mode
from pyrovae.programs.traces import Program

__all__ = ["active_units", "log_marginal_likelihood", "particles_for"]


def log_marginal_likelihood(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1000,
    plate: str | None = None,
    vectorize_particles: bool | Literal["auto"] = "auto",
    data_batch_size: int | Literal["auto"] | None = "auto",
    particle_batch_size: int | Literal["auto"] = "auto",
    compile: bool | Literal["auto"] = "auto",
    precision: Literal["float32", "medium", "bf16"] = "float32",
    progress: bool = False,
    transform: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> LogMarginalLikelihood:
    """Estimate log p(x) of any Pyro model/guide pair by importance sampling, per datum, in bounded memory.

        log p(x_n) ~ log 1/S sum_s p(x_n, z_sn) / q(z_sn | x_n),   z_sn ~ q(. | x_n),   s = 1 ... S

    The estimate is a lower bound on average. It is too low by an unknown amount that the standard error does not
    include: see `bias_estimate` and `pareto_k`. Neither detects a guide that misses a mode of the posterior altogether.

    Plate subsampling is divided out (N is then the size of the subsample, which is drawn once). Masks are respected.
    `pyro.factor` counts as likelihood. A latent value outside the prior's support has weight 0.

    Discrete sites marked for enumeration (infer={"enumerate": "parallel"}, or "sequential", which is the same here) are
    summed out exactly, if the guide leaves them out or marks them too: p(x, z) = sum_y p(x, z, y), and likewise
    q(z) = sum_y q(z, y). A site that the guide samples without a mark is a latent like others. If all latents are
    summed out, the result is exact for any number of particles, and the guide may be `lambda *args: None`. Along a
    `pyro.markov` chain the cost is linear in its length.

    Ctrl-C during a long run returns the result for the blocks of data that are done, with a RuntimeWarning that says
    how many; `LogMarginalLikelihood.concatenate` explains how to continue. During the first block it raises
    KeyboardInterrupt as usual.

    Args:
        model: Pyro program, called as model(*args, **kwargs); its modules are in eval mode during the call
        guide: Pyro program, called likewise
        *args: arguments of both programs. One tuple or mapping of tensors stands for its items, arrays and frames become
            tensors, and a `DataLoader` or `Dataset` that does not shuffle is evaluated batch by batch
        num_particles: S, the exact number of draws
        plate: name of the plate that indexes the data. None: the one plate that all sample sites of both programs
            share; if they share none, the whole program is one datum. A sequential plate must be named.
        vectorize_particles: draw particles under an outer plate. "auto" does so if two particles drawn together equal
            two drawn separately, and warns if they do not
        data_batch_size: most data per block; all blocks have one size. "auto" cuts those tensor arguments whose first
            size is that of the plate, if the pieces give the same result as the whole (checked on some data drawn from
            all and on the first ones, up to half a million numbers); None does not cut
        particle_batch_size: particles per run of the programs. If they do not fit in the device's memory, it is halved
            until they do, and the log says so
        compile: record the programs (see `pyrovae.compiled.record`) and compile them with Inductor: same draws, and the
            same numbers up to rounding. "auto" does so for components of this library if there is enough work to make
            up for the compilation time
        precision: "bf16" computes the linear and convolutional layers inside the model in bfloat16, which is faster on
            hardware that supports it: those of the decoder, of a network of a hierarchical model, and of an encoder
            that a VampPrior calls. The guide, densities (also of flow priors), sums and latents stay float32, and so do
            layers in float64, products by `@`, and the insides of `nn.MultiheadAttention` and of recurrent networks.
            "medium", torch's own word, lets all products of float32 matrices round their factors, those of guide and
            densities too: bfloat16 on processors with AMX, TensorFloat32 on a GPU; on other hardware it is "float32".
            Rounding makes it log p(x) of a slightly different model, by an amount that is measured: up to 32 data (of
            each batch of a loader; all, if they are not cut into blocks) are drawn in both precisions from the same
            random numbers. The result holds the differences (`precision_error`), and the summary states them
        progress: show a progress bar
        transform: maps the one argument, or each batch of a loader, to the data that the programs are called with, for
            example `lambda batch: batch[0]` to leave labels out
        **kwargs: further arguments of both programs

    Returns:
        A `LogMarginalLikelihood`, each array (N,) in nats.

    Raises:
        ValueError: naming the site, for latent sites that model and guide do not share, sites marked for enumeration
            whose values cannot be listed, factors or observations in the guide, guides with all mass on a point, Delta
            sites whose `log_density` is not that of their change of variables, `poutine.scale`, data outside their
            support, a guide that does not cover the prior's draws where the data are possible, a latent outside the
            named plate, several plates to choose from, NaN.

    References:
        Rezende, Mohamed & Wierstra, Stochastic Backpropagation (2014), appendix E.
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).
    """
    options = SamplingOptions(
        num_particles=num_particles,
        plate=plate,
        vectorize_particles=vectorize_particles,
        data_batch_size=data_batch_size,
        particle_batch_size=particle_batch_size,
        compile=compile,
        precision=precision,
        progress=progress,
    )
    parts = (
        (_reduced(block, options), part.before + done, part.num_data or num_data)
        for part in parts_of(args, kwargs, transform)
        for block, done, num_data in log_weight_blocks(model, guide, part.args, part.kwargs, options, True)
    )
    return LogMarginalLikelihood.concatenate(until_interrupted(parts))


def _reduced(block: WeightedBlock, options: SamplingOptions) -> LogMarginalLikelihood:
    result = LogMarginalLikelihood.from_log_weights(block.log_weights)
    return replace(result, precision=options.precision, precision_error=block.rounding)


_FEWEST_PARTICLES = 25  # Pareto k is undefined with fewer


def particles_for(
    model: Program,
    guide: Program,
    *args: Any,
    stderr: float,
    share: float = 0.5,
    num_pilot_particles: int = 200,
    progress: bool = False,
    **kwargs: Any,
) -> int:
    """Find how many particles bring the Monte Carlo standard error of log p(x) down to `stderr`, from a pilot run.

        S = ceil( S_pilot (se_pilot / stderr)^2 ),   at least 25

    The pilot only chooses S. Estimate with fresh draws: `log_marginal_likelihood(model, guide, x,
    num_particles=particles_for(model, guide, x, stderr=0.05))`. (Adding draws until the error looks small stops before
    a large weight has appeared, which biases the estimate downwards.)

    The standard error does not include the bias. If a few weights dominate all others, the pilot underestimates the
    spread, so S is too small as well: check `stderr` and `pareto_k` of the final estimate.

    Args:
        model: as in `log_marginal_likelihood`
        guide: as in `log_marginal_likelihood`
        *args: as in `log_marginal_likelihood`
        stderr: target, in nats per datum
        share: share of the data that must reach the target; the default, half, means that the median does
        num_pilot_particles: S_pilot, per datum
        progress: show a progress bar of the pilot
        **kwargs: as in `log_marginal_likelihood`

    Returns:
        S.

    Raises:
        ValueError: for stderr <= 0, a share outside (0, 1], fewer than 2 pilot particles, a pilot whose error is
            unknown for too many data, and everything that `log_marginal_likelihood` refuses.
    """
    if not stderr > 0:
        raise ValueError(f"stderr must be positive, in nats per datum; found {stderr}")
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], found {share}")
    num_pilot_particles = check_count("num_pilot_particles", num_pilot_particles)
    if num_pilot_particles < 2:
        raise ValueError("one pilot particle has no standard error: num_pilot_particles must be 2 or more")
    pilot = log_marginal_likelihood(model, guide, *args, num_particles=num_pilot_particles, progress=progress, **kwargs)
    errors = pilot.stderr.nan_to_num(nan=math.inf).sort().values
    reached = errors[math.ceil(share * len(errors)) - 1].item()
    if math.isinf(reached):
        raise ValueError(
            f"all {num_pilot_particles} pilot weights are 0 for {int(errors.isinf().sum()):,} of {len(errors):,} data: use "
            f"more pilot particles, or a guide that covers the model's mass"
        )
    return max(_FEWEST_PARTICLES, math.ceil(num_pilot_particles * (reached / stderr) ** 2))


@torch.no_grad()
def active_units(
    guide: Guide,
    x: Tensor,
    *,
    context: Tensor | None = None,
    observed: Tensor | None = None,
    threshold: float = 0.01,
    batch_size: int = 500,
    progress: bool = False,
) -> Tensor:
    """Find which latent dimensions the guide uses.

        A_d = Var_x( E_q(z|x)[ z_d ] ) > threshold

    This is the published rule. Its variance is absolute, and 0.01 of a prior variance of 1 is little: almost all
    dimensions of a pair that has just begun to train, or is about to collapse, can count. `latent_use` measures the
    variance in units of the prior's, and whether z matters at all.

    Args:
        guide: a `pyrovae.guides.Guide`
        x: data (N, *data_shape)
        context: what the pair is conditioned on, (N, ...)
        observed: mask of what is known of x, shaped like x
        threshold: variance above which a dimension counts as active
        batch_size: number of data encoded at once
        progress: show a progress bar

    Returns:
        Bool (latent_dim,), True for active dimensions.

    Raises:
        ValueError: for fewer than 2 data.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).
    """
    data, means = inputs_of(guide, x, context, observed), []
    num_data = len(data.x)
    if num_data < 2:
        raise ValueError(f"a variance over data needs 2 data or more, found {num_data}")
    with evaluation_mode(guide) as device, progress_bar("active units", num_data, "data", progress) as bar:
        for batch in batches(data, batch_size, device):
            means.append(guide.posterior(*batch.args, **batch.kwargs).mean)
            bar.update(len(batch.x))
    return (torch.cat(means).double().var(0) > threshold).cpu()
