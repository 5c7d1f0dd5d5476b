"""Find where the numbers of a step stop being finite: the site, the program, the data."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyrovae.data.forms import Batch
from pyrovae.programs.supports import innermost
from pyrovae.programs.traces import Program
from pyrovae.training.losses import differentiable, pyro_checks

__all__ = ["NonFiniteSource", "find_non_finite", "leaves_of"]

_ROWS, _SHOWN = 512, 8  # rows whose gradients are checked singly; indices in a message


class NonFiniteSource(NamedTuple):
    """Where the numbers of a step stopped being finite.

    Attributes:
        site: name of the site, or None.
        what: a clause that says what is wrong.
        rows: which data of the batch, None if unknown.
        is_data: whether the data themselves are the cause.
    """

    site: str | None
    what: str
    rows: Tensor | None
    is_data: bool = False

    def at(self, index: Tensor, name: str) -> tuple[str, Tensor]:
        """Return (the data in words, their positions) for a batch at positions `index` of the data called `name`."""
        known = self.rows is not None and 0 < len(self.rows) < len(index)
        index = index[self.rows] if known else index
        shown = ", ".join(map(str, index[:_SHOWN].tolist())) + (", ..." if len(index) > _SHOWN else "")
        return (
            f"{name}[{shown}] ({f'{len(index)} of the batch' if known else f'the batch, of {len(index)}'})",
            index.cpu(),
        )


def find_non_finite(model: Program, guide: Program, loss: ELBO, batch: Batch) -> NonFiniteSource | None:
    """Run the loss of a step eagerly and find the first number that is not finite.

    Set the random state to that of the step first. Errors of the programs are not caught.

    Data that are not finite may be masked out. They are the cause if finite values in their place mend the step.

    Returns:
        The source, or None if all numbers are finite.
    """
    for name, tensor in batch.tensors.items():
        if tensor.isfinite().all():
            continue
        with torch.random.fork_rng([batch.device] if batch.device.type == "cuda" else []):
            if (source := _source_in(model, guide, loss, batch.filled())) is not None:
                return source
        with suppress(Exception):  # programs may raise any error for NaN
            if _source_in(model, guide, loss, batch) is None:
                return None
        rows = _rows(~tensor.isfinite(), 0).any(1).nonzero().squeeze(1) if name in batch.data_tensors else None
        where = f" in {name}" if len(batch.tensors) > 1 else ""
        return NonFiniteSource(None, f"the data themselves are not finite{where}", rows, is_data=True)
    return _source_in(model, guide, loss, batch)


def _source_in(model: Program, guide: Program, loss: ELBO, batch: Batch) -> NonFiniteSource | None:
    """The first number that is not finite in the step of this batch."""
    watch = _Watch(batch.num_data)
    run = differentiable(loss)
    with pyro_checks(False):
        try:
            with watch:
                value = run(model, guide, *batch.args, **batch.kwargs)
        except ValueError:  # raised by an objective that inspects the programs before it runs them
            with watch:
                guide_trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
                poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch.args, **batch.kwargs)
            if watch.source is None:
                raise
            return watch.source
        if watch.source is not None or (found := _source_of_gradient(value, watch.terms)) is None:
            return watch.source
        return NonFiniteSource(
            *found, _rows_with_bad_gradients(lambda row: run(model, guide, *row.args, **row.kwargs), batch)
        )


class _Watch(Messenger):
    """Check every site sampled inside, until a number is not finite."""

    def __init__(self, num_rows: int):
        super().__init__()
        self.num_rows = num_rows
        self.source: NonFiniteSource | None = None
        self.terms: list[tuple[str, str, Tensor]] = []  # (program, site, log density)
        self.seen: set[str] = set()

    def _pyro_post_sample(self, message: dict[str, Any]) -> None:
        name = message["name"]
        if self.source is not None or site_is_subsample(message) or not torch.is_grad_enabled():
            return
        program = "model" if message["is_observed"] or name in self.seen else "guide"
        self.seen.add(name)
        log_prob = message["fn"].log_prob(message["value"])
        self.terms.append((program, name, log_prob))
        if what := _what_is_wrong(message, log_prob):
            dims = [frame.dim for frame in message["cond_indep_stack"] if frame.size == self.num_rows]
            known = bool(dims) and dims[0] is not None and log_prob.ndim >= -dims[0]
            rows = _rows(~log_prob.isfinite(), dims[0]).any(1).nonzero().squeeze(1) if known else None
            self.source = NonFiniteSource(name, f"site '{name}' of the {program} {what}", rows)


def _what_is_wrong(message: dict[str, Any], log_prob: Tensor) -> str | None:
    distribution, value = innermost(message["fn"]), message["value"]
    if log_prob.isfinite().all() and value.isfinite().all():
        return None
    for name in distribution.arg_constraints:  # parameters first: they come before the value
        parameter = vars(distribution).get(name)
        if isinstance(parameter, Tensor) and not parameter.isfinite().all():
            return f"has a {type(distribution).__name__} whose {name} is {_example(parameter)}"
    if not value.isfinite().all():
        return f"has the value {_example(value)}"
    return f"has the log density {_example(log_prob)}"


def _source_of_gradient(value: Tensor, terms: list[tuple[str, str, Tensor]]) -> tuple[str | None, str] | None:
    """(name, clause) of a site whose log density is finite but has a gradient that is not."""
    if not _has_bad_gradient(value):
        return _source_of_overflow(value)
    for program, name, log_prob in terms:
        if _has_bad_gradient(log_prob.sum()):
            return name, f"site '{name}' of the {program} has a log density whose gradient is not finite"
    return None, "the gradient of the loss is not finite, though that of each site is"


def _source_of_overflow(value: Tensor) -> tuple[None, str] | None:
    """The clause if each gradient is finite, but not the norm of all, which training checks."""
    gradients = _gradients(value)
    if not gradients or nn.utils.get_total_norm(gradients).isfinite():
        return None
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    return None, f"the loss has gradients up to {largest:.1e}, whose squares overflow {gradients[0].dtype}"


def _has_bad_gradient(term: Any) -> bool:
    return any(not gradient.isfinite().all() for gradient in _gradients(term))


def _gradients(term: Any) -> list[Tensor]:
    if not isinstance(term, Tensor) or not term.requires_grad:
        return []
    found = torch.autograd.grad(term, leaves_of(term), retain_graph=True, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def _rows_with_bad_gradients(loss: Callable[[Batch], Any], batch: Batch) -> Tensor | None:
    """The data whose own gradient is not finite. In a batch they spoil all gradients, because NaN times 0 is NaN."""
    try:
        rows = range(min(batch.num_data, _ROWS))
        bad = [row for row in rows if _has_bad_gradient(loss(batch.rows(slice(row, row + 1))))]
    except Exception:  # the program needs whole batches
        return None
    return torch.tensor(bad, dtype=torch.long)


def _rows(tensor: Tensor, dim: int) -> Tensor:
    """The entries of a tensor for each datum along `dim`, flattened."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)


def leaves_of(value: Any, seen: set[Any] | None = None) -> list[Tensor]:
    """Leaf tensors of the autograd graph behind a value, skipping nodes in `seen`."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return []
    seen = set() if seen is None else seen
    queue: list[Any] = [torch.autograd.graph.get_gradient_edge(value).node]
    leaves = []
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        queue.extend(function for function, _ in node.next_functions)
    return leaves


def _example(tensor: Tensor) -> str:
    return f"{tensor[~tensor.isfinite()][0].item():g}"
