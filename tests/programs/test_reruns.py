"""What must be the same when programs run again: numbers under one seed, buffers, modes, and each datum's density."""

import argparse
import collections
import functools
import threading
import types
import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.nn import PyroModule, PyroParam
from shared import hidden_programs
from shared.hidden_programs import Holder, Module, Network, Plain, Slots
from torch import nn

import pyrovae as pv
from pyrovae import objectives
from pyrovae.common.reporting import warn_once

X = torch.randn(9, 3)

# --- modules that hide ------------------------------------------------------------------------------------------------


def _wrapped(function):
    @functools.wraps(function)
    def run(*args):
        return function(*args)

    return run


class ByClass:
    plain: Plain

    @classmethod
    def model(cls, x):
        return cls.plain.model(x)


def by_class(plain):
    ByClass.plain = plain
    return ByClass.model


def by_registry(plain):
    hidden_programs.registry["vae"] = plain
    return hidden_programs.by_name


def by_file(plain):
    hidden_programs.current = plain
    return lambda x: hidden_programs.current.model(x)


def by_no_reference(plain):
    hidden_programs.current = plain
    return hidden_programs.by_import


def by_default(plain):
    return lambda x, program=plain.model: program(x)


HIDING = {
    "a method": lambda plain: plain.model,
    "a lambda": lambda plain: lambda x: plain.model(x),
    "an object in an object": lambda plain: lambda x, o=Holder(Holder(plain)): o.inner.inner.model(x),
    "an object in a list in an object": lambda plain: lambda x, o=Holder([{"a": plain}]): o.inner[0]["a"].model(x),
    "slots": lambda plain: lambda x, o=Slots(Slots(plain)): o.inner.inner.model(x),
    "a plain object in a module": lambda plain: Module(plain.network),
    "a partial of a lambda": lambda plain: functools.partial(lambda p, x: p.model(x), Holder(plain).inner),
    "a wrapped function": lambda plain: _wrapped(lambda x: plain.model(x)),
    "a class": by_class,
    "a registry of another file": by_registry,
    "a name of another file": by_file,
    "an import while it runs": by_no_reference,
    "a default argument": by_default,
    "a namespace": lambda plain: lambda x, o=types.SimpleNamespace(a=argparse.Namespace(b=plain)): o.a.b.model(x),
    "a deque": lambda plain: lambda x, o=collections.deque([plain]): o[0].model(x),
    "a mapping": lambda plain: (
        lambda x, o=collections.ChainMap({"a": types.MappingProxyType({"b": plain})}): o["a"]["b"].model(x)
    ),
    "a weak reference": lambda plain: lambda x, o=weakref.ref(plain): o().model(x),
    "an inherited attribute of a class": lambda plain: (
        type("Own", (type("Base", (), {"plain": plain}),), {"model": lambda self, x: self.plain.model(x)})().model
    ),
}


@pytest.mark.parametrize("how", HIDING)
def test_a_hidden_module_is_evaluated_in_its_evaluation_mode(short_pilots, how):
    """Dropout off, batch statistics as they were, and the mode given back."""
    torch.manual_seed(3)
    network = Network()
    network(torch.randn(50, 2))  # statistics unlike the first ones
    plain = Plain(network)
    model = HIDING[how](plain)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for evaluate in (
        lambda: pv.log_weights(model, plain.guide, X, num_particles=4),
        lambda: pv.annealed_importance_sampling(model, X, num_temperatures=2, num_chains=2).log_prob,
    ):
        pyro.set_rng_seed(1)
        found = evaluate()
        assert all(module.training for module in network.modules())
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        network.eval()
        pyro.set_rng_seed(1)
        assert torch.equal(found, evaluate())
        network.train()


