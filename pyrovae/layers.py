"""Layers of latents: a normal given the layer before, and the joint distribution of several layers."""

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.modules import check_count

__all__ = ["Chain", "ConditionalNormal"]


class ConditionalNormal(nn.Module):
    """Normal with a diagonal covariance, given the layer before (and whatever else is given).

    p(z|c) = N(z; mu(c), diag sigma(c)^2),   (mu, log sigma) = head(net(c)),   c all that is given, side by side

    net: any module (rows, given_dim) -> features (rows, num_features); `nn.Identity()` with num_features=given_dim
        leaves a linear layer
    given_dim, latent_dim: how many numbers c and z have
    num_features: width of the features; by default the network's `out_features`

    Shapes: given (..., width) each, widths adding up to given_dim, leading dimensions broadcast -> batch shape (...),
    event shape (latent_dim,). The network is fed rows, so that any network for batches works under any number of particles.

    Raises ValueError if the widths of the network and of what is given do not fit.

    Source: Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016).

    >>> from pyrovae.nets import MLP
    >>> ConditionalNormal(MLP(2, [8]), given_dim=2, latent_dim=3)(torch.zeros(5, 4, 2)).mean.shape
    torch.Size([5, 4, 3])
    """

    def __init__(self, net: nn.Module, given_dim: int, latent_dim: int, *, num_features: int | None = None):
        super().__init__()
        check_count("given_dim", given_dim)
        check_count("latent_dim", latent_dim)
        check_input_width("the network of a ConditionalNormal", net, "given_dim", given_dim)
        self.net = net
        self.given_dim = given_dim
        self.latent_dim = latent_dim
        self.num_features = width_of_features(net, num_features)
        self.head = nn.Linear(self.num_features, 2 * latent_dim)

    def forward(self, *given: Tensor) -> dist.TorchDistribution:
        """p(z|c) for what is given: tensors (..., width)."""
        batch_shape = torch.broadcast_shapes(*(part.shape[:-1] for part in given))
        joined = torch.cat([part.expand(*batch_shape, part.shape[-1]) for part in given], -1)
        if joined.shape[-1] != self.given_dim:
            widths = " + ".join(str(part.shape[-1]) for part in given)
            raise ValueError(f"this layer is given {self.given_dim} numbers (given_dim), found {widths}")
        features = self.net(joined.reshape(-1, self.given_dim))
        if features.shape != (math.prod(batch_shape), self.num_features):
            raise ValueError(
                f"the network must give features ({math.prod(batch_shape)}, {self.num_features}), found "
                f"{tuple(features.shape)}: flatten its output, or set num_features="
            )
        loc, log_scale = self.head(features).reshape(*batch_shape, 2 * self.latent_dim).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def extra_repr(self) -> str:
        return f"given_dim={self.given_dim}, latent_dim={self.latent_dim}"


