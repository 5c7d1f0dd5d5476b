"""Which steps of a training are made: those whose numbers are finite, until too many were not."""

import torch
from torch import Tensor, nn

__all__ = ["StepGuard"]


class StepGuard(nn.Module):
    """Which steps are made, kept on the device, so that the host need not be asked at every step.

    A step whose loss or gradient is not finite is not made: it changes no parameter and no moment. Up to `max_skipped`
    such steps are passed over; after one more nothing is made any longer, until `restart`.

    was_made: whether the last step was; goes_on: whether steps are still made
    num_steps: steps until then, made or passed over; num_skipped: those that were not finite, the last one included

    All four are buffers and changed in place, so that a recording may hold them.

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
        """Judge a step, by whether its loss and its gradient are finite."""
        self.num_skipped.add_(self.goes_on & ~is_finite)
        self.goes_on.copy_(self.num_skipped <= self.max_skipped)
        self.num_steps.add_(self.goes_on)
        self.was_made.copy_(self.goes_on & is_finite)

    def restart(self, num_skipped: int = 0) -> None:
        """Go on after so many steps that were passed over."""
        self.was_made.fill_(True)
        self.goes_on.fill_(True)
        self.num_skipped.fill_(num_skipped)
