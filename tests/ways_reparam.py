"""Pyro's reparametrisations: the model's latents under other names, with the evidence that the model had before."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import transforms as T
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal, AutoStructured
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import (
    AutoReparam,
    ConjugateReparam,
    DiscreteCosineReparam,
    GumbelSoftmaxReparam,
    HaarReparam,
    LatentStableReparam,
    LinearHMMReparam,
    LocScaleReparam,
    MinimalReparam,
    NeuTraReparam,
    ProjectedNormalReparam,
    SplitReparam,
    StableReparam,
    StructuredReparam,
    StudentTReparam,
    SymmetricStableReparam,
    TransformReparam,
    UnitJacobianReparam,
)
from ways import Pair, normal_data, normal_evidence, normal_model, on_grid, way
from ways_guides import regression

KIND = "reparametrisations"
USED: set[str] = set()  # the classes that the ways below use, for the test that none of Pyro's is left out


def reparam(model, **config):
    """The model with reparametrised sites."""
    USED.update(type(value).__name__ for value in config.values())
    return poutine.reparam(model, config=config)


def proposal(*sites):
    """A guide of (name, make a distribution of x) in the plate of the data."""

    def guide(x):
        with pyro.plate("data", len(x)):
            for name, make in sites:
                pyro.sample(name, make(x))

    return guide


# --- location and scale ---------------------------------------------------------------------------------------------------------

LOC, SCALE = 1.0, 2.0


def shifted_model(x):
    """z ~ N(1, 2), x ~ N(z, 1): x ~ N(1, sqrt 5)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(LOC, SCALE))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shifted_evidence(x):
    return dist.Normal(LOC, 5**0.5).log_prob(x)


def decentred(centred):
    """The posterior N(m, s) of z, a little wider, in the coordinate that the reparametrisation draws."""

    def make(x):
        mean = (LOC / SCALE**2 + x) / (1 / SCALE**2 + 1)
        power = SCALE ** (centred - 1)
        return dist.Normal(centred * LOC + (mean - LOC) * power, 1.1 * (1 / SCALE**2 + 1) ** -0.5 * power)

    return make


def loc_scale(centred, value):
    x = normal_data()
    guide = proposal(("z_decentered" if value < 1 else "z", decentred(value)))
    return Pair(reparam(shifted_model, z=LocScaleReparam(centred)), guide, (x,), shifted_evidence(x))


way(KIND, name="LocScaleReparam, decentred")(lambda: loc_scale(0.0, 0.0))
way(KIND, name="LocScaleReparam, half")(lambda: loc_scale(0.5, 0.5))
way(KIND, name="LocScaleReparam, centred")(lambda: loc_scale(1.0, 1.0))
way(KIND, name="LocScaleReparam, learned")(lambda: loc_scale(None, 0.5))
way(KIND, name="LocScaleReparam, per datum")(lambda: loc_scale(torch.tensor(0.3), 0.3))


@way(KIND)
def loc_scale_with_an_automatic_guide():
    x = normal_data()
    model = reparam(shifted_model, z=LocScaleReparam(0.0))
    return Pair(model, AutoNormal(model, init_scale=1.0), (x,), shifted_evidence(x), options={"num_particles": 2000})


@way(KIND)
def loc_scale_below_a_latent_of_the_whole():
    """Eight schools in small: mean ~ N(0, 1), z_n ~ N(mean, 1), x_n ~ N(z_n, 1)."""
    x = normal_data()

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean.unsqueeze(-1), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(x.sum() / 5, 0.9))
        with pyro.plate("data", len(x)):
            pyro.sample("z_decentered", dist.Normal(x / 3, 1.0))

    exact = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1).log_prob(x)
    return Pair(reparam(model, z=LocScaleReparam(0.0)), guide, (x,), exact)


def strategy(model, found, make_guide, exact, x=None):
    USED.add(type(found).__name__)
    x = normal_data() if x is None else x
    model = found(model)
    return Pair(model, make_guide(model), (x,), exact(x), options={"num_particles": 2000})


def automatic(model):
    return AutoNormal(model, init_scale=1.0)


way(KIND, name="AutoReparam")(lambda: strategy(shifted_model, AutoReparam(centered=0.0), automatic, shifted_evidence))
way(KIND, name="AutoReparam, learned")(
    lambda: strategy(
        shifted_model, AutoReparam(), lambda model: proposal(("z_decentered", decentred(0.5))), shifted_evidence
    )
)
way(KIND, name="MinimalReparam, which leaves a normal alone")(
    lambda: strategy(
        shifted_model, MinimalReparam(), lambda model: proposal(("z", decentred(1.0))), shifted_evidence
    )
)