class Chain(dist.TorchDistribution):
    """Joint distribution of layers z1, ..., zL, each drawn given the one drawn before it; its values lie side by side.

    top_down:  p(z1, ..., zL) = p(zL) p(z(L-1) | zL) ... p(z1 | z2);   else   p(z1) p(z2 | z1) ... p(zL | z(L-1))

    first: distribution of the layer that is drawn first, event shape (D,)
    conditionals: of the other layers, in the order of drawing: functions layer before (..., D) -> distribution
    latent_dims: sizes of z1, ..., zL

    Shapes: batch shape of `first`, event shape (sum(latent_dims),), z1 first.

    `mean` passes means along: the mean of each layer at the mean of the one before. For layers after the first it is
    the true mean only where the conditional means are linear.

    >>> first, rest = dist.Normal(torch.zeros(1), 1.0).to_event(1), lambda z: dist.Normal(z + 2, 1.0).to_event(1)
    >>> Chain(first, [rest], (1, 1), top_down=True).mean
    tensor([2., 0.])
    """

    arg_constraints = {}
    support = dist.constraints.real_vector

    def __init__(
        self,
        first: dist.TorchDistribution,
        conditionals: Sequence[Callable[[Tensor], dist.TorchDistribution]],
        latent_dims: Sequence[int],
        *,
        top_down: bool,
    ):
        self.first, self.conditionals, self.top_down = first, tuple(conditionals), top_down
        self.latent_dims = tuple(latent_dims)
        self.has_rsample = first.has_rsample
        super().__init__(first.batch_shape, torch.Size([sum(self.latent_dims)]), validate_args=False)

    def walk(self, visit: Callable[[int, dist.TorchDistribution], Tensor]) -> Tensor:
        """Go through the layers as they are drawn: `visit(number, distribution)` gives each its value (..., D).

        Returns the values side by side, z1 first.
        """
        count = len(self.latent_dims)
        numbers = range(count, 0, -1) if self.top_down else range(1, count + 1)
        values = {numbers[0]: visit(numbers[0], self.first)}
        for before, number, conditional in zip(numbers, numbers[1:], self.conditionals, strict=False):
            values[number] = visit(number, conditional(values[before]))
        return torch.cat([values[number] for number in sorted(values)], -1)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        expanded = self.expand(torch.Size(sample_shape) + self.batch_shape)
        return expanded.walk(lambda _, distribution: distribution.rsample())

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        expanded = self.expand(torch.Size(sample_shape) + self.batch_shape)
        return expanded.walk(lambda _, distribution: distribution.sample())

    def log_prob(self, value: Tensor) -> Tensor:
        layers = value.split(self.latent_dims, -1)
        terms = []

        def visit(number: int, distribution: dist.TorchDistribution) -> Tensor:
            terms.append(distribution.log_prob(layers[number - 1]))
            return layers[number - 1]

        self.walk(visit)
        return sum(terms[1:], terms[0])

    @property
    def mean(self) -> Tensor:
        return self.walk(lambda _, distribution: distribution.mean)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "Chain":
        return Chain(
            self.first.expand(torch.Size(batch_shape)), self.conditionals, self.latent_dims, top_down=self.top_down
        )

    def layer(self, number: int) -> dist.TorchDistribution:
        """Distribution of layer `number` on its own; without a density unless it is the layer drawn first."""
        if number == (len(self.latent_dims) if self.top_down else 1):
            return self.first
        return _Marginal(self, number)


class _Marginal(dist.TorchDistribution):
    """One layer of a chain: samples and mean, no density."""

    arg_constraints = {}
    support = dist.constraints.real_vector

    def __init__(self, chain: Chain, number: int):
        self.chain, self.number = chain, number
        self.has_rsample = chain.has_rsample
        super().__init__(chain.batch_shape, torch.Size([chain.latent_dims[number - 1]]), validate_args=False)

    def _take(self, z: Tensor) -> Tensor:
        return z.split(self.chain.latent_dims, -1)[self.number - 1]

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self._take(self.chain.rsample(sample_shape))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self._take(self.chain.sample(sample_shape))

    @property
    def mean(self) -> Tensor:
        return self._take(self.chain.mean)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "_Marginal":
        return _Marginal(self.chain.expand(batch_shape), self.number)

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError(
            f"the density of z{self.number} alone is an integral over the layers drawn before it; the joint density of all "
            f"layers is at hand: posterior(x).log_prob"
        )


def check_layer(number: int, count: int) -> None:
    """Raise unless `number` is one of the layers 1 to `count`."""
    check_count("layer", number)
    if number > count:
        raise ValueError(f"there are {count} layers, z1 (nearest the data) to z{count}; found layer {number}")


def check_input_width(whose: str, net: nn.Module, name: str, width: int) -> None:
    """Raise ValueError if a network says that it takes another number of features than it will be given."""
    takes = getattr(net, "in_features", None)
    if takes is not None and takes != width:
        raise ValueError(f"{whose} takes {takes} numbers (in_features) and would be given {width} ({name})")


def width_of_features(net: nn.Module, num_features: int | None) -> int:
    """`num_features`, or the network's `out_features`.

    Raises ValueError if neither is known.
    """
    if num_features is None:
        num_features = getattr(net, "out_features", None)
    if num_features is None:
        raise ValueError(
            f"cannot tell how many features {type(net).__name__} gives: it has no `out_features`; pass num_features="
        )
    check_count("num_features", num_features)
    return num_features
