"""A program that seeds its own random numbers makes all particles the same draw: refused. Seeds that change no draw are not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyrovae as pv

X = torch.tensor([0.5, 1.5, -3.2, 0.1, 2.0, 0.7])
NOISES = {
    "normal": (dist.Normal(0.0, 1.0), lambda x: dist.Normal(x / 2, 1.0)),
    "bernoulli": (dist.Bernoulli(0.5), lambda x: dist.Bernoulli(torch.full_like(x, 0.4))),
    "gamma": (dist.Gamma(2.0, 1.0), lambda x: dist.Gamma(x.abs() + 1, 1.0)),
    "half": (dist.HalfNormal(1.0), lambda x: dist.HalfNormal(x.abs() + 1)),
}


def pair(kind, model_seeds=lambda: None, guide_seeds=lambda: None, repeat=1):
    prior, proposal = NOISES[kind]

    def model(x):
        model_seeds()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior.expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        guide_seeds()
        with pyro.plate("data", len(x)):
            pyro.sample("z", proposal(x))

    return model, guide, X.repeat(repeat)


SEEDS = {"pyro": lambda: pyro.set_rng_seed(0), "torch": lambda: torch.manual_seed(7)}
CALLS = {
    "evaluation": lambda *pair: pv.log_marginal_likelihood(*pair, num_particles=20),
    "weights": lambda *pair: pv.log_weights(*pair, num_particles=20),
    "latent use": lambda *pair: pv.latent_use(*pair),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_in_a_program_is_refused(seed, kind, call):
    for where in ("model_seeds", "guide_seeds"):
        with pytest.raises(ValueError, match="under different seeds"):
            CALLS[call](*pair(kind, **{where: SEEDS[seed]}, repeat=5))


@pytest.mark.parametrize("kind", NOISES)
def test_a_seeded_program_is_refused(kind):
    model, guide, x = pair(kind, repeat=5)
    with pytest.raises(ValueError, match=r"same values of site\(s\) \['z'\] under different seeds"):
        pv.log_marginal_likelihood(model, poutine.seed(guide, rng_seed=3), x, num_particles=20)


def test_draws_that_are_equal_by_chance_are_not_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.999))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.999)))

    exact = torch.logaddexp(
        dist.Normal(1.0, 1.0).log_prob(X) + torch.tensor(0.999).log(),
        dist.Normal(0.0, 1.0).log_prob(X) + torch.tensor(0.001).log(),
    )
    found = pv.log_marginal_likelihood(model, guide, X, num_particles=5000)
    assert torch.allclose(found.log_prob.float(), exact, atol=0.2)


def test_a_seed_that_changes_no_draw_is_not_refused():
    """Fixed features from a generator that is put back, as of a random projection."""

    def features():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.randn(4)

    model, guide, x = pair("normal", guide_seeds=features)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    found = pv.log_marginal_likelihood(model, guide, x, num_particles=5000)
    assert ((found.log_prob - exact).abs() < 5 * found.stderr + 1e-3).all()
