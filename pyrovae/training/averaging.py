"""The exponential moving average of the weights, which a run may validate and return in place of the last weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Average"]


class Average:
    """The mean of the parameters after each step, weighted by decay^age and normalised.

    After t steps, the average of p_1, ..., p_t is sum_i decay^(t - i) p_i / sum_i decay^(t - i), so that the initial
    values have no weight. A parameter that joins later starts at its value then. Parameters with constraints are averaged
    in their unconstrained space. Everything changes in place on the device, without waiting for the host.

    Args:
        decay: weight of the average so far, 0 to 1.
        device: device of the number of steps.

    Attributes:
        values: the average of each parameter.
        num_steps: number of steps averaged.

    Example:
        >>> parameter = torch.tensor([0.0])
        >>> average = Average(0.5)
        >>> average.join([parameter])
        >>> for value in (3.0, 6.0):
        ...     _ = parameter.fill_(value)
        ...     average.update(torch.tensor(True))
        >>> average.values[parameter]  # (3 / 2 + 6) / (1 / 2 + 1)
        tensor([5.])

    References:
        Polyak & Juditsky, Acceleration of Stochastic Approximation by Averaging (1992).
    """

    def __init__(self, decay: float, device: torch.device | None = None):
        self.decay = decay
        self.values: dict[Tensor, Tensor] = {}
        self.num_steps = torch.zeros((), dtype=torch.float64, device=device)

    def join(self, parameters: Iterable[Tensor]) -> None:
        """Average these parameters too."""
        self.values |= {parameter: parameter.detach().clone() for parameter in parameters}

    @torch.no_grad()
    def update(self, was_made: Tensor) -> None:
        """Add the parameters after a step, unless it was not made."""
        self.num_steps += was_made
        weight = torch.where(was_made, (1 - self.decay) / (1 - self.decay**self.num_steps), 0.0)
        for parameter, value in self.values.items():
            value.lerp_(parameter.detach(), weight.to(value.dtype))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters their averages inside."""
        kept = {parameter: parameter.detach().clone() for parameter in self.values}
        try:
            _copy(self.values)
            yield
        finally:
            _copy(kept)


@torch.no_grad()
def _copy(values: dict[Tensor, Tensor]) -> None:
    for parameter, value in values.items():
        parameter.copy_(value)
