"""The multilayer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from operator import index

import torch
from torch import Tensor, nn

from pyrovae.common.arguments import run_network
from pyrovae.common.component import Component

__all__ = ["MLP"]


class MLP(Component):
    """Multilayer perceptron: fully connected layers, each hidden one followed by its activation.

    h_0 = x,   h_l = activation(W_l h_(l-1) + b_l),   output = W h_L + b, or h_L itself without `out_features`

    Shapes: (..., in_features) -> (..., out_features): every leading dimension is kept, so that a program that is run for many
    particles at once can call it on their latents. Data of several dimensions are flattened: (N, ..., *data_shape) with
    prod(data_shape) = in_features -> (N, ..., out_features). If the last dimension is in_features, it alone is taken as the
    datum, so that (N, 1, in_features) gives (N, 1, out_features). If not, as many trailing dimensions as fit are taken,
    channels of 1 included, but never the first: (N, 1, 28, 28) gives (N, out_features). `out_features` defaults to the last
    hidden width: an encoder's trunk, whose head is the guide's.

    layer_norm: normalise each hidden layer before its activation (Ba 2016)
    gated: h_l = (W_l h_(l-1) + b_l) * sigmoid(V_l h_(l-1) + c_l) in place of the activation (Dauphin 2017); normalised before
        the gate
    dropout: share of each hidden layer's units set to 0 in training (Srivastava 2014)

    Raises ValueError for widths below 1, no layer at all, or a share that is not in [0, 1); when run, for data of another size
    or dtype.

    >>> MLP(784, [500, 500]).out_features
    500
    >>> MLP(50, [500], 784)(torch.zeros(3, 50)).shape
    torch.Size([3, 784])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int | None = None,
        *,
        activation: Callable[[], nn.Module] = nn.SiLU,
        layer_norm: bool = False,
        gated: bool = False,
        dropout: float = 0.0,
    ):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a share of units, 0 <= dropout < 1, found {dropout}")
        widths = [index(width) for width in (in_features, *hidden_features)]
        layers: list[nn.Module] = [nn.Flatten()]
        for width, next_width in pairwise(widths):
            num_outputs = 2 * next_width if gated else next_width
            layers += [nn.Linear(width, num_outputs)]
            layers += [nn.LayerNorm(num_outputs)] if layer_norm else []
            layers += [nn.GLU() if gated else activation()]
            layers += [nn.Dropout(dropout)] if dropout else []
        if out_features is not None:
            widths.append(index(out_features))
            layers += [nn.Linear(widths[-2], widths[-1])]
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"an MLP needs at least one layer and widths of 1 or more, found in_features={in_features}, "
                f"hidden_features={list(hidden_features)}, out_features={out_features}"
            )
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.in_features, self.out_features = widths[0], widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        leading = self._leading(x)
        # Layers get rows, (rows, width): an activation may work along dimension 1.
        rows = x.reshape(-1, self.in_features)
        output = run_network(self.layers, rows, "give it data as it was made for", type(self).__name__)
        return output.reshape(*leading, output.shape[-1])

    def _leading(self, x: Tensor) -> torch.Size:
        """The dimensions of x before those of a datum."""
        if x.shape[-1:] == (self.in_features,):
            return x.shape[:-1]
        for num_leading in range(1, x.ndim):
            if prod(x.shape[num_leading:]) == self.in_features:
                return x.shape[:num_leading]
        raise ValueError(
            f"the network {type(self).__name__} does not take what it is given, of shape {tuple(x.shape)} and {x.dtype} (its "
            f"in_features are {self.in_features}): give it data as it was made for, {self.in_features} numbers in the last "
            f"dimension or in the trailing ones together, or make it for these"
        )
