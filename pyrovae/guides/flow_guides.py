"""Guides that are normalizing flows: noise is transformed before it is scaled and shifted as in `MeanFieldNormal`."""

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
    """Contract of a guide that is a normalizing flow: transformed noise, scaled and shifted as in `MeanFieldNormal`.

        z = mu(x) + sigma(x) * f(epsilon; c(x)),   epsilon ~ N(0, I),   (mu, log sigma, c) = head(encoder_net(x)),
        log q(z|x) = log N(epsilon; 0, I) - log |det df/depsilon| - sum log sigma

    If f starts near the identity, the guide starts as `MeanFieldNormal` does. One pass through f gives a draw and its
    density; the density of any other value needs the inverse of f.

    Args:
        encoder_net: Any module data (N, *data_shape) -> features (N, num_features).
        latent_dim: D.
        num_features: Width of the features; by default the network's `out_features`.
        num_context: Length of c(x).
    """

    def __init__(self, encoder_net: nn.Module, latent_dim: int, num_features: int | None, num_context: int):
        super().__init__(encoder_net, latent_dim, num_features, num_parameters=2 * latent_dim + num_context)
        start_informative(self.head, latent_dim)

    @abstractmethod
    def transform(self, context: Tensor) -> Transform:
        """Return f for contexts (N, num_context): a zuko transform of (..., N, latent_dim), fast forwards."""

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        zuko, size = import_zuko(), self.latent_dim
        loc, log_scale, context = parameters.split([size, size, parameters.shape[-1] - 2 * size], -1)
        affine = AffineTransform(loc, log_scale.exp(), event_dim=1)
        # Wrapped in a zuko transform that takes a context: the bare transform would count the batch as part of the
        # event.
        affine_of_x = zuko.transforms.AutoregressiveTransform(lambda _: affine, passes=1)
        to_latent = zuko.transforms.ComposedTransform(self.transform(context), affine_of_x)
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        flow = zuko.distributions.NormalizingFlow(to_latent.inv, noise)
        return FlowDistribution(flow, parameters=(parameters, *self.parameters()))

    def __repr__(self) -> str:
        with torch.random.fork_rng([]):  # zuko draws random numbers to describe itself
            return super().__repr__()


class InverseAutoregressiveFlow(FlowGuide):
    """Inverse autoregressive flow: each dimension is shifted and scaled by functions of the previous ones.

        z = mu(x) + sigma(x) * f(epsilon; c(x)),   f = f_T o ... o f_1,
        f_t(u)_d = m_d(u_<d; c) + s_d(u_<d; c) u_d,   dimensions in turn ascending and descending

    It differs from the paper in two ways: there are no gates that keep s below 1, and the encoder's mu and sigma come
    last, not first. It starts as `MeanFieldNormal` does. A draw and its density cost T network passes. The density of
    any other value (`DefensiveMixture`, a `VampPrior` on this guide, densities under a detached guide) costs
    T latent_dim passes.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,).

    Args:
        encoder_net: Any module data (N, *data_shape) -> features (N, num_features).
        latent_dim: D.
        num_transforms: T.
        hidden_features: Widths of the hidden layers of each masked network, preferably at least latent_dim.
        num_context: Length of c(x).
        num_features: Width of the features; by default the network's `out_features`.

    Raises:
        ValueError: If a count is below 1, or the width of the features is unknown or wrong.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever & Welling, Improved Variational Inference with Inverse
        Autoregressive Flow (2016).

    Example:
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
    """Neural spline flow: each dimension is transformed by a spline whose knots depend on the previous ones.

        z = mu(x) + sigma(x) * f(epsilon; c(x)),   f = f_T o ... o f_1,
        f_t(u)_d = spline(u_d; knots_d(u_<d; c)) in [-5, 5], u_d outside,   dimensions in turn ascending and descending

    It starts as `MeanFieldNormal` does. A draw and its density cost T network passes. The density of any other value
    (`DefensiveMixture`, a `VampPrior` on this guide, densities under a detached guide) costs T latent_dim passes.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,).

    Args:
        encoder_net: Any module data (N, *data_shape) -> features (N, num_features).
        latent_dim: D.
        num_bins: Number of pieces of each spline, which is monotonic and rational-quadratic.
        num_transforms: T.
        hidden_features: Widths of the hidden layers of each masked network, preferably at least latent_dim.
        num_context: Length of c(x).
        num_features: Width of the features; by default the network's `out_features`.

    Raises:
        ValueError: If a count is below 1, num_bins below 2, or the width of the features is unknown or wrong.

    References:
        Durkan, Bekasov, Murray & Papamakarios, Neural Spline Flows (2019).

    Example:
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
    """Autoregressive transforms (affine by default) near the identity, dimensions in turn ascending and descending."""
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
