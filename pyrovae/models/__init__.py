"""Generative models p(x, z) as Pyro programs."""

from pyrovae.models.generative import GenerativeModel
from pyrovae.models.hierarchy import HierarchicalModel
from pyrovae.models.mixture import MixtureVAE

__all__ = ["GenerativeModel", "HierarchicalModel", "MixtureVAE"]
