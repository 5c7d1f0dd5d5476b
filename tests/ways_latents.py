"""Kinds of latents and of proposals: discrete, relaxed, on circles and simplices, by flows, too narrow, improper."""

import math
from functools import partial
from itertools import product

import pyro
import pyro.distributions as dist
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import constraints
from pyro.distributions import transforms as T
from pyro.infer import config_enumerate
from torch.distributions import biject_to
from ways import Pair, normal_data, normal_evidence, normal_model, on_grid, way

# --- discrete latents ---------------------------------------------------------------------------------------------------------

LEVELS = torch.tensor([-2.0, -1.0, 0.5, 2.0])
POINTS = (-1.8, 0.0, 0.6, 2.2)
DISCRETE = "discrete latents"


def class_model(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(4) / 4))
        pyro.sample("x", dist.Normal(LEVELS.to(x)[k], 0.7), obs=x)


def class_pair(guide, exact=True, model=class_model):
    x = torch.tensor(POINTS)
    terms = math.log(0.25) + dist.Normal(LEVELS.to(x), 0.7).log_prob(x[:, None])
    return Pair(model, guide, (x,), terms.logsumexp(-1) if exact else None)


def proposal(name, make):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(name, make(x))

    return guide


@way(DISCRETE)
def categorical():
    return class_pair(
        proposal("k", lambda x: dist.Categorical(logits=-0.5 * (x[:, None] - LEVELS.to(x)).square() / 0.7**2))
    )


@way(DISCRETE)
def categorical_of_equal_probabilities():
    return class_pair(proposal("k", lambda x: dist.Categorical(torch.ones(len(x), 4) / 4)))


@way(DISCRETE)
def one_hot():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.OneHotCategorical(torch.ones(4) / 4))
            pyro.sample("x", dist.Normal((k * LEVELS.to(x)).sum(-1), 0.7), obs=x)

    return class_pair(proposal("k", lambda x: dist.OneHotCategorical(torch.ones(len(x), 4) / 4)), model=model)


BITS = (-1.0, 0.0, 0.6, 2.2)


def bit_model(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(0.3 * torch.ones(3)).to_event(1))
        pyro.sample("x", dist.Normal(y.sum(-1), 0.7), obs=x)


def bit_pair(guide, exact=True, model=bit_model):
    x = torch.tensor(BITS)
    terms = [
        dist.Bernoulli(torch.tensor(0.3)).log_prob(torch.tensor(bits).to(x)).sum()
        + dist.Normal(float(sum(bits)), 0.7).log_prob(x)
        for bits in product([0, 1], repeat=3)
    ]
    return Pair(model, guide, (x,), torch.stack(terms).logsumexp(0) if exact else None)


@way(DISCRETE)
def bernoulli_bits():
    return bit_pair(proposal("y", lambda x: dist.Bernoulli(0.5 * torch.ones(len(x), 3)).to_event(1)))


@way(DISCRETE)
def counts_by_a_wider_poisson():
    """k ~ Poisson(2), x ~ N(k, 1), guide: geometric, whose tail is heavier."""
    x = torch.tensor([0.0, 1.5, 4.0])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(2.0))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    k = torch.arange(60.0).unsqueeze(1)
    exact = (dist.Poisson(2.0).log_prob(k) + dist.Normal(k, 1.0).log_prob(x)).logsumexp(0)
    return Pair(model, proposal("k", lambda x: dist.Geometric(torch.full((len(x),), 0.3))), (x,), exact)


@way(DISCRETE)
def discrete_and_continuous_together():
    """k picks the mean of z, and x ~ N(z, 1): a mixture of normals."""
    x = torch.tensor(POINTS)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(4) / 4))
            z = pyro.sample("z", dist.Normal(LEVELS.to(x)[k], 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(len(x), 4) / 4))
            pyro.sample("z", dist.Normal(LEVELS.to(x)[k], 0.55))

    exact = (math.log(0.25) + dist.Normal(LEVELS.to(x), 1.25**0.5).log_prob(x[:, None])).logsumexp(-1)
    return Pair(model, guide, (x,), exact)


