"""An adapter that makes zuko's normalizing flows Pyro distributions.

A flow is an invertible map between z and noise. An autoregressive flow is fast in one direction and takes one pass per
dimension in the other. Whoever builds the flow decides whether draws or densities are fast.
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
    """Import zuko, and undo what its import does to torch: it disables argument validation for all distributions."""
    if "zuko" in sys.modules:
        return sys.modules["zuko"]
    base: Any = torch.distributions.Distribution
    before = base._validate_args, base.__dict__["arg_constraints"]
    try:
        zuko = importlib.import_module("zuko")
    finally:
        base._validate_args, base.arg_constraints = before
    # zuko's own distributions declare no constraints, which torch would warn about: give them the empty ones zuko set.
    for name in zuko.distributions.__all__:
        kind = getattr(zuko.distributions, name)
        if not any("arg_constraints" in vars(parent) for parent in kind.__mro__ if parent is not base):
            kind.arg_constraints = {}
    return zuko


def start_near_identity(flow: nn.Module, factor: float = 0.1) -> None:
    """Scale down the outputs of the networks in an untrained zuko flow, so that it starts near the identity map.

    Args:
        flow: The flow.
        factor: Factor of the last layers' parameters. It must not be 0: then not every parameter would have a gradient.
    """
    with torch.no_grad():
        for name, module in flow.named_modules():
            kind = name.rpartition(".")[2]  # zuko's names: `hyper` is a network, `phi` are constants in place of one
            last = module[-1] if kind == "hyper" else module if kind == "phi" else None
            for parameter in () if last is None else last.parameters():
                parameter *= factor


def support_of_flow(flow: Any) -> constraints.Constraint | None:
    """The support of a zuko distribution, or None if it is unknown. zuko's `NormalizingFlow` does not declare it.

    A flow maps its support onto that of its noise. If the noise's support and the map's codomain are all of R^D, the
    support is the map's domain.
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

    The density of a draw is computed together with the draw. `log_prob` reuses it if it gets that very tensor, as it
    does in Pyro. Therefore an autoregressive flow whose draws are fast need not be inverted, which would take D passes.
    The density is computed anew:

    - for any other tensor, even with equal values;
    - if a gradient is wanted, but the value was drawn without one (by `sample`, so that it is a constant);
    - if the value or the parameters have changed in place since the draw.

    With `rsample`, the density has the full gradient, both through the value and through the parameters directly. For
    the direct part alone, call `log_prob` with a detached copy.

    `mean` is the average of 128 draws and differentiable. Their noise is spread evenly: a Latin hypercube and its
    mirror image, so that the mean is exact if f is affine. The noise is always the same, for every datum of a batch
    too. Therefore the mean depends neither on the random state nor on the batch, and uses no random numbers of torch.

    Shapes: contexts (N, C) give batch shape (N,), event shape (D,); values (..., N, D) have densities (..., N).

    Args:
        flow: A `zuko.distributions.NormalizingFlow`, which a zuko flow returns when called with its context, or without
            one.
        parameters: Parameters of the flow's networks, watched for changes between draw and density.
        support: Support of the density; the default suits flows on all of R^D.
        validate_args: As for `torch.distributions.Distribution`.

    References:
        Papamakarios et al., Normalizing Flows for Probabilistic Modeling and Inference (2021).
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
        # Tensors made in inference mode have no version counter.
        known = not any(tensor.is_inference() for tensor in (value, *self._parameters))
        state = self._state(value) if known else None
        self._last_draw = _Draw(value, log_prob, torch.is_grad_enabled(), state)
        return value

    def _state(self, value: Tensor) -> tuple:
        """What must be unchanged to reuse a density."""
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
        # zuko's affine transforms do not broadcast one value over several contexts.
        return self.flow.log_prob(
            value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        )

    @property
    def mean(self) -> Tensor:
        batch_shape, event_shape = self.batch_shape, self.event_shape
        noise = self.flow.base.base_dist  # the elementwise distribution, which has `icdf`
        points = torch.as_tensor(_spread_points(_MEAN_DRAWS, event_shape.numel())).to(noise.mean)
        points = points.reshape(_MEAN_DRAWS, *[1] * len(batch_shape), *event_shape)
        exporting = torch.compiler.is_exporting()  # an exported program serves any batch, so none decides its chunks
        chunks = [points] if exporting else points.split(max(1, _MEAN_ROWS // max(1, batch_shape.numel())))
        total = reduce(add, (self.flow.transform.inv(noise.icdf(some)).sum(0) for some in chunks))
        return total / _MEAN_DRAWS

    def __repr__(self) -> str:
        return f"FlowDistribution(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"


def _spread_points(num_points: int, num_dims: int) -> np.ndarray:
    """Points in the unit cube: one in each slice of each dimension, and their mirror images about the centre."""
    generator = np.random.default_rng(0)  # a recording would repeat draws from torch's generator at each call
    slices = np.tile(np.arange(num_points // 2)[:, None], num_dims)
    points = (generator.permuted(slices, axis=0) + generator.random(slices.shape)) / len(slices)
    return np.concatenate([points, 1 - points])


class _Draw(NamedTuple):
    value: Tensor
    log_prob: Tensor
    with_gradient: bool
    state: tuple | None
