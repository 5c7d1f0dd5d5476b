"""Pyro's reparametrisations: the model's latents under other names, with the evidence that the model had before."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import transforms as T
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import (
    AutoReparam,
    DiscreteCosineReparam,
    HaarReparam,
    LocScaleReparam,
    MinimalReparam,
    SplitReparam,
    TransformReparam,
    UnitJacobianReparam,
)

from ways import Pair, normal_data, normal_evidence, on_grid, proposal, way

KIND = "reparametrisations"


def reparam(model, **config):
    """The model with reparametrised sites."""
    return poutine.reparam(model, config=config)


# --- location and scale ---

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
    lambda: strategy(shifted_model, MinimalReparam(), lambda model: proposal(("z", decentred(1.0))), shifted_evidence)
)


# --- transforms ---


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


@way(KIND, "ImproperUniform")
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
