"""Linear-Gaussian hierarchies."""

import pyro.distributions as dist
import torch
from torch import nn

import pyrovae as pv
from pyrovae import guides, likelihoods, priors
from pyrovae.models.layers import ConditionalNormal


class LinearNormal(likelihoods.Likelihood):
    """N(x; net(z), scale^2)."""

    def __init__(self, decoder_net, data_shape, scale):
        super().__init__(decoder_net, data_shape)
        self.scale = scale

    def distribution(self, parameters):
        return dist.Normal(parameters, self.scale).to_event(len(self.data_shape))

    def check(self, x):
        pass


def affine(weight, bias):
    linear = nn.Linear(*weight.shape[::-1])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear


def linear_layer(weight, bias, scale):
    """N(weight c + bias, diag scale^2), as a `ConditionalNormal`."""
    layer = ConditionalNormal(nn.Identity(), len(bias), num_features=weight.shape[1])
    layer.head = affine(torch.cat([weight, torch.zeros_like(weight)]), torch.cat([bias, scale.log()]))
    return layer


def full_rank_guide(weight, bias, covariance):
    """N(weight x + bias, covariance), as a `FullRankNormal`."""
    size, width = weight.shape
    guide = guides.FullRankNormal(nn.Identity(), size, num_features=width)
    factor = torch.linalg.cholesky(covariance)
    rows, columns = torch.tril_indices(size, size, -1)
    rest = torch.cat([factor.diagonal().log(), factor[rows, columns]])
    guide.head = affine(torch.cat([weight, torch.zeros(len(rest), width)]), torch.cat([bias, rest]))
    return guide


class LinearHierarchy:
    """z2 ~ N(0, I), z1 ~ N(A z2 + a, s1^2), x ~ N(W z1 + w, s^2): evidence and posteriors in closed form.

    The columns of A are orthogonal, and those of W, so that p(z2|z1) and p(z1|z2, x) have diagonal covariances; p(z1|x)
    and p(z2|x) do not.
    """

    def __init__(self):
        generator = torch.Generator().manual_seed(7)

        def orthogonal(rows, columns):
            q = torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
            return q * (0.5 + torch.arange(1, columns + 1) / 2)

        self.A, self.a, self.s1 = orthogonal(3, 2), torch.tensor([0.5, -1.0, 2.0]), 0.6
        self.W, self.w, self.s = orthogonal(5, 3), torch.arange(5.0), 0.8
        self.cov1 = self.A @ self.A.T + self.s1**2 * torch.eye(3)
        self.cov_x = self.W @ self.cov1 @ self.W.T + self.s**2 * torch.eye(5)
        self.mean_x = self.W @ self.a + self.w

    def data(self, num_data):
        return dist.MultivariateNormal(self.mean_x, self.cov_x).sample((num_data,))

    def log_prob(self, x):
        return dist.MultivariateNormal(self.mean_x, self.cov_x).log_prob(x)

    def model(self):
        layer = linear_layer(self.A, self.a, self.s1 * torch.ones(3))
        return pv.HierarchicalModel(
            priors.StandardNormal(2), [layer], LinearNormal(affine(self.W, self.w), (5,), self.s)
        )

    def given_x(self, covariance, cross, mean):
        """q(z|x) as a guide, for z with this covariance, Cov(z, x) and mean."""
        weight = cross @ torch.linalg.inv(self.cov_x)
        return full_rank_guide(weight, mean - weight @ self.mean_x, covariance - weight @ cross.T)

    def bottom_up(self):
        """The exact posterior as p(z1|x) p(z2|z1)."""
        bottom = self.given_x(self.cov1, self.cov1 @ self.W.T, self.a)
        variance = 1 / (1 + (self.A.T @ self.A).diagonal() / self.s1**2)
        weight = variance[:, None] * self.A.T / self.s1**2
        return pv.BottomUpGuide(bottom, [linear_layer(weight, -weight @ self.a, variance.sqrt())])

    def top_down(self):
        """The exact posterior as p(z2|x) p(z1|z2, x)."""
        top = self.given_x(torch.eye(2), self.A.T @ self.W.T, torch.zeros(2))
        variance = 1 / (1 / self.s1**2 + (self.W.T @ self.W).diagonal() / self.s**2)
        of_z2, of_x = self.A / self.s1**2, self.W.T / self.s**2
        weight = variance[:, None] * torch.cat([of_z2, of_x], 1)
        bias = variance * (self.a / self.s1**2 - of_x @ self.w)
        layer = linear_layer(weight, bias, variance.sqrt())
        return pv.TopDownGuide(top, [layer], nn.Identity(), num_features=5)
