"""Supports: proposals that leave something out, and constrained values."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions import transforms as T

from ways import Pair, normal_data, normal_evidence, normal_model, on_grid, proposal, way
from ways.discrete import bit_pair, class_pair

NARROW = "proposals that leave something out"
UNCOVERED = "does not cover the prior at site '[ktyz]'"


@way(NARROW, UNCOVERED)
def a_class_of_probability_zero():
    return class_pair(proposal(("k", lambda x: dist.Categorical(torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(len(x), 4)))))


@way(NARROW, UNCOVERED)
def a_class_masked_by_its_logit():
    logits = torch.tensor([0.0, 0.0, 0.0, -math.inf])
    return class_pair(proposal(("k", lambda x: dist.Categorical(logits=logits.to(x).expand(len(x), 4)))))


@way(NARROW, "all its mass on one point at site 'k'")
def a_class_that_is_certain():
    return class_pair(proposal(("k", lambda x: dist.Delta(torch.zeros(len(x)).long()))))


@way(NARROW, UNCOVERED)
def a_bit_that_is_certain():
    certain = torch.tensor([0.5, 0.5, 0.0])
    return bit_pair(proposal(("y", lambda x: dist.Bernoulli(certain.to(x).expand(len(x), 3)).to_event(1))))


def beta_model(x):
    with pyro.plate("data", len(x)):
        t = pyro.sample("t", dist.Beta(1.0, 200.0))
        pyro.sample("x", dist.Bernoulli(t), obs=x)


@way(NARROW, UNCOVERED)
def a_short_uniform_for_a_beta():
    x = torch.tensor([0.0, 1.0, 1.0])
    exact = torch.where(x == 1, 1.0, 200.0).log() - math.log(201)
    guide = proposal(("t", lambda x: dist.Uniform(torch.zeros(len(x)), 0.05)))
    return Pair(beta_model, guide, (x,), exact)


@way(NARROW, UNCOVERED)
def a_uniform_for_a_normal():
    guide = proposal(("z", lambda x: dist.Uniform(x / 2 - 1, x / 2 + 1)))
    return Pair(normal_model, guide, (normal_data(),), normal_evidence(normal_data()))


@way(NARROW, UNCOVERED)
def a_positive_guide_for_a_normal():
    guide = proposal(("z", lambda x: dist.LogNormal(torch.zeros(len(x)), 1.0)))
    return Pair(normal_model, guide, (normal_data(),), normal_evidence(normal_data()))


@way(NARROW)
def narrower_than_the_prior_where_the_data_say_so():
    """z ~ Exp(1), x ~ U(0, z): z > x, and the shifted exponential has exactly that support: p(x) = E1(x)."""
    x = torch.tensor([0.5, 1.5])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Uniform(0.0, z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            shift = T.AffineTransform(x, 1.0)
            pyro.sample("z", dist.TransformedDistribution(dist.Exponential(torch.full((len(x),), 0.9)), [shift]))

    return Pair(model, guide, (x,), torch.tensor([0.5597735947761608, 0.1000195824066327]).log())


@way(NARROW)
def wider_than_a_bounded_prior():
    x = torch.tensor([0.3, -1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    normal = torch.distributions.Normal(0.0, 1.0)
    exact = (normal.cdf(1 - x) - normal.cdf(-x)).log()
    return Pair(model, proposal(("z", lambda x: dist.Normal(torch.full((len(x),), 0.5), 0.7))), (x,), exact)


# --- constrained supports ---

CONSTRAINED = "constrained supports"
COUNTS = (1.0, 4.0, 9.0)


def rate_pair(make):
    x, a, b = torch.tensor(COUNTS), 2.0, 0.5

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(a, b))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    return Pair(model, proposal(("rate", make)), (x,), dist.GammaPoisson(a, b).log_prob(x))


way(CONSTRAINED, name="gamma by gamma")(lambda: rate_pair(lambda x: dist.Gamma(1.5 + 0.9 * x, 1.3)))
way(CONSTRAINED, name="gamma by log-normal")(lambda: rate_pair(lambda x: dist.LogNormal(((2 + x) / 1.5).log(), 0.8)))
way(CONSTRAINED, name="gamma by the exact posterior")(lambda: rate_pair(lambda x: dist.Gamma(2 + x, 1.5)))
way(CONSTRAINED, name="gamma by a normal on the whole line")(
    lambda: rate_pair(lambda x: dist.Normal((2 + x) / 1.5, (2 + x) / 1.5 + 1))
)
way(CONSTRAINED, name="gamma by a softplus of a normal")(
    lambda: rate_pair(
        lambda x: dist.TransformedDistribution(dist.Normal((2 + x) / 1.5, (2 + x) / 1.5 + 1), [T.SoftplusTransform()])
    )
)


def share_pair(make):
    """Beta-Binomial."""
    x, total, a, b = torch.tensor([1.0, 4.0, 6.0]), 6, 2.0, 3.0

    def model(x):
        with pyro.plate("data", len(x)):
            t = pyro.sample("t", dist.Beta(a, b))
            pyro.sample("x", dist.Binomial(total, t), obs=x)

    return Pair(model, proposal(("t", make)), (x,), dist.BetaBinomial(a, b, total).log_prob(x))


way(CONSTRAINED, name="beta by beta")(lambda: share_pair(lambda x: dist.Beta(1.5 + 0.8 * x, 2 + 0.8 * (6 - x))))
way(CONSTRAINED, name="beta by logit-normal")(
    lambda: share_pair(
        lambda x: dist.TransformedDistribution(dist.Normal(((2 + x) / (9 - x)).log(), 1.0), [T.SigmoidTransform()])
    )
)
way(CONSTRAINED, name="beta by Kumaraswamy, a law without a bijection of its own")(
    lambda: share_pair(lambda x: dist.Kumaraswamy(1.5 + 0.5 * x, 1.5 + 0.5 * (6 - x)))
)


def simplex_pair(make):
    """Dirichlet-Multinomial with one draw: Dirichlet-Categorical."""
    x, a = torch.tensor([0, 2, 1]), torch.tensor([1.5, 2.0, 3.0])

    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(a))
            pyro.sample("x", dist.Categorical(p), obs=x)

    return Pair(model, proposal(("p", make)), (x,), (a / a.sum())[x].log())


way(CONSTRAINED, name="Dirichlet by Dirichlet")(
    lambda: simplex_pair(lambda x: dist.Dirichlet(torch.full((len(x), 3), 1.3)))
)
way(CONSTRAINED, name="Dirichlet by stick-breaking of a normal")(
    lambda: simplex_pair(
        lambda x: dist.TransformedDistribution(
            dist.Normal(torch.zeros(len(x), 2), 1.1).to_event(1), [T.StickBreakingTransform()]
        )
    )
)
way(CONSTRAINED, "site 'p'", name="Dirichlet by the softmax of as many normals")(
    lambda: simplex_pair(
        lambda x: dist.TransformedDistribution(
            dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1), [T.SoftmaxTransform()]
        )
    )
)


@way(CONSTRAINED)
def correlations():
    """LKJ prior of a 2 x 2 correlation r, x ~ N(r, 0.5); density of r: (1 - r^2)^(eta - 1)."""
    x = torch.tensor([0.4, -0.2])

    def model(x):
        with pyro.plate("data", len(x)):
            factor = pyro.sample("factor", dist.LKJCholesky(2, torch.tensor(2.0)))
            pyro.sample("x", dist.Normal(factor[..., 1, 0], 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("factor", dist.LKJCholesky(2, torch.tensor(1.0)).expand([len(x)]))

    exact = on_grid(lambda r: (0.75 * (1 - r * r)).log() + dist.Normal(r, 0.5).log_prob(x), -1.0, 1.0)
    return Pair(model, guide, (x,), exact)


@way(CONSTRAINED)
def ordered():
    """Two normals in order: the density of the order statistics is 2 p(a) p(b) where a < b; x ~ N(b - a, 0.5)."""
    x = torch.tensor([0.4, 1.5])

    def ordered_normals(scale, num_data=()):
        base = dist.Normal(torch.zeros(*num_data, 2), scale).to_event(1)
        return dist.TransformedDistribution(base, [T.OrderedTransform()])

    def model(x):
        with pyro.plate("data", len(x)):
            o = pyro.sample("o", ordered_normals(1.0))
            pyro.sample("x", dist.Normal(o[..., 1] - o[..., 0], 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("o", ordered_normals(1.1, (len(x),)))

    # o = (u, u + exp v): x ~ N(exp v, 0.5) with v ~ N(0, 1)
    exact = on_grid(lambda v: dist.Normal(0.0, 1.0).log_prob(v) + dist.Normal(v.exp(), 0.5).log_prob(x), -9.0, 9.0)
    return Pair(model, guide, (x,), exact)


@way(CONSTRAINED, "ImproperUniform")
def improper_prior():
    """A flat prior cannot be drawn from, and so its coverage not be looked at."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real, (len(x),), ()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Pair(model, proposal(("z", lambda x: dist.Normal(x, 1.2))), (normal_data(),), torch.zeros(3))