@way(DISCRETE)
def summed_out_in_the_model():
    """The remedy that the refusal of enumeration names: MixtureSameFamily."""
    x = torch.tensor(POINTS)

    def model(x):
        with pyro.plate("data", len(x)):
            mixture = dist.Categorical(torch.ones(4) / 4)
            z = pyro.sample("z", dist.MixtureSameFamily(mixture, dist.Normal(LEVELS.to(x), 0.5)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = (math.log(0.25) + dist.Normal(LEVELS.to(x), 1.25**0.5).log_prob(x[:, None])).logsumexp(-1)
    return Pair(model, proposal("z", lambda x: dist.Normal(0.6 * x, 1.5)), (x,), exact)


# --- marked for enumeration ---------------------------------------------------------------------------------------------------

ENUMERATED = "enumeration"
MARKED = "site 'k' of the (model|guide) is marked for enumeration"


def even(x):
    return dist.Categorical(torch.ones(len(x), 4) / 4)


@way(ENUMERATED, MARKED)
def in_the_model_alone():
    return class_pair(lambda x: None, model=config_enumerate(class_model))


@way(ENUMERATED, MARKED)
def in_the_model_by_its_infer_argument():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(4) / 4), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(LEVELS.to(x)[k], 0.7), obs=x)

    return class_pair(proposal("k", even), model=model)


@way(ENUMERATED, MARKED)
def in_parallel_in_the_guide():
    return class_pair(config_enumerate(proposal("k", even)))


@way(ENUMERATED, MARKED)
def in_sequence_in_the_guide():
    return class_pair(config_enumerate(proposal("k", even), "sequential"))


# --- a mass against a density -------------------------------------------------------------------------------------------------

RELAXED = "a mass against a density"
OTHER_MEASURE = "site '[ykz]'.*(discrete|continuous|density|mass)|does not cover the prior at site '[yz]'"


@way(RELAXED, OTHER_MEASURE)
def straight_through_bernoulli():
    def relaxed(x):
        return dist.RelaxedBernoulliStraightThrough(torch.tensor(1.0), logits=torch.zeros(len(x), 3)).to_event(1)

    return bit_pair(proposal("y", relaxed))


@way(RELAXED, OTHER_MEASURE)
def straight_through_one_hot():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.OneHotCategorical(torch.ones(4) / 4))
            pyro.sample("x", dist.Normal((k * LEVELS.to(x)).sum(-1), 0.7), obs=x)

    def relaxed(x):
        return dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(1.0), logits=torch.zeros(len(x), 4))

    return class_pair(proposal("k", relaxed), model=model)


@way(RELAXED, OTHER_MEASURE)
def relaxed_bernoulli():
    def relaxed(x):
        return dist.RelaxedBernoulli(torch.tensor(1.0), logits=torch.zeros(len(x), 3)).to_event(1)

    return bit_pair(proposal("y", relaxed))


@way(RELAXED, OTHER_MEASURE)
def normal_for_bits():
    return bit_pair(proposal("y", lambda x: dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1)))


@way(RELAXED, OTHER_MEASURE)
def normal_for_counts():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(2.0, validate_args=False))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    return Pair(model, proposal("k", lambda x: dist.Normal(x, 1.0)), (normal_data(),))


@way(RELAXED, OTHER_MEASURE)
def bernoulli_for_a_normal():
    return Pair(normal_model, proposal("z", lambda x: dist.Bernoulli(0.5 * torch.ones(len(x)))), (normal_data(),))


@way(RELAXED, OTHER_MEASURE)
def a_relaxed_prior_and_a_discrete_guide():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.RelaxedBernoulli(torch.tensor(0.5), probs=torch.full((3,), 0.3)).to_event(1))
            pyro.sample("x", dist.Normal(y.sum(-1), 0.7), obs=x)

    return Pair(model, proposal("y", lambda x: dist.Bernoulli(0.5 * torch.ones(len(x), 3)).to_event(1)), (normal_data(),))


@way(RELAXED)
def relaxed_in_both():
    """Both have a density on (0, 1): log p by a grid."""
    x = torch.tensor([0.5, -0.3])
    temperature = torch.tensor(1.5)

    def relaxed(probs):
        return dist.RelaxedBernoulli(temperature, probs=probs)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", relaxed(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(y, 0.7), obs=x)

    def log_joint(u):  # in the logit of y, whose density has no poles
        y = torch.sigmoid(u)
        stretch = biject_to(constraints.unit_interval).log_abs_det_jacobian(u, y)
        return relaxed(torch.tensor(0.3)).log_prob(y) + stretch + dist.Normal(y, 0.7).log_prob(x)

    return Pair(
        model, proposal("y", lambda x: relaxed(torch.full((len(x),), 0.45))), (x,), on_grid(log_joint, -30.0, 30.0)
    )


