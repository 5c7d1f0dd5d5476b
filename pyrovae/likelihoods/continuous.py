"""Likelihoods of real and of positive numbers beyond the normal, and of data in other units than the network's."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_positive
from pyrovae.distributions import real_values
from pyrovae.likelihoods.base import FILL_IN, Likelihood, inverse_softplus

__all__ = ["LogNormal", "Scaled", "StudentT"]

_SMALLEST_MEAN = 1e-6


class StudentT(Likelihood):
    """Independent Student t elements, for real values with outliers.

        p(x|z) = prod_d t(x_d; v, m_d, s_d),   m = decoder_net(z) + bias,   s learned per element

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log densities in nats per datum.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, *data_shape) that returns m up to a learned bias per
            element. None for a column of `Columns`.
        data_shape: Shape of one datum.
        df: v, the degrees of freedom: 1 is Cauchy's distribution, which has no mean; the larger, the closer to normal.
        learn_df: Learn v > 1, one for all elements, starting from `df`.
        initial_scale: Where s starts, in the units of x.
        data_mean: Mean of the training data, at which the bias starts; 0 by default.

    Raises:
        ValueError: Data are not finite, a shape is wrong, df or a scale is not positive, or a learned df is not above 1.

    References:
        Takahashi et al., Student-t Variational Autoencoder for Robust Density Estimation (2018).
    """

    def __init__(
        self,
        decoder_net: nn.Module,
        data_shape: Sequence[int],
        *,
        df: float = 4.0,
        learn_df: bool = False,
        initial_scale: float = 0.3,
        data_mean: Tensor | None = None,
    ):
        super().__init__(decoder_net, data_shape)
        check_positive("df", df)
        if learn_df and not df > 1:
            raise ValueError(f"a learned df stays above 1, where the mean exists; found df={df:g}: start above 1")
        self.df = None if learn_df else float(df)
        if learn_df:
            self.raw_df = nn.Parameter(torch.tensor(inverse_softplus(df - 1)))
        self.log_scale = nn.Parameter(
            torch.full(self.data_shape, math.log(check_positive("initial_scale", initial_scale)))
        )
        self.bias = self.initial_bias(data_mean)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        loc = parameters + self.bias
        df = 1 + nn.functional.softplus(self.raw_df) if self.df is None else loc.new_full((), self.df)
        return real_values.StudentT(loc, self.log_scale.exp(), df).to_event(len(self.data_shape))

    def check(self, x: Tensor) -> None:
        if not x.isfinite().all():
            raise ValueError(f"Student t data are real numbers, found {x[~x.isfinite()][0].item():g}: {FILL_IN}")

    def extra_repr(self) -> str:
        return f"{'' if self.df is None else f'df={self.df:g}, '}{super().extra_repr()}"


class LogNormal(Likelihood):
    """Independent log-normal elements, for positive numbers over several orders of magnitude.

        p(x|z) = prod_d N(log x_d; m_d, s_d^2) / x_d,   m = decoder_net(z) + bias,   s learned per element

    The factor 1 / x_d makes it a density of x itself and not of its log.

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log densities in nats per datum.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, *data_shape) that returns m up to a learned bias per
            element. None for a column of `Columns`.
        data_shape: Shape of one datum.
        initial_scale: Where s starts; 0.3 is a spread of 30%.
        data_mean: Mean of the training data; the bias starts so that the mean of x is this. By default it is 0.

    Raises:
        ValueError: Data are not positive and finite, a shape is wrong, the scale is not positive, or a mean is negative.
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
        log_scale = math.log(check_positive("initial_scale", initial_scale))
        self.log_scale = nn.Parameter(torch.full(self.data_shape, log_scale))
        mean = self.initial_mean(data_mean, 0)
        bias = torch.zeros(self.data_shape) if mean is None else mean.clamp(min=_SMALLEST_MEAN).log()
        self.bias = nn.Parameter(bias if mean is None else bias - initial_scale**2 / 2)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return real_values.LogNormal(parameters + self.bias, self.log_scale.exp()).to_event(len(self.data_shape))

    def filled(self, x: Tensor, observed: Tensor) -> Tensor:
        return torch.where(observed, x, 1.0)

    def check(self, x: Tensor) -> None:
        wrong = ~((x > 0) & (x < math.inf))
        if wrong.any():
            found = x[wrong][0].item()
            remedy = (
                "use a likelihood for real values (StudentT), or for counts (NegativeBinomial)"
                if math.isfinite(found)
                else FILL_IN
            )
            raise ValueError(f"log-normal data are positive numbers, found {found:g}: {remedy}")


