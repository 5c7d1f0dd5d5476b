"""What a recording must not have frozen: parameters of nobody, and values that Python or numpy handed over."""

import torch
from torch import Tensor

__all__ = ["refuse_captured_parameters", "refuse_frozen_values", "turned"]


def refuse_captured_parameters(graph: torch.fx.GraphModule) -> None:
    """Raise ValueError for a parameter that is not of the modules (pyro.param in a function): it would get no gradient."""
    for node in graph.graph.nodes:
        if node.op == "get_attr" and getattr(getattr(graph, node.target, None), "requires_grad", False):
            raise ValueError("the program uses a parameter that belongs to none of its modules")


def refuse_frozen_values(found: list[Tensor], expected: list[Tensor], other: list[Tensor]) -> None:
    """Raise ValueError for a recording that took for a constant what is none: what went through numpy, or came from a
    generator that is not torch's.

    found, expected: what recording and program give under the same noise, which is not that of the recording, or with data
        and parameters that are not. What is frozen then misses the program by about as much as other noise changes it.
    other: what the program gives under noise that is other still
    """
    for result, eager, elsewhere in zip(found, expected, other, strict=True):
        eps = torch.finfo(eager.dtype).eps if eager.is_floating_point() else 0.0
        result, eager, elsewhere = result.double(), eager.double(), elsewhere.double()
        same = (result == eager) | (result.isnan() & eager.isnan())
        miss = torch.where(same, 0.0, result - eager).nan_to_num().square().mean().sqrt()
        noise = torch.where(elsewhere == eager, 0.0, elsewhere - eager).nan_to_num().square().mean().sqrt()
        size = eager[eager.isfinite()].abs().max() if eager.isfinite().any() else torch.ones(())
        if miss > eps**0.5 * size.clamp_min(1.0) and miss > 0.1 * noise:
            raise ValueError(
                "the recording gives other numbers than the program: some of its values go through numpy, or come from a "
                "generator that is not torch's, and were frozen"
            )


def turned(tensor: Tensor) -> Tensor:
    """Other values of the same kind: numbers in the opposite order, rows of whole numbers (they may be indices).

    They lie in memory as the tensor does, since a compiled recording does not look how; one that is expanded stays as it is.
    """
    if 0 in tensor.stride():
        return tensor
    dims = range(tensor.ndim) if tensor.is_floating_point() else range(min(tensor.ndim, 1))
    other = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return other.copy_(tensor.flip(tuple(dims)))
