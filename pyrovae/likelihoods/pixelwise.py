"""Likelihoods whose data elements are independent given z: binary and real-valued ones."""

import math
from collections.abc import Sequence
from numbers import Real

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrovae.distributions.binary import BinaryImages
from pyrovae.distributions.pixels import ContinuousBernoulli as ContinuousBernoulliPixel
from pyrovae.likelihoods.base import Likelihood

__all__ = ["Bernoulli", "ContinuousBernoulli", "HeteroscedasticNormal", "LearnedScaleNormal", "Normal"]

_FILL_IN = "remove these data, or fill in their values"


class Bernoulli(Likelihood):
    """Independent Bernoulli pixels, for binary data.

    p(x|z) = prod_d Bernoulli(x_d; sigmoid(l_d)),   l = decoder_net(z) + bias

    decoder_net: any module (rows, latent_dim) -> (rows, data_shape), the logits up to a learned bias per pixel
    data_mean: mean of the training data, whose logit the bias starts at (0.001 to 0.999); zeros without it. A network
        that starts near 0 then starts at the mean image instead of spending its first epochs on finding it.

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log masses in nats per datum.

    Raises ValueError for data other than 0 and 1, for wrong shapes, and for a mean outside [0, 1].

    Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014); the bias: Burda, Grosse & Salakhutdinov,
    Importance Weighted Autoencoders (2016).
    """

    def __init__(self, decoder_net: nn.Module, data_shape: Sequence[int], *, data_mean: Tensor | None = None):
        super().__init__(decoder_net, data_shape)
        mean = self.initial_mean(data_mean, 0, 1)
        self.bias = nn.Parameter(torch.zeros(self.data_shape) if mean is None else mean.clamp(1e-3, 1 - 1e-3).logit())

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return BinaryImages(parameters + self.bias, len(self.data_shape))

    def check(self, x: Tensor) -> None:
        if (x * x - x).any():  # false of 0 and 1 only (infinity gives NaN, which is true), and a fast way to ask
            raise ValueError(
                f"Bernoulli pixels are 0 or 1, found {x[(x != 0) & (x != 1)][0].item():g}: {_remedy_for_binary(x)}"
            )


class ContinuousBernoulli(Likelihood):
    """Independent continuous Bernoulli pixels, for data in [0, 1]: what "binary cross-entropy of grey pixels" lacks.

    p(x|z) = prod_d l_d exp(l_d x_d) / (exp(l_d) - 1),   l = decoder_net(z) + bias

    decoder_net: any module (rows, latent_dim) -> (rows, data_shape), the logits up to a learned bias per pixel
    data_mean: mean of the training data, which the bias gives at the start (0.02 to 0.98); zeros without it

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log densities in nats per datum.

    Raises ValueError for data outside [0, 1], for wrong shapes, and for a mean outside [0, 1].

    Source: Loaiza-Ganem & Cunningham, The continuous Bernoulli: fixing a pervasive error in variational autoencoders
    (2019).
    """

    def __init__(self, decoder_net: nn.Module, data_shape: Sequence[int], *, data_mean: Tensor | None = None):
        super().__init__(decoder_net, data_shape)
        mean = self.initial_mean(data_mean, 0, 1)
        self.bias = nn.Parameter(torch.zeros(self.data_shape) if mean is None else _logits_of_mean(mean))

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return ContinuousBernoulliPixel(parameters + self.bias).to_event(len(self.data_shape))

    def check(self, x: Tensor) -> None:
        inside = (x >= 0) & (x <= 1)
        if not inside.all():
            found = x[~inside][0]
            remedy = "scale the data to it (x / 255 for bytes), or take a normal likelihood (LearnedScaleNormal)"
            raise ValueError(
                f"continuous Bernoulli pixels lie in [0, 1], found {found.item():g}: {remedy if found.isfinite() else _FILL_IN}"
            )


class Normal(Likelihood):
    """Independent normal pixels of one given standard deviation.

    p(x|z) = prod_d N(x_d; mu_d, scale^2),   mu = decoder_net(z) + bias

    decoder_net: any module (rows, latent_dim) -> (rows, data_shape), the means up to a learned bias per pixel
    scale: a hyper-parameter, in the units of x. 1 is the textbook's unit variance, under which maximising the likelihood
        is least squares; for pixels in [0, 1] it is wide, and the KL then switches most latent dimensions off
    data_mean: mean of the training data, at which the bias starts; zeros without it

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log densities in nats per datum.

    Raises ValueError for data that are not finite, for wrong shapes, and for a scale that is not positive.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014).
    """

    def __init__(
        self,
        decoder_net: nn.Module,
        data_shape: Sequence[int],
        *,
        scale: float = 1.0,
        data_mean: Tensor | None = None,
    ):
        super().__init__(decoder_net, data_shape)
        self.scale = _positive("scale", scale)
        mean = self.initial_mean(data_mean)
        self.bias = nn.Parameter(torch.zeros(self.data_shape) if mean is None else mean)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return dist.Normal(parameters + self.bias, self.scale).to_event(len(self.data_shape))

    def check(self, x: Tensor) -> None:
        _check_finite(x)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, {super().extra_repr()}"


