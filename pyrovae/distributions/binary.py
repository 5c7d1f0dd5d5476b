"""Images of binary pixels as one distribution, whose density takes one logarithm for up to 64 pixels."""

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import Bernoulli, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["BinaryImages"]

_FACTORS = 64  # largest number in one product: factors lie in [1, 2], and 2^64 does not overflow in float32
_LANES = 16  # float32 numbers in the widest registers of a CPU: products of this many pixels at once are fastest


class BinaryImages(TorchDistribution):
    """Independent Bernoulli pixels by their logits; all pixels of an image are one event.

        log p(x) = - sum_d [ log(1 + exp(-|l_d|)) + max(l_d, 0) - l_d x_d ]

    The first terms are computed as logs of products of up to 64 factors, because a logarithm for each pixel would take
    most of the time. Each factor is rounded by about 6e-8 in float32: at most 1e-5 nats per 100 pixels. The sum of the
    other terms has the same rounding error. The gradient is computed as x - sigmoid(l), not through the products.

    Shapes: logits (*batch, *event) -> batch shape (*batch,), event shape (*event,). Log masses in nats.

    Args:
        logits: l.
        event_dim: Number of trailing dimensions that make up an image.
        validate_args: As for `torch.distributions.Distribution`.

    Raises:
        ValueError: If Pyro validates: logits are NaN, or values are not 0 or 1.

    Example:
        >>> x = torch.tensor([1.0, 0.0, 1.0])
        >>> BinaryImages(torch.tensor([0.0, 1.0, 2.0]), 1).log_prob(x)
        tensor(-2.1333)
    """

    arg_constraints: ClassVar[dict] = {"logits": constraints.real}

    def __init__(self, logits: Tensor, event_dim: int, validate_args: bool | None = None):
        self.logits = logits
        shape, split = logits.shape, logits.ndim - event_dim
        super().__init__(shape[:split], shape[split:], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "BinaryImages":
        logits = self.logits.expand(*batch_shape, *self.event_shape)
        return BinaryImages(logits, len(self.event_shape), validate_args=self.__dict__.get("_validate_args"))

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.boolean, len(self.event_shape))

    @property
    def base_dist(self) -> Bernoulli:
        """The single pixels, under the name that `to_event` gives them."""
        return Bernoulli(logits=self.logits, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 - self.mean)

    def entropy(self) -> Tensor:
        entropy = self.base_dist.entropy()
        return entropy.flatten(-len(self.event_shape)).sum(-1) if self.event_shape else entropy

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.mean.expand(self._extended_shape(sample_shape)).bernoulli()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits, value = torch.broadcast_tensors(self.logits, value)
        if not self.event_shape:
            logits, value = logits.unsqueeze(-1), value.unsqueeze(-1)
        event_dim = max(1, len(self.event_shape))
        return _LogMass.apply(logits.flatten(-event_dim), value.flatten(-event_dim))


class _LogMass(torch.autograd.Function):
    """Log mass (...) of pixels x (..., D) at logits l (..., D)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, value: Tensor) -> Tensor:
        size = _num_factors(logits)
        products = _products(logits, size)
        rest = torch.addcmul(logits.clamp_min(0), logits, value, value=-1)
        # Sums of the same pixels as the products, so that compiled code computes both in one loop.
        return -(products.log() + rest.unflatten(-1, (size, -1)).sum(-2)).sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits, value = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1)
        of_logits = gradient * (value - logits.sigmoid()) if ctx.needs_input_grad[0] else None
        return of_logits, gradient * logits if ctx.needs_input_grad[1] else None


def _products(logits: Tensor, size: int) -> Tensor:
    """Return products of 1 + exp(-|l|) for `size` pixels each, with few passes over memory; two stages are faster, too.

    `compiled.lowering` finds these operations in a recording, and replaces them.
    """
    products = logits.abs().sigmoid_()  # 1 / (1 + exp(-|l|))
    first = next(first for first in range(math.isqrt(size), 0, -1) if size % first == 0)
    for count in (size // first, first):
        if count > 1:
            products = products.unflatten(-1, (count, -1)).prod(-2)
    return products.reciprocal()


def _num_factors(logits: Tensor) -> int:
    """Return how many pixels to multiply, so that no product can overflow.

    The number of products that remain divides the number of pixels, and is a multiple of `_LANES` if possible.
    """
    num_pixels = logits.shape[-1]
    most = min(_FACTORS, int(math.log2(torch.finfo(logits.dtype).max)) - 1)
    sizes = [size for size in range(most, 0, -1) if num_pixels % size == 0]
    return next((size for size in sizes if num_pixels // size % _LANES == 0), sizes[0])
