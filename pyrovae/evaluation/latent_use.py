"""Whether the latents of a pair matter: does a datum's own code reconstruct it better than the codes of other data?"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent

from pyrovae.common.arguments import check_count, map_tensors
from pyrovae.common.reporting import progress_bar
from pyrovae.estimators.reducers import standard_error
from pyrovae.evaluation.opening import Options, opened
from pyrovae.programs.enumeration import SummedOut
from pyrovae.programs.log_densities import log_likelihood_of, log_weights_of
from pyrovae.programs.pair import Pair, choose_rows, encode_once, guide_given
from pyrovae.programs.traces import Layout, Program, run_pair, sample_sites, select_data, trace_program

__all__ = ["LatentUse", "latent_use"]

_ACTIVE = 0.1  # share of a dimension's prior variance that the data must explain; 0.05 nats for normal latents
_ONE_BIT = math.log(2)  # nats of z below which it cannot even tell two kinds of data apart
_SIGMAS = 2.0  # standard errors that a verdict allows for


@dataclass(frozen=True, repr=False)
class LatentUse:
    """What the latents z of a pair tell about N data, in nats per datum; D latent dimensions in all.

    Attributes:
        num_data: N
        num_draws: S, draws of z per datum
        names: names of the D latent dimensions, made from the site: "z[0]", ...
        spread: Var_x( E_q(z|x)[ z_d - E_p[z_d] ] ) / Var_p( z_d ) (D,), the share of the prior's variance that the data
            explain: 1 if codes are spread as the prior is and known exactly, 0 if all data have the code that the prior
            expects. Mean and variance of the prior are those given a context, and given the latents that z_d depends on
            (mean of the variances). An estimate from draws, which may lie slightly below 0
        kl: KL( q(z|x) || p(z) )
        kl_stderr: its standard error over data
        kl_per_dimension: its parts (D,); None if q or p is not a product over dimensions (flows, full covariance)
        reconstruction: E_q(z|x) log p(x|z)
        advantage: how much better a datum's own codes reconstruct it than codes of other data
        advantage_stderr: its standard error as an estimate for new data
        advantage_over_prior: how much better a datum's own codes reconstruct it than draws from the prior
        advantage_over_prior_stderr: its standard error as an estimate for new data
    """

    num_data: int
    num_draws: int
    names: list[str]
    spread: Tensor
    kl: float
    kl_stderr: float
    kl_per_dimension: Tensor | None
    reconstruction: float
    advantage: float
    advantage_stderr: float
    advantage_over_prior: float
    advantage_over_prior_stderr: float

    @property
    def active(self) -> Tensor:
        """Which dimensions are in use, bool (D,): the data explain more than a tenth of the prior's variance.

        For normal latents this is 0.05 nats of information, -log(1 - 0.1) / 2. `pyrovae.active_units` is the published
        rule, an absolute variance of 0.01, under which dimensions count that carry 0.005 nats.
        """
        return self.spread > _ACTIVE

    @property
    def verdict(self) -> str:
        """One sentence: the latents matter, hardly matter, or not at all.

        The information between x and z under q is at most the KL. Below one bit, log 2 = 0.69 nats, z cannot even tell
        two kinds of data apart, so the decoder hardly uses it. The same holds if the advantage is below one bit: with
        the exact posterior it is at least that information. If the advantage is within 2 standard errors of 0 as well,
        the pair is called collapsed. With few data the advantage may be too uncertain for a verdict.
        """
        low, high = (self.advantage + sign * _SIGMAS * self.advantage_stderr for sign in (-1, 1))
        found = f"{self.advantage:.2f} ± {self.advantage_stderr:.2f} nats"
        if math.isnan(self.advantage) or math.isnan(self.kl):
            return "unknown whether the latents matter: a reconstruction or the KL is not finite"
        if self.advantage == math.inf and self.kl >= _ONE_BIT:
            return "the latents matter: some data are impossible with codes of other data"
        if high < _ONE_BIT or self.kl < _ONE_BIT:
            of = f"KL {self.kl:.2f} nats of a reconstruction of {-self.reconstruction:.2f}"
            if low <= 0:
                return f"collapsed: own codes reconstruct a datum not measurably better than codes of other data ({found}); {of}"
            return f"{of}: the decoder hardly uses z (own codes are better than codes of other data by {found})"
        if low < _ONE_BIT:
            return f"unknown whether the latents matter ({found} for {self.num_data:,} data): evaluate more data"
        return f"the latents matter: own codes reconstruct a datum {found} better than codes of other data"

    def summary(self) -> str:
        """Return a few lines to print."""
        return (
            f"use of the latents: {self.num_data:,} data, {self.num_draws} draws of z each; nats per datum\n"
            f"  reconstruction  {self.reconstruction:10.3f}   log p(x|z), z of the datum itself\n"
            f"  KL              {self.kl:10.3f}   ± {self.kl_stderr:.3f}\n"
            f"  own code better {self.advantage:+10.3f}   ± {self.advantage_stderr:.3f} than codes of other data\n"
            f"                  {self.advantage_over_prior:+10.3f}   ± {self.advantage_over_prior_stderr:.3f} than draws from the "
            f"prior\n"
            f"  active units    {int(self.active.sum()):10}   of {len(self.names)}: the data explain more than a tenth of the "
            f"prior's variance\n"
            f"  {self.verdict}"
        )

    def __repr__(self) -> str:
        return (
            f"LatentUse({self.num_data} data: KL {self.kl:.2f}, own code better by {self.advantage:.2f} ± "
            f"{self.advantage_stderr:.2f}, {int(self.active.sum())} of {len(self.names)} units active)"
        )


@torch.no_grad()
def latent_use(
    model: Program,
    guide: Program,
    *args: Any,
    num_draws: int = 10,
    plate: str | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> LatentUse:
    """Measure whether the latents matter: how much better a datum's own codes reconstruct it than those of other data.

        advantage = mean_n E[ log p(x_n|z_n) - log p(x_n|z_m) ],   z_n ~ q(z|x_n),   z_m ~ q(z|x_m),   m != n at random

    It is 0 if the decoder ignores z, or if all data have the same code. With the exact posterior it is the mutual
    information of x and z plus their lautum information, so at least the former. A tight bound, a high effective sample
    size and dimensions that count as active do not show that z matters: all three hold for a pair that has collapsed.

    All latents of a datum are exchanged together, and arguments are not. So in a conditional model p(x|z, y) the
    advantage shows what z adds to y.

    Args:
        model: Pyro program, as in `log_marginal_likelihood`
        guide: Pyro program, as in `log_marginal_likelihood`
        *args: arguments of both programs
        num_draws: S, draws of z per datum, each tried on another datum; 2 or more
        plate: as in `log_marginal_likelihood`
        progress: show a progress bar
        **kwargs: further arguments of both programs

    Returns:
        The advantage, the KL, the active units and a verdict, as a `LatentUse`.

    Raises:
        ValueError: for fewer than 2 data or draws, programs without a datum plate, sequential plates, enumerated sites,
            a model that observes nothing, and everything that `log_marginal_likelihood` refuses.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016), for active units.
        Palomar & Verdu, Lautum Information (2008).
        Lucas, Tucker, Grosse & Norouzi, Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse (2019).
    """
    num_draws = check_count("num_draws", num_draws, least=2)
    with opened(model, guide, args, kwargs, Options(plate=plate), evaluation=latent_use) as pair:
        if isinstance(pair.model, SummedOut) or isinstance(pair.guide, SummedOut):
            raise ValueError(
                "sites marked for enumeration are summed out, so they have no draws whose use could be measured: draw "
                "them in the guide, without a mark"
            )
        num_data = pair.num_data
        if pair.layout.dim is None or num_data < 2:
            where = "in a sequential plate" if pair.layout.sequential else f"(datum plate: {pair.layout.plate})"
            raise ValueError(
                f"codes are exchanged between data, so there must be 2 or more in a vectorised plate; found {num_data} {where}"
            )
        block_size, _ = pair.sizes(1, "auto", "auto")
        sums = _Sums(num_data, num_draws)
        with progress_bar("latent use", num_draws * num_data, "data", progress) as bar:
            for _ in range(num_draws):
                # In another order each time, so that a block holds random data: codes are exchanged inside it.
                order = torch.randperm(num_data)
                for start, stop in pair.blocks(block_size):
                    _add_block(sums, pair, order[start:stop] if pair.split_size else torch.arange(num_data))
                    bar.update(stop - start)
        return sums.result()


def _add_block(sums: "_Sums", pair: Pair, rows: Tensor) -> None:
    """Draw the codes of some data once, and add the densities under their own codes, each other's, and the prior's."""
    args, kwargs, layout = pair.args, pair.kwargs, pair.layout
    if pair.split_size is not None:
        args, kwargs = map_tensors(choose_rows(pair.split_size, rows), (args, kwargs))
        layout = layout._replace(num_data=len(rows))
    guide = guide_given(pair.guide, encode_once(pair.guide, args, kwargs))
    model_trace, guide_trace = run_pair(pair.model, guide, args, kwargs, layout.pinned)
    giver = _another(len(rows))
    exchanged = select_data(guide_trace, layout, giver)
    other_trace = trace_program(pair.model, args, kwargs, layout.pinned, exchanged)
    prior_trace = trace_program(pair.model, args, kwargs, layout.pinned)
    own, other, prior = (_reconstruction(layout, trace) for trace in (model_trace, other_trace, prior_trace))
    sums.own[rows] += own
    sums.other[rows] += other
    sums.given[rows[giver]] += other
    sums.prior[rows] += prior
    sums.kl[rows] += own - log_weights_of(layout, model_trace, guide_trace)[0].double().cpu()
    sums.add_latents(rows, layout, model_trace, guide_trace)


def _reconstruction(layout: Layout, trace: poutine.Trace) -> Tensor:
    log_likelihood = log_likelihood_of(layout, trace)
    if log_likelihood.ndim == 0:
        raise ValueError("the model observes nothing, so there is no reconstruction")
    return log_likelihood[0].double().cpu()


def _another(count: int) -> Tensor:
    """For each of `count` data, the position of another one at random; each position occurs once."""
    order = torch.randperm(count)
    return order.roll(1)[order.argsort()]


class _Sums:
    """Sums over the draws, in float64 on the CPU: per datum (N,) or (N, D), or over data too (D,)."""

    def __init__(self, num_data: int, num_draws: int) -> None:
        self.num_data, self.num_draws = num_data, num_draws
        self.per_datum = torch.zeros(5, num_data, dtype=torch.float64)
        self.own, self.other, self.given, self.prior, self.kl = self.per_datum
        self.names: list[str] = []
        self.codes = self.squared_codes = self.prior_variances = torch.zeros(0)
        self.kl_parts: Tensor | None = torch.zeros(())

    def add_latents(self, rows: Tensor, layout: Layout, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
        """Add the values of all latents (B, D), and the parts of their KL."""
        names, codes, variances, parts = [], [], [], []
        for name, site in sample_sites(model_trace):
            if site["is_observed"]:
                continue
            mean, variance = _moments(site["fn"], site["value"].shape)
            codes.append(_by_datum(site["value"] - mean, site, layout))
            variances.append(_by_datum(variance, site, layout))
            width = codes[-1].shape[1]
            names += [name if width == 1 else f"{name}[{index}]" for index in range(width)]
            densities = [_per_element(of) for of in (guide_trace.nodes[name], site)]
            parts += [None if part is None else _by_datum(part, site, layout) for part in densities]
        own = torch.cat(codes, 1)
        if not self.names:
            self.names = names
            self.codes, self.squared_codes = torch.zeros(2, self.num_data, len(names), dtype=torch.float64)
            self.prior_variances = torch.zeros(len(names), dtype=torch.float64)
        self.codes[rows] += own
        self.squared_codes[rows] += own.square()
        self.prior_variances += torch.cat(variances, 1).sum(0)
        known = [part for part in parts if part is not None]
        if self.kl_parts is None or len(known) < len(parts):
            self.kl_parts = None
        else:
            self.kl_parts = self.kl_parts + (torch.cat(known[::2], 1) - torch.cat(known[1::2], 1)).sum(0)

    def result(self) -> LatentUse:
        num_data, num_draws = self.num_data, self.num_draws
        own, other, given, prior, kl = self.per_datum / num_draws
        # Each datum enters twice, as the one that is reconstructed and as the one whose code is given: both means are
        # part of its influence on the estimate.
        influence = own - other - given
        over_prior = own - prior
        # Draws scatter around the mean of a datum's codes: that share of the variance over data is not x's.
        within = (self.squared_codes - self.codes.square() / num_draws) / (num_draws - 1)
        explained = (self.codes / num_draws).var(0) - within.mean(0) / num_draws
        total = num_data * num_draws
        return LatentUse(
            num_data=num_data,
            num_draws=num_draws,
            names=self.names,
            spread=explained / (self.prior_variances / total),
            kl=kl.mean().item(),
            kl_stderr=standard_error(kl),
            kl_per_dimension=None if self.kl_parts is None else self.kl_parts / total,
            reconstruction=own.mean().item(),
            advantage=(own - other).mean().item(),
            advantage_stderr=standard_error(influence),
            advantage_over_prior=over_prior.mean().item(),
            advantage_over_prior_stderr=standard_error(over_prior),
        )


def _by_datum(values: Tensor, site: dict, layout: Layout) -> Tensor:
    """Values of a site (*batch_shape, *event_shape) as (B, numbers per datum), float64 on the CPU."""
    assert layout.dim is not None
    return values.movedim(layout.dim - len(site["fn"].event_shape), 0).reshape(layout.num_data, -1).double().cpu()


def _moments(distribution: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Mean and variance of each element; unbiased estimates from two draws if they are not known (flows)."""
    try:
        mean, variance = distribution.mean, distribution.variance
        if bool(mean.isfinite().all() and variance.isfinite().all()):
            return mean.expand(shape), variance.expand(shape)
    except (NotImplementedError, AttributeError):
        pass
    first, second = (distribution.sample().expand(shape).double() for _ in range(2))
    return (first + second) / 2, (first - second).square() / 2


def _per_element(site: dict) -> Tensor | None:
    """Log density of each element of a site's value; None if the elements depend on each other, or some are masked."""
    distribution, value = site["fn"], site["value"]
    event_dim = len(distribution.event_shape)
    if isinstance(distribution, Independent) and distribution.reinterpreted_batch_ndims == event_dim:
        distribution = distribution.base_dist
    if distribution.event_shape or not (site["mask"] is None or site["mask"] is True):
        return None
    return distribution.log_prob(value).expand(value.shape)
