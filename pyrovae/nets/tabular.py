"""The input of an encoder of tables: standardised numbers, and one unit for each category."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.common.arguments import run_network
from pyrovae.common.component import Component

__all__ = ["TableEncoder"]


class TableEncoder(Component):
    """Encoder of the rows of a table in their own units: numbers are standardised, categories become one-hot.

        output = net((x_c - loc_c) / scale_c for numbers, 1[x_c = k] for each category k)

    Of missing cells, which the mask `observed` names, the net sees 0: the mean of a number, no category.

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
