"""Likelihoods p(x|z). A likelihood is an `nn.Module` whose `forward(z)` gives a normalised distribution over x.

A new likelihood is one class: subclass `Likelihood`, say how many numbers the network must give per datum, turn those
numbers into a distribution.

Which one: binary data `Bernoulli`; grey levels as they are stored `DiscretizedLogistic` or `Categorical`, whose log_prob
is the log of a probability mass (minus it, over D ln 2, are bits per pixel); real-valued data the rest, whose log_prob is
the log of a density in the units of x. A density of grey levels k / 255 is not comparable with a mass, and grows without
bound with any model sure enough of a level: draw such data evenly within their levels first (`data.dequantize`). Then
E log p(x) - D ln 256 is a lower bound of the log mass (Theis, van den Oord & Bethge 2016).
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
