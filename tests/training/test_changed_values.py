"""Python values behind the programs that a callback or a schedule changes: compiled steps use the new ones, as eager steps do."""

import argparse
import sys
import types
import warnings
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from shared.runs import binary, make
from torch import nn

import pyrovae as pv
from pyrovae.training.acceleration import RecordedStep

X = torch.linspace(-2, 2, 60)[:, None]
WAYS = {}


def way(cls):
    WAYS[cls.__name__] = cls
    return cls


class Scaled(nn.Module):
    """N(z, scale^2) with a scale that is held in one of several ways."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def model(self, x):
        pyro.module("scaled", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + self.shift, self.get()), obs=x[:, 0])

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] / 2, 1.0))


@way
class Attribute(Scaled):
    scale = 1.0

    def get(self):
        return self.scale

    def set(self, value):
        self.scale = value


@way
class ClassAttribute(Attribute):
    def set(self, value):
        type(self).scale = value


class Base(Scaled):
    scale = 1.0

    def get(self):
        return self.scale


@way
class AttributeOfABaseClass(Base):
    def set(self, value):
        Base.scale = value


def noise():
    return noise.scale


@way
class AttributeOfAFunction(Scaled):
    def get(self):
        return noise()

    def set(self, value):
        noise.scale = value


@way
class Item(Scaled):
    def __init__(self):
        super().__init__()
        self.options = {"noise": [1.0]}

    def get(self):
        return self.options["noise"][0]

    def set(self, value):
        self.options["noise"][0] = value


@way
class Closure(Scaled):
    def __init__(self):
        super().__init__()
        scale = 1.0

        def get():
            return scale

        def change(value):
            nonlocal scale
            scale = value

        self.get, self.set = get, change


ARRAY = np.ones(1)
OTHER = types.ModuleType("settings_of_a_user")
SCALE = 1.0


@way
class ArrayInPlace(Scaled):
    def get(self):
        return float(ARRAY[0])

    def set(self, value):
        ARRAY[0] = value


@way
class ModuleVariable(Scaled):
    def get(self):
        return OTHER.scale

    def set(self, value):
        OTHER.scale = value


@way
class Global(Scaled):
    def get(self):
        return SCALE

    def set(self, value):
        global SCALE
        SCALE = value


@way
class Function(Scaled):
    def set(self, value):
        self.get = (lambda: 1.0) if value == 1.0 else (lambda: 3.0)


def constant(value):
    return lambda: value


@way
class FunctionWithTheSameCode(Scaled):
    def set(self, value):
        self.get = constant(value)


@way
class FunctionWithAnotherDefault(Scaled):
    def set(self, value):
        self.get = lambda scale=value: scale


@way
class MethodOfAnotherObject(Scaled):
    def set(self, value):
        self.get = Fixed(value).get


class Fixed:
    def __init__(self, value):
        self.value = value

    def get(self):
        return self.value


@dataclass(frozen=True)
class Settings:
    scale: float = field(compare=False)


@way
class EqualButNotTheSame(Scaled):
    """`==` says that the objects are equal."""

    def set(self, value):
        self.settings = Settings(value)

    def get(self):
        return self.settings.scale


class AttributeDict(dict):
    __getattr__ = dict.__getitem__


@way
class ItemAsAttribute(Scaled):
    def __init__(self):
        super().__init__()
        self.options = AttributeDict(scale=1.0)

    def get(self):
        return self.options.scale

    def set(self, value):
        self.options["scale"] = value


@way
class BuiltIn(Scaled):
    def set(self, value):
        self.function = torch.ones_like if value == 1.0 else torch.exp

    def get(self):
        return self.function(torch.ones(()))


@way
class OfAClass(Scaled):
    def set(self, value):
        self.kind = type("Kind", (), {"scale": value})

    def get(self):
        return self.kind.scale


@way
class Child(Scaled):
    def set(self, value):
        self.child = nn.Tanh() if value == 1.0 else nn.ReLU()

    def get(self):
        return 1.0 + self.child(torch.tensor(2.0))


@way
class ModuleInAList(Scaled):
    def set(self, value):
        self.held = [nn.Threshold(10.0, value)]

    def get(self):
        return self.held[0](torch.zeros(()))


@way
class OfADistribution(Scaled):
    def set(self, value):
        self.noise = dist.Normal(0.0, value)

    def get(self):
        return self.noise.scale


@way
class OfADistributionInPlace(OfADistribution):
    def __init__(self):
        super().__init__()
        self.noise = dist.Normal(0.0, 1.0)

    def set(self, value):
        self.noise.scale = torch.tensor(value)


@way
class Partial(Scaled):
    def set(self, value):
        self.function = partial(max, value)

    def get(self):
        return self.function(0.5)


@way
class Namespace(Scaled):
    def __init__(self):
        super().__init__()
        self.options = argparse.Namespace(scale=1.0)

    def set(self, value):
        self.options.scale = value

    def get(self):
        return self.options.scale


@way
class SimpleNamespace(Namespace):
    def set(self, value):
        self.options = types.SimpleNamespace(scale=value)


@way
class OfDecimals(Scaled):
    def set(self, value):
        self.scale = Decimal(value)

    def get(self):
        return float(self.scale)


@way
class OfNumPy(OfDecimals):
    def set(self, value):
        self.scale = np.float32(value)


@way
class Hook(Scaled):
    def __init__(self):
        super().__init__()
        self.child = nn.Identity()
        self.handle = None

    def set(self, value):
        if self.handle is not None:
            self.handle.remove()
        self.handle = None if value == 1.0 else self.child.register_forward_hook(lambda *given: value * given[2])

    def get(self):
        return self.child(torch.ones(()))


@way
class HookOfAllModules(Hook):
    def set(self, value):
        if self.handle is not None:
            self.handle.remove()
        self.handle = None
        if value != 1.0:

            def hook(module, _, output):
                return value * output if module is self.child else None

            self.handle = nn.modules.module.register_module_forward_hook(hook)


@way
class ClassOfAModule(Scaled):
    def __init__(self):
        super().__init__()
        self.child = nn.ReLU()

    def set(self, value):
        self.child.__class__ = nn.ReLU if value == 1.0 else nn.Sigmoid

    def get(self):
        return self.child(3 * torch.ones(()))


@way
class AnotherParameter(Scaled):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def set(self, value):
        if value != 1.0:
            self.scale = nn.Parameter(torch.tensor(value))

    def get(self):
        return self.scale


def run(way, change, compile, **more):
    """(elbo, validation_elbo) of each epoch of a training that moves nothing."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    program = WAYS[way]()
    program.set(1.0)
    try:
        result = pv.fit(
            *(program.model, program.guide, X),
            **{"epochs": 5, "batch_size": 20, "optimizer": partial(torch.optim.SGD, lr=1e-30), "progress": False},
            **{"callback": lambda progress: change(program, progress.epoch), "validation": X, "compile": compile},
            **more,
        )
    finally:
        program.set(1.0)
    return [(row["elbo"], row["validation_elbo"]) for row in result.history]


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_changed_value_holds_in_compiled_steps(way, after, uncompiled, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, OTHER.__name__, OTHER)

    def change(program, epoch):
        if epoch == after:
            program.set(3.0)

    expected = run(way, change, compile=False)
    found = run(way, change, compile=True)
    assert abs(expected[-1][0] - expected[0][0]) > 0.1  # the change shows
    assert np.allclose(found, expected, atol=1e-5)
    assert f"has changed before epoch {after + 1}" in caplog.text


