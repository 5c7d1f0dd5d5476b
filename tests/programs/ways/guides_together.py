"""Automatic guides put together from parts, with parts of one's own, and Pyro's easy guides."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import autoguide

from ways import Pair, normal_data, way
from ways.guides import FEW, Target, both, local, options

LISTED = "automatic guides put together"


def two_latents() -> Target:
    """z ~ N(0, 1), u ~ N(z, 1), x ~ N(u, 1): x ~ N(0, 3)."""
    x = normal_data()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            u = pyro.sample("u", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    return Target(model, (x,), dist.Normal(0.0, 3**0.5).log_prob(x), {"z": x / 3, "u": 2 * x / 3}, 1.1)


@way(LISTED)
def guide_list_of_two_mean_fields():
    target = two_latents()
    guide = autoguide.AutoGuideList(target.model)
    for name in ("z", "u"):
        guide.append(autoguide.AutoNormal(poutine.block(target.model, expose=[name]), **options(target)))
    return Pair(target.model, guide, target.args, target.exact, options=FEW)


@way(LISTED)
def guide_list_of_a_joint_and_a_mean_field():
    target = both()
    guide = autoguide.AutoGuideList(target.model)
    guide.append(autoguide.AutoMultivariateNormal(poutine.block(target.model, expose=["mean"]), **options(target)))
    guide.append(autoguide.AutoNormal(poutine.block(target.model, expose=["z"]), **options(target)))
    return Pair(target.model, guide, target.args, target.exact, options=FEW)


@way(LISTED)
def guide_list_with_a_function():
    target = two_latents()

    guide = autoguide.AutoGuideList(target.model)

    def first(x):
        with guide.plates["data"]:
            return {"z": pyro.sample("z", dist.Normal(x / 3, 1.1))}

    guide.append(first)  # wrapped in an AutoCallable
    guide.append(autoguide.AutoNormal(poutine.block(target.model, expose=["u"]), **options(target)))
    return Pair(target.model, guide, target.args, target.exact, options=FEW)


@way(LISTED, "all its mass on one point at site 'z'")
def guide_list_with_a_point():
    target = two_latents()
    guide = autoguide.AutoGuideList(target.model)
    guide.append(autoguide.AutoDelta(poutine.block(target.model, expose=["z"])))
    guide.append(autoguide.AutoNormal(poutine.block(target.model, expose=["u"]), **options(target)))
    return Pair(target.model, guide, target.args, target.exact, options=FEW)


def _mixture():
    x = normal_data()

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    means = torch.tensor([[0.0], [2.0]])
    exact = (torch.tensor([[0.3], [0.7]]).log() + dist.Normal(means, 1.0).log_prob(x)).logsumexp(0)
    return model, x, exact


@way(LISTED)
def discrete_parallel():
    model, x, exact = _mixture()
    return Pair(model, autoguide.AutoDiscreteParallel(model), (x,), exact)


@way(LISTED, "all its mass on one point at site 'u'|draws .* a surface")
def structured_with_one_point():
    target = two_latents()
    guide = autoguide.AutoStructured(target.model, conditionals={"z": "normal", "u": "delta"}, dependencies={})
    return Pair(target.model, guide, target.args, target.exact, options=FEW)


@way(LISTED)
def structured_with_a_function():
    target = two_latents()

    def noise():
        return pyro.sample("noise", dist.Normal(torch.zeros(3), 1.1).to_event(1), infer={"is_auxiliary": True})

    guide = autoguide.AutoStructured(
        target.model,
        conditionals={"z": noise, "u": "normal"},
        dependencies={"u": {"z": "linear"}},
        **options(target),
    )
    return Pair(target.model, guide, target.args, target.exact.sum().reshape(1))


@way(LISTED)
def easy_guide():
    target = both()

    class Guide(EasyGuide):
        def guide(self, x):
            group = self.group(match="mean")
            group.sample("latent", dist.Normal(x.sum() / 5, 1.0).expand([1]).to_event(1))
            with self.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x.sum() / 5 + x) / 2, 1.1))

    return Pair(target.model, Guide(target.model), target.args, target.exact, options=FEW)


@way(LISTED, "all its mass on one point at site 'mean'")
def easy_guide_with_a_map_estimate():
    target = both()

    class Guide(EasyGuide):
        def guide(self, x):
            self.map_estimate("mean")
            with self.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 1.1))

    return Pair(target.model, Guide(target.model), target.args, target.exact, options=FEW)


@way(LISTED)
def messenger_with_amortised_plates():
    target = local()
    guide = autoguide.AutoNormalMessenger(target.model, init_scale=1.0, amortized_plates=("data",))
    return Pair(target.model, guide, target.args, target.exact, options=FEW)


@way(LISTED)
def messenger_with_a_posterior_of_its_own():
    target = two_latents()

    class Guide(autoguide.AutoNormalMessenger):
        def get_posterior(self, name, prior):
            if name == "u":
                return dist.Normal(0.5 * self.upstream_value("z"), 1.0)
            return super().get_posterior(name, prior)

    return Pair(target.model, Guide(target.model, **options(target)), target.args, target.exact, options=FEW)


@way(LISTED)
def automatic_guide_with_create_plates():
    target = local()
    guide = autoguide.AutoNormal(
        target.model, create_plates=lambda x: pyro.plate("data", len(x), dim=-1), **options(target)
    )
    return Pair(target.model, guide, target.args, target.exact, options=FEW)


@way(LISTED)
def automatic_guide_that_has_run_before():
    target = local()
    guide = autoguide.AutoNormal(target.model, **options(target))
    guide(*target.args)
    return Pair(target.model, guide, target.args, target.exact, options=FEW)