# --- proposals that leave out what the posterior holds ----------------------------------------------------------------------------

NARROW = "proposals that leave something out"
UNCOVERED = "does not cover the prior at site '[ktyz]'"


@way(NARROW, UNCOVERED)
def a_class_of_probability_zero():
    return class_pair(proposal("k", lambda x: dist.Categorical(torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(len(x), 4))))


@way(NARROW, UNCOVERED)
def a_class_masked_by_its_logit():
    logits = torch.tensor([0.0, 0.0, 0.0, -math.inf])
    return class_pair(proposal("k", lambda x: dist.Categorical(logits=logits.to(x).expand(len(x), 4))))


@way(NARROW, "all its mass on one point at site 'k'")
def a_class_that_is_certain():
    return class_pair(proposal("k", lambda x: dist.Delta(torch.zeros(len(x)).long())))


@way(NARROW, UNCOVERED)
def a_bit_that_is_certain():
    certain = torch.tensor([0.5, 0.5, 0.0])
    return bit_pair(proposal("y", lambda x: dist.Bernoulli(certain.to(x).expand(len(x), 3)).to_event(1)))


def beta_model(x):
    with pyro.plate("data", len(x)):
        t = pyro.sample("t", dist.Beta(1.0, 200.0))
        pyro.sample("x", dist.Bernoulli(t), obs=x)


@way(NARROW, UNCOVERED)
def a_short_uniform_for_a_beta():
    x = torch.tensor([0.0, 1.0, 1.0])
    exact = torch.where(x == 1, 1.0, 200.0).log() - math.log(201)
    guide = proposal("t", lambda x: dist.Uniform(torch.zeros(len(x)), 0.05))
    return Pair(beta_model, guide, (x,), exact)


@way(NARROW, UNCOVERED)
def a_uniform_for_a_normal():
    guide = proposal("z", lambda x: dist.Uniform(x / 2 - 1, x / 2 + 1))
    return Pair(normal_model, guide, (normal_data(),), normal_evidence(normal_data()))


@way(NARROW, UNCOVERED)
def a_positive_guide_for_a_normal():
    guide = proposal("z", lambda x: dist.LogNormal(torch.zeros(len(x)), 1.0))
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
    return Pair(model, proposal("z", lambda x: dist.Normal(torch.full((len(x),), 0.5), 0.7)), (x,), exact)


# --- angles and directions ---------------------------------------------------------------------------------------------------------

ANGLES = "angles and directions"
TURNS = "site 'a'.*(angle|turn)"


def angle_model(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.VonMises(0.5, 2.0))
        pyro.sample("x", dist.Normal(3 * torch.cos(a), 0.5), obs=x)


def angle_pair(make):
    x = torch.tensor([2.5, -1.0, 0.3])
    prior = dist.VonMises(torch.tensor(0.5), torch.tensor(2.0))
    exact = on_grid(lambda a: prior.log_prob(a) + dist.Normal(3 * a.cos(), 0.5).log_prob(x), -math.pi, math.pi)
    return Pair(angle_model, proposal("a", make), (x,), exact)


def uniform(low, high):
    return lambda x: dist.Uniform(torch.full((len(x),), low * math.pi), high * math.pi)


way(ANGLES, name="von Mises")(lambda: angle_pair(lambda x: dist.VonMises(torch.full((len(x),), 0.2), 0.5)))
way(ANGLES, name="uniform on one turn")(lambda: angle_pair(uniform(-1, 1)))
way(ANGLES, TURNS, name="uniform on two turns")(lambda: angle_pair(uniform(-2, 2)))
way(ANGLES, TURNS, name="uniform on a turn and a half")(lambda: angle_pair(uniform(-1, 2)))
way(ANGLES, TURNS + "|" + "does not cover", name="uniform on half a turn")(lambda: angle_pair(uniform(0, 1)))
way(ANGLES, TURNS, name="normal")(lambda: angle_pair(lambda x: dist.Normal(torch.zeros(len(x)), 10.0)))
way(ANGLES, TURNS, name="a uniform that is stretched")(
    lambda: angle_pair(lambda x: dist.TransformedDistribution(uniform(-1, 1)(x), [T.AffineTransform(0.0, 2.0)]))
)


