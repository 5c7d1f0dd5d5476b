"""Find where a number stops being finite (the site, the program, the data), and stop the run or warn of the skipped step."""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyrovae.common import distributed
from pyrovae.data.forms import Batch
from pyrovae.programs.supports import innermost
from pyrovae.programs.traces import Program
from pyrovae.training.losses import differentiable, pyro_checks
from pyrovae.training.preparation import Run, put_back

__all__ = [
    "NonFiniteSource",
    "NotFiniteError",
    "TriedStep",
    "find_non_finite",
    "find_source",
    "leaves_of",
    "stop",
    "warn_skipped",
]

_logger = logging.getLogger("pyrovae")

_ROWS, _SHOWN = 512, 8  # rows whose gradients are checked singly; indices in a message
_LARGE = 5.0  # root mean square above which data count as unscaled


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


class TriedStep(NamedTuple):
    """A step with all that is needed to run it again; `was_made` is None until known."""

    epoch: int
    step: int
    data: Batch
    rows: Tensor
    random: list[Tensor]
    was_made: Tensor | None = None


def stop(run: Run, tried: TriedStep, error: ValueError | None = None, none_made: bool = False) -> NoReturn:
    """Raise NotFiniteError with the source of this step's bad numbers, or `error` if they are finite.

    Args:
        run: what is trained.
        tried: the step.
        error: error that the step raised.
        none_made: whether the epoch ended with all steps of the run skipped.
    """
    source, what = find_source(run, tried)
    if source is None and error is not None:
        raise error
    where, index = source.at(tried.rows, run.batches.name) if source else ("", tried.rows.cpu())
    broken = [name for name, p in nn.ModuleList(run.modules).named_parameters() if not p.isfinite().all()]
    guard = run.optimizer.guard
    num_skipped = min(int(guard.num_skipped), guard.max_skipped)
    before = "" if none_made else " before"
    raise NotFiniteError(
        ("no step of this run was made, and nothing was trained: " if none_made else "")
        + f"the loss or its gradient is not finite at epoch {tried.epoch}, step {tried.step}: {what}{', for ' if where else ''}{where}"
        + (f"; not finite before that step: {', '.join(broken[:3])}" if broken else "")
        + (f"; {num_skipped} such steps were skipped{before} (max_skipped_steps)" if num_skipped else "")
        + f". {_advice(run, tried, source)}",
        *(source.site if source else None, tried.epoch, tried.step, index),
    ) from error


def warn_skipped(run: Run, tried: list[TriedStep]) -> None:
    """Log which of these steps were skipped."""
    guard = run.optimizer.guard
    for step in tried if guard.max_skipped and guard.num_skipped else ():
        if not step.was_made:
            source, what = find_source(run, step)
            where = f", for {source.at(step.rows, run.batches.name)[0]}" if source else ""
            _logger.warning(
                "epoch %d, step %d was skipped because its loss or gradient is not finite: %s%s (skipped so far: %d of at "
                "most %d)",
                *(step.epoch, step.step, what, where, int(guard.num_skipped), guard.max_skipped),
            )


def find_source(run: Run, tried: TriedStep) -> tuple[NonFiniteSource | None, str]:
    """Run a step again, without side effects, and return the source of its bad numbers, and a text about it."""
    buffers = run.buffers()
    with torch.random.fork_rng(run.gpus()):
        torch.set_rng_state(tried.random[0])
        if run.gpus():
            torch.cuda.set_rng_state(tried.random[1], run.device)
        try:
            source = find_non_finite(*run.programs, run.loss, run.batches.arguments(tried.data, tried.rows))
        except Exception as again:  # programs may raise any error for NaN
            return None, f"running that step again raises {type(again).__name__}: {again}"
        finally:
            put_back(buffers)
            for parameter in run.optimizer.parameters:
                parameter.grad = None
    if source is not None and run.batches.num_made(len(tried.rows)) != len(tried.rows):
        source = source._replace(rows=None)  # rows that the transform made are not those of the data
    finite = "running that step again, eagerly, gives finite numbers"
    elsewhere = "; look at the messages of the other processes" if distributed.num_ranks() > 1 else ""
    return source, source.what if source else finite + elsewhere


def _advice(run: Run, tried: TriedStep, source: NonFiniteSource | None) -> str:
    batch = tried.data.rows(tried.rows)
    numbers = batch.data.double()
    numbers = numbers[numbers.isfinite()]
    # If the step could not be run again, data that are not finite are the first to look at.
    if source.is_data if source else not batch.is_finite().all():
        if not any(tensor.isnan().any() for tensor in batch.data_tensors.values()):
            return "Leave these data out, or replace their values that are not finite"
        return (
            "Leave these data out, or replace their values that are not finite. If NaN means missing, train on what is "
            "known: programs that take a mask, as the parts of this library do, get it from {'x': x, 'observed': "
            "~x.isnan()}; pyrovae.data.table makes values and mask of a frame"
        )
    if run.optimizer.has_moved:
        return (
            f"Look at these data; lower the learning rate ({run.optimizer.learning_rate:g} in that step) or clip gradients "
            f"(clip_norm=)"
        )
    if numbers.square().mean().sqrt() <= _LARGE:
        return "No step was made before it, so the learning rate is not the cause: look at these data and at the parameters"
    how = (
        "scale the data, (x - x.mean(0)) / x.std(0) for a table without the columns whose x.std(0) is 0 (with a mask, over "
        "the known cells of each column), or x / 255 for bytes"
    )
    if (numbers >= 0).all() and (numbers == numbers.round()).all():
        how += "; if they are counts, which their likelihood needs as they are, let the encoder's first layer scale them, x.log1p()"
    return (
        f"No step was made before it, so the learning rate is not the cause. The data of that step have mean "
        f"{numbers.mean():.3g} and standard deviation {numbers.std(correction=0):.3g}, from {numbers.min():.3g} to "
        f"{numbers.max():.3g}: {how}"
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
