"""Tables of mixed columns: each column has a likelihood of its own and gets its share of one network's output."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count
from pyrovae.common.component import Made
from pyrovae.common.networks import takes_context
from pyrovae.data.frames import Table
from pyrovae.distributions import mixed
from pyrovae.likelihoods.base import FILL_IN, Likelihood
from pyrovae.likelihoods.continuous import Scaled
from pyrovae.likelihoods.pixelwise import LearnedScaleNormal

__all__ = ["Categories", "Columns"]


class Categories(Likelihood):
    """Independent elements, each one of K categories without an order, coded 0, 1, ..., K - 1.

        p(x|z) = prod_d softmax(l_d)_(x_d),   l = decoder_net(z) + bias

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log masses in nats per datum.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, num_categories, *data_shape) that returns the logits up to a
            learned bias. None for a column of `Columns`.
        data_shape: Shape of one datum.
        num_categories: K.
        frequencies: Share of each category in the training data, (num_categories,), at which the bias starts; by default
            all categories start equally likely.

    Raises:
        ValueError: Data are no such codes, a shape is wrong, there are fewer than two categories, or the frequencies are
            negative or do not sum to a positive number.
    """

    def __init__(
        self,
        decoder_net: nn.Module,
        data_shape: Sequence[int],
        *,
        num_categories: int,
        frequencies: Tensor | None = None,
    ):
        super().__init__(decoder_net, data_shape)
        self.num_categories = check_count("num_categories", num_categories, 2)
        bias = torch.zeros(self.parameters_shape)
        if frequencies is not None:
            if frequencies.shape != (num_categories,) or not ((frequencies >= 0).all() and frequencies.sum() > 0):
                raise ValueError(
                    f"frequencies must be the shares of {num_categories} categories, found {frequencies.tolist()}"
                )
            shares = (frequencies / frequencies.sum()).clamp(min=1e-3).log()
            bias += shares.to("cpu", bias.dtype).reshape(-1, *(1 for _ in self.data_shape))
        self.bias = nn.Parameter(bias)

    @classmethod
    def num_parameters(cls, num_categories: int = 2) -> int:
        return num_categories

    @property
    def parameters_shape(self) -> torch.Size:
        return torch.Size((self.num_categories, *self.data_shape))

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        logits = (parameters + self.bias).movedim(-1 - len(self.data_shape), -1)
        return mixed.Categories(logits).to_event(len(self.data_shape))

    def check(self, x: Tensor) -> None:
        wrong = ~((x >= 0) & (x < self.num_categories) & (x == x.round()))
        if wrong.any():
            found = x[wrong][0].item()
            remedy = "code them from 0 on (pyrovae.data.table codes the columns of a frame), or set num_categories="
            raise ValueError(
                f"categories are coded 0 to {self.num_categories - 1}, found {found:g}: "
                f"{FILL_IN if math.isnan(found) else remedy}"
            )

    def extra_repr(self) -> str:
        return f"num_categories={self.num_categories}, {super().extra_repr()}"


class Columns(Likelihood):
    """Rows of a table whose columns have different likelihoods, independent given z.

        p(x|z) = prod_c p_c(x_c | z),   column c gets its share of decoder_net(z)

    A column is a likelihood without a network, of data shape 1: `StudentT(None, 1)`, `Poisson(None, 1)`,
    `Categories(None, 1, num_categories=3)`, `Scaled(LearnedScaleNormal(None, 1), loc, scale)` for numbers that are far
    from standardised. `Columns.for_table` chooses one for each column of a `pyrovae.data.Table`.

    Shapes: z (..., latent_dim) -> batch shape (...), event shape (num_columns,). In nats per row: log densities in the
    units of the table for numbers, log masses for counts and categories. `likelihood(z).base_dist.log_prob(x)` gives
    each column's, (..., num_columns).

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, Columns.num_parameters(columns)).
        columns: Likelihood of each column by name, in the order of the data; a mapping, or pairs (name, likelihood).

    Raises:
        TypeError: A column is no likelihood.
        ValueError: There is no column, two have one name, or a column has a network or another data shape than 1. When
            run: a value is outside the support of its column; the message names the column.

    Example:
        >>> columns = {"age": LearnedScaleNormal(None, 1), "colour": Categories(None, 1, num_categories=3)}
        >>> likelihood = Columns(nn.Linear(2, Columns.num_parameters(columns)), columns)
        >>> likelihood(torch.zeros(5, 2)).base_dist.log_prob(torch.tensor([[0.5, 2.0]])).shape
        torch.Size([5, 2])
    """

    columns: Any  # an nn.ModuleList of likelihoods

    def __init__(self, decoder_net: nn.Module, columns: Mapping[str, Likelihood] | Sequence[tuple[str, Likelihood]]):
        pairs = (
            tuple(columns.items()) if isinstance(columns, Mapping) else tuple((name, part) for name, part in columns)
        )
        _check_columns(pairs)
        super().__init__(decoder_net, (len(pairs),))
        # A file holds pairs, not mappings; a mapping in order is the same as its pairs.
        made = self.made_with
        net = made.arguments[0] if made.arguments else made.options["decoder_net"]
        self.__dict__["made_with"] = Made((net, pairs), {})
        self.names = tuple(name for name, _ in pairs)
        self.columns = nn.ModuleList([column for _, column in pairs])

    @classmethod
    def num_parameters(cls, columns: Mapping[str, Likelihood] | Sequence[tuple[str, Likelihood]] = ()) -> int:
        """The width of the network's output: the parameters of all columns."""
        return sum(column.parameters_shape.numel() for column in dict(columns).values())

    @classmethod
    def for_table(cls, table: Table) -> dict[str, Likelihood]:
        """Choose a likelihood for each column of a table: standardised normals for numbers, `Categories` for the rest.

        Change the answer before use: `columns["visits"] = NegativeBinomial(None, 1, data_mean=frame["visits"].mean())`. Give
        counts and positive numbers their mean, because training from a mean of 1 may take long.

        Args:
            table: What `pyrovae.data.table` made of a frame.

        Returns:
            The likelihoods by the names of the columns, in their order.
        """
        found: dict[str, Likelihood] = {}
        none: Any = None  # a column has no network of its own
        for column in table.columns:
            if column.categories is None:
                found[column.name] = Scaled(LearnedScaleNormal(none, (1,), initial_scale=1.0), column.loc, column.scale)
            else:
                found[column.name] = Categories(none, (1,), num_categories=len(column.categories))
        return found

    @property
    def parameters_shape(self) -> torch.Size:
        return torch.Size((sum(self._widths()),))

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return self.at(parameters, None)

    def at(self, parameters: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        parts = []
        for column, share in zip(self.columns, parameters.split(self._widths(), -1), strict=True):
            own = share.reshape(*share.shape[:-1], *column.parameters_shape)
            parts.append(column.at(own, context).base_dist)
        return mixed.Mixed(parts).to_event(1)

    @property
    def takes_context(self) -> bool:
        return takes_context(self.decoder_net) or any(column.takes_context for column in self.columns)

    def filled(self, x: Tensor, observed: Tensor) -> Tensor:
        columns = zip(self.columns, x.split(1, -1), observed.split(1, -1), strict=True)
        return torch.cat([column.filled(values, known) for column, values, known in columns], -1)

    def network_context(self, context: Tensor | None) -> Tensor | None:
        """Return the context without the exposures of the columns, or None if nothing is left."""
        exposures = {getattr(column, "exposure_column", None) for column in self.columns} - {None}
        if context is None or not exposures:
            return context
        kept = [column for column in range(context.shape[-1]) if column not in exposures]
        return context[..., kept] if kept else None

    def check(self, x: Tensor) -> None:
        for name, column, values in zip(self.names, self.columns, x.split(1, -1), strict=True):
            try:
                column.check(values)
            except ValueError as error:
                raise ValueError(f"column {name!r}: {error}") from error

    def extra_repr(self) -> str:
        return f"names={list(self.names)}, {super().extra_repr()}"

    def _widths(self) -> list[int]:
        return [column.parameters_shape.numel() for column in self.columns]


def _check_columns(pairs: Sequence[tuple[str, Likelihood]]) -> None:
    if not pairs:
        raise ValueError("columns must hold a likelihood for each column, found none")
    names = [name for name, _ in pairs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"columns must have different names, found {repeated} more than once: rename them")
    for name, column in pairs:
        if not isinstance(column, Likelihood):
            raise TypeError(f"column {name!r} must be a likelihood, for example StudentT(None, 1); found {column!r}")
        if column.decoder_net is not None or column.data_shape != (1,):
            raise ValueError(
                f"column {name!r} must have no network of its own and data shape 1, found a network "
                f"{type(column.decoder_net).__name__} and data shape {tuple(column.data_shape)}: make it by "
                f"{type(column).__name__}(None, 1, ...)"
            )
