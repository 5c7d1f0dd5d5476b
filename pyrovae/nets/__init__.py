"""Networks: tensors in, tensors out, no distributions. Any `nn.Module` can replace them."""

from pyrovae.nets.conv import ConvDecoder, ConvEncoder, ResidualDecoder, ResidualEncoder
from pyrovae.nets.inputs import Concatenate, ConcatenateMask, TableEncoder
from pyrovae.nets.mlp import MLP

__all__ = [
    "MLP",
    "Concatenate",
    "ConcatenateMask",
    "ConvDecoder",
    "ConvEncoder",
    "ResidualDecoder",
    "ResidualEncoder",
    "TableEncoder",
]
