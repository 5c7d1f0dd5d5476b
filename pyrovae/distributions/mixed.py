"""Categories coded by whole numbers, and rows whose elements have different distributions."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent, constraints

__all__ = ["Categories", "Mixed", "means_of"]


class Categories(dist.TorchDistribution):
    """Categories 0, 1, ..., K - 1, held as floating-point numbers.

        P(k) = softmax(logits)_k

    Shapes: logits (*batch, K) -> batch shape (*batch,), event shape (). Log masses in nats.

    Args:
        logits: Logits of the categories, up to a constant.
        validate_args: As for `torch.distributions.Distribution`.

    Raises:
        ValueError: If Pyro validates: logits are NaN, or values are not such codes.

    Example:
        >>> Categories(torch.tensor([0.0, 0.0])).log_prob(torch.tensor(1.0))
        tensor(-0.6931)
    """

    arg_constraints: ClassVar[dict] = {"logits": constraints.independent(constraints.real, 1)}

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Categories":
        logits = self.logits.expand(*batch_shape, self.num_categories)
        return Categories(logits, self.__dict__.get("_validate_args"))

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.num_categories - 1)

    @property
    def num_categories(self) -> int:
        return self.logits.shape[-1]

    @property
    def mean(self) -> Tensor:
        """Mean of the codes: the probability of 1 if there are two categories, meaningless if there are more."""
        codes = torch.arange(self.num_categories, dtype=self.logits.dtype, device=self.logits.device)
        return self.logits.softmax(-1) @ codes

    @property
    def mode(self) -> Tensor:
        return self.logits.argmax(-1).to(self.logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        code = value.round().long().clamp(0, self.num_categories - 1)
        shape = torch.broadcast_shapes(code.shape, self.batch_shape)
        log_masses = self.logits.log_softmax(-1).expand(*shape, self.num_categories)
        return log_masses.gather(-1, code.expand(shape).unsqueeze(-1)).squeeze(-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            waiting = torch.empty(*shape, self.num_categories, dtype=self.logits.dtype, device=self.logits.device)
            # Of exponential variables with rates p_k, the k-th is the smallest with probability p_k.
            return (self.logits - waiting.exponential_().log()).argmax(-1).to(self.logits.dtype)


class Mixed(dist.TorchDistribution):
    """Elements of a row, each with a distribution of its own; independent.

        log p(x)_c = log p_c(x_c)

    Like a `Normal` of batch shape (*batch, C), it is elementwise: `to_event(1)` makes a row one datum.

    Shapes: parts of batch shape (*batch, 1) and event shape () -> batch shape (*batch, C), event shape (). In nats.

    Args:
        parts: p_c, C distributions of single numbers.
        validate_args: As for `torch.distributions.Distribution`.

    Raises:
        ValueError: If Pyro validates: a value is outside the support of its part.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, parts: Sequence[dist.TorchDistribution], validate_args: bool | None = None):
        self.parts = tuple(parts)
        shape = torch.broadcast_shapes(*(part.batch_shape for part in self.parts))
        super().__init__((*shape[:-1], len(self.parts)), validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Mixed":
        rows = torch.Size(batch_shape)[:-1]
        parts = [part.expand((*rows, 1)) for part in self.parts]
        return Mixed(parts, self.__dict__.get("_validate_args"))

    @constraints.dependent_property(event_dim=0)
    def support(self) -> constraints.Constraint:
        return _Supports(self.parts)

    @property
    def mean(self) -> Tensor:
        return self._joined(part.mean for part in self.parts)

    @property
    def variance(self) -> Tensor:
        return self._joined(part.variance for part in self.parts)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        columns = value.split(1, -1)
        return torch.cat(
            torch.broadcast_tensors(*(part.log_prob(column) for part, column in zip(self.parts, columns, strict=True))),
            -1,
        )

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self._joined(part.sample(sample_shape) for part in self.parts)

    def _joined(self, columns: Any) -> Tensor:
        return torch.cat(torch.broadcast_tensors(*columns), -1)


class _Supports(constraints.Constraint):
    """The support of each element of a row."""

    def __init__(self, parts: Sequence[dist.TorchDistribution]):
        self.parts = parts
        self.is_discrete = all(part.support.is_discrete for part in parts)

    def check(self, value: Tensor) -> Tensor:
        columns = zip(self.parts, value.split(1, -1), strict=True)
        return torch.cat([part.support.check(column) for part, column in columns], -1)


def means_of(distribution: dist.TorchDistribution) -> Tensor:
    """Return the mean of each element; for three or more categories, whose codes have no mean, the most probable code."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    if isinstance(distribution, Mixed):
        return distribution._joined(map(means_of, distribution.parts))
    if isinstance(distribution, Categories) and distribution.num_categories > 2:
        return distribution.mode
    return distribution.mean
