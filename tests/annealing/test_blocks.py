"""Blocks of data for annealing: all are recorded, also a shorter last one, and their results come back in order."""

import pytest

import pyrovae as pv
from pyrovae.annealing.difference import size_of_slice
from pyrovae.annealing.potential import Potential

QUICK = {"num_temperatures": 60, "num_leapfrog_steps": 4, "data_batch_size": 3}


@pytest.fixture
def energies(monkeypatch, uncompiled):
    """(whether it is recorded, chains, data) of each evaluation of the energy."""
    found, original = [], Potential.energy

    def energy(self, u, beta):
        found.append((self.recorded is not None, *u.shape[:2]))
        return original(self, u, beta)

    monkeypatch.setattr(Potential, "energy", energy)
    return found


def annealed(exact, x, **options):
    result = pv.annealed_importance_sampling(exact.model, x, num_chains=8, **QUICK, **options)
    return [result.log_prob], exact.log_prob(x)


def populations(exact, x, **options):
    result = pv.sequential_monte_carlo(exact.model, x, num_populations=2, num_chains=4, **QUICK, **options)
    return [result.log_prob], exact.log_prob(x)


def sandwich(exact, x, **options):
    result = pv.bidirectional_monte_carlo(exact.model, x, num_chains=8, **QUICK, **options)
    return [result.lower, result.upper], exact.log_prob(result.data["x"])


def curve(exact, x, **options):
    result = pv.rate_distortion(exact.model, x, num_chains=8, **QUICK, **options)
    assert result.ess.shape[1] == len(result.acceptance) == 8
    return [-result.rate[-1] - result.distortion[-1]], exact.log_prob(x)


@pytest.mark.parametrize("way", [annealed, populations, sandwich, curve])
@pytest.mark.parametrize("compile", [True, False])
def test_a_shorter_last_block(linear_gaussian, energies, way, compile):
    """8 data in blocks of 3: the last block of 2 is recorded with a datum of the block before, whose result is dropped."""
    x = linear_gaussian.data(8)
    estimates, log_prob = way(linear_gaussian, x, compile=compile)
    assert log_prob.std() > 1
    for estimate in estimates:
        assert estimate.shape == (8,)
        assert (estimate - log_prob).abs().max() < 1
    assert {recorded for recorded, *_ in energies} == {compile}
    assert {num_data for *_, num_data in energies} == ({3} if compile else {3, 2})


@pytest.mark.parametrize(
    ("num_chains", "num_temperatures", "num_leapfrog_steps"), [(4, 50, 3), (4, 240, 6), (1, 50, 3), (2, 240, 6)]
)
def test_the_slice_costs_what_it_should(linear_gaussian, energies, num_chains, num_temperatures, num_leapfrog_steps):
    """Two evaluations for each gradient that annealing makes, with its pilots: a third of importance sampling's."""
    how = {"num_chains": num_chains, "num_temperatures": num_temperatures, "num_leapfrog_steps": num_leapfrog_steps}
    pv.annealed_importance_sampling(linear_gaussian.model, linear_gaussian.data(2), compile=False, **how)
    per_datum = sum(num_chains for _, num_chains, _ in energies)
    size = size_of_slice(1_000_000, 1_000, *how.values(), 1 / 3)
    assert 2 * per_datum * size == pytest.approx(1_000_000 * 1_000 / 3, rel=0.25)  # trajectories have random lengths
