"""Angles and directions: densities that go on beyond one turn."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms as T
from pyro.infer.autoguide import AutoNormal

from ways import Pair, on_grid, proposal, way

ANGLES = "angles and directions"
UNCOVERED = "does not cover the prior at site 'a'"
TURNS = "site 'a'.*(angle|turn)"


def angle_model(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.VonMises(0.5, 2.0))
        pyro.sample("x", dist.Normal(3 * torch.cos(a), 0.5), obs=x)


def angle_pair(make):
    x = torch.tensor([2.5, -1.0, 0.3])
    prior = dist.VonMises(torch.tensor(0.5), torch.tensor(2.0))
    exact = on_grid(lambda a: prior.log_prob(a) + dist.Normal(3 * a.cos(), 0.5).log_prob(x), -math.pi, math.pi)
    return Pair(angle_model, proposal(("a", make)), (x,), exact)


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
    return Pair(model, proposal(("a", lambda x: dist.VonMises(torch.zeros(len(x)), 0.3))), (x,), exact)


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
        proposal(("a", lambda x: dist.ProjectedNormal(torch.zeros(len(x), 2)))),
        (x,),
        on_grid(log_joint, -math.pi, math.pi, 2000),
    )


way(ANGLES, UNCOVERED, name="uniform on one turn from 0, half of which the prior draws a turn earlier")(
    lambda: angle_pair(uniform(0, 2))
)


@way(ANGLES, TURNS)
def an_automatic_normal():
    pair = angle_pair(uniform(-1, 1))
    return pair._replace(guide=AutoNormal(angle_model))


@way(ANGLES, TURNS)
def two_angles_on_two_turns_each():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.VonMises(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a.cos().sum(-1), 1.0), obs=x)

    def wide(x):
        return dist.Uniform(torch.full((len(x), 2), -2 * math.pi), 2 * math.pi).to_event(1)

    return Pair(model, proposal(("a", wide)), (torch.tensor([0.3, 1.0]),))
