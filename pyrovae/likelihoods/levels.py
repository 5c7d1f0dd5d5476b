"""Likelihoods of grey levels as stored: probability masses, whose log_prob has no units.

Data are levels k / (num_levels - 1), k = 0 ... num_levels - 1: 256 levels for bytes over 255 (`pyrovae.data` with
binarization=None, torchvision's ToTensor), 17 for scikit-learn's digits over 16.
"""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrovae.common.arguments import check_count
from pyrovae.distributions.pixels import CategoricalLevels, GreyLevels, LogisticLevels
from pyrovae.likelihoods.base import Likelihood

__all__ = ["Categorical", "DiscretizedLogistic"]

# The smallest scale is exp(-4) of a level, at which one level has all mass but 3e-12.
_LOG_SMALLEST = -4.0
_INITIAL_SCALE = 0.1  # of the logistic distribution at the start of training, in units of x


class DiscretizedLogistic(Likelihood):
    """Independent pixels of grey levels, each a mixture of logistic distributions rounded to the nearest level.

        p(x|z) = prod_d sum_j w_dj [F((x_d + h - m_dj) / s_dj) - F((x_d - h - m_dj) / s_dj)],
        F(t) = 1 / (1 + exp(-t)),   h = 1 / (2 (L - 1))

    Level 0 includes the tail below it and level L - 1 the tail above it, so that the masses sum to 1. Colour channels
    are independent given z, like all pixels; in PixelCNN++ they depend on each other.

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log masses in nats per datum.

    Args:
        decoder_net: With one component, any module (rows, latent_dim) -> (rows, 2, *data_shape) that returns m, then
            log s, both up to a learned bias per pixel; log s has a soft floor. With several components, (rows, 3
            num_components, *data_shape): m of all components, then log s, then log w up to a constant.
        data_shape: Shape of one datum.
        num_components: J, components of the mixture.
        num_levels: L; data are k / (L - 1).
        data_mean: Mean of the training data, at which one component starts (several start around it); 1/2 by default.

    Raises:
        ValueError: Data are not such levels, a shape is wrong, or the mean is outside [0, 1].

    References:
        Salimans, Karpathy, Chen & Kingma, PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture
            Likelihood and Other Modifications (2017).
        Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow (2016): one component.
    """

    def __init__(
        self,
        decoder_net: nn.Module,
        data_shape: Sequence[int],
        *,
        num_components: int = 1,
        num_levels: int = 256,
        data_mean: Tensor | None = None,
    ):
        super().__init__(decoder_net, data_shape)
        num_components = check_count("num_components", num_components)
        self.num_components, self.num_levels = num_components, _checked_levels(num_levels)
        mean = self.initial_mean(data_mean, 0, 1)
        quantiles = (torch.arange(num_components) + 0.5) / num_components
        bias = torch.zeros(self.parameters_shape)
        bias[:num_components] = (0.5 if mean is None else mean) + _column(
            _INITIAL_SCALE * quantiles.logit(), self.data_shape
        )
        bias[num_components : 2 * num_components] = math.log(_INITIAL_SCALE)
        self.bias = nn.Parameter(bias)

    @classmethod
    def num_parameters(cls, num_components: int = 1) -> int:
        return 2 if num_components == 1 else 3 * num_components

    @property
    def parameters_shape(self) -> torch.Size:
        return torch.Size((self.num_parameters(self.num_components), *self.data_shape))

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        rows = (parameters + self.bias).movedim(-1 - len(self.data_shape), -1)
        loc, raw_scale, *weights = rows.split(self.num_components, -1)
        smallest = _LOG_SMALLEST - math.log(self.num_levels - 1)
        log_scale = smallest + F.softplus(raw_scale - smallest)
        weight_logits = weights[0] if weights else torch.zeros_like(loc)
        return LogisticLevels(weight_logits, loc, log_scale, self.num_levels).to_event(len(self.data_shape))

    def check(self, x: Tensor) -> None:
        _check_levels(x, self.num_levels)

    def extra_repr(self) -> str:
        return f"num_components={self.num_components}, num_levels={self.num_levels}, {super().extra_repr()}"


