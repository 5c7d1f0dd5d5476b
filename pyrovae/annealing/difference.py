"""The mean log p(x) of a data set from importance sampling on all data and annealing on a random few of them."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae.annealing.annealed_sampling import annealed_importance_sampling
from pyrovae.annealing.blocks import FEWEST_PILOT_CHAINS
from pyrovae.annealing.chains import num_pilot_kernels
from pyrovae.annealing.potential import prior_of
from pyrovae.common.arguments import check_count
from pyrovae.data.forms import Batch
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.evaluation.opening import evaluation_of
from pyrovae.programs.splitting import inspect
from pyrovae.programs.traces import Program

__all__ = ["DifferenceEstimate", "anneal_a_slice", "size_of_slice"]

_FEWEST = 10  # data annealed at least: with fewer, the spread of the differences says little
_GRADIENT = 2.0  # cost of a gradient of log p(x, z), in evaluations of it: measured 1.6 to 1.8, compiled


@dataclass(frozen=True, repr=False)
class DifferenceEstimate:
    """Mean log p(x) of N data by the difference estimator, in nats per datum.

        mean = 1/N sum_i IS_i + 1/n sum_(i in slice) (AIS_i - IS_i)

    Attributes:
        importance: results of importance sampling on all N data
        annealed: results of annealing on the slice, n data
        index: positions of the slice among the data, (n,)
    """

    importance: LogMarginalLikelihood
    annealed: LogMarginalLikelihood
    index: Tensor

    @property
    def differences(self) -> Tensor:
        """AIS_i - IS_i of the slice (n,)."""
        return self.annealed.log_prob - self.importance.log_prob[self.index]

    @property
    def difference(self) -> float:
        """Mean difference: how much more annealing finds than importance sampling."""
        return self.differences.mean().item()

    @property
    def difference_stderr(self) -> float:
        """Standard error of `difference` as an estimate for all N data, drawn without replacement.

        sqrt(var(AIS - IS) / n (1 - n / N))
        """
        n, num_data = len(self.index), len(self.importance)
        return math.sqrt(self.differences.var().item() / n * (1 - n / num_data))

    @property
    def mean(self) -> float:
        """Estimate of mean log p(x) of these N data."""
        return self.importance.mean + self.difference

    @property
    def mean_mc_stderr(self) -> float:
        """Standard error of `mean` for these data: which were annealed, and the noise of annealing.

        sqrt(difference_stderr^2 + mean(AIS stderr^2) / N)
        """
        noise = self.annealed.stderr.square().mean().item() / len(self.importance)
        return math.hypot(self.difference_stderr, math.sqrt(noise))

    @property
    def mean_stderr(self) -> float:
        """Standard error of `mean` as an estimate for new data.

        sqrt(difference_stderr^2 + var(AIS) / N)
        """
        return math.hypot(self.difference_stderr, math.sqrt(self.annealed.log_prob.var().item() / len(self.importance)))

    def summary(self) -> str:
        """Return a few lines to print."""
        n, num_data = len(self.index), len(self.importance)
        return (
            f"log p(x) of {num_data:,} data by importance sampling, {n:,} of them annealed too; nats per datum\n"
            f"  importance sampling {self.importance.mean:10.3f}   {self.importance.num_particles:,} particles\n"
            f"  annealing finds     {self.difference:+10.3f}   ± {self.difference_stderr:.3f} more, on the {n:,}\n"
            f"  log p(x)            {self.mean:10.3f}   ± {self.mean_mc_stderr:.3f} for these data, ± {self.mean_stderr:.3f} "
            f"for new data; a lower bound on average, too low by what annealing misses" + self._about_few()
        )

    def _about_few(self) -> str:
        squares = (self.differences - self.differences.mean()).square()
        if len(squares) <= 2 or not (squares.max() > 0.25 * squares.sum()).item():
            return ""
        return "\n  one of the differences carries over a quarter of their variance: these errors are too small"

    def __repr__(self) -> str:
        return (
            f"DifferenceEstimate({len(self.importance)} data, {len(self.index)} annealed: log p(x) {self.mean:.3f} "
            f"± {self.mean_mc_stderr:.3f})"
        )


def size_of_slice(
    num_data: int, num_particles: int, num_chains: int, num_temperatures: int, num_leapfrog_steps: int, share: float
) -> int:
    """Return how many data can be annealed at `share` times the cost of importance sampling on all of them.

    Costs count evaluations of log p(x, z), a gradient as two; the pilots count, too. At least 10 data are annealed, or
    all if there are fewer.

    Args:
        num_data: N
        num_particles: particles of the importance sampling
        num_chains: chains per datum
        num_temperatures: T
        num_leapfrog_steps: most steps of a trajectory
        share: cost of annealing in that of importance sampling

    Example:
        >>> size_of_slice(10_000, 1_000, 8, 200, 5, 1 / 3)
        113
    """
    num_pilots = max(num_chains, FEWEST_PILOT_CHAINS)
    num_kernels = num_chains * num_temperatures + num_pilots * num_pilot_kernels(num_temperatures)
    gradients_per_kernel = 1 + (1 + num_leapfrog_steps) / 2  # the start, and 1 to `num_leapfrog_steps` steps
    per_datum = _GRADIENT * num_kernels * gradients_per_kernel
    return min(num_data, max(_FEWEST, int(share * num_data * num_particles / per_datum)))


def anneal_a_slice(
    model: Program,
    importance: LogMarginalLikelihood,
    *args: Any,
    num_annealed: int | Literal["auto"] = "auto",
    share: float = 1 / 3,
    guide: Program | None = None,
    num_chains: int = 8,
    num_temperatures: int = 200,
    num_leapfrog_steps: int = 5,
    plate: str | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> DifferenceEstimate:
    """Correct the importance-sampled mean of log p(x) by annealing a random slice of the data.

        mean log p(x) ~ mean_N(IS) + mean_slice(AIS - IS)

    The standard errors are those of a mean: if a few data carry most of the difference, a slice may miss them, and the
    errors are then too small, too. `summary` says so if one datum of the slice carries a quarter of the variance.

    Both parts are lower bounds on average, so the sum is one as well: on average over the slices it is the mean that
    annealing all N data would give.

    Args:
        model: Pyro program
        importance: result of `log_marginal_likelihood` for the same data in the same order, which is not checked
        *args: arguments of the programs, as given there
        num_annealed: n, size of the slice; "auto" as many as cost `share` times the importance sampling, at least 10
        share: see `num_annealed`
        guide: Pyro program that the chains start from; None starts from the prior, so that a mode that the guide misses
            can be found
        num_chains: as in `annealed_importance_sampling`
        num_temperatures: as in `annealed_importance_sampling`
        num_leapfrog_steps: as in `annealed_importance_sampling`
        plate: as in `annealed_importance_sampling`
        progress: show a progress bar
        **kwargs: further arguments of the programs

    Returns:
        The estimate with its standard errors. If it is interrupted (Ctrl-C), that of the data annealed so far.

    Raises:
        KeyboardInterrupt: it is interrupted before two data were annealed.
        ValueError: no argument has as many rows as `importance` has results; `num_annealed` is below 2 or
            above N; and everything that `annealed_importance_sampling` refuses.

    References:
        Cochran, Sampling Techniques (1977), section 7.4.
        Neal, Annealed Importance Sampling (2001).
    """
    if not isinstance(importance, LogMarginalLikelihood):
        raise TypeError(
            f"the second argument is what log_marginal_likelihood gave for the same data, found {type(importance).__name__}: "
            f"anneal_a_slice(model, log_marginal_likelihood(model, guide, x), x, guide=guide)"
        )
    num_data = len(importance)
    if num_annealed == "auto":
        num_annealed = size_of_slice(
            num_data, importance.num_particles, num_chains, num_temperatures, num_leapfrog_steps, share
        )
    num_annealed = check_count("num_annealed", num_annealed, least=2)
    if num_annealed > num_data:
        raise ValueError(f"num_annealed must be at most the number of data, {num_data}; found {num_annealed}")
    with evaluation_of(model, guide, args=args, kwargs=kwargs, evaluation=anneal_a_slice) as (args, kwargs):
        batch = Batch(args, kwargs, num_data)
        if not batch.tensors and num_annealed < num_data:
            raise ValueError(
                f"the model was given no data, so it holds its {num_data} data itself, and a slice of {num_annealed} cannot "
                f"be taken: anneal all, num_annealed={num_data}, or pass the data as an argument of the model"
            )
        if batch.tensors and not any(tensor.ndim and len(tensor) == num_data for tensor in batch.tensors.values()):
            found = {place: tuple(tensor.shape) for place, tensor in batch.tensors.items()}
            raise ValueError(
                f"found results of importance sampling for {num_data} data, and no argument of that length ({found}): "
                f"pass the data that log_marginal_likelihood was given, in the same order"
            )
        # Running the programs to see whether their data can be cut takes time: only if they are.
        if num_annealed < num_data and (
            inspect(model, guide or prior_of(model), args, kwargs, plate).split_size != num_data
        ):
            raise ValueError(
                f"a slice of the data cannot be taken: arguments of length {num_data} are not one row for each datum, or "
                f"data influence each other: anneal all, num_annealed={num_data}"
            )
    # Not sorted: the part that is finished must be random, too. Data that the model holds itself stay in their order.
    index = torch.randperm(num_data)[:num_annealed] if batch.tensors else torch.arange(num_data)
    cut = batch.rows(index)
    annealed = annealed_importance_sampling(
        model,
        *cut.args,
        guide=guide,
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        num_leapfrog_steps=num_leapfrog_steps,
        plate=plate,
        progress=progress,
        **cut.kwargs,
    )
    if len(annealed) < 2:  # interrupted; a standard error needs two
        raise KeyboardInterrupt
    return DifferenceEstimate(importance, annealed, index[: len(annealed)])
