"""Models with two or more layers of latents, and their guides. Layers are sites z1 (nearest the data), z2, ..., zL.

    model       p(zL) p(z(L-1) | zL) ... p(z1 | z2) p(x | z1)
    bottom-up   q(z1 | x) q(z2 | z1) ... q(zL | z(L-1))            guide of Burda et al. (2016)
    top-down    q(zL | x) q(z(L-1) | zL, x) ... q(z1 | z2, x)      guide of Tomczak & Welling (2018), for a VampPrior

If one tensor z holds all layers (`decode`, `posterior`), they lie side by side, z1 first.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.common.networks import features_of, given, takes_keyword, width_of_features
from pyrovae.guides.base import Guide
from pyrovae.guides.normals import MeanFieldNormal
from pyrovae.likelihoods.base import Likelihood
from pyrovae.likelihoods.pixelwise import Bernoulli
from pyrovae.models.generative import LatentVariableModel, check_decoder, likelihood_given, prior_at
from pyrovae.models.layers import Chain, ConditionalNormal
from pyrovae.nets.mlp import MLP
from pyrovae.priors.base import Prior
from pyrovae.priors.densities import StandardNormal
from pyrovae.programs.reach import evaluation_mode

__all__ = ["BottomUpGuide", "HierarchicalModel", "TopDownGuide", "two_layer_vae"]

Visit = Callable[[str, dist.TorchDistribution], Tensor]


class HierarchicalModel(LatentVariableModel):
    """Latent-variable model of L layers, run as a Pyro model.

        p(x, z1, ..., zL) = p(zL) p(z(L-1) | zL) ... p(z1 | z2) p(x | z1),   or p(x | z1, ..., zL) with `skip`

    As a Pyro program, `model(x)` has plate "data" (dim -1), sites "z1", ..., "zL", and site "x" (observed).

    Shapes: x (N, *data_shape); zl (N, latent_dims[l - 1]); z, all layers, (N, latent_dim).

    Args:
        prior: p(zL), any prior (a VampPrior takes the `top` of a `TopDownGuide`)
        layers: p(z(L-1) | zL), ..., p(z1 | z2), in the order of drawing: modules, such as `ConditionalNormal`, that
            have a `latent_dim` and map (..., size of the layer before) to a distribution. A layer gets the context, if
            there is one, by the keyword `context`: a `ConditionalNormal` whose network takes two arguments, or any
            other module whose `forward` has that argument
        likelihood: its network takes z1; with `skip`, all layers side by side, z1 first
        skip: condition the data on all layers

    Raises:
        ValueError: without a layer, and for data of the wrong shape or outside the likelihood's support.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).
        Tomczak & Welling, VAE with a VampPrior (2018), for `skip`.
    """

    def __init__(self, prior: Prior, layers: Sequence[nn.Module], likelihood: Likelihood, *, skip: bool = False):
        super().__init__(prior, likelihood)
        self.layers = nn.ModuleList(_checked(layers))
        self.latent_dims = _latent_dims(*reversed(self.layers), prior)
        self.latent_dim = sum(self.latent_dims)
        self.skip = skip
        check_decoder(likelihood, self.latent_dim if skip else self.latent_dims[0])

    def latent_prior(self, context: Tensor | None = None) -> Chain:
        """Return p(z1, ..., zL): batch shape (), or (N,) if the prior takes the context; event shape (latent_dim,)."""
        layers: list[Callable] = list(self.layers)
        if context is not None:
            layers = [partial(layer, context=context) if _takes_context(layer) else layer for layer in layers]
        return Chain(prior_at(self.prior, context)[0], layers, self.latent_dims, top_down=True)

    def latents(self, visit: Visit, context: Tensor | None = None) -> Tensor:
        return self.latent_prior(context).walk(visit)

    def likelihood_at(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return likelihood_given(self.likelihood, z if self.skip else z[..., : self.latent_dims[0]], context)

    def uses_context(self) -> bool:
        return super().uses_context() or any(map(_takes_context, self.layers))

    @torch.no_grad()
    def decode(self, z: Tensor, *, mean: bool = True, context: Tensor | int | None = None) -> Tensor:
        """Return the data for given latents: E[x|z], or a draw from p(x|z).

        Args:
            z: all layers side by side, z1 first, (..., latent_dim); or only the upper ones, for instance zL alone,
                (..., size of the upper layers). The layers below these take their conditional means, or are drawn with
                `mean=False`
            mean: return E[x|z] instead of a draw
            context: what the model is conditioned on (N, ...), N the last dimension of z before its width

        Returns:
            (..., *data_shape).

        Raises:
            ValueError: for any other width.
        """
        z = self._codes(z)
        widths = [sum(self.latent_dims[below:]) for below in range(len(self.latent_dims))]
        if z.shape[-1] not in widths:
            raise ValueError(
                f"expected latents of width {widths[0]} (layers of {self.latent_dims}), or {widths[1:]} for the upper layers "
                f"alone; found {z.shape[-1]}"
            )
        below = widths.index(z.shape[-1])
        context = None if context is None else self._tensor_of(context)
        if below == 0:
            return super().decode(z, mean=mean, context=context)
        known = {f"z{below + 1 + i}": layer for i, layer in enumerate(z.split(self.latent_dims[below:], -1))}

        def visit(name: str, distribution: dist.TorchDistribution) -> Tensor:
            if name in known:
                return known[name]
            return distribution.mean if mean else distribution.sample()

        more, _ = given(context)
        with evaluation_mode(self):
            return self._data(self.latents(visit, *more), mean, *more)

    def extra_repr(self) -> str:
        return f"latent_dims={self.latent_dims}, skip={self.skip}, {super().extra_repr()}"


class _HierarchicalGuide(Guide):
    """Contract of a guide whose distribution is a `Chain`, with one site per layer."""

    def __init__(self, latent_dims: Sequence[int]):
        super().__init__(sum(latent_dims))
        self.latent_dims = tuple(latent_dims)

    @abstractmethod
    def distribution(self, parameters: Tensor) -> Chain:
        """Return q(z1, ..., zL) from its parameters (N, P): batch shape (N,), event shape (latent_dim,)."""

    def latents(self, parameters: Tensor, visit: Visit) -> Tensor:
        return self.distribution(parameters).walk(visit)

    def extra_repr(self) -> str:
        return f"latent_dims={self.latent_dims}, {super().extra_repr()}"


class BottomUpGuide(_HierarchicalGuide):
    """Guide that goes up from the data.

        q(z1, ..., zL | x) = q(z1 | x) q(z2 | z1) ... q(zL | z(L-1))

    Of the layers only q(z1|x) has a density of its own: a VampPrior on top requires a `TopDownGuide`.

    As a Pyro guide, `guide(x)` has plate "data" (dim -1) and sites "z1", ..., "zL"; it encodes as `bottom` does. A
    context reaches q(z1|x) alone.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,), z1 first. Its `.mean` propagates means
    through the layers.

    Args:
        bottom: q(z1|x), any guide
        layers: q(z2 | z1), ..., q(zL | z(L-1)), modules like those of `HierarchicalModel`

    Raises:
        ValueError: without a layer.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).
    """

    def __init__(self, bottom: Guide, layers: Sequence[nn.Module]):
        super().__init__(_latent_dims(bottom, *_checked(layers)))
        self.bottom = bottom
        self.layers = nn.ModuleList(layers)

    def encode(self, x: Tensor, context: Tensor | None = None, *, observed: Tensor | None = None) -> Tensor:
        more, options = given(context, observed)
        return self.bottom.encode(x, *more, **options)

    def distribution(self, parameters: Tensor) -> Chain:
        return Chain(self.bottom.distribution(parameters), list(self.layers), self.latent_dims, top_down=False)


class TopDownGuide(_HierarchicalGuide):
    """Guide that goes down from the top layer, as the model does.

        q(z1, ..., zL | x) = q(zL | x) q(z(L-1) | zL, h) ... q(z1 | z2, h),   h = encoder_net(x)

    As a Pyro guide, `guide(x)` has plate "data" (dim -1) and sites "z1", ..., "zL"; its encoding is that of `top`, then
    h.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,), z1 first. Its `.mean` propagates means
    through the layers.

    Args:
        top: q(zL|x), any guide. It has a density of its own: `VampPrior(guide.top, pseudo_inputs)`
        layers: q(z(L-1) | zL, h), ..., q(z1 | z2, h): modules, such as `ConditionalNormal` (its network takes both
            widths together), that have a `latent_dim` and map (..., size of the layer before) and (N, num_features) to
            a distribution
        encoder_net: any module data (N, *data_shape) -> h (N, num_features); may be that of `top`
        num_features: width of h; by default the network's `out_features`

    Raises:
        ValueError: without a layer, and if the width of the features is unknown or wrong.

    Example:
        >>> top = MeanFieldNormal(MLP(784, [300, 300]), latent_dim=40)
        >>> TopDownGuide(top, [ConditionalNormal(MLP(40 + 300, [300]), 40)], MLP(784, [300])).latent_dims
        (40, 40)

    References:
        Tomczak & Welling, VAE with a VampPrior (2018).
    """

    def __init__(
        self, top: Guide, layers: Sequence[nn.Module], encoder_net: nn.Module, *, num_features: int | None = None
    ):
        super().__init__(_latent_dims(*reversed(_checked(layers)), top))
        self.top = top
        self.layers = nn.ModuleList(layers)
        self.encoder_net = encoder_net
        self.num_features = width_of_features(encoder_net, num_features)

    def encode(self, x: Tensor, context: Tensor | None = None, *, observed: Tensor | None = None) -> Tensor:
        more, options = given(context, observed)
        features = features_of(self.encoder_net, x, self.num_features, context, observed)
        return torch.cat([self.top.encode(x, *more, **options), features], -1)

    def distribution(self, parameters: Tensor) -> Chain:
        of_top, features = parameters[..., : -self.num_features], parameters[..., -self.num_features :]
        conditionals = [lambda before, layer=layer: layer(before, features) for layer in self.layers]
        return Chain(self.top.distribution(of_top), conditionals, self.latent_dims, top_down=True)


def two_layer_vae(
    data_shape: Sequence[int] = (1, 28, 28),
    *,
    latent_dims: tuple[int, int] = (100, 50),
    hidden_features: tuple[int, int] = (200, 100),
    activation: Callable[[], nn.Module] = nn.Tanh,
    prior: Prior | None = None,
    data_mean: Tensor | None = None,
) -> tuple[HierarchicalModel, BottomUpGuide]:
    """Return the model of two stochastic layers of Burda et al. and its guide, for binary data.

        p(z2) p(z1|z2) p(x|z1),  q(z1|x) q(z2|z1),
        x 784 - 200 - 200 - z1 100 - 100 - 100 - z2 50, and the same way back

    Sizes and activations are the paper's; the initial weights are this library's.

    Args:
        data_shape: shape of one datum
        latent_dims: sizes of z1 and z2
        hidden_features: widths of the two hidden layers between x and z1, and of the two between z1 and z2
        activation: makes the activation of the hidden layers
        prior: p(z2); standard normal by default
        data_mean: see `Bernoulli`

    Returns:
        (model, guide).

    Example:
        >>> model, guide = two_layer_vae()
        >>> model(torch.zeros(3, 1, 28, 28)).shape, guide(torch.zeros(3, 1, 28, 28)).shape
        (torch.Size([3, 1, 28, 28]), torch.Size([3, 150]))

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016), section 5.
    """
    (size1, size2), (near_data, near_top) = latent_dims, hidden_features
    data_dim = torch.Size(data_shape).numel()

    def net(in_features: int, width: int, out_features: int | None = None) -> MLP:
        return MLP(in_features, [width, width], out_features, activation=activation)

    model = HierarchicalModel(
        StandardNormal(size2) if prior is None else prior,
        [ConditionalNormal(net(size2, near_top), size1)],
        Bernoulli(net(size1, near_data, data_dim), data_shape, data_mean=data_mean),
    )
    guide = BottomUpGuide(
        MeanFieldNormal(net(data_dim, near_data), size1), [ConditionalNormal(net(size1, near_top), size2)]
    )
    return model, guide


def _takes_context(layer: Any) -> bool:
    """Whether a layer takes a context by keyword, and uses it if it says so."""
    return takes_keyword(layer, "context") and getattr(layer, "takes_context", True)


def _latent_dims(*parts: Any) -> tuple[int, ...]:
    return tuple(part.latent_dim for part in parts)


def _checked(layers: Sequence[nn.Module]) -> Sequence[nn.Module]:
    if len(layers) == 0:
        raise ValueError("a hierarchy needs at least one layer between the top latents and the data, found none")
    return layers
