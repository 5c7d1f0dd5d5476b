"""Programs that are not ours: where the datum axis is, how particles are drawn, and what is refused."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from shared.networks import normal_model
from torch import nn

import pyrovae as pv


def normal_guide(x):
    """The exact posterior, N(x/2, 1/2)."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))


def wide_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def evidence(x):
    return dist.Normal(0.0, math.sqrt(2)).log_prob(x)


def refused(match, model=normal_model, guide=normal_guide, x=None, error=ValueError, **options):
    with pytest.raises(error, match=match):
        pv.log_marginal_likelihood(model, guide, torch.randn(4) if x is None else x, num_particles=5, **options)


# --- the datum axis ---------------------------------------------------------------------------------------------------


def test_log_weights_has_exactly_the_particles_asked_for(double):
    x = torch.randn(7)
    for num_particles in (1, 2, 97):
        assert pv.log_weights(normal_model, wide_guide, x, num_particles=num_particles).shape == (num_particles, 7)


def test_nested_plates_sum_over_the_inner_one(double):
    x = torch.randn(5, 3)

    def model(x):
        with pyro.plate("data", 5, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([5, 1]))
            with pyro.plate("pixels", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5, dim=-2):
            pyro.sample("z", dist.Normal(x.mean(1, keepdim=True) * 0.75, 0.5))

    truth = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)
    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=50)
    assert torch.allclose(lml.log_prob, truth, atol=1e-10)


def test_two_common_plates_ask_which(double):
    x = torch.randn(4, 3)

    def model(x):
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    refused("say which, plate='columns'", model, guide, x)
    rows = pv.log_marginal_likelihood(model, guide, x, num_particles=5, plate="rows")
    columns = pv.log_marginal_likelihood(model, guide, x, num_particles=5, plate="columns")
    assert torch.allclose(rows.log_prob, evidence(x).sum(1), atol=1e-10)
    assert torch.allclose(columns.log_prob, evidence(x).sum(0), atol=1e-10)


def test_a_latent_outside_the_named_plate_is_refused(double):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    refused("site 'loc' of the model is outside plate 'data'", model, guide, plate="data")
    assert len(pv.log_marginal_likelihood(model, guide, torch.randn(4), num_particles=5)) == 1


def test_plate_named_differently_in_the_guide_is_refused(double):
    def guide(x):
        with pyro.plate("batch", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    refused("the same name in both", guide=guide)
    refused("outside plate 'data'", guide=guide, plate="data")
    refused("outside plate 'nonsense'", plate="nonsense")


def test_a_plate_in_one_of_the_two_alone(double):
    """Data that one program declares and the other has as an undeclared batch; a vector that is one datum is no such thing."""
    x = torch.randn(4)

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def whole(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    def whole_guide(x):
        pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)).to_event(1))

    def plated(x):
        with pyro.plate("data", 4):
            model(x)

    message = r"site 'z' of the model has batch shape \(4,\) and is in no plate, while all sites of the guide are in plate 'data'"
    refused(message + r": write 'with pyro.plate\('data', 4, dim=-1\)'", model, guide, x)
    with pytest.raises(ValueError, match=message):
        pv.objectives.MonteCarloKL().loss(model, guide, x)
    refused("site 'z' of the guide has batch shape", plated, lambda x: pyro.sample("z", dist.Normal(x / 2, 0.7)), x)
    lml = pv.log_marginal_likelihood(whole, whole_guide, x, num_particles=5)
    assert torch.allclose(lml.log_prob, evidence(x).sum(), atol=1e-10)


def test_sequential_plate_counts_when_named(double):
    x = torch.randn(4)

    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(x[i] / 2, math.sqrt(0.5)))

    named = pv.log_marginal_likelihood(model, guide, x, num_particles=30, plate="data")
    assert torch.allclose(named.log_prob, evidence(x), atol=1e-10)
    joint = pv.log_marginal_likelihood(model, guide, x, num_particles=30)
    assert torch.allclose(joint.log_prob, evidence(x).sum().reshape(1), atol=1e-10)


def test_subsampled_plate_has_its_scale_divided_out_and_is_drawn_once(double):
    x = torch.arange(50.0) / 10

    def model(x):
        with pyro.plate("data", len(x), subsample_size=8) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=8) as index:
            pyro.sample("z", dist.Normal(x[index] / 2, math.sqrt(0.5)))

    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=40, particle_batch_size=7)
    assert lml.stderr.tolist() == [0] * 8, "another subsample per chunk would spread the weights"
    assert torch.isclose(lml.log_prob.unsqueeze(1), evidence(x), atol=1e-10).any(1).all()


