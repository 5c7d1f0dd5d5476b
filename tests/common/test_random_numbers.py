"""Nothing seeds a generator that it does not restore: an evaluation in the middle of a program leaves the draws that follow alone."""

import pyro
import pytest
import torch

import pyrovae as pv
from pyrovae.common.random_numbers import seed_generators, seeded, states_under

QUICK = {"progress": False}
CALLS = {
    "fit": lambda model, guide, x: pv.fit(model, guide, x, validation=x, epochs=1, **QUICK),
    "log p(x)": lambda model, guide, x: pv.log_marginal_likelihood(model, guide, x, num_particles=4, **QUICK),
    "local search": lambda model, guide, x: pv.inference_gaps(
        model, guide, x, num_particles=4, max_num_steps=4, **QUICK
    ),
    "refined guide": lambda model, guide, x: pv.guides.Refined(guide, model, 2)(x),
    "annealing": lambda model, guide, x: pv.annealed_importance_sampling(
        model, x, num_chains=2, num_temperatures=3, num_leapfrog_steps=1, **QUICK
    ),
    "both bounds": lambda model, guide, x: pv.bidirectional_monte_carlo(
        model, x, num_chains=2, num_temperatures=3, num_leapfrog_steps=1, **QUICK
    ),
}


@pytest.fixture
def seeds_of_gpus(monkeypatch):
    """The seeds that all GPUs were given, also before CUDA is initialised."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    return seeds


@pytest.mark.parametrize("call", CALLS)
def test_no_call_seeds_generators_that_it_does_not_restore(call, seeds_of_gpus, short_pilots):
    decoder = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 6), (6,))
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), decoder)
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(6, [4], 4), 2)
    CALLS[call](model, guide, torch.rand(8, 6).round())
    assert not seeds_of_gpus


def test_a_seed_holds_inside_only():
    pyro.set_rng_seed(3)
    first, second = torch.rand(2)
    pyro.set_rng_seed(3)
    assert torch.rand(()) == first
    with seeded(7, torch.device("cpu")):
        inside = torch.rand(2)
    assert torch.rand(()) == second
    assert torch.equal(inside, torch.rand(2, generator=torch.Generator().manual_seed(7)))
    seed_generators(7)
    assert torch.equal(inside, torch.rand(2))


def test_states_are_those_of_pyros_seed():
    pyro.set_rng_seed(11)
    expected = pyro.util.get_rng_state()
    pyro.set_rng_seed(0)
    pyro.util.set_rng_state(states_under(11))
    found = pyro.util.get_rng_state()
    assert torch.equal(found["torch"], expected["torch"])
    assert found["random"] == expected["random"]
    assert str(found["numpy"]) == str(expected["numpy"])
