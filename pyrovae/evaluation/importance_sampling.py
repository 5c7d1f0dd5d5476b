"""Estimates of log p(x) from log weights, with the evidence of how far each can be trusted."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae.common.arguments import check_count
from pyrovae.common.progress import progress_bar
from pyrovae.evaluation.log_weights import log_weight_blocks, until_interrupted
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.guides.base import Guide
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
    progress: bool = False,
    **kwargs: Any,
) -> LogMarginalLikelihood:
    """Importance-sampled log p(x) of any Pyro model/guide pair, per datum, in bounded memory.

    log p(x_n) ~ log 1/S sum_s p(x_n, z_sn) / q(z_sn | x_n),   z_sn ~ q(. | x_n),   s = 1 ... S

    model, guide: Pyro programs, called as model(*args, **kwargs); modules are put in eval mode meanwhile
    num_particles: S, drawn exactly
    plate: name of the plate that indexes the data. None: the one plate that all sample sites of both programs share;
        where they share none, the whole program is one datum. A sequential plate has to be named.
    vectorize_particles: draw particles under an outer plate. "auto" does so where two particles drawn together are
        the same as two drawn apart, and warns where they are not
    data_batch_size: data per block. "auto" cuts the tensors among the arguments whose first size is that of the plate,
        where pieces give what the whole gives (looked at for some data drawn from all and for the first ones, up to half a
        million numbers); None does not cut. A single datum left over joins the block before it
    particle_batch_size: particles per run of the programs; half as many, and the log says so, whenever the device's memory does
        not hold them
    compile: record the programs (see `pyrovae.compiled.record`) and let Inductor compile them: same draws, same numbers up to
        rounding. "auto" does so for parts of this library where there is work enough to win the compilation back
    progress: show a bar

    Returns a `LogMarginalLikelihood`, each array (N,) in nats. Plate subsampling is divided out (N is then the size of
    the subsample, drawn once); masks are honoured; `pyro.factor` counts as likelihood; a latent value outside the
    prior's support has weight 0. The estimate is a lower bound on average, by an unknown amount that the standard
    error does not contain: see `bias_estimate` and `pareto_k`. A guide that misses a mode of the posterior altogether
    is not noticed by either.

    Ctrl-C during a long run returns the result of the blocks of data that are done, with a RuntimeWarning that says how
    many; see `LogMarginalLikelihood.concatenate` for how to go on. In the first block it is a KeyboardInterrupt as ever.

    Raises ValueError, naming the site, for: latent sites that model and guide do not share, enumerated sites, factors
    or observations in the guide, guides with all mass on a point, Delta sites with a `log_density` that is not that of
    their change of variables, `poutine.scale`, data outside their support, a guide that does not cover the prior's draws
    where the data are possible, a latent outside the named plate, several plates to choose from, NaN.

    Source: Rezende, Mohamed & Wierstra, Stochastic Backpropagation (2014), appendix E; Burda, Grosse &
    Salakhutdinov, Importance Weighted Autoencoders (2016).
    """
    blocks = log_weight_blocks(
        model,
        guide,
        args,
        kwargs,
        num_particles=num_particles,
        plate=plate,
        vectorize_particles=vectorize_particles,
        data_batch_size=data_batch_size,
        particle_batch_size=particle_batch_size,
        compile=compile,
        progress=progress,
    )
    parts = ((LogMarginalLikelihood.from_log_weights(block), done, num_data) for block, done, num_data in blocks)
    return LogMarginalLikelihood.concatenate(until_interrupted(parts))


_FEWEST_PARTICLES = 25  # below that no Pareto k


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
    """How many particles bring the Monte Carlo standard error of log p(x) down to `stderr`, by a pilot run.

    S = ceil( S_pilot (se_pilot / stderr)^2 ),   25 or more

    The pilot only chooses; estimate with fresh draws, as `log_marginal_likelihood(model, guide, x,
    num_particles=particles_for(model, guide, x, stderr=0.05))` does. (Drawing on until the error looks small stops where no
    large weight has come up yet, and so biases the estimate downwards.)

    stderr: in nats per datum
    share: of the data that are to have it or less: half by default, so that the median does
    num_pilot_particles: S_pilot, for each datum
    progress: show a bar of the pilot
    other arguments: those of `log_marginal_likelihood`

    The standard error says nothing of the bias, and where a few weights outweigh all others the pilot sees too small a
    spread, so that S is too small as well: look at `stderr` and `pareto_k` of the estimate.

    Raises ValueError for stderr <= 0, a share outside (0, 1], fewer than 2 pilot particles, and where the pilot knows no
    error for enough of the data; and what `log_marginal_likelihood` refuses.
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
            f"all {num_pilot_particles} pilot weights are 0 for {int(errors.isinf().sum()):,} of {len(errors):,} data: take "
            f"more pilot particles, or a guide that reaches where the model puts mass"
        )
    return max(_FEWEST_PARTICLES, math.ceil(num_pilot_particles * (reached / stderr) ** 2))


@torch.no_grad()
def active_units(
    guide: Guide, x: Tensor, *, threshold: float = 0.01, batch_size: int = 500, progress: bool = False
) -> Tensor:
    """Which latent dimensions the guide uses.

    A_d = Var_x( E_q(z|x)[ z_d ] ) > threshold

    batch_size: data encoded at once
    progress: show a bar

    Shapes: x (N, *data_shape) -> bool (latent_dim,).

    Raises ValueError for fewer than 2 data.

    Source: Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).
    """
    if len(x) < 2:
        raise ValueError(f"a variance over data needs 2 data or more, found {len(x)}")
    means = []
    with evaluation_mode(guide) as device, progress_bar("active units", len(x), "data", progress) as bar:
        for batch in x.split(batch_size):
            means.append(guide.posterior(batch.to(device)).mean)
            bar.update(len(batch))
    return (torch.cat(means).double().var(0) > threshold).cpu()
