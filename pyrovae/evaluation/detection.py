"""log p(x) as a detector of data from elsewhere: how well two sets are told apart, and sets to try it on.

A high density is no proof that a datum belongs: models of images often give simpler ones (fewer edges, black or smooth areas,
another data set) a higher density than their own training data, so that the AUC falls below 1/2 (Nalisnick, Matsukawa, Teh,
Gorur & Lakshminarayanan, Do Deep Generative Models Know What They Don't Know?, 2019). Inverted, shuffled and rotated digits
are easy cases, constant images are not; say which sets were tried. And log p(x) has to be estimated: for data from elsewhere
the guide is at its worst, so that importance sampling is too low by far more there than inside, which makes a detector look
better than the model is. Look at `pareto_k`, or anneal.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.splits import check_grey_values
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood

__all__ = ["Detection", "inverted", "roc", "rotated", "shuffled"]


@dataclass(frozen=True, repr=False)
class Detection:
    """How well a score tells data inside from data outside.

    auc, stderr: the probability that an inside datum has the higher score than an outside one (ties half), and its error
    false_alarms, caught: the curve: shares of inside and of outside data below each threshold, both from 0 to 1
    """

    num_inside: int
    num_outside: int
    auc: float
    stderr: float
    false_alarms: np.ndarray
    caught: np.ndarray

    def caught_at(self, false_alarms: float = 0.05) -> float:
        """Largest share of outside data caught with this share of inside data taken for outside ones, or less."""
        return float(self.caught[self.false_alarms <= false_alarms].max())

    def __repr__(self) -> str:
        return (
            f"Detection({self.num_inside} inside, {self.num_outside} outside: AUC {self.auc:.4f} +- {self.stderr:.4f}, "
            f"{self.caught_at():.1%} caught at 5% false alarms)"
        )


def roc(inside: Any, outside: Any) -> Detection:
    """How well log p(x) (or any score) tells data inside from data outside, which should have the lower one.

    AUC = P( score of an inside datum > score of an outside one ) + 1/2 P( equal )

    1: told apart; 1/2: not at all; below 1/2: outside data have the higher density, as is known to happen (see the module).

    inside, outside: scores, or results of `log_marginal_likelihood`, whose log_prob then is the score

    Shapes: inside (N,), outside (M,), in any unit: only their order counts. -inf is a score like others. The standard error
    is that of other draws of data; the bias of the scores is not in it, and it is 0 where all data are told apart, which N and
    M of them cannot show more exactly than to about 3 / min(N, M).

    Raises ValueError for NaN, labels beside scores, other shapes, or fewer than 2 scores; TypeError for what holds no numbers.

    Source: Fawcett, An introduction to ROC analysis (2006); the error: DeLong, DeLong & Clarke-Pearson, Comparing the Areas
    under Two or More Correlated Receiver Operating Characteristic Curves (1988). The curve and its area: scikit-learn.

    >>> roc([1.0, 2.0, 3.0], [0.0, 2.0])
    Detection(3 inside, 2 outside: AUC 0.7500 +- 0.2887, 50.0% caught at 5% false alarms)
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
    # Of each datum, the share of the other set on its right side.
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
    """1 - x: ink for paper. Shapes: any, values in [0, 1]; raises ValueError for others."""
    check_grey_values("inverted: x", x if x.is_floating_point() else x.float())
    return 1 - x


def rotated(x: Tensor, quarter_turns: int = 1) -> Tensor:
    """Images turned to the left by quarters. Shapes: (..., height, width); height and width change places at odd turns."""
    return torch.rot90(x, quarter_turns, (-2, -1))


def shuffled(x: Tensor) -> Tensor:
    """Each image with its pixels in a random order of its own: the same histogram, and nothing else left.

    Shapes: (N, channels, height, width); channels of a pixel stay together. Drawn from torch's generator.
    Raises ValueError for another number of dimensions.
    """
    if x.ndim < 4:
        raise ValueError(
            f"shuffled: x must be images (N, channels, height, width), found {tuple(x.shape)}: images without channels need "
            f"an axis for them, x.unsqueeze(1)"
        )
    flat = x.flatten(2)
    order = torch.rand(len(x), 1, flat.shape[2], device=x.device).argsort(-1).expand_as(flat)
    return flat.gather(2, order).reshape(x.shape)
