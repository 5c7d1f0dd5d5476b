"""The generative model p(z) p(x|z) as a Pyro program, and the base class it shares with models of several layers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Number
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count, checks_values
from pyrovae.common.component import Component
from pyrovae.common.networks import check_context, check_mask, given, needs_context, takes_context
from pyrovae.data.forms import as_arguments, as_tensor
from pyrovae.distributions.mixed import means_of
from pyrovae.likelihoods.base import Likelihood
from pyrovae.priors.base import Prior
from pyrovae.programs.parameters import emit_parameters, numbers_of
from pyrovae.programs.reach import evaluation_mode

__all__ = ["GenerativeModel", "LatentVariableModel", "check_decoder", "likelihood_given", "prior_at", "sample_latent"]


class LatentVariableModel(Component, ABC):
    """Contract of a model p(x, z) = p(z) p(x|z), where z holds all of its latents side by side.

    As a Pyro program, `model(x)` has plate "data" (dim -1), the latent sites of the subclass, and site "x" (observed).

    `model(x, context)` is p(x, z | c): of its parts, those get the context whose `forward` takes one (the prior, and
    the likelihood by its network). `model(x, observed=mask)` is p of the known elements of x and z.

    Shapes: x (N, *data_shape); z (N, D), D latent dimensions in all; context (N, ...); mask (N, *data_shape).

    Args:
        prior: p(z), or that of the top layer
        likelihood: p(x|z)

    Raises:
        TypeError: for a prior that cannot be called or is a likelihood, or a likelihood that is no `Likelihood`.
        ValueError: for data of the wrong shape or outside the likelihood's support, a context that no part uses or that
            has another number of rows than the data, and no context if a part needs one.
    """

    takes_real_data = True  # `fit` and evaluations then convert whole numbers given as x: see `data.conversion.Numbers`

    def __init__(self, prior: Prior, likelihood: Likelihood):
        super().__init__()
        _check_parts(type(self).__name__, prior, likelihood)
        self.prior = prior
        self.likelihood = likelihood

    @abstractmethod
    def latents(self, visit: Callable[[str, dist.TorchDistribution], Tensor], context: Tensor | None = None) -> Tensor:
        """Visit the latent sites in the order of drawing.

        Args:
            visit: called as `visit(name, distribution)`; returns the site's value
            context: what the model is conditioned on (N, ...); not passed if there is none

        Returns:
            All values side by side, z (..., D).
        """

    def sample_latents(self, context: Tensor | None = None) -> Tensor:
        """Draw the latents as sites of the Pyro program, z (..., D); for a model with more sites than `latents` has.

        Args:
            context: what the model is conditioned on (N, ...); not passed if there is none
        """
        return self.latents(sample_latent, *given(context)[0])

    @abstractmethod
    def likelihood_at(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return p(x|z).

        Args:
            z: latents (..., D)
            context: what the model is conditioned on (N, ...); not passed if there is none
        """

    def uses_context(self) -> bool:
        """Whether a part of the model takes a context."""
        return takes_context(self.prior, inputs=0) or takes_context(self.likelihood)

    def forward(self, x: Tensor, context: Tensor | None = None, *, observed: Tensor | None = None) -> Tensor:
        """Run as a Pyro model.

        Args:
            x: data (N, *data_shape)
            context: what the model is conditioned on: labels (N,), covariates (N, C), images (N, ...)
            observed: mask of what is known, shaped like x, bool or 0 and 1. The likelihood counts these elements alone;
                the others may hold anything, NaN too

        Returns:
            x with any values in place of what is missing, or simulated data if a handler makes the site unobserved.
        """
        self.likelihood.check_shape(x)
        if observed is not None:
            observed = check_mask(observed, x)
            x = self.likelihood.filled(x, observed)
        if checks_values():
            self.likelihood.check(x)
        if context is not None:
            check_context(context, x.shape[0])
            self._check_use(context)
        more, _ = given(context)
        emit_parameters(self, "model")
        with pyro.plate("data", len(x), dim=-1):
            z = self.sample_latents(*more)
            distribution = self.likelihood_at(z, *more)
            if distribution.event_shape != x.shape[1:] or distribution.batch_shape != z.shape[:-1]:
                raise ValueError(
                    f"{type(self.likelihood).__name__} must give batch shape {tuple(z.shape[:-1])} and event shape "
                    f"{tuple(x.shape[1:])}, its data_shape; found {tuple(distribution.batch_shape)} and "
                    f"{tuple(distribution.event_shape)}: end its distribution with .to_event({x.ndim - 1})"
                )
            if observed is not None:
                distribution = self.likelihood.masked(distribution, observed)
            return pyro.sample("x", distribution, obs=x)

    def _check_use(self, context: Tensor) -> None:
        """Raise ValueError if no part of the model uses the context, so that none is dropped in silence."""
        if not self.uses_context():
            raise ValueError(
                f"{type(self).__name__} was given a context of shape {tuple(context.shape)}, and neither its prior "
                f"({type(self.prior).__name__}) nor its likelihood ({type(self.likelihood).__name__}) uses one: give "
                f"the likelihood a network of two arguments, pyrovae.nets.Concatenate(net), or the prior a context_net=. "
                f"If it is the labels of a data loader, leave them out: transform=lambda batch: batch[0]"
            )

    @torch.no_grad()
    def generate(self, num_samples: int, *, mean: bool = False, context: Tensor | int | None = None) -> Tensor:
        """Draw data from the model.

            x ~ p(x):  z ~ p(z), then x ~ p(x|z)

        Args:
            num_samples: number of data to draw
            mean: return E[x|z] instead of the draw, as is usual for images; for three or more `Categories`, whose codes
                have no mean, the most probable one
            context: what the model is conditioned on: (num_samples, ...), or one row (1, ...) or one label (an int) for all

        Returns:
            (num_samples, *data_shape).
        """
        num_samples = check_count("num_samples", num_samples)
        more = self._context_of_each(num_samples, context)
        with evaluation_mode(self):
            z = self.latents(lambda _, distribution: distribution.expand((num_samples,)).sample(), *more)
            return self._data(z, mean, *more)

    def _context_of_each(self, num_samples: int, context: Tensor | int | None) -> tuple[Tensor, ...]:
        """The context with one row for each sample, as the arguments of `latents`."""
        if context is not None:
            context = self._tensor_of(context)
            if len(context) == 1:
                context = context.expand(num_samples, *context.shape[1:])
            check_context(context, num_samples)
            self._check_use(context)
        return given(context)[0]

    @torch.no_grad()
    def decode(self, z: Tensor, *, mean: bool = True, context: Tensor | int | None = None) -> Tensor:
        """Return the data for given latents: E[x|z], or a draw from p(x|z).

        Args:
            z: latents (..., D)
            mean: return E[x|z] instead of a draw; for three or more `Categories` the most probable one
            context: what the model is conditioned on (N, ...), N the last dimension of z before D; one row or one label
                (an int) serves all

        Returns:
            (..., *data_shape).
        """
        z = self._codes(z)
        if context is not None:
            context = self._tensor_of(context)
            self._check_use(context)
        with evaluation_mode(self):
            return self._data(z, mean, *given(context)[0])

    def _codes(self, z: Any) -> Tensor:
        """Latents as a tensor; an array becomes one of the model's dtype, on its device."""
        if isinstance(z, Tensor):
            return z
        device = next((p.device for p in self.parameters()), None)
        return as_tensor("z", z, numbers_of(self)).to(device)

    def _tensor_of(self, context: Any) -> Tensor:
        """The context as a tensor (N, ...) of the model's numbers: one label becomes one row.

        Raises:
            TypeError: It is no tensor, array, frame, number or list of numbers.
        """
        device = next((p.device for p in self.parameters()), None)
        if isinstance(context, Tensor):
            return (context.unsqueeze(0) if context.ndim == 0 else context).to(device)
        if isinstance(context, Number | tuple | list):
            try:
                context = np.asarray(context)
            except ValueError:  # rows of different lengths
                context = np.asarray(context, dtype=object)
        if not hasattr(context, "__array__"):
            check_context(context, 1)
        numbers = numbers_of(self)
        (context,), _ = as_arguments((context,), {}, numbers._replace(is_real=False), "context", is_one=True)
        return self._tensor_of(context.to(device))

    def _data(self, z: Tensor, mean: bool, *context: Tensor) -> Tensor:
        distribution = self.likelihood_at(z, *context)
        return means_of(distribution) if mean else distribution.sample()


