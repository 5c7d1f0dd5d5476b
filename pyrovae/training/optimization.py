"""The optimizer of a run and its learning rate."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyrovae.common import distributed
from pyrovae.compiled.compiler import import_compiler
from pyrovae.training.averaging import Average
from pyrovae.training.guarded_step import StepGuard, step_unless_skipped
from pyrovae.training.optimizer_factory import OptimizerFactory, fused_adam

__all__ = ["OneOptimizer", "Schedule", "cosine_schedule", "schedule_message"]


def cosine_schedule(fraction: float) -> float:
    """Factor of the learning rate: linear warm-up over the first 2% of the training, then half a cosine down to 0.

    Args:
        fraction: fraction of the training done, 0 to 1.

    Returns:
        The factor, 0 to 1.

    Example:
        >>> cosine_schedule(0.0), cosine_schedule(0.02), cosine_schedule(1.0)
        (0.0, 1.0, 0.0)

    References:
        Loshchilov & Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts (2017).
    """
    warm_up = 0.02
    if fraction < warm_up:
        return fraction / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (fraction - warm_up) / (1 - warm_up))


class Schedule(NamedTuple):
    """The factor of the learning rates as a function of the fraction of training done.

    Attributes:
        shape: function from the fraction to a factor; None for constant rates.
    """

    shape: Callable[[float], float] | None

    def __call__(self, done: float) -> float:
        try:
            factor = float(self.shape(done) if self.shape else 1.0)  # a checkpoint takes no NumPy number
        except (TypeError, ValueError, AttributeError) as error:  # a torch scheduler, which expects an optimizer
            problem = f"raises {type(error).__name__} when called with {done:.3g}: {error}"
            raise TypeError(schedule_message(self.shape, problem)) from error
        if not 0 <= factor < math.inf:
            raise ValueError(
                f"schedule gives {factor:g} at the fraction {done:.3g} of the training: a factor of the learning rate must be "
                f"0 or more, and finite"
            )
        return factor


def schedule_message(schedule: Any, problem: str) -> str:
    """Say what a schedule must be, and what is wrong with this one."""
    return (
        f"schedule must be a function from the fraction of training done, 0 to 1, to a factor of the learning rate (by "
        f"default pyrovae.training.optimization.cosine_schedule), or None for a constant rate; {schedule!r} {problem}"
    )


class OneOptimizer(pyro.optim.PyroOptim):
    """One torch optimizer over all parameters, as a Pyro optimizer for `SVI`; by default a fused Adam.

    `pyro.optim.Adam` makes one optimizer per parameter, which is slower and clips each gradient separately; here
    `clip_norm` bounds the global norm. Parameters join when `SVI` first passes them, in the order of `parameters`, so
    that sums over them are the same in every run.

    A step whose gradient or loss (`watch`) is not finite changes neither parameters nor the optimizer's state. torch's own
    fused Adam and AdamW skip it on the device; before the step of any other optimizer, the host reads whether it is
    made, which on a GPU waits for the device.

    Args:
        parameters: parameters in their order.
        learning_rate: learning rate of the default.
        clip_norm: largest global gradient norm; None for no clipping.
        max_skipped: this many steps that are not finite are skipped; after one more, no step changes anything. `guard`
            keeps this count on the device, without waiting for the host.
        factory: makes the optimizer; None for a fused Adam.
        accumulate: number of calls whose gradients make a step, by `make_step`. One that is not finite does not enter.
        average: decay of the moving average of the parameters; None for no average.

    Attributes:
        inner: the torch optimizer; None before the first call.
        parameters: the parameters that have joined, group by group.
        is_default: whether it is a fused Adam that makes a step at each call, without an average.
        factor: factor of each group's learning rate at the next step.
        is_scaled: whether gradients are those of all data, scaled up from a batch: several are then averaged, weighted by
            `num_rows`; otherwise they are those of the batch's own data, and added up.
        num_rows: number of data of the next call, in this process.

    References:
        Kingma & Ba, Adam: A Method for Stochastic Optimization (2015).
    """

    def __init__(
        self,
        parameters: list[Tensor],
        learning_rate: float = 1e-3,
        clip_norm: float | None = None,
        max_skipped: int = 0,
        factory: OptimizerFactory | None = None,
        accumulate: int = 1,
        average: float | None = None,
    ):
        import_compiler()
        super().__init__(torch.optim.Adam, {"lr": learning_rate})
        self.factory = fused_adam(learning_rate) if factory is None else factory
        self.is_default = self.factory.is_default and accumulate == 1 and average is None
        self.clip_norm, self.accumulate = clip_norm, accumulate
        self.order = {parameter: rank for rank, parameter in enumerate(dict.fromkeys(parameters))}
        self.inner: torch.optim.Optimizer | None = None
        self.parameters: list[Tensor] = []
        self.factor, self.is_scaled, self.num_rows = 1.0, False, 1
        device = parameters[0].device if parameters else None
        self.guard = StepGuard(max_skipped, device)
        self.average = None if average is None else Average(average, device)
        self._watched = torch.zeros((), device=device)
        self._moved = torch.zeros((), dtype=torch.bool, device=device)
        self._pending: dict[Tensor, Tensor] = {}
        self._weight = torch.zeros((), device=device)  # of the calls in `_pending`

    @property
    def has_moved(self) -> bool:
        """Whether any step was made; skipped steps do not count."""
        return bool(self._moved)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first group; NaN if it has none."""
        if self.inner is None:
            return math.nan
        return float(self.inner.param_groups[0].get("initial_lr", math.nan)) * self.factor

    def watch(self, loss: Tensor) -> None:
        """Skip the next step if this loss is not finite."""
        self._watched.copy_(loss)

    def restore(self, parameters: list[Tensor], state: dict[str, Any] | None, has_moved: bool = False) -> None:
        """Continue with these parameters from the `state_dict` of an `inner` over as many, or from the start if it is None."""
        self.parameters, self.inner = list(parameters), None
        self.guard.restart()
        self._moved.fill_(has_moved)
        self._drop_pending()
        if self.average is not None:
            self.average.values.clear()
            self.average.num_steps.zero_()
        if state is not None:
            # The factory decides the class; then restore the groups in which the parameters joined.
            self.inner = self.factory(self.parameters)
            self.inner.param_groups.clear()
            self.inner.state.clear()
            remaining = iter(parameters)
            for group in state["param_groups"]:
                self.inner.add_param_group({"params": [next(remaining) for _ in group["params"]]})
            self.inner.load_state_dict(state)
            for group in self.inner.param_groups:
                if "lr" in group:  # files of earlier versions have no "initial_lr"
                    group.setdefault("initial_lr", self.inner.defaults["lr"])
            for parameter, kept in self.inner.state.items():
                for name, value in kept.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                        kept[name] = _laid_out(value, parameter)

    def __call__(self, params: Any, *args: Any, is_judged: bool = False, **kwargs: Any) -> None:
        """Make a step of these parameters' gradients, as `SVI` calls it.

        Args:
            params: the parameters.
            is_judged: whether a recording has clipped the gradients, and `guard` has decided on the step.
        """
        if is_judged:
            self._step(self.guard.was_made)
            return
        self._join(params)
        distributed.sum_gradients(self.parameters, self._watched)
        if self.accumulate > 1:
            self._collect()
        else:
            self._judge(self._clipped())
            self._step(self.guard.was_made)

    def make_step(self) -> None:
        """Make the step of the gradients collected, if there are any: the mean over their data, as of one larger batch."""
        if self._pending:
            for parameter, gradient in self._pending.items():
                parameter.grad = gradient / self._weight if self.is_scaled else gradient
            self._clipped()
            self._step((self._weight > 0) & self.guard.is_running)
            self._drop_pending()

    @property
    def is_judged_alone(self) -> bool:
        """Whether the gradient of one call in this process decides on a step, so that a recording may do that."""
        return self.accumulate == 1 and distributed.num_ranks() == 1

    def _join(self, params: Any) -> None:
        known = set(self.parameters)
        if new := [parameter for parameter in params if parameter not in known]:
            store = pyro.get_param_store()
            _refuse_gaps(new, store)
            new.sort(key=lambda p: (self.order.get(p, len(self.order)), store.param_name(p) or ""))
            made = self.factory(new)
            if self.inner is None:
                self.inner = made
            else:
                for group in made.param_groups:
                    self.inner.add_param_group(group)
                self.inner.state.update(made.state)
            self.parameters = [parameter for group in self.inner.param_groups for parameter in group["params"]]
            if self.average is not None:
                self.average.join(new)
        if self.inner is None:
            raise ValueError(
                "the programs have no parameters to train: a plain nn.Module needs pyro.module(name, module)"
            )

    def _clipped(self) -> Tensor:
        """The norm of all gradients, which are then clipped."""
        if self.clip_norm is not None:
            return nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _judge(self, norm: Tensor) -> None:
        self.guard((norm + self._watched).isfinite())
        self._watched.zero_()

    def _collect(self) -> None:
        """Add the gradients to those that wait for `make_step`, unless the sum would not be finite."""
        weight = distributed.sums(self.num_rows)[0] if self.is_scaled else 1.0
        there = self._pending
        sums = {p: weight * p.grad + there.get(p, 0) for p in self.parameters if p.grad is not None}
        self._judge(nn.utils.get_total_norm(list(sums.values())))
        for parameter, total in sums.items():
            before = there.get(parameter, torch.zeros((), dtype=total.dtype, device=total.device))
            there[parameter] = torch.where(self.guard.was_made, total, before)
            parameter.grad = None
        self._weight += self.guard.was_made * weight

    def _drop_pending(self) -> None:
        self._pending.clear()
        self._weight.zero_()

    def _step(self, is_made: Tensor) -> None:
        inner: Any = self.inner
        for group in inner.param_groups:
            if "initial_lr" in group:
                group["lr"] = group["initial_lr"] * self.factor
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = _laid_out(parameter.grad, parameter)
        step_unless_skipped(inner, is_made)
        self._moved |= is_made
        if self.average is not None:
            self.average.update(is_made)


def _laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor with the strides of the parameter: the fused step pairs their elements by their place in memory."""
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor.detach())


def _refuse_gaps(parameters: list[Tensor], store: Any) -> None:
    """Raise ValueError for a parameter with gaps in memory, as a slice has: the fused step would write into the gaps."""
    for parameter in parameters:
        if torch.empty_like(parameter, device="meta").stride() != parameter.stride():
            name = store.param_name(parameter)
            raise ValueError(
                f"parameter {f'{name!r} ' if name else ''}of shape {tuple(parameter.shape)} is a view with strides "
                f"{parameter.stride()}, whose elements do not lie in memory without gaps, and cannot be trained: make the "
                f"parameter from a copy, nn.Parameter(tensor.clone(memory_format=torch.contiguous_format))"
            )
