"""The optimizer of a run, its learning rate, and which steps it skips because their numbers are not finite."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyrovae.common import distributed
from pyrovae.compiled.compiler import import_compiler

__all__ = ["OneAdam", "Schedule", "StepGuard", "cosine_schedule", "make_optimizer", "schedule_message"]


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
    """The learning rate as a function of the fraction of training done.

    Attributes:
        learning_rate: the rate at factor 1.
        shape: function from the fraction to a factor; None for a constant rate.
    """

    learning_rate: float
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
        return self.learning_rate * factor


def schedule_message(schedule: Any, problem: str) -> str:
    """Say what a schedule must be, and what is wrong with this one."""
    return (
        f"schedule must be a function from the fraction of training done, 0 to 1, to a factor of the learning rate (by "
        f"default pyrovae.training.optimization.cosine_schedule), or None for a constant rate; {schedule!r} {problem}"
    )


class StepGuard(nn.Module):
    """Decide which steps are made, on the device, without waiting for the host at every step.

    A step whose loss or gradient is not finite is skipped: it changes no parameter and no moment. Up to `max_skipped`
    steps are skipped; after one more, no step is made until `restart`.

    All four attributes are buffers and change in place, so that a recording may hold them.

    Args:
        max_skipped: number of steps that may be skipped.
        device: device of the buffers.

    Attributes:
        was_made: whether the last step was made.
        is_running: whether steps are still made: False after one step too many that is not finite.
        num_steps: steps made or skipped while `is_running` was True.
        num_skipped: steps that were not finite, including the one that ended the run.

    Example:
        >>> guard = StepGuard(max_skipped=1)
        >>> for finite in (True, False, True, False, True):
        ...     guard(torch.tensor(finite))
        >>> guard.is_running.item(), guard.num_steps.item(), guard.num_skipped.item()
        (False, 3, 2)
    """

    was_made: Tensor
    is_running: Tensor
    num_steps: Tensor
    num_skipped: Tensor

    def __init__(self, max_skipped: int = 0, device: torch.device | None = None):
        super().__init__()
        self.max_skipped = max_skipped
        for name in ("was_made", "is_running"):
            self.register_buffer(name, torch.ones((), dtype=torch.bool, device=device))
        for name in ("num_steps", "num_skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long, device=device))

    def forward(self, is_finite: Tensor) -> None:
        """Decide on a step, given whether its loss and gradient are finite."""
        self.num_skipped.add_(self.is_running & ~is_finite)
        self.is_running.copy_(self.num_skipped <= self.max_skipped)
        self.num_steps.add_(self.is_running)
        self.was_made.copy_(self.is_running & is_finite)

    def restart(self, num_skipped: int = 0) -> None:
        """Start again, counting `num_skipped` steps as skipped already."""
        self.was_made.fill_(True)
        self.is_running.fill_(True)
        self.num_skipped.fill_(num_skipped)


class OneAdam(pyro.optim.PyroOptim):
    """One fused Adam over all parameters, as a Pyro optimizer for `SVI`.

    `pyro.optim.Adam` makes one optimizer per parameter, which is slower and clips each gradient separately; here
    `clip_norm` bounds the global norm. `learning_rate` may be set at any step. Parameters join when `SVI` first passes
    them, in the order of `parameters`, so that sums over them are the same in every run.

    Args:
        parameters: parameters in their order.
        learning_rate: learning rate.
        clip_norm: largest global gradient norm; None for no clipping.
        max_skipped: a step whose gradient or loss (`watch`) is not finite changes nothing. This many such steps are
            skipped; after one more, no step changes anything. `guard` keeps this count on the device, without
            waiting for the host.

    References:
        Kingma & Ba, Adam: A Method for Stochastic Optimization (2015).
    """

    def __init__(
        self, parameters: list[Tensor], learning_rate: float, clip_norm: float | None = None, max_skipped: int = 0
    ):
        import_compiler()
        super().__init__(torch.optim.Adam, {"lr": learning_rate})
        self.learning_rate, self.clip_norm = learning_rate, clip_norm
        self.order = {parameter: rank for rank, parameter in enumerate(dict.fromkeys(parameters))}
        self.adam: torch.optim.Adam | None = None
        self.parameters: list[Tensor] = []
        device = parameters[0].device if parameters else None
        self.guard = StepGuard(max_skipped, device)
        self._watched = torch.zeros((), device=device)

    @property
    def has_moved(self) -> bool:
        """Whether any step was made; skipped steps do not count."""
        return self.adam is not None and any(state["step"] > 0 for state in self.adam.state.values())

    def watch(self, loss: Tensor) -> None:
        """Skip the next step if this loss is not finite."""
        self._watched.copy_(loss)

    def restore(self, parameters: list[Tensor], state: dict[str, Any] | None) -> None:
        """Continue with these parameters from the `state_dict` of an `adam` over as many, or from the start if it is None."""
        self.parameters, self.adam = list(parameters), None
        self.guard.restart()
        if state is not None:
            remaining = iter(parameters)
            groups = [[next(remaining) for _ in group["params"]] for group in state["param_groups"]]
            self.adam = torch.optim.Adam([{"params": group} for group in groups], lr=self.learning_rate, fused=True)
            self.adam.load_state_dict(state)
            for parameter, moments in self.adam.state.items():
                moments.update({name: _laid_out(moments[name], parameter) for name in ("exp_avg", "exp_avg_sq")})

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        known = set(self.parameters)
        if new := [parameter for parameter in params if parameter not in known]:
            store = pyro.get_param_store()
            _refuse_gaps(new, store)
            new.sort(key=lambda p: (self.order.get(p, len(self.order)), store.param_name(p) or ""))
            self.parameters += new
            if self.adam is None:
                self.adam = torch.optim.Adam(new, lr=self.learning_rate, fused=True)
            else:
                self.adam.add_param_group({"params": new})
        if self.adam is None:
            raise ValueError(
                "the programs have no parameters to train: a plain nn.Module needs pyro.module(name, module)"
            )
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate
        distributed.sum_gradients(self.parameters, self._watched)
        if self.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.guard((norm + self._watched).isfinite())
        self._watched.zero_()
        # The fused step asks for it on the device, as in mixed precision.
        self.adam.found_inf = (~self.guard.was_made).float()  # type: ignore[attr-defined]  # set by torch's scaler, too
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = _laid_out(parameter.grad, parameter)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)  # SVI would allocate and fill zeros


def make_optimizer(
    modules: Iterable[nn.Module], learning_rate: float, clip_norm: float | None, max_skipped: int
) -> OneAdam:
    """Make the optimizer of a run over all parameters of the modules."""
    return OneAdam([p for module in modules for p in module.parameters()], learning_rate, clip_norm, max_skipped)


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