class GenerativeModel(LatentVariableModel):
    """Latent-variable model of a prior and a likelihood, run as a Pyro model.

        p(x, z) = p(z) p(x|z)

    As a Pyro program, `model(x)` has plate "data" (dim -1) and sites "z" and "x" (observed). `model(x, context)` is
    p(z|c) p(x|z,c), for a prior or a likelihood that takes a context. `model(x, observed=mask)` counts the known
    elements of x alone.

    Shapes: x (N, *data_shape); z (N, latent_dim); context (N, ...); mask (N, *data_shape).

    Args:
        prior: p(z), or p(z|c)
        likelihood: p(x|z), or p(x|z,c)

    Raises:
        ValueError: for a decoder with another number of latents than the prior's, a prior or likelihood that gives
            another shape than it declares, and data of the wrong shape or outside the likelihood's support.

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes (2014). With a context: Sohn, Lee & Yan, Learning Structured
        Output Representation using Deep Conditional Generative Models (2015). With missing values: Mattei & Frellsen,
        MIWAE (2019).
    """

    def __init__(self, prior: Prior, likelihood: Likelihood):
        super().__init__(prior, likelihood)
        if hasattr(prior, "latent_dim"):
            check_decoder(likelihood, prior.latent_dim)

    def latents(self, visit: Callable[[str, dist.TorchDistribution], Tensor], context: Tensor | None = None) -> Tensor:
        distribution, batch_shape = prior_at(self.prior, context)
        latent_dim = getattr(self.prior, "latent_dim", math.prod(distribution.event_shape))
        if distribution.batch_shape != batch_shape or distribution.event_shape != (latent_dim,):
            raise ValueError(
                f"{type(self.prior).__name__} must give batch shape {tuple(batch_shape)} and event shape ({latent_dim},), its "
                f"latent_dim; found {tuple(distribution.batch_shape)} and {tuple(distribution.event_shape)}: end independent dimensions "
                f"with .to_event(1)"
            )
        return visit("z", distribution)

    def likelihood_at(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return likelihood_given(self.likelihood, z, context)


def _check_parts(name: str, prior: Any, likelihood: Any) -> None:
    """Raise TypeError unless these are a prior and a likelihood."""
    if isinstance(prior, Likelihood) and isinstance(likelihood, Prior):
        raise TypeError(
            f"found the likelihood {type(prior).__name__} in place of the prior, and the prior "
            f"{type(likelihood).__name__} in place of the likelihood: swap them, the prior comes first in {name}"
        )
    if isinstance(prior, Likelihood) or not callable(prior):
        raise TypeError(
            f"prior must be a pyrovae.priors.Prior, such as StandardNormal(latent_dim), found {type(prior).__name__}"
        )
    if not isinstance(likelihood, Likelihood):
        is_net = isinstance(likelihood, nn.Module)
        remedy = f": if it is the decoder network, make it Bernoulli({type(likelihood).__name__}(...), data_shape)"
        raise TypeError(
            f"likelihood must be a pyrovae.likelihoods.Likelihood, such as Bernoulli(decoder, data_shape), found "
            f"{type(likelihood).__name__}{remedy if is_net else ''}"
        )


def prior_at(prior: Prior, context: Tensor | None) -> tuple[dist.TorchDistribution, torch.Size]:
    """Return p(z) or p(z|c), and the batch shape that it must have.

    Raises:
        ValueError: the prior needs a context and there is none.
    """
    if context is not None and takes_context(prior, inputs=0):
        return prior(context), context.shape[:1]
    if needs_context(prior, inputs=0):
        raise ValueError(
            f"the prior {type(prior).__name__} takes a context, and none was given: call model(x, context), and pass "
            f"context= to generate"
        )
    return prior(), torch.Size()


def likelihood_given(likelihood: Likelihood, z: Tensor, context: Tensor | None) -> dist.TorchDistribution:
    """Return p(x|z), or p(x|z,c) if the likelihood takes a context."""
    if context is not None and takes_context(likelihood):
        return likelihood(z, context)
    return likelihood(z)


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


def sample_latent(name: str, distribution: dist.TorchDistribution) -> Tensor:
    """Call pyro.sample and check the size of the value, because a single number would be broadcast silently."""
    value = pyro.sample(name, distribution)
    if value.shape[-1:] != distribution.event_shape:
        raise ValueError(
            f"site '{name}' has {distribution.event_shape.numel()} dimensions in the model, and a value of shape "
            f"{tuple(value.shape)} was given for it, {value.shape[-1]} per datum: use one latent_dim for prior and guide"
        )
    return value
