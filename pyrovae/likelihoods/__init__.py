"""Likelihoods p(x|z): an `nn.Module` whose `forward(z)` returns a normalised distribution over x.

To write a likelihood, subclass `Likelihood`, say how many numbers the network must return for each element of x, and turn
these numbers into a distribution.

How to choose:

- Binary data: `Bernoulli`.
- Grey levels as stored: `DiscretizedLogistic` or `Categorical`. Their log_prob is the log of a probability mass; its
  negative over D ln 2 is in bits per pixel.
- Counts: `Poisson`, `NegativeBinomial`, `ZeroInflatedNegativeBinomial`, with an exposure per datum by the context.
- Categories without an order: `Categories`.
- Real-valued data: `ContinuousBernoulli` in [0, 1], the normals, `StudentT` with outliers, `LogNormal` if positive. Their
  log_prob is the log of a density in the units of x; `Scaled` keeps these units while the network sees standardised ones.
- A table of mixed columns: `Columns`, with one of these for each column.

The density of grey levels k / 255 is not comparable with a mass, and it grows without bound as a model becomes certain
of a level. Dequantise such data first (`data.dequantize`). Then E log p(x) - D ln 256 is a lower bound of the log mass
(Theis, van den Oord & Bethge 2016).
"""

from pyrovae.likelihoods.base import Likelihood
from pyrovae.likelihoods.columns import Categories, Columns
from pyrovae.likelihoods.continuous import LogNormal, Scaled, StudentT
from pyrovae.likelihoods.counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
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
    "Categories",
    "Columns",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "HeteroscedasticNormal",
    "LearnedScaleNormal",
    "Likelihood",
    "LogNormal",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "Scaled",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
]
