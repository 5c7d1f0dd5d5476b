"""Check programs and data in the first step of a run, before any parameter changes."""

import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceTMC_ELBO
from torch import Tensor, nn

from pyrovae.compiled.signature import Snapshot
from pyrovae.data.forms import Batch, signature_of
from pyrovae.likelihoods.base import Likelihood
from pyrovae.programs.latents import check_same_sites
from pyrovae.programs.masks import refuse_unaligned_masks
from pyrovae.programs.reach import evaluation_mode
from pyrovae.programs.traces import Program, as_guide, run_pair, sample_sites
from pyrovae.training.data_order import by_position, site_by_position
from pyrovae.training.declared_parameters import FirstStep
from pyrovae.training.preparation import Run, put_back
from pyrovae.training.validation import validate_ends

__all__ = ["FirstStepCheck"]

_logger = logging.getLogger("pyrovae")
_SHOWN = 4  # items in a message
# Other losses have rules of their own.
_BOUNDS = Trace_ELBO | TraceGraph_ELBO | TraceEnum_ELBO | TraceTMC_ELBO | RenyiELBO


class FirstStepCheck:
    """The checks of the first step whose loss is finite, before any parameter changes.

    Attributes:
        is_done: whether a step passed.
        refusal: the error of the check that did not pass.
    """

    def __init__(self, run: Run):
        self.run = run
        self.is_done = False
        self.refusal: Exception | None = None

    def __call__(
        self, loss_and_grads: Callable[..., tuple[float, Any]], batch: Batch, restored: bool = False
    ) -> tuple[float, Any]:
        """Return what `loss_and_grads(model, guide, *batch.args, **batch.kwargs)` returns.

        Raises:
            TypeError, ValueError, RuntimeError: if no step could train the modules of these programs, or if they do
                not accept the validation data. Buffers are restored, gradients dropped.
        """
        run = self.run
        look, buffers = FirstStep(run.modules, restored), run.buffers()
        try:
            value, parts = look.run(loss_and_grads, *run.programs, batch.args, batch.kwargs)
        except TypeError as error:
            if said := _not_taken(run.model, run.guide, batch, "train"):
                raise TypeError(said) from error
            raise
        except ValueError as error:  # Pyro rejects what a guide computes of such data
            if (refusal := _refused_by_likelihood(run.model, batch)) is not None:
                self.refusal = refusal
                raise refusal from error
            raise
        except (AssertionError, KeyError):  # of TraceMeanField_ELBO, for a site that one program lacks
            self._check_bound(look, batch)
            raise
        if not math.isfinite(value):
            return value, parts
        if look.masked and not look.observed and self._observes_elsewhere():
            look.observed |= look.masked
        try:
            look.check(run.loss)
            self._check_bound(look, batch)
            _check_data_are_first(batch, look.plate_sizes)
            if not run.batches.in_one_order:
                site = site_by_position(*run.programs, batch, list(look.declared.values()), run.modules)
                if site is not None:
                    raise ValueError(by_position(site))
            self._look_at_global_latents(look, batch)
            self._check_validation(batch)
        except (TypeError, ValueError, RuntimeError) as error:
            put_back(buffers)
            look.drop_gradients()
            self.refusal = error
            raise
        self.is_done = True
        return value, parts

    def _check_bound(self, look: FirstStep, batch: Batch) -> None:
        """Raise ValueError for programs whose ELBO is no bound: swapped ones, and latents that only one has or masks.

        The programs are run again only if the step suggests one of these errors.
        """
        run = self.run
        if not isinstance(run.loss, _BOUNDS) or not (look.observed_first or look.drawn_alone() or look.masks_latents):
            return
        buffers = run.buffers()
        with torch.random.fork_rng(run.gpus()), evaluation_mode(*run.modules):
            model_trace, guide_trace = run_pair(run.model, as_guide(run.guide), batch.args, batch.kwargs)
        put_back(buffers)
        check_same_sites(model_trace, guide_trace)
        refuse_unaligned_masks(dict(sample_sites(model_trace)), dict(sample_sites(guide_trace)))

    def _look_at_global_latents(self, look: FirstStep, batch: Batch) -> None:
        """Keep validation data together if a latent is shared by all data; warn if a batch counts its KL in full."""
        run = self.run
        latents, plate, is_scaled = look.outside_data(batch.num_data)
        if not latents:
            return
        if run.validation is not None:
            run.validation.is_cut = False
        if run.batches.per_epoch > 1 and not is_scaled:
            _logger.warning(
                "latent(s) %s lie outside plate '%s', so each of the %d batches of an epoch counts their KL in full, and elbo and "
                "training are not those of all data: scale the plate up, pyro.plate('%s', %d, subsample_size=len(x)), or use "
                "batch_size=%d",
                *(sorted(latents), plate, run.batches.per_epoch, plate, run.batches.num_data, run.batches.num_data),
            )

    def _observes_elsewhere(self) -> bool:
        """Whether some of the data are not masked out, if those of the first step are; not known of a loader."""
        run = self.run
        train: Batch | None = getattr(run.batches, "train", None)
        if train is None:
            return True
        look, buffers = FirstStep(run.modules), run.buffers()
        with torch.random.fork_rng(run.gpus()), torch.no_grad(), evaluation_mode(*run.modules), look:
            for index in torch.arange(train.num_data, device=run.device).split(run.batches.full_size):
                batch = run.batches.arguments(train, index)
                run_pair(*run.programs, batch.args, batch.kwargs)
                if look.observed:
                    break
        put_back(buffers)
        return bool(look.observed)

    def _check_validation(self, train: Batch) -> None:
        """Run the programs on validation data, after their first step, which may create what they hold."""
        run = self.run
        if run.validation is None:
            return
        random = pyro.util.get_rng_state()
        kept = Snapshot(nn.ModuleList(run.modules))
        try:
            with torch.random.fork_rng(run.gpus()), poutine.block():
                validate_ends(
                    *(run.model, run.guide, run.validation, run.loss, run.batches.batch_size),
                    check=lambda block: _check_same_arguments(run.model, block, train),
                )
        finally:
            kept.put_back()
            pyro.util.set_rng_state(random)


