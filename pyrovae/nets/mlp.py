"""The multilayer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from pyrovae.programs.specification import Part

__all__ = ["MLP"]


class MLP(Part):
    """Multilayer perceptron: fully connected layers, each hidden one followed by its activation.

    h_0 = x,   h_l = activation(W_l h_(l-1) + b_l),   output = W h_L + b, or h_L itself without `out_features`

    Shapes: (N, *any) with prod(any) = in_features -> (N, out_features). `out_features` defaults to the last hidden
    width: an encoder's trunk, whose head is the guide's.

    layer_norm: normalise each hidden layer before its activation (Ba 2016)
    gated: h_l = (W_l h_(l-1) + b_l) * sigmoid(V_l h_(l-1) + c_l) in place of the activation (Dauphin 2017); normalised before
        the gate
    dropout: share of each hidden layer's units set to 0 in training (Srivastava 2014)

    Raises ValueError for widths below 1, no layer at all, or a share that is not in [0, 1).

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
            raise ValueError(f"dropout is a share of units, 0 <= dropout < 1, found {dropout}")
        widths = [in_features, *hidden_features]
        layers: list[nn.Module] = [nn.Flatten()]
        for width, next_width in pairwise(widths):
            num_outputs = 2 * next_width if gated else next_width
            layers += [nn.Linear(width, num_outputs)]
            layers += [nn.LayerNorm(num_outputs)] if layer_norm else []
            layers += [nn.GLU() if gated else activation()]
            layers += [nn.Dropout(dropout)] if dropout else []
        if out_features is not None:
            layers += [nn.Linear(widths[-1], out_features)]
            widths.append(out_features)
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"an MLP needs at least one layer and widths of 1 or more, found in_features={in_features}, "
                f"hidden_features={list(hidden_features)}, out_features={out_features}"
            )
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.in_features, self.out_features = in_features, widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
