"""`fit`: prepare, run the epochs around Pyro's `SVI`, report."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from pyrovae.common import distributed
from pyrovae.common.reporting import plain_errors, progress_bar
from pyrovae.programs.traces import Program
from pyrovae.training.callbacks import Callback, call
from pyrovae.training.checkpoint_file import path_of
from pyrovae.training.losses import bound_name, elbo_of
from pyrovae.training.non_finite import NotFiniteError
from pyrovae.training.optimization import cosine_schedule
from pyrovae.training.preparation import Options, Run, prepare
from pyrovae.training.run_file import RunFile, run_file
from pyrovae.training.state import TrainingState
from pyrovae.training.steps import Steps
from pyrovae.training.validation import validate

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """The result of `fit`.

    Attributes:
        history: one dict per epoch. Keys: epoch, objective (minus the loss, per training datum), elbo, reconstruction
            (E_q log p(x|z)) and kl (E_q log q(z|x) - log p(z)) of the training data, validation_bound, validation_elbo,
            validation_reconstruction, validation_kl, learning_rate, skipped_steps, seconds (since the start) and
            data_per_second. Bounds and their parts are in nats per datum, and NaN if unavailable. elbo is
            reconstruction minus kl for every objective, except for losses that sum latents out (`TraceEnum_ELBO`, objectives
            of `pyrovae.objectives` on sites marked for enumeration): these have no parts, and their elbo is the
            objective, or NaN if another bound is trained. skipped_steps counts the steps of the epoch that were
            not finite (`max_skipped_steps`); their data do not enter the means.
        best_epoch: epoch whose state the model and guide now have: the best on the validation data, or the last epoch
            without validation data.
        num_steps: steps of the optimizer in all epochs.
        seconds: wall time, including validation.
        device: device of the training.
        num_skipped_steps: skipped steps of all epochs.
        bound: name of the bound that validation_bound holds: "ELBO", or that of the objective, if it trains another.
    """

    history: list[dict[str, float]]
    best_epoch: int
    num_steps: int
    seconds: float
    device: torch.device
    num_skipped_steps: int = 0
    bound: str = "ELBO"

    def to_pandas(self) -> Any:
        """The history as a `pandas.DataFrame`, indexed by the epoch.

        Example:
            >>> result = FitResult([{"epoch": 1, "elbo": -3.0}, {"epoch": 2, "elbo": -2.5}], 2, 8, 0.1, torch.device("cpu"))
            >>> result.to_pandas()["elbo"].idxmax()
            2
        """
        import pandas as pd

        return pd.DataFrame(self.history).set_index("epoch")

    def __repr__(self) -> str:
        last = self.history[self.best_epoch - 1]
        skipped = f" ({self.num_skipped_steps} skipped)" if self.num_skipped_steps else ""
        measured = {"elbo": last["validation_elbo"]}
        if self.bound != "ELBO":
            measured["bound"] = last["validation_bound"]
        held_out = "".join(
            f", validation {name} {value:.2f}" for name, value in measured.items() if not math.isnan(value)
        )
        return (
            f"FitResult({len(self.history)} epochs, {self.num_steps} steps{skipped} in {self.seconds:.1f} s on {self.device}; "
            f"best epoch {self.best_epoch}: elbo {last['elbo']:.2f}{held_out})"
        )


def fit(
    model: Program,
    guide: Program,
    train: Any,
    *,
    epochs: int = 30,
    batch_size: int | None = None,
    loss: ELBO | None = None,
    transform: Callable[[Any], Any] | None = None,
    validation: Any = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | PyroOptim | None = None,
    learning_rate: float | None = None,
    schedule: Callable[[float], float] | None = cosine_schedule,
    clip_norm: float | None = None,
    accumulate: int = 1,
    average: float | None = None,
    max_skipped_steps: int = 0,
    patience: int | None = None,
    callback: Callback | None = None,
    compile: bool | Literal["auto"] = "auto",
    precision: Literal["float32", "medium", "bf16"] = "float32",
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: float = 10.0,
    resume: bool = False,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> FitResult:
    """Train a Pyro model and guide together by stochastic variational inference.

    Training maximises, averaged over the data,

        ELBO = E_q(z|x) [ log p(x|z) ] - KL( q(z|x) || p(z) )

    with `pyro.infer.SVI(model, guide, optimizer, loss).step(batch)` on shuffled batches. Model and guide are changed in
    place and moved to the device.

    The programs are checked before the first step. It is an error if

    - the loss depends on parameters that no program declares, because training would not change them (a plain module
      without `pyro.module`; a second model whose parameters have the names of the first's in Pyro's store),
    - the model observes nothing,
    - the data are shuffled and a site depends on the place of a datum in the batch (a guide with parameters per datum),
    - the programs do not accept the validation data.

    Declared parameters without a gradient are logged.

    If `torchrun` started several processes (`pyrovae.common.distributed.joined`), each trains on its share of every
    batch with its own noise; with a loader, on its own batches, from a `DistributedSampler`. The reported numbers are
    those of all processes. The first process writes the checkpoint; as many processes resume it, bit for bit.

    If there is a checkpoint, Ctrl-C restores and saves the state of the last finished epoch.

    Args:
        model, guide: any Pyro programs that take a batch of data. Modules train in their current mode; in `eval()` mode
            there is no dropout.
        train: the data, which are moved to the device and shuffled. The form of a batch decides how the programs are
            called: `model(x)` for a tensor, array or frame (N, ...), `model(*items)` for a tuple, list or
            `TensorDataset`, `model(**items)` for a mapping. Tensors whose first size is N are cut into batches;
            anything else is passed whole. A constant tensor that happens to have N rows would be cut too: keep it out of
            the data, as a buffer of the module or by `functools.partial(model, weights=weights)`. For data that exceed
            memory, pass a `Dataset`, which is shuffled too, or a `DataLoader`, whose batches are used as they come.
            Arrays, frames and bytes (uint8) become tensors of the programs' dtype, except that one byte per datum, a
            label, becomes int64. A tensor of another floating-point dtype is converted only if no value changes.
        epochs: passes over the data.
        batch_size: 200 by default; leave it out with a loader, which has its own. A single leftover datum joins the
            batch before it.
        loss: any `pyro.infer.ELBO`. By default `Trace_ELBO()`; for a `MixtureVAE`, whose component is summed out,
            `TraceEnum_ELBO(max_plate_nesting=1)`.
        transform: function from a batch, in the form of the data (a tensor, tuple or dict), to the batch that the
            programs are called with. It runs on the device, each time a batch is used. `data.binarize` gives dynamic
            binarisation, and `lambda batch: batch[0]` leaves labels out.
        validation: data in any form that `train` may have, with the same arguments. After each epoch their bound is
            measured, with the same noise each time, and the state of the best epoch is kept. The bound is the
            one-particle ELBO; or the importance-weighted bound if an objective of `pyrovae.objectives` trains that; or
            the loss itself if it sums latents out (`TraceEnum_ELBO`). If the training data have several items before
            `transform` and these have as many, `transform` is applied to them too; a single tensor is used as it is. A
            `DataLoader` that shuffles uses the same order after each epoch. Weights of the KL, of an objective or by
            `poutine.scale`, do not enter the ELBO.
        optimizer: function that takes a list of parameters and returns a `torch.optim.Optimizer`, for example
            `functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=1e-2)`; or a wrapper such as
            `pyro.optim.RMSprop({"lr": 1e-3})`, which becomes one optimizer over all parameters. A fused Adam by
            default. The function may make parameter groups: the parameters that it is given are those of the modules,
            so that `set(model.parameters())` tells which belong to the model. On a GPU, every optimizer but torch's
            fused Adam and AdamW waits for the device once per step.
        learning_rate: learning rate of the default optimizer, 1e-3 by default. Not for `optimizer`, which has its own.
        schedule: function from the fraction of training done to a factor of each group's learning rate; None for
            constant rates.
        clip_norm: largest norm of the gradient of all parameters together; None for no clipping.
        accumulate: number of batches whose gradients make one step, as if they were one batch. Gradients of sums over
            the batch are added, and those scaled up to all data (a subsampled plate) are averaged. The last step of an
            epoch may have fewer. A batch with a loss or gradient that is not finite is left out. Batch normalisation
            still uses single batches, and a KL warm-up counts batches.
        average: decay of an exponential moving average of the weights, 0.999 for example, between 0 and 1. After t
            steps, the weights of step i enter in proportion to average^(t - i). Training continues from the weights
            themselves; validation measures the averages, and the returned model and guide have them. Buffers
            are not averaged.
        max_skipped_steps: number of steps with a NaN or infinite loss or gradient that the run may skip. A skipped step
            changes neither parameters nor buffers, its data do not enter the history, and the log (logger "pyrovae")
            names site and data. One more stops the run, and so does the end of an epoch if no step was made so far.
            With `accumulate`, each batch counts as a step here. Use it for rare failures only: data that fail every
            time are in effect left out of training. With several processes, a distribution that rejects its data stops
            the run.
        patience: stop after this many epochs without a better validation bound, also across a resume.
        callback: called after each epoch with a `pyrovae.training.callbacks.Progress` (`.row`, `.history`, `.epoch`,
            `.model`, `.guide`, `.optimizer`, `.best_epoch`). If it returns True, the run stops and ends as usual. Random numbers
            that it draws do not change those of the run. If it raises, the checkpoint keeps the epoch, and a resume
            starts with the next. Every process calls it, and one that returns True stops all.
        compile: record the step (see `pyrovae.compiled.record`) and compile it with Inductor: same noise, same numbers
            up to rounding; on a CPU up to 3 times as fast for an MLP, but little faster for convolutions (see the page on
            benchmarks). "auto" does so if model and guide consist of parts of this library and the run is long enough to
            recover the compilation time. The first epoch always runs eagerly, with every check. If a callback changes a
            layer, a hook or a Python value of the programs, the run continues eagerly and says so: keep a value in a
            buffer.
        precision: "bf16" computes linear and convolutional layers in bfloat16 while training, which is faster on
            hardware that supports it. Densities, parameters, updates and the ELBO of the validation data stay float32.
            "medium", torch's own word, lets products of float32 matrices round their factors internally, and keeps
            everything else in float32: bfloat16 on processors with AMX, TensorFloat32 on a GPU; on other hardware it is
            "float32". It also rounds products within densities (a LowRankMultivariateNormal). Validation stays float32.
        checkpoint: file for the state of the run. The previous file is kept beside it as `.previous`. It holds
            everything that training depends on; `load` restores the pair from it, in the state that `fit` would return.
        checkpoint_every: write the checkpoint at the end of an epoch if this many seconds have passed since the last
            one (0: after every epoch), and after the last epoch.
        resume: resume the run in `checkpoint`, or start it if there is none. On a CPU, with the same versions and
            number of threads, the numbers are bit for bit those of an uninterrupted run. A loader's order must come from
            random generators (torch's, NumPy's or Python's, global or attributes of the loader, its samplers or its data
            set) or from `set_epoch`; workers that persist keep random numbers of their own, which are not saved. A run
            that has ended, also by its callback, is returned again; with more `epochs` than before it continues from its
            last epoch, with the schedule as a function of the fraction of the new total (with None, as one long run).
            `patience`, `callback`, `max_skipped_steps`, `compile`, `device`, `checkpoint_every` and `progress` may
            change.
        device: "auto" takes CUDA if there is a GPU, else the CPU.
        progress: show a progress bar.

    Returns:
        The history in nats per datum, the best epoch and the run time: see `FitResult`.

    Raises:
        TypeError, ValueError: if an argument is invalid, if the check of the first step refuses a program, or if the
            checkpoint is damaged, belongs to another run, or exists already and `resume` is False.
        NotFiniteError: if the loss or a gradient is not finite in more than `max_skipped_steps` steps. The error, a
            RuntimeError, names site, step and data. The state of the last finished epoch is restored, and saved if
            there is a checkpoint.
        RuntimeError: if another run is using the checkpoint.
        OSError: if the checkpoint cannot be written.

    References:
        Wingate & Weber, Automated Variational Inference in Probabilistic Programming (2013).
        Kingma & Welling, Auto-Encoding Variational Bayes (2014).
    """
    options = Options(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        schedule=schedule,
        accumulate=accumulate,
        average=average,
        patience=patience,
        callback=callback,
        loss=loss,
        transform=transform,
        clip_norm=clip_norm,
        max_skipped_steps=max_skipped_steps,
        compile=compile,
        precision=precision,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        device=device,
        progress=progress,
    ).checked()
    run = prepare(model, guide, train, validation, options)
    state = TrainingState(run.loss, run.optimizer, run.modules, run.device, run.batches.generators)
    with (
        run_file(run, options, train, validation) as file,
        progress_bar("training", run.epochs * run.batches.num_data, "data", options.progress) as bar,
        _without_warnings_of_nan(),
        plain_errors(),
    ):
        _train(run, options, state, file, bar)
    return FitResult(
        history=state.history,
        best_epoch=state.best_epoch or len(state.history),
        num_steps=state.num_steps,
        seconds=state.seconds,
        device=run.device,
        num_skipped_steps=state.num_skipped_steps,
        bound=bound_name(run.loss),
    )


def _train(run: Run, options: Options, state: TrainingState, file: RunFile | None, bar: Any) -> None:
    """Run the remaining epochs, then restore the state of the best one."""
    steps = Steps(run)
    saved = None if file is None else file.found()
    if options.checkpoint is not None and (saved := distributed.from_first(saved)) is not None:
        if saved["history"]:
            steps.get_ready()
        _restore(options.checkpoint, state, saved)
        if "num_steps" not in saved:  # a file of an earlier version
            state.num_steps = len(state.history) * -(-run.batches.per_epoch // run.optimizer.accumulate)
        bar.update(len(state.history) * run.batches.num_data)
    good = state.capture()
    if file is not None and not state.history:
        file.save(state, good)
    start = time.perf_counter() - state.seconds
    is_finished = partial(state.is_finished, run.epochs, options.patience)
    try:
        while not is_finished():
            state.finish_epoch(_epoch(run, steps, state, len(state.history) + 1, start, bar))
            bar.set_postfix(_shown(state.history[-1], run), refresh=False)  # shown by the next update
            good = state.capture()
            if options.callback is not None:
                _call(options.callback, run, state, file, good)
                good = state.capture()
            if file is not None:
                file.save_when_due(state, good, is_last=is_finished())
    except (KeyboardInterrupt, NotFiniteError) as stop:
        _end(stop, file, state, good)
        raise
    state.take_best()


def _call(callback: Callback, run: Run, state: TrainingState, file: RunFile | None, good: dict[str, Any]) -> None:
    """Call the callback; if it raises, first save the state at the end of the epoch."""
    try:
        if call(callback, run.model, run.guide, state):
            state.stopped_of = run.epochs
    except Exception:
        if file is not None:
            file.save(state, good)
        raise


def _epoch(run: Run, steps: Steps, state: TrainingState, number: int, start: float, bar: Any) -> dict[str, float]:
    """Run an epoch and return its row of the history."""
    epoch_start = time.perf_counter()
    sums = steps.epoch(number, state.full_size, bar.update)
    state.full_size = sums.full_size
    state.num_steps += sums.num_steps
    seconds = time.perf_counter() - epoch_start
    with state.averaged():
        validated = validate(run.model, run.guide, run.validation, run.loss, run.batches.batch_size)
    bar.total = run.epochs * sums.num_rows  # a loader may yield more or fewer data than its length says
    elbo, reconstruction, kl = sums.means()
    objective = sums.objective / sums.num_data if sums.num_data else math.nan
    return {
        "epoch": number,
        "objective": objective,
        "elbo": elbo_of(run.loss, elbo, objective),
        "reconstruction": reconstruction,
        "kl": kl,
        **validated,
        "learning_rate": run.optimizer.learning_rate,
        "skipped_steps": int(run.optimizer.guard.num_skipped) - state.num_skipped_steps,
        "seconds": time.perf_counter() - start,
        "data_per_second": distributed.sums(sums.num_rows)[0] / seconds,
    }


def _shown(row: dict[str, float], run: Run) -> dict[str, str]:
    """Numbers of an epoch for the progress bar, the most important first because a narrow terminal cuts off the end."""
    validated = "elbo" if bound_name(run.loss) == "ELBO" else "bound"
    columns = {"elbo": "elbo", f"val {validated}": f"validation_{validated}", "rec": "reconstruction", "kl": "kl"}
    numbers = {name: f"{row[column]:.2f}" for name, column in columns.items() if not math.isnan(row[column])}
    return {"epoch": f"{row['epoch']}/{run.epochs}", **numbers}


def _restore(path: str | os.PathLike, state: TrainingState, saved: dict[str, Any]) -> None:
    try:
        state.restore(saved)
    except ValueError as error:
        raise ValueError(f"{path_of(path)} does not fit this run: {error}") from error


def _end(stop: BaseException, file: RunFile | None, state: TrainingState, good: dict[str, Any]) -> None:
    """Restore and save the state of the last finished epoch, and say so in the error that stops the run."""
    if file is None and isinstance(stop, KeyboardInterrupt):
        return
    state.restore(good)
    kept = f"the state after epoch {len(state.history)} was restored"
    if file is not None:
        file.save(state, good)
        kept += f" and is in {file.path}; fit(..., checkpoint={str(file.path)!r}, resume=True) resumes from it"
        if 0 < state.best_epoch < len(state.history):
            kept += f"; pyrovae.load gives the pair after epoch {state.best_epoch}, the best so far"
    said = str(stop) or "training was interrupted"
    stop.args = (f"{said}; {kept}",)


@contextmanager
def _without_warnings_of_nan() -> Iterator[None]:
    """Silence Pyro's warning of a NaN loss, which `fit` handles itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN", UserWarning)
        yield
