"""A checkpoint goes into the model that it is of: one that computes anything else from the same tensors is refused."""

import argparse
import contextlib
import functools
import math
import types

import numpy as np
import pyro
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer.autoguide import AutoNormal
from shared.networks import Net, bernoulli, mlp, model_of
from shared.parts import DECODERS, ENCODERS, GUIDES, LIKELIHOODS, PRIORS, SHAPE
from shared.runs import make
from torch import nn

import pyrovae as pv
from pyrovae.training.checkpoint_file import read, write
from pyrovae.training.saved_pair import describe_module, difference
from pyrovae.training.values import describe_callable


class Noisy(Net):
    """The same under another name."""


def power(x, exponent=1.0):
    return x.abs() ** exponent


def with_unsaved(value):
    net = nn.Sequential(nn.Linear(2, 12))
    net.register_buffer("unsaved", torch.tensor(value), persistent=False)
    return net


class Config:
    def __init__(self, slope):
        self.slope = slope


def reading(table):
    return lambda x: x * table[0]


# An attribute's value in the one, in the other, and how the message tells them.
HELD = {
    "dict": ({"slope": 0.1}, {"slope": 0.3}, "slope=0.1", "slope=0.3"),
    "dicts in lists": ([{"a": [1]}], [{"a": [2]}], "a=(1)", "a=(2)"),
    "list": ([1, 2], [1, 3], "(1, 2)", "(1, 3)"),
    "long list": (list(range(200)), list(range(1, 201)), "checksum", "checksum"),
    "set": ({"a", "b"}, {"a", "c"}, "'b'", "'c'"),
    "array": (np.ones(3), np.zeros(3), "checksum", "checksum"),
    "large tensor": (torch.ones(5000), torch.zeros(5000), "checksum", "checksum"),
    "Namespace": (argparse.Namespace(slope=1), argparse.Namespace(slope=2), "slope=1", "slope=2"),
    "SimpleNamespace": (types.SimpleNamespace(slope=1), types.SimpleNamespace(slope=2), "slope=1", "slope=2"),
    "own object": (Config(1), Config(2), "slope=1", "slope=2"),
    "distribution": (torch.distributions.Exponential(1.0), torch.distributions.Exponential(2.0), "rate=", "rate="),
    "closure over a list": (reading([2.0]), reading([3.0]), "table=(2)", "table=(3)"),
}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 12)

    def forward(self, z):
        return self.linear(z)


def held(value):
    net = Plain()
    net.held = value
    return net


def with_attribute(name, value):
    class Own(Plain):
        def __init__(self):
            super().__init__()
            setattr(self, name, value)

    return Own()


def by_a_method_of_the_constructor(value):
    class Own(Plain):
        def __init__(self):
            super().__init__()
            self.reset()

        def reset(self):
            self.alpha = value

    return Own()


def by_a_property(value):
    class Own(Plain):
        @property
        def alpha(self):
            return self._alpha

        @alpha.setter
        def alpha(self, value):
            self._alpha = float(value)

    net = Own()
    net.alpha = value
    return net


def by_the_dict(value):
    net = Plain()
    net.__dict__.update(alpha=value)
    return net


def by_object(value):
    net = Plain()
    object.__setattr__(net, "alpha", value)
    return net


def by_the_class(value):
    class Own(Plain):
        alpha = value

    return Own()


def by_a_setter(value):
    class Own(Plain):
        alpha = 0.0

        def calibrate(self, value):
            self.alpha = value
            return self

    return Own().calibrate(value)


WAYS_TO_SET = (by_a_method_of_the_constructor, by_a_property, by_the_dict, by_object, by_the_class, by_a_setter)


