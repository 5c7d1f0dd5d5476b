"""Discrete latents: drawn, enumerated, relaxed."""

import math
from itertools import product

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from torch.distributions import biject_to

from ways import Pair, normal_data, normal_model, on_grid, proposal, way

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


@way(DISCRETE)
def categorical():
    return class_pair(
        proposal(("k", lambda x: dist.Categorical(logits=-0.5 * (x[:, None] - LEVELS.to(x)).square() / 0.7**2)))
    )


@way(DISCRETE)
def categorical_of_equal_probabilities():
    return class_pair(proposal(("k", lambda x: dist.Categorical(torch.ones(len(x), 4) / 4))))


@way(DISCRETE)
def one_hot():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.OneHotCategorical(torch.ones(4) / 4))
            pyro.sample("x", dist.Normal((k * LEVELS.to(x)).sum(-1), 0.7), obs=x)

    return class_pair(proposal(("k", lambda x: dist.OneHotCategorical(torch.ones(len(x), 4) / 4))), model=model)


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
    return bit_pair(proposal(("y", lambda x: dist.Bernoulli(0.5 * torch.ones(len(x), 3)).to_event(1))))


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
    return Pair(model, proposal(("k", lambda x: dist.Geometric(torch.full((len(x),), 0.3)))), (x,), exact)


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
    return Pair(model, proposal(("z", lambda x: dist.Normal(0.6 * x, 1.5))), (x,), exact)


# --- marked for enumeration ---

ENUMERATED = "enumeration"


def even(x):
    return dist.Categorical(torch.ones(len(x), 4) / 4)


@way(ENUMERATED)
def in_the_model_alone():
    return class_pair(lambda x: None, model=config_enumerate(class_model))


@way(ENUMERATED)
def in_the_model_by_its_infer_argument():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(4) / 4), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(LEVELS.to(x)[k], 0.7), obs=x)

    return class_pair(proposal(("k", even)), model=model)


@way(ENUMERATED)
def in_parallel_in_the_guide():
    return class_pair(config_enumerate(proposal(("k", even))))


@way(ENUMERATED)
def in_sequence_in_the_guide():
    return class_pair(config_enumerate(proposal(("k", even)), "sequential"))


