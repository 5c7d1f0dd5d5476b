"""How a program is written and called: arguments, handlers, plates, modules."""

import functools
import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from ways import Pair, normal_data, normal_evidence, normal_model, way, wide_guide

# --- arguments ------------------------------------------------------------------------------------------------------------------

ARGUMENTS = "arguments"


def given(model, guide, *args, exact=normal_evidence, **kwargs):
    return Pair(model, guide, args, exact(normal_data()), kwargs)


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


# --- handlers -------------------------------------------------------------------------------------------------------------------

HANDLERS = "handlers"


def unobserved():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0))


def handled(model):
    x = normal_data()
    return Pair(model, lambda: wide_guide(x), (), normal_evidence(x))


way(HANDLERS, name="condition")(lambda: handled(pyro.condition(unobserved, data={"x": normal_data()})))
way(HANDLERS, name="condition as a decorator")(lambda: handled(poutine.condition(data={"x": normal_data()})(unobserved)))
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
    """An intervention: a is 0.5 and counts nothing."""
    x = normal_data()

    def guide(x):
        with pyro.plate("data", 3):
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
    return handled(poutine.condition(poutine.uncondition(lambda: normal_model(normal_data())), data={"x": normal_data()}))


@way(HANDLERS)
def scope_of_names():
    x = normal_data()

    return Pair(scope(normal_model, prefix="inner"), scope(wide_guide, prefix="inner"), (x,), normal_evidence(x))


@way(HANDLERS)
def seed():
    return handled(poutine.seed(lambda: normal_model(normal_data()), rng_seed=3))


# --- statements that are no draws ---------------------------------------------------------------------------------------------------

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


# --- plates -----------------------------------------------------------------------------------------------------------------------

PLATES = "plates"


@way(PLATES)
def with_a_dimension():
    def plated(program, dim):
        def run(x):
            with pyro.plate("data", len(x), dim=dim):
                program(x)

        return run

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.8))

    return given(plated(model, -1), plated(guide, -1), normal_data())


@way(PLATES)
def without_a_size():
    """As two of Pyro's own examples write it."""

    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return given(model, guide, normal_data())


@way(PLATES)
def without_a_size_in_the_guide():
    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return given(normal_model, guide, normal_data())


X2 = ((0.5, -1.0, 2.0), (0.1, 0.3, -0.4))


def nested_model(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def nested_guide(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(x.sum(1, keepdim=True) / 4, 0.6))


def shared_evidence(x):
    return dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)


@way(PLATES)
def nested():
    x = torch.tensor(X2)
    return Pair(nested_model, nested_guide, (x,), shared_evidence(x))


@way(PLATES)
def nested_with_the_data_inside():
    """The datum plate is the inner one, at dim -1."""
    x = torch.tensor(X2).T

    def model(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", len(x), dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x.sum(0) / 4, 0.6))

    return Pair(model, guide, (x,), shared_evidence(x.T))


@way(PLATES)
def nested_with_latents_on_both_levels():
    """z_n ~ N(0, 1), u_nd ~ N(z_n, 1), x_nd ~ N(u_nd, 1): x_n ~ N(0, 2 I + 1)."""
    x = torch.tensor(X2)

    def model(x):
        with pyro.plate("data", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 3, dim=-1):
                u = pyro.sample("u", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(x.sum(1, keepdim=True) / 5, 0.7))
            with pyro.plate("pixels", 3, dim=-1):
                pyro.sample("u", dist.Normal((x + z) / 2, 0.8))

    exact = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1).log_prob(x)
    return Pair(model, guide, (x,), exact)


def grid_pair():
    x = torch.tensor(X2)

    def plates():
        return pyro.plate_stack("grid", (2, 3))

    def model(x):
        with plates():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with plates():
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return x, model, guide


@way(PLATES, "say which, plate='grid")
def a_stack_where_no_plate_is_named():
    x, model, guide = grid_pair()
    return Pair(model, guide, (x,))


way(PLATES, name="a stack with the rows named")(
    lambda: (lambda x, m, g: Pair(m, g, (x,), normal_evidence(x).sum(1), options={"plate": "grid_1"}))(*grid_pair())
)
way(PLATES, name="a stack with the columns named")(
    lambda: (lambda x, m, g: Pair(m, g, (x,), normal_evidence(x).sum(0), options={"plate": "grid_0"}))(*grid_pair())
)


def sequential_model(x):
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])


def sequential_guide(x):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z_{i}", dist.Normal(x[i] / 2, 0.8))


@way(PLATES)
def in_sequence():
    x = normal_data()
    return Pair(sequential_model, sequential_guide, (x,), normal_evidence(x), options={"plate": "data"})


@way(PLATES)
def in_sequence_as_one_datum():
    x = normal_data()
    return Pair(sequential_model, sequential_guide, (x,), normal_evidence(x).sum())


