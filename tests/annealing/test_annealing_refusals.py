"""What annealing refuses, by the site's name, and what it warns of."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from shared.exact import gamma_poisson, potential_of

import pyrovae as pv
from pyrovae.annealing.blocks import AnnealingOptions, tuned_blocks
from pyrovae.annealing.potential import prior_of
from pyrovae.common.arguments import without_checks
from pyrovae.programs.splitting import inspect


@pytest.fixture(autouse=True)
def _quick(short_pilots):
    """What is refused or said does not depend on the kernels."""


SETTINGS = {"num_chains": 2, "num_temperatures": 5, "num_leapfrog_steps": 1}


def test_discrete_latents_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'k' is discrete"):
        pv.annealed_importance_sampling(model, torch.zeros(3), **SETTINGS)


def test_a_detached_latent_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.detach(), 1.0), obs=x)

    with pytest.raises(ValueError, match="no gradient"):
        pv.annealed_importance_sampling(model, torch.zeros(3), **SETTINGS)


def angle(x, family):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", family())
        pyro.sample("x", dist.Normal(z[..., 0] if family().event_shape else z, 1.0), obs=x)


ANGLES = {
    "an angle": lambda: dist.VonMises(0.0, 1.0),
    "angles": lambda: dist.VonMises(torch.zeros(2), 1.0).to_event(1),
    "expanded and masked": lambda: dist.VonMises(0.0, 1.0).expand([2]).to_event(1).mask(torch.tensor(True)),
    "a pair": lambda: dist.SineBivariateVonMises(0.0, 0.0, 1.0, 1.0, 0.1),
    "a mixture": lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.VonMises(torch.zeros(2), 1.0)),
    "moved": lambda: dist.TransformedDistribution(dist.VonMises(0.0, 1.0), [dist.transforms.AffineTransform(1.0, 2.0)]),
    "a direction": lambda: dist.ProjectedNormal(torch.ones(2)),
}


@pytest.mark.parametrize("family", ANGLES)
def test_angles_and_directions_are_refused(family):
    with pytest.raises(ValueError, match="site 'z' is an angle or a direction"):
        pv.annealed_importance_sampling(functools.partial(angle, family=ANGLES[family]), torch.zeros(3), **SETTINGS)


def test_an_angle_that_the_guide_takes_for_a_number_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    model = functools.partial(angle, family=ANGLES["an angle"])
    with pytest.raises(ValueError, match="site 'z' of the model is an angle or a direction"):
        pv.annealed_importance_sampling(model, torch.zeros(3), guide=guide, **SETTINGS)


def beta_bernoulli(x, concentration):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Beta(concentration, concentration))
        pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * z), obs=x)


def test_draws_at_the_edge_of_their_support_are_said():
    """A fifth of Beta(0.05, 0.05) lies within 1e-7 of 1, where float32 has no numbers."""
    x = torch.ones(20)
    with pytest.warns(UserWarning, match="site 'z' fall on one outermost value"):
        pv.annealed_importance_sampling(functools.partial(beta_bernoulli, concentration=0.05), x, **SETTINGS)
    pv.annealed_importance_sampling(functools.partial(beta_bernoulli, concentration=0.5), x, **SETTINGS)


@pytest.mark.parametrize("schedule", ["adaptive", "sigmoidal"])
def test_a_likelihood_that_does_not_vary(double, schedule):
    """Weights without spread give no schedule, and exact bounds."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    result = pv.bidirectional_monte_carlo(model, torch.ones(4), schedule=schedule, **SETTINGS)
    truth = dist.Normal(0.0, 1.0).log_prob(result.data["x"])
    assert torch.allclose(result.lower, truth)
    assert torch.allclose(result.upper, truth)


@pytest.mark.parametrize(("num_data", "size", "blocks"), [(5, 2, [(0, 2), (2, 5)]), (33, 32, [(0, 17), (17, 33)])])
def test_no_datum_is_left_over(monkeypatch, num_data, size, blocks):
    """A program may squeeze() a single one out of shape, and a pilot learns little from it."""
    monkeypatch.setattr("pyrovae.annealing.blocks.tune", lambda *args, **kwargs: None)
    pair = inspect(gamma_poisson, prior_of(gamma_poisson), (torch.ones(num_data, 3),), {}, None, size)
    options = AnnealingOptions(**SETTINGS, data_batch_size=size, compile=False)
    found = [(block.start, block.stop) for block in tuned_blocks(pair, options, True, passes=1)]
    assert found == blocks


class NaNFarOut(torch.nn.Module):
    def forward(self, z):
        return torch.where(z.abs() < 6, z, math.nan)


def test_a_recorded_nan_names_the_site(double):
    model = pv.GenerativeModel(pv.priors.StandardNormal(1), pv.likelihoods.Normal(NaNFarOut(), (1,)))
    potential = potential_of(model, None, 2, torch.zeros(3, 1))
    potential = potential.record([model], inductor=False)
    assert potential.recorded is not None
    far, beta = torch.full((2, 3, 1), 7.0), torch.tensor(0.5)
    with pytest.raises(ValueError, match="site 'x'"):
        potential.energy(far, beta)
    with without_checks():  # in a trajectory it is rejected
        assert potential.energy(far, beta).log_weight.isnan().all()


def test_nan_names_the_site():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * math.nan, 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'x'"):
        pv.annealed_importance_sampling(model, torch.zeros(3), **SETTINGS)


@pytest.mark.parametrize("run", [pv.annealed_importance_sampling, pv.bidirectional_monte_carlo])
@pytest.mark.parametrize("number", [10**13, 10**15, 10**19])
def test_more_chains_than_fit_into_memory(run, number):
    with pytest.raises(ValueError, match=r"num_chains=1[0,]+ takes"):
        run(gamma_poisson, torch.ones(2, 3), **(SETTINGS | {"num_chains": number}))


@pytest.mark.parametrize(
    ("option", "text"),
    [({"num_chains": 0}, "num_chains"), ({"schedule": "linear"}, "schedule"), ({"num_temperatures": 1.5}, "num_temp")],
)
def test_options_out_of_range(option, text):
    with pytest.raises((ValueError, TypeError), match=text):
        pv.annealed_importance_sampling(gamma_poisson, torch.ones(2, 3), **(SETTINGS | option))
