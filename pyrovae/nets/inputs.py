"""Networks that prepare the input of another: they join it with a context or a mask, or encode the row of a table."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count, checks_values, run_network
from pyrovae.common.component import Component
from pyrovae.common.networks import call_network, takes_context
from pyrovae.nets.mlp import leading_shape

__all__ = ["Concatenate", "ConcatenateMask", "TableEncoder"]


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
        ValueError: `in_features` is unknown. When run: the sizes do not add up to it, a label is outside the classes,
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
            # an `nn.LazyLinear` has 0 until its first call
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


class TableEncoder(Component):
    """Encoder of the rows of a table in their own units: numbers are standardised, categories become one-hot.

        output = net((x_c - loc_c) / scale_c for numbers, 1[x_c = k] for each category k)

    For missing cells (those that `observed` does not mark), the net sees 0: the mean of a number, no category.

    Shapes: (..., num_columns) -> (..., out_features).

    Args:
        net: Any module (..., TableEncoder.num_features(num_categories)) -> (..., out_features), with `out_features`.
        loc: What is subtracted from each column, (num_columns,); `loc` of a `pyrovae.data.Table`.
        scale: What each column is divided by; `scale` of a `pyrovae.data.Table`.
        num_categories: Number of categories of each column, 0 for numbers; `num_categories` of a `pyrovae.data.Table`.

    Raises:
        ValueError: The three have different lengths, or a scale is not positive. When run: the data have another number
            of columns.

    Example:
        >>> from pyrovae.nets import MLP
        >>> encoder = TableEncoder(MLP(4, [8]), [30.0, 0.0], [10.0, 1.0], [0, 3])
        >>> encoder(torch.tensor([[41.0, 2.0]])).shape
        torch.Size([1, 8])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, loc: Sequence[float], scale: Sequence[float], num_categories: Sequence[int]):
        super().__init__()
        if not len(loc) == len(scale) == len(num_categories):
            raise ValueError(
                f"loc, scale and num_categories must have one entry per column, found {len(loc)}, {len(scale)} and "
                f"{len(num_categories)}"
            )
        if not min(scale) > 0:
            raise ValueError(f"scale must be positive, found {min(scale)}: leave out columns that never vary")
        self.net = net
        self.num_categories = tuple(num_categories)
        self.register_buffer("loc", torch.tensor(list(loc)))
        self.register_buffer("scale", torch.tensor(list(scale)))

    @property
    def out_features(self) -> Any:
        return self.net.out_features

    @classmethod
    def num_features(cls, num_categories: Sequence[int]) -> int:
        """The width of the input of `net`."""
        return sum(max(1, number) for number in num_categories)

    def forward(self, x: Tensor, *, observed: Tensor | None = None) -> Tensor:
        known = None if observed is None else observed.reshape(x.shape).bool()
        if x.shape[-1:] != self.loc.shape and x.ndim > 1:
            x, known = x.flatten(1), None if known is None else known.flatten(1)
        if x.shape[-1:] != self.loc.shape:
            raise ValueError(f"this encoder is for rows of {len(self.loc)} columns, found shape {tuple(x.shape)}")
        numbers, codes = ((x - self.loc) / self.scale).split(1, -1), x.split(1, -1)
        features = [
            (codes[place] == torch.arange(size, device=x.device)).to(x.dtype) if size else numbers[place]
            for place, size in enumerate(self.num_categories)
        ]
        if known is not None:
            features = [torch.where(cell, part, 0.0) for cell, part in zip(known.split(1, -1), features, strict=True)]
        return run_network(self.net, torch.cat(features, -1), "make it for num_features(num_categories) numbers")
