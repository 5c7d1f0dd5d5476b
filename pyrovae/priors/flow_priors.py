"""Priors p(z) that are normalizing flows of zuko's: a standard normal, bent by networks until it fits.

All run quick in the density's direction, as a prior is asked for the density of the guide's draws.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from torch import nn

from pyrovae.common.arguments import check_count
from pyrovae.distributions.zuko_adapter import FlowDistribution, import_zuko, start_near_identity
from pyrovae.priors.base import Prior

__all__ = ["FlowPrior", "MaskedAutoregressiveFlow", "NeuralSplineFlow", "RealNVP"]


class FlowPrior(Prior):
    """Contract of a prior that is a flow: `build` gives the flow, which starts near the standard normal.

    p(z) = N(f(z); 0, I) |det df/dz|

    latent_dim: D
    num_transforms: how many maps f is made of; one always sees the dimensions in the opposite order of the one before
    hidden_features: widths of the network in each
    """

    def __init__(self, latent_dim: int, num_transforms: int, hidden_features: Sequence[int], **sizes: int):
        super().__init__(latent_dim)
        sizes = {"num_transforms": num_transforms, **sizes}
        for name, size in (*sizes.items(), *(("each of hidden_features", width) for width in hidden_features)):
            check_count(name, size)
        self.sizes = {**sizes, "hidden_features": tuple(hidden_features)}
        common = {"transforms": num_transforms, "hidden_features": hidden_features, "activation": nn.SiLU}
        self.flow = self.build(import_zuko(), common)
        start_near_identity(self.flow)

    @abstractmethod
    def build(self, zuko: Any, common: dict[str, Any]) -> nn.Module:
        """An unconditional zuko flow in `latent_dim` dimensions; `common` are the arguments that all of them take."""

    def forward(self) -> dist.TorchDistribution:
        return FlowDistribution(self.flow(), parameters=self.flow.parameters())

    def __repr__(self) -> str:  # zuko's own draws random numbers
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        return ", ".join([*(f"{name}={value}" for name, value in self.sizes.items()), super().extra_repr()])


class NeuralSplineFlow(FlowPrior):
    """Neural spline flow as a prior: autoregressive rational-quadratic splines.

    p(z) = N(f(z); 0, I) |det df/dz|,   f = spline ∘ ... ∘ spline ∘ affine

    A spline bends [-5, 5] and leaves the rest as it is, so that tails are normal. The learned affine map before them moves
    and scales each dimension, so that the knots come to lie where the guide's draws are. In one dimension there is nothing
    to depend on, and the splines' knots themselves are learned.

    Shapes: event shape (latent_dim,). A density takes one pass per transform; a draw latent_dim passes.

    Raises ValueError or TypeError for sizes that are no whole numbers of 1 or more (bins: of 2 or more).

    Source: Durkan, Bekasov, Murray & Papamakarios, Neural Spline Flows (2019).

    >>> NeuralSplineFlow(2)
    NeuralSplineFlow(num_transforms=3, num_bins=8, hidden_features=(128, 128), latent_dim=2, 68,494 parameters)
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        num_transforms: int = 3,
        hidden_features: Sequence[int] = (128, 128),
        num_bins: int = 8,
    ):
        num_bins = check_count("num_bins", num_bins)
        if num_bins < 2:
            raise ValueError(f"num_bins must be 2 or more, found {num_bins}")
        super().__init__(latent_dim, num_transforms, hidden_features, num_bins=num_bins)

    def build(self, zuko: Any, common: dict[str, Any]) -> nn.Module:
        splines = zuko.flows.NSF(self.latent_dim, bins=self.sizes["num_bins"], **common)
        affine = zuko.flows.ElementWiseTransform(self.latent_dim)
        for constant in affine.phi:
            nn.init.zeros_(constant)
        return zuko.lazy.Flow([affine, *splines.transform.transforms], splines.base)


class MaskedAutoregressiveFlow(FlowPrior):
    """Masked autoregressive flow as a prior: each dimension is moved and scaled by what precedes it.

    p(z) = N(f(z); 0, I) |det df/dz|,   each transform  y_i = exp(a_i(z_1 ... z_(i-1))) z_i + b_i(z_1 ... z_(i-1))

    In one dimension it is a normal distribution.

    Shapes: event shape (latent_dim,). A density takes one pass per transform; a draw latent_dim passes.

    Raises ValueError or TypeError for sizes that are no whole numbers of 1 or more.

    Source: Papamakarios, Pavlakou & Murray, Masked Autoregressive Flow for Density Estimation (2017).

    >>> import torch
    >>> MaskedAutoregressiveFlow(2)().log_prob(torch.zeros(5, 2)).shape
    torch.Size([5])
    """

    def __init__(self, latent_dim: int, *, num_transforms: int = 5, hidden_features: Sequence[int] = (128, 128)):
        super().__init__(latent_dim, num_transforms, hidden_features)

    def build(self, zuko: Any, common: dict[str, Any]) -> nn.Module:
        return zuko.flows.MAF(self.latent_dim, **common)


class RealNVP(FlowPrior):
    """Flow of affine coupling layers as a prior: one half of the dimensions moves and scales the other.

    p(z) = N(f(z); 0, I) |det df/dz|,   each transform  y_b = exp(s(z_a)) z_b + t(z_a),   y_a = exp(s) z_a + t

    The halves change places from one transform to the next. The constants s and t that move and scale the first half itself
    come with zuko's masked form of a coupling layer (they do what the original's batch normalisation is for); its other
    form finds the halves' indices anew at each call, which makes a GPU wait. In one dimension it is a normal distribution.

    Shapes: event shape (latent_dim,). A density takes one pass per transform; a draw two.

    Raises ValueError or TypeError for sizes that are no whole numbers of 1 or more.

    Source: Dinh, Sohl-Dickstein & Bengio, Density Estimation Using Real NVP (2017).

    >>> RealNVP(2)().sample((5,)).shape
    torch.Size([5, 2])
    """

    def __init__(self, latent_dim: int, *, num_transforms: int = 6, hidden_features: Sequence[int] = (128, 128)):
        super().__init__(latent_dim, num_transforms, hidden_features)

    def build(self, zuko: Any, common: dict[str, Any]) -> nn.Module:
        return zuko.flows.MAF(self.latent_dim, passes=2, **common)
