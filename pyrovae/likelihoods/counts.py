"""Likelihoods of counts, with an exposure per datum: a library size, a time, a population."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count, check_positive, checks_values
from pyrovae.common.networks import takes_context
from pyrovae.distributions import count_masses
from pyrovae.likelihoods.base import FILL_IN, Likelihood

__all__ = ["NegativeBinomial", "Poisson", "ZeroInflatedNegativeBinomial"]

# Means above 5e8 (of exposure 1) grow linearly in the network's output instead of exponentially. Otherwise raw counts,
# which an untrained encoder maps to z far from 0, give a first gradient whose square overflows float32.
_LARGEST_LOG_MEAN = 20.0
_SMALLEST_MEAN = 1e-3  # initial mean of an element that is 0 in all training data
_INITIAL_GATE = 0.1  # probability of an extra zero at the start of training


class _Counts(Likelihood):
    """What likelihoods of counts share: the log mean with its bias and its exposure, and the check of the data.

    A log mean l above 20 counts as 20 + log(1 + l - 20). The exposure multiplies the mean that this gives.
    """

    def __init__(
        self,
        decoder_net: nn.Module,
        data_shape: Sequence[int],
        exposure_column: int | None,
        data_mean: Tensor | None,
    ):
        super().__init__(decoder_net, data_shape)
        self.exposure_column = None if exposure_column is None else check_count("exposure_column", exposure_column, 0)
        self.bias = nn.Parameter(torch.zeros(self.parameters_shape))
        mean = self.initial_mean(data_mean, 0)
        if mean is not None:
            with torch.no_grad():
                self._parts(self.bias)[0].copy_(_inverse_bounded(mean.clamp(min=_SMALLEST_MEAN).log()))

    @property
    def num_parts(self) -> int:
        """The number of outputs of the network per element, with this instance's options."""
        return self.num_parameters()

    @property
    def parameters_shape(self) -> torch.Size:
        return self.data_shape if self.num_parts == 1 else torch.Size((self.num_parts, *self.data_shape))

    @abstractmethod
    def counts(self, log_mean: Tensor, *rest: Tensor) -> dist.TorchDistribution:
        """Return the distributions of the single counts, each argument being of shape (..., *data_shape)."""

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """Return p(x|z) for data of exposure 1."""
        return self._given(parameters, parameters.new_zeros(()))

    def at(self, parameters: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        if self.exposure_column is None:
            return self.distribution(parameters)
        log_exposure = self._exposure(context, parameters.ndim - len(self.parameters_shape)).log()
        return self._given(parameters, log_exposure.reshape(*log_exposure.shape, *(1 for _ in self.data_shape)))

    @property
    def takes_context(self) -> bool:
        return self.exposure_column is not None or takes_context(self.decoder_net)

    def network_context(self, context: Tensor | None) -> Tensor | None:
        """Return the context without the exposure, or None if nothing is left."""
        if context is None or self.exposure_column is None:
            return context
        kept = [column for column in range(context.shape[-1]) if column != self.exposure_column]
        return context[..., kept] if kept else None

    def check(self, x: Tensor) -> None:
        wrong = ~((x >= 0) & (x == x.round()) & (x < math.inf))
        if wrong.any():
            value = x[wrong][0].item()
            if not math.isfinite(value):
                remedy = FILL_IN
            elif value < 0:
                remedy = "use a likelihood for real values (LearnedScaleNormal, StudentT) if these are no counts"
            else:
                remedy = (
                    "pass the raw counts, not normalised or logged ones; a likelihood for positive numbers is LogNormal"
                )
            raise ValueError(f"counts are whole numbers of 0 or more, found {value:g}: {remedy}")

    def extra_repr(self) -> str:
        exposure = "" if self.exposure_column is None else f"exposure_column={self.exposure_column}, "
        return f"{exposure}{super().extra_repr()}"

    def _given(self, parameters: Tensor, log_exposure: Tensor) -> dist.TorchDistribution:
        log_mean, *rest = self._parts(parameters + self.bias)
        return self.counts(_bounded(log_mean) + log_exposure, *rest).to_event(len(self.data_shape))

    def _parts(self, parameters: Tensor) -> tuple[Tensor, ...]:
        return (parameters,) if self.num_parts == 1 else parameters.unbind(-1 - len(self.data_shape))

    def _exposure(self, context: Tensor | None, num_batch_dims: int) -> Tensor:
        column = self.exposure_column
        row = None if context is None else context.shape[num_batch_dims:]
        if context is None or row is None or len(row) != 1 or row[0] <= (column or 0):
            found = "none" if row is None else f"rows of shape {tuple(row)}"
            raise ValueError(
                f"{type(self).__name__} with exposure_column={column} takes the exposures from that column of a context "
                f"(N, C), found {found}: pass the context, or make the likelihood without exposure_column"
            )
        exposure = context[..., column]
        if checks_values() and not ((exposure > 0) & (exposure < math.inf)).all():
            wrong = exposure[~((exposure > 0) & (exposure < math.inf))][0].item()
            raise ValueError(
                f"exposures must be positive and finite, found {wrong:g} in column {column} of the context: remove these "
                f"data, or correct exposure_column"
            )
        return exposure


def _bounded(log_mean: Tensor) -> Tensor:
    """The log of a mean that is exp(l) up to l = 20, and its tangent beyond."""
    return log_mean.clamp(max=_LARGEST_LOG_MEAN) + (log_mean - _LARGEST_LOG_MEAN).relu().log1p()


def _inverse_bounded(log_mean: Tensor) -> Tensor:
    """The inverse of `_bounded`."""
    return log_mean.clamp(max=_LARGEST_LOG_MEAN) + (log_mean - _LARGEST_LOG_MEAN).relu().expm1()


class Poisson(_Counts):
    """Independent Poisson counts.

        p(x|z) = prod_d Poisson(x_d; t exp(l_d)),   l = decoder_net(z) + bias

    From exp(l) = exp(20) = 5e8 on, the rate grows linearly in l instead of exponentially, so that log masses and
    gradients are finite for z far from 0. It stays proportional to t.

    The data are raw counts. Scale them in the encoder's first layer, x.log1p(): for counts in the hundreds, an
    untrained network gives posteriors of infinite scale.

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log masses in nats per datum, computed in
    float64.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, *data_shape) that returns the log rates up to a learned bias
            per element. None for a column of `Columns`.
        data_shape: Shape of one datum.
        exposure_column: Column of the context (N, C) that holds t, for example the library size or the time observed;
            the network gets the other columns. By default t = 1.
        data_mean: Mean of the training data, each divided by its t; the bias starts where exp(l) is this mean, by default
            at 0.

    Raises:
        ValueError: Data are not counts, a shape is wrong, an exposure is missing or not positive, a mean is negative.
    """

    def __init__(
        self,
        decoder_net: nn.Module,
        data_shape: Sequence[int],
        *,
        exposure_column: int | None = None,
        data_mean: Tensor | None = None,
    ):
        super().__init__(decoder_net, data_shape, exposure_column, data_mean)

    def counts(self, log_mean: Tensor, *rest: Tensor) -> dist.TorchDistribution:
        return count_masses.Poisson(log_mean)


class NegativeBinomial(_Counts):
    """Independent negative binomial counts: Poisson counts whose rate varies beyond what z explains.

        p(x|z) = prod_d NB(x_d; m_d, r_d),   m = t exp(l),   variance m + m^2 / r,   l = decoder_net(z) + bias

    The inverse dispersion r is a learned parameter per element, or comes from the network.

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log masses in nats per datum, computed in
    float64.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, *data_shape) that returns the log means up to a learned bias
            per element; with `network_dispersion` (rows, 2, *data_shape), log means, then log r. None for a column of
            `Columns`.
        data_shape: Shape of one datum.
        network_dispersion: Take r from the network.
        inverse_dispersion: Where r starts.
        exposure_column: As for `Poisson`.
        data_mean: As for `Poisson`.

    Raises:
        ValueError: As for `Poisson`, or the inverse dispersion is not positive.

    References:
        Lopez, Regier, Cole, Jordan & Yosef, Deep generative modeling for single-cell transcriptomics (2018).
    """

    network_dispersion: bool

    def __init__(
        self,
        decoder_net: nn.Module,
        data_shape: Sequence[int],
        *,
        network_dispersion: bool = False,
        inverse_dispersion: float = 1.0,
        exposure_column: int | None = None,
        data_mean: Tensor | None = None,
    ):
        inverse_dispersion = check_positive("inverse_dispersion", inverse_dispersion)
        self.__dict__["network_dispersion"] = bool(network_dispersion)  # the base class asks for the shape
        super().__init__(decoder_net, data_shape, exposure_column, data_mean)
        start = torch.full(self.data_shape, math.log(inverse_dispersion))
        if network_dispersion:
            with torch.no_grad():
                self._parts(self.bias)[-1].copy_(start)
        else:
            self.log_inverse_dispersion = nn.Parameter(start)

    @classmethod
    def num_parameters(cls, network_dispersion: bool = False) -> int:
        return 1 + network_dispersion

    @property
    def num_parts(self) -> int:
        return self.num_parameters(self.network_dispersion)

    def counts(self, log_mean: Tensor, *rest: Tensor) -> dist.TorchDistribution:
        return count_masses.NegativeBinomial(log_mean, self._log_inverse_dispersion(rest))

    def _log_inverse_dispersion(self, rest: Sequence[Tensor]) -> Tensor:
        return rest[-1] if self.network_dispersion else self.log_inverse_dispersion


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """Independent negative binomial counts with more zeros, as from a counter that sometimes misses everything.

        p(x|z) = prod_d (g_d 1[x_d = 0] + (1 - g_d) NB(x_d; m_d, r_d)),
        m = t exp(l),   g = sigmoid(a),   (l, a) = decoder_net(z) + bias

    Shapes: z (..., latent_dim) -> batch shape (...), event shape data_shape. Log masses in nats per datum, computed in
    float64.

    Args:
        decoder_net: Any module (rows, latent_dim) -> (rows, 2, *data_shape) that returns l, then a, up to a learned bias
            for each; with `network_dispersion` (rows, 3, *data_shape), l, a, then log r. None for a column of `Columns`.
        data_shape: Shape of one datum.
        network_dispersion: As for `NegativeBinomial`.
        inverse_dispersion: As for `NegativeBinomial`.
        exposure_column: As for `Poisson`.
        data_mean: As for `Poisson`; g starts at 0.1, and m where the mean is that of the data.

    Raises:
        ValueError: As for `NegativeBinomial`.

    References:
        Lopez, Regier, Cole, Jordan & Yosef, Deep generative modeling for single-cell transcriptomics (2018).
    """

    def __init__(
        self,
        decoder_net: nn.Module,
        data_shape: Sequence[int],
        *,
        network_dispersion: bool = False,
        inverse_dispersion: float = 1.0,
        exposure_column: int | None = None,
        data_mean: Tensor | None = None,
    ):
        super().__init__(
            decoder_net,
            data_shape,
            network_dispersion=network_dispersion,
            inverse_dispersion=inverse_dispersion,
            exposure_column=exposure_column,
            data_mean=None if data_mean is None else torch.as_tensor(data_mean) / (1 - _INITIAL_GATE),
        )
        with torch.no_grad():
            self._parts(self.bias)[1].fill_(math.log(_INITIAL_GATE / (1 - _INITIAL_GATE)))

    @classmethod
    def num_parameters(cls, network_dispersion: bool = False) -> int:
        return 2 + network_dispersion

    def counts(self, log_mean: Tensor, *rest: Tensor) -> dist.TorchDistribution:
        return count_masses.ZeroInflatedNegativeBinomial(log_mean, self._log_inverse_dispersion(rest), rest[0])
