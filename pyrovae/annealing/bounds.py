"""Bounds of log p(x) by annealing: from below on any data, from both sides on data simulated from the model."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from pyrovae import estimators
from pyrovae.annealing.chains import Kernels, anneal, anneal_back, num_pilot_kernels, tune
from pyrovae.annealing.potential import Potential, prior_of
from pyrovae.annealing.simulation import exact_draws, simulate
from pyrovae.marginal_likelihood import LogMarginalLikelihood
from pyrovae.programs.extract import Extracted, all_ours
from pyrovae.programs.modules import check_count, evaluation_mode, map_tensors, modules_behind
from pyrovae.programs.traces import Program, sample_sites
from pyrovae.weights.pair import Pair
from pyrovae.weights.recorded import pays_off

__all__ = ["BidirectionalMonteCarlo", "annealed_importance_sampling", "bidirectional_monte_carlo"]

_FEWEST_PILOT_CHAINS = 4


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
    sampling), `acceptance` is the mean acceptance rate, each (N,).

    Raises ValueError, naming the site, for discrete latents, densities without a gradient, and whatever
    `log_marginal_likelihood` refuses; for programs that cannot draw chains under an outer plate.

    Source: Neal, Annealed Importance Sampling (2001); Wu, Burda, Salakhutdinov & Grosse, On the Quantitative Analysis of
    Decoder-Based Generative Models (2017).
    """
    settings = _Settings(num_chains, num_temperatures, num_leapfrog_steps, schedule, data_batch_size, compile, progress)
    parts = []
    with evaluation_mode(model, guide) as device:
        if device is not None:
            args, kwargs = map_tensors(lambda tensor: tensor.to(device), (args, kwargs))
        pair = Pair(model, guide or prior_of(model), args, kwargs, plate, data_batch_size)
        for _, potential, kernels, tick in _tuned_blocks(pair, settings, guide is None, passes=1):
            annealed = anneal(potential, kernels, tick)
            parts.append(LogMarginalLikelihood.from_annealed(annealed.log_weights, annealed.acceptance))
    return LogMarginalLikelihood.concatenate(parts)


@dataclass(frozen=True)
class _Settings:
    num_chains: int
    num_temperatures: int
    num_leapfrog_steps: int
    schedule: Literal["adaptive", "sigmoidal"]
    data_batch_size: int | Literal["auto"] | None
    compile: bool | Literal["auto"]
    progress: bool

    def __post_init__(self):
        for name in ("num_chains", "num_temperatures", "num_leapfrog_steps"):
            check_count(name, getattr(self, name))
        if self.data_batch_size not in ("auto", None):
            check_count("data_batch_size", self.data_batch_size)
        if self.schedule not in ("adaptive", "sigmoidal"):
            raise ValueError(f"schedule must be 'adaptive' or 'sigmoidal', found {self.schedule!r}")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', found {self.compile!r}")


