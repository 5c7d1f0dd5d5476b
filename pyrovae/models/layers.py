"""Layers of latents: a normal given the layer before it, and the joint distribution of several layers."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count
from pyrovae.common.component import Component
from pyrovae.common.networks import broadcast_context, features_of, takes_context, width_of_features

__all__ = ["Chain", "ConditionalNormal"]


class ConditionalNormal(Component):
    """Normal with a diagonal covariance, given the layer before it and any other tensors.

        p(z|c) = N(z; mu(c), diag sigma(c)^2),   (mu, log sigma) = head(net(c)),   c all that is given, side by side

    Shapes: given (..., width) each, leading dimensions broadcast -> batch shape (...), event shape (latent_dim,). The
    network receives rows, so any network for batches works with any number of particles.

    In a `HierarchicalModel` that is called with a context, the network gets it as its second argument if it takes two.

    Args:
        net: any module (rows, width of c) -> features (rows, num_features); `nn.Identity()` with `num_features` leaves
            a linear layer. Or one that takes a context (rows, ...) as well, such as `pyrovae.nets.Concatenate`
        latent_dim: dimensions of z
        num_features: width of the features; by default the network's `out_features`

    Raises:
        ValueError: if the width of the features is unknown or wrong, or the network takes another width of c.

    Example:
        >>> from pyrovae.nets.mlp import MLP
        >>> ConditionalNormal(MLP(2, [8]), latent_dim=3)(torch.zeros(5, 4, 2)).mean.shape
        torch.Size([5, 4, 3])

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).
    """

    def __init__(self, net: nn.Module, latent_dim: int, *, num_features: int | None = None):
        super().__init__()
        latent_dim = check_count("latent_dim", latent_dim)
        self.net = net
        self.latent_dim = latent_dim
        self.num_features = width_of_features(net, num_features)
        self.head = nn.Linear(self.num_features, 2 * latent_dim)

    @property
    def takes_context(self) -> bool:
        """Whether the network takes a context."""
        return takes_context(self.net)

    def forward(self, *given: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return p(z|c).

        Args:
            *given: tensors (..., width) that make up c
            context: second argument of the network (N, ...), N the last dimension of c before its width
        """
        batch_shape = torch.broadcast_shapes(*(part.shape[:-1] for part in given))
        joined = torch.cat([part.expand(*batch_shape, -1) for part in given], -1)
        if context is not None:
            joined, context = broadcast_context(joined, context)
            batch_shape = joined.shape[:-1]
            context = context.reshape(-1, *context.shape[len(batch_shape) :])
        width = joined.shape[-1]
        if getattr(self.net, "in_features", width) != width:
            found = " + ".join(str(part.shape[-1]) for part in given)
            raise ValueError(
                f"the network of this layer takes {self.net.in_features} numbers (its in_features), and is given {found}: "
                f"make it for {width}"
            )
        parameters = self.head(features_of(self.net, joined.reshape(-1, width), self.num_features, context))
        loc, log_scale = parameters.reshape(*batch_shape, -1).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, {super().extra_repr()}"


class Chain(dist.TorchDistribution):
    """Joint distribution of layers z1, ..., zL, each drawn given the one drawn before it; its values lie side by side.

        top_down:  p(z1, ..., zL) = p(zL) p(z(L-1) | zL) ... p(z1 | z2);   else   p(z1) p(z2 | z1) ... p(zL | z(L-1))

    `mean` propagates means: that of each layer at the mean of the one before. It is the true mean of the layer drawn
    first, and of the others only if their conditional means are linear.

    Shapes: batch shape of `first`, event shape (sum(latent_dims),), z1 first.

    Args:
        first: distribution of the layer that is drawn first, event shape (its size,)
        conditionals: of the other layers, in the order of drawing: functions of the layer before, (..., size) ->
            distribution
        latent_dims: sizes of z1, ..., zL
        top_down: whether zL is drawn first, and not z1

    Example:
        >>> first, rest = dist.Normal(torch.zeros(1), 1.0).to_event(1), lambda z: dist.Normal(z + 2, 1.0).to_event(1)
        >>> Chain(first, [rest], (1, 1), top_down=True).mean
        tensor([2., 0.])
    """

    arg_constraints: ClassVar[dict[str, dist.constraints.Constraint]] = {}
    support = dist.constraints.real_vector

    def __init__(
        self,
        first: dist.TorchDistribution,
        conditionals: Sequence[Callable[[Tensor], dist.TorchDistribution]],
        latent_dims: Sequence[int],
        *,
        top_down: bool,
    ):
        self.first, self.conditionals = first, tuple(conditionals)
        self.latent_dims, self.top_down = tuple(latent_dims), top_down
        self.names = [f"z{number + 1}" for number in range(len(self.latent_dims))]
        super().__init__(first.batch_shape, torch.Size([sum(self.latent_dims)]), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.first.has_rsample

    def walk(self, visit: Callable[[str, dist.TorchDistribution], Tensor]) -> Tensor:
        """Visit the layers in the order of drawing.

        Args:
            visit: called as `visit("z2", distribution)`; returns the layer's value (..., its size)

        Returns:
            The values side by side, z1 first.
        """
        order = self.names[::-1] if self.top_down else self.names
        values = {order[0]: visit(order[0], self.first)}
        for (before, name), conditional in zip(pairwise(order), self.conditionals, strict=True):
            values[name] = visit(name, conditional(values[before]))
        return torch.cat([values[name] for name in self.names], -1)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "Chain":
        return Chain(self.first.expand(batch_shape), self.conditionals, self.latent_dims, top_down=self.top_down)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        expanded = self.expand(torch.Size(sample_shape) + self.batch_shape)
        return expanded.walk(lambda _, distribution: distribution.rsample())

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        expanded = self.expand(torch.Size(sample_shape) + self.batch_shape)
        return expanded.walk(lambda _, distribution: distribution.sample())

    @property
    def mean(self) -> Tensor:
        return self.walk(lambda _, distribution: distribution.mean)

    def log_prob(self, value: Tensor) -> Tensor:
        layers = dict(zip(self.names, value.split(self.latent_dims, -1), strict=True))
        terms = []

        def visit(name: str, distribution: dist.TorchDistribution) -> Tensor:
            terms.append(distribution.log_prob(layers[name]))
            return layers[name]

        self.walk(visit)
        return sum(terms)
