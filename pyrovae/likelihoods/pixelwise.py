"""Likelihoods of binary and of real-valued data whose elements are independent given z."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrovae.common.arguments import check_positive
from pyrovae.distributions.binary import BinaryImages
from pyrovae.distributions.pixels import ContinuousBernoulli as ContinuousBernoulliPixel
from pyrovae.likelihoods.base import FILL_IN, Likelihood, inverse_softplus

__all__ = ["Bernoulli", "ContinuousBernoulli", "HeteroscedasticNormal", "LearnedScaleNormal", "Normal"]


class Bernoulli(Likelihood):
    """Independent Bernoulli pixels, for binary data.

        p(x|z) = prod_d Bernoulli(x_d; sigmoid(l_d)),   l = decoder_net(z) + bias

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log masses in nats per datum.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, *data_shape) that returns the logits up to a learned bias
            per pixel.
        data_shape: Shape of one datum.
        data_mean: Mean of the training data, clamped to [0.001, 0.999]; the bias starts at its logit, by default at 0.
            A network that starts near 0 then starts at the mean image, instead of learning it in its first epochs.

    Raises:
        ValueError: Data are not 0 or 1, a shape is wrong, or the mean is outside [0, 1].

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes (2014).
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016): the bias.
    """

    def __init__(self, decoder_net: nn.Module, data_shape: Sequence[int], *, data_mean: Tensor | None = None):
        super().__init__(decoder_net, data_shape)
        mean = self.initial_mean(data_mean, 0, 1)
        self.bias = nn.Parameter(torch.zeros(self.data_shape) if mean is None else mean.clamp(1e-3, 1 - 1e-3).logit())

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return BinaryImages(parameters + self.bias, len(self.data_shape))

    def check(self, x: Tensor) -> None:
        if (x * x - x).any():  # fast; zero only for 0 and 1 (infinity gives NaN, which counts as true)
            raise ValueError(
                f"Bernoulli pixels are 0 or 1, found {x[(x != 0) & (x != 1)][0].item():g}: {_remedy_for_binary(x)}"
            )


class ContinuousBernoulli(Likelihood):
    """Independent continuous Bernoulli pixels, for data in [0, 1].

        p(x|z) = prod_d l_d exp(l_d x_d) / (exp(l_d) - 1),   l = decoder_net(z) + bias

    "Binary cross-entropy of grey pixels" is the same without its normaliser.

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log densities in nats per datum.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, *data_shape) that returns the logits up to a learned bias
            per pixel.
        data_shape: Shape of one datum.
        data_mean: Mean of the training data, clamped to [0.02, 0.98]; the initial bias has this mean. By default it is
            0.

    Raises:
        ValueError: Data are outside [0, 1], a shape is wrong, or the mean is outside [0, 1].

    References:
        Loaiza-Ganem & Cunningham, The continuous Bernoulli: fixing a pervasive error in variational autoencoders
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
            remedy = "scale the data to [0, 1] (x / 255 for bytes), or use a normal likelihood (LearnedScaleNormal)"
            raise ValueError(
                f"continuous Bernoulli pixels lie in [0, 1], found {found.item():g}: {remedy if found.isfinite() else FILL_IN}"
            )


class Normal(Likelihood):
    """Independent normal pixels with one given standard deviation.

        p(x|z) = prod_d N(x_d; mu_d, scale^2),   mu = decoder_net(z) + bias

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log densities in nats per datum.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, *data_shape) that returns the means up to a learned bias
            per pixel.
        data_shape: Shape of one datum.
        scale: The standard deviation, a hyper-parameter, in the units of x. 1 is the unit variance of textbooks, for
            which maximum likelihood is least squares. It is wide for pixels in [0, 1]: the KL then disables most latent
            dimensions.
        data_mean: Mean of the training data, at which the bias starts; 0 by default.

    Raises:
        ValueError: Data are not finite, a shape is wrong, or the scale is not positive.

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes (2014).
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
        self.scale = check_positive("scale", scale)
        self.bias = self.initial_bias(data_mean)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return dist.Normal(parameters + self.bias, self.scale).to_event(len(self.data_shape))

    def check(self, x: Tensor) -> None:
        _check_finite(x)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, {super().extra_repr()}"


class LearnedScaleNormal(Likelihood):
    """Independent normal pixels with one learned standard deviation.

        p(x|z) = prod_d N(x_d; mu_d, sigma^2),   mu = decoder_net(z) + bias,   sigma = exp(log_scale)

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log densities in nats per datum. They are
    bounded unless the network reproduces all pixels of all data exactly.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, *data_shape) that returns the means up to a learned bias
            per pixel.
        data_shape: Shape of one datum.
        initial_scale: Initial sigma, in the units of x.
        data_mean: Mean of the training data, at which the bias starts; 0 by default.

    Raises:
        ValueError: Data are not finite, a shape is wrong, or the scale is not positive.

    References:
        Rybkin, Daniilidis & Levine, Simple and Effective VAE Training with Calibrated Decoders (2021).
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
        self.log_scale = nn.Parameter(torch.tensor(math.log(check_positive("initial_scale", initial_scale))))
        self.bias = self.initial_bias(data_mean)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return dist.Normal(parameters + self.bias, self.log_scale.exp()).to_event(len(self.data_shape))

    def check(self, x: Tensor) -> None:
        _check_finite(x)