def _mixture(x):
    """k picks the mean of z, and x ~ N(z, 1)."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(4) / 4), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(LEVELS.to(x)[k], 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _mixture_pair(guide):
    x = torch.tensor(POINTS)
    exact = (math.log(0.25) + dist.Normal(LEVELS.to(x), 1.25**0.5).log_prob(x[:, None])).logsumexp(-1)
    return Pair(_mixture, guide, (x,), exact)


@way(ENUMERATED)
def a_class_beside_a_latent_that_the_guide_draws():
    return _mixture_pair(proposal(("z", lambda x: dist.Normal(x / 2, 1.3))))


@way(ENUMERATED)
def a_class_that_guide_and_model_mark_beside_a_latent():
    @config_enumerate
    def guide(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(len(x), 4) / 4))
            pyro.sample("z", dist.Normal(x / 2 + LEVELS.to(x)[k] / 2, 0.8))

    return _mixture_pair(guide)


@way(ENUMERATED)
def a_chain_of_states():
    """Two states that mostly stay, six steps; the forward algorithm."""
    x = torch.randn(3, 6)
    steps, locs = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([-1.0, 1.0])

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            h = 0
            for t in pyro.markov(range(6)):
                h = pyro.sample(f"h{t}", dist.Categorical(steps.to(x)[h]))
                pyro.sample(f"x{t}", dist.Normal(locs.to(x)[h], 1.0), obs=x[:, t])

    alpha = steps[0].log().expand(3, 2)
    for t in range(6):
        alpha = alpha if t == 0 else (alpha[:, :, None] + steps.log()).logsumexp(1)
        alpha = alpha + dist.Normal(locs, 1.0).log_prob(x[:, t, None])
    return Pair(model, lambda x: None, (x,), alpha.logsumexp(1))


@way(ENUMERATED)
def a_mixture_of_proposals_in_the_guide_alone():
    x = normal_data()

    @config_enumerate
    def guide(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5 * torch.ones(len(x))))
            pyro.sample("z", dist.Normal(x / 2 + k - 0.5, 0.8))

    return Pair(normal_model, guide, (x,), dist.Normal(0.0, 2**0.5).log_prob(x))


@way(ENUMERATED, "'k' of the model is marked for enumeration, and the values of Poisson.* cannot be listed")
def counts_without_end():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(2.0), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    return Pair(model, lambda x: None, (torch.tensor([0.0, 1.5]),))


@way(ENUMERATED, "another log density with all values of site.*'k'|couples the data")
def a_class_that_is_mixed_across_data():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(4) / 4), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(LEVELS.to(x)[k].roll(1, -1), 0.7), obs=x)

    return class_pair(lambda x: None, exact=False, model=model)


# --- a mass against a density ---

RELAXED = "a mass against a density"
OTHER_MEASURE = "site '[ykz]'.*(discrete|continuous|density|mass)|does not cover the prior at site '[yz]'"


@way(RELAXED, OTHER_MEASURE)
def straight_through_bernoulli():
    def relaxed(x):
        return dist.RelaxedBernoulliStraightThrough(torch.tensor(1.0), logits=torch.zeros(len(x), 3)).to_event(1)

    return bit_pair(proposal(("y", relaxed)))


@way(RELAXED, OTHER_MEASURE)
def straight_through_one_hot():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.OneHotCategorical(torch.ones(4) / 4))
            pyro.sample("x", dist.Normal((k * LEVELS.to(x)).sum(-1), 0.7), obs=x)

    def relaxed(x):
        return dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(1.0), logits=torch.zeros(len(x), 4))

    return class_pair(proposal(("k", relaxed)), model=model)


@way(RELAXED, OTHER_MEASURE)
def relaxed_bernoulli():
    def relaxed(x):
        return dist.RelaxedBernoulli(torch.tensor(1.0), logits=torch.zeros(len(x), 3)).to_event(1)

    return bit_pair(proposal(("y", relaxed)))


@way(RELAXED, OTHER_MEASURE)
def normal_for_bits():
    return bit_pair(proposal(("y", lambda x: dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1))))


@way(RELAXED, OTHER_MEASURE)
def normal_for_counts():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(2.0, validate_args=False))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    return Pair(model, proposal(("k", lambda x: dist.Normal(x, 1.0))), (normal_data(),))


@way(RELAXED, OTHER_MEASURE)
def bernoulli_for_a_normal():
    return Pair(normal_model, proposal(("z", lambda x: dist.Bernoulli(0.5 * torch.ones(len(x))))), (normal_data(),))


@way(RELAXED, OTHER_MEASURE)
def a_relaxed_prior_and_a_discrete_guide():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.RelaxedBernoulli(torch.tensor(0.5), probs=torch.full((3,), 0.3)).to_event(1))
            pyro.sample("x", dist.Normal(y.sum(-1), 0.7), obs=x)

    return Pair(
        model, proposal(("y", lambda x: dist.Bernoulli(0.5 * torch.ones(len(x), 3)).to_event(1))), (normal_data(),)
    )


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
        model, proposal(("y", lambda x: relaxed(torch.full((len(x),), 0.45)))), (x,), on_grid(log_joint, -30.0, 30.0)
    )


@way(DISCRETE)
def proposals_of_values_that_the_prior_has_not():
    """Poisson for a class of 0 ... 2: a 3 has weight 0."""
    x = torch.tensor([0.0, 1.5])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Binomial(2, 0.5, validate_args=False))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    k = torch.arange(3.0).unsqueeze(1)
    exact = (torch.tensor([[0.25], [0.5], [0.25]]).log() + dist.Normal(k, 1.0).log_prob(x)).logsumexp(0)
    return Pair(model, proposal(("k", lambda x: dist.Poisson(torch.ones(len(x))))), (x,), exact)


@way(RELAXED, OTHER_MEASURE)
def relaxed_behind_a_mask_and_an_event():
    def relaxed(x):
        inner = dist.RelaxedBernoulliStraightThrough(torch.tensor(1.0), logits=torch.zeros(len(x), 3))
        return inner.mask(True).to_event(1)

    return bit_pair(proposal(("y", relaxed)))


@way(RELAXED, OTHER_MEASURE)
def a_beta_for_a_bernoulli():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3, validate_args=False))
            pyro.sample("x", dist.Normal(y, 0.7), obs=x)

    return Pair(model, proposal(("y", lambda x: dist.Beta(torch.ones(len(x)), 1.0))), (normal_data(),))
