"""The aggregate posterior q(z), the average of q(z|x) over data, and the parts of the ELBO's KL term."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae.common.arguments import check_count
from pyrovae.evaluation.sum_over_data import ROWS, draw_codes, marginals_of, sum_over_data
from pyrovae.guides.base import Guide, check_guide
from pyrovae.models.generative import LatentVariableModel
from pyrovae.models.guide_inputs import batches, inputs_of
from pyrovae.programs.reach import evaluation_mode

__all__ = ["AggregatePosterior", "aggregate_posterior"]

_NEAR = 0.1  # nats below log N: from there on, the mutual information counts as saturated


@dataclass(frozen=True, repr=False)
class AggregatePosterior:
    """How much the codes of N data tell about the data, in nats, with q(z) = 1/N sum_n q(z|x_n).

    Each estimate is unbiased for these N data, with the Monte Carlo standard error `..._stderr` (NaN with one draw per
    datum). `aggregate_posterior` says how they differ from those of the data's distribution.

    Attributes:
        num_data: N
        num_draws: S, draws of q(z|x_n) per datum
        rate: mean KL(q(z|x) || p(z)), the KL term of the ELBO
        mutual_information: I(x; z), at most log N
        mutual_information_upper: the same, but q(z) leaves out the datum itself; an upper bound on average
        marginal_kl: KL(q(z) || p(z))
        total_correlation: KL(q(z) || prod_d q(z_d)); None if the guide has no marginals in closed form
        dimension_kl: KL(q(z_d) || p(z_d)) for each dimension (D,); None if guide or prior has no marginals in closed form
    """

    num_data: int
    num_draws: int
    rate: float
    rate_stderr: float
    mutual_information: float
    mutual_information_stderr: float
    mutual_information_upper: float
    mutual_information_upper_stderr: float
    marginal_kl: float
    marginal_kl_stderr: float
    total_correlation: float | None = None
    total_correlation_stderr: float | None = None
    dimension_kl: Tensor | None = None
    dimension_kl_stderr: Tensor | None = None

    @property
    def most(self) -> float:
        """log N, the largest mutual information that N data can show."""
        return math.log(self.num_data)

    @property
    def saturated(self) -> bool:
        """Whether the mutual information is within 0.1 nats of log N: it then says only that I is about log N or more."""
        return self.mutual_information > self.most - _NEAR

    def summary(self) -> str:
        """Return a few lines to print."""

        def line(name: str, value: float, stderr: float, meaning: str) -> str:
            return f"  {name:<20}{value:9.3f} ± {stderr:.3f}   {meaning}"

        upper = f"at most log N = {self.most:.3f}; {self.mutual_information_upper:.3f} without the datum's own part"
        lines = [
            f"aggregate posterior of {self.num_data:,} data, {self.num_draws} draws each; nats, ± Monte Carlo",
            line("rate", self.rate, self.rate_stderr, "mean KL(q(z|x) || p(z)), the sum of the next two"),
            line("mutual information", self.mutual_information, self.mutual_information_stderr, upper),
            line("KL(q(z) || p(z))", self.marginal_kl, self.marginal_kl_stderr, "how far the prior is from the codes"),
        ]
        if self.total_correlation is not None and self.total_correlation_stderr is not None:
            meaning = "dependence among latent dimensions"
            lines.append(line("total correlation", self.total_correlation, self.total_correlation_stderr, meaning))
        if self.dimension_kl is not None and self.dimension_kl_stderr is not None:
            error = self.dimension_kl_stderr.square().sum().sqrt().item()
            meaning = f"sum of KL(q(z_d) || p(z_d)) over {len(self.dimension_kl)} dimensions; its error if independent"
            lines.append(line("dimension-wise KL", self.dimension_kl.sum().item(), error, meaning))
        if self.saturated:
            lines.append(
                f"  saturated: the codes hardly overlap, and {self.num_data:,} data cannot show more than log N nats. So the "
                f"mutual information is >= this, KL(q(z) || p(z)) is <= this, and the total correlation is that of "
                f"{self.num_data:,} separate peaks: use more data"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"AggregatePosterior({self.num_data} data: rate {self.rate:.3f} = mutual information "
            f"{self.mutual_information:.3f} + KL(q(z) || p(z)) {self.marginal_kl:.3f})"
        )


@torch.no_grad()
def aggregate_posterior(
    model: LatentVariableModel,
    guide: Guide,
    x: Tensor,
    *,
    observed: Tensor | None = None,
    num_draws: int = 2,
    total_correlation: bool | Literal["auto"] = "auto",
    progress: bool = False,
) -> AggregatePosterior:
    """Split the KL term of the ELBO into mutual information and the distance of the aggregate posterior from the prior.

        mean_n KL(q(z|x_n) || p(z)) = I(x; z) + KL(q(z) || p(z)),   q(z) = 1/N sum_n q(z|x_n)
        I(x; z) = mean_n E_q(z|x_n)[ log q(z|x_n) - log q(z) ]
        KL(q(z) || p(z)) = TC + sum_d KL(q(z_d) || p(z_d)),   TC = KL(q(z) || prod_d q(z_d)),   if p(z) = prod_d p(z_d)

    q(z) is summed over all N data at every draw: S N^2 densities, in blocks, so that memory does not grow with N^2.
    (Estimates from minibatches are biased.) Each estimate is unbiased for these N data. As an estimate for the
    distribution that the data came from, averaged over data sets of size N,

    - I is too low: q(z) contains the datum's own term, so q(z) >= q(z|x_n) / N and I <= log N. If the codes of the data
      do not overlap, I is log N, however large the true value is: see `saturated`.
    - `mutual_information_upper`, with q(z) = 1/(N - 1) sum_(m != n) q(z|x_m), is too high, so the true value lies
      between the two. It is far too high if the codes do not overlap.
    - KL(q(z) || p(z)) is too high by as much as I is too low. KL(q(z_d) || p(z_d)) is too high too, but by far less.
    - TC is not a bound. If I is saturated, q(z) has N separate peaks, and TC is usually too high.

    TC takes marginals q(z_d|x_n) in closed form: those of guides whose distribution is diagonal (`MeanFieldNormal`, or
    one of your own that ends with .to_event(1)) or normal (`FullRankNormal`, `LowRankNormal`), `Refined` ones too.

    Args:
        model: model of the pair, for p(z)
        guide: any guide of this library, hierarchical ones included; an autoregressive flow takes D passes for the density
            at each draw of another datum
        x: data (N, *data_shape); the time grows with N^2, so take a few thousand, for a flow a few hundred
        observed: mask of what is known of x, shaped like x
        num_draws: S, draws of q(z|x_n) per datum; one gives no standard error
        total_correlation: whether to compute TC and the dimension-wise KL; "auto": if the guide has marginals
        progress: show a progress bar

    Returns:
        The estimates, as an `AggregatePosterior`.

    Raises:
        ValueError: for fewer than 2 data, a guide that overrides `forward` or `posterior`, a guide with other latents than
            the model's, and, with `total_correlation=True`, a guide without marginals.
        TypeError: if `guide` is not a `Guide` or `model` not a model of this library.

    References:
        Hoffman & Johnson, ELBO Surgery: yet another way to carve up the variational evidence lower bound (2016).
        Chen, Li, Grosse & Duvenaud, Isolating Sources of Disentanglement in Variational Autoencoders (2018), for TC.
        Poole, Ozair, van den Oord, Alemi & Tucker, On Variational Bounds of Mutual Information (2019), for both bounds.
    """
    check_guide(guide)
    if not isinstance(model, LatentVariableModel):
        raise TypeError(
            f"model must be a pyrovae.GenerativeModel or HierarchicalModel, whose p(z) is used; found "
            f"{type(model).__name__}"
        )
    if not guide.encodes_once:
        raise ValueError(
            f"{type(guide).__name__} overrides forward or posterior, so its density is unknown at other draws than its "
            f"own: override `distribution` or `encode` instead"
        )
    num_draws = check_count("num_draws", num_draws)
    data = inputs_of(guide, x, observed=observed)
    num_data = len(data.x)
    if num_data < 2:
        raise ValueError(f"an average of q(z|x) over data needs 2 data or more, found {num_data}")
    if total_correlation not in (True, False, "auto"):
        raise ValueError(f"total_correlation must be True, False or 'auto', found {total_correlation!r}")
    with evaluation_mode(model, guide) as device:
        parameters = torch.cat([guide.encode(*rows.args, **rows.kwargs) for rows in batches(data, ROWS, device)])
        drawn = draw_codes(model, guide, parameters, num_draws)
        marginals = len(drawn.values) == 1 and marginals_of(guide.distribution(parameters[:1])) is not None
        if total_correlation is True and not marginals:
            raise ValueError(
                f"the total correlation needs marginals q(z_d|x), and {type(guide).__name__} has none in closed form: use "
                f"a diagonal or normal guide, or total_correlation=False for the other estimates"
            )
        marginals = marginals and total_correlation is not False
        others, of_dimensions = sum_over_data(guide, parameters, drawn, marginals, progress)
        log_q = torch.logaddexp(others, drawn.log_own) - math.log(num_data)
        terms = {
            "rate": drawn.log_own - drawn.log_prior,
            "mutual_information": drawn.log_own - log_q,
            "mutual_information_upper": drawn.log_own - (others - math.log(num_data - 1)),
            "marginal_kl": log_q - drawn.log_prior,
        }
        if of_dimensions is not None:
            terms["total_correlation"] = log_q - of_dimensions.sum(-1)
            if (prior := marginals_of(model.prior())) is not None:
                (z,) = drawn.values.values()
                terms["dimension_kl"] = of_dimensions - prior.log_prob(z).double()
    found: dict[str, Any] = {}
    for name, term in terms.items():
        for suffix, value in zip(("", "_stderr"), _mean(term), strict=True):
            found[name + suffix] = value.cpu() if value.ndim else value.item()
    return AggregatePosterior(num_data, num_draws, **found)


def _mean(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of terms (S, N, ...) over draws and data, and its standard error over draws for these data."""
    num_draws, num_data = terms.shape[:2]
    mean = terms.mean((0, 1))
    if num_draws == 1:
        return mean, torch.full_like(mean, math.nan)
    return mean, (terms.var(0).sum(0) / num_draws).sqrt() / num_data
