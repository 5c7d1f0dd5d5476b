"""Guides that are normalizing flows: a map before the scaling and shifting of `MeanFieldNormal`."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, Transform

from pyrovae.common.arguments import check_count
from pyrovae.distributions.zuko_adapter import FlowDistribution, import_zuko, start_near_identity
from pyrovae.guides.base import EncoderGuide, start_informative

__all__ = ["FlowGuide", "InverseAutoregressiveFlow", "NeuralSplineFlow"]


class FlowGuide(EncoderGuide):
    """Contract of a guide that is a normalizing flow: a map before what makes `MeanFieldNormal` of noise.

    z = mu(x) + sigma(x) * f(epsilon; c(x)),   epsilon ~ N(0, I),   (mu, log sigma, c) = head(encoder_net(x)),
    log q(z|x) = log N(epsilon; 0, I) - log |det df/depsilon| - sum log sigma

    num_context: how many numbers c(x) has

    It starts as `MeanFieldNormal` does, if f starts near the identity. Draws come with their density in one pass through f,
    the density of any other value needs its inverse.
    """

    def __init__(self, encoder_net: nn.Module, latent_dim: int, num_features: int | None, num_context: int):
        super().__init__(encoder_net, latent_dim, num_features, num_parameters=2 * latent_dim + num_context)
        start_informative(self.head, latent_dim)

    @abstractmethod
    def transform(self, context: Tensor) -> Transform:
        """f for contexts (N, num_context): a zuko transformation of (..., N, latent_dim), quick forwards."""

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        zuko, size = import_zuko(), self.latent_dim
        loc, log_scale, context = parameters.split([size, size, parameters.shape[-1] - 2 * size], -1)
        affine = AffineTransform(loc, log_scale.exp(), event_dim=1)
        # In zuko's frame for what depends on a context: left bare, the batch of its parameters counts as part of the event.
        affine_of_x = zuko.transforms.AutoregressiveTransform(lambda _: affine, passes=1)
        to_latent = zuko.transforms.ComposedTransform(self.transform(context), affine_of_x)
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        flow = zuko.distributions.NormalizingFlow(to_latent.inv, noise)
        return FlowDistribution(flow, parameters=(parameters, *self.parameters()))

    def __repr__(self) -> str:
        with torch.random.fork_rng([]):  # zuko draws random numbers to describe itself
            return super().__repr__()


class InverseAutoregressiveFlow(FlowGuide):
    """Inverse autoregressive flow: each number shifted and scaled by the ones before it.

    z = mu(x) + sigma(x) * f(epsilon; c(x)),   f = f_T o ... o f_1,
    f_t(u)_d = m_d(u_<d; c) + s_d(u_<d; c) u_d,   dimensions in turn ascending and descending

    num_transforms: T; hidden_features: of the masked network of each, best not below latent_dim
    num_context: how many numbers c(x) has

    The gates of the original, which keep s below 1, are left out, and the encoder's mu and sigma come last, not first.
    It starts where `MeanFieldNormal` does. A draw and its density cost T network passes; the density of any other value
    (`DefensiveMixture`, a `VampPrior` on this guide, densities under a detached guide) costs T latent_dim passes.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,).

    Raises ValueError for counts < 1 and if the width of the features is unknown or wrong.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever & Welling, Improved Variational Inference with Inverse
    Autoregressive Flow (2016).

    >>> import torch
    >>> from pyrovae.nets.mlp import MLP
    >>> InverseAutoregressiveFlow(MLP(4, [8]), latent_dim=2).posterior(torch.zeros(3, 4)).rsample().shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        encoder_net: nn.Module,
        latent_dim: int,
        *,
        num_transforms: int = 2,
        hidden_features: Sequence[int] = (128, 128),
        num_context: int = 64,
        num_features: int | None = None,
    ):
        super().__init__(encoder_net, latent_dim, num_features, num_context)
        self.flow = _autoregressive(latent_dim, num_context, num_transforms, hidden_features)

    def transform(self, context: Tensor) -> Transform:
        return self.flow(context)


class NeuralSplineFlow(FlowGuide):
    """Neural spline flow: each number bent by a spline that the ones before it choose.

    z = mu(x) + sigma(x) * f(epsilon; c(x)),   f = f_T o ... o f_1,
    f_t(u)_d = spline(u_d; knots_d(u_<d; c)) in [-5, 5], u_d outside,   dimensions in turn ascending and descending

    num_bins: pieces of each spline, monotonic and rational-quadratic
    num_transforms: T; hidden_features: of the masked network of each, best not below latent_dim
    num_context: how many numbers c(x) has

    It starts where `MeanFieldNormal` does. A draw and its density cost T network passes; the density of any other value
    (`DefensiveMixture`, a `VampPrior` on this guide, densities under a detached guide) costs T latent_dim passes.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,).

    Raises ValueError for counts < 1 (num_bins < 2) and if the width of the features is unknown or wrong.

    Source: Durkan, Bekasov, Murray & Papamakarios, Neural Spline Flows (2019).

    >>> import torch
    >>> from pyrovae.nets.mlp import MLP
    >>> NeuralSplineFlow(MLP(4, [8]), latent_dim=2).posterior(torch.zeros(3, 4)).rsample().shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        encoder_net: nn.Module,
        latent_dim: int,
        *,
        num_bins: int = 8,
        num_transforms: int = 2,
        hidden_features: Sequence[int] = (128, 128),
        num_context: int = 64,
        num_features: int | None = None,
    ):
        num_bins = check_count("num_bins", num_bins)
        if num_bins < 2:
            raise ValueError("a spline needs num_bins of 2 or more, found 1")
        spline = {
            "univariate": import_zuko().transforms.MonotonicRQSTransform,
            "shapes": [(num_bins,), (num_bins,), (num_bins - 1,)],
        }
        super().__init__(encoder_net, latent_dim, num_features, num_context)
        self.flow = _autoregressive(latent_dim, num_context, num_transforms, hidden_features, **spline)

    def transform(self, context: Tensor) -> Transform:
        return self.flow(context)


def _autoregressive(
    latent_dim: int, num_context: int, num_transforms: int, hidden_features: Sequence[int], **univariate: Any
) -> nn.Module:
    """Autoregressive maps (affine by default) near the identity, dimensions in turn ascending and descending."""
    for name, count in (("latent_dim", latent_dim), ("num_context", num_context), ("num_transforms", num_transforms)):
        check_count(name, count)
    for width in hidden_features:
        check_count("each of hidden_features", width)
    zuko = import_zuko()
    ascending = torch.arange(latent_dim)
    flow = zuko.lazy.LazyComposedTransform(
        *(
            zuko.flows.MaskedAutoregressiveTransform(
                latent_dim,
                num_context,
                order=ascending.flip(0) if step % 2 else ascending,
                hidden_features=hidden_features,
                activation=nn.SiLU,
                **univariate,
            )
            for step in range(num_transforms)
        )
    )
    start_near_identity(flow)
    return flow
