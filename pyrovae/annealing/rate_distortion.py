"""The rate-distortion curve of a model: how many nats a code needs for each distortion of the data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyrovae import estimators
from pyrovae.annealing.bidirectional import BidirectionalMonteCarlo
from pyrovae.annealing.blocks import AnnealingOptions, TunedBlock, tuned_blocks, with_prior
from pyrovae.annealing.chains import anneal
from pyrovae.estimators.compression import rate_and_distortion
from pyrovae.estimators.reducers import standard_error
from pyrovae.evaluation.drawing import until_interrupted
from pyrovae.evaluation.opening import opened
from pyrovae.programs.pair import Pair
from pyrovae.programs.traces import Program

__all__ = ["RateDistortion", "rate_distortion"]

_SHOWN = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # temperatures in a summary


@dataclass(frozen=True, repr=False)
class RateDistortion:
    """Points of the rate-distortion curves of N data at T + 1 temperatures: float64 tensors, in nats.

    Attributes:
        num_chains: S, chains per datum
        beta: temperatures (T + 1,), from 0 (the prior) to 1 (the posterior)
        rate: upper bound, on average, of the rate KL(q(z) || p(z)) of the chains' distribution q (T + 1, N)
        distortion: E_q[-log p(x|z)] (T + 1, N)
        rate_stderr: Monte Carlo standard error of `rate` (T + 1, N); NaN with one chain
        distortion_stderr: Monte Carlo standard error of `distortion` (T + 1, N); NaN with one chain
        ess: effective number of chains (T + 1, N); where few chains carry the weight, the standard errors are too small
        acceptance: mean acceptance rate per datum (N,)
    """

    num_chains: int
    beta: Tensor
    rate: Tensor
    distortion: Tensor
    rate_stderr: Tensor
    distortion_stderr: Tensor
    ess: Tensor
    acceptance: Tensor

    def __len__(self) -> int:
        return self.rate.shape[1]

    @property
    def mean_rate(self) -> Tensor:
        """Mean of `rate` over the data (T + 1,)."""
        return self.rate.mean(1)

    @property
    def mean_distortion(self) -> Tensor:
        """Mean of `distortion` over the data (T + 1,)."""
        return self.distortion.mean(1)

    @property
    def mean_rate_stderr(self) -> Tensor:
        """Standard error of `mean_rate` for new data, sd / sqrt(N) (T + 1,); includes the Monte Carlo noise."""
        return torch.tensor([standard_error(row) for row in self.rate], dtype=torch.float64)

    @property
    def mean_distortion_stderr(self) -> Tensor:
        """Standard error of `mean_distortion` for new data (T + 1,); see `mean_rate_stderr`."""
        return torch.tensor([standard_error(row) for row in self.distortion], dtype=torch.float64)

    @property
    def mean_rate_mc_stderr(self) -> Tensor:
        """Monte Carlo error of `mean_rate` for these data, sqrt(sum stderr^2) / N (T + 1,)."""
        return self.rate_stderr.square().sum(1).sqrt() / len(self)

    @property
    def mean_distortion_mc_stderr(self) -> Tensor:
        """Monte Carlo error of `mean_distortion` for these data (T + 1,)."""
        return self.distortion_stderr.square().sum(1).sqrt() / len(self)

    @property
    def log_prob(self) -> Tensor:
        """log p(x) by annealed importance sampling, -(rate + distortion) at beta = 1 (N,); a lower bound on average."""
        return -(self.rate[-1] + self.distortion[-1])

    def least_rate(self, bounds: BidirectionalMonteCarlo) -> Tensor:
        """Return a lower bound, on average, of the rate of any code with the distortion of each point (T + 1, N).

            R >= -log p(x) - D >= -upper - D

        Every q(z) has KL(q || p(z)) + E_q[-log p(x|z)] >= -log p(x), with equality at the posterior. So the curve lies
        above a line of slope -1 that touches it at beta = 1, and `bounds.upper` is an upper bound of log p(x) on
        average. At beta = 1 the distance from `rate` therefore bounds the error of `rate + distortion`. Below 1 the line
        holds as well but does not touch the curve, so the distance from it says little about the error there: an upper
        bound of log Z_beta needs an exact draw from p(z) p(x|z)^beta, and simulated data provide one at beta = 1 only.

        Negative values hold too, and say less than R >= 0.

        Args:
            bounds: from `bidirectional_monte_carlo`, whose simulated data this curve is for

        Raises:
            ValueError: `bounds` are for another number of data.

        References:
            Grosse, Ghahramani & Adams, Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (2015).
        """
        if len(bounds) != len(self):
            raise ValueError(
                f"found bounds for {len(bounds)} data and a curve for {len(self)}: compute the curve for the data that "
                f"were simulated for the bounds, rate_distortion(model, bounds.data['x'])"
            )
        return -bounds.upper - self.distortion

    def summary(self) -> str:
        """Return a few lines to print."""
        data = f"{len(self):,} {'datum' if len(self) == 1 else 'data'}"
        chains = f"{self.num_chains:,} {'chain' if self.num_chains == 1 else 'chains'}"
        lines = [
            f"rate and distortion by annealing from the prior: {data}, {chains}, {len(self.beta) - 1:,} temperatures; nats "
            f"per datum",
            "       beta       rate  ± Monte Carlo   distortion  ± Monte Carlo     ESS",
        ]
        for t in sorted({int((self.beta - beta).abs().argmin()) for beta in _SHOWN}):
            lines.append(
                f"    {self.beta[t]:7.3f} {self.mean_rate[t]:10.3f} {self.mean_rate_mc_stderr[t]:15.3f} "
                f"{self.mean_distortion[t]:12.3f} {self.mean_distortion_mc_stderr[t]:15.3f} {self.ess[t].median():7.1f}"
            )
        return "\n".join(
            [
                *lines,
                "  each rate is an upper bound on average: a code of this distortion needs no more nats",
                f"  log p(x) {self.log_prob.mean():10.3f}   ± {standard_error(self.log_prob):.3f} over data: "
                f"-(rate + distortion) at beta = 1, a lower bound on average",
                f"  acceptance {self.acceptance.mean():8.2f}   of the trajectories",
            ]
        )

    def __repr__(self) -> str:
        return (
            f"RateDistortion({len(self)} data, {self.num_chains} chains, {len(self.beta) - 1} temperatures: rate up to "
            f"{self.mean_rate[-1]:.3f}, distortion {self.mean_distortion[0]:.3f} to {self.mean_distortion[-1]:.3f})"
        )


def rate_distortion(
    model: Program,
    *args: Any,
    num_chains: int = 16,
    num_temperatures: int = 500,
    num_leapfrog_steps: int = 10,
    plate: str | None = None,
    data_batch_size: int | Literal["auto"] | None = "auto",
    compile: bool | Literal["auto"] = "auto",
    progress: bool = False,
    **kwargs: Any,
) -> RateDistortion:
    """Compute the rate-distortion curve of any Pyro model with continuous latents from one annealing run, per datum.

        R(D) = min { KL(q(z) || p(z)) : E_q[-log p(x|z)] <= D },   reached by  q = p_beta(z|x) = p(z) p(x|z)^beta / Z_beta

    A code z ~ q(z) costs KL(q || p) nats and leaves the distortion D; a code of the prior costs nothing, one of the
    posterior (beta = 1) costs most here. Chains of annealed importance sampling pass through every p_beta on their way,
    so the cost of one estimate of log p(x) gives the whole curve:

        D_beta = E[-log p(x|z_beta)],   R_beta = -beta D_beta - E[log w_beta],   log w_beta = log of the mean weight of S
        chains up to beta, z_beta one of them, drawn in proportion to its weight

    R_beta is an upper bound of the rate of the distribution q of z_beta. Let F be the distribution of all that happens
    up to beta, and B that of the same run backwards from an exact draw of p_beta, hidden among S chains. As log dF/dB =
    log Z_beta - log w_beta, and marginals have the smaller KL,

        KL(q || p) = KL(q || p_beta) - log Z_beta - beta D_beta <= KL(F || B) - log Z_beta - beta D_beta = R_beta

    So (D_beta, R_beta) lies on or above the curve, whatever the kernels, and R_beta + beta D_beta is at least its
    smallest possible value, -log Z_beta. With slow annealing and many chains the points reach the curve. Means over
    data are bounds of the curve for mean rate and mean distortion, at one slope -beta for all data, which is why the
    temperatures are the same for all ("sigmoidal" in `annealed_importance_sampling`).

    On data simulated from the model, the other side is known at beta = 1, and as a line of slope -1 below the curve:

        bounds = pv.bidirectional_monte_carlo(model, x)
        curve = pv.rate_distortion(model, bounds.data["x"])
        curve.least_rate(bounds)

    The distortion is -log p(x|z), everything that is observed (`pyro.factor` included). For a normal likelihood of fixed
    scale it is |x - f(z)|^2 / (2 scale^2) + constant. The curve ends at the posterior: rates above that need beta > 1.

    Args:
        model: Pyro program, called as model(*args, **kwargs); its modules are in eval mode during the call
        *args: arguments of the program
        num_chains: S
        num_temperatures: T
        num_leapfrog_steps: as in `annealed_importance_sampling`
        plate: as in `log_marginal_likelihood`
        data_batch_size: as in `log_marginal_likelihood`
        compile: as in `log_marginal_likelihood`
        progress: show a progress bar
        **kwargs: further arguments of the program

    Returns:
        The curves as a `RateDistortion`. Ctrl-C returns those of the blocks of data that are done.

    Raises:
        ValueError: as `annealed_importance_sampling`.

    References:
        Huang, Makhzani, Cao & Grosse, Evaluating Lossy Compression Rates of Deep Generative Models (2020).
        Alemi, Poole, Fischer, Dillon, Saurous & Murphy, Fixing a Broken ELBO (2018), for rate and distortion of VAEs.
    """
    options = AnnealingOptions.of(locals(), schedule="sigmoidal")
    with opened(model, None, args, kwargs, options, with_prior(model), evaluation=rate_distortion) as pair:
        parts = until_interrupted(_curves(pair, options))
    beta = parts[0].beta.double().cpu()  # the same in all blocks
    points = (torch.cat(values, -1).cpu() for values in zip(*(part[1:] for part in parts), strict=True))
    return RateDistortion(options.num_chains, beta, *points)


class _Curves(NamedTuple):
    beta: Tensor
    rate: Tensor
    distortion: Tensor
    rate_stderr: Tensor
    distortion_stderr: Tensor
    ess: Tensor
    acceptance: Tensor


def _curves(pair: Pair, options: AnnealingOptions) -> Iterator[tuple[_Curves, int, int]]:
    for block in tuned_blocks(pair, options, from_prior=True, passes=1):
        yield _curves_of(block), block.stop, pair.num_data


def _curves_of(block: TunedBlock) -> _Curves:
    beta = block.kernels.temperatures
    points: list[tuple[Tensor, ...]] = []

    def look(log_weights: Tensor, log_likelihood: Tensor) -> None:
        point = rate_and_distortion(beta[len(points)].item(), log_weights, log_likelihood)
        points.append((*point, estimators.effective_sample_size(log_weights)))

    annealed = anneal(block.potential, block.kernels, block.tick, look)
    rows = (torch.stack(values) for values in zip(*points, strict=True))
    return _Curves._make((beta, *map(block.own, (*rows, annealed.acceptance.double()))))
