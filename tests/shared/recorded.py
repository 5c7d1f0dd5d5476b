"""One training step, eager and recorded, and their comparison."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyrovae.data.forms import as_batch
from pyrovae.training.acceleration import record_step


def eager_step(model, guide, batch, loss=None):
    """(loss, gradients) by Pyro's loss, from seed 3."""
    every = [*model.parameters(), *(p for p in guide.parameters() if all(p is not q for q in model.parameters()))]
    for parameter in every:
        parameter.grad = None
    pyro.set_rng_seed(3)
    value = (loss or Trace_ELBO()).loss_and_grads(model, guide, batch)
    grads = [parameter.grad for parameter in every]
    for parameter in every:
        parameter.grad = None
    return value, grads


def recorded_step(model, guide, batch, loss=None, modules=None):
    """The same, recorded before (from another seed)."""
    modules = modules or [model, guide]
    step = record_step(
        model,
        guide,
        loss or Trace_ELBO(),
        None,
        modules,
        None,
        None,
        as_batch(batch, batch.dtype),
        torch.arange(len(batch)),
    )
    pyro.set_rng_seed(3)
    (value, _, _), grads = step.recording(batch, torch.arange(len(batch)))
    return value.item(), grads


def assert_same_step(eager, recorded, rtol):
    assert recorded[0] == pytest.approx(eager[0], rel=rtol)
    for expected, found in zip(eager[1], recorded[1], strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            assert torch.allclose(expected, found, rtol=rtol, atol=rtol * expected.abs().max().item())