@way(ANGLES)
def uniform_prior_and_von_mises_guide():
    """The circle's uniform prior as an interval."""
    x = torch.tensor([0.9, -0.4])

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Uniform(-math.pi, math.pi))
            pyro.sample("x", dist.Normal(a.cos(), 0.7), obs=x)

    exact = on_grid(lambda a: dist.Normal(a.cos(), 0.7).log_prob(x) - math.log(2 * math.pi), -math.pi, math.pi)
    return Pair(model, proposal("a", lambda x: dist.VonMises(torch.zeros(len(x)), 0.3)), (x,), exact)


@way(ANGLES)
def directions_on_a_sphere():
    """p and q on the unit circle in the plane."""
    x = torch.tensor([0.9, -0.4])

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.ProjectedNormal(torch.tensor([0.5, 0.0])))
            pyro.sample("x", dist.Normal(a[..., 0], 0.7), obs=x)

    def log_joint(t):
        a = torch.stack([t.cos(), t.sin()], -1)
        return dist.ProjectedNormal(torch.tensor([0.5, 0.0])).log_prob(a) + dist.Normal(t.cos(), 0.7).log_prob(x)

    return Pair(
        model,
        proposal("a", lambda x: dist.ProjectedNormal(torch.zeros(len(x), 2))),
        (x,),
        on_grid(log_joint, -math.pi, math.pi, 2000),
    )


# --- constrained supports ------------------------------------------------------------------------------------------------------------

CONSTRAINED = "constrained supports"
COUNTS = (1.0, 4.0, 9.0)


def rate_pair(make):
    x, a, b = torch.tensor(COUNTS), 2.0, 0.5

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(a, b))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    return Pair(model, proposal("rate", make), (x,), dist.GammaPoisson(a, b).log_prob(x))


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

    return Pair(model, proposal("t", make), (x,), dist.BetaBinomial(a, b, total).log_prob(x))


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

    return Pair(model, proposal("p", make), (x,), (a / a.sum())[x].log())


way(CONSTRAINED, name="Dirichlet by Dirichlet")(lambda: simplex_pair(lambda x: dist.Dirichlet(torch.full((len(x), 3), 1.3))))
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


