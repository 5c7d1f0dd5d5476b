"""Networks of one input made networks of two: the input and a context, or the input and the mask of what is known."""

import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count, checks_values
from pyrovae.common.component import Component
from pyrovae.common.networks import call_network, takes_context
from pyrovae.nets.shapes import leading_shape

__all__ = ["Concatenate", "ConcatenateMask"]


class Concatenate(Component):
    """Network of data (or latents) and a context, joined along the last dimension.

        output = net([x, c]),   c one-hot if `num_classes` is given

    Both are flattened to one row for each datum. Leading dimensions are broadcast, so that latents (S, N, D) of S
    particles go with a context (N, ...).

    Shapes: x (..., N, D) or (N, *data_shape), context (N, ...) of C numbers for each datum -> what `net` makes of (...,
    N, D + C).

    Args:
        net: Any module (..., D + C) -> output.
        num_classes: The context holds labels 0 ... num_classes - 1, which are made one-hot; (N,) or several for each
            datum. By default the context holds numbers as they are.
        in_features: D + C; by default that of the first layer in `net` that has one.

    Raises:
        ValueError: `in_features` is unknown. When run: the sizes do not add up to it, a label is none of the classes,
            or whole numbers are given without `num_classes`.

    Example:
        >>> from pyrovae.nets import MLP
        >>> net = Concatenate(MLP(2 + 10, [8], 784), num_classes=10)
        >>> net(torch.zeros(7, 5, 2), torch.tensor([3, 1, 4, 1, 5])).shape
        torch.Size([7, 5, 784])

    References:
        Sohn, Lee & Yan, Learning Structured Output Representation using Deep Conditional Generative Models (2015).
    """

    def __init__(self, net: nn.Module, *, num_classes: int | None = None, in_features: int | None = None):
        super().__init__()
        self.net = net
        self.num_classes = None if num_classes is None else check_count("num_classes", num_classes, 2)
        if in_features is None:
            # 0 is an `nn.LazyLinear`, which does not know yet
            known = (getattr(module, "in_features", 0) for module in net.modules())
            in_features = next((size for size in known if size), None)
        if in_features is None:
            raise ValueError(
                f"cannot tell how many numbers {type(net).__name__} takes: none of its layers has `in_features`; pass "
                f"in_features="
            )
        self.num_inputs = check_count("in_features", in_features)  # not `in_features`, which is that of the data alone
        self.out_features = getattr(net, "out_features", None)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        rows = self._numbers(context, x.dtype)
        width = self.num_inputs - rows.shape[-1]
        if width < 1:
            raise ValueError(
                f"the network takes {self.num_inputs} numbers, and the context alone has {rows.shape[-1]}: make the "
                f"network for {rows.shape[-1]} more than the data or latents have"
            )
        leading = leading_shape(x, width)
        if leading is None:
            raise ValueError(
                f"the network takes {self.num_inputs} numbers, {rows.shape[-1]} of which are the context's; the remaining "
                f"{width} are not the trailing dimensions of x, of shape {tuple(x.shape)}: make the network for the "
                f"numbers of both"
            )
        if leading and leading[-1] != 1 and rows.shape[0] not in (1, leading[-1]):
            raise ValueError(
                f"x has {leading[-1]} rows (shape {tuple(x.shape)}) and the context has {len(rows)} (shape "
                f"{tuple(context.shape)}): pass one row of context for each datum"
            )
        batch_shape = torch.broadcast_shapes(leading, rows.shape[:-1])
        x = x.reshape(*leading, width).expand(*batch_shape, -1)
        return self.net(torch.cat([x, rows.expand(*batch_shape, -1)], -1))

    def _numbers(self, context: Tensor, dtype: torch.dtype) -> Tensor:
        """The context as numbers (N, C)."""
        if self.num_classes is None:
            if not context.is_floating_point() and context.dtype != torch.bool:
                raise ValueError(
                    f"the context holds whole numbers ({context.dtype}): pass num_classes= if they are labels, or make "
                    f"them {dtype} if they are quantities"
                )
            return context.reshape(context.shape[0], -1).to(dtype)
        classes = torch.arange(self.num_classes, device=context.device)
        one_hot = context.unsqueeze(-1) == classes
        if checks_values() and not one_hot.any(-1).all():
            found = context[~one_hot.any(-1)][0].item()
            raise ValueError(f"labels must be whole numbers from 0 to {self.num_classes - 1}, found {found:g}")
        return one_hot.reshape(context.shape[0], -1).to(dtype)

    def extra_repr(self) -> str:
        classes = "" if self.num_classes is None else f"num_classes={self.num_classes}, "
        return f"{classes}{super().extra_repr()}"


class ConcatenateMask(Component):
    """Encoder network that sees which elements of its data are known: data and mask, joined along the last dimension.

        output = net([x, m]),   m_d = 1 if x_d is known, else 0;   all 1 if no mask is given

    It has the argument `observed`, by which guides know that a network wants the mask. A context, if there is one, is
    passed on to `net` if it takes two arguments: `ConcatenateMask(Concatenate(MLP(2 * D + C, ...)))`.

    Shapes: (N, *data_shape) of D numbers -> what `net` makes of (N, 2 D).

    Args:
        net: Any module (N, 2 D) -> output.

    Example:
        >>> from pyrovae.nets import MLP
        >>> ConcatenateMask(MLP(2 * 6, [8]))(torch.zeros(5, 2, 3), observed=torch.ones(5, 2, 3)).shape
        torch.Size([5, 8])

    References:
        Mattei & Frellsen, MIWAE (2019), for zeros alone. Ma et al., EDDI: Efficient Dynamic Discovery of High-Value
        Information with Partial VAE (2019), for the mask as an input.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.out_features = getattr(net, "out_features", None)

    @property
    def takes_context(self) -> bool:
        """Whether the network inside takes a context."""
        return takes_context(self.net)

    def forward(self, x: Tensor, context: Tensor | None = None, *, observed: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(x) if observed is None else observed.to(x.dtype)
        joined = torch.cat([x.flatten(1), mask.flatten(1)], -1)
        return call_network(self.net, joined, "make it for twice the numbers of a datum (data and mask)", context)
