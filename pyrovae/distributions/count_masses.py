"""Distributions of counts by the logs of their parameters, accurate for large counts and for all finite parameters.

Log masses are computed in float64 and returned in the dtype of the parameters. The terms of a log mass are as large as
the count times its log: in float32, a count of a million would be wrong by a nat.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyrovae.distributions.elementwise import Elementwise

__all__ = ["NegativeBinomial", "Poisson", "ZeroInflatedNegativeBinomial"]

# From here on the sum of 8 terms of Stirling's series is exact to 1e-15.
_STIRLING_FROM = 16.0
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360_360, 1 / 156, -3617 / 122_400)
# Here log(1 + m / r) is m / r to 1e-17. It holds for r that overflow, too.
_POISSON_BELOW = -40.0
_LARGEST_LOG_SIZE = (
    600.0  # from here on nothing distinguishes the distribution from a Poisson; beyond 709 exp overflows
)
# torch.poisson returns 64-bit integers. Above this rate, the rounded normal differs by less than 1e-7 of its spread.
_LARGEST_POISSON = 1e15


class Poisson(Elementwise):
    """Poisson distribution by the log of its rate.

        P(x) = exp(l x - exp(l)) / x!

    Shapes: log_rate (*batch,) -> batch shape (*batch,), event shape (). Log masses in nats.

    Args:
        log_rate: l.
        validate_args: As for `torch.distributions.Distribution`.

    Raises:
        ValueError: If Pyro validates: log rates are NaN, or values are no whole numbers of 0 or more.

    Example:
        >>> Poisson(torch.tensor([0.0, 1.0])).log_prob(torch.tensor([0.0, 3.0]))
        tensor([-1.0000, -1.5100])
    """

    arg_constraints: ClassVar[dict] = {"log_rate": constraints.real}
    support = constraints.nonnegative_integer
    log_rate: Tensor

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None):
        super().__init__(log_rate=log_rate, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.log_rate.exp()

    @property
    def variance(self) -> Tensor:
        return self.mean

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_rate, count = self.log_rate.double(), value.double()
        return (count * log_rate - log_rate.exp() - (count + 1).lgamma()).to(self.log_rate.dtype)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            log_rate = self.log_rate.expand(self._extended_shape(sample_shape))
            return _poisson(log_rate.double().exp()).to(log_rate.dtype)


class NegativeBinomial(Elementwise):
    """Negative binomial distribution by the logs of its mean and inverse dispersion: a Poisson whose rate is gamma.

        P(x) = Gamma(x + r) / (Gamma(r) x!) (r / (r + m))^r (m / (r + m))^x,   variance m + m^2 / r

    For large r it is the Poisson distribution of rate m. There the ratio of gamma functions comes from the difference
    of two Stirling series, because the difference of their logs would lose all digits.

    Shapes: log_mean and log_inverse_dispersion broadcast to the batch shape, event shape (). Log masses in nats.

    Args:
        log_mean: log m.
        log_inverse_dispersion: log r.
        validate_args: As for `torch.distributions.Distribution`.

    Raises:
        ValueError: If Pyro validates: parameters are NaN, or values are no whole numbers of 0 or more.

    Example:
        >>> NegativeBinomial(torch.tensor(1.0), torch.tensor(0.0)).log_prob(torch.tensor(0.0))
        tensor(-1.3133)

    References:
        Lopez, Regier, Cole, Jordan & Yosef, Deep generative modeling for single-cell transcriptomics (2018): by mean
            and inverse dispersion.
    """

    arg_constraints: ClassVar[dict] = {"log_mean": constraints.real, "log_inverse_dispersion": constraints.real}
    support = constraints.nonnegative_integer
    log_mean: Tensor
    log_inverse_dispersion: Tensor

    def __init__(self, log_mean: Tensor, log_inverse_dispersion: Tensor, validate_args: bool | None = None):
        super().__init__(log_mean=log_mean, log_inverse_dispersion=log_inverse_dispersion, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.log_mean.exp().expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        return self.log_mean.exp() + (2 * self.log_mean - self.log_inverse_dispersion).exp()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._log_mass(value.double()).to(self.log_mean.dtype)

    def _log_mass(self, count: Tensor) -> Tensor:
        log_mean, log_size = self.log_mean.double(), self.log_inverse_dispersion.double()
        log_odds = log_mean - log_size  # of m / (r + m)
        # r log(r / (r + m)) + x log(m / (r + m)) = (r + x) logsigmoid(-log_odds) + x log m - x log r
        is_poisson = log_odds < _POISSON_BELOW
        size = torch.where(is_poisson, 0.0, log_size).exp()
        none = torch.where(is_poisson, -log_mean.exp(), size * F.logsigmoid(-log_odds))
        mass = none + count * (F.logsigmoid(-log_odds) + log_mean)
        return mass + _log_rising(count, log_size) - (count + 1).lgamma()

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            log_mean, log_size = (part.double().expand(shape) for part in (self.log_mean, self.log_inverse_dispersion))
            log_size = log_size.clamp(max=_LARGEST_LOG_SIZE)
            size = log_size.exp()
            # Gamma(r) is Gamma(r + 1) U^(1/r), which no small r rounds to 0.
            log_gamma = torch._standard_gamma(size + 1).log() + torch.rand_like(size).log() / size
            return _poisson((log_gamma + log_mean - log_size).exp()).to(self.log_mean.dtype)


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """Negative binomial distribution with more zeros.

        P(x) = g 1[x = 0] + (1 - g) NB(x; m, r),   g = sigmoid(gate_logits)

    Shapes: the parameters broadcast to the batch shape, event shape (). Log masses in nats.

    Args:
        log_mean: log m.
        log_inverse_dispersion: log r.
        gate_logits: Logits of g, the probability of a zero beside those of the negative binomial.
        validate_args: As for `torch.distributions.Distribution`.

    Raises:
        ValueError: If Pyro validates: parameters are NaN, or values are no whole numbers of 0 or more.
    """

    arg_constraints: ClassVar[dict] = {**NegativeBinomial.arg_constraints, "gate_logits": constraints.real}
    gate_logits: Tensor

    def __init__(
        self,
        log_mean: Tensor,
        log_inverse_dispersion: Tensor,
        gate_logits: Tensor,
        validate_args: bool | None = None,
    ):
        Elementwise.__init__(
            self,
            log_mean=log_mean,
            log_inverse_dispersion=log_inverse_dispersion,
            gate_logits=gate_logits,
            validate_args=validate_args,
        )

    @property
    def mean(self) -> Tensor:
        return self.log_mean.exp() * (-self.gate_logits).sigmoid()

    @property
    def variance(self) -> Tensor:
        mean, gate = self.log_mean.exp(), self.gate_logits.sigmoid()
        return (1 - gate) * (mean + mean**2 * (gate + (-self.log_inverse_dispersion).exp()))

    def _log_mass(self, count: Tensor) -> Tensor:
        gate, mass = self.gate_logits.double(), super()._log_mass(count)
        return torch.where(count == 0, torch.logaddexp(gate, mass), mass) + F.logsigmoid(-gate)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            count = super().sample(sample_shape)
            return torch.where(self.gate_logits.sigmoid().expand(count.shape).bernoulli() == 1, 0.0, count)


def _log_rising(count: Tensor, log_size: Tensor) -> Tensor:
    """log Gamma(x + r) - log Gamma(r) - x log r, in float64, with r = exp(log_size)."""
    size = log_size.clamp(max=_LARGEST_LOG_SIZE).exp()
    is_small = size < _STIRLING_FROM
    # Both branches get harmless numbers where they are not chosen, because NaN would pass into the gradient.
    small, large = torch.where(is_small, size, 1.0), torch.where(is_small, _STIRLING_FROM, size)
    # Gamma(r) = Gamma(r + 1) / r, because r may be so small that it is rounded to 0.
    is_zero = count == 0
    exact = (torch.where(is_zero, 1.0, count) + small).lgamma() - (small + 1).lgamma()
    exact = torch.where(is_zero, 0.0, exact + (1 - count) * torch.where(is_small, log_size, 0.0))
    growth = torch.log1p(count / large)
    series = (large - 0.5) * growth + count * (growth - 1) + _stirling(count + large) - _stirling(large)
    return torch.where(is_small, exact, series)


def _stirling(x: Tensor) -> Tensor:
    """log Gamma(x) - (x - 1/2) log x + x - log(2 pi) / 2, for large x."""
    inverse = 1 / x
    squared, total = inverse * inverse, torch.zeros_like(x)
    for term in reversed(_STIRLING):
        total = total * squared + term
    return total * inverse


def _poisson(rate: Tensor) -> Tensor:
    """Draw Poisson counts; rates of any size."""
    counts = torch.poisson(rate.clamp(max=_LARGEST_POISSON))
    normal = (rate + rate.sqrt() * torch.randn_like(rate)).round()
    return torch.where(rate < _LARGEST_POISSON, counts, normal)
