"""Normalizing flows: zuko's behind one adapter, as distributions that Pyro can use.

A flow is an invertible map between z and noise. An autoregressive one is quick in one direction and takes a pass per
dimension in the other; which of them drawing takes, and which the density, is up to who builds the flow.
"""

import importlib
import sys
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

__all__ = ["FlowDistribution", "import_zuko", "start_near_identity", "support_of_flow"]

_MEAN_DRAWS, _MEAN_ROWS = 128, 2**14


def import_zuko() -> Any:
    """zuko, with torch's distributions left as they were: its import switches their validation off, for everyone."""
    if "zuko" in sys.modules:
        return sys.modules["zuko"]
    base: Any = torch.distributions.Distribution
    before = base._validate_args, base.__dict__["arg_constraints"]
    try:
        zuko = importlib.import_module("zuko")
    finally:
        base._validate_args, base.arg_constraints = before
    # zuko's own distributions have no constraints, and torch warns of that where it validates: they keep what zuko set.
    for name in zuko.distributions.__all__:
        kind = getattr(zuko.distributions, name)
        if not any("arg_constraints" in vars(parent) for parent in kind.__mro__ if parent is not base):
            kind.arg_constraints = {}
    return zuko


def start_near_identity(flow: nn.Module, factor: float = 0.1) -> None:
    """Shrink what the networks of an untrained zuko flow give, so that it starts near the map that changes nothing.

    factor: of the last layers' parameters; not 0, so that every parameter has a gradient from the start
    """
    with torch.no_grad():
        for name, module in flow.named_modules():
            kind = name.rpartition(".")[2]  # zuko's: a network, or constants where there is nothing to depend on
            last = module[-1] if kind == "hyper" else module if kind == "phi" else None
            for parameter in () if last is None else last.parameters():
                parameter *= factor


def support_of_flow(flow: Any) -> constraints.Constraint | None:
    """Where a zuko distribution is positive, which a `NormalizingFlow` of zuko's does not say; None if that is not known.

    A flow maps its support onto that of its noise. If both the noise and the map's codomain are all of R^D, it is the domain.
    """
    try:
        return flow.support
    except (AttributeError, NotImplementedError):
        base, transform = getattr(flow, "base", None), getattr(flow, "transform", None)
    if not isinstance(base, torch.distributions.Distribution) or transform is None:
        return None
    domain = getattr(transform, "domain", None)
    known = _is_real(getattr(base, "support", None)) and _is_real(getattr(transform, "codomain", None))
    return domain if known and isinstance(domain, constraints.Constraint) else None


def _is_real(constraint: Any) -> bool:
    while isinstance(constraint, torch.distributions.constraints.independent):
        constraint = constraint.base_constraint
    return isinstance(constraint, type(constraints.real))


class FlowDistribution(dist.TorchDistribution):
    """A zuko flow as a Pyro distribution.

    log p(z) = log p_noise(f(z)) + log |det df/dz|;   a draw is z = f^-1(noise)

    flow: a `zuko.distributions.NormalizingFlow`: what a zuko flow gives when called with its context, or with none
    parameters: those of the flow's networks, so that a change of them between draw and density is noticed
    support: where the density is positive; the default suits flows on all of R^D

    The density of a draw is computed with it, and given again when `log_prob` is asked for that very tensor, as Pyro does:
    so an autoregressive flow drawn from in its quick direction is not inverted, which would take D passes. It is computed
    afresh for any other tensor, be its values equal; where a gradient is wanted and the draw was made without (`sample`:
    the value is then a constant); and where value or parameters have changed in place since. With `rsample` it has the
    whole gradient, through the value and directly; for the direct part alone, ask for the density of a detached copy.

    `mean` is the average of 128 draws, differentiable. Their noise is spread evenly (a Latin hypercube and its mirror
    image: exact where f is affine), always the same, and the same for each datum of a batch: the mean is no function of
    the random state or of the batch, and nothing is drawn from torch's generator.

    Shapes: contexts (N, C) give batch shape (N,), event shape (D,); values (..., N, D) have densities (..., N).

    Source: Papamakarios et al., Normalizing Flows for Probabilistic Modeling and Inference (2021).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        flow: Any,
        *,
        parameters: Iterable[Tensor] = (),
        support: constraints.Constraint = constraints.real_vector,
        validate_args: bool | None = None,
    ):
        self.flow = flow
        self._parameters = tuple(parameters)
        self._support = support
        self._last_draw: _Draw | None = None
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return self._support

    @property
    def has_rsample(self) -> bool:
        return self.flow.base.has_rsample

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> "FlowDistribution":
        return FlowDistribution(
            self.flow.expand(torch.Size(batch_shape)),
            parameters=self._parameters,
            support=self._support,
            validate_args=self.__dict__.get("_validate_args"),
        )

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if not self.has_rsample:
            raise NotImplementedError(f"the noise of this flow ({self.flow.base}) is not reparameterised: use `sample`")
        return self._draw(sample_shape)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._draw(sample_shape)

    def _draw(self, sample_shape: Sequence[int]) -> Tensor:
        value, log_prob = self.flow.rsample_and_log_prob(torch.Size(sample_shape))
        # Tensors made in inference mode do not say whether they were changed.
        known = not any(tensor.is_inference() for tensor in (value, *self._parameters))
        state = self._state(value) if known else None
        self._last_draw = _Draw(value, log_prob, torch.is_grad_enabled(), state)
        return value

    def _state(self, value: Tensor) -> tuple:
        """What must be as it was for a density to be given again."""
        return value.requires_grad, *(tensor._version for tensor in (value, *self._parameters))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        last = self._last_draw
        if last is None or value is not last.value or last.state is None or last.state != self._state(value):
            return self._log_prob_afresh(value)
        if torch.is_grad_enabled():
            return last.log_prob if last.with_gradient else self._log_prob_afresh(value)
        return last.log_prob.detach()

    def _log_prob_afresh(self, value: Tensor) -> Tensor:
        # zuko's affine transforms do not spread one value over several contexts.
        return self.flow.log_prob(
            value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        )

    @property
    def mean(self) -> Tensor:
        batch_shape, event_shape = self.batch_shape, self.event_shape
        noise = self.flow.base.base_dist  # of independent numbers, or it would have no `icdf`
        points = torch.as_tensor(_spread_points(_MEAN_DRAWS, event_shape.numel())).to(noise.mean)
        points = points.reshape(_MEAN_DRAWS, *[1] * len(batch_shape), *event_shape)
        chunks = points.split(max(1, _MEAN_ROWS // max(1, batch_shape.numel())))
        total = reduce(add, (self.flow.transform.inv(noise.icdf(some)).sum(0) for some in chunks))
        return total / _MEAN_DRAWS

    def __repr__(self) -> str:
        return f"FlowDistribution(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"


def _spread_points(num_points: int, num_dims: int) -> np.ndarray:
    """Points in the unit cube: one in each of the slices of each dimension, and their mirror images in its middle."""
    generator = np.random.default_rng(0)  # NumPy's, as what torch draws in a recording would be drawn at each call
    slices = np.tile(np.arange(num_points // 2)[:, None], num_dims)
    points = (generator.permuted(slices, axis=0) + generator.random(slices.shape)) / len(slices)
    return np.concatenate([points, 1 - points])


class _Draw(NamedTuple):
    value: Tensor
    log_prob: Tensor
    with_gradient: bool
    state: tuple | None
