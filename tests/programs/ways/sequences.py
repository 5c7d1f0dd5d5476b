"""Sequences within a datum, and modules."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn

from ways import Pair, given, normal_data, normal_evidence, normal_model, way, wide_guide

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


# --- modules ---

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
def a_plain_network_made_pyros():
    """to_pyro_module_ turns a plain network into one whose weights may be drawn."""
    network = nn.Linear(2, 1, bias=False)
    to_pyro_module_(network)
    network.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
    features, y = torch.tensor([[1.0, 0.2], [1.0, -1.0]]), torch.tensor([0.3, -0.8])

    def model(features, y):
        loc = network(features).squeeze(-1)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, 0.8), obs=y)

    def guide(features, y):
        pyro.sample("weight", dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

    covariance = features @ features.T + 0.64 * torch.eye(2)
    return Pair(model, guide, (features, y), dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(y))