@way(CONSTRAINED)
def improper_prior_with_a_proper_posterior():
    """A flat prior: log of the integral of N(x; z, 1) over z is 0."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real, (len(x),), ()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Pair(model, proposal("z", lambda x: dist.Normal(x, 1.2)), (normal_data(),), torch.zeros(3))


@way(CONSTRAINED)
def heavy_tails():
    """Student's prior and guide: log p by a grid."""
    x = torch.tensor([0.5, 6.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(3.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = on_grid(lambda z: dist.StudentT(3.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x), -40.0, 40.0)
    return Pair(model, proposal("z", lambda x: dist.StudentT(2.0, 0.7 * x, 1.0)), (x,), exact)


# --- flows -----------------------------------------------------------------------------------------------------------------------------

FLOWS = "flows"


def plane_pair(make_guide, model=None, exact=None):
    """z ~ N(0, I) in two dimensions, x_d ~ N(z_d, 1)."""
    x = torch.tensor([[0.5, -0.2], [-0.8, 0.4], [0.3, 0.6]])

    def standard(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    exact = normal_evidence(x).sum(-1) if exact is None else exact(x)
    return Pair(model or standard, make_guide(), (x,), exact)


def base(x):
    return dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)


def small(*modules):
    """Their parameters made small, so that a flow of random weights is near the identity and the posterior is covered."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters() if isinstance(module, torch.nn.Module) else ():
                parameter.mul_(0.1)
    return modules


def flow_guide(*transforms, context=None):
    def guide(x):
        for number, transform in enumerate(transforms):
            if isinstance(transform, torch.nn.Module):
                pyro.module(f"flow_{number}", transform)
        given = [t.condition(context(x)) if context else t for t in transforms]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base(x), given))

    return guide


UNCONDITIONAL = {
    "affine autoregressive": lambda: [T.affine_autoregressive(2, hidden_dims=[8])],
    "inverse of affine autoregressive": lambda: [T.affine_autoregressive(2, hidden_dims=[8]).inv],
    "affine coupling": lambda: [T.affine_coupling(2, hidden_dims=[8])],
    "two couplings and a permutation": lambda: [
        T.affine_coupling(2, hidden_dims=[8]),
        T.permute(2, torch.tensor([1, 0])),
        T.affine_coupling(2, hidden_dims=[8]),
    ],
    "planar": lambda: [T.planar(2)],
    "radial": lambda: [T.radial(2)],
    "Householder": lambda: [T.householder(2)],
    "matrix exponential": lambda: [T.matrix_exponential(2)],
    "spline": lambda: [T.spline(2)],
    "spline coupling": lambda: [T.spline_coupling(2, hidden_dims=[8])],
    "spline autoregressive": lambda: [T.spline_autoregressive(2, hidden_dims=[8])],
    "Sylvester": lambda: [T.Sylvester(2)],
    "lower Cholesky affine": lambda: [
        T.LowerCholeskyAffine(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.3, 1.0]]))
    ],
}
for _name, _make in UNCONDITIONAL.items():
    way(FLOWS, name=_name)(lambda make=_make: plane_pair(lambda: flow_guide(*small(*make()))))

CONDITIONAL = {
    "conditional planar": lambda: T.conditional_planar(2, 2, hidden_dims=[8]),
    "conditional radial": lambda: T.conditional_radial(2, 2, hidden_dims=[8]),
    "conditional affine autoregressive": lambda: T.conditional_affine_autoregressive(2, 2, hidden_dims=[8]),
    "conditional affine coupling": lambda: T.conditional_affine_coupling(2, 2, hidden_dims=[8]),
    "conditional spline": lambda: T.conditional_spline(2, 2, hidden_dims=[8]),
    "conditional spline autoregressive": lambda: T.conditional_spline_autoregressive(2, 2, hidden_dims=[8]),
    "conditional matrix exponential": lambda: T.conditional_matrix_exponential(2, 2, hidden_dims=[8]),
}
for _name, _make in CONDITIONAL.items():
    way(FLOWS, name=_name)(
        lambda make=_make: plane_pair(lambda: flow_guide(*small(make()), context=lambda x: x))
    )


def zuko_guide(flow, context=True):
    small(flow)

    def guide(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(flow(x) if context else flow()))

    return guide


ZUKO = {
    "zuko MAF": lambda c: zuko.flows.MAF(2, c, transforms=1, hidden_features=[8]),
    "zuko NSF": lambda c: zuko.flows.NSF(2, c, transforms=1, hidden_features=[8]),
    "zuko NICE": lambda c: zuko.flows.NICE(2, c, transforms=2, hidden_features=[8]),
}
for _name, _make in ZUKO.items():
    way(FLOWS, name=f"{_name}, conditional guide")(lambda make=_make: plane_pair(lambda: zuko_guide(make(2))))
    way(FLOWS, name=f"{_name}, guide without context")(
        lambda make=_make: plane_pair(lambda: zuko_guide(make(0), context=False))
    )


def flow_prior(make_prior, wrap):
    """A prior of which only the density is known: log p on a grid of the plane."""
    prior = make_prior()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(0.5)

    def model(x):
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", wrap(prior))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.1).to_event(1))

    @torch.no_grad()
    def exact(x):
        line = torch.linspace(-7, 7, 401)
        z = torch.cartesian_prod(line, line)
        log_joint = wrap(prior).log_prob(z)[:, None] + dist.Normal(z[:, None], 1.0).to_event(1).log_prob(x)
        return log_joint.logsumexp(0) + 2 * math.log(14 / 400)

    return plane_pair(lambda: guide, model, exact)


for _name, _make in ZUKO.items():
    way(FLOWS, name=f"{_name}, prior")(lambda make=_make: flow_prior(partial(make, 0), lambda flow: ZukoToPyro(flow())))


class _Coupling(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.flow = T.affine_coupling(2, hidden_dims=[8])


@way(FLOWS)
def affine_coupling_prior():
    standard = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return flow_prior(_Coupling, lambda module: dist.TransformedDistribution(standard, [module.flow]))
