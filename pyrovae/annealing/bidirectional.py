"""Result of bidirectional Monte Carlo."""

from dataclasses import dataclass

from torch import Tensor

from pyrovae.estimators.standard_error import standard_error

__all__ = ["BidirectionalMonteCarlo"]


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
