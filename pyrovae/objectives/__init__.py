"""Objectives: bounds on log p(x) with gradient estimators, as `pyro.infer.ELBO`s for `SVI` and `fit`.

To add an objective, subclass `Objective` (or `KLObjective`) and turn the log densities of the particles into a loss.
"""

from pyrovae.objectives.base import Objective, Parts
from pyrovae.objectives.kl import AnalyticKL, KLObjective, MonteCarloKL, StickingTheLanding
from pyrovae.objectives.weighted import VIMCO, DoublyReparameterised, ImportanceWeighted, WeightObjective

__all__ = [
    "VIMCO",
    "AnalyticKL",
    "DoublyReparameterised",
    "ImportanceWeighted",
    "KLObjective",
    "MonteCarloKL",
    "Objective",
    "Parts",
    "StickingTheLanding",
    "WeightObjective",
]
