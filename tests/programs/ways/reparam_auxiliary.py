"""Reparametrisations that draw auxiliary variables, and those by a guide."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoStructured
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import (
    ConjugateReparam,
    GumbelSoftmaxReparam,
    LatentStableReparam,
    LinearHMMReparam,
    MinimalReparam,
    NeuTraReparam,
    ProjectedNormalReparam,
    StableReparam,
    StructuredReparam,
    StudentTReparam,
    SymmetricStableReparam,
)

from ways import Pair, normal_data, normal_evidence, normal_model, on_grid, proposal, way
from ways.guides import local, regression
from ways.reparam import KIND, reparam


def stable_guide(*names):
    """The priors of what the reparametrisations of stable laws draw: an angle and an exponential each."""
    sites = []
    for name in names:
        sites.append((f"{name}_uniform", lambda x: dist.Uniform(torch.full((len(x),), -math.pi / 2), math.pi / 2)))
        sites.append((f"{name}_exponential", lambda x: dist.Exponential(torch.ones(len(x)))))
    return proposal(*sites)


def observed_stable(stability, skew, config, *names, exact):
    x = torch.tensor([1.5, -0.8])

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Stable(torch.full((len(x),), stability), torch.tensor(skew)), obs=x)

    return Pair(config(model), stable_guide(*names), (x,), exact(x))


def cauchy(x):
    return dist.Cauchy(0.0, 1.0).log_prob(x)


def stable_density(x):
    return dist.StableWithLogProb(torch.tensor(1.5), torch.tensor(0.4)).log_prob(x)


way(KIND, name="SymmetricStableReparam of data")(
    lambda: observed_stable(1.0, 0.0, lambda m: reparam(m, x=SymmetricStableReparam()), "x", exact=cauchy)
)
way(KIND, name="MinimalReparam of stable data")(lambda: observed_stable(1.0, 0.0, MinimalReparam(), "x", exact=cauchy))
way(KIND, name="StableReparam of data")(
    lambda: observed_stable(1.5, 0.4, lambda m: reparam(m, x=StableReparam()), "x_z", "x_t", exact=stable_density)
)


@way(KIND)
def LatentStableReparam_of_a_normal():
    """Stable(2, 0) is N(0, sqrt 2)."""
    x = normal_data()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Stable(torch.full((len(x),), 2.0), torch.tensor(0.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = dist.Normal(0.0, 3**0.5).log_prob(x)
    return Pair(reparam(model, z=LatentStableReparam()), stable_guide("z"), (x,), exact)


def gammas(name):
    return proposal((name, lambda x: dist.Gamma(torch.full((len(x),), 2.0), 2.0)))


@way(KIND)
def StudentTReparam_of_data():
    x = normal_data()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.StudentT(torch.tensor(4.0)), obs=x)

    return Pair(reparam(model, x=StudentTReparam()), gammas("x_gamma"), (x,), dist.StudentT(4.0).log_prob(x))


@way(KIND)
def StudentTReparam_of_a_latent():
    x = normal_data()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(torch.tensor(4.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            gamma = pyro.sample("z_gamma", dist.Gamma(torch.full((len(x),), 2.0), 2.0))
            pyro.sample("z", dist.Normal(x / (1 + gamma), (1 + gamma).rsqrt()))

    exact = on_grid(lambda z: dist.StudentT(4.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x), -40.0, 40.0)
    return Pair(reparam(model, z=StudentTReparam()), guide, (x,), exact)


@way(KIND)
def LinearHMMReparam_with_heavy_tails():
    """h_0 ~ N(0, 1), h_1 = h_0 + N(0, 1), x = h_1 + t_4: a grid over h_1 ~ N(0, sqrt 2)."""
    x, one = torch.tensor([0.5, -1.0, 3.0]), torch.eye(1)

    def model(x):
        with pyro.plate("data", len(x)):
            hmm = dist.LinearHMM(
                dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1),
                one,
                dist.Normal(torch.zeros(1), 1.0).to_event(1),
                one,
                dist.StudentT(torch.tensor(4.0)).expand([1]).to_event(1),
                duration=1,
            )
            pyro.sample("x", hmm, obs=x.reshape(-1, 1, 1))

    guide = proposal(("x_obs_gamma", lambda x: dist.Gamma(torch.full((len(x), 1, 1), 2.0), 2.0).to_event(2)))
    exact = on_grid(lambda h: dist.Normal(0.0, 2**0.5).log_prob(h) + dist.StudentT(4.0).log_prob(x - h), -20.0, 20.0)
    return Pair(reparam(model, x=LinearHMMReparam(obs=StudentTReparam())), guide, (x,), exact)


@way(KIND)
def ProjectedNormalReparam_of_a_direction():
    x, concentration = torch.tensor([0.9, -0.4]), torch.tensor([0.5, 0.0])

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.ProjectedNormal(concentration))
            pyro.sample("x", dist.Normal(a[..., 0], 0.7), obs=x)

    def log_joint(t):
        a = torch.stack([t.cos(), t.sin()], -1)
        return dist.ProjectedNormal(concentration).log_prob(a) + dist.Normal(t.cos(), 0.7).log_prob(x)

    guide = proposal(("a_normal", lambda x: dist.Normal(torch.zeros(len(x), 2), 1.1).to_event(1)))
    exact = on_grid(log_joint, -math.pi, math.pi, 2000)
    return Pair(reparam(model, a=ProjectedNormalReparam()), guide, (x,), exact)


@way(KIND)
def GumbelSoftmaxReparam_of_two_classes():
    """y_0 = sigmoid((logit + logistic noise) / T), x ~ N(y_0, 0.7)."""
    x, logits, temperature = torch.tensor([0.9, -0.4]), torch.tensor([0.6, 0.0]), torch.tensor(0.8)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.RelaxedOneHotCategorical(temperature, logits=logits))
            pyro.sample("x", dist.Normal(y[..., 0], 0.7), obs=x)

    def log_joint(noise):
        logistic = torch.sigmoid(noise).log() + torch.sigmoid(-noise).log()
        return logistic + dist.Normal(torch.sigmoid((0.6 + noise) / temperature), 0.7).log_prob(x)

    guide = proposal(("y_uniform", lambda x: dist.Uniform(torch.zeros(len(x), 2), 1.0).to_event(1)))
    return Pair(reparam(model, y=GumbelSoftmaxReparam()), guide, (x,), on_grid(log_joint, -35.0, 35.0))


# --- by a guide ---


def neutra(target, name):
    """A model in the coordinates of a guide, in which its posterior is nearly standard normal."""
    inner = AutoMultivariateNormal(target.model, init_loc_fn=init_to_value(values=target.means), init_scale=0.5)
    inner(*target.args)
    model = NeuTraReparam(inner.requires_grad_(False)).reparam(target.model)

    def guide(*args):
        pyro.sample(name, dist.Normal(torch.zeros(inner.latent_dim), 1.1).to_event(1))

    return Pair(model, guide, target.args, target.exact)


way(KIND, name="NeuTraReparam")(lambda: neutra(regression(), "w_shared_latent"))
# There Pyro adds the stretch of all data to each datum.
way(KIND, "masks latent site 'z_shared_latent'", name="NeuTraReparam of latents in a plate")(
    lambda: neutra(local(), "z_shared_latent")
)


@way(KIND, "'z_aux'")
def StructuredReparam_by_a_guide():
    x = normal_data()
    inner = AutoStructured(
        normal_model, conditionals="normal", init_loc_fn=init_to_value(values={"z": x / 2}), init_scale=0.7
    )
    inner(x)
    structured = StructuredReparam(inner)  # counts the noise and the stretch of space the wrong way round
    model = structured.reparam(normal_model)
    return Pair(
        model, AutoDiagonalNormal(model, init_scale=0.8), (x,), normal_evidence(x).sum(), options={"num_particles": 500}
    )


def conjugate(make_likelihood):
    """Beta-Binomial, its posterior drawn inside the model: nothing is left for a guide."""
    x = torch.tensor([1.0, 4.0, 6.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(torch.full((len(x),), 2.0), 3.0))
            pyro.sample("x", dist.Binomial(6, z), obs=x)

    exact = dist.BetaBinomial(2.0, 3.0, 6).log_prob(x)
    return Pair(reparam(model, z=ConjugateReparam(make_likelihood)), lambda x: None, (x,), exact)


way(KIND, name="ConjugateReparam, exact")(lambda: conjugate(lambda x: dist.Beta(1 + x, 7 - x)))
way(KIND, name="ConjugateReparam, approximate")(lambda: conjugate(lambda x: dist.Beta(1 + 0.8 * x, 1 + 0.8 * (6 - x))))
