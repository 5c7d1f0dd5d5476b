"""The generative model p(z) p(x|z), as a Pyro program, and what it shares with models of several layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.likelihoods.contract import Likelihood
from pyrovae.priors.contract import Prior
from pyrovae.programs.modules import check_count, checks_values, emit_parameters, evaluation_mode
from pyrovae.programs.specification import Part

__all__ = ["GenerativeModel", "LatentVariableModel"]


class LatentVariableModel(Part, ABC):
    """Contract of a model p(x, z) = p(z) p(x|z), where z is all of its latents side by side.

    As a Pyro program, `model(x)` has plate "data" (dim -1), the latent sites of the subclass, and site "x" (observed).

    Shapes: x (N, *data_shape); z (N, D), D numbers in all.

    Raises ValueError for data of the wrong shape or outside the likelihood's support.
    """

    def __init__(self, prior: Prior, likelihood: Likelihood):
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    @abstractmethod
    def latents(self, visit: Callable[[str, dist.TorchDistribution], Tensor]) -> Tensor:
        """Go through the latent sites as they are drawn: `visit(name, distribution)` gives each its value.

        Returns all values side by side, z (..., D).
        """

    @abstractmethod
    def likelihood_at(self, z: Tensor) -> dist.TorchDistribution:
        """p(x|z) for latents z (..., D)."""

    def forward(self, x: Tensor) -> Tensor:
        """Run as a Pyro model on data x (N, *data_shape); returns x, simulated where a handler unobserves it."""
        self.likelihood.check_shape(x)
        if checks_values():
            self.likelihood.check(x)
        emit_parameters(self, "model")
        with pyro.plate("data", len(x), dim=-1):
            z = self.latents(pyro.sample)
            return pyro.sample("x", self.likelihood_at(z), obs=x)

    @torch.no_grad()
    def generate(self, num_samples: int, *, mean: bool = False) -> Tensor:
        """Draw data from the model.

        x ~ p(x):  z ~ p(z), then x ~ p(x|z); with `mean=True` E[x|z] in place of the draw, as pictures usually show.

        Shapes: (num_samples, *data_shape).
        """
        check_count("num_samples", num_samples)
        with evaluation_mode(self):
            z = self.latents(lambda _, distribution: distribution.expand((num_samples,)).sample())
            return self._data(z, mean)

    @torch.no_grad()
    def decode(self, z: Tensor, *, mean: bool = True) -> Tensor:
        """Data for given latents: E[x|z], or a draw from p(x|z).

        Shapes: (..., D) -> (..., *data_shape).
        """
        with evaluation_mode(self):
            return self._data(z, mean)

    def _data(self, z: Tensor, mean: bool) -> Tensor:
        distribution = self.likelihood_at(z)
        return distribution.mean if mean else distribution.sample()


class GenerativeModel(LatentVariableModel):
    """Latent-variable model: a prior and a likelihood, run as a Pyro model.

    p(x, z) = p(z) p(x|z)

    As a Pyro program, `model(x)` has plate "data" (dim -1) and sites "z" and "x" (observed).

    Shapes: x (N, *data_shape); z (N, latent_dim).

    Raises ValueError for data of the wrong shape or outside the likelihood's support.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014).
    """

    def latents(self, visit: Callable[[str, dist.TorchDistribution], Tensor]) -> Tensor:
        return visit("z", self.prior())

    def likelihood_at(self, z: Tensor) -> dist.TorchDistribution:
        return self.likelihood(z)
