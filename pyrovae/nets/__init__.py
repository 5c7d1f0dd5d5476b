"""Networks: tensors in, tensors out, no distributions. Any `nn.Module` can replace them."""

from pyrovae.nets.concatenate import Concatenate, ConcatenateMask
from pyrovae.nets.conv import ConvDecoder, ConvEncoder, ResidualDecoder, ResidualEncoder
from pyrovae.nets.mlp import MLP
from pyrovae.nets.tabular import TableEncoder

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
