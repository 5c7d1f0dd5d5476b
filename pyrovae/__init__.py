"""pyrovae: variational autoencoders as Pyro programs, and how tight their bounds are."""

from pyrovae import (
    data,
    estimators,
    guides,
    likelihoods,
    models,
    nets,
    objectives,
    plots,
    priors,
)
from pyrovae.annealing.annealed_sampling import annealed_importance_sampling
from pyrovae.annealing.bidirectional import BidirectionalMonteCarlo, bidirectional_monte_carlo
from pyrovae.annealing.difference import DifferenceEstimate, anneal_a_slice
from pyrovae.annealing.rate_distortion import RateDistortion, rate_distortion
from pyrovae.annealing.smc import sequential_monte_carlo
from pyrovae.common import distributed
from pyrovae.evaluation import detection
from pyrovae.evaluation.aggregate_posterior import AggregatePosterior, aggregate_posterior
from pyrovae.evaluation.arviz_export import to_elpd_data, to_inference_data
from pyrovae.evaluation.calibration import Calibration, simulation_based_calibration
from pyrovae.evaluation.classification import Classification, classify
from pyrovae.evaluation.comparison import Comparison, compare
from pyrovae.evaluation.importance_sampling import active_units, log_marginal_likelihood, particles_for
from pyrovae.evaluation.imputation import Imputation, impute
from pyrovae.evaluation.inference_gaps import InferenceGaps, inference_gaps
from pyrovae.evaluation.latent_use import LatentUse, latent_use
from pyrovae.evaluation.log_weights import log_weights
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.evaluation.second_opinion import SecondOpinion, second_opinion
from pyrovae.models import uses
from pyrovae.models.export import export
from pyrovae.models.generative import GenerativeModel
from pyrovae.models.hierarchy import BottomUpGuide, HierarchicalModel, TopDownGuide, two_layer_vae
from pyrovae.models.layers import ConditionalNormal
from pyrovae.models.mixture import MixtureVAE
from pyrovae.training.fit import FitResult, fit
from pyrovae.training.preparation import pick_device
from pyrovae.training.saved_pair import load, save

__version__ = "0.1.0"

__all__ = [
    "AggregatePosterior",
    "BidirectionalMonteCarlo",
    "BottomUpGuide",
    "Calibration",
    "Classification",
    "Comparison",
    "ConditionalNormal",
    "DifferenceEstimate",
    "FitResult",
    "GenerativeModel",
    "HierarchicalModel",
    "Imputation",
    "InferenceGaps",
    "LatentUse",
    "LogMarginalLikelihood",
    "MixtureVAE",
    "RateDistortion",
    "SecondOpinion",
    "TopDownGuide",
    "active_units",
    "aggregate_posterior",
    "anneal_a_slice",
    "annealed_importance_sampling",
    "bidirectional_monte_carlo",
    "classify",
    "compare",
    "data",
    "detection",
    "distributed",
    "estimators",
    "export",
    "fit",
    "guides",
    "impute",
    "inference_gaps",
    "latent_use",
    "likelihoods",
    "load",
    "log_marginal_likelihood",
    "log_weights",
    "models",
    "nets",
    "objectives",
    "particles_for",
    "pick_device",
    "plots",
    "priors",
    "rate_distortion",
    "save",
    "second_opinion",
    "sequential_monte_carlo",
    "simulation_based_calibration",
    "to_elpd_data",
    "to_inference_data",
    "two_layer_vae",
    "uses",
]
