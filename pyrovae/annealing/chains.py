"""Annealed importance sampling: Hamiltonian chains from a start density to the joint density, in arrays.

A chain passes through f_t(u) = q(u) w(u)^beta_t, 0 = beta_0 < ... < beta_T = 1, under kernels that leave each f_t
invariant; its weight is prod_t f_t(u_{t-1}) / f_{t-1}(u_{t-1}). All properties of the kernels (temperatures, step
sizes, metric) are tuned in pilot runs with separate random numbers and then fixed (`Kernels`). Nothing adapts in a
chain whose weight counts, so E[weight] = p(x) strictly, and the log of a mean of weights is a lower bound on average.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyrovae.annealing.potential import Potential
from pyrovae.common.arguments import without_checks

__all__ = ["Annealed", "Kernels", "anneal", "anneal_back", "num_pilot_kernels", "sigmoidal_schedule", "tune"]

_ACCEPTANCE = 0.65  # the optimum of HMC in high dimensions (Beskos et al. 2013)
_JITTER = 0.2  # of the step size, for each chain and kernel
_SETTLING = 40  # kernels at the first and at the last temperature of a pilot
_GAIN = 0.3  # how fast log step sizes follow the acceptance in a pilot


@dataclass(frozen=True)
class Kernels:
    """One Hamiltonian kernel per temperature, for each datum.

    Attributes:
        temperatures: beta, (T + 1,), from 0 to 1
        step_sizes: (T + 1, N), in units of the metric
        start_variance: (N, D), of u at beta = 0
        end_variance: (N, D), of u at beta = 1. Between the two, the metric is that of a path between normals, 1 /
            variance_beta = (1 - beta) / start_variance + beta / end_variance
        num_steps: leapfrog steps of each kernel, (T + 1,); they vary, because trajectories of one length would resonate
            with the posterior
    """

    temperatures: Tensor
    step_sizes: Tensor
    start_variance: Tensor
    end_variance: Tensor
    num_steps: list[int]

    def scale(self, beta: Tensor) -> Tensor:
        """Return the standard deviations (N, D) of the metric."""
        return ((1 - beta) / self.start_variance + beta / self.end_variance).rsqrt()


@dataclass(frozen=True)
class Annealed:
    """Result of running chains.

    Attributes:
        log_weights: (S, N)
        u: last states (S, N, D)
        acceptance: mean acceptance rate per datum (N,)
    """

    log_weights: Tensor
    u: Tensor
    acceptance: Tensor


def sigmoidal_schedule(num_temperatures: int, steepness: float = 4.0) -> Tensor:
    """Return temperatures 0 = beta_0 < ... < beta_T = 1, dense at both ends.

        beta_t = (s(t) - s(0)) / (s(T) - s(0)),   s(t) = sigmoid(steepness (2 t / T - 1))

    Args:
        num_temperatures: T
        steepness: of the sigmoid; larger values put more temperatures at the ends

    Returns:
        (T + 1,), float64.

    Example:
        >>> sigmoidal_schedule(2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)

    References:
        Wu, Burda, Salakhutdinov & Grosse, On the Quantitative Analysis of Decoder-Based Generative Models (2017).
    """
    s = torch.sigmoid(steepness * torch.linspace(-1, 1, num_temperatures + 1, dtype=torch.float64))
    return (s - s[0]) / (s[-1] - s[0])


class _State(NamedTuple):
    u: Tensor  # (S, N, D)
    log_start: Tensor  # (S, N)
    log_weight: Tensor  # (S, N)


@torch.no_grad()
def anneal(
    potential: Potential,
    kernels: Kernels,
    tick: Callable[[], object] = lambda: None,
    look: Callable[[Tensor, Tensor], object] = lambda log_weights, log_weight: None,
) -> Annealed:
    """Run chains from draws of the start density to the joint density; the expected mean of their weights is p(x).

    Args:
        potential: densities of the block
        kernels: tuned kernels
        tick: called after each kernel
        look: called at each temperature, the first included, as look(log weights of the chains so far, log w(u) at
            their states), each (S, N)

    References:
        Neal, Annealed Importance Sampling (2001).
    """
    state = start(potential, potential.draw())
    log_weights, acceptance = _nothing_yet(state)
    look(log_weights, state.log_weight)
    for t in range(1, len(kernels.temperatures)):
        log_weights += factor(state, kernels, t)
        state, rate = move(potential, state, kernels, t)
        acceptance += rate
        look(log_weights, state.log_weight)
        tick()
    return Annealed(log_weights, state.u, acceptance / (len(kernels.temperatures) - 1))


@torch.no_grad()
def anneal_back(
    potential: Potential, kernels: Kernels, u: Tensor, tick: Callable[[], object] = lambda: None
) -> Annealed:
    """Run chains backwards from exact posterior draws; the expected mean of 1 / weight is 1 / p(x).

    The kernels are reversible, so this follows the path of `anneal` backwards, and -log(mean(1 / weight)) is an upper
    bound of log p(x) on average.

    Args:
        potential: densities of the block
        kernels: tuned kernels
        u: posterior draws (S, N, D)
        tick: called after each kernel

    References:
        Grosse, Ghahramani & Adams, Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (2015).
    """
    state = start(potential, u)
    log_weights, acceptance = _nothing_yet(state)
    for t in range(len(kernels.temperatures) - 1, 0, -1):
        state, rate = move(potential, state, kernels, t)
        log_weights += factor(state, kernels, t)
        acceptance += rate
        tick()
    return Annealed(log_weights, state.u, acceptance / (len(kernels.temperatures) - 1))


@torch.no_grad()
def tune(
    potential: Potential,
    num_temperatures: int,
    num_leapfrog_steps: int,
    *,
    adaptive: bool = True,
    tick: Callable[[], object] = lambda: None,
) -> Kernels:
    """Tune the kernels in two pilot runs: the first finds the metric, the second the step sizes and the temperatures.

    Step sizes follow the acceptance of the pilot's chains, per datum, towards 0.65. An adaptive schedule spends half of
    its temperatures in proportion to the standard deviation of log w (so that each step loses the same amount), and the
    other half as `sigmoidal_schedule` does.

    Args:
        potential: densities of the block
        num_temperatures: T
        num_leapfrog_steps: maximum number of steps per trajectory
        adaptive: whether the schedule adapts to the pilot
        tick: called after each kernel
    """
    draws = torch.cat([potential.draw() for _ in range(math.ceil(64 / potential.num_chains))])
    potential.coordinates.warn_of_ties(draws, potential.pair.model)
    start_variance = draws.var(0)
    pilot_temperatures = sigmoidal_schedule(_num_pilot_temperatures(num_temperatures)).to(start_variance)
    first_guess = start_variance.new_full(start_variance.shape[:1], start_variance.shape[-1] ** -0.25)
    num_steps = _draw_num_steps(len(pilot_temperatures), num_leapfrog_steps)
    kernels = Kernels(pilot_temperatures, first_guess, start_variance, start_variance, num_steps)
    settled, _, _ = _pilot(potential, kernels, tick)
    # Shrink the variance as Stan does, because a few draws may by chance hardly differ in one of many dimensions.
    share = len(settled) / (len(settled) + 5)
    kernels = replace(kernels, end_variance=share * settled.var(0) + (1 - share) * 1e-3 * start_variance)
    _, log_step_sizes, spread = _pilot(potential, kernels, tick)
    temperatures = sigmoidal_schedule(num_temperatures).to(start_variance)
    if adaptive and 0 < spread.sum() < math.inf:  # without spread, the weights do not show where to slow down
        length = torch.cat([spread.new_zeros(1), (spread * pilot_temperatures.diff()).cumsum(0)])
        steps = torch.linspace(0, 1, num_temperatures + 1).to(start_variance)
        temperatures = (temperatures + _interpolate(steps, length / length[-1], pilot_temperatures)) / 2
    step_sizes = _interpolate(temperatures, pilot_temperatures, log_step_sizes).exp()
    num_steps = _draw_num_steps(len(temperatures), num_leapfrog_steps)
    return replace(kernels, temperatures=temperatures, step_sizes=step_sizes, num_steps=num_steps)


def _draw_num_steps(count: int, most: int) -> list[int]:
    return torch.randint(1, most + 1, (count,)).tolist()


def _num_pilot_temperatures(num_temperatures: int) -> int:
    return max(50, num_temperatures // 4)


def num_pilot_kernels(num_temperatures: int) -> int:
    """Return how many kernels `tune` runs."""
    return 2 * (_num_pilot_temperatures(num_temperatures) - 1 + 2 * _SETTLING)


def _pilot(potential: Potential, kernels: Kernels, tick: Callable[[], object]) -> tuple[Tensor, Tensor, Tensor]:
    """Run chains whose step sizes follow the acceptance.

    Returns their states at beta = 1 (draws, N, D); log step sizes (T + 1, N), smoothed; and the standard deviation of
    log w among chains at each temperature except the last, averaged over data, (T,).
    """
    temperatures = kernels.temperatures
    last = len(temperatures) - 1
    state = start(potential, potential.draw())
    log_step = kernels.step_sizes.log()
    settled, log_steps, spread = [], [], []
    for t in [1] * _SETTLING + list(range(1, last)) + [last] * _SETTLING:
        beta = temperatures[t]
        spread_here = state.log_weight.clamp_min(torch.finfo(state.log_weight.dtype).min / 1e3).std(0)
        state, rate = _leap(potential, state, beta, kernels.scale(beta), log_step.exp(), kernels.num_steps[t])
        log_step = log_step + _GAIN * (rate - _ACCEPTANCE)
        if t == last:
            settled.append(state.u)
        log_steps.append(log_step)
        spread.append(spread_here.nan_to_num(posinf=0.0).mean())
        tick()
    # Keep one row per temperature: of the settling kernels at either end, only the last.
    rows = log_steps[_SETTLING - 1 : _SETTLING - 1 + last] + log_steps[-1:]
    smoothed = nn.functional.avg_pool1d(torch.stack(rows).T.unsqueeze(0), 9, 1, 4, count_include_pad=False)[0].T
    return torch.cat(settled), smoothed, torch.stack(spread[_SETTLING - 1 : _SETTLING - 1 + last])


def start(potential: Potential, u: Tensor) -> _State:
    energy = potential.energy(u, u.new_zeros(()))
    return _State(u, energy.log_start, energy.log_weight)


def _nothing_yet(state: _State) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(state.log_weight, dtype=torch.float64), torch.zeros_like(state.log_weight[0])


def factor(state: _State, kernels: Kernels, t: int) -> Tensor:
    """Return log f_t(u) - log f_{t-1}(u)."""
    return (kernels.temperatures[t] - kernels.temperatures[t - 1]) * state.log_weight


def move(potential: Potential, state: _State, kernels: Kernels, t: int) -> tuple[_State, Tensor]:
    beta = kernels.temperatures[t]
    return _leap(potential, state, beta, kernels.scale(beta), kernels.step_sizes[t], kernels.num_steps[t])


def _leap(
    potential: Potential, state: _State, beta: Tensor, scale: Tensor, step_size: Tensor, num_steps: int
) -> tuple[_State, Tensor]:
    """Apply one Hamiltonian kernel to each chain; also return the mean acceptance probability of each datum (N,).

    Source: Neal, MCMC Using Hamiltonian Dynamics (2011).
    """
    jitter = 1 + _JITTER * (2 * torch.rand_like(state.log_start) - 1)
    step = (step_size * jitter).unsqueeze(-1)
    u, momentum = state.u, torch.randn_like(state.u)
    before = state.log_start + beta * state.log_weight - 0.5 * momentum.square().sum(-1)
    with without_checks():  # a trajectory may diverge to infinity; it is then rejected
        energy = potential.energy(u, beta)
        momentum = momentum + 0.5 * step * scale * energy.gradient
        for number in range(num_steps):
            u = u + step * scale * momentum
            energy = potential.energy(u, beta)
            half = 0.5 if number == num_steps - 1 else 1.0
            momentum = momentum + half * step * scale * energy.gradient
    after = energy.log_start + beta * energy.log_weight - 0.5 * momentum.square().sum(-1)
    log_ratio = (after - before).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    moved = _State(
        torch.where(accepted.unsqueeze(-1), u, state.u),
        torch.where(accepted, energy.log_start, state.log_start),
        torch.where(accepted, energy.log_weight, state.log_weight),
    )
    return moved, log_ratio.exp().clamp_max(1.0).mean(0)


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Interpolate y(at) linearly from increasing x (K,) and y (K, ...)."""
    upper = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    width = (x[upper] - x[upper - 1]).clamp_min(torch.finfo(x.dtype).tiny)
    fraction = ((at - x[upper - 1]) / width).clamp(0, 1)
    fraction = fraction.reshape(-1, *(1,) * (y.ndim - 1))
    return y[upper - 1] + fraction * (y[upper] - y[upper - 1])
