"""Compiled code of this process, found again by its graph: a second `fit` or evaluation need not compile the same again.

The program is recorded and its recording checked anew each time; only the compilation and its check are saved. This is
safe for any program: whatever Python decided (attributes, modes, hooks, replaced modules) shows in the graph, and
compiled code is a function of the graph, the layout of its inputs, and torch's settings. Parameters, buffers and data
are inputs, so none is kept alive.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node
from torch.utils._pytree import tree_leaves

from pyrovae.compiled.signature import kinds

__all__ = ["compiled_once"]

_CAPACITY = 16
_PLAIN = (bool, int, float, complex, str, NoneType, torch.dtype, torch.device, torch.layout, torch.memory_format)

_kept: OrderedDict[Hashable, Callable] = OrderedDict()


def compiled_once(
    graph: torch.fx.GraphModule,
    compiler: Callable[..., Callable],
    groups: Sequence[Sequence[Tensor | None]],
    check: Callable[[Callable], None],
) -> Callable:
    """Return the graph's compiled code: the kept one if there is one for the same graph.

    Args:
        graph: What to compile.
        compiler: Compiles it.
        groups: The lists of its inputs and outputs, whose lengths the nodes of the graph do not tell.
        check: Runs new code and raises an error if it is wrong; then it is not kept.
    """
    key = _key(graph, compiler, groups)
    compiled = None if key is None else _kept.get(key)
    if compiled is None:
        compiled = compiler(graph)
        check(compiled)
    if key is not None:
        _kept[key] = compiled
        _kept.move_to_end(key)
        if len(_kept) > _CAPACITY:
            _kept.popitem(last=False)
    return compiled


def _key(graph: torch.fx.GraphModule, compiler: Callable, groups: Sequence[Sequence[Tensor | None]]) -> Hashable | None:
    """All that the compiled code depends on; None for a graph that holds values or objects of its own."""
    nodes: list[tuple] = []
    for node in graph.graph.nodes:
        held = getattr(graph, node.target, None) if node.op == "get_attr" else None
        if isinstance(held, Tensor) and held.numel() == 0:  # Pyro makes such tensors in each trace; they have no values
            nodes.append((node.name, node.op, type(held), kinds([held])))
            continue
        if node.op not in ("placeholder", "call_function", "output"):
            return None
        if not all(isinstance(leaf, (Node, *_PLAIN)) for leaf in tree_leaves((node.args, dict(node.kwargs)))):
            return None
        # As text, because 1, 1.0 and True are equal, and so are 0.0 and -0.0.
        nodes.append((node.name, node.op, node.target, repr((node.args, dict(node.kwargs)))))
    layouts = tuple(
        tuple(None if tensor is None else (type(tensor), kinds([tensor])) for tensor in group) for group in groups
    )
    return compiler, tuple(nodes), layouts, _settings()


def _settings() -> tuple[Any, ...]:
    from torch._inductor import config  # imports the compiler

    backends: Any = torch.backends
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        backends.mkldnn.matmul.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        config.get_hash(),
    )
