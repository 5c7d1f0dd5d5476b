"""Training by Pyro's own `SVI`: the loop around it, one optimizer for all parameters, and what it reports."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pyro
import torch
from pyro.infer import (
    ELBO,
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
)
from torch import Tensor, nn
from tqdm import tqdm

from pyrovae import distributed
from pyrovae.programs.modules import check_count, evaluation_mode, modules_behind
from pyrovae.programs.traces import Program
from pyrovae.training.optimization import OneAdam, cosine_schedule
from pyrovae.training.parts import ElboParts, parts_of
from pyrovae.training.precision import in_precision
from pyrovae.training.recorded import pays_off, record_step

__all__ = ["FitResult", "fit", "pick_device"]

_JIT = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)
_VALIDATION_ROWS = 500
_VALIDATION_SEED = 20260101


@dataclass(frozen=True)
class FitResult:
    """What `fit` did.

    history: one dict per epoch: epoch, objective (minus the loss, per training datum), elbo, reconstruction
        (E_q log p(x|z)) and kl (E_q log q(z|x) - log p(z)) of the training data, validation_elbo,
        validation_reconstruction, validation_kl, learning_rate, seconds (since the start), data_per_second. In nats per
        datum; elbo = reconstruction - kl whatever the objective; NaN where a value is not to be had.
    best_epoch: the epoch whose state the model and guide now have: the best on validation data, else the last
    seconds: wall time, validation included
    """

    history: list[dict[str, float]]
    best_epoch: int
    num_steps: int
    seconds: float
    device: torch.device

    def __repr__(self) -> str:
        last = self.history[self.best_epoch - 1]
        return (
            f"FitResult({len(self.history)} epochs, {self.num_steps} steps in {self.seconds:.1f} s on {self.device}; "
            f"best epoch {self.best_epoch}: elbo {last['elbo']:.2f}, validation elbo {last['validation_elbo']:.2f})"
        )


def fit(
    model: Program,
    guide: Program,
    train: Tensor,
    *,
    epochs: int = 30,
    batch_size: int = 200,
    learning_rate: float = 1e-3,
    schedule: Callable[[float], float] | None = cosine_schedule,
    loss: ELBO | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    validation: Tensor | None = None,
    clip_norm: float | None = None,
    compile: bool | Literal["auto"] = "auto",
    precision: Literal["float32", "bf16"] = "float32",
    device: str | torch.device = "auto",
    progress: bool = True,
) -> FitResult:
    """Train a Pyro model and guide together by stochastic variational inference.

    maximises  ELBO = E_q(z|x) [ log p(x|z) ] - KL( q(z|x) || p(z) ),  averaged over the data, by
    `pyro.infer.SVI(model, guide, optimizer, loss).step(batch)` on shuffled batches.

    model, guide: any Pyro pair that takes a batch of data
    train: data (N, ...), moved to the device whole
    transform: makes a batch ready, on the device, at every use (`data.binarize`: dynamic binarisation)
    loss: any `pyro.infer.ELBO`; `Trace_ELBO()` by default
    learning_rate, schedule: of Adam; the schedule maps the fraction done to a factor (None: constant)
    validation: data whose ELBO (one particle, the same noise each time) is measured after each epoch; the best epoch's
        state is the one kept
    clip_norm: largest global gradient norm
    compile: record the step (see `pyrovae.programs.extract`) and let Inductor compile it: same noise, same numbers up to rounding,
        a quarter faster on a CPU. "auto" does so for parts of this library in a run long enough to win back the
        compilation. The first epoch is run eagerly, with every check
    precision: "bf16" computes linear and convolutional layers in bfloat16 while training, which pays on hardware that has
        it; densities, parameters and their updates stay float32, and so does the ELBO of the validation data
    device: "auto" takes CUDA where there is one

    Where `torchrun` started several processes (`pyrovae.distributed.joined`), each trains on its share of every batch, with
    noise of its own, and the numbers reported are those of all.

    Model and guide are changed in place (and moved to the device); the result tells the history, in nats per datum.

    Raises TypeError/ValueError for arguments out of range, RuntimeError if the loss stops being finite.

    Source: Wingate & Weber, Automated Variational Inference in Probabilistic Programming (2013); Kingma & Welling,
    Auto-Encoding Variational Bayes (2014).
    """
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    for name, tensor in (("train", train), ("validation", validation)):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.ndim < 1 or len(tensor) == 0):
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a tensor of at least one datum, found {found}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, found {learning_rate}")
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto', found {compile!r}")
    loss = Trace_ELBO() if loss is None else loss
    if not isinstance(loss, ELBO):
        raise TypeError(f"loss must be a pyro.infer.ELBO, Trace_ELBO() for instance; found {loss!r}")
    if isinstance(loss, _JIT):
        name = type(loss).__name__
        raise TypeError(
            f"loss={name}() reads its parameters from Pyro's global store, where those of modules are not: take "
            f"{name.removeprefix('Jit')}(), with compile=True to have the step recorded and compiled"
        )

    distributed.check_shares(len(train), batch_size)
    device = pick_device(device)
    modules = [module.to(device) for module in modules_behind(model, guide)]
    train = train.to(device)
    validation = None if validation is None else validation.to(device)
    optimizer = OneAdam([p for module in modules for p in module.parameters()], learning_rate, clip_norm)
    distributed.same_everywhere(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    distributed.random_numbers_apart()
    trained = in_precision(precision, model, guide)
    svi = SVI(*trained, optimizer, loss=loss)
    steps_per_epoch = -(-len(train) // batch_size)
    recorded = None
    wanted = pays_off(epochs * steps_per_epoch, batch_size, modules, loss, transform) if compile == "auto" else compile
    parts = ElboParts(None)
    history: list[dict[str, float]] = []
    best: tuple[float, int, list[Tensor]] = (-math.inf, 0, [])
    start = time.perf_counter()
    with tqdm(total=epochs * len(train), unit=" data", unit_scale=True, desc="training", disable=not progress) as bar:
        for epoch in range(1, epochs + 1):
            epoch_start = time.perf_counter()
            objective = 0.0
            order = torch.randperm(len(train), device=device)
            distributed.same_everywhere([order])
            order = [distributed.share(index) for index in order.split(batch_size)]
            full = len(order[0])
            if epoch == 2 and wanted and len(train) >= batch_size:
                recorded = record_step(*trained, loss, optimizer, modules, transform, train, order[0])
            with parts_of(loss, parts.full_size) as parts:
                for step, index in enumerate(order):
                    done = (epoch - 1 + (step + 1) / steps_per_epoch) / epochs
                    optimizer.learning_rate = learning_rate * (schedule(done) if schedule else 1.0)
                    if recorded is not None and len(index) == full:
                        value, reconstruction, kl = recorded(train, index)
                        value = value.item()
                        parts.add(reconstruction, kl)
                    else:
                        batch = train[index] if transform is None else transform(train[index])
                        # The first step runs with Pyro's checks on; they cost a fifth of the time.
                        with pyro.validation_enabled(not history and step == 0):
                            value = svi.step(batch)
                    if not math.isfinite(value):
                        raise RuntimeError(
                            f"the loss is {value} at epoch {epoch}, step {step + 1}: lower the learning rate "
                            f"({learning_rate:g}) or clip gradients (clip_norm=), and look for NaN in the data"
                        )
                    parts.count(len(index))
                    objective -= value
                    bar.update(len(index))
            objective, *parts_of_all, num_data = distributed.sums(
                objective, parts.reconstruction, parts.kl, parts.num_data
            )
            reconstruction, kl = (part / num_data for part in parts_of_all)
            elbo = reconstruction - kl
            seconds = time.perf_counter() - epoch_start
            checked = _validate(model, guide, validation) if validation is not None else (math.nan,) * 3
            history.append(
                {
                    "epoch": epoch,
                    "objective": objective / num_data,
                    "elbo": elbo,
                    "reconstruction": reconstruction,
                    "kl": kl,
                    "validation_elbo": checked[0],
                    "validation_reconstruction": checked[1],
                    "validation_kl": checked[2],
                    "learning_rate": optimizer.learning_rate,
                    "seconds": time.perf_counter() - start,
                    "data_per_second": len(train) / seconds,
                }
            )
            shown = {
                "epoch": f"{epoch}/{epochs}",
                "elbo": f"{elbo:.2f}",
                "rec": f"{reconstruction:.2f}",
                "kl": f"{kl:.2f}",
            }
            if validation is not None:
                shown["val elbo"] = f"{checked[0]:.2f}"
                if checked[0] > best[0]:
                    best = (checked[0], epoch, [tensor.detach().clone() for tensor in _state(optimizer, modules)])
            bar.set_postfix(shown)
    if best[1]:
        with torch.no_grad():
            for tensor, kept in zip(_state(optimizer, modules), best[2], strict=True):
                tensor.copy_(kept)
    return FitResult(history, best[1] or epochs, epochs * steps_per_epoch, time.perf_counter() - start, device)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto": CUDA where there is a GPU, else the CPU; any other name as it is.

    Raises ValueError if CUDA is asked for where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no GPU: device='auto' or 'cpu'")
    return device


def _validate(model: Program, guide: Program, data: Tensor) -> tuple[float, float, float]:
    """(elbo, reconstruction, kl) per datum, one particle, under the same noise at every call."""
    elbo = Trace_ELBO()
    devices = [data.device] if data.is_cuda else []
    with (
        torch.random.fork_rng(devices),
        evaluation_mode(model, guide),
        torch.no_grad(),
        pyro.validation_enabled(False),
        parts_of(elbo) as parts,
    ):
        torch.manual_seed(_VALIDATION_SEED)
        for batch in data.split(_VALIDATION_ROWS):
            elbo.loss(model, guide, batch)
            parts.count(len(batch))
    return parts.means()


def _state(optimizer: OneAdam, modules: list[nn.Module]) -> list[Tensor]:
    """Everything training changes: parameters, whoever owns them, and the modules' buffers."""
    tensors = [*optimizer.parameters, *(buffer for module in modules for buffer in module.buffers())]
    return list(dict.fromkeys(tensors))
