"""Likelihoods p(x|z): an `nn.Module` whose `forward(z)` returns a normalised distribution over x.

To write a likelihood, subclass `Likelihood`, say how many numbers the network must return per datum, and turn these
numbers into a distribution.

How to choose:

- Binary data: `Bernoulli`.
- Grey levels as stored: `DiscretizedLogistic` or `Categorical`. Their log_prob is the log of a probability mass; its
  negative over D ln 2 is in bits per pixel.
- Real-valued data: the others. Their log_prob is the log of a density in the units of x.

The density of grey levels k / 255 is not comparable with a mass, and it grows without bound as a model becomes certain
of a level. Dequantise such data first (`data.dequantize`). Then E log p(x) - D ln 256 is a lower bound of the log mass
(Theis, van den Oord & Bethge 2016).
"""

from pyrovae.likelihoods.base import Likelihood
from pyrovae.likelihoods.levels import Categorical, DiscretizedLogistic
from pyrovae.likelihoods.pixelwise import (
    Bernoulli,
    ContinuousBernoulli,
    HeteroscedasticNormal,
    LearnedScaleNormal,
    Normal,
)

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "HeteroscedasticNormal",
    "LearnedScaleNormal",
    "Likelihood",
    "Normal",
]
