"""Priors p(z) that are normalizing flows from zuko: a standard normal, transformed by networks.

All have fast densities, because a prior evaluates the density of the guide's draws.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from pyrovae.common.arguments import check_count
from pyrovae.distributions.zuko_adapter import FlowDistribution, import_zuko, start_near_identity
from pyrovae.priors.base import ConditionalPrior

__all__ = ["FlowPrior", "MaskedAutoregressiveFlow", "NeuralSplineFlow", "RealNVP"]


class FlowPrior(ConditionalPrior):
    """Contract of a prior that is a flow: `build` returns the flow, which then starts near the standard normal.

        p(z) = N(f(z); 0, I) |det df/dz|,   or with a context network
        p(z|c) = N(f(z; h); 0, I) |det df/dz|,   h = context_net(c)

    Args:
        latent_dim: D.
        num_transforms: Number of maps that f consists of. Each sees the dimensions in the reverse order of the one
            before.
        hidden_features: Widths of the hidden layers in each map's network.
        context_net: Any module context (N, ...) -> features (N, num_features), which every map's network then gets;
            none by default.
        num_features: Width of the features; by default the network's `out_features`.
        **sizes: Further sizes, checked and shown with the others.

    Raises:
        ValueError: A size is below 1.
        TypeError: A size is not a whole number.
    """

    def __init__(
        self,
        latent_dim: int,
        num_transforms: int,
        hidden_features: Sequence[int],
        *,
        context_net: nn.Module | None = None,
        num_features: int | None = None,
        **sizes: int,
    ):
        super().__init__(latent_dim, context_net, num_features)
        sizes = {"num_transforms": num_transforms, **sizes}
        for name, size in (*sizes.items(), *(("each of hidden_features", width) for width in hidden_features)):
            check_count(name, size)
        self.sizes = {**sizes, "hidden_features": tuple(hidden_features)}
        common = {"transforms": num_transforms, "hidden_features": hidden_features, "activation": nn.SiLU}
        if context_net is not None:
            common["context"] = self.num_features
        self.flow = self.build(import_zuko(), common)
        start_near_identity(self.flow)

    @abstractmethod
    def build(self, zuko: Any, common: dict[str, Any]) -> nn.Module:
        """Return a zuko flow in `latent_dim` dimensions.

        Args:
            zuko: The library.
            common: Arguments that all of zuko's flows take; `context`, the width of the features, with a context
                network only.
        """

    def distribution(self, features: Tensor | None) -> dist.TorchDistribution:
        if features is None:
            return FlowDistribution(self.flow(), parameters=self.flow.parameters())
        return FlowDistribution(self.flow(features), parameters=(features, *self.flow.parameters()))

    def __repr__(self) -> str:  # zuko's own __repr__ draws random numbers
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        return ", ".join([*(f"{name}={value}" for name, value in self.sizes.items()), super().extra_repr()])


class NeuralSplineFlow(FlowPrior):
    """Neural spline flow as a prior: autoregressive rational-quadratic splines.

        p(z) = N(f(z); 0, I) |det df/dz|,   f = spline ∘ ... ∘ spline ∘ affine

    A spline transforms [-5, 5] and is the identity outside, so that the tails are normal. The learned affine map before
    the splines shifts and scales each dimension, which brings the guide's draws to the splines' knots. With latent_dim
    = 1 there is nothing to condition on, and the knots themselves are learned.

    Shapes: event shape (latent_dim,). A density takes one pass per transform; a draw takes latent_dim passes.

    Args:
        latent_dim: Dimension of z.
        num_transforms: Number of splines.
        hidden_features: Widths of the hidden layers in each spline's network.
        num_bins: Bins of a spline, 2 or more.
        context_net: Makes it p(z|c): any module context (N, ...) -> features (N, num_features).
        num_features: Width of the features; by default the network's `out_features`.

    Raises:
        ValueError: A size is below 1, `num_bins` is below 2, or the width of the features is unknown or wrong.
        TypeError: A size is not a whole number.

    Example:
        >>> NeuralSplineFlow(2)
        NeuralSplineFlow(num_transforms=3, num_bins=8, hidden_features=(128, 128), latent_dim=2, 68,494 parameters)

    References:
        Durkan, Bekasov, Murray & Papamakarios, Neural Spline Flows (2019).
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        num_transforms: int = 3,
        hidden_features: Sequence[int] = (128, 128),
        num_bins: int = 8,
        context_net: nn.Module | None = None,
        num_features: int | None = None,
    ):
        num_bins = check_count("num_bins", num_bins)
        if num_bins < 2:
            raise ValueError(f"num_bins must be 2 or more, found {num_bins}")
        super().__init__(
            latent_dim,
            num_transforms,
            hidden_features,
            context_net=context_net,
            num_features=num_features,
            num_bins=num_bins,
        )

    def build(self, zuko: Any, common: dict[str, Any]) -> nn.Module:
        splines = zuko.flows.NSF(self.latent_dim, bins=self.sizes["num_bins"], **common)
        affine = zuko.flows.ElementWiseTransform(self.latent_dim, common.get("context", 0))
        for constant in () if self.takes_context else affine.phi:
            nn.init.zeros_(constant)
        return zuko.lazy.Flow([affine, *splines.transform.transforms], splines.base)