def test_masked_data_do_not_count_even_if_nan(double):
    x = torch.randn(6, 2)
    mask = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0], [1, 1], [1, 1]]).bool()
    holes = torch.where(mask, x, torch.nan)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 2, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0).mask(mask.T[:, : len(x)]), obs=x.T.nan_to_num(0.0))

    def guide(x):
        count = mask.sum(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(holes.nan_to_num(0.0).sum(1) / (1 + count), (1 / (1 + count)).sqrt()))

    lml = pv.log_marginal_likelihood(model, guide, holes, num_particles=30)
    truth = [
        dist.MultivariateNormal(torch.zeros(k), torch.eye(k) + 1).log_prob(row[m]).item()
        if (k := int(m.sum()))
        else 0.0
        for row, m in zip(x, mask, strict=True)
    ]
    assert lml.log_prob.tolist() == pytest.approx(truth, abs=1e-10)

    def poutine_mask_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask[: len(x), 0]):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    lml = pv.log_marginal_likelihood(poutine_mask_model, normal_guide, x[:, 0].contiguous(), num_particles=20_000)
    for datum in range(6):
        truth = evidence(x[datum, 0]).item() if mask[datum, 0] else 0.0
        assert abs(lml.log_prob[datum] - truth) <= 5 * lml.stderr[datum] + 1e-10


def test_deterministic_sites_do_not_count(double):
    def model(x):
        pyro.deterministic("outside", torch.tensor(3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("double", 2 * z, event_dim=0)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5)
    lml = pv.log_marginal_likelihood(model, normal_guide, x, num_particles=30)
    assert torch.allclose(lml.log_prob, evidence(x), atol=1e-10)


def test_discrete_latents_are_weighed(double):
    """z ~ Bernoulli(0.3), x ~ N(3 z, 1), q = Bernoulli(0.5)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5).expand([len(x)]))

    x = torch.tensor([0.0, 1.5, 3.0])
    truth = (0.7 * dist.Normal(0.0, 1.0).log_prob(x).exp() + 0.3 * dist.Normal(3.0, 1.0).log_prob(x).exp()).log()
    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=20_000)
    for datum in range(3):
        within(lml.log_prob[datum].item(), truth[datum].item(), lml.stderr[datum].item())


# --- drawing particles ------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """A decoder that only takes (rows, latent)."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, z):
        if self.kind == "view":
            return self.linear(z.view(-1, 2))
        if self.kind == "softmax":
            return torch.softmax(self.linear(z), 1)
        return self.norm(self.linear(z))


@pytest.mark.parametrize("kind", ["view", "softmax", "batch norm"])
def test_programs_that_cannot_be_vectorised_are_looped_and_told_so(kind):
    decoder = Decoder(kind)
    decoder.norm.running_mean.copy_(torch.tensor([0.3, -1.0, 2.0]))
    x = torch.randn(3, 3)  # as many data as outputs: what breaks, breaks silently

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    with pytest.warns(UserWarning, match="one by one"):
        looped = pv.log_marginal_likelihood(model, guide, x, num_particles=800)
    assert decoder.training
    assert decoder.norm.training, "modules are put back into training mode"
    with pytest.raises(ValueError, match="vectorize_particles='auto'"):
        pv.log_marginal_likelihood(model, guide, x, num_particles=3, vectorize_particles=True)
    # The truth, by a prior guide written by hand.
    decoder.eval()
    z = torch.randn(200_000, 2)
    output = decoder(z) if kind != "softmax" else torch.softmax(decoder.linear(z), 1)
    log_prob = dist.Normal(output.unsqueeze(1), 1.0).to_event(1).log_prob(x)
    truth = log_prob.logsumexp(0) - math.log(200_000)
    for datum in range(3):
        assert abs(looped.log_prob[datum] - truth[datum]) < 5 * looped.stderr[datum] + 0.02
    pyro.clear_param_store()


def test_vectorised_and_looped_particles_agree_in_distribution(double):
    x = torch.randn(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for, a loop is no news
        looped = pv.log_marginal_likelihood(normal_model, wide_guide, x, num_particles=3000, vectorize_particles=False)
    together = pv.log_marginal_likelihood(normal_model, wide_guide, x, num_particles=3000)
    for lml in (looped, together):
        for datum in range(3):
            within(lml.log_prob[datum].item(), evidence(x)[datum].item(), lml.stderr[datum].item())


def test_bound_methods_of_a_plain_pyro_vae_class():
    """The class of Pyro's VAE example, as its users write it."""

    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Sequential(nn.Linear(2, 6), nn.Dropout(0.5), nn.Sigmoid())

        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", x.shape[0]):
                loc = torch.zeros(x.shape[0], 2, dtype=x.dtype)
                z = pyro.sample("latent", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
                pyro.sample("obs", dist.Bernoulli(self.decoder(z), validate_args=False).to_event(1), obs=x)

        def guide(self, x):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", x.shape[0]):
                loc, scale = self.encoder(x).chunk(2, -1)
                pyro.sample("latent", dist.Normal(loc, scale.exp()).to_event(1))

    vae = VAE()
    x = (torch.rand(100, 6) < 0.5).float()
    lml = pv.log_marginal_likelihood(vae.model, vae.guide, x, num_particles=500)
    assert len(lml) == 100
    assert vae.decoder.training
    assert (lml.gap >= 0).all()
    with pytest.raises(ValueError, match="'obs' has data outside the support of Bernoulli: found 0.5"):
        pv.log_marginal_likelihood(vae.model, vae.guide, x * 0.5, num_particles=5)
    pyro.clear_param_store()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_missing_and_extra_guide_sites():
    def nothing(x):
        pass

    def extra(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))
            pyro.sample("w", dist.Normal(0.0, 1.0).expand([len(x)]))

    refused(r"does not sample the model's latent site\(s\) \['z'\]", guide=nothing)
    refused(r"samples site\(s\) \['w'\]", guide=extra)


def test_enumerated_sites():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5).expand([len(x)]))

    x = torch.randn(4)
    exact = torch.stack([math.log(0.5) + dist.Normal(z, 1.0).log_prob(x) for z in (0.0, 1.0)]).logsumexp(0)
    joint = pv.log_marginal_likelihood(
        model, guide, x, num_particles=2000
    )  # the guide samples it: a latent like others
    for found, truth, stderr in zip(joint.log_prob, exact, joint.stderr, strict=True):
        within(found, truth, stderr)
    assert torch.allclose(
        pv.log_marginal_likelihood(model, lambda x: None, x, num_particles=1).log_prob, exact.double()
    )


