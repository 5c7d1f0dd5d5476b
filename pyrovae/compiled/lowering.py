"""Replaces operations of a recording by equal ones that Inductor's loops run faster on a CPU.

- log(1 + x) is computed by the logarithm, and softplus by a polynomial: in a softplus network, the compiled `log1p`
  takes longer than everything else except the matrix products.
- A product plus a bias becomes a product and a sum, which Inductor computes in the loop that follows. `addmm` first
  copies the bias to every row, which takes a tenth of the time of an evaluation.
- Inductor tests one number after the other if it is NaN, and compares 16 at once.
- The products of `BinaryImages` are computed in one loop, in place of a few passes over memory.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

__all__ = ["lowered"]

# log(1 + y) / y for y in [0, 1], lowest power first: the polynomial of degree 9 that equals it at the Chebyshev nodes.
# It is off by 5e-9 of its value, less than float32 rounds.
_LOG1P = (
    0.999999994656,
    -0.499998926481,
    0.333297104993,
    -0.249516162657,
    0.196632742694,
    -0.152696671045,
    0.105436238395,
    -0.0563736132096,
    0.0195425274378,
    -0.00317605705277,
)


def lowered(recording: GraphModule) -> GraphModule:
    """Return the recording with these operations replaced, also inside others; it computes the same up to rounding.

    Only these operations are traced again, on tensors of any values. Tensors that the recording holds are shared.

    Args:
        recording: What `make_fx` returned.
    """
    aten = torch.ops.aten
    table: dict[Any, Callable] = {
        **torch._decomp.get_decompositions([aten.binary_cross_entropy_with_logits, aten.log_sigmoid_forward]),
        aten.log1p.default: _log1p,
        aten.softplus.default: _softplus,
        aten.isnan.default: _isnan,
    }
    copied = Graph()
    copies: dict[Node, Any] = {}
    for node in recording.graph.nodes:
        if node.target is aten.addmm.default and _adds_a_bias(node):
            bias, *factors = (copies[tensor] for tensor in node.args)
            product = copied.call_function(aten.mm.default, tuple(factors))
            negative = copied.call_function(aten.neg.default, (bias,))
            # A difference, because Inductor turns a sum into addmm again.
            copies[node] = copied.call_function(aten.sub.Tensor, (product, negative))
        elif node.target is aten.reciprocal.default and (logits := _logits_of_products(node)) is not None:
            # The operations that this replaces stay in the graph, and Inductor removes them.
            copies[node] = _traced(copied, partial(_products, num=node.meta["val"].shape[-1]), [logits], copies, table)
        elif node.target in table:
            copies[node] = _traced(copied, partial(_called, node), node.all_input_nodes, copies, table)
        elif node.target is operator.getitem and isinstance(copies[node.args[0]], tuple):  # an output of such a node
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = copied.node_copy(node, copies.__getitem__)
    copied.set_codegen(recording.graph._codegen)
    return GraphModule(recording, copied)


def _adds_a_bias(node: Node) -> bool:
    """Whether an `addmm` is the sum of a product of float32 matrices on a CPU and a vector."""
    bias: Any = node.args[0]
    value = bias.meta["val"]
    return value.ndim == 1 and value.dtype == torch.float32 and value.device.type == "cpu" and not node.kwargs


def _logits_of_products(inverted: Node) -> Node | None:
    """Return l if a node computes 1 / prod 1 / (1 + exp(-|l|)) over all but the last part of the last dimension.

    The operations must follow each other, so that no other one changes l or a result in between.
    """
    aten = torch.ops.aten
    node = _previous(inverted)
    while node is not None and node.target is aten.prod.dim_int:
        split: Any = _previous(node)
        ndim = len(node.meta["val"].shape) + 1
        if split is None or split.target is not aten.view.default or node.args[1:] not in ((-2,), (ndim - 2,)):
            return None
        node = _previous(split)
        if node is None or split.meta["val"].shape[:-2] != node.meta["val"].shape[:-1]:
            return None
    if node is None or node.target is not aten.sigmoid_.default:
        return None
    node = _previous(node)
    return None if node is None or node.target is not aten.abs.default else node.all_input_nodes[0]


def _previous(node: Node) -> Node | None:
    """Return the node before, if this node's first argument is its result."""
    return node.prev if node.prev is node.args[0] else None


def _products(logits: torch.Tensor, num: int) -> torch.Tensor:
    return (1 + (-logits.abs()).exp()).unflatten(-1, (-1, num)).prod(-2)


def _called(node: Node, *tensors: torch.Tensor) -> Any:
    """Return what a node computes from the values of its inputs."""
    given = dict(zip(node.all_input_nodes, tensors, strict=True))
    args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
    operation: Any = node.target
    return operation(*args, **kwargs)


def _traced(
    graph: Graph, function: Callable, inputs: list[Node], copies: dict[Node, Any], table: dict[Any, Callable]
) -> Any:
    """Append what a function computes to a graph, by the operations of the table; return the nodes of the result."""
    from torch.fx.experimental.proxy_tensor import make_fx  # takes a second to import

    values = (tensor.meta["val"] for tensor in inputs)
    examples = [torch.empty_strided(of.shape, of.stride(), dtype=of.dtype, device=of.device) for of in values]
    inner = make_fx(function, table)(*examples)
    found = dict(zip(inner.graph.find_nodes(op="placeholder"), (copies[tensor] for tensor in inputs), strict=True))
    return graph.graph_copy(inner.graph, found)


def _log1p(x: torch.Tensor) -> torch.Tensor:
    if not x.is_floating_point():
        return NotImplemented
    # With u = 1 + x rounded, log(u) and u - 1, which is exact, are off by nearly the same factor: log(u) x / (u - 1) is right.
    rounded = 1 + x
    corrected = rounded.log() * (x / (rounded - 1))
    return torch.where((rounded == 1) | (x == torch.inf), x, corrected)


def _isnan(x: torch.Tensor) -> torch.Tensor:
    return x != x


def _softplus(x: torch.Tensor, beta: float = 1, threshold: float = 20) -> torch.Tensor:
    scaled = x * beta
    y = (-scaled.abs()).exp()
    if x.dtype == torch.float64:
        log1p = _log1p(y)
    else:  # half the time of a logarithm
        log1p = torch.full_like(y, _LOG1P[-1])
        for coefficient in reversed(_LOG1P[:-1]):
            log1p = log1p * y + coefficient
        log1p = log1p * y
    return torch.where(scaled > threshold, x, (scaled.clamp_min(0) + log1p) / beta)
