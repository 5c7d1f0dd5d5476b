"""Skip the optimizer's step if the loss or a gradient is NaN or infinite, without waiting for the device."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

__all__ = ["StepGuard", "step_unless_skipped"]


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
        num_steps: steps made or skipped, without the one that ended the run and those after it.
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


def step_unless_skipped(optimizer: torch.optim.Optimizer, is_made: Tensor) -> None:
    """Make the optimizer's step if `is_made`, and drop the gradients.

    torch's own fused Adam and AdamW decide on the device. Before the step of any other optimizer, the host reads
    `is_made`, which on a GPU waits for the device.
    """
    if _skips_on_device(optimizer):
        found_inf = (~is_made).float()
        is_known = is_made.device.type == "cpu" and bool(is_made)  # another device would have to be waited for
        if _run_kernels(optimizer, None if is_known else found_inf, is_made.device):
            for group in optimizer.param_groups:  # as `zero_grad` does, which also records itself for a profiler
                for parameter in group["params"]:
                    parameter.grad = None
            return
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # as torch's scaler does in mixed precision
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    elif is_made:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # SVI would allocate and fill zeros


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step changes nothing at all if its `found_inf` is 1."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and all(
        group.get("fused") for group in optimizer.param_groups
    )


@torch.no_grad()
def _run_kernels(optimizer: Any, found_inf: Tensor | None, device: torch.device) -> bool:
    """Make the step of a fused Adam by its kernels; return False, and change nothing, if `step` would do more than that.

    `step` also looks for hooks, initialises states, sorts tensors by device and dtype, and records itself for a profiler,
    which takes a noticeable part of the step of a small network (`docs/benchmarks.md`).
    """
    # Take a hook list that a later version of torch may have renamed for one with hooks.
    hooks = (
        *(getattr(optimizer, f"_optimizer_step_{when}_hooks", True) for when in ("pre", "post")),
        *(getattr(torch_optimizer, f"_global_optimizer_{when}_hooks", True) for when in ("pre", "post")),
    )
    if any(hooks) or vars(optimizer).keys() & {"step", "grad_scale"}:
        return False
    calls = []
    for group in optimizer.param_groups:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            continue
        states = [optimizer.state.get(parameter) for parameter in parameters]
        if not all(states) or group["amsgrad"] or group["differentiable"] or isinstance(group["lr"], Tensor):
            return False
        gradients = [parameter.grad for parameter in parameters]
        steps, means, squares = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        given = (*parameters, *gradients)
        if any(gradient.is_sparse for gradient in gradients) or len({tensor.dtype for tensor in given}) > 1:
            return False
        if {tensor.device for tensor in (*given, *steps)} != {device}:
            return False
        calls.append((group, [parameters, gradients, means, squares, []], steps))
    for group, tensors, steps in calls:
        torch._foreach_add_(steps, 1)
        beta1, beta2 = map(float, group["betas"])
        kernel: Any = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        kernel(
            *tensors,
            steps,
            **{name: group[name] for name in ("amsgrad", "lr", "weight_decay", "eps", "maximize")},
            beta1=beta1,
            beta2=beta2,
            grad_scale=None,
            found_inf=found_inf,
        )
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
    return True
