"""Images of binary pixels as one distribution, whose density costs a fifth of what a sum over Bernoulli pixels does."""

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import Bernoulli, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["BinaryImages"]

_FACTORS = 64  # at most, in one product: each lies in [1, 2], and 2^64 is far from where float32 ends


class BinaryImages(TorchDistribution):
    """Independent Bernoulli pixels, by their logits, with all pixels of an image as one event.

    log p(x) = sum_d [ l_d x_d - max(l_d, 0) - log(1 + exp(-|l_d|)) ],   the last terms as logs of products of up to 64

    What costs time in a sum over pixels is a logarithm for each; here it is one for each product. A factor is rounded by
    half a unit of 1, which is 6e-8 nats per pixel in float32 and 1e-5 at most per 100 pixels, where the sum of the other
    terms is rounded by as much. The gradient is  x - sigmoid(l),  and not that of the products.

    event_dim: how many of the last dimensions make up an image

    Shapes: logits (*batch, *event) -> batch shape (*batch,), event shape (*event,). Log masses in nats.

    Raises ValueError, where Pyro validates, for logits that are not numbers, or values other than 0 and 1.

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
        """The pixels one by one, as `to_event` calls them."""
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
        factors = 1 + (-logits.abs()).exp()
        products = factors.unflatten(-1, (-1, _num_factors(logits))).prod(-1)
        return (logits * value - logits.clamp_min(0)).sum(-1) - products.log().sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits, value = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1)
        of_logits = gradient * (value - logits.sigmoid()) if ctx.needs_input_grad[0] else None
        return of_logits, gradient * logits if ctx.needs_input_grad[1] else None


def _num_factors(logits: Tensor) -> int:
    """The largest divisor of the number of pixels for which a product of as many factors cannot overflow."""
    num_pixels = logits.shape[-1]
    most = min(_FACTORS, int(math.log2(torch.finfo(logits.dtype).max)) - 1)
    return next(size for size in range(most, 0, -1) if num_pixels % size == 0)
