"""The names that the command line gives to the parts of a model.

    prior = parts.PRIORS["vamp"](latent_dim, guide, train)

All entries of a table take the same arguments. In a script of your own, use the classes directly.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn

import pyrovae as pv


class NetworkName(NamedTuple):
    """Constructors of a pair of networks.

    Attributes:
        encoder: function (data_shape, hidden) -> encoder.
        decoder: function (latent_dim, out_shape, hidden) -> decoder.

    Only MLPs use `hidden`.
    """

    encoder: Callable[[Sequence[int], Sequence[int]], nn.Module]
    decoder: Callable[[int, Sequence[int], Sequence[int]], nn.Module]


class LikelihoodName(NamedTuple):
    """A likelihood and the kind of images it models.

    Attributes:
        likelihood: class of the likelihood.
        images: "binary" (`Splits.binarized`), "levels" (grey levels as loaded) or "continuous" (`Splits.dequantized`).
        options: function (data, scale) -> arguments of the class besides the network and the data's shape and mean.
        num_parameters: function data -> parameters per pixel if they depend on the data, else None.
    """

    likelihood: type[pv.likelihoods.Likelihood]
    images: str
    options: Callable[[pv.data.Splits, float], dict] = lambda data, scale: {}
    num_parameters: Callable[[pv.data.Splits], int | None] = lambda data: None

    def prepare(self, data: pv.data.Splits, binarization: str | None = None, data_seed: int = 0) -> pv.data.Splits:
        """Bring grey images into the form that this likelihood models.

        With dynamic binarisation (the default) and dequantisation, training pixels are drawn anew from their grey values
        at every use. Validation and test images are drawn once, from `data_seed`.
        """
        if self.images == "binary":
            return data.binarized(binarization or "dynamic", data_seed)
        return data.dequantized(data_seed) if self.images == "continuous" else data

    def __call__(
        self, decoder: Callable[[Sequence[int]], nn.Module], data: pv.data.Splits, scale: float = 1.0
    ) -> pv.likelihoods.Likelihood:
        """Build the likelihood on the network decoder(out_shape)."""
        num_parameters = self.num_parameters(data) or self.likelihood.num_parameters()
        out_shape = data.data_shape if num_parameters == 1 else (num_parameters, *data.data_shape)
        options = self.options(data, scale)
        likelihood: Any = self.likelihood  # each class takes data_mean, which the base class does not require
        return likelihood(decoder(out_shape), data.data_shape, data_mean=data.train.mean(0), **options)


NETWORKS = {
    "mlp": NetworkName(
        lambda data_shape, hidden: pv.nets.MLP(math.prod(data_shape), hidden, layer_norm=True),
        lambda latent_dim, out_shape, hidden: pv.nets.MLP(latent_dim, hidden, math.prod(out_shape), layer_norm=True),
    ),
    "conv": NetworkName(
        lambda data_shape, hidden: pv.nets.ConvEncoder(data_shape),
        lambda latent_dim, out_shape, hidden: pv.nets.ConvDecoder(latent_dim, out_shape),
    ),
    "resnet": NetworkName(
        lambda data_shape, hidden: pv.nets.ResidualEncoder(data_shape),
        lambda latent_dim, out_shape, hidden: pv.nets.ResidualDecoder(latent_dim, out_shape),
    ),
}

# name -> (encoder_net, latent_dim) -> guide
GUIDES: dict[str, Callable[[nn.Module, int], pv.guides.Guide]] = {
    "mean-field": pv.guides.MeanFieldNormal,
    "full-rank": pv.guides.FullRankNormal,
    "low-rank": pv.guides.LowRankNormal,
    "iaf": pv.guides.InverseAutoregressiveFlow,
    "nsf": pv.guides.NeuralSplineFlow,
}

_NUM_COMPONENTS, _NUM_PSEUDO_INPUTS = 100, 500  # pseudo-inputs as in Tomczak & Welling (2018)

# name -> (latent_dim, guide, training images) -> prior; only "vamp" uses the guide and the images
PRIORS: dict[str, Callable[[int, pv.guides.Guide, Tensor], pv.priors.Prior]] = {
    "standard-normal": lambda latent_dim, guide, train: pv.priors.StandardNormal(latent_dim),
    "diagonal-normal": lambda latent_dim, guide, train: pv.priors.DiagonalNormal(latent_dim),
    "mixture": lambda latent_dim, guide, train: pv.priors.MixtureOfNormals(latent_dim, _NUM_COMPONENTS),
    "vamp": lambda latent_dim, guide, train: pv.priors.VampPrior(guide, train[:_NUM_PSEUDO_INPUTS].clone()),
    "nsf": lambda latent_dim, guide, train: pv.priors.NeuralSplineFlow(latent_dim),
    "maf": lambda latent_dim, guide, train: pv.priors.MaskedAutoregressiveFlow(latent_dim),
    "realnvp": lambda latent_dim, guide, train: pv.priors.RealNVP(latent_dim),
}

LIKELIHOODS = {
    "bernoulli": LikelihoodName(pv.likelihoods.Bernoulli, "binary"),
    "continuous-bernoulli": LikelihoodName(pv.likelihoods.ContinuousBernoulli, "continuous"),
    "normal": LikelihoodName(pv.likelihoods.Normal, "continuous", lambda data, scale: {"scale": scale}),
    "normal-learned": LikelihoodName(pv.likelihoods.LearnedScaleNormal, "continuous"),
    "normal-per-pixel": LikelihoodName(pv.likelihoods.HeteroscedasticNormal, "continuous"),
    "student-t": LikelihoodName(pv.likelihoods.StudentT, "continuous"),
    "discretized-logistic": LikelihoodName(
        pv.likelihoods.DiscretizedLogistic, "levels", lambda data, scale: {"num_levels": data.num_levels}
    ),
    "categorical": LikelihoodName(
        pv.likelihoods.Categorical,
        "levels",
        lambda data, scale: {"num_levels": data.num_levels},
        lambda data: data.num_levels,
    ),
}


def make_objective(
    name: str, num_particles: int, *, beta: float = 1.0, kl_warmup_steps: int = 0, free_bits: float = 0.0
) -> ELBO:
    """Build the objective of that name.

    Args:
        name: one of `OBJECTIVES`. "elbo" is Pyro's `Trace_ELBO` if the KL has weight 1, no warm-up and no free bits.
        num_particles: particles per datum.
        beta: weight of the KL.
        kl_warmup_steps: steps over which the weight of the KL grows from 0.
        free_bits: nats of KL per dimension left unpenalised.

    Raises:
        ValueError: if weights of the KL are given to an importance-weighted objective, which has no KL.
    """
    objective = OBJECTIVES[name]
    weights: dict[str, Any] = {"beta": beta, "kl_warmup_steps": kl_warmup_steps, "free_bits": free_bits}
    weighed = (beta, kl_warmup_steps, free_bits) != (1.0, 0, 0.0)
    if issubclass(objective, pv.objectives.KLObjective):
        return objective(num_particles, **weights) if weighed or name != "elbo" else Trace_ELBO(num_particles)
    if weighed:
        raise ValueError(f"objective {name!r} has no KL to weigh: leave out beta, KL warm-up and free bits")
    return objective(num_particles)


OBJECTIVES: dict[str, type[ELBO]] = {
    "elbo": pv.objectives.MonteCarloKL,
    "elbo-analytic-kl": pv.objectives.AnalyticKL,
    "iwae": pv.objectives.ImportanceWeighted,
    "stl": pv.objectives.StickingTheLanding,
    "dreg": pv.objectives.DoublyReparameterised,
}
