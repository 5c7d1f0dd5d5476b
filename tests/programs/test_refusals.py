"""Programs and options that no number can be had from: each is refused by a clear error, wherever it comes up."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from shared.networks import normal_model
from torch import nn

import pyrovae as pv
from pyrovae.distributions.binary import BinaryImages


def pair():
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(6, [8]), 2)
    return pv.GenerativeModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 6), (6,))
    ), guide


X = torch.tensor([0.3, -1.0, 2.0])
ANNEALING = {"num_chains": 2, "num_temperatures": 3, "progress": False}


def test_compile_takes_three_values():
    x = torch.ones(3, 6)
    for call in (
        lambda: pv.log_marginal_likelihood(*pair(), x, num_particles=3, compile="yes"),
        lambda: pv.annealed_importance_sampling(pair()[0], x, compile="yes", **ANNEALING),
        lambda: pv.bidirectional_monte_carlo(pair()[0], x, compile="yes", **ANNEALING),
        lambda: pv.fit(*pair(), x, epochs=1, compile="yes", progress=False),
    ):
        with pytest.raises(ValueError, match="compile must be True, False or 'auto', found 'yes'"):
            call()


def test_chains_run_over_all_data_at_once():
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    with pytest.raises(ValueError, match="plate 'data' is sequential, and chains run over all data at once"):
        pv.annealed_importance_sampling(model, X, plate="data", **ANNEALING)


def test_chains_need_gradients():
    def nowhere(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.detach(), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"no gradient with respect to site\(s\) \['z'\]: detached somewhere"):
        pv.annealed_importance_sampling(nowhere, X, **ANNEALING)


def test_a_simulation_needs_something_to_simulate():
    def observes_nothing(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def broadcasts(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="the model observes nothing"):
        pv.bidirectional_monte_carlo(observes_nothing, X, **ANNEALING)
    with pytest.raises(ValueError, match=r"'x' simulates values of shape \(\) for data of shape \(3,\)"):
        pv.bidirectional_monte_carlo(broadcasts, X, **ANNEALING)


def test_a_latent_that_the_guide_draws_now_and_then():
    runs = 0

    def guide(x):
        nonlocal runs
        runs += 1
        with pyro.plate("data", len(x)):
            if runs == 1:
                pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    with pytest.raises(ValueError, match="z"):
        pv.log_weights(normal_model, guide, X, num_particles=4)


def test_a_model_without_sites():
    with pytest.raises(ValueError, match="no sample sites, so there is no log p"):
        pv.log_weights(lambda x: None, lambda x: None, X, num_particles=4)


def test_one_plate_of_two_sizes_or_dims():
    def other_dim(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x[:, None] / 2, 0.5**0.5))

    with pytest.raises(ValueError, match=r"plate 'data' needs one known size and one dim.*dims \[-1, -2\]"):
        pv.log_weights(normal_model, other_dim, X, num_particles=4)


@pytest.mark.parametrize("flow", [transforms.Planar(1), transforms.Radial(1), transforms.Sylvester(1)])
def test_a_flow_without_an_inverse_where_other_points_are_needed(flow):
    """Its log weights are right, from its own draws; annealing and refining ask for the density elsewhere."""

    def guide(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(x.unsqueeze(-1) / 2, 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    with pytest.warns(UserWarning, match="one by one.*no inverse"):
        found = pv.log_marginal_likelihood(model, guide, X, num_particles=1000)
    exact = dist.Normal(0.0, 2**0.5).log_prob(X)
    assert ((found.log_prob - exact).abs() < 4 * found.stderr + 0.01).all()
    with (
        pytest.warns(UserWarning, match="one by one.*no inverse"),
        pytest.raises(ValueError, match="site 'z' can be computed at its own latest draw alone.*no inverse"),
    ):
        pv.annealed_importance_sampling(model, X, guide=guide, **ANNEALING)
    with pytest.raises(ValueError, match="cannot be refined datum by datum.*no inverse"):
        pv.inference_gaps(model, guide, X, num_particles=10)


def test_a_guide_for_other_data_cannot_be_refined():
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:3])

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x[:3] / 2, 1.0))

    with pytest.raises(ValueError, match="the programs have 3 data and x has 5 rows"):
        pv.inference_gaps(model, guide, torch.randn(5), num_particles=10)


def test_no_data():
    with pytest.raises(ValueError, match=r"one datum or more, found none: shape \(0, 6\)"):
        pair()[0].likelihood.check_shape(torch.ones(0, 6))


def test_entropy_of_binary_images():
    logits = torch.randn(3, 2, 4)
    pixels = dist.Bernoulli(logits=logits).to_event(2)
    torch.testing.assert_close(BinaryImages(logits, 2).entropy(), pixels.base_dist.entropy().sum((-1, -2)))


def test_an_argument_that_is_a_class_is_not_written_down(tmp_path):
    class Own(nn.Module):
        def forward(self, x):
            return x

    model, _ = pair()
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(6, [8], activation=Own), 2)
    pv.save(tmp_path / "pair.pt", model, guide)
    with pytest.raises(ValueError, match="an argument of MLP.* is the class Own"):
        pv.load(tmp_path / "pair.pt")
    pv.load(tmp_path / "pair.pt", model, guide)