def test_point_guides():
    from pyro.infer.autoguide import AutoDelta

    guide = AutoDelta(normal_model)
    guide(torch.randn(4))
    refused("all its mass on one point at site 'z'", guide=guide)
    pyro.clear_param_store()


def test_scales():
    def scaled(x):
        with poutine.scale(scale=0.5):
            normal_model(x)

    def half_subsampled(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), 1]))
            with pyro.plate("pixels", 10, subsample_size=5, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.unsqueeze(1).expand(-1, 5))

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), 1]))

    refused("'z' carries a scale of 0.5", scaled)
    refused("'x' carries a scale of 2", half_subsampled, guide)


def test_factor_or_observation_in_the_guide():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))
            pyro.factor("f", torch.zeros(len(x)), has_rsample=True)

    refused("'f' of the guide is a factor", guide=guide)


def test_guide_that_does_not_cover_the_prior():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.0, 1.0).expand([len(x)]))

    refused("does not cover the prior at site 'z'", guide=guide)


def test_data_outside_the_support_with_validation_off():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z, validate_args=False), obs=x)

    x = torch.ones(100)
    x[77] = 0.25  # far behind the data used to look at the program
    with pyro.validation_enabled(False):
        refused("'x' has data outside the support of Bernoulli: found 0.25", model, x=x)


def test_a_support_that_moves_with_the_latents_is_no_error(double):
    """z ~ Exp(1), x ~ U(0, z): p(x) = int_x^inf e^-z / z dz = E1(x)."""
    x = torch.tensor([0.5, 1.5])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Uniform(0.0, z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Exponential(torch.full((len(x),), 0.7)))

    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=50_000)
    for datum, truth in enumerate([0.5597735947761608, 0.1000195824066327]):
        within(lml.log_prob[datum].item(), math.log(truth), lml.stderr[datum].item())


def test_nan_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0 + torch.nan), obs=x)

    refused("site 'x' of the model is NaN", model)


@pytest.mark.parametrize("number", [0, -3])
def test_counts_out_of_range(number):
    for name in ("num_particles", "data_batch_size", "particle_batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, found {number}"):
            pv.log_marginal_likelihood(normal_model, normal_guide, torch.randn(4), **{name: number})
    with pytest.raises(TypeError, match="whole number"):
        pv.log_marginal_likelihood(normal_model, normal_guide, torch.randn(4), num_particles=2.5)
    with pytest.raises(ValueError, match="vectorize_particles"):
        pv.log_marginal_likelihood(normal_model, normal_guide, torch.randn(4), vectorize_particles="yes")


