"""Build parts from the names that the command line takes.

    prior = registry.PRIORS["vamp"](latent_dim, guide, train)

All entries of a table take the same arguments. In Python code, use the classes directly.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn

from pyrovae import guides, likelihoods, nets, objectives, priors
from pyrovae.data.splits import Splits

__all__ = [
    "GUIDES",
    "LIKELIHOODS",
    "NETWORKS",
    "OBJECTIVES",
    "PRIORS",
    "LikelihoodName",
    "NetworkName",
    "make_objective",
]


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

    likelihood: type[likelihoods.Likelihood]
    images: str
    options: Callable[[Splits, float], dict] = lambda data, scale: {}
    num_parameters: Callable[[Splits], int | None] = lambda data: None

    def __call__(
        self, decoder: Callable[[Sequence[int]], nn.Module], data: Splits, scale: float = 1.0
    ) -> likelihoods.Likelihood:
        """Build the likelihood on the network decoder(out_shape)."""
        num_parameters = self.num_parameters(data) or self.likelihood.num_parameters()
        out_shape = data.data_shape if num_parameters == 1 else (num_parameters, *data.data_shape)
        options = self.options(data, scale)
        likelihood: Any = self.likelihood  # each class takes data_mean, which the base class does not require
        return likelihood(decoder(out_shape), data.data_shape, data_mean=data.train.mean(0), **options)


NETWORKS = {
    "mlp": NetworkName(
        lambda data_shape, hidden: nets.MLP(_size(data_shape), hidden, layer_norm=True),
        lambda latent_dim, out_shape, hidden: nets.MLP(latent_dim, hidden, _size(out_shape), layer_norm=True),
    ),
    "conv": NetworkName(
        lambda data_shape, hidden: nets.ConvEncoder(data_shape),
        lambda latent_dim, out_shape, hidden: nets.ConvDecoder(latent_dim, out_shape),
    ),
    "resnet": NetworkName(
        lambda data_shape, hidden: nets.ResidualEncoder(data_shape),
        lambda latent_dim, out_shape, hidden: nets.ResidualDecoder(latent_dim, out_shape),
    ),
}

# name -> (encoder_net, latent_dim) -> guide
GUIDES: dict[str, Callable[[nn.Module, int], guides.Guide]] = {
    "mean-field": guides.MeanFieldNormal,
    "full-rank": guides.FullRankNormal,
    "low-rank": guides.LowRankNormal,
    "iaf": guides.InverseAutoregressiveFlow,
    "nsf": guides.NeuralSplineFlow,
}

_NUM_COMPONENTS, _NUM_PSEUDO_INPUTS = 100, 500  # pseudo-inputs as in Tomczak & Welling (2018)

# name -> (latent_dim, guide, training images) -> prior; only "vamp" uses the guide and the images
PRIORS: dict[str, Callable[[int, guides.Guide, Tensor], priors.Prior]] = {
    "standard-normal": lambda latent_dim, guide, train: priors.StandardNormal(latent_dim),
    "diagonal-normal": lambda latent_dim, guide, train: priors.DiagonalNormal(latent_dim),
    "mixture": lambda latent_dim, guide, train: priors.MixtureOfNormals(latent_dim, _NUM_COMPONENTS),
    "vamp": lambda latent_dim, guide, train: priors.VampPrior(guide, train[:_NUM_PSEUDO_INPUTS].clone()),
    "nsf": lambda latent_dim, guide, train: priors.NeuralSplineFlow(latent_dim),
    "maf": lambda latent_dim, guide, train: priors.MaskedAutoregressiveFlow(latent_dim),
    "realnvp": lambda latent_dim, guide, train: priors.RealNVP(latent_dim),
}

LIKELIHOODS = {
    "bernoulli": LikelihoodName(likelihoods.Bernoulli, "binary"),
    "continuous-bernoulli": LikelihoodName(likelihoods.ContinuousBernoulli, "continuous"),
    "normal": LikelihoodName(likelihoods.Normal, "continuous", lambda data, scale: {"scale": scale}),
    "normal-learned": LikelihoodName(likelihoods.LearnedScaleNormal, "continuous"),
    "normal-per-pixel": LikelihoodName(likelihoods.HeteroscedasticNormal, "continuous"),
    "student-t": LikelihoodName(likelihoods.StudentT, "continuous"),
    "discretized-logistic": LikelihoodName(
        likelihoods.DiscretizedLogistic, "levels", lambda data, scale: {"num_levels": data.num_levels}
    ),
    "categorical": LikelihoodName(
        likelihoods.Categorical,
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
    if issubclass(objective, objectives.KLObjective):
        return objective(num_particles, **weights) if weighed or name != "elbo" else Trace_ELBO(num_particles)
    if weighed:
        raise ValueError(f"objective {name!r} has no KL to weigh: leave out beta, KL warm-up and free bits")
    return objective(num_particles)


OBJECTIVES: dict[str, type[ELBO]] = {
    "elbo": objectives.MonteCarloKL,
    "elbo-analytic-kl": objectives.AnalyticKL,
    "iwae": objectives.ImportanceWeighted,
    "stl": objectives.StickingTheLanding,
    "dreg": objectives.DoublyReparameterised,
}


def _size(shape: Sequence[int]) -> int:
    return math.prod(shape)
