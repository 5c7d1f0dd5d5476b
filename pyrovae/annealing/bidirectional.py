"""What bidirectional Monte Carlo gives."""

from dataclasses import dataclass

from torch import Tensor

from pyrovae.estimators.standard_error import standard_error

__all__ = ["BidirectionalMonteCarlo"]


@dataclass(frozen=True, repr=False)
class BidirectionalMonteCarlo:
    """Bounds of log p(x) from both sides, for data simulated from the model: float64 tensors (N,), in nats.

    lower, lower_stderr: annealed importance sampling from the start density, a lower bound on average
    upper, upper_stderr: from the exact posterior draw backwards, an upper bound on average; the error is too small, as
        the chains of a datum share that draw
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
        return standard_error(self.width)

    def summary(self) -> str:
        """A few lines to print."""
        meaning = "on data of this model, annealed importance sampling is too low by no more than this, on average"
        if self.width.mean() < 0:
            meaning = "the bounds hold on average and have crossed here: they agree, as far as this error can tell"
        return (
            f"log p(x) by bidirectional Monte Carlo: {len(self):,} simulated data, {self.num_chains} chains; nats per datum\n"
            f"  lower bound {self.lower.mean():10.3f}\n"
            f"  upper bound {self.upper.mean():10.3f}\n"
            f"  width       {self.width.mean():10.3f}   +- {self.width_stderr:.3f} over data: {meaning}\n"
            f"  acceptance  {self.acceptance.mean():10.2f}"
        )

    def __repr__(self) -> str:
        return (
            f"BidirectionalMonteCarlo({len(self)} simulated data, {self.num_chains} chains: "
            f"{self.lower.mean():.3f} to {self.upper.mean():.3f})"
        )