# --- found by a reviewer ----------------------------------------------------------------------------------------------


def test_auxiliary_draws_that_are_not_a_change_of_variables():
    """q(z) of a mixture is a sum over k: dividing by q(k, z) would give log p(x) + log 2."""

    def guide(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x / 2 + 0.3 * (k - 0.5), 0.5**0.5))

    refused("draws 8 numbers", guide=guide)


def test_coupled_data_are_noticed_wherever_they_couple(double):
    """A count series, x_t depending on x_(t-1), with a zero just where a single cut would look."""
    x = torch.poisson(torch.full((1000,), 0.5))
    x[15] = 0

    def previous(x):
        return torch.cat([x.new_zeros(1), x[:-1]])

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2 + previous(x), 2.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2 + previous(x) + x, 3.0))

    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=30)
    assert torch.allclose(lml.log_prob, dist.GammaPoisson(2 + previous(x), 2.0).log_prob(x), atol=1e-10)


def test_sequential_plates_keep_their_columns(double):
    x = torch.tensor([5.0, 1.0, -2.0])

    def model(x):
        for i in pyro.plate("data", 3):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0)) if i > 0 else 0.0
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", 3):
            if i > 0:
                pyro.sample(f"z{i}", dist.Normal(x[i] / 2, 0.5**0.5))

    def backwards(x):
        for i in pyro.plate("data", 3):
            if i < 2:
                pyro.sample(f"z{2 - i}", dist.Normal(x[2 - i] / 2, 0.5**0.5))

    options = {"num_particles": 30, "plate": "data", "vectorize_particles": False}
    lml = pv.log_marginal_likelihood(model, guide, x, **options)
    truth = torch.cat([dist.Normal(0.0, 1.0).log_prob(x[:1]), evidence(x[1:])])
    assert torch.allclose(lml.log_prob, truth, atol=1e-10)
    with pytest.raises(ValueError, match="different data"):
        pv.log_marginal_likelihood(model, backwards, x, **options)


def test_modules_of_a_plain_class_are_put_into_eval(double):
    class Plain:
        def __init__(self):
            self.net = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1))

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z + self.net(torch.ones(len(x), 1)).squeeze(-1), 1.0), obs=x)

    plain = Plain()
    with torch.no_grad():
        plain.net[1].weight.fill_(2.0)
        plain.net[1].bias.fill_(0.0)
    x = torch.zeros(40)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - 2) / 2, 0.5**0.5))

    lml = pv.log_marginal_likelihood(plain.model, guide, x, num_particles=30)
    assert torch.allclose(lml.log_prob, evidence(x - 2), atol=1e-10)
    assert plain.net[0].training


def test_an_object_that_holds_the_programs_is_refused():
    """The commonest slip with a class as in Pyro's tutorials, which has methods `model` and `guide` and no `forward`."""

    class VAE(torch.nn.Module):
        def model(self, x):
            pass

        def guide(self, x):
            pass

    vae, x = VAE(), torch.zeros(3)
    with pytest.raises(
        TypeError, match="found VAE, which cannot be called: pass its method, model.model or model.guide"
    ):
        pv.log_marginal_likelihood(vae, vae.guide, x, num_particles=2)
    with pytest.raises(TypeError, match="guide must be a Pyro program"):
        pv.fit(vae.model, vae, x, epochs=1, progress=False)


NET = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5))


def _in_a_comprehension(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(sum([NET(z.unsqueeze(-1)).squeeze(-1) for _ in range(2)]), 1.0), obs=x)


def _in_a_function_inside(x):
    def decode(z):
        return NET(z.unsqueeze(-1)).squeeze(-1)

    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(decode(pyro.sample("z", dist.Normal(0.0, 1.0))), 1.0), obs=x)


def _as_a_default(x, net=NET):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)


def _as_a_named_default(x, *, net=NET):
    _as_a_default(x, net)


@pytest.mark.parametrize("model", [_in_a_comprehension, _in_a_function_inside, _as_a_default, _as_a_named_default])
def test_modules_of_a_function_are_in_evaluation_mode(model):
    modes = []
    hook = NET[1].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    try:
        pv.log_weights(model, _prior_guide, torch.ones(3), num_particles=4)
    finally:
        hook.remove()
    assert modes
    assert not any(modes)
    assert NET.training


def _prior_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_a_name_that_is_given_later():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)) if x is not None else later, 1.0), obs=x
            )

    assert pv.log_weights(model, _prior_guide, torch.ones(3), num_particles=4).shape == (4, 3)
    later = 0.0
