"""`fit` with optimizers other than its own: the same numbers as by hand, resumed bit for bit, and what is refused."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from shared.runs import Killed, binary, killed_after, make, parameters, same
from torch import nn

import pyrovae as pv
from pyrovae.compiled.record import Recording
from pyrovae.training.optimization import OneOptimizer
from pyrovae.training.optimizer_factory import optimizer_factory

OPTIONS = {"epochs": 4, "batch_size": 15, "compile": False, "progress": False}


class NormalisedAdam(torch.optim.Adam):
    """A hand-written optimizer: gradients divided, tensor by tensor, by their norm, and a counter of its own."""

    calls = 0

    @torch.no_grad()
    def step(self, closure=None):
        type(self).calls += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = parameter.grad / (parameter.grad.norm() + 1e-7)
        return super().step()


OPTIMIZERS = {
    "Adam": partial(torch.optim.Adam, lr=0.02, amsgrad=True),
    "fused Adam": partial(torch.optim.Adam, lr=0.02, fused=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "fused AdamW": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1, fused=True),
    "SGD": partial(torch.optim.SGD, lr=0.002, momentum=0.9, nesterov=True),
    "fused SGD": partial(torch.optim.SGD, lr=0.002, momentum=0.9, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.005, momentum=0.5, centered=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "RAdam": partial(torch.optim.RAdam, lr=0.01),
    "Adamax": partial(torch.optim.Adamax, lr=0.01),
    "Rprop": partial(torch.optim.Rprop, lr=0.001),
    "hand-written": partial(NormalisedAdam, lr=0.01),
    "pyro": pyro.optim.RMSprop({"lr": 0.005, "alpha": 0.9}),
    "pyro by name": pyro.optim.SGD(lambda name: {"lr": 0.001 if "decoder" in name else 0.003, "momentum": 0.5}),
    "clipped": pyro.optim.ClippedAdam({"lr": 0.01, "clip_norm": 0.5}),
}


def run(optimizer, seed=0, **more):
    pair = make(seed)
    pyro.set_rng_seed(5)
    result = pv.fit(*pair, binary(), **{**OPTIONS, "optimizer": optimizer, **more})
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "data_per_second")} for row in result.history]
    return str(rows), parameters(*pair)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_numbers_are_those_of_a_loop_by_hand(name):
    """One optimizer over all parameters, rates times the schedule's factor, the same noise."""
    given = OPTIMIZERS[name]
    _, found = run(given, schedule=lambda done: 1 - done / 2)

    model, guide = make()
    every = [*model.parameters(), *guide.parameters()]
    if name == "pyro by name":
        decoder = [parameter for name, parameter in model.named_parameters() if "decoder" in name]
        others = [parameter for parameter in every if not any(parameter is other for other in decoder)]
        optimizer = torch.optim.SGD([{"params": decoder, "lr": 0.001}, {"params": others, "lr": 0.003}], momentum=0.5)
    elif isinstance(given, pyro.optim.PyroOptim):
        optimizer = given.pt_optim_constructor(every, **given.pt_optim_args)
    else:
        optimizer = given(every)
    rates = [group["lr"] for group in optimizer.param_groups]
    pyro.set_rng_seed(5)
    for epoch in range(4):
        for step, index in enumerate(torch.randperm(40).split(15)):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - (epoch + (step + 0.5) / 3) / 4 / 2)
            optimizer.zero_grad()
            Trace_ELBO().loss_and_grads(model, guide, binary()[index])
            optimizer.step()
    for here, there in zip(found, parameters(model, guide), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-7)
    assert not same(found, parameters(*make()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_bit_for_bit_and_recorded_with_the_same_numbers(name, tmp_path, monkeypatch):
    expected = run(OPTIMIZERS[name])
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(Killed):
            run(OPTIMIZERS[name], checkpoint=tmp_path / "run.pt", checkpoint_every=0)
    found = run(OPTIMIZERS[name], 7, checkpoint=tmp_path / "run.pt", resume=True)
    assert found[0] == expected[0]
    assert same(found[1], expected[1])
    monkeypatch.setattr(Recording, "compiler", staticmethod(lambda graph: graph))
    for recorded, eager in zip(run(OPTIMIZERS[name], compile=True)[1], expected[1], strict=True):
        torch.testing.assert_close(recorded, eager, rtol=1e-4, atol=1e-5)


def test_a_factory_of_the_default_is_the_default():
    a, b = run(partial(torch.optim.Adam, lr=1e-3, fused=True)), run(None)
    assert a[0] == b[0]
    assert same(a[1], b[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_leaves_parameters_and_state_untouched(name, accumulate):
    """Three steps of which the second is not finite are two steps, whatever the optimizer keeps."""
    ends = []
    for gradients in ([1.0, float("nan"), 2.0], [1.0, 2.0]):
        weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        other = nn.Parameter(torch.tensor([[0.5]]))
        given = OPTIMIZERS[name]
        if name == "pyro by name":
            given = pyro.optim.SGD({"lr": 0.001, "momentum": 0.5})
        factory = optimizer_factory(given, {weight: "weight", other: "other"}, is_scheduled=True)
        optimizer = OneOptimizer([weight, other], factory=factory, max_skipped=1, accumulate=accumulate, average=0.5)
        made = []
        for size in gradients:
            for _ in range(accumulate):
                weight.grad, other.grad = torch.tensor([size, 0.5]), torch.tensor([[size]])
                optimizer([weight, other])
                optimizer.guard.restart()
            optimizer.make_step()
            made.append(optimizer.has_moved)
        assert all(made)
        state = optimizer.inner.state_dict()["state"]
        kept = {key: torch.as_tensor(value) for of in state.values() for key, value in of.items() if value is not None}
        ends.append(
            (weight.detach().clone(), other.detach().clone(), *optimizer.average.values.values(), *kept.values())
        )
    assert same(*ends)


def test_a_first_step_that_is_skipped_makes_no_state():
    weight = nn.Parameter(torch.ones(2))
    for given in (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    ):
        optimizer = OneOptimizer([weight], factory=optimizer_factory(given, {weight: "weight"}, False), max_skipped=3)
        weight.grad = torch.full((2,), torch.inf)
        optimizer([weight])
        assert not optimizer.has_moved
        assert not optimizer.inner.state
        assert torch.equal(weight, torch.ones(2))


def test_skipped_steps_of_a_run():
    """A datum that is NaN, once in each epoch: named when it stops the run, or skipped and counted."""
    x = binary()
    x[3] = float("nan")
    with pytest.raises(pv.training.non_finite.NotFiniteError, match=r"train\[3\]"):
        pv.fit(*make(), x, optimizer=OPTIMIZERS["SGD"], **OPTIONS)
    result = pv.fit(*make(), x, optimizer=OPTIMIZERS["RMSprop"], max_skipped_steps=4, **OPTIONS)
    assert result.num_skipped_steps == 4
    assert all(row["skipped_steps"] == 1 for row in result.history)


def two_groups(model, rates=(0.01, 0.0)):
    def factory(parameters):
        ours = set(model.parameters())
        groups = [[p for p in parameters if p in ours], [p for p in parameters if p not in ours]]
        return torch.optim.AdamW([{"params": of, "lr": rate} for of, rate in zip(groups, rates, strict=True)])

    return factory


def test_two_groups_keep_their_rates():
    model, guide = make()
    before = parameters(guide)
    seen = []
    result = pv.fit(
        *(model, guide, binary()),
        optimizer=two_groups(model),
        schedule=lambda done: 0.5,
        callback=lambda progress: seen.append([group["lr"] for group in progress.optimizer.param_groups]),
        **OPTIONS,
    )
    assert same(parameters(guide), before)
    assert not same(parameters(model), parameters(make()[0]))
    assert seen == [[0.005, 0.0]] * 4
    assert result.history[-1]["learning_rate"] == 0.005


def test_parameters_that_join_late_get_the_groups_and_state_of_the_factory(tmp_path, monkeypatch):
    """A parameter that a program makes in its second epoch; Adagrad keeps state from its constructor on."""
    x = torch.randn(30) + 2

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = nn.Buffer(torch.zeros(()))

        def forward(self, x):
            self.calls += self.training
            loc = pyro.param("late_loc", torch.tensor(0.0))
            if self.calls > 4:
                loc = loc + pyro.param("late_shift", torch.tensor(0.1))
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + pyro.param("late_guide", torch.tensor(0.0)), 0.7))

    def train(has_joined=False, **more):
        pyro.clear_param_store()
        if has_joined:  # a resume needs the parameters of the file in Pyro's store
            pyro.param("late_shift", torch.tensor(7.0))
        pyro.set_rng_seed(2)
        options = {
            "optimizer": partial(torch.optim.Adagrad, lr=0.1),
            "average": 0.8,
            "compile": False,
            "progress": False,
        }
        pv.fit(Late(), guide, x, epochs=6, batch_size=10, **options, **more)
        return [pyro.param(f"late_{name}").item() for name in ("loc", "shift", "guide")]

    expected = train()
    assert expected[1] != pytest.approx(0.1, abs=1e-3)
    for stop in (1, 3):
        path = tmp_path / f"{stop}.pt"
        with monkeypatch.context() as patch:
            killed_after(patch, stop)
            with pytest.raises(Killed):
                train(checkpoint=path, checkpoint_every=0)
        assert train(has_joined=stop > 1, checkpoint=path, resume=True) == expected


def test_a_resume_compares_class_and_settings(tmp_path):
    path = tmp_path / "run.pt"
    run(OPTIMIZERS["AdamW"], checkpoint=path)
    for other, match in (
        (
            partial(torch.optim.AdamW, lr=0.02, weight_decay=0.2),
            r"weight_decay=0\.1.*and this one has .*weight_decay=0\.2",
        ),
        (OPTIMIZERS["SGD"], r"optimizer=AdamW\(lr=0\.02.*and this one has optimizer=SGD\(lr=0\.002, momentum=0\.9"),
        (
            OPTIMIZERS["pyro by name"],
            r"optimizer=AdamW.*this one has optimizer=SGD\(5 tensors: lr=0\.003, .*; 4 tensors: lr=0\.001",
        ),
        (None, r"optimizer=AdamW.*this one has optimizer=fused Adam"),
    ):
        with pytest.raises(ValueError, match=match):
            run(other, checkpoint=path, resume=True)
    for change, match in (({"accumulate": 2}, "accumulate=1"), ({"average": 0.9}, "average=None")):
        with pytest.raises(ValueError, match=match):
            run(OPTIMIZERS["AdamW"], checkpoint=path, resume=True, **change)


@pytest.mark.parametrize(
    ("optimizer", "more", "error", "match"),
    [
        (torch.optim.LBFGS, {}, TypeError, "LBFGS, whose step evaluates the loss several times"),
        (
            pyro.optim.PyroOptim(torch.optim.LBFGS, {}),
            {},
            TypeError,
            "LBFGS, whose step evaluates the loss several times",
        ),
        ("AdamW", {}, TypeError, "makes a torch.optim.Optimizer of a list of parameters.*found 'AdamW'"),
        (lambda parameters: None, {}, TypeError, "made None"),
        (
            partial(torch.optim.AdamW, lr=1.0),
            {"learning_rate": 1e-3},
            ValueError,
            "learning_rate=0.001 beside optimizer=",
        ),
        (
            lambda ps: torch.optim.SGD(ps[:2], lr=0.1),
            {},
            ValueError,
            r"made SGD without \d+ of \d+ parameters \(likelihood\.decoder_net\.\S+, .*, \.\.\.\)",
        ),
        (
            lambda ps: torch.optim.SGD([*ps, nn.Parameter(torch.ones(3))], lr=0.1),
            *({}, ValueError, "made SGD with 1 parameters that it was not given"),
        ),
        (pyro.optim.AdagradRMSProp({}), {}, ValueError, "no lr that a schedule could scale: give schedule=None"),
        (pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9}), {}, ValueError, "lrd, which lowers the rate"),
        (pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}), {}, ValueError, "clip_args.*give fit clip_norm="),
        (
            pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.9}),
            *({}, TypeError, "scheduler would change the rate"),
        ),
    ],
)
def test_what_cannot_be_used_is_refused(optimizer, more, error, match):
    pair = make()
    before = parameters(*pair)
    with pytest.raises(error, match=match):
        pv.fit(*pair, binary(), optimizer=optimizer, **OPTIONS, **more)
    assert same(parameters(*pair), before)


def test_an_optimizer_made_already_is_refused():
    model, guide = make()
    with pytest.raises(
        TypeError, match=r"found a finished SGD: give functools\.partial\(torch\.optim\.SGD, lr=\.\.\.\)"
    ):
        pv.fit(model, guide, binary(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **OPTIONS)


def test_an_optimizer_without_a_rate_trains_with_schedule_none():
    found, moved = run(pyro.optim.AdagradRMSProp({}), schedule=None)
    assert "'learning_rate': nan" in found
    assert not same(moved, parameters(*make()))


def test_svi_by_hand_uses_it():
    model, guide = make()
    every = [*model.parameters(), *guide.parameters()]
    factory = optimizer_factory(partial(torch.optim.SGD, lr=1e-3), dict.fromkeys(every, ""), is_scheduled=False)
    svi = SVI(model, guide, OneOptimizer(every, factory=factory), Trace_ELBO())
    before = parameters(model, guide)
    svi.step(binary())
    assert not same(parameters(model, guide), before)
