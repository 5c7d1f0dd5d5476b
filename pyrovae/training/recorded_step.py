"""A step of SVI as a recorded tensor function, with the interface of the eager step."""

from collections.abc import Callable, Sequence

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn

from pyrovae import data
from pyrovae.compiled.policy import pays_off
from pyrovae.compiled.record import Recording, record
from pyrovae.programs.traces import Program, sample_sites
from pyrovae.training.optimization import OneAdam

__all__ = ["RecordedStep", "record_step", "step_pays_off"]

_SAVED_PER_STEP = 2e-3  # seconds on two cores: Pyro's handlers, constructors of distributions


def step_pays_off(
    num_steps: int, batch_size: int, programs: Sequence[Program], loss: ELBO, transform: Callable | None
) -> bool:
    """Whether `compile="auto"` records the step: `pyrovae.compiled.policy.pays_off` for its programs, loss and transform."""
    drawing = getattr(transform, "func", transform)  # of a partial
    known = _has_surrogate(loss) and drawing in (None, data.binarize, data.dequantize)
    return pays_off(num_steps, batch_size, programs, saved_per_run=_SAVED_PER_STEP, known=known)


def record_step(
    model: Program,
    guide: Program,
    loss: ELBO,
    optimizer: OneAdam,
    modules: Sequence[nn.Module],
    transform: Callable[[Tensor], Tensor] | None,
    train: Tensor,
    index: Tensor,
) -> "RecordedStep | None":
    """Record the step of `SVI(model, guide, optimizer, loss)` on transform(train[index]); None if that is impossible."""

    def objective(train: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        batch = train[index] if transform is None else transform(train[index])
        return _surrogate(loss, model, guide, batch)

    # An objective that changes with the steps (KL warm-up) keeps its state in buffers of its own modules.
    recording = record(objective, [*modules, *getattr(loss, "modules", ())], (train, index), gradients=True)
    return None if recording is None else RecordedStep(recording, optimizer, getattr(loss, "advance", None))


class RecordedStep:
    """Compute gradients with a recording, then make the optimizer's step, as `SVI.step` does.

    Args:
        recording: the loss, its parts and its gradients.
        optimizer: optimizer of the parameters.
        advance: function that tells the objective that a step was made, or None.
    """

    def __init__(self, recording: Recording, optimizer: OneAdam, advance: Callable[[], None] | None):
        self.recording, self.optimizer, self.advance = recording, optimizer, advance
        self.parameters = recording.parameters

    def __call__(self, train: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make a step and return (loss, reconstruction, kl), summed over the batch."""
        (value, reconstruction, kl), gradients = self.recording(train, index)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.watch(value)
        self.optimizer(self.optimizer.parameters)
        if self.advance is not None:
            self.advance()
        return value, reconstruction, kl


def _has_surrogate(loss: ELBO) -> bool:
    return type(loss) is Trace_ELBO or hasattr(loss, "surrogate")


def _surrogate(loss: ELBO, model: Program, guide: Program, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, reconstruction, kl) of `Trace_ELBO` without synchronising with the host, if all draws are reparameterised."""
    if hasattr(loss, "surrogate"):
        value, parts = loss.surrogate(model, guide, batch)
        return value, parts.reconstruction, parts.kl
    if type(loss) is not Trace_ELBO:
        raise TypeError(f"{type(loss).__name__} has no surrogate to record; Trace_ELBO and pyrovae.objectives have")
    reconstruction = kl = torch.zeros((), dtype=batch.dtype, device=batch.device)
    for model_trace, guide_trace in loss._get_traces(model, guide, (batch,), {}):
        for name, site in sample_sites(guide_trace):
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"guide site '{name}' ({site['fn']}) is not reparameterised: its gradient needs the eager loss"
                )
            kl = kl + site["log_prob_sum"] / loss.num_particles
        for _, site in sample_sites(model_trace):
            term = site["log_prob_sum"] / loss.num_particles
            if site["is_observed"]:
                reconstruction = reconstruction + term
            else:
                kl = kl - term
    return kl - reconstruction, reconstruction, kl
