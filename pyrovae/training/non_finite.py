"""Find where a number stops being finite: the site, the program and the data."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrovae.programs.supports import innermost
from pyrovae.programs.traces import Program

__all__ = ["NonFiniteSource", "NotFiniteError", "find_non_finite", "leaves_of"]

_ROWS, _SHOWN = 512, 8  # rows whose gradients are checked singly; indices in a message


class NotFiniteError(RuntimeError):
    """Raised if a loss or a gradient is NaN or infinite.

    Attributes:
        site: sample site that caused it; None if running the step again did not find it.
        epoch, step: where it happened, counted from 1.
        index: positions in `train` of the data that caused it; of the whole batch if the data cannot be told apart.
    """

    def __init__(self, message: str, site: str | None, epoch: int, step: int, index: Tensor):
        super().__init__(message)
        self.site, self.epoch, self.step, self.index = site, epoch, step, index


class NonFiniteSource(NamedTuple):
    """Where the numbers of a step stopped being finite.

    Attributes:
        site: name of the site, or None.
        what: a clause that says what is wrong.
        rows: which data of the batch, None if unknown.
    """

    site: str | None
    what: str
    rows: Tensor | None

    def at(self, index: Tensor, name: str) -> tuple[str, Tensor]:
        """Return (the data in words, their positions) for a batch at positions `index` of the data called `name`."""
        known = self.rows is not None and 0 < len(self.rows) < len(index)
        index = index[self.rows] if known else index
        shown = ", ".join(map(str, index[:_SHOWN].tolist())) + (", ..." if len(index) > _SHOWN else "")
        return (
            f"{name}[{shown}] ({f'{len(index)} of the batch' if known else f'the batch, of {len(index)}'})",
            index.cpu(),
        )


def find_non_finite(model: Program, guide: Program, loss: ELBO, batch: Tensor) -> NonFiniteSource | None:
    """Run the loss of a step eagerly and find the first number that is not finite.

    Set the random state to that of the step first. Errors of the programs are not caught.

    Returns:
        The source, or None if all numbers are finite.
    """
    watch = _Watch(len(batch))
    if not batch.isfinite().all():
        rows = _rows(~batch.isfinite(), 0).any(1).nonzero().squeeze(1)
        return NonFiniteSource(None, "the data themselves are not finite", rows)
    run = _differentiable(loss)
    with pyro.validation_enabled(False):
        with watch:
            value = run(model, guide, batch)
        if watch.culprit is not None or (found := _culprit_of_gradient(value, watch.terms)) is None:
            return watch.culprit
        return NonFiniteSource(*found, _rows_with_bad_gradients(lambda row: run(model, guide, row), batch))


class _Watch(Messenger):
    """Check every site sampled inside, until a number is not finite."""

    def __init__(self, num_rows: int):
        super().__init__()
        self.num_rows = num_rows
        self.culprit: NonFiniteSource | None = None
        self.terms: list[tuple[str, str, Tensor]] = []  # (program, site, log density)
        self.seen: set[str] = set()

    def _pyro_post_sample(self, message: dict[str, Any]) -> None:
        name = message["name"]
        if self.culprit is not None or site_is_subsample(message) or not torch.is_grad_enabled():
            return
        program = "model" if message["is_observed"] or name in self.seen else "guide"
        self.seen.add(name)
        log_prob = message["fn"].log_prob(message["value"])
        self.terms.append((program, name, log_prob))
        if what := _what_is_wrong(message, log_prob):
            dims = [frame.dim for frame in message["cond_indep_stack"] if frame.size == self.num_rows]
            known = bool(dims) and dims[0] is not None and log_prob.ndim >= -dims[0]
            rows = _rows(~log_prob.isfinite(), dims[0]).any(1).nonzero().squeeze(1) if known else None
            self.culprit = NonFiniteSource(name, f"site '{name}' of the {program} {what}", rows)


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


def _culprit_of_gradient(value: Tensor, terms: list[tuple[str, str, Tensor]]) -> tuple[str | None, str] | None:
    """(name, clause) of a site whose log density is finite but has a gradient that is not."""
    if not _has_bad_gradient(value):
        return None
    for program, name, log_prob in terms:
        if _has_bad_gradient(log_prob.sum()):
            return name, f"site '{name}' of the {program} has a log density whose gradient is not finite"
    return None, "the gradient of the loss is not finite, though that of each site is"


def _has_bad_gradient(term: Any) -> bool:
    if not isinstance(term, Tensor) or not term.requires_grad:
        return False
    gradients = torch.autograd.grad(term, leaves_of(term), retain_graph=True, allow_unused=True)
    return any(gradient is not None and not gradient.isfinite().all() for gradient in gradients)


def _rows_with_bad_gradients(loss: Callable[[Tensor], Any], batch: Tensor) -> Tensor | None:
    """The data whose own gradient is not finite. In a batch they spoil all gradients, because NaN times 0 is NaN."""
    try:
        bad = [row for row in range(min(len(batch), _ROWS)) if _has_bad_gradient(loss(batch[row : row + 1]))]
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


def _differentiable(loss: ELBO) -> Callable[..., Any]:
    if hasattr(loss, "surrogate"):
        return lambda *programs: loss.surrogate(*programs)[0]

    def run(*programs: Any) -> Any:
        with suppress(NotImplementedError, AttributeError):  # not every Pyro loss has it
            return loss.differentiable_loss(*programs)
        return loss.loss_and_grads(*programs)

    return run


def _example(tensor: Tensor) -> str:
    return f"{tensor[~tensor.isfinite()][0].item():g}"