def _refused_by_likelihood(model: Program, batch: Batch) -> Exception | None:
    """The error of the model's likelihood about the shape or the values of the data; None for NaN, which have their own."""
    likelihood = getattr(model, "likelihood", None)
    x = batch.args[0] if batch.args else None
    if not isinstance(likelihood, Likelihood) or not isinstance(x, Tensor):
        return None
    try:
        likelihood.check_shape(x)
        if x.isfinite().all() and "observed" not in batch.kwargs:
            likelihood.check(x)
    except (TypeError, ValueError) as error:
        return error
    return None


def _check_data_are_first(batch: Batch, plate_sizes: set[int]) -> None:
    """Raise ValueError if the plates of what is observed have the size of another tensor than the one taken for the data."""
    if not plate_sizes or batch.num_data in plate_sizes:
        return
    others = [place for place, tensor in batch.tensors.items() if tensor.ndim and len(tensor) in plate_sizes]
    if others:
        raise ValueError(
            f"the first tensor has {batch.num_data} rows and is taken for the data, but the plates of the observed sites have "
            f"the size of {others[0]}, {sorted(plate_sizes)}: put the data first, or pass a mapping and name them x"
        )


def _not_taken(model: Program, guide: Program, batch: Batch, name: str) -> str | None:
    """Say which program does not take these arguments, and the fix; None if both do, or if that is unknown.

    Args:
        model, guide: the programs.
        batch: what they were called with.
        name: what the batch was made of, for the message.
    """
    for role, program in (("model", model), ("guide", guide)):
        signature = signature_of(program)
        if signature is None or _bound(signature, batch) is not None:
            continue
        first = repr(next(iter(batch.kwargs))) if batch.kwargs else 0
        remedy = f"transform=lambda batch: batch[{first}] passes one item on and leaves the others out"
        if len(batch.args) > _SHOWN and all(isinstance(value, Tensor) for value in batch.args):
            remedy += "; torch.stack makes one tensor of a list of rows"
        return (
            f"a batch of {name} has {_described(batch)}, and the programs are called with all of it, but the {role} takes "
            f"{_takes(signature)}. {remedy}; or let model and guide take {'these names' if batch.kwargs else 'them all'}"
        )
    return None


def _check_same_arguments(model: Program, batch: Batch, train: Batch) -> None:
    """Raise ValueError if a block of the validation data has other arguments than a batch of the training data."""
    if (len(batch.args), set(batch.kwargs)) == (len(train.args), set(train.kwargs)):
        return
    signature = signature_of(model)
    names = [None if signature is None else _bound(signature, of) for of in (batch, train)]
    if names[0] is not None and names[0] == names[1]:
        return
    raise ValueError(
        f"validation has {_described(batch)}, and the batches of train have {_described(train)}: give both the same arguments. "
        f"The transform is applied to validation data only if they have as many items as the training data"
    )


def _bound(signature: inspect.Signature, batch: Batch) -> dict[str, Any] | None:
    """The names of the parameters that the arguments go to, with the number of those that one of them collects."""
    try:
        bound = signature.bind(*batch.args, **batch.kwargs).arguments
    except TypeError:
        return None
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    return {
        name: len(value) if kinds[name] in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) else 1
        for name, value in bound.items()
    }


def _takes(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})" if signature.parameters else "no arguments"


def _described(batch: Batch) -> str:
    if not batch.kwargs and len(batch.args) == 1:
        return f"one item ({_one(batch.args[0])})"
    names = [f"{key!r}: " for key in batch.kwargs] if batch.kwargs else [""] * len(batch.args)
    values = [*batch.args, *batch.kwargs.values()]
    shown = [f"{name}{_one(value)}" for name, value in zip(names, values, strict=True)]
    more = ", ..." if len(shown) > 2 * _SHOWN else ""
    return f"{len(shown)} item{'s' * (len(shown) > 1)} ({', '.join(shown[: 2 * _SHOWN])}{more})"


def _one(value: Any) -> str:
    return f"{type(value).__name__} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
