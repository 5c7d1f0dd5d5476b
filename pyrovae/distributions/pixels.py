"""Distributions of one pixel that torch and Pyro lack, or that theirs compute inaccurately.

Each is elementwise over its batch; `to_event` turns pixels into images. Densities and gradients are finite for all
finite parameters that do not overflow the dtype, because untrained networks may give extreme ones.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrovae.data.grey_values import are_levels

__all__ = ["CategoricalLevels", "ContinuousBernoulli", "GreyLevels", "LogisticLevels"]

# log(sinh(l/2) / (l/2)) = sum_k B_2k l^2k / (2k (2k)!). Five terms are exact in float64 within the radius.
_SERIES = (1 / 24, -1 / 2880, 1 / 181_440, -1 / 9_676_800, 1 / 479_001_600)
_SERIES_RADIUS = 0.25


class ContinuousBernoulli(TorchDistribution):
    """Continuous Bernoulli distribution on [0, 1], by its logits.

        p(x) = l exp(l x) / (exp(l) - 1),   1 at l = 0

    torch's own version is computed from probabilities. In float32 its density is not normalised for |l| >= 15: it lacks
    0.6 nats per pixel at 30 and 1.8 at 100, which dark pixels reach. Around |l| = 0.004 its gradient has the wrong sign
    or is ten times too large. This version is computed from the logits. For |l| < 1/4, where the closed form would
    subtract two numbers of size 1/l, it uses the series of the normaliser; elsewhere it uses the closed form.

    Shapes: logits (*batch,) -> batch shape (*batch,), event shape (). In nats.

    Args:
        logits: l.
        validate_args: As for `torch.distributions.Distribution`.

    Raises:
        ValueError: If Pyro validates: logits are NaN, or values are outside [0, 1].

    Example:
        >>> ContinuousBernoulli(torch.tensor([-2.0, 0.0, 2.0])).mean
        tensor([0.3435, 0.5000, 0.6565])

    References:
        Loaiza-Ganem & Cunningham, The continuous Bernoulli: fixing a pervasive error in variational autoencoders
            (2019).
    """

    arg_constraints: ClassVar[dict] = {"logits": constraints.real}
    support = constraints.unit_interval

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "ContinuousBernoulli":
        return _expanded(self, batch_shape, _instance, ("logits",), 0)

    @property
    def mean(self) -> Tensor:
        """E[x] = 1 / (1 - exp(-l)) - 1 / l."""
        is_near, near, far = self._near_and_far()
        squared = near * near
        slope = sum(2 * (k + 1) * term * squared**k for k, term in enumerate(_SERIES))
        return torch.where(is_near, 0.5 + near * slope, -1 / torch.expm1(-far) - 1 / far)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        is_near, near, far = self._near_and_far()
        squared = near * near
        series = torch.zeros_like(squared)
        for term in reversed(_SERIES):
            series = (series + term) * squared
        width = far.abs()
        log_norm = torch.where(is_near, near / 2 + series, far.relu() + (-torch.expm1(-width) / width).log())
        return self.logits * value - log_norm

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
            width = self.logits.abs().clamp(min=1e-6)  # for smaller logits the draw is uniform, up to rounding
            # The distance from the end with the higher density.
            distance = (-torch.log1p(uniform * torch.expm1(-width)) / width).clamp(max=1.0)
            return torch.where(self.logits < 0, distance, 1 - distance)

    def _near_and_far(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where to use the series, the logits for the series, and the logits for the closed form.

        Both branches of a `where` get harmless numbers where they are not chosen, because NaN would pass into the
        gradient.
        """
        is_near = self.logits.abs() < _SERIES_RADIUS
        return is_near, torch.where(is_near, self.logits, 0.0), torch.where(is_near, 1.0, self.logits)


class GreyLevels(constraints.Constraint):
    """The grey values k / (num_levels - 1), k = 0 ... num_levels - 1, up to rounding.

    Args:
        num_levels: Number of levels.
    """

    is_discrete = True

    def __init__(self, num_levels: int):
        self.num_levels = num_levels

    def check(self, value: Tensor) -> Tensor:
        return are_levels(value * (self.num_levels - 1), self.num_levels)

    def __repr__(self) -> str:
        return f"GreyLevels({self.num_levels})"