class LearnedScaleNormal(Likelihood):
    """Independent normal pixels of one standard deviation, which is learned.

    p(x|z) = prod_d N(x_d; mu_d, sigma^2),   mu = decoder_net(z) + bias,   sigma = exp(log_scale)

    decoder_net: any module (rows, latent_dim) -> (rows, data_shape), the means up to a learned bias per pixel
    initial_scale: of sigma, in the units of x
    data_mean: mean of the training data, at which the bias starts; zeros without it

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log densities in nats per datum. They are
    bounded unless the network reproduces all pixels of all data without any error.

    Raises ValueError for data that are not finite, for wrong shapes, and for a scale that is not positive.

    Source: Rybkin, Daniilidis & Levine, Simple and Effective VAE Training with Calibrated Decoders (2021).
    """

    def __init__(
        self,
        decoder_net: nn.Module,
        data_shape: Sequence[int],
        *,
        initial_scale: float = 0.3,
        data_mean: Tensor | None = None,
    ):
        super().__init__(decoder_net, data_shape)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_positive("initial_scale", initial_scale))))
        mean = self.initial_mean(data_mean)
        self.bias = nn.Parameter(torch.zeros(self.data_shape) if mean is None else mean)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return dist.Normal(parameters + self.bias, self.log_scale.exp()).to_event(len(self.data_shape))

    def check(self, x: Tensor) -> None:
        _check_finite(x)


class HeteroscedasticNormal(Likelihood):
    """Independent normal pixels, the mean and the standard deviation of each from the network.

    p(x|z) = prod_d N(x_d; mu_d, sigma_d^2),   (mu, r) = decoder_net(z) + bias,   sigma = min_scale + softplus(r)

    decoder_net: any module (rows, latent_dim) -> (rows, 2, *data_shape), means then r, up to a learned bias for each
    min_scale: the floor of sigma, in the units of x. Without one the likelihood has no maximum: the density is unbounded
        wherever the network meets a pixel exactly. 0.001 is about the standard deviation of rounding to 256 levels of
        [0, 1], and lets a datum gain 6 nats per pixel at most; pixels that are always the same (a black rim) take all
        of that, unless they are dequantised
    initial_scale: where sigma starts
    data_mean: mean of the training data, at which the bias of mu starts; zeros without it

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log densities in nats per datum.

    Raises ValueError for data that are not finite, for wrong shapes, and for scales that are not positive or an
    initial_scale below min_scale.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014), appendix C.2; the floor: Mattei & Frellsen,
    Leveraging the exact likelihood of deep latent variable models (2018).
    """

    def __init__(
        self,
        decoder_net: nn.Module,
        data_shape: Sequence[int],
        *,
        min_scale: float = 1e-3,
        initial_scale: float = 0.3,
        data_mean: Tensor | None = None,
    ):
        super().__init__(decoder_net, data_shape)
        self.min_scale = _positive("min_scale", min_scale)
        above = _positive("initial_scale", initial_scale) - min_scale
        if not above > 0:
            raise ValueError(f"initial_scale must lie above min_scale={min_scale:g}, found {initial_scale:g}")
        self.bias = nn.Parameter(torch.zeros(self.parameters_shape))
        mean = self.initial_mean(data_mean)
        with torch.no_grad():
            self.bias[1] = above + math.log(-math.expm1(-above))  # the inverse of softplus
            if mean is not None:
                self.bias[0] = mean

    @classmethod
    def num_parameters(cls) -> int:
        return 2

    @property
    def parameters_shape(self) -> torch.Size:
        return torch.Size((2, *self.data_shape))

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        loc, raw_scale = (parameters + self.bias).unbind(-1 - len(self.data_shape))
        return dist.Normal(loc, self.min_scale + F.softplus(raw_scale)).to_event(len(self.data_shape))

    def check(self, x: Tensor) -> None:
        _check_finite(x)

    def extra_repr(self) -> str:
        return f"min_scale={self.min_scale:g}, {super().extra_repr()}"


def _check_finite(x: Tensor) -> None:
    if not x.isfinite().all():
        raise ValueError(f"normal pixels are real numbers, found {x[~x.isfinite()][0].item():g}: {_FILL_IN}")


def _remedy_for_binary(x: Tensor) -> str:
    """How to mend data that are not binary: what their values can be decides it, as no advice for images helps counts."""
    low, high = x.min().item(), x.max().item()
    if not (math.isfinite(low) and math.isfinite(high)):
        return _FILL_IN
    if low >= 0 and high <= 1:
        return (
            "binarise the data if they are grey values (pyrovae.data.binarize; fit(..., transform=pyrovae.data.binarize) "
            "redraws at every use), or take a likelihood for grey values (ContinuousBernoulli, DiscretizedLogistic)"
        )
    if low >= 0 and not (x - x.round()).any():
        return (
            f"values are whole, up to {high:g}; divide the bytes of images by 255 and binarise them (pyrovae.data.binarize), and "
            f"for counts take a likelihood of your own (a subclass of pyrovae.likelihoods.Likelihood), or (x > 0).to(x.dtype)"
        )
    return f"for data from {low:g} to {high:g} take a likelihood for real values (LearnedScaleNormal)"


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, found {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, found {value}")
    return float(value)


def _logits_of_mean(mean: Tensor) -> Tensor:
    """Logits of continuous Bernoulli distributions with these means, clamped to (0.02, 0.98), by bisection."""
    wanted = mean.double().clamp(0.02, 0.98)
    low, high = torch.full_like(wanted, -50.0), torch.full_like(wanted, 50.0)  # E[x] is 1/50 and 1 - 1/50 there
    for _ in range(50):
        middle = (low + high) / 2
        below = ContinuousBernoulliPixel(middle).mean < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).to(mean.dtype)