class HeteroscedasticNormal(Likelihood):
    """Independent normal pixels whose means and standard deviations both come from the network.

        p(x|z) = prod_d N(x_d; mu_d, sigma_d^2),   (mu, r) = decoder_net(z) + bias,   sigma = min_scale + softplus(r)

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log densities in nats per datum.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, 2, *data_shape) that returns means, then r, up to a learned
            bias for each.
        data_shape: Shape of one datum.
        min_scale: Floor of sigma, in the units of x. Without a floor the likelihood has no maximum, because the density
            is unbounded if the network matches a pixel exactly. 0.001 is about the standard deviation of rounding to
            256 levels of [0, 1]; it limits the gain to 6 nats per pixel. Pixels that are always the same (a black rim)
            gain all of that unless they are dequantised.
        initial_scale: Initial sigma, in the units of x.
        data_mean: Mean of the training data, at which the bias of mu starts; 0 by default.

    Raises:
        ValueError: Data are not finite, a shape is wrong, a scale is not positive, or `initial_scale` is not above
            `min_scale`.

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes (2014): appendix C.2.
        Mattei & Frellsen, Leveraging the exact likelihood of deep latent variable models (2018): the floor.
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
        self.min_scale = check_positive("min_scale", min_scale)
        above = check_positive("initial_scale", initial_scale) - self.min_scale
        if not above > 0:
            raise ValueError(f"initial_scale must be above min_scale={self.min_scale:g}, found {initial_scale:g}")
        self.bias = nn.Parameter(torch.zeros(self.parameters_shape))
        mean = self.initial_mean(data_mean)
        with torch.no_grad():
            self.bias[1] = inverse_softplus(above)
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
        raise ValueError(f"normal pixels are real numbers, found {x[~x.isfinite()][0].item():g}: {FILL_IN}")


def _remedy_for_binary(x: Tensor) -> str:
    """How to fix data that are not binary, by their values: advice for images does not help with counts."""
    low, high = x.min().item(), x.max().item()
    if not (math.isfinite(low) and math.isfinite(high)):
        return FILL_IN
    if low >= 0 and high <= 1:
        return (
            "binarise the data if they are grey values (pyrovae.data.binarize; fit(..., transform=pyrovae.data.binarize) "
            "redraws at every use), or use a likelihood for grey values (ContinuousBernoulli, DiscretizedLogistic)"
        )
    if low >= 0 and not (x - x.round()).any():
        return (
            f"values are whole numbers up to {high:g}; if they are bytes of images, divide them by 255 and binarise them "
            f"(pyrovae.data.binarize); if they are counts, use a likelihood of counts "
            f"(pyrovae.likelihoods.Poisson, NegativeBinomial), or (x > 0).to(x.dtype)"
        )
    return f"for data from {low:g} to {high:g} use a likelihood for real values (LearnedScaleNormal)"


def _logits_of_mean(mean: Tensor) -> Tensor:
    """Logits of continuous Bernoulli distributions with these means, clamped to (0.02, 0.98), by bisection."""
    wanted = mean.double().clamp(0.02, 0.98)
    low, high = torch.full_like(wanted, -50.0), torch.full_like(wanted, 50.0)  # at which E[x] is 0.02 and 0.98
    for _ in range(50):
        middle = (low + high) / 2
        below = ContinuousBernoulliPixel(middle).mean < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).to(mean.dtype)