class Counting(nn.Module):
    """Changes a buffer at every run, in evaluation mode too."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, z):
        if self.how == "in place":
            self.seen += 1
        elif self.how == "reassigned":
            self.seen = self.seen + z.detach().mean()
        else:
            self.seen.copy_(z.detach().sum())
        return torch.cat([z, z[..., :1]], -1)


@pytest.mark.parametrize("how", ["in place", "reassigned", "copied"])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_buffer_that_an_evaluation_would_change_is_refused(how, hidden):
    plain = Plain(Counting(how))
    model = by_no_reference(plain) if hidden else plain.model
    with pytest.raises(ValueError, match="changes buffers in evaluation mode"):
        pv.log_weights(model, plain.guide, X)
    assert plain.network.seen == 0


class Drifting:
    """Other numbers at every run: by a counter, a cache, or a generator of its own."""

    def __init__(self, how):
        self.how, self.count, self.generator = how, 0, torch.Generator().manual_seed(0)

    def shift(self):
        self.count += 1
        if self.how == "counter":
            return 0.1 * self.count
        if self.how == "cache":
            return 0.0 if self.count < 4 else 1.0
        return torch.randn((), generator=self.generator)

    def __call__(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal(z.sum(-1, keepdim=True) + self.shift(), 1.0).expand([len(x), 3]).to_event(1), obs=x
            )


@pytest.mark.parametrize("how", ["counter", "generator"])
def test_a_program_that_is_not_the_same_twice_is_refused(how):
    plain = Plain(None)
    with pytest.raises(ValueError, match="other log weights when they are run again under the same seed"):
        pv.log_weights(Drifting(how), plain.guide, X, vectorize_particles=False)


# --- data whose latents the model couples -----------------------------------------------------------------------------


def normal_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def coupled(kind):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z
            if kind == "attention":
                loc = z + (z.unsqueeze(-1) * z.unsqueeze(-2)).softmax(-1).matmul(z.unsqueeze(-1)).squeeze(-1)
            if kind == "batch mean":
                loc = z - z.mean(-1, keepdim=True)
            if kind == "cumulative":
                loc = z.cumsum(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
            if kind == "neighbours":
                pyro.factor("smooth", -((z - z.roll(1, -1)) ** 2))
            if kind == "one pair":
                pyro.factor("pair", -0.1 * (z - z.roll(len(x) // 2, -1)) ** 2)
            if kind == "even neighbours" and len(x) % 2 == 0:
                pairs = z.unflatten(-1, (-1, 2))
                pyro.factor("pairs", -(pairs - pairs.flip(-1)).square().flatten(-2))
            if kind == "even neighbours" and len(x) % 2:
                pyro.factor("pairs", z.roll(1, -1))

    return model


@pytest.mark.parametrize("kind", ["attention", "batch mean", "cumulative", "neighbours", "one pair", "even neighbours"])
@settings(max_examples=5, deadline=None)
@given(num_data=st.sampled_from([2, 3, 4, 7, 40]), data_batch_size=st.sampled_from(["auto", None]))
def test_coupled_latents_are_refused(kind, num_data, data_batch_size):
    x = torch.randn(num_data)
    with pytest.raises(ValueError, match="the model couples the data of plate 'data'"):
        pv.log_weights(coupled(kind), normal_guide, x, data_batch_size=data_batch_size)
    with pytest.raises(ValueError, match="the model couples the data of plate 'data'"):
        objectives.ImportanceWeighted(3).loss(coupled(kind), normal_guide, x)


@pytest.mark.parametrize("probability", [0.02, 0.5])
@pytest.mark.parametrize("data_batch_size", ["auto", None])
def test_coupled_discrete_latents_are_refused(probability, data_batch_size):
    """A guide that hardly ever draws the other value: values by chance show the coupling."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("same", (z == z.roll(1, -1)).float())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(probability * torch.ones(len(x))))

    with pytest.raises(ValueError, match="the model couples the data of plate 'data'"):
        pv.log_weights(model, guide, torch.randn(12), data_batch_size=data_batch_size)


