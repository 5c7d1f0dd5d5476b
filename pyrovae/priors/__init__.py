"""Priors p(z): an `nn.Module` whose `forward()` returns a distribution over z with event shape (D,).

With `context_net=`, normals, mixtures and flows become p(z|c), and the model is called as `model(x, context)`.

To write a prior, subclass `Prior`, pass `latent_dim` to its constructor, and return a distribution from `forward()`.
"""

from pyrovae.priors.base import ConditionalPrior, Prior
from pyrovae.priors.densities import DiagonalNormal, MixtureOfNormals, StandardNormal, VampPrior
from pyrovae.priors.flow_priors import FlowPrior, MaskedAutoregressiveFlow, NeuralSplineFlow, RealNVP

__all__ = [
    "ConditionalPrior",
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
