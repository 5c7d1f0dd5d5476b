"""Latents that the model couples across the data: no number per datum is log p(x_n) then."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from ways import Pair, normal_data, normal_evidence, normal_model, way, wide_guide

COUPLED = "latents that the model couples"
COUPLES = r"couple|depend|influence"


def coupled(model, guide=wide_guide, num_data=5):
    return Pair(model, guide, (torch.linspace(-1.0, 1.5, num_data),))


@way(COUPLED, COUPLES)
def a_smoothness_factor():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("smooth", -((z - z.roll(1, -1)) ** 2))

    return coupled(model)


@way(COUPLED, COUPLES)
def latents_centred_over_the_batch():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 1.0), obs=x)

    return coupled(model)


@way(COUPLED, COUPLES)
def attention_over_the_batch():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mixed = torch.softmax(z @ z.mT, -1) @ z
            pyro.sample("x", dist.Normal(mixed.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    return coupled(model, guide)


@way(COUPLED, COUPLES)
def a_random_walk_over_the_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.cumsum(-1), 1.0), obs=x)

    return coupled(model)


@way(COUPLED, COUPLES)
def few_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + z.flip(-1), 1.0), obs=x)

    return coupled(model, num_data=2)


@way(COUPLED, COUPLES)
def a_guide_that_draws_one_datum_from_another():
    def guide(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("z", dist.Normal(x / 2, 0.8))
            pyro.sample("u", dist.Normal(first.roll(1, -1), 1.5))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            u = pyro.sample("u", dist.Normal(z.roll(1, -1), 1.0))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    return coupled(model, guide)


@way(COUPLED)
def a_chain_over_the_data_as_one_datum():
    """The right way to write it: an event instead of a plate. x = L e + noise, with L the lower ones."""
    x = normal_data()

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.cumsum(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    t = torch.arange(1.0, 4.0)
    covariance = torch.minimum(t, t[:, None]) + torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    return Pair(model, guide, (x,), exact)


@way(COUPLED)
def data_that_are_conditions_of_their_neighbours():
    """x_n given x_(n-1): the observed values couple, the latents do not, and each term is log p(x_n | x_(n-1))."""
    x = normal_data()

    def previous(x):
        return torch.cat([x.new_zeros(1), x[:-1]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(previous(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((previous(x) + x) / 2, 0.8))

    return Pair(model, guide, (x,), normal_evidence(x - previous(x)))


@way(COUPLED)
def a_common_latent_as_one_datum():
    """The latent of all data stands outside the plate, so the whole is one datum; see also the automatic guides."""
    x = normal_data()

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=True):
            pyro.sample("x", dist.Normal(mean.unsqueeze(-1), 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(x.sum() / 4, 0.6))

    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)
    return Pair(model, guide, (x,), exact)


@way(COUPLED, COUPLES)
def a_weak_coupling():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 1e-3 * z.roll(1, -1), 1.0), obs=x)

    return coupled(model)


@way(COUPLED, COUPLES)
def discrete_latents_that_are_counted():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k.sum(-1, keepdim=True), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(torch.full((len(x),), 0.5)))

    return coupled(model, guide)


@way(COUPLED, COUPLES)
def many_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 0.5 * z.roll(1, -1), 1.0), obs=x)

    return coupled(model, num_data=120)


@way(COUPLED, COUPLES)
def two_data_alone_among_many():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            last = z[..., -1:] * (torch.arange(len(x)) == 3)
            pyro.sample("x", dist.Normal(z + last, 1.0), obs=x)

    return coupled(model, num_data=40)


@way(COUPLED)
def a_guide_that_looks_at_all_data():
    """Any q is allowed: N(x_n / 2 + something of the others) is still a proposal for z_n."""
    x = normal_data()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.1 * x.mean(), 0.9))

    return Pair(normal_model, guide, (x,), normal_evidence(x))


@way(COUPLED)
def a_factor_outside_the_plate():
    """Written so, the whole is one datum: z ~ N(0, I) with a smoothness factor, x ~ N(z, I)."""
    x = normal_data()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("smooth", -(z - z.roll(1, -1)).square().sum(-1))

    differences = torch.eye(3) - torch.eye(3).roll(1, 0)
    precision = torch.eye(3) + 2 * differences.T @ differences
    covariance = torch.linalg.inv(precision) + torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x) - torch.logdet(precision) / 2
    return Pair(model, wide_guide, (x,), exact)
