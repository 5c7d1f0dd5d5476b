"""Operations that recordings compute in another way: exact to rounding, also if the result is tiny."""

import pytest
import torch
import torch.nn.functional as F
from pyro.distributions import Bernoulli
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.compiled.lowering import lowered
from pyrovae.distributions.binary import BinaryImages

SMALL = torch.cat([-torch.logspace(-30, -0.001, 400), torch.logspace(-30, 30, 800), torch.tensor([0.0])])
REAL = torch.cat([torch.linspace(-80, 80, 1601), torch.tensor([0.0, 19.999, 20.001])])
FUNCTIONS = {
    "log1p": (torch.log1p, SMALL),
    "softplus": (F.softplus, REAL),
    "softplus with beta": (lambda x: F.softplus(x, beta=2.0, threshold=15.0), REAL),
    "logsigmoid": (F.logsigmoid, REAL),
    "cross entropy of 1": (lambda x: F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none"), REAL),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_those_of_float64_and_gradients_those_of_torch(name, dtype):
    """The error is relative to the result, so that a softplus of 1e-20 must be right, too."""
    function, x = FUNCTIONS[name]
    x = x.to(dtype)

    def both(x):
        x = x.detach().requires_grad_()
        value = function(x)
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    graph = lowered(make_fx(both)(x))
    called = {node.target for node in graph.graph.nodes}
    assert not called & {torch.ops.aten.log1p.default, torch.ops.aten.softplus.default}, "decomposed"
    (found, gradient), (_, expected) = graph(x), both(x)
    exact = function(x.double())
    assert found.dtype == dtype
    tiny = torch.finfo(dtype).tiny
    assert torch.allclose(found.double(), exact, rtol=40 * torch.finfo(dtype).eps, atol=tiny)
    assert torch.allclose(gradient, expected, rtol=4 * torch.finfo(dtype).eps, atol=tiny)


def test_at_the_ends():
    graph = lowered(make_fx(torch.log1p)(torch.zeros(4)))
    found = graph(torch.tensor([-1.0, torch.inf, -2.0, torch.nan]))
    assert found[:2].tolist() == [-torch.inf, torch.inf]
    assert found[2:].isnan().all()


@pytest.mark.parametrize("values", [[1.0, torch.nan, torch.inf], [1, 2, 3], [True, False, True]], ids=str)
def test_nan_is_what_differs_from_itself(values):
    x = torch.tensor(values)
    graph = lowered(make_fx(torch.isnan)(x))
    assert torch.ops.aten.isnan.default not in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(x), x.isnan())


def test_a_bias_is_added_after_the_product_of_float32_on_a_cpu():
    """Then Inductor adds it in the next loop; in bfloat16 the sum would be rounded twice."""
    layer, x = torch.nn.Linear(5, 3), torch.randn(2, 7, 5)
    graph = make_fx(lambda x: layer(x))(x)
    called = {node.target for node in lowered(graph).graph.nodes}
    assert torch.ops.aten.mm.default in called
    assert torch.ops.aten.addmm.default not in called
    torch.testing.assert_close(lowered(graph)(x), layer(x))


@pytest.mark.parametrize(
    ("shape", "dtype", "factors"),
    [
        ((3,), torch.float32, {"beta": 2}),
        ((3,), torch.float32, {"alpha": -1}),
        ((7, 3), torch.float32, {}),
        ((3,), torch.bfloat16, {}),
    ],
)
def test_other_sums_with_products_stay(shape, dtype, factors):
    bias, a, b = (torch.randn(*size).to(dtype) for size in (shape, (7, 5), (5, 3)))
    graph = make_fx(lambda a: torch.addmm(bias, a, b, **factors))(a)
    assert torch.ops.aten.addmm.default in {node.target for node in lowered(graph).graph.nodes}
    assert torch.equal(lowered(graph)(a), torch.addmm(bias, a, b, **factors))


@pytest.mark.parametrize("event_shape", [(1,), (67,), (1, 28, 28), (2, 64), (40,)], ids=str)
@pytest.mark.parametrize("mapped", [False, True], ids=["", "vmap"])
def test_products_of_binary_pixels_are_in_one_loop(double, event_shape, mapped):
    logits, x = 20 * torch.randn(3, 4, *event_shape), (torch.rand(3, 4, *event_shape) < 0.3).double()

    def log_prob(logits, x):
        return BinaryImages(logits, len(event_shape), validate_args=False).log_prob(x)

    graph = lowered(make_fx(torch.vmap(log_prob) if mapped else log_prob)(logits, x))
    called = [node.target for node in graph.graph.nodes if node.users]
    assert torch.ops.aten.reciprocal.default not in called
    assert called.count(torch.ops.aten.exp.default) == 1
    pixels = Bernoulli(logits=logits, validate_args=False).to_event(len(event_shape))
    assert torch.allclose(graph(logits, x), pixels.log_prob(x), rtol=1e-12)


OTHER_INVERSES = {
    "result changed": lambda x: x.abs().sigmoid_().mul_(3).reciprocal(),
    "result changed through a view": lambda x: changed(x.abs().sigmoid_()).reciprocal(),
    "of products over the last dimension": lambda x: x.abs().sigmoid_().unflatten(-1, (2, 3)).prod(-1).reciprocal(),
    "of products over the first dimension": lambda x: x.abs().sigmoid_().unflatten(-1, (2, 3)).prod(0).reciprocal(),
    "of products that keep a dimension": lambda x: (
        x.abs().sigmoid_().unflatten(-1, (2, 3)).prod(-2, keepdim=True).reciprocal()
    ),
    "of another view": lambda x: x.abs().sigmoid_().view(6, 4).prod(0).reciprocal(),
    "without a view": lambda x: x.abs().sigmoid_().prod(-2).reciprocal(),
    "sigmoid of x": lambda x: x.clone().sigmoid_().reciprocal(),
    "of other numbers": lambda x: x.abs().reciprocal(),
}


def changed(y):
    y.view(-1).mul_(3)
    return y


@pytest.mark.parametrize("name", OTHER_INVERSES)
def test_other_inverses_stay(double, name):
    function, x = OTHER_INVERSES[name], torch.randn(4, 6)
    graph = lowered(make_fx(function)(x))
    assert torch.allclose(graph(x), function(x), rtol=1e-12)
    assert torch.ops.aten.exp.default not in {node.target for node in graph.graph.nodes}
