"""Standard error of a mean over data."""

import math

from torch import Tensor

__all__ = ["standard_error"]


def standard_error(values: Tensor) -> float:
    """Standard error of the mean over data; NaN for one datum.

        sd(values) / sqrt(N)

    Shapes: (N,), in the unit of the values.

    Args:
        values: One value per datum, (N,).
    """
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
