"""The generative model p(z) p(x|z), as a Pyro program."""

import pyro
import torch
from torch import Tensor, nn

from pyrovae.likelihoods import Likelihood
from pyrovae.modules import check_count, checks_values, emit_parameters, evaluation_mode
from pyrovae.priors import Prior

__all__ = ["GenerativeModel"]


class GenerativeModel(nn.Module):
    """Latent-variable model: a prior and a likelihood, run as a Pyro model.

    p(x, z) = p(z) p(x|z)

    As a Pyro program, `model(x)` has plate "data" (dim -1) and sites "z" and "x" (observed).

    Shapes: x (N, *data_shape); z (N, latent_dim).

    Raises ValueError for data of the wrong shape or outside the likelihood's support.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014).
    """

    def __init__(self, prior: Prior, likelihood: Likelihood):
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> Tensor:
        """Run as a Pyro model on data x (N, *data_shape); returns x, simulated where a handler unobserves it."""
        self.likelihood.check_shape(x)
        if checks_values():
            self.likelihood.check(x)
        emit_parameters(self, "model")
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z), obs=x)

    @torch.no_grad()
    def generate(self, num_samples: int, *, mean: bool = False) -> Tensor:
        """Draw data from the model.

        x ~ p(x):  z ~ p(z), then x ~ p(x|z); with `mean=True` E[x|z] in place of the draw, as pictures usually show.

        Shapes: (num_samples, *data_shape).
        """
        check_count("num_samples", num_samples)
        with evaluation_mode(self):
            return _data(self.likelihood(self.prior().sample((num_samples,))), mean)

    @torch.no_grad()
    def decode(self, z: Tensor, *, mean: bool = True) -> Tensor:
        """Data for given latents: E[x|z], or a draw from p(x|z).

        Shapes: (..., latent_dim) -> (..., *data_shape).
        """
        with evaluation_mode(self):
            return _data(self.likelihood(z), mean)


def _data(distribution, mean: bool) -> Tensor:
    return distribution.mean if mean else distribution.sample()
