"""Out-of-distribution detection with log p(x), and transforms that make outside data.

A high density does not prove that a datum belongs to the training distribution. Image models often give simpler images
(fewer edges, black or smooth areas, another data set) a higher density than their own training data, so that the AUC
falls below 1/2 (Nalisnick, Matsukawa, Teh, Gorur & Lakshminarayanan, Do Deep Generative Models Know What They Don't
Know?, 2019). Inverted, shuffled and rotated digits are easy cases; constant images are not. Report which sets were
tried.

log p(x) is itself an estimate. The guide fits outside data worst, so importance sampling underestimates log p(x) far more
for them than for inside data, and the detector looks better than it is. Check `pareto_k`, or use annealing.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.grey_values import check_grey_values
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood

__all__ = ["Detection", "inverted", "roc", "rotated", "shuffled"]


@dataclass(frozen=True, repr=False)
class Detection:
    """How well a score separates inside data from outside data.

    Attributes:
        num_inside: number of inside data
        num_outside: number of outside data
        auc: probability that an inside datum scores higher than an outside one (ties count half)
        stderr: standard error of `auc`
        false_alarms: share of inside data below each threshold, from 0 to 1
        caught: share of outside data below each threshold, from 0 to 1
    """

    num_inside: int
    num_outside: int
    auc: float
    stderr: float
    false_alarms: np.ndarray
    caught: np.ndarray

    def caught_at(self, false_alarms: float = 0.05) -> float:
        """Return the largest share of outside data caught at a false-alarm rate of at most `false_alarms`."""
        return float(self.caught[self.false_alarms <= false_alarms].max())

    def __repr__(self) -> str:
        return (
            f"Detection({self.num_inside} inside, {self.num_outside} outside: AUC {self.auc:.4f} ± {self.stderr:.4f}, "
            f"{self.caught_at():.1%} caught at 5% false alarms)"
        )


def roc(inside: Any, outside: Any) -> Detection:
    """Measure how well log p(x), or any other score, separates inside data from outside data, which should score lower.

        AUC = P( score of an inside datum > score of an outside one ) + 1/2 P( equal )

    1: perfect separation; 1/2: none; below 1/2: outside data have the higher density, which is known to happen (see the
    module).

    The standard error is for other draws of data. It does not include the bias of the scores. It is 0 if all data are
    told apart, which N and M data cannot show more precisely than to about 3 / min(N, M).

    Args:
        inside: scores (N,), or a result of `log_marginal_likelihood`, whose `log_prob` is then the score
        outside: scores (M,), or a result likewise

    Returns:
        The curve and its area, as a `Detection`; both come from scikit-learn.

    Raises:
        ValueError: for NaN, labels beside scores, other shapes, or fewer than 2 scores.
        TypeError: if the scores are not numbers.

    Example:
        >>> roc([1.0, 2.0, 3.0], [0.0, 2.0])
        Detection(3 inside, 2 outside: AUC 0.7500 ± 0.2887, 50.0% caught at 5% false alarms)

    References:
        Fawcett, An introduction to ROC analysis (2006).
        DeLong, DeLong & Clarke-Pearson, Comparing the Areas under Two or More Correlated Receiver Operating
        Characteristic Curves (1988), for the standard error.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    first, second = (_scores(name, scores) for name, scores in (("inside", inside), ("outside", outside)))
    labels = [name for name, scores in (("inside", first), ("outside", second)) if set(scores) == {0.0, 1.0}]
    if len(labels) == 1 and len(first) == len(second) > 2:
        raise ValueError(
            f"{labels[0]} holds only 0 and 1, as labels do: roc takes the scores of the data inside and those of the data "
            f"outside, roc(scores[labels == 0], scores[labels == 1]) if 1 is outside"
        )
    # Order alone: scikit-learn takes no infinities.
    order = np.unique(np.concatenate([first, second]), return_inverse=True)[1].astype(float)
    is_outside = np.r_[np.zeros(len(first)), np.ones(len(second))]
    false_alarms, caught, _ = roc_curve(is_outside, -order, drop_intermediate=False)
    # For each datum, the share of the other set that it is ranked correctly against.
    above, level = order[: len(first)], np.sort(order[len(first) :])
    right_of_inside = (np.searchsorted(level, above, "left") + np.searchsorted(level, above, "right")) / 2 / len(level)
    below, level = order[len(first) :], np.sort(above)
    right_of_outside = 1 - (np.searchsorted(level, below, "left") + np.searchsorted(level, below, "right")) / 2 / len(
        level
    )
    variance = right_of_inside.var(ddof=1) / len(first) + right_of_outside.var(ddof=1) / len(second)
    return Detection(
        num_inside=len(first),
        num_outside=len(second),
        auc=float(roc_auc_score(is_outside, -order)),
        stderr=math.sqrt(variance),
        false_alarms=false_alarms,
        caught=caught,
    )


def _scores(name: str, scores: Any) -> np.ndarray:
    if isinstance(scores, LogMarginalLikelihood):
        scores = scores.log_prob
    try:
        array = np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores, dtype=float)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be scores of 2 data or more, numbers of shape (N,), or a result of log_marginal_likelihood; found "
            f"{type(scores).__name__} ({error})"
        ) from error
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"{name} must be scores of 2 data or more, shape (N,); found shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError(f"{name} has {int(np.isnan(array).sum())} NaN among its {len(array)} scores")
    return array


def inverted(x: Tensor) -> Tensor:
    """Return 1 - x.

    Args:
        x: values in [0, 1], any shape

    Raises:
        ValueError: for values outside [0, 1].
    """
    check_grey_values("inverted: x", x if x.is_floating_point() else x.float())
    return ~x if x.dtype == torch.bool else 1 - x


def rotated(x: Tensor, quarter_turns: int = 1) -> Tensor:
    """Rotate images to the left by quarter turns.

    Args:
        x: images (..., height, width); an odd number of turns swaps height and width
        quarter_turns: number of turns by 90 degrees
    """
    return torch.rot90(x, quarter_turns, (-2, -1))


def shuffled(x: Tensor) -> Tensor:
    """Permute the pixels of each image at random, which keeps the histogram and destroys all structure.

    Each image has its own order, drawn from torch's generator. The channels of a pixel stay together.

    Args:
        x: images (N, channels, height, width)

    Raises:
        ValueError: for any other number of dimensions.
    """
    if x.ndim < 4:
        raise ValueError(
            f"shuffled: x must be images (N, channels, height, width), found {tuple(x.shape)}: add a channel "
            f"axis to images without channels, x.unsqueeze(1)"
        )
    flat = x.flatten(2)
    order = torch.rand(len(x), 1, flat.shape[2], device=x.device).argsort(-1).expand_as(flat)
    return flat.gather(2, order).reshape(x.shape)