CHANGES = {
    "a new bias is trained": lambda layer: setattr(layer, "bias", nn.Parameter(torch.full_like(layer.bias, -1.0))),
    "frozen": lambda layer: layer.requires_grad_(False),
    "a hook on a gradient": lambda layer: layer.bias.register_hook(lambda gradient: 0 * gradient),
    "a hook on a gradient that is added up": lambda layer: layer.bias.register_post_accumulate_grad_hook(
        lambda bias: setattr(bias, "grad", None)
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_callback_does_to_a_layer_holds_in_compiled_steps(name, uncompiled, caplog):
    def fitted(compile):
        pyro.clear_param_store()
        pair = make()
        layer = [module for module in pair[0].modules() if isinstance(module, nn.Linear)][-1]

        def change(progress):
            if progress.epoch == 3:
                CHANGES[name](layer)

        pyro.set_rng_seed(1)
        result = pv.fit(
            *(*pair, binary(60)),
            **{"epochs": 6, "batch_size": 20, "learning_rate": 0.05, "compile": compile, "progress": False},
            callback=change,
        )
        return [row["elbo"] for row in result.history], [p.detach() for program in pair for p in program.parameters()]

    (found, trained), (expected, parameters) = fitted(True), fitted(False)
    assert np.allclose(found, expected, atol=1e-5)
    assert all(torch.allclose(*two, atol=1e-5) for two in zip(trained, parameters, strict=True))
    assert "has changed before epoch 4" in caplog.text


@pytest.mark.parametrize("way", ["Attribute", "Closure"])
def test_a_value_that_a_schedule_changes_holds_too(way, uncompiled, monkeypatch, caplog):
    """It changes within the first epoch, which is eager."""
    programs = []
    make_way = WAYS[way]
    monkeypatch.setitem(WAYS, way, lambda: programs.append(make_way()) or programs[-1])

    def schedule(done):
        programs[-1].set(1.0 + done)
        return 1.0

    expected = run(way, lambda *_: None, compile=False, schedule=schedule)
    found = run(way, lambda *_: None, compile=True, schedule=schedule)
    assert np.allclose(found, expected, atol=1e-5)
    assert "has changed before epoch 2" in caplog.text


def test_a_value_that_changes_within_a_later_epoch_is_told(uncompiled, monkeypatch):
    programs = []
    monkeypatch.setitem(WAYS, "Attribute", lambda: programs.append(Attribute()) or programs[-1])

    def schedule(done):
        programs[-1].set(1.0 + (done > 0.7))
        return 1.0

    with pytest.warns(UserWarning, match="'scale' changed in the middle of epoch 4"):
        found = run("Attribute", lambda *_: None, compile=True, schedule=schedule)
    expected = run("Attribute", lambda *_: None, compile=False, schedule=schedule)
    assert found[4] == pytest.approx(expected[4], abs=1e-5)  # the next epoch is right


def test_lazy_attributes_of_a_distribution_keep_the_recording(uncompiled, caplog):
    """`Categorical` computes its probabilities at their first use, here by the callback."""
    noise = dist.Categorical(logits=torch.zeros(3))

    class Shifted(Attribute):
        def __init__(self):
            super().__init__()
            self.noise = noise

        def get(self):
            return self.noise.logits.exp().sum()

        def set(self, value):
            pass

    pyro.clear_param_store()
    program = Shifted()
    options = {"epochs": 4, "batch_size": 20, "optimizer": partial(torch.optim.SGD, lr=1e-30), "progress": False}

    def draw(progress):
        noise.sample()

    pv.fit(program.model, program.guide, X, callback=draw, compile=True, **options)
    assert "changed" not in caplog.text
    assert "probs" in vars(noise)


OBJECTIVES = {
    "default": lambda: None,
    "IWAE": lambda: pv.objectives.ImportanceWeighted(3),
    "analytic": lambda: pv.objectives.AnalyticKL(kl_warmup_steps=5),
    "STL": pv.objectives.StickingTheLanding,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_callbacks_usually_do_keeps_the_recording(name, uncompiled, monkeypatch, tmp_path, caplog):
    """Evaluations, samples and files leave the programs as they are."""
    calls, call = [], RecordedStep.__call__
    monkeypatch.setattr(RecordedStep, "__call__", lambda *args: (calls.append(1), call(*args))[1])

    def look(progress):
        model, guide = progress.model, progress.guide
        pv.log_marginal_likelihood(model, guide, binary(10), num_particles=10)
        pv.latent_use(model, guide, binary(10), num_draws=2)
        pv.uses.embed(guide, binary(3)), model.generate(2)
        pv.save(tmp_path / "pair.pt", model, guide)

    pair = make()
    options = {"epochs": 4, "batch_size": 15, "loss": OBJECTIVES[name](), "average": 0.9, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pv.fit(*pair, binary(60), callback=look, validation=binary(10), compile=True, **options)
    assert len(calls) == 3 * 4
    assert "changed" not in caplog.text
