"""Base class of distributions of single numbers that keep shared parameters small."""

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

__all__ = ["Elementwise"]


class Elementwise(TorchDistribution):
    """Distribution of one number per element of its batch, with parameters that broadcast against each other.

    torch expands all parameters to the batch shape. Here only the first one is expanded: a parameter that all particles
    and data share, such as a dispersion per element, keeps its own shape, so that functions of it alone are computed
    once per element and not once per particle.

    Shapes: batch shape is that of the parameters broadcast together, event shape (). In nats.

    Args:
        validate_args: As for `torch.distributions.Distribution`.
        **parameters: The parameters by name; each becomes an attribute.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, *, validate_args: bool | None = None, **parameters: Tensor):
        self._names = tuple(parameters)
        for name, value in parameters.items():
            setattr(self, name, value)
        shape = torch.broadcast_shapes(*(value.shape for value in parameters.values()))
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Elementwise":
        new = self._get_checked_instance(type(self), _instance)
        new._names = self._names
        for name in self._names:
            setattr(new, name, getattr(self, name))
        setattr(new, self._names[0], getattr(self, self._names[0]).expand(batch_shape))
        TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new
