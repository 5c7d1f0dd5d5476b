"""pyrovae: variational autoencoders as Pyro programs, and how tight their bounds are."""

from pyrovae import data, distributed, estimators, guides, likelihoods, nets, objectives, plots, priors, registry, uses
from pyrovae.annealing.bounds import BidirectionalMonteCarlo, annealed_importance_sampling, bidirectional_monte_carlo
from pyrovae.checkpoint import load, save
from pyrovae.comparison import Comparison, compare
from pyrovae.evaluation import LogMarginalLikelihood, active_units, log_marginal_likelihood
from pyrovae.inference_data import to_inference_data
from pyrovae.models.generative import GenerativeModel
from pyrovae.models.hierarchy import BottomUpGuide, HierarchicalModel, TopDownGuide, two_layer_vae
from pyrovae.models.layers import ConditionalNormal
from pyrovae.training.loop import FitResult, fit, pick_device
from pyrovae.weights.blocks import log_weights

__version__ = "0.1.0"

__all__ = [
    "BidirectionalMonteCarlo",
    "BottomUpGuide",
    "Comparison",
    "ConditionalNormal",
    "FitResult",
    "GenerativeModel",
    "HierarchicalModel",
    "LogMarginalLikelihood",
    "TopDownGuide",
    "active_units",
    "annealed_importance_sampling",
    "bidirectional_monte_carlo",
    "compare",
    "data",
    "distributed",
    "estimators",
    "fit",
    "guides",
    "likelihoods",
    "load",
    "log_marginal_likelihood",
    "log_weights",
    "nets",
    "objectives",
    "pick_device",
    "plots",
    "priors",
    "registry",
    "save",
    "to_inference_data",
    "two_layer_vae",
    "uses",
]
