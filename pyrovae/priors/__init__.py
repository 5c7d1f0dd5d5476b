"""Priors p(z). A prior is an `nn.Module` whose `forward()` gives a distribution over z with event shape (D,).

A new prior is one class here: subclass `Prior`, give `latent_dim` to its constructor, return a distribution. Those that
are flows have their own file.
"""

from pyrovae.priors.base import Prior
from pyrovae.priors.densities import DiagonalNormal, MixtureOfNormals, StandardNormal, VampPrior
from pyrovae.priors.flow_priors import FlowPrior, MaskedAutoregressiveFlow, NeuralSplineFlow, RealNVP

__all__ = [
    "DiagonalNormal",
    "FlowPrior",
    "MaskedAutoregressiveFlow",
    "MixtureOfNormals",
    "NeuralSplineFlow",
    "Prior",
    "RealNVP",
    "StandardNormal",
    "VampPrior",
]
