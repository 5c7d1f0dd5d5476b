"""What compiled code computes with: its products of matrices, and that torch's settings are put back."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyrovae.compiled import compiler
from pyrovae.compiled.compiler import float32_products
from pyrovae.compiled.record import record


@pytest.mark.slow
def test_a_recording_has_the_values_and_gradients_of_the_program():
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    recorded = record(lambda x: (F.softplus(layer(x)).sum(),), [layer], (x,), gradients=True)
    (value,), gradients = recorded(x)
    expected = F.softplus(layer(x)).sum()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, exact in zip(gradients, torch.autograd.grad(expected, list(layer.parameters())), strict=True):
        assert torch.allclose(found, exact, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("function", [F.softplus, F.logsigmoid, lambda u: u.exp().log1p()])
def test_differences_in_which_logarithms_round_otherwise_are_recorded(function):
    """What is left of two logarithms of nearly the same number is mostly rounding: no sign of a constant."""
    layer, x = nn.Linear(5, 7), torch.randn(300, 5)

    def difference(x):
        u = layer(x)
        return ((function(u) - function(u + 1e-3)).sum(),)

    recorded = record(difference, [layer], (x,), gradients=True)
    assert recorded is not None
    assert recorded(x)[0][0].item() == pytest.approx(difference(x)[0].item(), abs=300 * 7 * 1e-6)


@pytest.mark.parametrize("gradients", [False, True])
def test_images_keep_their_layout_in_a_recording_with_gradients(monkeypatch, gradients):
    """With the channels last, the compiled gradient of a normalisation layer is several times slower."""
    asked = []

    def compile(graph, options, **_):
        asked.append(options["layout_optimization"])
        return graph

    monkeypatch.setattr(torch, "compile", compile)
    net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)), torch.randn(2, 1, 5, 5)
    assert record(lambda x: (net(x).square().sum(),), [net], (x,), gradients=gradients) is not None
    assert asked == [not gradients]


def test_the_second_trace_starts_from_the_same_buffers(uncompiled):
    """The step takes the last entry of a table and moves on: another step from there would fail."""

    class Table(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.register_buffer("weights", torch.arange(1.0, 5.0))
            self.register_buffer("position", torch.tensor([3]))

        def forward(self, x):
            weight = self.weights[self.position]
            self.position.add_(1)
            return super().forward(x) * weight

    net, x = Table(), torch.randn(4, 3)
    recorded = record(lambda x: (net(x).sum(),), [net], (x,))
    assert recorded is not None
    assert recorded(x)[0][0].item() == pytest.approx(4 * nn.Linear.forward(net, x).sum().item(), rel=1e-5)
    assert net.position.item() == 4


def test_products_are_float32_unless_medium_is_asked_for():
    """On every processor: numbers with 13 bits keep them, and sums are as exact as MKL's."""
    numbers = torch.full((256, 256), 1 + 2.0**-12, dtype=torch.float32)
    x, weight = torch.randn(256, 300, dtype=torch.float32), torch.randn(300, 200, dtype=torch.float32)
    with float32_products():
        assert torch.equal(numbers @ torch.eye(256, dtype=torch.float32), numbers)
        found = x @ weight
    error = (found.double() - x.double() @ weight.double()).abs()
    assert (error <= 300 * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs())).all()


@pytest.mark.parametrize("medium", [False, True])
@pytest.mark.parametrize("prefers", [False, True])
def test_the_switches_are_put_back(monkeypatch, medium, prefers):
    monkeypatch.setattr(compiler, "_prefers_onednn", lambda: prefers)
    switches = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]

    def fail_inside():
        with float32_products(medium):
            assert (switches[0].fp32_precision == "bf16") == (medium or prefers)
            assert (switches[1].fp32_precision == "tf32") == medium
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [switch.fp32_precision for switch in switches] == before
    assert torch.get_float32_matmul_precision() == "highest"