@pytest.mark.parametrize("data_batch_size", ["auto", None])
def test_rare_coupling_of_discrete_latents_is_refused(data_batch_size):
    """Two latents that are both 1 are hardly ever drawn."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("both", -3 * z * z.roll(1, -1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.05 * torch.ones(len(x))))

    with pytest.raises(ValueError, match="the model couples the data of plate 'data'"):
        pv.log_weights(model, guide, torch.randn(6), data_batch_size=data_batch_size)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compiled", "scripted"])
def test_compiled_networks_are_evaluated(how):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)
            self.register_buffer("shift", torch.zeros(3))

        def forward(self, z):
            return self.layer(z) + self.shift

    network = Decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls scripting deprecated
        plain = Plain(torch.compile(network) if how == "compiled" else torch.jit.script(network))
        found = pv.log_marginal_likelihood(plain.model, plain.guide, X, num_particles=4000)
    other = pv.log_marginal_likelihood(Plain(network).model, plain.guide, X, num_particles=4000)
    error = (found.stderr.square() + other.stderr.square()).sqrt()
    assert ((found.log_prob - other.log_prob).abs() <= 6 * error).all()
    assert network.training


def test_what_is_shared_through_data_alone_is_no_coupling(double):
    """An encoder or decoder that looks at all data, and latents of one datum that depend on each other."""
    x = torch.randn(6)

    def model(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(x.mean(), 1.0))
            second = pyro.sample("second", dist.Normal(first, 1.0))
            pyro.sample("x", dist.Normal(second, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = x.mean() + (x - x.mean()) / 3
            first = pyro.sample("first", dist.Normal(loc, (2 / 3) ** 0.5))
            pyro.sample("second", dist.Normal((first + x) / 2, 0.5**0.5))

    exact = dist.Normal(x.mean(), 3**0.5).log_prob(x)
    assert torch.allclose(pv.log_marginal_likelihood(model, guide, x, num_particles=3).log_prob, exact, atol=1e-9)


def test_a_sequential_plate_that_couples_is_refused():
    def model(x):
        before = torch.zeros(())
        for index in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{index}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{index}", dist.Normal(z + before, 1.0), obs=x[index])
            before = z

    def guide(x):
        for index in pyro.plate("data", len(x)):
            pyro.sample(f"z{index}", dist.Normal(x[index] / 2, 0.8))

    with pytest.raises(ValueError, match="the model couples the data of plate 'data'"):
        pv.log_weights(model, guide, torch.randn(5), plate="data")


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_evaluations_in_threads_wait_for_each_other():
    """The numbers are those of evaluations one after the other, up to the order, and no module is left in eval()."""
    network = Network()
    plain = Plain(network)
    results, errors = [], []

    def evaluate():
        try:
            results.append(pv.log_marginal_likelihood(plain.model, plain.guide, X, num_particles=500).mean)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=evaluate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(results) == 4
    assert max(results) - min(results) < 0.5
    assert all(module.training for module in network.modules())


def test_one_warning_for_each_program_at_the_users_line():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.reshape(-1, 2)[:, :1].expand(-1, 3), 1.0).to_event(1), obs=x)

    guide = Plain(None).guide
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            pv.log_marginal_likelihood(model, guide, X, num_particles=3)
        pv.log_weights(model, guide, X, num_particles=3)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="once"):
        warn_once(Holder(None), "once")


@pytest.mark.parametrize("declare", ["pyro.module", "PyroParam", "PyroModule"])
def test_parameters_of_another_model_are_not_evaluated(declare):
    """Pyro's store hands a second model of the same names the first one's parameters."""

    class Learned(PyroModule):
        def __init__(self, value):
            super().__init__()
            if declare == "PyroParam":
                self.loc = PyroParam(torch.tensor(value))
            else:
                self.loc = nn.Parameter(torch.tensor(value))

        def forward(self, x):
            if declare == "pyro.module":
                pyro.module("learned", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(4)
    first, second = Learned(0.0), Learned(3.0)
    expected = pv.log_marginal_likelihood(first, normal_guide, x, num_particles=20_000).mean
    assert abs(expected - dist.Normal(0.0, 2**0.5).log_prob(x).mean()) < 0.05
    if declare != "PyroParam":  # plain parameters are not taken from the store
        found = pv.log_marginal_likelihood(second, normal_guide, x, num_particles=20_000).mean
        assert abs(found - dist.Normal(3.0, 2**0.5).log_prob(x).mean()) < 0.5
    else:
        with pytest.raises(ValueError, match="other parameters than their own"):
            pv.log_marginal_likelihood(second, normal_guide, x, num_particles=20_000)
    assert next(second.parameters()).item() == 3.0


@pytest.mark.parametrize("number", [10**15, 10**19])
def test_more_particles_than_memory_holds(number):
    plain = Plain(nn.Identity())
    with pytest.raises(ValueError, match="num_particles=.* GiB"):
        pv.log_marginal_likelihood(plain.model, plain.guide, X, num_particles=number)


def test_an_improper_prior_has_no_evidence():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (len(x),), ()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"latent site\(s\) \['z'\] .* cannot be drawn"):
        pv.log_weights(model, normal_guide, torch.randn(3))
