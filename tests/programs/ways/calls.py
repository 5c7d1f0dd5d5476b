"""How a program is called and changed: arguments, handlers, factors, and sites that do not fit."""

import functools

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.autoname import scope

from ways import Pair, given, normal_data, normal_evidence, normal_model, way, wide_guide

ARGUMENTS = "arguments"


def masked(x, mask):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).mask(mask), obs=x)


@way(ARGUMENTS)
def one():
    return given(normal_model, wide_guide, normal_data())


@way(ARGUMENTS)
def two():
    return given(masked, lambda x, mask: wide_guide(x), normal_data(), torch.ones(3).bool())


@way(ARGUMENTS)
def keywords_alone():
    return given(lambda *, x, mask: masked(x, mask), lambda *, x, mask: wide_guide(x), x=normal_data(), mask=True)


@way(ARGUMENTS)
def one_by_position_and_one_by_keyword():
    return given(masked, lambda x, mask=None: wide_guide(x), normal_data(), mask=torch.ones(3).bool())


@way(ARGUMENTS)
def none_with_the_data_in_a_closure():
    x = normal_data()
    return given(lambda: normal_model(x), lambda: wide_guide(x))


@way(ARGUMENTS)
def a_tuple():
    return given(lambda pair: masked(*pair), lambda pair: wide_guide(pair[0]), (normal_data(), torch.ones(3).bool()))


@way(ARGUMENTS)
def a_mapping():
    return given(
        lambda batch: masked(batch["x"], batch["mask"]),
        lambda batch: wide_guide(batch["x"]),
        {"x": normal_data(), "mask": torch.ones(3).bool()},
    )


@way(ARGUMENTS)
def data_and_a_setting_of_another_length():
    """A tensor that is no data travels whole."""

    def model(x, loc):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc.sum(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, loc):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + loc.sum()) / 2, 0.8))

    return given(model, guide, normal_data(), torch.tensor([0.3, 0.2]), exact=lambda x: normal_evidence(x - 0.5))


@way(ARGUMENTS)
def a_number_beside_the_data():
    def model(x, scale):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    return given(
        model,
        lambda x, scale: wide_guide(x),
        normal_data(),
        0.8,
        exact=lambda x: dist.Normal(0.0, 1.64**0.5).log_prob(x),
    )


@way(ARGUMENTS)
def a_batch_of_one():
    x = torch.tensor([0.7])
    return Pair(normal_model, wide_guide, (x,), normal_evidence(x))


@way(ARGUMENTS)
def labels_beside_the_data():
    """p(x | y): the label moves the prior."""
    x, y = normal_data(), torch.tensor([0, 1, 1])

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y.to(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + y) / 2, 0.8))

    return Pair(model, guide, (x, y), normal_evidence(x - y))


@way(ARGUMENTS)
def labels_that_are_observed():
    """p(x, y), y ~ N(z, 2) beside x ~ N(z, 1)."""
    x, y = normal_data(), torch.tensor([0.0, 1.0, -1.0])

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 2.0), obs=y)

    covariance = torch.tensor([[2.0, 1.0], [1.0, 5.0]])
    exact = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(torch.stack([x, y], -1))
    return Pair(model, lambda x, y: wide_guide(x), (x, y), exact)


# --- handlers ---

HANDLERS = "handlers"


def unobserved():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0))


def handled(model):
    x = normal_data()
    return Pair(model, lambda: wide_guide(x), (), normal_evidence(x))


way(HANDLERS, name="condition")(lambda: handled(pyro.condition(unobserved, data={"x": normal_data()})))
way(HANDLERS, name="condition as a decorator")(
    lambda: handled(poutine.condition(data={"x": normal_data()})(unobserved))
)
way(HANDLERS, name="partial")(lambda: handled(functools.partial(normal_model, normal_data())))
way(HANDLERS, name="replay of a trace that has other sites")(
    lambda: handled(poutine.replay(lambda: normal_model(normal_data()), trace=poutine.Trace()))
)
way(HANDLERS, name="infer_config")(
    lambda: handled(poutine.infer_config(lambda: normal_model(normal_data()), config_fn=lambda site: {}))
)
way(HANDLERS, name="lift of no parameter")(lambda: handled(poutine.lift(lambda: normal_model(normal_data()), prior={})))


def three(x=None):
    """a ~ N(0, 1), z ~ N(a, 1), x ~ N(z, 1)."""
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=normal_data() if x is None else x)


@way(HANDLERS)
def do():
    """An intervention: z sees a = 0.5, and Pyro keeps the site a as a latent that nothing depends on."""
    x = normal_data()

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("a", dist.Normal(0.0, 1.2))
            pyro.sample("z", dist.Normal((x + 0.5) / 2, 0.8))

    return Pair(poutine.do(three, data={"a": torch.tensor(0.5)}), guide, (x,), normal_evidence(x - 0.5))


@way(HANDLERS)
def condition_of_a_latent():
    """a is observed as 0.5 for each datum and counts."""
    x = normal_data()

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal((x + 0.5) / 2, 0.8))

    exact = normal_evidence(x - 0.5) + dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5))
    return Pair(poutine.condition(three, data={"a": torch.full((3,), 0.5)}), guide, (x,), exact)


@way(HANDLERS, "guide samples site.*'a'|does not sample")
def substitute_of_a_sample_site_does_nothing():
    """substitute is for parameters: the latent a stays, and a guide without it is refused."""

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return Pair(poutine.substitute(three, data={"a": torch.tensor(0.5)}), guide, (normal_data(),))


@way(HANDLERS)
def substitute_of_a_parameter():
    def model(x):
        shift = pyro.param("shift", torch.tensor(9.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = normal_data()
    return Pair(poutine.substitute(model, data={"shift": torch.tensor(0.0)}), wide_guide, (x,), normal_evidence(x))


@way(HANDLERS)
def block_of_a_site_in_the_model():
    """A hidden latent is integrated out by its own draws."""
    x = normal_data()

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("a", dist.Normal(x / 3, 1.1))
            pyro.sample("z", dist.Normal(2 * x / 3, 1.1))

    return Pair(poutine.block(three, hide=[]), guide, (x,), dist.Normal(0.0, 3**0.5).log_prob(x))


@way(HANDLERS)
def uncondition_is_undone_by_condition():
    return handled(
        poutine.condition(poutine.uncondition(lambda: normal_model(normal_data())), data={"x": normal_data()})
    )


@way(HANDLERS)
def scope_of_names():
    x = normal_data()

    return Pair(scope(normal_model, prefix="inner"), scope(wide_guide, prefix="inner"), (x,), normal_evidence(x))


@way(HANDLERS)
def seed():
    return handled(poutine.seed(lambda: normal_model(normal_data()), rng_seed=3))
