"""What a recording was made for, and whether modules and arguments are still that."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Last", "kinds"]


class Last:
    """The call before: to see, faster than by its signature, that modules and arguments are as they were.

    A parameter is where it was if its slot holds the same tensor with the same memory; its values may have changed.
    """

    def __init__(self, modules: nn.ModuleList, tensors: Sequence[Tensor], run: Callable, values: list[Tensor]):
        self.run, self.values = run, values
        self.modules = list(modules.modules())
        self.seen = self._look(tensors)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        return self._look(tensors) == self.seen

    def _look(self, tensors: Sequence[Tensor]) -> tuple:
        found: list[Any] = []
        for module in self.modules:
            inside = module.__dict__
            found += (inside["training"], *map(id, inside["_modules"].values()))
            for tensor in (*inside["_parameters"].values(), *inside["_buffers"].values()):
                if tensor is not None:
                    found += (
                        id(tensor),
                        tensor.data_ptr(),
                        tensor.shape,
                        tensor.stride(),
                        tensor.dtype,
                        tensor.requires_grad,
                    )
        return found, kinds(tensors)


def kinds(tensors: Sequence[Tensor]) -> tuple:
    """What of tensors, and of torch's settings, a recording is for."""
    kinds = tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors)
    autocast = tuple(
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
    )
    return kinds, torch.get_default_dtype(), autocast
