"""The generative model p(z) p(x|z) as a Pyro program, and the base class it shares with models of several layers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.common.arguments import check_count, checks_values
from pyrovae.common.component import Component
from pyrovae.likelihoods.base import Likelihood
from pyrovae.priors.base import Prior
from pyrovae.programs.parameters import emit_parameters
from pyrovae.programs.reach import evaluation_mode

__all__ = ["GenerativeModel", "LatentVariableModel", "check_decoder"]


class LatentVariableModel(Component, ABC):
    """Contract of a model p(x, z) = p(z) p(x|z), where z holds all of its latents side by side.

    As a Pyro program, `model(x)` has plate "data" (dim -1), the latent sites of the subclass, and site "x" (observed).

    Shapes: x (N, *data_shape); z (N, D), D latent dimensions in all.

    Args:
        prior: p(z), or that of the top layer
        likelihood: p(x|z)

    Raises:
        ValueError: for data of the wrong shape or outside the likelihood's support.
    """

    def __init__(self, prior: Prior, likelihood: Likelihood):
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    @abstractmethod
    def latents(self, visit: Callable[[str, dist.TorchDistribution], Tensor]) -> Tensor:
        """Visit the latent sites in the order of drawing.

        Args:
            visit: called as `visit(name, distribution)`; returns the site's value

        Returns:
            All values side by side, z (..., D).
        """

    @abstractmethod
    def likelihood_at(self, z: Tensor) -> dist.TorchDistribution:
        """Return p(x|z).

        Args:
            z: latents (..., D)
        """

    def forward(self, x: Tensor) -> Tensor:
        """Run as a Pyro model.

        Args:
            x: data (N, *data_shape)

        Returns:
            x, or simulated data if a handler makes the site unobserved.
        """
        self.likelihood.check_shape(x)
        if checks_values():
            self.likelihood.check(x)
        emit_parameters(self, "model")
        with pyro.plate("data", len(x), dim=-1):
            z = self.latents(_sample)
            distribution = self.likelihood_at(z)
            if distribution.event_shape != x.shape[1:] or distribution.batch_shape != z.shape[:-1]:
                raise ValueError(
                    f"{type(self.likelihood).__name__} must give batch shape {tuple(z.shape[:-1])} and event shape "
                    f"{tuple(x.shape[1:])}, its data_shape; found {tuple(distribution.batch_shape)} and "
                    f"{tuple(distribution.event_shape)}: end its distribution with .to_event({x.ndim - 1})"
                )
            return pyro.sample("x", distribution, obs=x)

    @torch.no_grad()
    def generate(self, num_samples: int, *, mean: bool = False) -> Tensor:
        """Draw data from the model.

            x ~ p(x):  z ~ p(z), then x ~ p(x|z)

        Args:
            num_samples: number of data to draw
            mean: return E[x|z] instead of the draw, as is usual for images

        Returns:
            (num_samples, *data_shape).
        """
        num_samples = check_count("num_samples", num_samples)
        with evaluation_mode(self):
            z = self.latents(lambda _, distribution: distribution.expand((num_samples,)).sample())
            return self._data(z, mean)

    @torch.no_grad()
    def decode(self, z: Tensor, *, mean: bool = True) -> Tensor:
        """Return the data for given latents: E[x|z], or a draw from p(x|z).

        Args:
            z: latents (..., D)
            mean: return E[x|z] instead of a draw

        Returns:
            (..., *data_shape).
        """
        with evaluation_mode(self):
            return self._data(z, mean)

    def _data(self, z: Tensor, mean: bool) -> Tensor:
        distribution = self.likelihood_at(z)
        return distribution.mean if mean else distribution.sample()


class GenerativeModel(LatentVariableModel):
    """Latent-variable model of a prior and a likelihood, run as a Pyro model.

        p(x, z) = p(z) p(x|z)

    As a Pyro program, `model(x)` has plate "data" (dim -1) and sites "z" and "x" (observed).

    Shapes: x (N, *data_shape); z (N, latent_dim).

    Args:
        prior: p(z)
        likelihood: p(x|z)

    Raises:
        ValueError: for a decoder with another number of latents than the prior's, a prior or likelihood that gives
            another shape than it declares, and data of the wrong shape or outside the likelihood's support.

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes (2014).
    """

    def __init__(self, prior: Prior, likelihood: Likelihood):
        super().__init__(prior, likelihood)
        if hasattr(prior, "latent_dim"):
            check_decoder(likelihood, prior.latent_dim)

    def latents(self, visit: Callable[[str, dist.TorchDistribution], Tensor]) -> Tensor:
        distribution = self.prior()
        latent_dim = getattr(self.prior, "latent_dim", math.prod(distribution.event_shape))
        if distribution.batch_shape != () or distribution.event_shape != (latent_dim,):
            raise ValueError(
                f"{type(self.prior).__name__} must give batch shape () and event shape ({latent_dim},), its latent_dim; found "
                f"{tuple(distribution.batch_shape)} and {tuple(distribution.event_shape)}: end independent dimensions "
                f"with .to_event(1)"
            )
        return visit("z", distribution)

    def likelihood_at(self, z: Tensor) -> dist.TorchDistribution:
        return self.likelihood(z)


def check_decoder(likelihood: Likelihood, latent_dim: int) -> None:
    """Check that the likelihood's network takes as many latents as the prior has.

    Args:
        likelihood: likelihood with a decoder network; not checked if the network has no `in_features`
        latent_dim: number of latents of the prior

    Raises:
        ValueError: if the network takes another number of latents.
    """
    in_features = getattr(likelihood.decoder_net, "in_features", latent_dim)
    if in_features != latent_dim:
        raise ValueError(
            f"the decoder network takes {in_features} latents (its in_features), and the prior has {latent_dim} "
            f"(latent_dim): make it for {latent_dim}"
        )


def _sample(name: str, distribution: dist.TorchDistribution) -> Tensor:
    """Call pyro.sample and check the size of the value, because a single number would be broadcast silently."""
    value = pyro.sample(name, distribution)
    if value.shape[-1:] != distribution.event_shape:
        raise ValueError(
            f"site '{name}' has {distribution.event_shape.numel()} dimensions in the model, and a value of shape "
            f"{tuple(value.shape)} was given for it, {value.shape[-1]} per datum: use one latent_dim for prior and guide"
        )
    return value