@way(CONSTRAINED)
def heavy_tails():
    """Student's prior and guide: log p by a grid."""
    x = torch.tensor([0.5, 6.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(3.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = on_grid(lambda z: dist.StudentT(3.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x), -40.0, 40.0)
    return Pair(model, proposal(("z", lambda x: dist.StudentT(2.0, 0.7 * x, 1.0))), (x,), exact)


@way(NARROW, UNCOVERED)
def fewer_counts_than_the_prior_has():
    """Binomial(3) for Poisson(0.1): 4 is rare, and possible."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(0.1))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    return Pair(
        model, proposal(("k", lambda x: dist.Binomial(3, torch.full((len(x),), 0.5)))), (torch.tensor([0.0, 3.0]),)
    )


@way(NARROW, UNCOVERED)
def fewer_classes_than_the_prior_has():
    return class_pair(proposal(("k", lambda x: dist.Categorical(torch.ones(len(x), 3) / 3))))


@way(NARROW, UNCOVERED)
def a_half_normal_for_a_normal():
    return Pair(normal_model, proposal(("z", lambda x: dist.HalfNormal(torch.ones(len(x))))), (normal_data(),))


@way(NARROW, UNCOVERED)
def a_short_uniform_for_a_gamma():
    def model(x):
        with pyro.plate("data", len(x)):
            t = pyro.sample("t", dist.Gamma(2.0, 100.0))
            pyro.sample("x", dist.Poisson(t), obs=x)

    guide = proposal(("t", lambda x: dist.Uniform(torch.zeros(len(x)), 0.08)))
    return Pair(model, guide, (torch.tensor([0.0, 1.0]),))


@way(NARROW)
def half_a_line_where_the_model_has_half_a_line():
    """z half-normal by a log-normal: x ~ N(z, 1)."""
    x = torch.tensor([0.5, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.HalfNormal(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = on_grid(lambda z: dist.HalfNormal(1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x), 0.0, 10.0)
    return Pair(model, proposal(("z", lambda x: dist.Gamma(torch.full((len(x),), 1.0), 0.8))), (x,), exact)


@way(NARROW)
def narrower_by_a_factor_of_the_data():
    """z ~ N(0, 1) and the data say z > 0: a half-normal guide has all of the posterior."""
    x = torch.tensor([0.5, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("positive", torch.where(z > 0, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = on_grid(lambda z: dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x), 0.0, 10.0)
    return Pair(model, proposal(("z", lambda x: dist.HalfNormal(torch.full((len(x),), 1.3)))), (x,), exact)
