"""The multilayer perceptron."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import index

import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_sizes, run_network
from pyrovae.common.component import Component

__all__ = ["MLP", "leading_shape"]


class MLP(Component):
    """Multilayer perceptron: fully connected layers, each hidden one followed by its activation.

        h_0 = x,   h_l = activation(W_l h_(l-1) + b_l),   output = W h_L + b, or h_L without `out_features`

    Shapes: (..., in_features) -> (..., out_features). All leading dimensions are kept, so that a program that runs many
    particles at once can call the network on their latents.

    Data of several dimensions are flattened: (N, ..., *data_shape) with prod(data_shape) = in_features -> (N, ...,
    out_features). If the last dimension is in_features, it alone is the datum: (N, 1, in_features) gives (N, 1,
    out_features). Otherwise the datum takes as many trailing dimensions as fit, including channels of 1 but never the
    first dimension: (N, 1, 28, 28) gives (N, out_features).

    Args:
        in_features: Numbers in a datum.
        hidden_features: Widths of the hidden layers.
        out_features: Width of the output. By default there is no output layer, and the last hidden width is returned:
            the trunk of an encoder, whose head belongs to the guide.
        activation: Makes the activation of a hidden layer.
        layer_norm: Normalise each hidden layer before its activation (Ba 2016).
        gated: Use h_l = (W_l h_(l-1) + b_l) * sigmoid(V_l h_(l-1) + c_l) instead of the activation (Dauphin 2017). The
            layer is normalised before the gate.
        dropout: Fraction of each hidden layer's units that is set to 0 in training (Srivastava 2014).

    Raises:
        ValueError: A width is below 1, there is no layer, or `dropout` is outside [0, 1). When run: the data have
            another size or dtype.

    Example:
        >>> import torch
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
            raise ValueError(f"dropout is a fraction of units and must be in [0, 1), found {dropout}")
        check_sizes("hidden_features", hidden_features, f"[{hidden_features}]")
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
        leading = leading_shape(x, self.in_features)
        if leading is None:
            raise ValueError(
                f"the network {type(self).__name__} does not take input of shape {tuple(x.shape)} and dtype {x.dtype} (its "
                f"in_features are {self.in_features}): pass data with {self.in_features} numbers in the last dimension or in "
                f"the trailing dimensions together, or make the network for these data"
            )
        # Layers get (rows, width) because an activation may work along dimension 1.
        rows = x.reshape(-1, self.in_features)
        output = run_network(self.layers, rows, "pass data of the shape it was made for", type(self).__name__)
        return output.reshape(*leading, output.shape[-1])


def leading_shape(x: Tensor, width: int) -> torch.Size | None:
    """Return the dimensions of x before those of a datum of `width` numbers; None if no trailing dimensions fit.

    If the last dimension is `width`, it alone is the datum. Otherwise the datum takes as many trailing dimensions as
    fit, but never the first.
    """
    if x.shape[-1:] == (width,):
        return x.shape[:-1]
    return next((x.shape[:count] for count in range(1, x.ndim) if math.prod(x.shape[count:]) == width), None)
