"""What a mean over data is uncertain by."""

import math

from torch import Tensor

__all__ = ["standard_error"]


def standard_error(values: Tensor) -> float:
    """Standard error of the mean over data, sd(values) / sqrt(N); NaN for one datum.

    Shapes: (N,), in the values' unit.
    """
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
