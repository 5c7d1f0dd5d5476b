"""Statements that are no draws, and sites that do not fit."""

import math

import pyro
import pyro.distributions as dist
import torch

from ways import Pair, given, normal_data, normal_evidence, normal_model, way, wide_guide

STATEMENTS = "deterministic values, factors, parameters"


@way(STATEMENTS)
def deterministic():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = pyro.deterministic("loc", z + 1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.deterministic("half", pyro.sample("z", dist.Normal((x - 1) / 2, 0.8)) / 2)

    return given(model, guide, normal_data(), exact=lambda x: normal_evidence(x - 1))


@way(STATEMENTS)
def a_factor_as_likelihood():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("x", dist.Normal(z, 1.0).log_prob(x))

    return given(model, wide_guide, normal_data())


@way(STATEMENTS)
def a_unit_observation_as_likelihood():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Unit(dist.Normal(z, 1.0).log_prob(x)), obs=torch.empty(0))

    return given(model, wide_guide, normal_data())


@way(STATEMENTS, "'f' of the guide is a factor")
def a_factor_in_the_guide():
    def guide(x):
        wide_guide(x)
        pyro.factor("f", torch.tensor(0.0), has_rsample=True)

    return Pair(normal_model, guide, (normal_data(),))


@way(STATEMENTS, "'x' of the guide is observed")
def an_observation_in_the_guide():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    return Pair(normal_model, guide, (normal_data(),))


@way(STATEMENTS)
def parameters_of_the_store():
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x):
        weight = pyro.param("weight", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weight * x, 0.8))

    return given(model, guide, normal_data())


@way(STATEMENTS)
def parameters_of_each_datum():
    """Stochastic variational inference without an encoder."""

    def guide(x):
        loc = pyro.param("loc", lambda: x / 2)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.8))

    return given(normal_model, guide, normal_data())


# --- sites that do not fit ---

SITES = "sites that do not fit"


@way(SITES, r"does not sample the model's latent site\(s\) \['z'\]")
def missing_in_the_guide():
    return Pair(normal_model, lambda x: None, (normal_data(),))


@way(SITES, r"guide samples site\(s\) \['w'\]")
def one_more_in_the_guide():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))
            pyro.sample("w", dist.Normal(0.0, 1.0))

    return Pair(normal_model, guide, (normal_data(),))


@way(SITES, "draws 6 numbers")
def an_auxiliary_draw_that_is_no_change_of_variables():
    def guide(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x / 2 + k - 0.5, 0.8))

    return Pair(normal_model, guide, (normal_data(),))


@way(SITES, "no sample sites")
def no_sites_at_all():
    return Pair(lambda x: None, lambda x: None, (normal_data(),))


@way(SITES)
def no_latents():
    """Nothing to integrate: log p(x) is the likelihood."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, math.sqrt(2)), obs=x)

    return given(model, lambda x: None, normal_data())
