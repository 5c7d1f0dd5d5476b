"""Errors planted in a recording that show in one gradient or one buffer alone: the self-check finds and names them.

They are planted into the graph that `make_fx` records, and into what the compiler makes of a correct graph.
"""

import copy

import pyro
import pytest
import torch
from shared.runs import binary, make, parameters
from torch import nn
from torch.fx.experimental import proxy_tensor

import pyrovae as pv
from pyrovae.compiled.record import Recording, record

aten = torch.ops.aten


class Net(nn.Module):
    """Two layers of one shape, a running mean (0.9 or slower) and a counter."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.first, self.second, self.momentum = nn.Linear(3, 3), nn.Linear(3, 3), momentum
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        h = self.first(x).tanh()
        self.running.mul_(1 - self.momentum).add_(self.momentum * h.detach().mean(0))
        self.count.add_(1)
        return self.second(h + 0.1 * torch.randn_like(h)).square().sum()


def planted(graph, plant, num_outputs=1):
    """The graph with an error: `plant` changes the list of its gradients or returns another, or writes to its buffers."""
    output = graph.graph.output_node()
    outputs, gradients = output.args[0][:num_outputs], list(output.args[0][num_outputs:])
    buffers = [node for node in graph.graph.nodes if node.op == "placeholder"][-2:]
    start = next(node for node in graph.graph.nodes if node.op != "placeholder")

    def before(call, *args, at=start):
        with graph.graph.inserting_before(at):
            return graph.graph.call_function(call, args)

    def at_end(call, *args):
        return before(call, *args, at=output)

    changed = plant(gradients, buffers, before, at_end)
    output.args = ([*outputs, *(changed or gradients)],)
    graph.recompile()
    return graph


def scaled(gradients, buffers, before, at_end):
    gradients[2] = at_end(aten.mul.Tensor, gradients[2], 1.3)


def of_the_other_sign(gradients, buffers, before, at_end):
    gradients[3] = at_end(aten.neg.default, gradients[3])


def zero(gradients, buffers, before, at_end):
    gradients[1] = at_end(aten.mul.Tensor, gradients[1], 0.0)


def not_a_number(gradients, buffers, before, at_end):
    gradients[0] = at_end(aten.mul.Tensor, gradients[0], float("nan"))


def of_another_parameter(gradients, buffers, before, at_end):
    return [gradients[2], *gradients[1:]]


def missing(gradients, buffers, before, at_end):
    return [*gradients[:3], None]


def lost(gradients, buffers, before, at_end):
    """The buffer is put back to what it was."""
    at_end(aten.copy_.default, buffers[0], before(aten.clone.default, buffers[0]))


def changed_twice(gradients, buffers, before, at_end):
    before(aten.add_.Tensor, buffers[0], 0.1)


def not_counted(gradients, buffers, before, at_end):
    at_end(aten.sub_.Tensor, buffers[1], 1)


def correct(gradients, buffers, before, at_end):
    pass


ERRORS = [
    (scaled, "gradient of '0.second.weight'"),
    (of_the_other_sign, "gradient of '0.second.bias'"),
    (zero, "gradient of '0.first.bias'"),
    (not_a_number, "gradient of '0.first.weight'"),
    (of_another_parameter, "gradient of '0.first.weight'"),
    (missing, "gradient of '0.second.bias'"),
    (lost, "'0.running'"),
    (changed_twice, "'0.running'"),
    (not_counted, "'0.count'"),
]


@pytest.fixture(params=["recorded", "compiled"])
def plant_into(request, monkeypatch):
    """Plant an error into what is recorded, or into what is compiled; the list says how often that was done."""

    def plant_into(plant):
        done = []
        if request.param == "recorded":
            original = proxy_tensor.make_fx

            def make_fx(function, *table):
                recorded = original(function, *table)
                if table:  # an operation that is replaced before compiling, not a program
                    return recorded
                return lambda *args: (done.append(1), planted(recorded(*args), plant))[1]

            monkeypatch.setattr(proxy_tensor, "make_fx", make_fx)
            monkeypatch.setattr(Recording, "compiler", staticmethod(lambda graph: graph))
        else:
            compiler = staticmethod(lambda graph: (done.append(1), planted(copy.deepcopy(graph), plant))[1])
            monkeypatch.setattr(Recording, "compiler", compiler)
        return done

    return plant_into


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("plant", "where"), ERRORS)
def test_an_error_in_one_gradient_or_buffer_alone_is_found(caplog, plant_into, plant, where, dtype):
    net, x, done = Net().to(dtype), torch.randn(20, 3, dtype=dtype), plant_into(plant)
    assert record(lambda x: (net(x),), [net], (x,), gradients=True) is None
    assert done
    assert "runs eagerly" in caplog.text
    assert where in caplog.text


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_graph_without_an_error_is_recorded(caplog, plant_into, dtype, gradients):
    net, x, done = Net().to(dtype), torch.randn(20, 3, dtype=dtype), plant_into(correct)
    assert record(lambda x: (net(x),), [net], (x,), gradients=gradients) is not None
    assert done
    assert not caplog.records


@pytest.mark.parametrize("momentum", [1e-2, 1e-3, 1e-4])
def test_a_slow_running_mean_is_not_lost(caplog, plant_into, momentum):
    """One step changes it by less than the rounding that a compiled output may have."""
    net, x = Net(momentum), torch.randn(20, 3)
    plant_into(lost)
    assert record(lambda x: (net(x),), [net], (x,), gradients=True) is None
    assert "'0.running'" in caplog.text


@pytest.mark.parametrize(("size", "found"), [(1e-15, False), (1e-14, True)], ids=["within rounding", "beyond rounding"])
def test_the_tolerance_of_a_recording_is_sixteen_roundings(caplog, monkeypatch, double, size, found):
    """float64: 16 eps = 3.6e-15 of the largest number of a gradient."""

    def slightly(gradients, buffers, before, at_end):
        gradients[2] = at_end(aten.mul.Tensor, gradients[2], 1 + size)

    original = proxy_tensor.make_fx
    monkeypatch.setattr(
        proxy_tensor, "make_fx", lambda *given: lambda *args: planted(original(*given)(*args), slightly)
    )
    net = Net()
    recorded = record(lambda x: (net(x),), [net], (torch.randn(20, 3),), gradients=True, inductor=False)
    assert (recorded is None) == found


@pytest.mark.parametrize("plant", [scaled, of_the_other_sign, zero])
def test_training_takes_the_eager_steps_if_the_compiler_errs(caplog, monkeypatch, plant):
    """With a wrong gradient the run would end at other parameters; it ends at the eager ones, bit for bit."""
    ends = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        model, guide = make()
        compiler = staticmethod(lambda graph: planted(copy.deepcopy(graph), plant, num_outputs=3))
        monkeypatch.setattr(Recording, "compiler", compiler)
        pv.fit(model, guide, binary(), epochs=3, batch_size=20, compile=compile, progress=False)
        ends.append(parameters(model, guide))
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    assert "compiled, the recording gives other numbers than the program (gradient of " in caplog.text