@dataclass(frozen=True, repr=False)
class BidirectionalMonteCarlo:
    """Bounds of log p(x) from both sides, for data simulated from the model: float64 tensors (N,), in nats.

    lower, lower_stderr: annealed importance sampling from the start density, a lower bound on average
    upper, upper_stderr: from the exact posterior draw backwards, an upper bound on average
    acceptance: mean acceptance rate of both directions
    data, latents: what was simulated, by site
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
        """upper - lower (N,): its mean bounds the mean error of either side; single data may cross."""
        return self.upper - self.lower

    @property
    def width_stderr(self) -> float:
        """Standard error of the mean width over data."""
        return self.width.std().item() / math.sqrt(len(self)) if len(self) > 1 else math.nan

    def summary(self) -> str:
        """A few lines to print."""
        return (
            f"log p(x) by bidirectional Monte Carlo: {len(self):,} simulated data, {self.num_chains} chains; nats per datum\n"
            f"  lower bound {self.lower.mean():10.3f}\n"
            f"  upper bound {self.upper.mean():10.3f}\n"
            f"  width       {self.width.mean():10.3f}   +- {self.width_stderr:.3f} over data: on data of this model, annealed "
            f"importance sampling is too low by no more than this, on average\n"
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
    """Bounds of log p(x) from both sides, on data simulated from the model: how far annealed importance sampling is off.

    E[lower] <= log p(x) <= E[upper],   upper = -log 1/S sum_s 1 / w_s along chains that run back from (x, z) ~ p(x, z)

    The arguments give shapes only: observed sites are simulated together with their latents, which are exact draws of the
    posterior, and these are where the chains of the upper bound start. Both directions use the same kernels, tuned in
    pilot runs that see the simulated data but not their latents. The upper bound holds for simulated data alone; how far
    the result carries over to real data is a matter of how alike they are. Arguments are those of
    `annealed_importance_sampling`.

    Raises ValueError for `pyro.factor`, masked observations, subsampled plates, programs whose simulation depends on the
    values of the data passed, and what `annealed_importance_sampling` refuses.

    Source: Grosse, Ghahramani & Adams, Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (2015); Wu,
    Burda, Salakhutdinov & Grosse, On the Quantitative Analysis of Decoder-Based Generative Models (2017).
    """
    settings = _Settings(num_chains, num_temperatures, num_leapfrog_steps, schedule, data_batch_size, compile, progress)
    lower, lower_stderr, upper, upper_stderr, acceptance = [], [], [], [], []
    with evaluation_mode(model, guide) as device:
        if device is not None:
            args, kwargs = map_tensors(lambda tensor: tensor.to(device), (args, kwargs))
        trace, program, args, kwargs = simulate(model, guide, args, kwargs)
        pair = Pair(program, guide or prior_of(program), args, kwargs, plate, data_batch_size)
        if pair.layout.subsampled:
            raise ValueError(f"plate '{pair.layout.plate}' is subsampled: simulate with the whole plate")
        exact = exact_draws(pair, trace, guide, settings.num_chains)
        for start, potential, kernels, tick in _tuned_blocks(pair, settings, guide is None, passes=2):
            forward = anneal(potential, kernels, tick)
            back = anneal_back(potential, kernels, exact[:, start : start + potential.num_data].contiguous(), tick)
            lower.append(estimators.importance_weighted_bound(forward.log_weights))
            lower_stderr.append(estimators.importance_weighted_bound_stderr(forward.log_weights))
            upper.append(-estimators.importance_weighted_bound(-back.log_weights))
            upper_stderr.append(estimators.importance_weighted_bound_stderr(-back.log_weights))
            acceptance.append((forward.acceptance + back.acceptance).double() / 2)
    sites = dict(sample_sites(trace))
    return BidirectionalMonteCarlo(
        num_chains,
        *(torch.cat(parts).cpu() for parts in (lower, lower_stderr, upper, upper_stderr, acceptance)),
        data={name: site["value"].cpu() for name, site in sites.items() if site["infer"].get("was_observed")},
        latents={name: site["value"].cpu() for name, site in sites.items() if not site["infer"].get("was_observed")},
    )


def _tuned_blocks(
    pair: Pair, settings: _Settings, from_prior: bool, passes: int
) -> Iterator[tuple[int, Potential, Kernels, Callable[[], None]]]:
    """(start, potential, tuned kernels, what to call after each kernel) for each block of data."""
    if reason := pair.reason_to_loop(pair.num_data):
        raise ValueError(
            f"the program cannot run its chains under an outer plate ({reason}), as annealing needs; networks that keep "
            f"leading dimensions (no view(-1, D), no fixed dim=1) allow it"
        )
    num_chains, num_temperatures = settings.num_chains, settings.num_temperatures
    num_blocks = 1
    if pair.split_size is not None:
        most = max(1, pair.rows // num_chains) if settings.data_batch_size == "auto" else settings.data_batch_size
        num_blocks = math.ceil(pair.num_data / most)
    size = math.ceil(pair.num_data / num_blocks)
    modules = modules_behind(pair.model, pair.guide)
    record = inductor = settings.compile
    if settings.compile == "auto":
        num_gradients = pair.num_data * num_chains * num_temperatures * settings.num_leapfrog_steps
        record = bool(modules) and all_ours(modules)
        inductor = pays_off(num_gradients, modules_behind(pair.model), modules)
    recorded: dict[tuple[int, int], Extracted | None] = {}

    def potential_of(start: int, stop: int, num_chains: int) -> Potential:
        potential = Potential(pair, start, stop, num_chains, from_prior=from_prior)
        sizes = (stop - start, num_chains)
        if record and stop - start == size:  # a ragged last block is not worth a compilation
            if sizes not in recorded:
                potential.record(modules, inductor=inductor)
                recorded[sizes] = potential.recorded
            potential.recorded = recorded[sizes]
        return potential

    kernels_per_block = num_pilot_kernels(num_temperatures) + passes * num_temperatures
    with tqdm(
        total=kernels_per_block * num_blocks, unit=" kernels", desc="annealing", disable=not settings.progress
    ) as bar:
        for start in range(0, pair.num_data, size):
            stop = min(start + size, pair.num_data)
            potential = potential_of(start, stop, num_chains)
            pilot = potential
            if num_chains < _FEWEST_PILOT_CHAINS:
                pilot = potential_of(start, stop, _FEWEST_PILOT_CHAINS)
            # Random numbers of its own, so that the kernels are independent of the chains that count.
            seed = int(torch.randint(2**62, ()))
            with torch.random.fork_rng([potential.device] if potential.device.type == "cuda" else []):
                torch.manual_seed(seed)
                kernels = tune(
                    pilot,
                    num_temperatures,
                    settings.num_leapfrog_steps,
                    adaptive=settings.schedule == "adaptive",
                    tick=bar.update,
                )
            yield start, potential, kernels, bar.update
