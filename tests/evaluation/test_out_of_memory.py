"""Memory that runs out while log weights are drawn: half as many particles at once, and nothing else changes."""

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from shared.runs import binary, make

import pyrovae as pv
from pyrovae.compiled.record import Recording
from pyrovae.evaluation import drawing

NUM_DATA, NUM_PARTICLES = 6, 50


def model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def posterior(x):
    """Exact, so that each weight is log p(x)."""
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5))


@pytest.fixture
def room(monkeypatch):
    """A device that has room for so many rows (particles times data); what was asked of it is kept."""
    asked = []
    original = drawing.run_particles

    def room_for(rows):
        def run(model, guide, args, kwargs, layout, num_particles):
            asked.append(num_particles)
            if (num_particles or 1) * layout.num_data > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(model, guide, args, kwargs, layout, num_particles)

        monkeypatch.setattr(drawing, "run_particles", run)
        return asked

    return room_for


def test_halves_and_goes_on(room, caplog, double):
    x = torch.linspace(-2.0, 3.0, NUM_DATA)
    asked = room(13 * 3)
    with caplog.at_level(logging.WARNING, logger="pyrovae"):
        drawn = pv.log_weights(
            model, posterior, x, num_particles=NUM_PARTICLES, data_batch_size=3, particle_batch_size=50
        )
    exact = dist.Normal(0.0, 1.25**0.5).log_prob(x)
    assert drawn.shape == (NUM_PARTICLES, NUM_DATA)
    assert torch.allclose(drawn, exact.expand_as(drawn))
    assert caplog.messages == [
        "out of memory with 50 particles of 3 data at once: continuing with 25",
        "out of memory with 25 particles of 3 data at once: continuing with 12",
    ]
    assert [size for size in asked if size in (50, 25)] == [50, 25], "and what is known is not tried again"


def test_classes_too(room, caplog, double):
    """p(y | t) is exact, and with the exact posterior of z all weights are equal, so each particle counts once."""
    x, t = torch.linspace(-2.0, 3.0, NUM_DATA), torch.linspace(0.4, 0.9, NUM_DATA)

    def with_class(x, t):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
            pyro.sample("t", dist.Normal(y, 0.5), obs=t)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    room(13 * 3)
    with caplog.at_level(logging.WARNING, logger="pyrovae"):
        found = pv.classify(
            with_class,
            lambda x, t: posterior(x),
            *(x, t),
            num_particles=NUM_PARTICLES,
            data_batch_size=3,
            particle_batch_size=50,
        )
    masses = torch.stack(
        [0.7 * dist.Normal(0.0, 0.5).log_prob(t).exp(), 0.3 * dist.Normal(1.0, 0.5).log_prob(t).exp()], 1
    )
    assert torch.allclose(found.probs, masses / masses.sum(1, keepdim=True))
    assert torch.allclose(found.ess, torch.full((NUM_DATA,), float(NUM_PARTICLES)))
    assert [message.split()[-1] for message in caplog.messages] == ["25", "12"]


def test_missing_cells_too(room, caplog, double):
    """The second column is never seen: its mean is that of z, whose posterior the guide draws exactly."""
    x = torch.stack([torch.linspace(-2.0, 3.0, NUM_DATA), torch.full((NUM_DATA,), torch.nan)], 1)

    def of_two(x, observed):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            cells = dist.Normal(z.unsqueeze(-1), 0.5).expand((*z.shape, 2)).mask(observed)
            pyro.sample("x", cells.to_event(1), obs=x.nan_to_num())

    room(13 * 3)
    with caplog.at_level(logging.WARNING, logger="pyrovae"):
        found = pv.impute(
            of_two,
            lambda x, observed: posterior(x[:, 0]),
            x.nan_to_num(),
            observed=~x.isnan(),
            num_particles=NUM_PARTICLES,
            data_batch_size=3,
            particle_batch_size=50,
        )
    assert [message.split()[-1] for message in caplog.messages] == ["25", "12"]
    assert torch.allclose(found.evidence.log_prob, dist.Normal(0.0, 1.25**0.5).log_prob(x[:, 0]))
    assert torch.allclose(found.ess, torch.full((NUM_DATA,), float(NUM_PARTICLES)))
    assert ((found.mean[:, 1] - 0.8 * x[:, 0]).abs() < 4.5 * (0.2 / NUM_PARTICLES) ** 0.5).all()


def test_recorded_draws_too(room, caplog, monkeypatch):
    """What was recorded is for a chunk that no longer fits: the rest is drawn eagerly."""
    monkeypatch.setattr(Recording, "compiler", staticmethod(lambda graph: graph))
    vae = make()
    options = {"num_particles": NUM_PARTICLES, "particle_batch_size": 10, "data_batch_size": None, "compile": True}
    with torch.no_grad():
        expected = pv.log_weights(*vae, binary(4), **options)
    room(4 * 9)
    with caplog.at_level(logging.WARNING, logger="pyrovae"):
        drawn = pv.log_weights(*vae, binary(4), **options)
    assert "out of memory with 10 particles of 4 data at once: continuing with 5" in caplog.messages
    assert drawn.shape == expected.shape
    assert drawn.isfinite().all()


@pytest.mark.parametrize("vectorize_particles", [True, False])
def test_one_particle_that_does_not_fit_is_an_error(room, vectorize_particles):
    room(3)
    with pytest.raises(RuntimeError, match="one particle of 4 data together does not fit .* data_batch_size=") as error:
        pv.log_weights(
            model,
            posterior,
            torch.zeros(4),
            num_particles=8,
            data_batch_size=4,
            vectorize_particles=vectorize_particles,
        )
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
