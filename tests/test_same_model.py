"""A checkpoint goes into the model that it is of: one that computes anything else from the same tensors is refused."""

import contextlib
import functools
import math

import pyro
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import DECODERS, ENCODERS, GUIDES, LIKELIHOODS, PRIORS, SHAPE
from pyro.infer.autoguide import AutoNormal
from test_training import make
from torch import nn

import pyrovae as pv
from pyrovae.training.checkpoint_file import read, write
from pyrovae.training.description import describe_module, difference


def mlp(activation=nn.SiLU, **options):
    return pv.nets.MLP(2, [4], 12, activation=activation, **options)


def model_of(likelihood):
    return pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood)


def bernoulli(net):
    return model_of(pv.likelihoods.Bernoulli(net, SHAPE))


class Net(nn.Module):
    """A user's own network: each argument decides what it computes, and none the shape of a parameter."""

    def __init__(
        self, scale=1.0, activation=torch.tanh, shift=None, mode="sum", steps_done=0, num_data=10, device="cpu"
    ):
        super().__init__()
        self.linear = nn.Linear(2, 12)
        self.gain = 2 * scale
        self.activation = activation
        self.shift = torch.zeros(12) if shift is None else shift
        self.mode = mode
        self.steps_done = steps_done
        self.num_data = num_data
        self.device = device
        self.seen = []

    def forward(self, z):
        self.steps_done += 1
        self.seen.append(len(z))
        return self.gain * self.activation(self.linear(z)) + self.shift


class Noisy(Net):
    """The same under another name."""


def power(x, exponent=1.0):
    return x.abs() ** exponent


def with_unsaved(value):
    net = nn.Sequential(nn.Linear(2, 12))
    net.register_buffer("unsaved", torch.tensor(value), persistent=False)
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
