"""Bidirectional Monte Carlo: bounds of log p(x) from both sides, on data that are simulated from the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyrovae import estimators
from pyrovae.annealing.blocks import AnnealingOptions, tuned_blocks, with_prior
from pyrovae.annealing.chains import anneal, anneal_back
from pyrovae.annealing.coordinates import unconstrained
from pyrovae.estimators.reducers import standard_error
from pyrovae.evaluation.drawing import until_interrupted
from pyrovae.evaluation.opening import opened
from pyrovae.programs.enumeration import SummedOut
from pyrovae.programs.pair import Pair
from pyrovae.programs.simulation import first_data, simulate
from pyrovae.programs.supports import masks_of
from pyrovae.programs.traces import Program, sample_sites, trace_program

__all__ = ["BidirectionalMonteCarlo", "bidirectional_monte_carlo"]


@dataclass(frozen=True, repr=False)
class BidirectionalMonteCarlo:
    """Bounds of log p(x) from both sides, for data simulated from the model: float64 tensors (N,), in nats.

    Attributes:
        num_chains: chains per datum and direction
        lower: estimate by annealed importance sampling from the start density, a lower bound on average
        lower_stderr: its Monte Carlo standard error
        upper: estimate by chains that run backwards from the exact posterior draw, an upper bound on average
        upper_stderr: its Monte Carlo standard error; too small, because the chains of a datum share that draw
        acceptance: mean acceptance rate of both directions
        data: simulated data, by site
        latents: simulated latents, by site
    """

    num_chains: int
    lower: Tensor
    lower_stderr: Tensor
    upper: Tensor
    upper_stderr: Tensor
    acceptance: Tensor
    data: dict[str, Tensor]
    latents: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.lower)

    @property
    def width(self) -> Tensor:
        """upper - lower (N,). Its mean bounds the mean error of either side; the bounds of a single datum may cross."""
        return self.upper - self.lower

    @property
    def width_stderr(self) -> float:
        """Standard error of the mean width over data."""
        return standard_error(self.width)

    def summary(self) -> str:
        """Return a few lines to print."""
        meaning = "on data of this model, annealed importance sampling is too low by at most this, on average"
        if self.width.mean() < 0:
            meaning = "the bounds, which hold on average, have crossed: they agree to within this error"
        return (
            f"log p(x) by bidirectional Monte Carlo: {len(self):,} simulated data, {self.num_chains} chains; nats per datum\n"
            f"  lower bound {self.lower.mean():10.3f}\n"
            f"  upper bound {self.upper.mean():10.3f}\n"
            f"  width       {self.width.mean():10.3f}   ± {self.width_stderr:.3f} over data: {meaning}\n"
            f"  acceptance  {self.acceptance.mean():10.2f}"
        )

    def __repr__(self) -> str:
        return (
            f"BidirectionalMonteCarlo({len(self)} simulated data, {self.num_chains} chains: "
            f"{self.lower.mean():.3f} to {self.upper.mean():.3f})"
        )


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
    options = AnnealingOptions.of(locals())
    trace = poutine.Trace()

    def simulated(args: tuple, kwargs: dict[str, Any]) -> tuple[Program, Program, tuple, dict[str, Any]]:
        nonlocal trace
        trace, program, args, kwargs = simulate(model, guide, args, kwargs)
        return with_prior(program, guide)(args, kwargs)

    with opened(model, guide, args, kwargs, options, simulated, evaluation=bidirectional_monte_carlo) as pair:
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
        yield _Sandwich._make(map(block.own, sandwich)), block.stop, pair.num_data


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
