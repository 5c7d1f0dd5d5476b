"""Every automatic guide of Pyro, on latents of each datum, on latents of the whole program, and on both at once."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import affine_autoregressive, iterated, planar, spline
from pyro.infer import autoguide
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from ways import Pair, normal_data, normal_evidence, normal_model, way


class Target(NamedTuple):
    """A model with its data, its exact evidence per datum and of the whole, and where its posterior is."""

    model: Callable
    args: tuple
    exact: Tensor
    means: dict[str, Tensor]
    scale: float  # no narrower than the posterior in any direction


def local() -> Target:
    x = normal_data()
    return Target(normal_model, (x,), normal_evidence(x), {"z": x / 2}, 0.9)


def local_rates() -> Target:
    """Gamma-Poisson: constrained latents of each datum."""
    x, a, b = torch.tensor([2.0, 4.0, 9.0]), 2.0, 0.5

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(a, b))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    return Target(model, (x,), dist.GammaPoisson(a, b).log_prob(x), {"rate": (a + x) / (b + 1)}, 0.9)


def regression() -> Target:
    """Weights of a linear regression; the whole program is one datum."""
    features = torch.tensor([[1.0, 0.2], [1.0, -1.0], [1.0, 1.5], [1.0, 0.7]])
    y, noise = torch.tensor([0.3, -0.8, 1.9, 0.1]), 0.8

    def model(features, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((features @ w.unsqueeze(-1)).squeeze(-1), noise), obs=y)

    covariance = features @ features.T + noise**2 * torch.eye(4)
    exact = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(y)
    mean = features.T @ torch.linalg.solve(covariance, y)
    return Target(model, (features, y), exact.reshape(1), {"w": mean}, 0.6)


def coin() -> Target:
    """Beta-Bernoulli: a constrained latent of the whole program."""
    flips, a, b = torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1]), 2.0, 3.0

    def model(flips):
        theta = pyro.sample("theta", dist.Beta(a, b))
        with pyro.plate("flips", len(flips)):
            pyro.sample("x", dist.Bernoulli(theta.unsqueeze(-1)), obs=flips)

    def log_beta(a, b):
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    exact = torch.tensor([log_beta(a + 6, b + 2) - log_beta(a, b)])
    return Target(model, (flips,), exact, {"theta": torch.tensor(8 / 13)}, 0.9)


def both() -> Target:
    """One latent for all and one for each: x ~ N(0, 2 I + 1), all of it one datum."""
    x = normal_data()

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean.unsqueeze(-1), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1).log_prob(x).reshape(1)
    mean = x.sum() / 5
    return Target(model, (x,), exact, {"mean": mean, "z": (mean + x) / 2}, 1.05)


FEW = {"num_particles": 1000}  # most automatic guides draw their particles one by one, which takes its time
TARGETS = {"local": local, "local rates": local_rates, "regression": regression, "coin": coin, "both": both}


def near_identity(guide: Callable, target: Target) -> Callable:
    """The guide with its random weights made small, so that a flow is nearly the standard normal it starts from."""
    guide(*target.args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.mul_(0.1)
    return guide


def options(target: Target) -> dict[str, Any]:
    return {"init_loc_fn": init_to_value(values=target.means), "init_scale": target.scale}


def laplace(target: Target) -> Callable:
    guide = autoguide.AutoLaplaceApproximation(target.model, init_loc_fn=init_to_value(values=target.means))
    guide(*target.args)
    return guide.laplace_approximation(*target.args)


# name -> make(target): guides that draw each datum's latents in its plate
IN_PLATES = {
    "AutoNormal": lambda t: autoguide.AutoNormal(t.model, **options(t)),
    "AutoNormalMessenger": lambda t: autoguide.AutoNormalMessenger(t.model, **options(t)),
    "AutoHierarchicalNormalMessenger": lambda t: autoguide.AutoHierarchicalNormalMessenger(t.model, **options(t)),
    "AutoHierarchicalNormalMessenger of no site": lambda t: autoguide.AutoHierarchicalNormalMessenger(
        t.model, hierarchical_sites=[], **options(t)
    ),
    "AutoRegressiveMessenger": lambda t: autoguide.AutoRegressiveMessenger(t.model, **options(t)),
}
# those that draw all latents together: the whole program is one datum
TOGETHER = {
    "AutoDiagonalNormal": lambda t: autoguide.AutoDiagonalNormal(t.model, **options(t)),
    "AutoMultivariateNormal": lambda t: autoguide.AutoMultivariateNormal(t.model, **options(t)),
    "AutoLowRankMultivariateNormal": lambda t: autoguide.AutoLowRankMultivariateNormal(t.model, rank=2, **options(t)),
    "AutoStructured, normal": lambda t: autoguide.AutoStructured(t.model, conditionals="normal", **options(t)),
    "AutoStructured, mvn": lambda t: autoguide.AutoStructured(t.model, conditionals="mvn", **options(t)),
    "AutoGaussian": lambda t: autoguide.AutoGaussian(t.model, **options(t)),
}
# those that start from a standard normal wherever the posterior is
FLOWS = {
    "AutoIAFNormal": lambda t: near_identity(autoguide.AutoIAFNormal(t.model, hidden_dim=[8]), t),
    "AutoNormalizingFlow, autoregressive": lambda t: near_identity(
        autoguide.AutoNormalizingFlow(t.model, partial(iterated, 2, partial(affine_autoregressive, hidden_dims=[8]))), t
    ),
    "AutoNormalizingFlow, planar": lambda t: near_identity(
        autoguide.AutoNormalizingFlow(t.model, partial(iterated, 2, planar)), t
    ),
    "AutoNormalizingFlow, spline": lambda t: near_identity(autoguide.AutoNormalizingFlow(t.model, spline), t),
}


def register(guides: dict[str, Callable], targets: list[str], kind: str, *, joint: bool) -> None:
    for name, make_guide in guides.items():
        for target_name in targets:

            def make(make_guide=make_guide, make_target=TARGETS[target_name]) -> Pair:
                target = make_target()
                exact = target.exact.sum().reshape(1) if joint else target.exact
                return Pair(target.model, make_guide(target), target.args, exact, options=FEW)

            way(kind, name=f"{name}, {target_name}")(make)


register(IN_PLATES, ["local", "local rates"], "automatic guides, latents of each datum", joint=False)
register(TOGETHER, ["local", "local rates"], "automatic guides, latents of each datum", joint=True)
register(FLOWS, ["local"], "automatic guides, latents of each datum", joint=True)
register({"AutoLaplaceApproximation": laplace}, ["local"], "automatic guides, latents of each datum", joint=True)
register(IN_PLATES | TOGETHER, ["regression", "coin"], "automatic guides, latents of the whole", joint=False)
register(FLOWS, ["regression"], "automatic guides, latents of the whole", joint=False)
register({"AutoLaplaceApproximation": laplace}, ["regression"], "automatic guides, latents of the whole", joint=False)
register(
    {**IN_PLATES, **TOGETHER, "AutoLaplaceApproximation": laplace},
    ["both"],
    "automatic guides, latents of both kinds",
    joint=False,
)

POINTS = {
    "AutoDelta": lambda t: autoguide.AutoDelta(t.model),
    "AutoLaplaceApproximation before its approximation": lambda t: autoguide.AutoLaplaceApproximation(t.model),
    "AutoStructured, delta": lambda t: autoguide.AutoStructured(t.model, conditionals="delta"),
}
for _name, _make_guide in POINTS.items():
    for _target in TARGETS:

        def _point(make_guide=_make_guide, make_target=TARGETS[_target]) -> Pair:
            target = make_target()
            return Pair(target.model, make_guide(target), target.args, target.exact)

        way(
            "guides of points",
            "all its mass on one point at site '(z|rate|w|theta|mean|_AutoLaplace.*)'",
            name=f"{_name}, {_target}",
        )(_point)


# What `pyro.infer.autoguide` exports and the ways above do not draw from, with the reason.
NO_GUIDES = {
    "AutoContinuous": "the base of those that draw all latents together",
    "AutoGuide": "the base of all",
    "AutoMessenger": "the base of the messengers",
    "init_to_feasible": "where a guide starts",
    "init_to_generated": "where a guide starts",
    "init_to_mean": "where a guide starts",
    "init_to_median": "where a guide starts",
    "init_to_sample": "where a guide starts",
    "init_to_uniform": "where a guide starts",
    "init_to_value": "where a guide starts",
    "mean_field_entropy": "an entropy",
}