class LogisticLevels(TorchDistribution):
    """Grey levels x = k / (L - 1) as a mixture of logistic distributions, each rounded to the nearest level.

        P(k) = sum_j w_j [ F((k + 1/2 - m_j) / s_j) - F((k - 1/2 - m_j) / s_j) ],   F(t) = 1 / (1 + exp(-t))

    Here m and s are in units of a level. Levels 0 and L - 1 include the tails, so that the masses sum to exactly 1. The
    difference F(b) - F(a) is computed by the identity log F(b) + log F(-a) + log(1 - exp(a - b)), which is accurate for
    differences of any size.

    Shapes: batch shape (*batch,), event shape (). Log masses in nats.

    Args:
        weight_logits: Logits of w (*batch, num_components).
        loc: m (*batch, num_components), in units of x.
        log_scale: log s (*batch, num_components), with s in units of x.
        num_levels: L.
        validate_args: As for `torch.distributions.Distribution`.

    Raises:
        ValueError: If Pyro validates: values are not levels.

    References:
        Salimans, Karpathy, Chen & Kingma, PixelCNN++ (2017).
    """

    arg_constraints: ClassVar[dict] = {
        "weight_logits": constraints.independent(constraints.real, 1),
        "loc": constraints.independent(constraints.real, 1),
        "log_scale": constraints.independent(constraints.real, 1),
    }

    def __init__(
        self,
        weight_logits: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        num_levels: int,
        validate_args: bool | None = None,
    ):
        self.weight_logits, self.loc, self.log_scale = weight_logits, loc, log_scale
        self.num_levels = num_levels
        super().__init__(loc.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "LogisticLevels":
        new = _expanded(self, batch_shape, _instance, ("weight_logits", "loc", "log_scale"), 1)
        new.num_levels = self.num_levels
        return new

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> GreyLevels:
        return GreyLevels(self.num_levels)

    @property
    def mean(self) -> Tensor:
        """E[x] = sum over k = 1 ... L-1 of P(level >= k), over L - 1. It is exact and takes one pass per level."""
        loc, precision = self._in_levels()
        total = torch.zeros_like(loc)
        for level in range(1, self.num_levels):
            total += ((loc - (level - 0.5)) * precision).sigmoid()
        return (total * self.weight_logits.softmax(-1)).sum(-1) / (self.num_levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        loc, precision = self._in_levels()
        level = (value * (self.num_levels - 1)).unsqueeze(-1)
        lowest, highest = level < 0.5, level > self.num_levels - 1.5
        centre, step = (level - loc) * precision, precision / 2
        above = torch.where(highest, torch.inf, centre + step)
        below = torch.where(lowest, -torch.inf, centre - step)
        width = torch.where(lowest | highest, torch.inf, precision)
        log_masses = (-torch.expm1(-width)).log() + F.logsigmoid(above) + F.logsigmoid(-below)
        if loc.shape[-1] == 1:
            return log_masses.squeeze(-1)
        return (self.weight_logits + log_masses).logsumexp(-1) - self.weight_logits.logsumexp(-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            loc, precision = self._in_levels()
            # Of exponential variables with rates w_j, the j-th is the smallest with probability w_j.
            waiting = torch.empty(*shape, loc.shape[-1], dtype=loc.dtype, device=loc.device).exponential_()
            chosen = (self.weight_logits - waiting.log()).argmax(-1, keepdim=True)
            loc, precision = (part.expand_as(waiting).gather(-1, chosen).squeeze(-1) for part in (loc, precision))
            uniform = torch.rand(shape, dtype=loc.dtype, device=loc.device)
            level = loc + (uniform.log() - (-uniform).log1p()) / precision
            return level.round().clamp(0, self.num_levels - 1) / (self.num_levels - 1)

    def _in_levels(self) -> tuple[Tensor, Tensor]:
        """Locations and inverse scales, in units of a level."""
        precision = (-self.log_scale).exp() / (self.num_levels - 1)
        return self.loc * (self.num_levels - 1), precision.clamp(min=torch.finfo(precision.dtype).tiny)


class CategoricalLevels(TorchDistribution):
    """Grey levels x = k / (L - 1) with a probability for each level.

        P(k) = softmax(logits)_k

    Shapes: logits (*batch, L) -> batch shape (*batch,), event shape (). Log masses in nats.

    Args:
        logits: Logits of the levels, up to a constant.
        validate_args: As for `torch.distributions.Distribution`.

    Raises:
        ValueError: If Pyro validates: values are not levels.
    """

    arg_constraints: ClassVar[dict] = {"logits": constraints.independent(constraints.real, 1)}

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "CategoricalLevels":
        return _expanded(self, batch_shape, _instance, ("logits",), 1)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> GreyLevels:
        return GreyLevels(self.num_levels)

    @property
    def num_levels(self) -> int:
        return self.logits.shape[-1]

    @property
    def mean(self) -> Tensor:
        levels = torch.linspace(0, 1, self.num_levels, dtype=self.logits.dtype, device=self.logits.device)
        return self.logits.softmax(-1) @ levels

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        level = (value * (self.num_levels - 1)).round().long().clamp(0, self.num_levels - 1)
        shape = torch.broadcast_shapes(level.shape, self.batch_shape)
        log_masses = self.logits.log_softmax(-1).expand(*shape, self.num_levels)
        return log_masses.gather(-1, level.expand(shape).unsqueeze(-1)).squeeze(-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            waiting = torch.empty(*shape, self.num_levels, dtype=self.logits.dtype, device=self.logits.device)
            chosen = (self.logits - waiting.exponential_().log()).argmax(-1)
            return chosen.to(self.logits.dtype) / (self.num_levels - 1)


def _expanded(distribution: Any, batch_shape: Any, instance: Any, names: tuple[str, ...], num_last: int) -> Any:
    """Expand the named parameters of a distribution, except for their last `num_last` dimensions."""
    new = distribution._get_checked_instance(type(distribution), instance)
    batch_shape = torch.Size(batch_shape)
    for name in names:
        parameter = getattr(distribution, name)
        kept = parameter.shape[parameter.ndim - num_last :]
        setattr(new, name, parameter.expand(*batch_shape, *kept))
    TorchDistribution.__init__(new, batch_shape, validate_args=False)
    new._validate_args = distribution._validate_args
    return new
