"""Priors with a closed-form density: normals, mixtures of normals, VampPrior."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count
from pyrovae.common.networks import needs_context
from pyrovae.distributions.mixtures import Mixture
from pyrovae.priors.base import ConditionalPrior, Prior

__all__ = ["DiagonalNormal", "MixtureOfNormals", "StandardNormal", "VampPrior"]


class StandardNormal(Prior):
    """Standard normal prior.

        p(z) = N(z; 0, I)

    Shapes: event shape (latent_dim,). Nothing is learned.

    Args:
        latent_dim: Dimension of z.

    Raises:
        ValueError: `latent_dim` is below 1.

    Example:
        >>> StandardNormal(2)().log_prob(torch.zeros(2))
        tensor(-1.8379)

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes (2014).
    """

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.scale).to_event(1)


class DiagonalNormal(ConditionalPrior):
    """Normal prior with a learned mean and a learned diagonal covariance.

        p(z) = N(z; m, diag s^2),   or with a context network
        p(z|c) = N(z; m + a(c), diag (s exp b(c))^2),   (a, b) = head(context_net(c))

    It starts as the standard normal; with a context, near it.

    Shapes: event shape (latent_dim,). m and log s (latent_dim,) are learned.

    Args:
        latent_dim: Dimension of z.
        context_net: Any module context (N, ...) -> features (N, num_features); none by default.
        num_features: Width of the features; by default the network's `out_features`.

    Raises:
        ValueError: `latent_dim` is below 1, or the width of the features is unknown or wrong.

    Example:
        >>> DiagonalNormal(2)().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])

    References:
        Hoffman & Johnson, ELBO surgery (2016): why to learn the prior.
    """

    def __init__(self, latent_dim: int, *, context_net: nn.Module | None = None, num_features: int | None = None):
        super().__init__(latent_dim, context_net, num_features)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(latent_dim))
        if context_net is not None:
            self.head = _small_head(self.num_features, 2 * latent_dim)

    def distribution(self, features: Tensor | None) -> dist.TorchDistribution:
        loc, log_scale = self.loc, self.log_scale
        if features is not None:
            shift, log_factor = self.head(features).chunk(2, -1)
            loc, log_scale = loc + shift, log_scale + log_factor
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class MixtureOfNormals(ConditionalPrior):
    """Mixture of normals with diagonal covariances as a prior; weights, means and covariances are learned.

        p(z) = sum_k w_k N(z; m_k, diag s_k^2);   with a context network, p(z|c) of which w, m and s depend on c

    It starts with equal weights, random m_k of variance 1/4 and s_k^2 = 3/4. Thus the components differ, and on average
    over initialisations the mixture has mean 0 and covariance I.

    Shapes: event shape (latent_dim,). Logits of w (num_components,), m and log s (num_components, latent_dim) are
    learned. A density takes num_components * latent_dim numbers per value.

    Args:
        latent_dim: Dimension of z.
        num_components: Number of components.
        context_net: Any module context (N, ...) -> features (N, num_features), whose linear functions are added to the
            logits of w, to m and to log s; none by default. A draw then takes num_components * latent_dim numbers.
        num_features: Width of the features; by default the network's `out_features`.

    Raises:
        ValueError: A size is below 1, or the width of the features is unknown or wrong.

    Example:
        >>> MixtureOfNormals(2, 10)().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])

    References:
        Tomczak & Welling, VAE with a VampPrior (2018): section 3 and its comparison.
    """

    def __init__(
        self,
        latent_dim: int,
        num_components: int,
        *,
        context_net: nn.Module | None = None,
        num_features: int | None = None,
    ):
        super().__init__(latent_dim, context_net, num_features)
        num_components = check_count("num_components", num_components)
        self.num_components = num_components
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.locs = nn.Parameter(0.5 * torch.randn(num_components, latent_dim))
        self.log_scales = nn.Parameter(torch.full((num_components, latent_dim), 0.75).log() / 2)
        if context_net is not None:
            self.head = _small_head(self.num_features, num_components * (1 + 2 * latent_dim))

    def distribution(self, features: Tensor | None) -> dist.TorchDistribution:
        if features is not None:
            logits, rest = self.head(features).split([self.num_components, 2 * self.locs.numel()], -1)
            shifts, log_factors = (part.unflatten(-1, self.locs.shape) for part in rest.chunk(2, -1))
            normals = dist.Normal(self.locs + shifts, (self.log_scales + log_factors).exp()).to_event(1)
            return dist.MixtureSameFamily(dist.Categorical(logits=self.logits + logits), normals)
        locs, scales = self.locs, self.log_scales.exp()
        return Mixture(self.logits.log_softmax(-1), lambda index: dist.Normal(locs[index], scales[index]).to_event(1))

    def extra_repr(self) -> str:
        return f"num_components={self.num_components}, {super().extra_repr()}"


class VampPrior(Prior):
    """Variational mixture of posteriors: the guide's posteriors at learned pseudo-inputs, as a prior.

        p(z) = sum_k w_k q(z | u_k),   w_k = 1/K unless learned

    u_k is learned through v_k: u_k = low + (high - low) sigmoid(v_k), where low and high are the ends of `data_range`,
    moved out by 5 % of its width on either side. Therefore pseudo-inputs start exactly as given, including black and
    white pixels, stay near data that the encoder has seen, and always have a gradient.

    Pseudo-inputs have no context, so the guide's network must do without one; a guide that needs one is refused.

    The guide's networks see K more data at each call, as a separate batch. The density of a value takes K densities of
    the guide. A flow with fast draws whose density needs an inversion (`InverseAutoregressiveFlow`) takes latent_dim
    passes for each of these; here, use a guide whose density is fast. Each draw chooses one component and takes one
    pass of the guide. Draws have no gradient (`has_rsample` is False). The mean is the weighted mean of the guide's
    means.

    Shapes: event shape (latent_dim,).

    Args:
        guide: Any guide with `latent_dim` and `posterior(x)`, which returns a distribution with a density. It is
            shared, not copied: its parameters are also the prior's, are counted once, and are trained by both.
        pseudo_inputs: Initial u, (K, *data_shape), for example a sample of the training data.
        learn_weights: Whether to learn w too.
        data_range: Smallest and largest value that the data can have; by default those found in `pseudo_inputs`.

    Raises:
        TypeError: The guide lacks `posterior` or `latent_dim`, or `pseudo_inputs` is not a floating-point tensor.
        ValueError: The pseudo-inputs are all equal, outside `data_range`, or not finite.

    Example:
        >>> from pyrovae.guides.normals import MeanFieldNormal
        >>> from pyrovae.nets.mlp import MLP
        >>> VampPrior(MeanFieldNormal(MLP(4, [8]), latent_dim=2), torch.rand(10, 4))().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])

    References:
        Tomczak & Welling, VAE with a VampPrior (2018).
    """

    MARGIN = 0.05
    low: Tensor
    high: Tensor

    def __init__(
        self,
        guide: Any,
        pseudo_inputs: Tensor,
        *,
        learn_weights: bool = False,
        data_range: tuple[float, float] | None = None,
    ):
        if not hasattr(guide, "posterior") or not hasattr(guide, "latent_dim"):
            raise TypeError(
                f"a VampPrior needs a guide with `posterior(x)` and `latent_dim`, found {type(guide).__name__}"
            )
        if needs_context(getattr(guide, "encoder_net", None)):
            raise ValueError(
                "a VampPrior is a mixture of the guide's posteriors at pseudo-inputs, which have no context, and this "
                "guide's network needs one: use a guide q(z|x) without it, or another prior with context_net="
            )
        super().__init__(guide.latent_dim)
        if not isinstance(pseudo_inputs, Tensor) or not pseudo_inputs.is_floating_point():
            kind = pseudo_inputs.dtype if isinstance(pseudo_inputs, Tensor) else type(pseudo_inputs).__name__
            raise TypeError(f"pseudo_inputs must be a floating-point tensor (K, *data_shape), found {kind}")
        if pseudo_inputs.ndim < 2 or len(pseudo_inputs) < 1 or not pseudo_inputs.isfinite().all():
            raise ValueError(
                f"pseudo_inputs must be finite, of shape (K, *data_shape), found shape {tuple(pseudo_inputs.shape)}"
            )
        found = pseudo_inputs.min().item(), pseudo_inputs.max().item()
        low, high = found if data_range is None else data_range
        if not low <= found[0] <= found[1] <= high or not low < high:
            raise ValueError(
                f"pseudo_inputs lie in [{found[0]:g}, {found[1]:g}], data in [{low:g}, {high:g}]: pass a data_range that "
                f"contains the pseudo_inputs and whose ends differ"
            )
        self.guide = guide
        self.num_components = len(pseudo_inputs)
        margin = self.MARGIN * (high - low)
        # As buffers, they are in the checkpoint: a VampPrior made from other data loads the same pseudo-inputs.
        self.register_buffer("low", pseudo_inputs.new_tensor(low - margin))
        self.register_buffer("high", pseudo_inputs.new_tensor(high + margin))
        unit = (pseudo_inputs.detach() - self.low) / (self.high - self.low)
        self.unconstrained = nn.Parameter(unit.logit())
        logits = torch.zeros(len(pseudo_inputs), dtype=pseudo_inputs.dtype, device=pseudo_inputs.device)
        if learn_weights:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits, persistent=False)

    @property
    def pseudo_inputs(self) -> Tensor:
        """The current u, (K, *data_shape)."""
        return self.low + (self.high - self.low) * self.unconstrained.sigmoid()

    def forward(self) -> dist.TorchDistribution:
        pseudo_inputs = self.pseudo_inputs
        return Mixture(self.logits.log_softmax(-1), lambda index: self.guide.posterior(pseudo_inputs[index]))

    def extra_repr(self) -> str:
        return f"num_components={self.num_components}, {super().extra_repr()}"


def _small_head(num_features: int, num_outputs: int) -> nn.Linear:
    """A linear map of features whose outputs start small, so that p(z|c) starts near p(z)."""
    head = nn.Linear(num_features, num_outputs, bias=False)
    with torch.no_grad():
        head.weight *= 0.1
    return head
