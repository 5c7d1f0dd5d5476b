"""Simulation-based calibration: check a guide's spread on data simulated together with their latents."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrovae.common.arguments import check_count
from pyrovae.common.reporting import progress_bar
from pyrovae.evaluation.opening import evaluation_of
from pyrovae.programs.enumeration import SummedOut
from pyrovae.programs.inspection import inspect_pair
from pyrovae.programs.pair import encode_once, guide_given
from pyrovae.programs.simulation import simulate
from pyrovae.programs.traces import Program, as_guide, sample_sites, trace_program

__all__ = ["Calibration", "simulation_based_calibration"]

_MOST_BINS, _FEWEST_PER_BIN = 20, 5


@dataclass(frozen=True, repr=False)
class Calibration:
    """Ranks of exact posterior draws among a guide's draws, for N simulated data and D latent dimensions.

    Attributes:
        num_draws: L, draws of the guide per datum
        names: of the D latent dimensions, by site: "z[0]", ...
        ranks: (N, D) from 0 to L; uniform if the guide is the posterior
    """

    num_draws: int
    names: list[str]
    ranks: Tensor

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def num_bins(self) -> int:
        """Number of bins B of the rank histogram.

        At most 20, at most L + 1, and with at least 5 data per bin. Reduced, by no more than half, to a divisor of L +
        1 if there is one, so that all bins hold the same number of ranks.
        """
        most = max(1, min(_MOST_BINS, len(self) // _FEWEST_PER_BIN, self.num_draws + 1))
        equal = max(bins for bins in range(1, most + 1) if (self.num_draws + 1) % bins == 0)
        return equal if equal > most / 2 else most

    @property
    def bin_shares(self) -> Tensor:
        """Share of the L + 1 ranks in each bin (B,): 1/B, or as close to it as whole ranks allow."""
        return torch.bincount(self._bin_of(torch.arange(self.num_draws + 1))).double() / (self.num_draws + 1)

    def _bin_of(self, ranks: Tensor) -> Tensor:
        return ranks * self.num_bins // (self.num_draws + 1)

    @property
    def counts(self) -> Tensor:
        """Number of data in each bin of ranks (D, B)."""
        return torch.nn.functional.one_hot(self._bin_of(self.ranks), self.num_bins).sum(0)

    @property
    def statistic(self) -> Tensor:
        """Chi-square statistic of uniform ranks (D,): about B - 1 if the ranks are uniform.

        sum_b (count_b - N share_b)^2 / (N share_b)
        """
        expected = len(self) * self.bin_shares
        return ((self.counts - expected).square() / expected).sum(1)

    @property
    def p_value(self) -> Tensor:
        """p-value of the chi-square test of uniform ranks (D,); NaN if there are too few data for two bins."""
        if self.num_bins < 2:
            return torch.full((len(self.names),), math.nan, dtype=torch.float64)
        freedom = torch.tensor((self.num_bins - 1) / 2, dtype=torch.float64)
        return torch.special.gammaincc(freedom, self.statistic / 2)

    @property
    def overall_p_value(self) -> float:
        """p-value of all latents together: D times the smallest (Bonferroni), at most 1; NaN if `p_value` is."""
        return (self.p_value.min() * len(self.names)).clamp_max(1.0).item()

    @property
    def offset(self) -> Tensor:
        """Mean of (rank + 1/2) / (L + 1), minus 1/2 (D,): positive if the guide's draws are too low."""
        return ((self.ranks + 0.5) / (self.num_draws + 1)).double().mean(0) - 0.5

    @property
    def spread(self) -> Tensor:
        """Variance of the ranks around their middle, relative to uniform ranks (D,): above 1 if the guide is too
        narrow.
        """
        middle = self.ranks.double() - self.num_draws / 2
        return middle.square().mean(0) * 12 / (self.num_draws * (self.num_draws + 2))

    def summary(self) -> str:
        """Return a few lines to print."""
        low = self.p_value < 0.05 / len(self.names)
        lines = [
            f"calibration of a guide: {len(self):,} simulated data, {self.num_draws} draws of the guide per datum",
            f"  uniform ranks   p = {self.overall_p_value:.2g} for all {len(self.names)} latent dimensions together",
            f"  spread of ranks {self.spread.mean():8.3f}   1: correct; above: the guide is too narrow; below: too wide",
        ]
        if low.any():
            worst = int(self.statistic.argmax())
            lines.append(
                f"  {int(low.sum())} of {len(self.names)} are not uniform (p < 0.05 / {len(self.names)}); the worst is "
                f"'{self.names[worst]}': spread {self.spread[worst]:.2f}, offset {self.offset[worst]:+.2f}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"Calibration({len(self)} simulated data, {len(self.names)} latent dimensions, {self.num_draws} draws: "
            f"p = {self.overall_p_value:.2g})"
        )


def simulation_based_calibration(
    model: Program,
    guide: Program,
    *args: Any,
    num_draws: int = 99,
    plate: str | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> Calibration:
    """Check a guide by simulation-based calibration: does the latent behind simulated data look like a draw of q(z|x)?

        (x_n, z_n) ~ p(x, z),   z_nl ~ q(. | x_n),   rank_nd = #{ l : z_nl < z_nd, dimension d },   l = 1 ... L

    z_n is an exact draw of p(z | x_n). If q is the posterior, the ranks are uniform on 0 ... L in every dimension. If q
    is too narrow, they crowd at both ends; if too wide, in the middle; if too low or too high, at one end. Uniform
    ranks are necessary, not sufficient: the prior used as a guide has uniform ranks too, as does any q that is right on
    average over the data, and each dimension is tested alone.

    Ties (discrete latents) are ranked at random.

    Args:
        model: Pyro model, as in `log_marginal_likelihood`
        guide: Pyro guide, as in `log_marginal_likelihood`
        *args: arguments of both programs; they give shapes only, because their data are simulated
        num_draws: L; 99 draws give 100 ranks, which divide evenly into 20 bins
        plate: as in `log_marginal_likelihood`
        progress: show a progress bar
        **kwargs: further arguments of both programs

    Returns:
        The ranks, as a `Calibration`.

    Raises:
        ValueError: for programs that `bidirectional_monte_carlo` cannot simulate, sequential plates, subsampled plates,
            and programs without a datum plate.

    References:
        Talts, Betancourt, Simpson, Vehtari & Gelman, Validating Bayesian Inference Algorithms with Simulation-Based
        Calibration (2018).
    """
    num_draws = check_count("num_draws", num_draws)
    with evaluation_of(model, guide, args=args, kwargs=kwargs, evaluation=simulation_based_calibration) as (
        args,
        kwargs,
    ):
        trace, program, args, kwargs = simulate(model, guide, args, kwargs)
        guide = as_guide(guide)
        pair = inspect_pair(program, guide, args, kwargs, plate)
        layout = pair.layout
        if layout.dim is None or layout.subsampled:
            raise ValueError(
                f"calibration needs a datum plate that holds all data at once; found "
                f"{'no datum plate' if layout.plate is None else f'plate {layout.plate!r}, sequential or subsampled'}"
            )
        exact = {
            name: site["value"]
            for name, site in sample_sites(trace)
            if not site["infer"].get("was_observed") and not site["is_observed"]
            # A site that is summed out and that the guide does not draw has no rank.
            if not isinstance(pair.model, SummedOut) or name not in pair.model.names
        }
        with torch.no_grad():
            guide = guide_given(guide, encode_once(guide, args, kwargs))
        below = {name: torch.zeros_like(value, dtype=torch.long) for name, value in exact.items()}
        ties = {name: torch.zeros_like(count) for name, count in below.items()}
        with progress_bar("calibration", num_draws, "draws", progress) as bar:
            for _ in range(num_draws):
                drawn = trace_program(guide, args, kwargs)
                for name, value in exact.items():
                    found = drawn.nodes[name]["value"]
                    below[name] += (found < value).long()
                    ties[name] += (found == value).long()
                bar.update()
    names, ranks = [], []
    for name in exact:
        rank = below[name] + (torch.rand(ties[name].shape, device=ties[name].device) * (ties[name] + 1)).long()
        flat = _by_datum(rank, layout.dim, len(trace.nodes[name]["fn"].event_shape))
        names += [name if flat.shape[1] == 1 else f"{name}[{index}]" for index in range(flat.shape[1])]
        ranks.append(flat.cpu())
    return Calibration(num_draws, names, torch.cat(ranks, 1))


def _by_datum(values: Tensor, dim: int, event_dim: int) -> Tensor:
    """Reshape the values of a site (*batch_shape, *event_shape) to (N, numbers per datum)."""
    return values.movedim(dim - event_dim, 0).flatten(1) if values.ndim > 1 else values.unsqueeze(1)
