"""Densities of real numbers that torch lacks, or that theirs compute inaccurately or without finite gradients."""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrovae.distributions.elementwise import Elementwise

__all__ = ["Affine", "LogNormal", "StudentT"]


class StudentT(Elementwise):
    """Student's t distribution.

        p(x) = Gamma((v + 1) / 2) / (Gamma(v / 2) sqrt(v pi) s) (1 + ((x - m) / s)^2 / v)^(-(v + 1) / 2)

    torch computes the gamma functions in the dtype of the parameters. In float32 their difference is wrong by 0.01 nats
    per element at v = 10,000, which a learned v reaches on data with normal tails.

    Shapes: the parameters broadcast to the batch shape, event shape (). In nats.

    Args:
        loc: m.
        scale: s.
        df: v, the degrees of freedom. The mean is NaN for v <= 1, the variance infinite for v <= 2.
        validate_args: As for `torch.distributions.Distribution`.

    Raises:
        ValueError: If Pyro validates: parameters are NaN, or scale or df is not positive.

    Example:
        >>> StudentT(torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1.0)).log_prob(torch.tensor(0.0)).exp()
        tensor(0.3183)
    """

    arg_constraints: ClassVar[dict] = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "df": constraints.positive,
    }
    support = constraints.real
    loc: Tensor
    scale: Tensor
    df: Tensor

    def __init__(self, loc: Tensor, scale: Tensor, df: Tensor, validate_args: bool | None = None):
        super().__init__(loc=loc, scale=scale, df=df, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return torch.where(self.df > 1, self.loc, math.nan).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        variance = torch.where(self.df > 2, self.scale**2 * self.df / (self.df - 2), math.inf)
        return torch.where(self.df > 1, variance, math.nan).expand(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        df = self.df.double()
        log_norm = ((df + 1) / 2).lgamma() - (df / 2).lgamma() - (df * math.pi).log() / 2
        squared = ((value - self.loc) / self.scale) ** 2
        return log_norm.to(self.loc.dtype) - self.scale.log() - (self.df + 1) / 2 * torch.log1p(squared / self.df)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            normal = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
            half = (self.df / 2).expand(shape)
            return self.loc + self.scale * normal * (torch._standard_gamma(half) / half).rsqrt()


class LogNormal(Elementwise):
    """Log-normal distribution: the log of x is normal.

        p(x) = N(log x; m, s^2) / x

    Its gradients are finite at x = 0, which is outside the support and stands for a missing value: a mask can then leave
    it out. (torch's are infinite, and infinity times the 0 of a mask is NaN.)

    Shapes: the parameters broadcast to the batch shape, event shape (). In nats.

    Args:
        loc: m.
        scale: s.
        validate_args: As for `torch.distributions.Distribution`.

    Raises:
        ValueError: If Pyro validates: parameters are NaN, scale is not positive, or values are not positive.

    Example:
        >>> LogNormal(torch.tensor(0.0), torch.tensor(1.0)).log_prob(torch.tensor(1.0))
        tensor(-0.9189)
    """

    arg_constraints: ClassVar[dict] = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.positive
    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None):
        super().__init__(loc=loc, scale=scale, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return (self.loc + self.scale**2 / 2).exp()

    @property
    def variance(self) -> Tensor:
        return torch.expm1(self.scale**2) * self.mean**2

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_value = value.clamp(min=torch.finfo(value.dtype).tiny).log()
        squared = ((log_value - self.loc) / self.scale) ** 2
        return -squared / 2 - self.scale.log() - math.log(2 * math.pi) / 2 - log_value

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            normal = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
            return (self.loc + self.scale * normal).exp()


class Affine(dist.TorchDistribution):
    """Distribution of x = loc + scale y, y being of a given distribution of single numbers.

        log p(x) = log p_y((x - loc) / scale) - log scale

    torch's `TransformedDistribution` has no mean.

    Shapes: those of the distribution of y; event shape ().

    Args:
        base: The density of y; batch shape (*batch,), event shape ().
        loc: What is added, broadcastable to (*batch,).
        scale: What is multiplied, positive, broadcastable to (*batch,).
        validate_args: As for `torch.distributions.Distribution`.

    Raises:
        ValueError: If Pyro validates: scale is not positive, or values are outside the support.
    """

    arg_constraints: ClassVar[dict] = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, base: dist.TorchDistribution, loc: Tensor, scale: Tensor, validate_args: bool | None = None):
        self.base, self.loc, self.scale = base, loc, scale
        super().__init__(base.batch_shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Affine":
        return Affine(self.base.expand(batch_shape), self.loc, self.scale, self.__dict__.get("_validate_args"))

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.real if self.base.support is constraints.real else _Scaled(self)

    @property
    def mean(self) -> Tensor:
        return self.loc + self.scale * self.base.mean

    @property
    def variance(self) -> Tensor:
        return self.scale**2 * self.base.variance

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.base.log_prob((value - self.loc) / self.scale) - self.scale.log()

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.loc + self.scale * self.base.sample(sample_shape)


class _Scaled(constraints.Constraint):
    """The values x for which (x - loc) / scale is in the support of the base distribution."""

    def __init__(self, affine: Affine):
        self.affine = affine

    def check(self, value: Tensor) -> Tensor:
        return self.affine.base.support.check((value - self.affine.loc) / self.affine.scale)
