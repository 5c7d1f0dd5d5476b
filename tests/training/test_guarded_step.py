"""Steps of a fused Adam by its kernels alone: bit for bit those of `torch.optim`, and whatever `step` does besides is done."""

import importlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pyrovae.training.guarded_step import step_unless_skipped

MADE = [True, True, False, True, False, True]

Adam, AdamW = (partial(kind, lr=0.05, fused=True) for kind in (torch.optim.Adam, torch.optim.AdamW))
# name -> (optimizer of these parameters, whether the kernels are enough from the second step on)
OPTIMIZERS = {
    "Adam": (Adam, True),
    "Adam with weight decay": (partial(Adam, weight_decay=0.1), True),
    "Adam with decoupled decay": (partial(Adam, weight_decay=0.1, decoupled_weight_decay=True), True),
    "AdamW": (partial(AdamW, weight_decay=0.1), True),
    "maximize": (partial(AdamW, maximize=True, betas=(0.5, 0.7), eps=1e-3), True),
    "two groups": (
        lambda given: Adam([{"params": given[:1]}, {"params": given[1:], "lr": 0.2, "betas": (0.3, 0.4)}]),
        True,
    ),
    "amsgrad": (partial(Adam, amsgrad=True), False),
    "a rate that is a tensor": (lambda given: Adam(given, lr=torch.tensor(0.05)), False),
    "capturable": (partial(Adam, capturable=True), True),
}


def make(factory, dtypes=(torch.float32, torch.float32, torch.float32)):
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape, dtype in zip(((3, 2), (4,), ()), dtypes, strict=True)
    ]
    return parameters, factory(parameters)


def train(parameters, optimizer, step, missing=()):
    generator = torch.Generator().manual_seed(1)
    for number, is_made in enumerate(MADE):
        for place, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = None if (number, place) in missing else gradient
        step(optimizer, torch.tensor(is_made))
    state = optimizer.state_dict()["state"]
    return [*parameters, *(tensor for of in state.values() for tensor in of.values())]


def by_torch(optimizer, is_made):
    optimizer.found_inf = (~is_made).float()
    optimizer.step()


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def num_steps(monkeypatch):
    """How often torch's own step of a group ran."""
    module = importlib.import_module("torch.optim.adam")
    calls, inner = [], module.adam
    monkeypatch.setattr(module, "adam", lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1])
    return lambda: len(calls)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_numbers_are_those_of_torch(name, num_steps):
    factory, is_enough = OPTIMIZERS[name]
    expected = train(*make(factory), by_torch)
    before = num_steps()
    parameters, optimizer = make(factory)
    same(train(parameters, optimizer, step_unless_skipped), expected)
    assert num_steps() - before == (1 if is_enough else len(MADE)) * len(optimizer.param_groups)
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("missing", [[(1, 0), (3, 2)], [(0, 1), (1, 1)], [(2, 0), (2, 1), (2, 2)]])
def test_missing_gradients(missing):
    """A parameter without a gradient stays as it is, and one whose first gradient comes late gets its state then."""
    expected = train(*make(Adam), by_torch, missing)
    same(train(*make(Adam), step_unless_skipped, missing), expected)


def test_parameters_of_two_dtypes():
    dtypes = (torch.float32, torch.float64, torch.float32)
    same(train(*make(Adam, dtypes), step_unless_skipped), train(*make(Adam, dtypes), by_torch))


@pytest.mark.parametrize("of", ["optimizer", "all optimizers", "after the step", "step of the instance"])
def test_hooks_are_called(of):
    """A hook that clips the gradients at 0, or doubles the parameters afterwards."""

    def clip(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.clamp_(min=0)

    def double(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(2)

    ends = []
    for step in (by_torch, step_unless_skipped):
        parameters, optimizer = make(Adam)
        handle = None
        if of == "optimizer":
            optimizer.register_step_pre_hook(clip)
        elif of == "all optimizers":
            handle = register_optimizer_step_pre_hook(clip)
        elif of == "after the step":
            optimizer.register_step_post_hook(double)
        else:
            inner = optimizer.step
            optimizer.step = lambda inner=inner, optimizer=optimizer: (inner(), double(optimizer))
        try:
            ends.append(train(parameters, optimizer, step))
        finally:
            if handle is not None:
                handle.remove()
    same(*ends)
    assert not torch.equal(ends[0][0], train(*make(Adam), by_torch)[0])


def test_a_rate_changed_between_steps():
    def falling(step):
        def run(optimizer, is_made):
            optimizer.param_groups[0]["lr"] *= 0.5
            step(optimizer, is_made)

        return run

    same(train(*make(Adam), falling(step_unless_skipped)), train(*make(Adam), falling(by_torch)))


def test_state_restored_from_a_file():
    ends = []
    for step in (by_torch, step_unless_skipped):
        _, first = make(Adam)
        train(first.param_groups[0]["params"], first, by_torch)
        parameters, optimizer = make(Adam)
        optimizer.load_state_dict(first.state_dict())
        ends.append(train(parameters, optimizer, step))
    same(*ends)


def test_nothing_is_left_on_the_optimizer():
    """After a skipped first step, the owner's own call of `step` is a step again."""
    parameters, optimizer = make(Adam)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    step_unless_skipped(optimizer, torch.tensor(False))
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((parameter != old).all() for parameter, old in zip(parameters, before, strict=True))


def test_a_scale_of_gradients_is_applied():
    """As torch's scaler of mixed precision leaves it on the optimizer."""
    ends = []
    for step in (by_torch, step_unless_skipped):
        parameters, optimizer = make(partial(Adam, eps=1.0))  # so that the size of a gradient matters
        optimizer.grad_scale = torch.tensor(4.0)
        ends.append(train(parameters, optimizer, step))
    same(*ends)
    assert not torch.equal(ends[0][0], train(*make(partial(Adam, eps=1.0)), by_torch)[0])


def test_the_optimizer_s_own_zero_grad_is_called():
    class Counting(torch.optim.SGD):
        calls = 0

        def zero_grad(self, set_to_none=True):
            type(self).calls += 1
            super().zero_grad(set_to_none)

    train(*make(partial(Counting, lr=0.1)), step_unless_skipped)
    assert Counting.calls == len(MADE)