class Scaled(Likelihood):
    """Data in their own units under a likelihood for standardised data; log p(x) is in the units of the data.

        x = loc + scale y,   log p(x|z) = log p_y((x - loc) / scale | z) - sum_d log scale_d

    Standardising the data beforehand leaves out the last term, so that log p(x) depends on the units chosen.

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log densities in nats per datum.

    Args:
        likelihood: p_y, a density whose elements are independent: `LearnedScaleNormal`, `StudentT`,
            `ContinuousBernoulli` for data in [loc, loc + scale].
        loc: What is subtracted: a number or a tensor that broadcasts to data_shape.
        scale: What is divided by, positive; likewise.

    Raises:
        ValueError: The scale is not positive and finite, a shape is wrong, or the likelihood is one of masses (counts,
            levels, categories).

    Example:
        >>> likelihood = Scaled(StudentT(nn.Linear(2, 3), 3), loc=170.0, scale=10.0)
        >>> likelihood(torch.zeros(5, 2)).log_prob(torch.full((5, 3), 180.0)).shape
        torch.Size([5])
    """

    def __init__(self, likelihood: Likelihood, loc: float | Tensor, scale: float | Tensor):
        nn.Module.__init__(self)  # the network and the shape are those of the likelihood
        self.likelihood = likelihood
        self.data_shape = likelihood.data_shape
        for name, value in (("loc", loc), ("scale", scale)):
            value = torch.as_tensor(value, dtype=torch.get_default_dtype()).detach()
            try:
                value = value.expand(self.data_shape).clone()
            except RuntimeError as error:
                raise ValueError(
                    f"{name} must be a number or of shape {tuple(self.data_shape)}, found {tuple(value.shape)}"
                ) from error
            if not value.isfinite().all() or (name == "scale" and not (value > 0).all()):
                raise ValueError(
                    f"{name} must be {'positive and ' if name == 'scale' else ''}finite, found {value.min():g} to "
                    f"{value.max():g}: leave out elements that never vary"
                )
            self.register_buffer(name, value)

    loc: Tensor
    scale: Tensor

    @property
    def decoder_net(self) -> Any:  # type: ignore[override]
        return self.likelihood.decoder_net

    @classmethod
    def num_parameters(cls, likelihood: Likelihood | None = None) -> int:
        return 1 if likelihood is None else likelihood.parameters_shape.numel() // likelihood.data_shape.numel()

    @property
    def parameters_shape(self) -> torch.Size:
        return self.likelihood.parameters_shape

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return self._scaled(self.likelihood.distribution(parameters))

    def at(self, parameters: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        return self._scaled(self.likelihood.at(parameters, context))

    def network_context(self, context: Any) -> Tensor | None:
        return self.likelihood.network_context(context)

    @property
    def takes_context(self) -> bool:
        return self.likelihood.takes_context

    def filled(self, x: Tensor, observed: Tensor) -> Tensor:
        inside = self.likelihood.filled((x - self.loc) / self.scale, observed)
        return torch.where(observed, x, self.loc + self.scale * inside)

    def check(self, x: Tensor) -> None:
        try:
            self.likelihood.check((x - self.loc) / self.scale)
        except ValueError as error:
            raise ValueError(f"{error} (values in the units of Scaled, (x - loc) / scale)") from error

    def _scaled(self, distribution: Any) -> dist.TorchDistribution:
        if distribution.support.is_discrete:
            raise ValueError(
                f"{type(self.likelihood).__name__} gives probability masses, which do not change with units: use it "
                f"without Scaled"
            )
        elements = real_values.Affine(distribution.base_dist, self.loc, self.scale)
        return elements.to_event(len(self.data_shape))
