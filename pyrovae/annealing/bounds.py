"""Bounds of log p(x) by annealing: from below on any data, from both sides on data simulated from the model."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyrovae import estimators
from pyrovae.annealing.bidirectional import BidirectionalMonteCarlo
from pyrovae.annealing.blocks import Settings, tuned_blocks
from pyrovae.annealing.chains import anneal, anneal_back
from pyrovae.annealing.coordinates import unconstrained
from pyrovae.annealing.potential import prior_of
from pyrovae.common.arguments import map_tensors
from pyrovae.evaluation.log_weights import until_interrupted
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.programs.pair import Pair
from pyrovae.programs.particles import refuse_more_than_memory
from pyrovae.programs.reach import evaluation_mode
from pyrovae.programs.simulation import first_data, simulate
from pyrovae.programs.supports import masks_of
from pyrovae.programs.traces import Program, sample_sites, trace_program

__all__ = ["annealed_importance_sampling", "bidirectional_monte_carlo"]


def annealed_importance_sampling(
    model: Program,
    *args: Any,
    guide: Program | None = None,
    num_chains: int = 16,
    num_temperatures: int = 500,
    num_leapfrog_steps: int = 10,
    schedule: Literal["adaptive", "sigmoidal"] = "adaptive",
    plate: str | None = None,
    data_batch_size: int | Literal["auto"] | None = "auto",
    compile: bool | Literal["auto"] = "auto",
    progress: bool = False,
    **kwargs: Any,
) -> LogMarginalLikelihood:
    """Annealed importance sampling of log p(x) for any Pyro model with continuous latents, per datum.

    log p(x_n) ~ log 1/S sum_s w_sn,   w = prod_t [ p(x, z_{t-1}) / q(z_{t-1}) ]^(beta_t - beta_{t-1}),   z_0 ~ q

    Chains pass from q (the guide; without one, the prior) to the posterior through q(z)^(1 - beta) p(x, z)^beta, by one
    Hamiltonian trajectory per temperature in unconstrained coordinates. Temperatures, step sizes (for each temperature and
    datum, acceptance near 0.65) and the metric are tuned in pilot runs with random numbers of their own, then fixed: the
    estimate is a lower bound on average, as importance sampling's is, but does not depend on a guide that may miss modes
    when it starts from the prior.

    model: a Pyro program, called as model(*args, **kwargs); modules are put in eval mode meanwhile
    num_chains, num_temperatures: S and T
    num_leapfrog_steps: most steps per trajectory; each temperature draws its number from 1 to this. The model is evaluated
        with its gradient about 0.8 S T steps times per datum, pilots included
    schedule: "adaptive" spends half of the temperatures where log w varies most in the pilot, half as "sigmoidal"
    plate, data_batch_size, compile, progress: as in `log_marginal_likelihood`

    Returns a `LogMarginalLikelihood` of annealed weights, in nats: `elbo` and `gap` are NaN (they belong to importance
    sampling), `acceptance` is the mean acceptance rate, each (N,). Ctrl-C gives the blocks of data that are done, as in
    `log_marginal_likelihood`.

    Raises ValueError, naming the site, for discrete latents, angles and directions (distributions of Pyro on a circle or a
    sphere, in whatever wrappers: they have no coordinates on the line; one of your own has to be kept away by you),
    improper priors, distributions whose support is not known, densities without a gradient, and whatever
    `log_marginal_likelihood` refuses; for a model without latents. Warns if the program takes no outer plate (view(-1, D),
    BatchNorm1d), so that its chains run one by one, which is slow; and if draws pile up at the edge of their support, as
    those of Beta(0.05, 0.05) do where float32 cannot tell them from 1: then the bound is not strict.

    Source: Neal, Annealed Importance Sampling (2001); Wu, Burda, Salakhutdinov & Grosse, On the Quantitative Analysis of
    Decoder-Based Generative Models (2017).
    """
    settings = Settings(num_chains, num_temperatures, num_leapfrog_steps, schedule, data_batch_size, compile, progress)
    with evaluation_mode(model, guide) as device:
        refuse_more_than_memory("num_chains", settings.num_chains, device)
        if device is not None:
            args, kwargs = map_tensors(lambda tensor: tensor.to(device), (args, kwargs))
        pair = Pair(model, guide or prior_of(model), args, kwargs, plate, data_batch_size)
        return LogMarginalLikelihood.concatenate(until_interrupted(_annealed(pair, settings, guide is None)))


def _annealed(pair: Pair, settings: Settings, from_prior: bool) -> Iterator[tuple[LogMarginalLikelihood, int, int]]:
    for block in tuned_blocks(pair, settings, from_prior, passes=1):
        annealed = anneal(block.potential, block.kernels, block.tick)
        result = LogMarginalLikelihood.from_annealed(annealed.log_weights, annealed.acceptance)
        yield result, block.stop, pair.num_data


def bidirectional_monte_carlo(
    model: Program,
    *args: Any,
    guide: Program | None = None,
    num_chains: int = 16,
    num_temperatures: int = 500,
    num_leapfrog_steps: int = 10,
    schedule: Literal["adaptive", "sigmoidal"] = "adaptive",
    plate: str | None = None,
    data_batch_size: int | Literal["auto"] | None = "auto",
    compile: bool | Literal["auto"] = "auto",
    progress: bool = False,
    **kwargs: Any,
) -> BidirectionalMonteCarlo:
    """Bounds of log p(x) from both sides, on data simulated from the model: how far annealed importance sampling is off.

    E[lower] <= log p(x) <= E[upper],   upper = -log 1/S sum_s 1 / w_s along chains that run back from (x, z) ~ p(x, z)

    The arguments give shapes only: observed sites are simulated together with their latents, which are exact draws of the
    posterior, and these are where the chains of the upper bound start. Both directions use the same kernels, tuned in
    pilot runs that see the simulated data but not their latents. The upper bound holds for simulated data alone; how far
    the result carries over to real data is a matter of how alike they are. Arguments are those of
    `annealed_importance_sampling`. The simulated data take the place of the arguments whose values are observed; arguments
    for several observed sites must differ in value to be told apart, which a guide needs. Ctrl-C gives the bounds of the
    blocks that are done, with their data.

    `upper_stderr` is too small: the chains of a datum start at one draw, and it does not see how much another would change;
    the error over data, `width_stderr`, contains that. A likelihood that is zero on a part of the start density (a hard
    constraint) leaves a width that no number of chains and temperatures closes: backward chains never get there, and the
    upper bound stays too high by minus the log of the share that is left.

    Raises ValueError for `pyro.factor`, masked observations, masked latents with a guide, subsampled plates, programs
    whose simulation depends on the values of the data passed, a guide that cannot be shown the simulated data, and what
    `annealed_importance_sampling` refuses.

    Source: Grosse, Ghahramani & Adams, Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (2015); Wu,
    Burda, Salakhutdinov & Grosse, On the Quantitative Analysis of Decoder-Based Generative Models (2017).
    """
    settings = Settings(num_chains, num_temperatures, num_leapfrog_steps, schedule, data_batch_size, compile, progress)
    with evaluation_mode(model, guide) as device:
        refuse_more_than_memory("num_chains", settings.num_chains, device)
        if device is not None:
            args, kwargs = map_tensors(lambda tensor: tensor.to(device), (args, kwargs))
        trace, program, args, kwargs = simulate(model, guide, args, kwargs)
        pair = Pair(program, guide or prior_of(program), args, kwargs, plate, data_batch_size)
        if pair.layout.subsampled:
            raise ValueError(f"plate '{pair.layout.plate}' is subsampled: simulate with the whole plate")
        exact = _exact_draws(pair, trace, guide, settings.num_chains)
        parts = until_interrupted(_sandwiched(pair, exact, settings, guide is None))
    lower, lower_stderr, upper, upper_stderr, acceptance = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    observed: dict[str, Tensor] = {}
    latents: dict[str, Tensor] = {}
    for name, site in sample_sites(trace):
        values = observed if site["infer"].get("was_observed") else latents
        values[name] = first_data(site, pair.layout, len(lower)).cpu()
    return BidirectionalMonteCarlo(
        num_chains, lower, lower_stderr, upper, upper_stderr, acceptance, data=observed, latents=latents
    )


class _Sandwich(NamedTuple):
    lower: Tensor
    lower_stderr: Tensor
    upper: Tensor
    upper_stderr: Tensor
    acceptance: Tensor


def _sandwiched(
    pair: Pair, exact: Tensor, settings: Settings, from_prior: bool
) -> Iterator[tuple[_Sandwich, int, int]]:
    for block in tuned_blocks(pair, settings, from_prior, passes=2):
        forward = anneal(block.potential, block.kernels, block.tick)
        draws = exact[:, block.start : block.stop].contiguous()
        back = anneal_back(block.potential, block.kernels, draws, block.tick)
        sandwich = _Sandwich(
            estimators.importance_weighted_bound(forward.log_weights),
            estimators.importance_weighted_bound_stderr(forward.log_weights),
            -estimators.importance_weighted_bound(-back.log_weights),
            estimators.importance_weighted_bound_stderr(-back.log_weights),
            (forward.acceptance + back.acceptance).double() / 2,
        )
        yield sandwich, block.stop, pair.num_data


def _exact_draws(pair: Pair, trace: poutine.Trace, guide: Program | None, num_chains: int) -> Tensor:
    """The simulated latents as u (S, N, D), the same for all chains."""
    latents = poutine.Trace()
    for name, site in sample_sites(trace):
        if not site["infer"].get("was_observed"):
            latents.add_node(name, **site)
            if guide is not None and any(True for _ in masks_of(site)):
                raise ValueError(
                    f"the model masks latent site '{name}', whose masked elements are distributed as the guide draws them, and "
                    f"not as the model simulates them: start from the prior (guide=None)"
                )
    if guide is not None:
        replayed = trace_program(guide, pair.args, pair.kwargs, latents)
        if strange := sorted(name for name, _ in sample_sites(replayed) if name not in latents):
            raise ValueError(
                f"the guide draws auxiliary site(s) {strange}, whose values belonging to a simulated latent are not at "
                f"hand: start from the prior (guide=None), or sample the latents directly in the guide"
            )
        latents = replayed
    return unconstrained(latents, pair.layout_of(0, pair.num_data), None).expand(num_chains, -1, -1)