class MaskedAutoregressiveFlow(FlowPrior):
    """Masked autoregressive flow as a prior: each dimension is shifted and scaled depending on those before it.

        p(z) = N(f(z); 0, I) |det df/dz|,   each transform  y_i = exp(a_i(z_1 ... z_(i-1))) z_i + b_i(z_1 ... z_(i-1))

    With latent_dim = 1 it is a normal distribution.

    Shapes: event shape (latent_dim,). A density takes one pass per transform; a draw takes latent_dim passes.

    Args:
        latent_dim: Dimension of z.
        num_transforms: Number of transforms.
        hidden_features: Widths of the hidden layers in each transform's network.
        context_net: Makes it p(z|c): any module context (N, ...) -> features (N, num_features).
        num_features: Width of the features; by default the network's `out_features`.

    Raises:
        ValueError: A size is below 1, or the width of the features is unknown or wrong.
        TypeError: A size is not a whole number.

    Example:
        >>> import torch
        >>> MaskedAutoregressiveFlow(2)().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])

    References:
        Papamakarios, Pavlakou & Murray, Masked Autoregressive Flow for Density Estimation (2017).
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        num_transforms: int = 5,
        hidden_features: Sequence[int] = (128, 128),
        context_net: nn.Module | None = None,
        num_features: int | None = None,
    ):
        super().__init__(
            latent_dim, num_transforms, hidden_features, context_net=context_net, num_features=num_features
        )

    def build(self, zuko: Any, common: dict[str, Any]) -> nn.Module:
        return zuko.flows.MAF(self.latent_dim, **common)


class RealNVP(FlowPrior):
    """Flow of affine coupling layers as a prior: one half of the dimensions shifts and scales the other half.

        p(z) = N(f(z); 0, I) |det df/dz|,   each transform  y_b = exp(s(z_a)) z_b + t(z_a),   y_a = exp(s) z_a + t

    The halves swap from one transform to the next. The constants s and t, which shift and scale the first half, come
    with zuko's masked form of a coupling layer; they replace the batch normalisation of the original. zuko's other form
    computes the indices of the halves at each call, which makes a GPU wait. With latent_dim = 1 the prior is a normal
    distribution.

    Shapes: event shape (latent_dim,). A density takes one pass per transform; a draw takes two.

    Args:
        latent_dim: Dimension of z.
        num_transforms: Number of coupling layers.
        hidden_features: Widths of the hidden layers in each transform's network.
        context_net: Makes it p(z|c): any module context (N, ...) -> features (N, num_features).
        num_features: Width of the features; by default the network's `out_features`.

    Raises:
        ValueError: A size is below 1, or the width of the features is unknown or wrong.
        TypeError: A size is not a whole number.

    Example:
        >>> RealNVP(2)().sample((5,)).shape
        torch.Size([5, 2])

    References:
        Dinh, Sohl-Dickstein & Bengio, Density Estimation Using Real NVP (2017).
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        num_transforms: int = 6,
        hidden_features: Sequence[int] = (128, 128),
        context_net: nn.Module | None = None,
        num_features: int | None = None,
    ):
        super().__init__(
            latent_dim, num_transforms, hidden_features, context_net=context_net, num_features=num_features
        )

    def build(self, zuko: Any, common: dict[str, Any]) -> nn.Module:
        return zuko.flows.MAF(self.latent_dim, passes=2, **common)