class Categorical(Likelihood):
    """Independent pixels of grey levels, with a probability for each level of each pixel.

        p(x|z) = prod_d softmax(l_d)_(k_d),   x_d = k_d / (L - 1),   l = decoder_net(z) + bias

    It does not know that neighbouring levels are similar; `DiscretizedLogistic` needs fewer data.

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log masses in nats per datum.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, num_levels, *data_shape) that returns the logits up to a
            learned bias. With 256 numbers per pixel, the last layer of a convolutional decoder is far smaller than an
            MLP's. For 784 pixels the logits alone take 0.8 MB per particle and datum.
        data_shape: Shape of one datum.
        num_levels: L; data are k / (L - 1).
        data_mean: Mean of the training data; levels near it start out more likely. By default all are equally likely.

    Raises:
        ValueError: Data are not such levels, a shape is wrong, or the mean is outside [0, 1].

    References:
        van den Oord, Kalchbrenner & Kavukcuoglu, Pixel Recurrent Neural Networks (2016).
    """

    def __init__(
        self,
        decoder_net: nn.Module,
        data_shape: Sequence[int],
        *,
        num_levels: int = 256,
        data_mean: Tensor | None = None,
    ):
        super().__init__(decoder_net, data_shape)
        self.num_levels = _checked_levels(num_levels)
        mean = self.initial_mean(data_mean, 0, 1)
        bias = torch.zeros(self.parameters_shape)
        if mean is not None:
            loc = mean.unsqueeze(-1)
            start = LogisticLevels(
                torch.zeros_like(loc), loc, torch.full_like(loc, math.log(_INITIAL_SCALE)), num_levels
            )
            bias += start.log_prob(_column(torch.linspace(0, 1, num_levels), self.data_shape))
        self.bias = nn.Parameter(bias)

    @classmethod
    def num_parameters(cls, num_levels: int = 256) -> int:
        return num_levels

    @property
    def parameters_shape(self) -> torch.Size:
        return torch.Size((self.num_levels, *self.data_shape))

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        logits = (parameters + self.bias).movedim(-1 - len(self.data_shape), -1)
        return CategoricalLevels(logits).to_event(len(self.data_shape))

    def check(self, x: Tensor) -> None:
        _check_levels(x, self.num_levels)

    def extra_repr(self) -> str:
        return f"num_levels={self.num_levels}, {super().extra_repr()}"


def _column(values: Tensor, data_shape: torch.Size) -> Tensor:
    """Shape one value per parameter, (P,), for all pixels: (P, 1, ..., 1)."""
    return values.reshape(-1, *(1 for _ in data_shape))


def _checked_levels(num_levels: int) -> int:
    num_levels = check_count("num_levels", num_levels)
    if num_levels < 2:
        raise ValueError(f"num_levels must be 2 or more, found {num_levels}")
    return num_levels


def _check_levels(x: Tensor, num_levels: int) -> None:
    is_level = GreyLevels(num_levels).check(x)
    if not is_level.all():
        found, last = x[~is_level][0].item(), num_levels - 1
        if math.isnan(found):
            raise ValueError(
                f"pixels must be one of {num_levels} grey levels, found nan: remove these data, fill in their values, or "
                f"say which are missing: model(x, observed=~x.isnan())"
            )
        raise ValueError(
            f"pixels must be one of {num_levels} grey levels, k / {last} with k = 0 ... {last}; found {found:g} = "
            f"{found * last:g} / {last}: divide bytes by 255 (pyrovae.data with binarization=None gives such images, "
            f"with their num_levels), set num_levels=, or use a likelihood for real values (LearnedScaleNormal) if these are "
            f"not grey levels"
        )
