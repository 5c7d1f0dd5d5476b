"""Skip steps whose numbers are not finite, and stop after too many of them."""

import torch
from torch import Tensor, nn

__all__ = ["StepGuard"]


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
        goes_on: whether steps are still made.
        num_steps: steps made or skipped while `goes_on` was True.
        num_skipped: steps that were not finite, including the one that ended the run.

    Example:
        >>> verdicts = StepGuard(max_skipped=1)
        >>> for finite in (True, False, True, False, True):
        ...     verdicts(torch.tensor(finite))
        >>> verdicts.goes_on.item(), verdicts.num_steps.item(), verdicts.num_skipped.item()
        (False, 3, 2)
    """

    was_made: Tensor
    goes_on: Tensor
    num_steps: Tensor
    num_skipped: Tensor

    def __init__(self, max_skipped: int = 0, device: torch.device | None = None):
        super().__init__()
        self.max_skipped = max_skipped
        for name in ("was_made", "goes_on"):
            self.register_buffer(name, torch.ones((), dtype=torch.bool, device=device))
        for name in ("num_steps", "num_skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long, device=device))

    def forward(self, is_finite: Tensor) -> None:
        """Decide on a step, given whether its loss and gradient are finite."""
        self.num_skipped.add_(self.goes_on & ~is_finite)
        self.goes_on.copy_(self.num_skipped <= self.max_skipped)
        self.num_steps.add_(self.goes_on)
        self.was_made.copy_(self.goes_on & is_finite)

    def restart(self, num_skipped: int = 0) -> None:
        """Start again, counting `num_skipped` steps as skipped already."""
        self.was_made.fill_(True)
        self.goes_on.fill_(True)
        self.num_skipped.fill_(num_skipped)