@way(PLATES, "one name in both")
def of_two_names():
    def guide(x):
        with pyro.plate("batch", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return Pair(normal_model, guide, (normal_data(),))


@way(PLATES, "outside plate 'data'")
def that_leaves_a_latent_outside():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean.unsqueeze(-1), 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    return Pair(model, guide, (normal_data(),), options={"plate": "data"})


# --- sequences within a datum --------------------------------------------------------------------------------------------------------

SEQUENCES = "sequences within a datum"
STEPS = ((0.5, 1.0, 0.2), (-1.0, 0.0, -0.5))


def walk_evidence(x):
    """z_t a random walk from 0, x_t = z_t + noise: covariance min(s, t) + 1."""
    t = torch.arange(1.0, x.shape[1] + 1)
    return dist.MultivariateNormal(torch.zeros(len(t)), torch.minimum(t, t[:, None]) + torch.eye(len(t))).log_prob(x)


def walk(steps):
    def model(x):
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in steps(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def guide(x):
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in steps(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal((z + x[:, t]) / 2, 0.9))

    x = torch.tensor(STEPS)
    return Pair(model, guide, (x,), walk_evidence(x))


way(SEQUENCES, name="range")(lambda: walk(range))
way(SEQUENCES, name="markov")(lambda: walk(lambda num: pyro.markov(range(num))))


@way(SEQUENCES)
def a_function_decorated_by_markov():
    x = torch.tensor(STEPS)

    def model(x):
        @pyro.markov
        def step(t, z):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])
            return z if t == 2 else step(t + 1, z)

        with pyro.plate("data", len(x)):
            step(0, torch.zeros(len(x)))

    return Pair(model, walk(range).guide, (x,), walk_evidence(x))


@way(SEQUENCES)
def a_plate_inside_each_step():
    """`for t in ...: with plate` as Pyro's deep Markov model has it."""
    x = torch.tensor(STEPS)

    def model(x):
        plate, z = pyro.plate("data", len(x)), torch.zeros(len(x))
        for t in pyro.markov(range(3)):
            with plate:
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    return Pair(model, walk(range).guide, (x,), walk_evidence(x))


@way(SEQUENCES)
def a_gaussian_hidden_markov_model_summed_out():
    """Its latent path has a closed form; the level is drawn: x_t = level + z_t + noise."""
    x = torch.tensor(STEPS).unsqueeze(-1)
    eye = torch.eye(1)

    def hmm(x, level):
        noise = dist.Normal(level.unsqueeze(-1), 1.0).to_event(1)
        unit = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        start = dist.Normal(torch.zeros(1), 1e-6).to_event(1)
        return dist.GaussianHMM(start, eye, unit, eye, noise.expand([*level.shape]), duration=3)

    def model(x):
        with pyro.plate("data", len(x)):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            pyro.sample("x", hmm(x, level.unsqueeze(-1)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("level", dist.Normal(x.mean((1, 2)) / 2, 1.0))

    t = torch.arange(1.0, 4.0)
    covariance = torch.minimum(t, t[:, None]) + torch.eye(3) + 1
    return Pair(model, guide, (x,), dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x.squeeze(-1)))


# --- modules --------------------------------------------------------------------------------------------------------------------------

MODULES = "modules"


class Pyros(PyroModule):
    """Model and guide as methods of a PyroModule with a PyroParam."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)
        self.encoder = PyroModule[nn.Linear](1, 1)
        with torch.no_grad():
            self.encoder.weight.fill_(0.5)
            self.encoder.bias.fill_(0.0)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, self.scale))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x.unsqueeze(-1)).squeeze(-1), 0.8))


@way(MODULES)
def methods_of_a_pyro_module():
    module = Pyros()
    return given(module.model, module.guide, normal_data())


class AsModule(PyroModule):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


@way(MODULES)
def pyro_modules_with_forward():
    return given(AsModule(normal_model), AsModule(wide_guide), normal_data())


class Local(PyroModule):
    """A latent of each datum as a PyroSample."""

    @PyroSample
    def z(self):
        return dist.Normal(0.0, 1.0)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.z, 1.0), obs=x)


@way(MODULES)
def pyro_sample_of_each_datum():
    return given(Local(), wide_guide, normal_data())


class Regression(PyroModule):
    """A Bayesian linear layer: its weights are latents of the whole."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1, bias=False)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

    def forward(self, features, y):
        loc = self.linear(features).squeeze(-1)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, 0.8), obs=y)


@way(MODULES)
def bayesian_layer_as_one_datum():
    features = torch.tensor([[1.0, 0.2], [1.0, -1.0], [1.0, 1.5], [1.0, 0.7]])
    y = torch.tensor([0.3, -0.8, 1.9, 0.1])
    covariance = features @ features.T + 0.64 * torch.eye(4)
    mean = (features.T @ torch.linalg.solve(covariance, y)).reshape(1, 2)

    def guide(features, y):
        pyro.sample("linear.weight", dist.Normal(mean, 0.6).to_event(2))

    exact = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(y)
    return Pair(Regression(), guide, (features, y), exact)


class LikePyrosExample(nn.Module):
    """The class of Pyro's VAE example: pyro.module in both, networks in the class."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, 1), nn.Linear(1, 1)
        with torch.no_grad():
            for layer, weight in ((self.decoder, 1.0), (self.encoder, 0.5)):
                layer.weight.fill_(weight)
                layer.bias.fill_(0.0)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.8).to_event(1))


@way(MODULES)
def as_pyros_example_writes_it():
    vae, x = LikePyrosExample(), normal_data().unsqueeze(-1)
    return Pair(vae.model, vae.guide, (x,), normal_evidence(x).squeeze(-1))


@way(MODULES)
def random_module_of_a_network():
    """pyro.nn.to_pyro_module_ turns a plain network into one whose weights may be drawn."""
    network = nn.Linear(2, 1, bias=False)
    to_pyro_module_(network)
    network.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
    features, y = torch.tensor([[1.0, 0.2], [1.0, -1.0]]), torch.tensor([0.3, -0.8])

    def model(features, y):
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(network(features).squeeze(-1), 0.8), obs=y)

    def guide(features, y):
        pyro.sample("weight", dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

    covariance = features @ features.T + 0.64 * torch.eye(2)
    return Pair(model, guide, (features, y), dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(y))


# --- sites that do not fit -----------------------------------------------------------------------------------------------------------

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
