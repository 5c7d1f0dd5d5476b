"""A mixture model y -> z -> x whose component y is a site of the program, summed out exactly."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyrovae.common.arguments import check_count
from pyrovae.distributions.mixtures import Mixture
from pyrovae.likelihoods.base import Likelihood
from pyrovae.models.generative import GenerativeModel, prior_at, sample_latent
from pyrovae.priors.densities import MixtureOfNormals
from pyrovae.programs.reach import evaluation_mode

__all__ = ["MixtureVAE"]


class MixtureVAE(GenerativeModel):
    """Model of data in clusters: a component, latents given the component, data given the latents.

        p(x, z, y) = w_y N(z; m_y, diag s_y^2) p(x|z)

    As a Pyro program, `model(x)` has plate "data" (dim -1) and sites "y", "z" and "x" (observed). The component y is
    marked for enumeration, so a guide q(z|x) is enough: estimates, the objectives of `pyrovae.objectives` and
    `TraceEnum_ELBO`, which `fit` takes by default for this model, sum y out exactly. The data are decoded once, not once
    per component. p(z), p(x) and the bounds are those of `GenerativeModel(prior, likelihood)`; with y as a site,
    `pyrovae.classify(model, guide, x)` gives p(y|x), and `pyro.condition(model, {"y": labels})` is the model of labelled
    data.

    Shapes: x (N, *data_shape); y (N,), whole numbers below `num_components`; z (N, latent_dim); context (N, ...); mask
    (N, *data_shape).

    Args:
        prior: w, m and s, which are learned; with a context network, they depend on the context
        likelihood: p(x|z), or p(x|z,c)

    Raises:
        TypeError: for another prior than a `MixtureOfNormals`.
        ValueError: for everything that `GenerativeModel` refuses.

    Example:
        >>> from pyrovae.likelihoods.pixelwise import Bernoulli
        >>> from pyrovae.nets.mlp import MLP
        >>> model = MixtureVAE(MixtureOfNormals(2, num_components=10), Bernoulli(MLP(2, [8], 784), (1, 28, 28)))
        >>> model.generate(5, component=3).shape
        torch.Size([5, 1, 28, 28])

    References:
        Jiang, Zheng, Tan, Tang & Zhou, Variational Deep Embedding (2017).
    """

    prior: MixtureOfNormals

    def __init__(self, prior: MixtureOfNormals, likelihood: Likelihood):
        if not isinstance(prior, MixtureOfNormals):
            raise TypeError(
                f"the prior of a MixtureVAE must be a pyrovae.priors.MixtureOfNormals, whose component is the site y; "
                f"found {type(prior).__name__}. GenerativeModel takes any prior"
            )
        super().__init__(prior, likelihood)

    @property
    def num_components(self) -> int:
        """K, the number of components."""
        return self.prior.num_components

    def default_loss(self) -> TraceEnum_ELBO:
        """The loss that `fit` takes if none is given: the ELBO with y summed out."""
        return TraceEnum_ELBO(max_plate_nesting=1)

    def sample_latents(self, context: Tensor | None = None) -> Tensor:
        component, normal_of = self._components(context)
        y = pyro.sample("y", component, infer={"enumerate": "parallel"})
        return sample_latent("z", normal_of(y))

    @torch.no_grad()
    def generate(
        self,
        num_samples: int,
        *,
        mean: bool = False,
        context: Tensor | int | None = None,
        component: int | Tensor | None = None,
    ) -> Tensor:
        """Draw data from the model, or from some of its components.

            x ~ p(x|y):  z ~ N(m_y, diag s_y^2), then x ~ p(x|z);   y ~ Categorical(w) unless given

        Args:
            num_samples: number of data to draw
            mean: return E[x|z] instead of the draw, as is usual for images
            context: what the model is conditioned on: (num_samples, ...), or one row (1, ...) or one label (an int) for all
            component: y, one whole number for all data, or (num_samples,)

        Returns:
            (num_samples, *data_shape).

        Raises:
            ValueError: for a component that does not exist, or another number of components than of samples.
        """
        if component is None:
            return super().generate(num_samples, mean=mean, context=context)
        num_samples = check_count("num_samples", num_samples)
        y = self._checked(component, num_samples)
        more = self._context_of_each(num_samples, context)
        with evaluation_mode(self):
            _, normal_of = self._components(*more)
            return self._data(normal_of(y).sample(), mean, *more)

    def _components(self, context: Tensor | None = None) -> tuple[dist.Categorical, Callable[[Tensor], Any]]:
        """p(y), and the function from y to p(z|y)."""
        mixture, _ = prior_at(self.prior, context)
        if isinstance(mixture, Mixture):
            component, normals = dist.Categorical(logits=mixture.log_weights), mixture.components
            rows: tuple[Tensor, ...] = ()
        else:
            component, normals = mixture.mixture_distribution, mixture.component_distribution
            rows = (torch.arange(len(normals.base_dist.loc), device=normals.base_dist.loc.device),)
        loc, scale = normals.base_dist.loc, normals.base_dist.scale
        return component, lambda y: dist.Normal(loc[*rows, y], scale[*rows, y]).to_event(1)

    def _checked(self, component: Any, num_samples: int) -> Tensor:
        y = torch.as_tensor(component, device=self.prior.locs.device)
        if y.is_floating_point() or y.dtype == torch.bool or y.shape not in ((), (num_samples,)):
            raise ValueError(
                f"component must be a whole number, or a tensor of them of shape ({num_samples},); found {y.dtype} of "
                f"shape {tuple(y.shape)}"
            )
        if ((y < 0) | (y >= self.num_components)).any():
            raise ValueError(f"components are 0 to {self.num_components - 1}, found {y.min()} to {y.max()}")
        return y.expand(num_samples)