# --- transforms -------------------------------------------------------------------------------------------------------------------


def log_normal_pair(make_model, guide):
    x = torch.tensor([0.5, 1.5])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = on_grid(lambda u: dist.Normal(0.0, 0.5).log_prob(u) + dist.Normal(u.exp(), 1.0).log_prob(x), -5.0, 5.0)
    return Pair(make_model(model), guide, (x,), exact)


def narrow_normal(x):
    return dist.Normal(torch.zeros(len(x)), 0.55)


way(KIND, name="TransformReparam")(
    lambda: log_normal_pair(lambda m: reparam(m, z=TransformReparam()), proposal(("z_base", narrow_normal)))
)
way(KIND, name="AutoReparam of a log-normal")(
    lambda: log_normal_pair(AutoReparam(centered=1.0), proposal(("z_base", narrow_normal)))
)
way(KIND, name="TransformReparam by a function of the site")(
    lambda: log_normal_pair(
        lambda m: poutine.reparam(m, config=lambda site: TransformReparam() if site["name"] == "z" else None),
        proposal(("z_base", narrow_normal)),
    )
)


def series(transform, name, config):
    """z ~ N(0, I_4), x ~ N(z, 1): the transform is a rotation, so that the posterior turns with it."""
    x = torch.tensor([[0.5, -1.0, 0.3, 1.1], [0.2, 0.4, -0.6, 0.0]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = proposal((name, lambda x: dist.Normal(transform(x) / 2, 0.8).to_event(1)))
    return Pair(reparam(model, z=config), guide, (x,), normal_evidence(x).sum(-1))


SWAP = torch.tensor([2, 0, 3, 1])
way(KIND, name="DiscreteCosineReparam")(lambda: series(T.DiscreteCosineTransform(), "z_dct", DiscreteCosineReparam()))
way(KIND, name="HaarReparam")(lambda: series(T.HaarTransform(), "z_haar", HaarReparam()))
way(KIND, name="HaarReparam, mirrored")(lambda: series(T.HaarTransform(flip=True), "z_haar", HaarReparam(flip=True)))
way(KIND, name="UnitJacobianReparam")(
    lambda: series(T.Permute(SWAP), "z_transformed", UnitJacobianReparam(T.Permute(SWAP)))
)


@way(KIND)
def SplitReparam_into_two():
    x = torch.tensor([[0.5, -1.0], [0.2, 0.4]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = proposal(
        *((f"z_split_{i}", lambda x, i=i: dist.Normal(x[:, i : i + 1] / 2, 0.8).to_event(1)) for i in range(2))
    )
    return Pair(reparam(model, z=SplitReparam([1, 1], -1)), guide, (x,), normal_evidence(x).sum(-1))


# --- auxiliary variables -------------------------------------------------------------------------------------------------------------


def stable_guide(*names):
    """The priors of what the reparametrisations of stable laws draw: an angle and an exponential each."""
    sites = []
    for name in names:
        sites.append(
            (f"{name}_uniform", lambda x: dist.Uniform(torch.full((len(x),), -math.pi / 2), math.pi / 2))
        )
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
way(KIND, name="MinimalReparam of stable data")(
    lambda: observed_stable(1.0, 0.0, MinimalReparam(), "x", exact=cauchy)
)
way(KIND, name="StableReparam of data")(
    lambda: observed_stable(
        1.5, 0.4, lambda m: reparam(m, x=StableReparam()), "x_z", "x_t", exact=stable_density
    )
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


# --- by a guide ------------------------------------------------------------------------------------------------------------------------


@way(KIND)
def NeuTraReparam_by_a_normal():
    """The posterior of the weights becomes nearly standard normal in the guide's own coordinates."""
    target = regression()
    inner = AutoMultivariateNormal(target.model, init_loc_fn=init_to_value(values=target.means), init_scale=0.5)
    inner(*target.args)
    USED.add("NeuTraReparam")
    model = NeuTraReparam(inner.requires_grad_(False)).reparam(target.model)

    def guide(features, y):
        pyro.sample("w_shared_latent", dist.Normal(torch.zeros(2), 1.1).to_event(1))

    return Pair(model, guide, target.args, target.exact)


@way(KIND)
def StructuredReparam_by_a_guide():
    x = normal_data()
    inner = AutoStructured(
        normal_model, conditionals="normal", init_loc_fn=init_to_value(values={"z": x / 2}), init_scale=0.7
    )
    inner(x)
    structured = StructuredReparam(inner)
    USED.add("StructuredReparam")
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
