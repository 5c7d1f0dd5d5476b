"""Normal guides on an encoder network."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count
from pyrovae.guides.base import EncoderGuide, start_informative

__all__ = ["FullRankNormal", "LowRankNormal", "MeanFieldNormal"]


class MeanFieldNormal(EncoderGuide):
    """Normal guide with a diagonal covariance.

        q(z|x) = N(z; mu(x), diag sigma(x)^2),   (mu, log sigma) = head(encoder_net(x))

    It starts with means spread about as widely as a standard normal prior and sigma near 1/e, so that z informs the
    decoder from the first step. With sigma = 1 and means near 0 at the start, more dimensions collapse before the
    decoder learns to use them (on MNIST 15 of 40 stayed active instead of 18).

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,).

    Args:
        encoder_net: Any module data (N, *data_shape) -> features (N, num_features).
        latent_dim: D.
        num_features: Width of the features; by default the network's `out_features`.

    Raises:
        ValueError: If the width of the features is unknown or wrong.

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes (2014).

    Example:
        >>> import torch
        >>> from pyrovae.nets.mlp import MLP
        >>> MeanFieldNormal(MLP(4, [8]), latent_dim=2).posterior(torch.zeros(3, 4)).mean.shape
        torch.Size([3, 2])
    """

    def __init__(self, encoder_net: nn.Module, latent_dim: int, *, num_features: int | None = None):
        super().__init__(encoder_net, latent_dim, num_features, num_parameters=2 * latent_dim)
        start_informative(self.head, latent_dim)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        loc, log_scale = parameters.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class FullRankNormal(EncoderGuide):
    """Normal guide with a full covariance, parameterised by its Cholesky factor.

        q(z|x) = N(z; mu(x), L(x) L(x)^T),   L = diag sigma + strictly lower triangle,
        (mu, log sigma, triangle) = head(encoder_net(x))

    It starts as `MeanFieldNormal` does, with a triangle of zeros. The head has D (D + 3) / 2 outputs, 860 at D = 40.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,).

    Args:
        encoder_net: Any module data (N, *data_shape) -> features (N, num_features).
        latent_dim: D.
        num_features: Width of the features; by default the network's `out_features`.

    Raises:
        ValueError: If the width of the features is unknown or wrong.

    References:
        Kingma & Welling, An Introduction to Variational Autoencoders (2019), section 2.5.1.

    Example:
        >>> import torch
        >>> from pyrovae.nets.mlp import MLP
        >>> FullRankNormal(MLP(4, [8]), latent_dim=2).posterior(torch.zeros(3, 4)).covariance_matrix.shape
        torch.Size([3, 2, 2])
    """

    places: Tensor

    def __init__(self, encoder_net: nn.Module, latent_dim: int, *, num_features: int | None = None):
        triangle = latent_dim * (latent_dim - 1) // 2
        super().__init__(encoder_net, latent_dim, num_features, num_parameters=2 * latent_dim + triangle)
        start_informative(self.head, latent_dim)
        with torch.no_grad():
            self.head.weight[2 * latent_dim :] = 0
            self.head.bias[2 * latent_dim :] = 0
        # Positions of the diagonal, then of the triangle, in a flattened matrix.
        rows, columns = torch.tril_indices(latent_dim, latent_dim, -1)
        diagonal = torch.arange(latent_dim) * (latent_dim + 1)
        self.register_buffer("places", torch.cat([diagonal, rows * latent_dim + columns]), persistent=False)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        size = self.latent_dim
        loc, log_scale, triangle = parameters.split([size, size, parameters.shape[-1] - 2 * size], -1)
        entries = torch.cat([log_scale.exp(), triangle], -1)
        # scatter, because its gradient is a gather; assigning at pairs of indices takes six times as long
        flat = entries.new_zeros(*entries.shape[:-1], size * size).scatter(-1, self.places.expand_as(entries), entries)
        return dist.MultivariateNormal(loc, scale_tril=flat.unflatten(-1, (size, size)))


class LowRankNormal(EncoderGuide):
    """Normal guide whose covariance is diagonal plus low-rank.

        q(z|x) = N(z; mu(x), diag sigma(x)^2 + V(x) V(x)^T),   V (D, rank),   (mu, log sigma, V) = head(encoder_net(x))

    It starts close to `MeanFieldNormal`, with V small but not 0, because at 0 its expected gradient vanishes.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,).

    Args:
        encoder_net: Any module data (N, *data_shape) -> features (N, num_features).
        latent_dim: D.
        rank: Number of columns of V. The head has (2 + rank) D outputs; draws and densities cost O(D rank^2).
        num_features: Width of the features; by default the network's `out_features`.

    Raises:
        ValueError: If rank is below 1, or the width of the features is unknown or wrong.

    References:
        Ong, Nott & Smith, Gaussian Variational Approximation with a Factor Covariance Structure (2018).

    Example:
        >>> import torch
        >>> from pyrovae.nets.mlp import MLP
        >>> LowRankNormal(MLP(4, [8]), latent_dim=6, rank=2).posterior(torch.zeros(3, 4)).cov_factor.shape
        torch.Size([3, 6, 2])
    """

    def __init__(self, encoder_net: nn.Module, latent_dim: int, *, rank: int = 4, num_features: int | None = None):
        rank = check_count("rank", rank)
        super().__init__(encoder_net, latent_dim, num_features, num_parameters=(2 + rank) * latent_dim)
        self.rank = rank
        start_informative(self.head, latent_dim)
        with torch.no_grad():
            self.head.weight[2 * latent_dim :] *= 0.1

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        size = self.latent_dim
        loc, log_scale, factor = parameters.split([size, size, self.rank * size], -1)
        return dist.LowRankMultivariateNormal(loc, factor.unflatten(-1, (size, self.rank)), (2 * log_scale).exp())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, {super().extra_repr()}"