class Normalised(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def calibrated(self, mean):
        self.mean = torch.tensor(mean)
        return self


def with_hook(factor):
    net = nn.Sequential(nn.Linear(2, 12))
    net[0].register_forward_hook(lambda module, inputs, output: factor * output)
    return net


class Recorder:
    """A helper that fills from outside."""

    def __init__(self):
        self.values, self.total = [], 0

    def record(self, value):
        self.values.append(value)
        self.total += value


class Used(Plain):
    """Its runs leave something in each attribute."""

    def __init__(self):
        super().__init__()
        self.calls, self.last, self.seen, self.sums, self.total = 0, None, [], {}, torch.zeros(())
        self.best_loss, self.history, self.seed, self.recorder = math.inf, [], 0, Recorder()

    def forward(self, z):
        self._count(len(z))
        self.last = z
        self.sums[len(z)] = z.sum()
        self.total.add_(1.0)
        return self.linear(z)

    def _count(self, number):
        self.calls += 1
        self.seen.append(number)


def trained():
    """Used, with what a user's own loop leaves in it."""
    net = used(Used())
    net.best_loss, net.seed = 0.5, 3
    net.history.append(0.5)
    net.recorder.record(3)
    return net


# (the one saved, the one given, both values as the message tells them)
OTHERS = {
    "activation": (lambda: bernoulli(mlp(nn.SiLU)), lambda: bernoulli(mlp(nn.Tanh)), "SiLU", "Tanh"),
    "activation's argument": (
        lambda: bernoulli(mlp(functools.partial(nn.LeakyReLU, 0.2))),
        lambda: bernoulli(mlp(functools.partial(nn.LeakyReLU, negative_slope=0.3))),
        "negative_slope=0.2",
        "negative_slope=0.3",
    ),
    "activation by a function": (
        lambda: bernoulli(mlp(lambda: nn.ReLU())),
        lambda: bernoulli(mlp(lambda: nn.ELU())),
        "ReLU",
        "ELU",
    ),
    "scale": (
        lambda: model_of(pv.likelihoods.Normal(mlp(), SHAPE, scale=0.5)),
        lambda: model_of(pv.likelihoods.Normal(mlp(), SHAPE)),
        "scale=0.5",
        "scale=1",
    ),
    "min_scale": (
        lambda: model_of(pv.likelihoods.HeteroscedasticNormal(DECODERS["MLP"]((2, *SHAPE)), SHAPE, min_scale=0.01)),
        lambda: model_of(pv.likelihoods.HeteroscedasticNormal(DECODERS["MLP"]((2, *SHAPE)), SHAPE)),
        "min_scale=0.01",
        "min_scale=0.001",
    ),
    "num_levels": (
        lambda: model_of(pv.likelihoods.DiscretizedLogistic(DECODERS["MLP"]((2, *SHAPE)), SHAPE, num_levels=17)),
        lambda: model_of(pv.likelihoods.DiscretizedLogistic(DECODERS["MLP"]((2, *SHAPE)), SHAPE)),
        "num_levels=17",
        "num_levels=256",
    ),
    "likelihood": (
        lambda: model_of(pv.likelihoods.Bernoulli(mlp(), SHAPE)),
        lambda: model_of(pv.likelihoods.ContinuousBernoulli(mlp(), SHAPE)),
        "Bernoulli",
        "ContinuousBernoulli",
    ),
    "weight": (
        lambda: pv.guides.DefensiveMixture(make()[1], pv.priors.StandardNormal(2), weight=0.2),
        lambda: pv.guides.DefensiveMixture(make()[1], pv.priors.StandardNormal(2)),
        "weight=0.2",
        "weight=0.1",
    ),
    "num_steps": (
        lambda: pv.guides.Refined(make()[1], make()[0], 3),
        lambda: pv.guides.Refined(make()[1], make()[0], 4),
        "num_steps=3",
        "num_steps=4",
    ),
    "changed afterwards": (lambda: changed_scale(0.3), lambda: changed_scale(0.4), "scale=0.3", "scale=0.4"),
    "own layers": (
        lambda: nn.Sequential(nn.Linear(2, 12), nn.Tanh()),
        lambda: nn.Sequential(nn.Linear(2, 12), nn.SiLU()),
        "Tanh",
        "SiLU",
    ),
    "a layer too many": (
        lambda: nn.Sequential(nn.Linear(2, 12)),
        lambda: nn.Sequential(nn.Linear(2, 12), nn.Sigmoid()),
        "nothing",
        "Sigmoid",
    ),
    "no layer but its place": (
        lambda: nn.Sequential(nn.Linear(2, 12), nn.Identity()),
        lambda: nn.Sequential(nn.Linear(2, 12), nn.Sigmoid()),
        "nothing",
        "Sigmoid",
    ),
    "own class": (lambda: Net(), lambda: Noisy(), "Net", "Noisy"),
    "own number": (lambda: Net(scale=0.5), lambda: Net(scale=0.7), "gain=1", "gain=1.4"),
    "own function": (lambda: Net(), lambda: Net(activation=F.silu), "activation=tanh", "activation=silu"),
    "own partial": (
        lambda: Net(activation=functools.partial(power, exponent=2)),
        lambda: Net(activation=functools.partial(power, exponent=3)),
        "exponent=2",
        "exponent=3",
    ),
    "own lambda": (
        lambda: Net(activation=lambda x: x + 1),
        lambda: Net(activation=lambda x: x - 1),
        "lambda",
        "lambda",
    ),
    "own text": (lambda: Net(mode="mean"), lambda: Net(), "mode='mean'", "mode='sum'"),
    "own tensor": (lambda: Net(shift=torch.ones(12)), lambda: Net(), "shift=a tensor", "shift=a tensor"),
    **{
        f"held: {name}": (lambda one=one: held(one), lambda other=other: held(other), *texts)
        for name, (one, other, *texts) in HELD.items()
    },
    **{
        f"set: {way.__name__}": (lambda way=way: way(1.5), lambda way=way: way(2.5), "1.5", "2.5")
        for way in WAYS_TO_SET
    },
    **{
        f"amount: {name}": (
            lambda name=name: with_attribute(name, 2),
            lambda name=name: with_attribute(name, 3),
            f"{name}=2",
            f"{name}=3",
        )
        for name in (
            *("num_heads", "kernel_size", "patch_size", "step_size", "num_steps", "n_layers"),
            *("profile", "discount", "data_mean", "batch_first", "activation_name"),
        )
    },
    "hook": (lambda: with_hook(2.0), lambda: with_hook(3.0), "factor=2", "factor=3"),
    "hook on one": (lambda: with_hook(2.0), lambda: nn.Sequential(nn.Linear(2, 12)), "factor=2", "hooks=()"),
    "hook on the other": (lambda: nn.Sequential(nn.Linear(2, 12)), lambda: with_hook(2.0), "hooks=()", "factor=2"),
    "buffer set by a method": (
        lambda: Normalised().calibrated(1.0),
        lambda: Normalised().calibrated(2.0),
        "mean=1",
        "mean=2",
    ),
    "unsaved buffer": (lambda: with_unsaved(0.5), lambda: with_unsaved(2.0), "unsaved=0.5", "unsaved=2"),
}


def changed_scale(scale):
    model = model_of(pv.likelihoods.Normal(mlp(), SHAPE))
    model.likelihood.scale = scale
    return model


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("place", ["model", "guide"])
def test_another_one_is_refused_with_both_values(name, place, tmp_path):
    saved, other, there, here = OTHERS[name]
    path, beside = tmp_path / "a.pt", nn.Linear(1, 1)

    def pair(module):
        return (module, beside) if place == "model" else (beside, module)

    pv.save(path, *pair(saved()))
    module = other()
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(ValueError, match=rf"a\.pt is of another {place}: .*load_state_dict") as caught:
        pv.load(path, *pair(module))
    in_file, _, in_module = str(caught.value).partition(" in the file and ")
    assert there in in_file
    assert here in in_module
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    again = saved()
    pv.load(path, *pair(again))
    pv.save(path, *pair(again))
    pv.load(path, *pair(saved()))


@given(
    saved=st.tuples(st.floats(0.01, 100), st.sampled_from([nn.SiLU, nn.Tanh, nn.ReLU, nn.ELU])),
    given_=st.tuples(st.floats(0.01, 100), st.sampled_from([nn.SiLU, nn.Tanh, nn.ReLU, nn.ELU])),
)
@settings(max_examples=40, deadline=None)
def test_it_loads_exactly_if_it_computes_the_same(saved, given_, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "generated.pt"

    def made(scale, activation):
        return model_of(pv.likelihoods.Normal(mlp(activation), SHAPE, scale=scale))

    model, other, guide = made(*saved), made(*given_), make()[1]
    pv.save(path, model, guide)
    with contextlib.suppress(ValueError):
        pv.load(path, other)
    z, x = torch.randn(3, 2), torch.randn(3, *SHAPE)
    log_probs = [m.likelihood(z).log_prob(x) for m in (model, other)]
    loaded = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert loaded == (saved[1] is given_[1] and math.isclose(saved[0], given_[0], rel_tol=1e-6))
    if loaded:
        assert torch.allclose(*log_probs, rtol=1e-4)


@pytest.mark.parametrize(
    ("saved", "given_"),
    [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.bfloat16)],
)
def test_another_dtype_is_refused(saved, given_, tmp_path):
    model, guide = (module.to(saved) for module in make())
    pv.save(tmp_path / "a.pt", model, guide)
    other, other_guide = (module.to(given_) for module in make(seed=1))
    with pytest.raises(ValueError, match=rf"is {saved} in the file and {given_} in the module: .*model\.to\({saved}\)"):
        pv.load(tmp_path / "a.pt", other, other_guide)
    assert pv.load(tmp_path / "a.pt", other.to(saved), other_guide.to(saved)) == {}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("saved", "given_"),
    [
        # Defaults written out, by place and by name, as tuple and list, whole numbers and floats.
        (
            lambda: bernoulli(pv.nets.MLP(2, [4], 12)),
            lambda: bernoulli(pv.nets.MLP(2, (4,), out_features=12, dropout=0)),
        ),
        (lambda: bernoulli(mlp(nn.SiLU)), lambda: bernoulli(mlp(lambda: nn.SiLU(inplace=True)))),
        (
            lambda: model_of(pv.likelihoods.Normal(mlp(), SHAPE, scale=1)),
            lambda: model_of(pv.likelihoods.Normal(mlp(), list(SHAPE), scale=1.0)),
        ),
        # Where training starts is in the file.
        (
            lambda: model_of(pv.likelihoods.LearnedScaleNormal(mlp(), SHAPE, initial_scale=0.1)),
            lambda: model_of(pv.likelihoods.LearnedScaleNormal(mlp(), SHAPE, data_mean=torch.rand(SHAPE))),
        ),
        (
            lambda: pv.priors.VampPrior(make()[1], torch.rand(3, *SHAPE)),
            lambda: pv.priors.VampPrior(make()[1], torch.rand(3, *SHAPE), data_range=(-1, 1)),
        ),
        # One activation for several layers.
        (lambda: shared(True), lambda: shared(False)),
        # What the runs of a module change, how many data it is given, and where it is.
        (lambda: used(Net()), lambda: Net(steps_done=7, num_data=3, device="cuda")),
        (trained, Used),
        (trained, lambda: used(trained())),
        (lambda: held(True), lambda: held(1)),
        (lambda: held([1, 2]), lambda: held((1, 2.0))),
        (lambda: held({"a": 1, "device": "cpu", "seed": 1}), lambda: held({"a": 1, "device": "cuda", "seed": 2})),
        (lambda: held(argparse.Namespace(k=1, resume=False)), lambda: held(argparse.Namespace(k=1, resume=True))),
        (lambda: Net(activation=lambda x: x + 1), lambda: Net(activation=lambda x: x + 1)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(2, 12)), lambda: nn.Sequential(nn.Identity(), nn.Linear(2, 12))),
    ],
)
def test_what_makes_no_other_model_still_loads(saved, given_, tmp_path):
    first, second, guide = saved(), given_(), make()[1]
    pv.save(tmp_path / "a.pt", first, guide)
    pv.load(tmp_path / "a.pt", second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def shared(one):
    act = nn.Tanh()
    return nn.Sequential(nn.Linear(2, 4), act, nn.Linear(4, 12), act if one else nn.Tanh())


def used(net):
    net(torch.zeros(3, 2))
    return net


@pytest.mark.parametrize(
    ("of", "names"), [("prior", PRIORS), ("guide", GUIDES), ("decoder", DECODERS), ("encoder", ENCODERS)]
)
def test_every_part_loads_into_one_made_alike(of, names):
    guide = GUIDES["MeanFieldNormal"]()
    arguments = {"prior": (guide,), "guide": (), "decoder": (SHAPE,), "encoder": ()}[of]
    for make_part in names.values():
        first, second = (describe_module(make_part(*arguments)) for _ in range(2))
        assert difference(first, second) is None
        assert any(part["class"] for part in first.values())
    for make_likelihood, _ in LIKELIHOODS.values():
        first, second = (describe_module(make_likelihood(DECODERS["MLP"])) for _ in range(2))
        assert difference(first, second) is None


def test_a_model_that_was_changed_after_it_was_made(tmp_path):
    """What counts is what it is, not what it was made with."""
    model, guide = make()
    model.prior = pv.priors.DiagonalNormal(2)
    pv.save(tmp_path / "a.pt", model, guide)
    alike = pv.GenerativeModel(pv.priors.DiagonalNormal(2), make(seed=1)[0].likelihood)
    assert pv.load(tmp_path / "a.pt", alike, guide) == {}


@pytest.mark.parametrize("format", [1, 2])
def test_files_without_a_description(format, tmp_path):
    """Those of the version before are compared by their specification, those before that by names and shapes."""
    pv.save(tmp_path / "a.pt", bernoulli(mlp(nn.SiLU)), make()[1])
    content = read(tmp_path / "a.pt")
    del content["description"]
    if format == 1:
        del content["specification"]
    write(tmp_path / "a.pt", content)
    state = torch.get_rng_state()
    assert pv.load(tmp_path / "a.pt", bernoulli(mlp(nn.SiLU)), make()[1]) == {}
    other = bernoulli(mlp(nn.Tanh))
    if format == 1:
        assert pv.load(tmp_path / "a.pt", other) == {}
    else:
        with pytest.raises(ValueError, match="layers.2' is SiLU in the file and Tanh here"):
            pv.load(tmp_path / "a.pt", other)
    torch.set_rng_state(state)
    pv.load(tmp_path / "a.pt", bernoulli(mlp(nn.SiLU)))


def test_modules_that_grow_at_their_first_call():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    guide, lazy = AutoNormal(model), nn.Sequential(nn.LazyLinear(3), nn.Tanh())
    before = [describe_module(module) for module in (guide, lazy)]
    guide(torch.zeros(2))
    lazy(torch.zeros(2, 5))
    assert [difference(*pair) for pair in zip(before, map(describe_module, (guide, lazy)), strict=True)] == [None, None]
    with_other = describe_module(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))
    assert difference(before[1], with_other) == "'1' is Tanh in the file and ReLU here"


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward"])
def test_a_pair_with_a_hook_is_not_made_without_it(kind, tmp_path):
    """A file cannot hold a function: `load` without modules would give a pair that computes something else."""
    model, guide = bernoulli(mlp()), make()[1]
    net = model.likelihood.decoder_net
    if kind == "forward":
        net.forward = lambda z: z.new_zeros(len(z), 12)
    elif kind == "hook":
        net.register_forward_hook(lambda module, inputs, output: 3 * output)
    else:
        net.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))
    pv.save(tmp_path / "a.pt", model, guide)
    with pytest.raises(ValueError, match="MLP has a hook or a forward of its own.*give them"):
        pv.load(tmp_path / "a.pt")


def test_functions_of_functions_take_no_time():
    """Each function is told once, however many ways lead to it."""

    def first(x):
        return x

    functions = [first]
    for _ in range(40):
        one, other = functions[-1], functions[-1]
        functions.append(lambda x, one=one, other=other: one(x) + other(x))
    assert len(describe_callable(functions[-1])) < 10_000
