"""Bounds of log p(x) by annealing: a lower bound on any data, both bounds on data simulated from the model."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyrovae import estimators
from pyrovae.annealing.bidirectional import BidirectionalMonteCarlo
from pyrovae.annealing.blocks import AnnealingOptions, TunedBlock, tuned_blocks
from pyrovae.annealing.chains import Annealed, anneal, anneal_back
from pyrovae.annealing.coordinates import unconstrained
from pyrovae.annealing.potential import prior_of
from pyrovae.evaluation.log_weights import until_interrupted
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.evaluation.options import evaluation_of
from pyrovae.evaluation.streams import Part, parts_of
from pyrovae.programs.enumeration import SummedOut
from pyrovae.programs.pair import Pair
from pyrovae.programs.particles import refuse_more_than_memory
from pyrovae.programs.simulation import first_data, simulate
from pyrovae.programs.splitting import inspect
from pyrovae.programs.supports import masks_of
from pyrovae.programs.traces import Program, sample_sites, trace_program

__all__ = ["anneal_parts", "annealed_importance_sampling", "bidirectional_monte_carlo"]


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
    transform: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> LogMarginalLikelihood:
    """Estimate log p(x) by annealed importance sampling for any Pyro model with continuous latents, per datum.

        log p(x_n) ~ log 1/S sum_s w_sn,   w = prod_t [ p(x, z_{t-1}) / q(z_{t-1}) ]^(beta_t - beta_{t-1}),   z_0 ~ q

    Chains move from q (the guide, or the prior if there is none) to the posterior through q(z)^(1 - beta) p(x, z)^beta,
    with one Hamiltonian trajectory per temperature in unconstrained coordinates. Temperatures, step sizes (per
    temperature and datum, for an acceptance near 0.65) and the metric are tuned in pilot runs with separate random
    numbers, then fixed. The estimate is therefore a lower bound on average, as importance sampling's is. Started from
    the prior, it does not depend on a guide that may miss modes.

    The call warns if the program does not support an outer plate (view(-1, D), BatchNorm1d), because its chains then
    run one by one, which is slow. It also warns if draws pile up at the edge of their support, as those of Beta(0.05,
    0.05) do because float32 cannot tell them from 1: the bound is then not strict. Ctrl-C returns the result for the
    blocks of data that are done, as in `log_marginal_likelihood`.

    Args:
        model: Pyro program, called as model(*args, **kwargs); its modules are in eval mode during the call
        *args: arguments of the programs
        guide: Pyro program to start from; None starts from the prior
        num_chains: S
        num_temperatures: T
        num_leapfrog_steps: maximum number of steps per trajectory; each temperature draws its number from 1 to this.
            The model is evaluated with its gradient about 0.8 S T num_leapfrog_steps times per datum, pilots included
        schedule: "adaptive" spends half of the temperatures where log w varies most in the pilot, the other half as
            "sigmoidal" does
        plate: as in `log_marginal_likelihood`
        data_batch_size: as in `log_marginal_likelihood`
        compile: as in `log_marginal_likelihood`
        progress: show a progress bar
        transform: as in `log_marginal_likelihood`
        **kwargs: further arguments of the programs

    Returns:
        A `LogMarginalLikelihood` of annealed weights, in nats, each array (N,): `elbo` and `gap` are NaN (only
        importance sampling defines them), `acceptance` is the mean acceptance rate.

    Raises:
        ValueError: naming the site, for discrete latents that are not marked for enumeration, angles and directions
            (Pyro's distributions on a circle or a sphere, even wrapped, because they have no coordinates on the line;
            custom distributions of this kind are not detected), improper priors, distributions with unknown support, densities without a gradient, and
            everything that `log_marginal_likelihood` refuses; also for a model without latents.

    References:
        Neal, Annealed Importance Sampling (2001).
        Wu, Burda, Salakhutdinov & Grosse, On the Quantitative Analysis of Decoder-Based Generative Models (2017).
    """
    options = AnnealingOptions(
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        num_leapfrog_steps=num_leapfrog_steps,
        schedule=schedule,
        plate=plate,
        data_batch_size=data_batch_size,
        compile=compile,
        progress=progress,
    )
    return anneal_parts(model, guide, parts_of(args, kwargs, transform), options, _annealed)


def anneal_parts(
    model: Program,
    guide: Program | None,
    parts: Iterable[Part],
    options: AnnealingOptions,
    run: Callable[[TunedBlock], Annealed],
    *,
    resampled: bool = False,
) -> LogMarginalLikelihood:
    """Return the result of `run` for each tuned block of each part of the data, until Ctrl-C.

    Args:
        model: Pyro program
        guide: Pyro program to start from, or None for the prior
        parts: parts of the data
        options: options of the chains
        run: runs the chains of a block
        resampled: whether its weights are those of populations
    """

    def results() -> Iterator[tuple[LogMarginalLikelihood, int, int]]:
        for part in parts:
            with evaluation_of(model, guide, args=part.args, kwargs=part.kwargs) as (device, args, kwargs):
                refuse_more_than_memory("num_chains", options.num_chains, device)
                pair = inspect(model, guide or prior_of(model), args, kwargs, options.plate, options.data_batch_size)
                for block in tuned_blocks(pair, options, guide is None, passes=1):
                    found = run(block)
                    result = LogMarginalLikelihood.from_annealed(
                        found.log_weights, found.acceptance, resampled=resampled
                    )
                    yield result, part.before + block.stop, part.num_data or pair.num_data

    return LogMarginalLikelihood.concatenate(until_interrupted(results()))


def _annealed(block: TunedBlock) -> Annealed:
    return anneal(block.potential, block.kernels, block.tick)


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
    """Bound log p(x) from both sides on simulated data, to measure the error of annealed importance sampling.

        E[lower] <= log p(x) <= E[upper],
        upper = -log 1/S sum_s 1 / w_s along chains that run back from (x, z) ~ p(x, z)

    The arguments give shapes only. Observed sites are simulated together with their latents, which are exact draws of
    the posterior; the chains of the upper bound start there. Both directions use the same kernels, tuned in pilot runs
    that see the simulated data but not their latents. The upper bound holds for simulated data only; how far the result
    applies to real data depends on how similar they are.

    The simulated data replace the arguments whose values are observed. Arguments for several observed sites must differ
    in value, because a guide needs to receive each one in its place. Ctrl-C returns the bounds of the blocks that are
    done, with their data.

    `upper_stderr` is too small: the chains of a datum start at one draw, and it does not include the variation over
    that draw. The error over data, `width_stderr`, does. If the likelihood is zero on a part of the start density (a
    hard constraint), no number of chains and temperatures closes the width: backward chains never reach that part, and
    the upper bound stays too high by minus the log of the share that remains.

    Args:
        model: as in `annealed_importance_sampling`
        *args: arguments of the programs, for their shapes
        guide: as in `annealed_importance_sampling`
        num_chains: S
        num_temperatures: T
        num_leapfrog_steps: as in `annealed_importance_sampling`
        schedule: as in `annealed_importance_sampling`
        plate: as in `log_marginal_likelihood`
        data_batch_size: as in `log_marginal_likelihood`
        compile: as in `log_marginal_likelihood`
        progress: show a progress bar
        **kwargs: further arguments of the programs

    Returns:
        The bounds, each (N,) in nats, with the simulated data, as a `BidirectionalMonteCarlo`.

    Raises:
        ValueError: for `pyro.factor`, masked observations, masked latents with a guide, subsampled plates, programs
            whose simulation depends on the values of the data passed, a guide that cannot be given the simulated data,
            and everything that `annealed_importance_sampling` refuses.

    References:
        Grosse, Ghahramani & Adams, Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (2015).
        Wu, Burda, Salakhutdinov & Grosse, On the Quantitative Analysis of Decoder-Based Generative Models (2017).
    """
    options = AnnealingOptions(
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        num_leapfrog_steps=num_leapfrog_steps,
        schedule=schedule,
        plate=plate,
        data_batch_size=data_batch_size,
        compile=compile,
        progress=progress,
    )
    with evaluation_of(model, guide, args=args, kwargs=kwargs) as (device, args, kwargs):
        refuse_more_than_memory("num_chains", options.num_chains, device)
        trace, program, args, kwargs = simulate(model, guide, args, kwargs)
        pair = inspect(program, guide or prior_of(program), args, kwargs, options.plate, options.data_batch_size)
        if pair.layout.subsampled:
            raise ValueError(f"plate '{pair.layout.plate}' is subsampled: simulate with the whole plate")
        exact = _exact_draws(pair, trace, guide, options.num_chains)
        parts = until_interrupted(_sandwiched(pair, exact, options, guide is None))
    lower, lower_stderr, upper, upper_stderr, acceptance = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    observed: dict[str, Tensor] = {}
    latents: dict[str, Tensor] = {}
    for name, site in sample_sites(trace):
        values = observed if site["infer"].get("was_observed") else latents
        values[name] = first_data(site, pair.layout, len(lower)).cpu()
    return BidirectionalMonteCarlo(
        options.num_chains, lower, lower_stderr, upper, upper_stderr, acceptance, data=observed, latents=latents
    )


class _Sandwich(NamedTuple):
    lower: Tensor
    lower_stderr: Tensor
    upper: Tensor
    upper_stderr: Tensor
    acceptance: Tensor


def _sandwiched(
    pair: Pair, exact: Tensor, options: AnnealingOptions, from_prior: bool
) -> Iterator[tuple[_Sandwich, int, int]]:
    for block in tuned_blocks(pair, options, from_prior, passes=2):
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
    """Return the simulated latents as u (S, N, D), the same for all chains."""
    latents = poutine.Trace()
    summed = pair.model.names if isinstance(pair.model, SummedOut) else frozenset()
    for name, site in sample_sites(trace):
        if not site["infer"].get("was_observed") and name not in summed:
            latents.add_node(name, **site)
            if guide is not None and any(True for _ in masks_of(site)):
                raise ValueError(
                    f"the model masks latent site '{name}', whose masked elements follow the guide's distribution, not the "
                    f"model's: start from the prior (guide=None)"
                )
    if guide is not None:
        program = pair.guide.drawn if isinstance(pair.guide, SummedOut) else guide
        replayed = trace_program(program, pair.args, pair.kwargs, latents)
        for name in pair.guide.names if isinstance(pair.guide, SummedOut) else ():
            replayed.remove_node(name)
        if strange := sorted(name for name, _ in sample_sites(replayed) if name not in latents):
            raise ValueError(
                f"the guide draws auxiliary site(s) {strange}, whose values for a simulated latent are unknown: "
                f"start from the prior (guide=None), or sample the latents directly in the guide"
            )
        latents = replayed
    return unconstrained(latents, pair.layout_of(0, pair.num_data), None).expand(num_chains, -1, -1)
