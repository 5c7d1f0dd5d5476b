"""Training by Pyro's own `SVI`: the loop around it, one optimizer for all parameters, and what it reports."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from pyrovae.common import distributed
from pyrovae.common.progress import progress_bar
from pyrovae.common.reporting import plain_errors
from pyrovae.programs.parameters import check_program
from pyrovae.programs.reach import modules_behind
from pyrovae.programs.traces import Program
from pyrovae.training.batches import batches_of, check_data
from pyrovae.training.fit_arguments import check_functions, check_numbers, check_saving, checked_loss
from pyrovae.training.non_finite import NotFiniteError
from pyrovae.training.optimization import OneAdam, cosine_schedule
from pyrovae.training.precision import in_precision
from pyrovae.training.recorded_step import pays_off
from pyrovae.training.run_file import RunFile, run_file
from pyrovae.training.settings import settings_of
from pyrovae.training.state import TrainingState
from pyrovae.training.steps import Schedule, Steps
from pyrovae.training.validation import elbo_of, validate

__all__ = ["FitResult", "fit", "pick_device"]


@dataclass(frozen=True)
class FitResult:
    """What `fit` did.

    history: one dict per epoch: epoch, objective (minus the loss, per training datum), elbo, reconstruction
        (E_q log p(x|z)) and kl (E_q log q(z|x) - log p(z)) of the training data, validation_bound, validation_elbo,
        validation_reconstruction, validation_kl, learning_rate, seconds (since the start), data_per_second. In nats per
        datum; elbo = reconstruction - kl whatever the objective; NaN if a value is unavailable. A loss that sums latents out
        (`TraceEnum_ELBO`) has no such parts: its elbo is the objective. skipped_steps: those of the epoch that were not
        finite (`max_skipped_steps`), whose data do not count.
    best_epoch: the epoch whose state the model and guide now have: the best on validation data, else the last
    seconds: wall time, validation included
    num_skipped_steps: those of all epochs
    """

    history: list[dict[str, float]]
    best_epoch: int
    num_steps: int
    seconds: float
    device: torch.device
    num_skipped_steps: int = 0

    def __repr__(self) -> str:
        last = self.history[self.best_epoch - 1]
        skipped = f" ({self.num_skipped_steps} skipped)" if self.num_skipped_steps else ""
        own = f", validation bound {last['validation_bound']:.2f}" if _bounded_otherwise(last) else ""
        return (
            f"FitResult({len(self.history)} epochs, {self.num_steps} steps{skipped} in {self.seconds:.1f} s on {self.device}; "
            f"best epoch {self.best_epoch}: elbo {last['elbo']:.2f}, validation elbo {last['validation_elbo']:.2f}{own})"
        )


def fit(
    model: Program,
    guide: Program,
    train: Tensor | DataLoader,
    *,
    epochs: int = 30,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    schedule: Callable[[float], float] | None = cosine_schedule,
    loss: ELBO | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    validation: Tensor | None = None,
    clip_norm: float | None = None,
    max_skipped_steps: int = 0,
    compile: bool | Literal["auto"] = "auto",
    precision: Literal["float32", "bf16"] = "float32",
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: float = 10.0,
    resume: bool = False,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> FitResult:
    """Train a Pyro model and guide together by stochastic variational inference.

    maximises  ELBO = E_q(z|x) [ log p(x|z) ] - KL( q(z|x) || p(z) ),  averaged over the data, by
    `pyro.infer.SVI(model, guide, optimizer, loss).step(batch)` on shuffled batches.

    model, guide: any Pyro pair that takes a batch of data; modules train in the mode they are in, in `eval()` without dropout
    train: data (N, ...), moved to the device whole and shuffled; or, for data that memory does not hold, a `DataLoader`
        whose batches are tensors of data
    batch_size: 200 by default; a loader has its own. A single datum left over at the end joins the batch before
    transform: makes a batch ready, on the device, at every use (`data.binarize`: dynamic binarisation). Of a loader whose
        batches have several items it is given all of them: `lambda batch: batch[0]` leaves labels out
    loss: any `pyro.infer.ELBO`; `Trace_ELBO()` by default
    learning_rate, schedule: of Adam; the schedule maps the fraction done to a factor (None: constant)
    validation: data whose ELBO (one particle, the same noise each time) is measured after each epoch, or with an objective of
        `pyrovae.objectives` on the importance-weighted bound that bound, with a loss that sums latents out (`TraceEnum_ELBO`)
        the loss; the best epoch's state is the one kept
    clip_norm: largest global gradient norm
    max_skipped_steps: so many steps of the run whose loss or gradient is NaN or infinite are passed over: they change neither
        parameters nor buffers, their data do not count in the history, and the log (logger "pyrovae") names site and data.
        One more stops the run, and so does an epoch's end if no step was made until then. For rare accidents: data that do
        it every time are left out of training in this way.
        Among several processes a distribution that refuses its data stops the run
    compile: record the step (see `pyrovae.compiled.record`) and let Inductor compile it: same noise, same numbers up to rounding,
        a quarter faster on a CPU. "auto" does so for model and guide made of parts of this library in a run long enough to win back the
        compilation. The first epoch is run eagerly, with every check
    precision: "bf16" computes linear and convolutional layers in bfloat16 while training, which pays on hardware that has
        it; densities, parameters and their updates stay float32, and so does the ELBO of the validation data
    checkpoint, checkpoint_every: a file for the state of the run, written at the end of an epoch when so many seconds have
        passed since (0: at every epoch), and at the last one; the file before stays beside it, as `.previous`. It holds all
        that decides how training goes on; `load` takes the pair out of it, in the state that `fit` would return
    resume: go on with the run in `checkpoint`, or begin it where there is none. On a CPU the numbers are, bit for bit, those
        of a run never stopped, with the same versions and number of threads
    device: "auto" takes CUDA where there is one

    Where `torchrun` started several processes (`pyrovae.common.distributed.joined`), each trains on its share of every batch (with a
    loader: on the batches of its own, of a `DistributedSampler`), with noise of its own, and the numbers reported are those
    of all. The first writes the checkpoint, which cannot be resumed by several.

    Model and guide are changed in place (and moved to the device); the result tells the history, in nats per datum.

    The first step is looked at before it moves anything. Parameters that the loss goes through and no program declares
    (a plain module without `pyro.module`; a second model under the names of the first in Pyro's store) would stay as they
    are, and are refused; the log names declared ones without a gradient. So are a model that observes nothing, and sites
    whose numbers go by the place of a datum in the batch (a guide with parameters per datum), if the data are shuffled.

    Ctrl-C puts back the state of the last finished epoch, where there is a checkpoint to save it in.

    Raises TypeError/ValueError for arguments out of range, for programs that the first step shows to train nothing, or
    nothing right, and for a checkpoint that is damaged, of another run, or there
    already and not to be resumed; RuntimeError (`NotFiniteError`) if the loss or a gradient is not finite in more than
    `max_skipped_steps`, with the site, the step and the data that made it, the state of the last finished epoch being put
    back, and saved where there is a checkpoint; RuntimeError if another run has the checkpoint, OSError where it cannot be
    written.

    Source: Wingate & Weber, Automated Variational Inference in Probabilistic Programming (2013); Kingma & Welling,
    Auto-Encoding Variational Bayes (2014).
    """
    check_program("model", model)
    check_program("guide", guide)
    check_numbers(epochs, batch_size, max_skipped_steps, learning_rate, clip_norm)
    epochs, max_skipped_steps = int(epochs), int(max_skipped_steps)  # a checkpoint takes no NumPy numbers
    learning_rate = float(learning_rate)
    batch_size = None if batch_size is None else int(batch_size)
    clip_norm = None if clip_norm is None else float(clip_norm)
    check_functions(schedule, transform)
    check_saving(checkpoint, checkpoint_every, resume)
    if not isinstance(train, DataLoader):
        check_data("train", train)
    if validation is not None:
        check_data("validation", validation)
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto', found {compile!r}")
    loss = checked_loss(loss)

    device = pick_device(device)
    batches = batches_of(train, batch_size, transform, device)
    if resume and distributed.num_ranks() > 1:
        raise ValueError(
            f"found resume=True in one of {distributed.num_ranks()} processes: what they draw is not in a checkpoint; go on "
            f"with one process, or begin anew"
        )
    modules = [module.to(device) for module in modules_behind(model, guide)]
    for module in modules:
        for name, parameter in module.named_parameters():
            if is_lazy(parameter):
                raise ValueError(
                    f"'{name}' of {type(module).__name__} is a parameter of a lazy module, and has no shape yet: call the module "
                    f"once on a batch before fit"
                )
    settings = {
        "epochs": epochs,
        "batch_size": batches.batch_size,
        "learning_rate": learning_rate,
        "clip_norm": clip_norm,
        "precision": precision,
    }
    if checkpoint is not None:
        settings |= settings_of(train, validation, loss, transform, schedule)
    validation = None if validation is None else validation.to(device)
    optimizer = OneAdam(
        [p for module in modules for p in module.parameters()], learning_rate, clip_norm, max_skipped_steps
    )
    distributed.same_everywhere(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    distributed.random_numbers_apart()
    num_steps = epochs * batches.per_epoch
    compiles = (
        pays_off(num_steps, batches.batch_size, (model, guide), loss, transform) if compile == "auto" else compile
    )
    programs = in_precision(precision, model, guide)
    steps = Steps(programs[0], programs[1], loss, optimizer, modules, batches, compiles)
    state = TrainingState(loss, optimizer, modules, device)
    with (
        run_file(
            checkpoint if distributed.rank() == 0 else None, resume, checkpoint_every, settings, model, guide
        ) as file,
        progress_bar("training", epochs * batches.num_data, "data", progress) as bar,
        _without_warnings_of_nan(),
        plain_errors(),
    ):
        if file is not None and (saved := file.found()) is not None:
            if saved["history"]:
                steps.get_ready()
            _restore(file.path, state, saved)
            bar.update(len(state.history) * batches.num_data)
        good = state.capture()
        if file is not None and not state.history:
            file.save(state, good)
        start = time.perf_counter() - state.seconds
        try:
            for epoch in range(len(state.history) + 1, epochs + 1):
                epoch_start = time.perf_counter()
                objective, parts, num_rows = steps.epoch(
                    epoch, epochs, Schedule(learning_rate, schedule), state.full_size, bar.update
                )
                state.full_size = parts.full_size
                seconds = time.perf_counter() - epoch_start
                try:
                    checked = validate(model, guide, validation, loss, batches.batch_size)
                except (TypeError, ValueError, RuntimeError) as error:
                    error.args = (f"with the data of validation=: {error}",)
                    raise
                elbo, reconstruction, kl = parts.means()
                bar.total = epochs * num_rows  # a loader may have told another number
                state.finish_epoch(
                    {
                        "epoch": epoch,
                        "objective": objective,
                        "elbo": elbo_of(loss, elbo, objective),
                        "reconstruction": reconstruction,
                        "kl": kl,
                        **checked,
                        "learning_rate": optimizer.learning_rate,
                        "skipped_steps": int(optimizer.verdicts.num_skipped) - state.num_skipped_steps,
                        "seconds": time.perf_counter() - start,
                        "data_per_second": distributed.sums(num_rows)[0] / seconds,
                    }
                )
                bar.set_postfix(_shown(state.history[-1], epochs))
                good = state.capture()
                if file is not None:
                    file.save_when_due(state, good, is_last=epoch == epochs)
        except (KeyboardInterrupt, NotFiniteError) as stop:
            _end(stop, file, state, good)
            raise
    state.take_best()
    return FitResult(
        state.history, state.best_epoch or epochs, num_steps, state.seconds, device, state.num_skipped_steps
    )


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto": CUDA where there is a GPU, else the CPU; any other name as it is.

    Raises ValueError if CUDA is asked for where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', or one of torch's; found {device!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no GPU: device='auto' or 'cpu'")
    return device


def _shown(row: dict[str, float], epochs: int) -> dict[str, str]:
    """What the progress bar says of an epoch; what comes last a narrow terminal cuts off."""
    checked = "bound" if _bounded_otherwise(row) else "elbo"
    columns = {"elbo": "elbo", f"val {checked}": f"validation_{checked}", "rec": "reconstruction", "kl": "kl"}
    numbers = {name: f"{row[column]:.2f}" for name, column in columns.items() if not math.isnan(row[column])}
    return {"epoch": f"{row['epoch']}/{epochs}", **numbers}


def _bounded_otherwise(row: dict[str, float]) -> bool:
    """Whether validation went by another bound than the ELBO."""
    return row["validation_bound"] > row["validation_elbo"]


def _restore(path: Path, state: TrainingState, found: dict[str, Any]) -> None:
    try:
        state.restore(found)
    except ValueError as error:
        raise ValueError(f"{path} does not fit this run: {error}") from error


def _end(stop: BaseException, file: RunFile | None, state: TrainingState, good: dict[str, Any]) -> None:
    """Put back (and save) the state of the last epoch that was finished, and say so in the error that stops the run."""
    if file is None and isinstance(stop, KeyboardInterrupt):
        return
    state.restore(good)
    kept = f"the state after epoch {len(state.history)} was put back"
    if file is not None:
        file.save(state, good)
        kept += f" and is in {file.path}; fit(..., checkpoint={str(file.path)!r}, resume=True) goes on from there"
    said = str(stop) or "training was interrupted"
    stop.args = (f"{said}; {kept}",)


@contextmanager
def _without_warnings_of_nan() -> Iterator[None]:
    """Pyro warns of a NaN in a loss, which is an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN", UserWarning)
        yield
