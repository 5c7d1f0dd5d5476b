"""Second opinions in a defensive mixture: exact densities, exact evidence where the guide misses a mode, and who says so."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from torch import nn

import pyrovae as pv
from pyrovae import guides, likelihoods, nets, priors
from pyrovae.common.networks import Inputs
from pyrovae.guides import DefensiveMixture, defensive


def linear_guide(data_dim, latent_dim):
    """A mean-field guide of random numbers, so that each datum has its own q."""
    guide = guides.MeanFieldNormal(nn.Identity(), latent_dim, num_features=data_dim)
    with torch.no_grad():
        guide.head.bias[latent_dim:] = -0.5
    return guide


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("widen", [None, 2.5])
def test_density_and_draws_of_all_components(conditional, widen, linear_gaussian):
    """Those of the mixture of diagonal normals that it is, of which torch has densities."""
    guide = linear_guide(5, 3)
    x, others, context = linear_gaussian.data(2), linear_gaussian.data(4), torch.randn(2, 2)
    codes = guide.encode(others).detach()
    prior, args = priors.StandardNormal(3).double(), (x,)
    model = linear_gaussian.model
    if conditional:
        prior, args = priors.DiagonalNormal(3, context_net=nn.Identity(), num_features=2), (x, context)
        model = lambda x, c: linear_gaussian.model(x)  # noqa: E731
    mixture = DefensiveMixture(guide, prior, 0.4, widen=widen, codes=codes, model=model, num_codes=4)
    posterior = mixture.posterior(*args)
    of_prior = prior(context) if conditional else prior().expand((2,))
    q, of_codes = guide.posterior(x), guide.distribution(codes)
    factor = widen or 1.0
    share = 0.4 / (2 if widen is None else 3)
    columns = [(0.6, q.mean, q.stddev), (share, of_prior.mean, of_prior.stddev)]
    columns += [] if widen is None else [(share, q.mean, widen * q.stddev)]
    columns += [
        (share / 4, m.expand(2, 3), factor * s.expand(2, 3))
        for m, s in zip(of_codes.mean, of_codes.stddev, strict=True)
    ]
    shares, locs, scales = zip(*columns, strict=True)
    exact = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor(shares)),
        dist.Normal(torch.stack(locs, 1), torch.stack(scales, 1)).to_event(1),
    )
    z = 2 * torch.randn(50, 2, 3)
    assert torch.allclose(posterior.log_prob(z), exact.log_prob(z), atol=1e-10)
    assert torch.allclose(posterior.mean, exact.mean)
    draws = posterior.expand((20_000, 2)).sample()
    below = (draws < 0.3).double().mean(0)
    truth = torch.tensor(shares)[:, None] * dist.Normal(torch.stack(locs, 1), torch.stack(scales, 1)).cdf(
        torch.tensor(0.3)
    )
    for found, expected in zip(below.flatten().tolist(), truth.sum(1).flatten().tolist(), strict=True):
        within(found, expected, math.sqrt(expected * (1 - expected) / 20_000))


def test_the_codes_that_count_are_the_models_best(linear_gaussian, monkeypatch):
    """Those of the largest log p(x, z) at their means, however many are scored at once."""
    guide, x = linear_guide(5, 3), linear_gaussian.data(6)
    codes = guide.encode(linear_gaussian.data(40)).detach()
    means = guide.distribution(codes).mean
    likelihood = dist.Normal(means @ linear_gaussian.weight.T + linear_gaussian.bias, linear_gaussian.scale).to_event(1)
    exact = likelihood.log_prob(x.unsqueeze(1)) + dist.Normal(torch.zeros(3), 1.0).to_event(1).log_prob(means)  # (N, M)
    for rows in (1, 100, 2**14):
        monkeypatch.setattr(defensive, "_ROWS", rows)
        mixture = DefensiveMixture(
            guide, priors.StandardNormal(3).double(), codes=codes, model=linear_gaussian.model, num_codes=2
        )
        assert torch.allclose(mixture._scores(Inputs(x, None, None), means).T, exact)
        chosen = mixture.encode(x)[:, -12:].unflatten(1, (2, 6))
        assert torch.equal(chosen, codes[exact.topk(2, 1).indices])


def test_codes_are_scored_with_classes_summed_out(double):
    """A mark for enumeration in the model: the score is the logsumexp over classes."""
    locs = torch.tensor([-1.0, 0.5, 2.0])

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            y = pyro.sample("y", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z.squeeze(-1) + locs[y], 0.5), obs=x.squeeze(-1))

    guide, x = linear_guide(1, 1), torch.randn(4, 1)
    codes = guide.encode(torch.randn(7, 1)).detach()
    means = guide.distribution(codes).mean
    mixture = DefensiveMixture(guide, priors.StandardNormal(1).double(), codes=codes, model=model)
    joint = dist.Normal(means + locs, 0.5).log_prob(x.unsqueeze(1)).logsumexp(-1) - math.log(3)
    exact = joint + dist.Normal(0.0, 1.0).log_prob(means.T)
    assert torch.allclose(mixture._scores(Inputs(x, None, None), means).T, exact)


class TwoModes:
    """z in R^4, of two clusters along its first coordinate, which x hardly shows: the posterior is two normals.

        z ~ 0.3 N(+2 e, S) + 0.7 N(-2 e, S),   x | z ~ N(z, diag(4, 0.2, 0.2, 0.2)^2)

    The guide knows the cluster at +2 only. log p(x) is the log of a sum of two normal densities.
    """

    shares, spread, noise = (
        torch.tensor([0.3, 0.7]),
        torch.tensor([0.3, 1.0, 1.0, 1.0]),
        torch.tensor([4.0, 0.2, 0.2, 0.2]),
    )

    def __init__(self):
        self.centres = torch.tensor([[2.0, 0, 0, 0], [-2.0, 0, 0, 0]], dtype=torch.float64)
        components = dist.Normal(self.centres, self.spread.double()).to_event(1)
        distribution = dist.MixtureSameFamily(dist.Categorical(self.shares.double()), components)
        self.prior = _Given(distribution, 4)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z, self.noise).to_event(1), obs=x)

    def log_parts(self, x):
        """log p(x, cluster), (N, 2)."""
        of_x = dist.Normal(self.centres, (self.spread**2 + self.noise**2).sqrt()).to_event(1)
        return of_x.log_prob(x.unsqueeze(1)) + self.shares.log()

    def parameters(self, x, cluster):
        """Those of the posterior in one cluster: means, then log scales."""
        precision = self.spread**-2 + self.noise**-2
        loc = (self.centres[cluster] / self.spread**2 + x / self.noise**2) / precision
        return torch.cat([loc, -0.5 * precision.log().expand(len(x), 4)], 1)

    def data(self, num_data):
        """Data that say next to nothing of their cluster, and none far from all others."""
        x = torch.randn(num_data, 4) * (self.spread**2 + self.noise**2).sqrt()
        return (x * torch.tensor([0.1, 1.0, 1.0, 1.0])).clamp(-1, 1)

    def guide(self):
        modes = self

        class OneCluster(guides.Guide):
            def encode(self, x):
                return modes.parameters(x, 0)

            def distribution(self, parameters):
                loc, log_scale = parameters.chunk(2, -1)
                return dist.Normal(loc, log_scale.exp()).to_event(1)

        return OneCluster(4)


class _Given(nn.Module):
    def __init__(self, distribution, latent_dim):
        super().__init__()
        self.distribution, self.latent_dim = distribution, latent_dim

    def forward(self):
        return self.distribution


def test_a_missed_mode_is_found_and_said(double):
    """Evidence of two modes of which the guide has one; codes of other data lie in the other one."""
    modes = TwoModes()
    guide, x, others = modes.guide(), modes.data(30), modes.data(300)
    exact = modes.log_parts(x).logsumexp(1)
    missed = modes.log_parts(x)[:, 0]
    alone = pv.log_marginal_likelihood(modes.model, guide, x, num_particles=500)
    # The guide alone is at its own cluster's share, 1.2 nats too low, with an error of next to nothing and a fine k.
    assert torch.allclose(alone.log_prob, missed, atol=0.05)
    assert (missed - exact).max() < -0.8
    assert (alone.stderr < 0.05).all()
    mixture = DefensiveMixture(guide, modes.prior, 0.3, widen=2, codes=modes.parameters(others, 1), model=modes.model)
    found = pv.second_opinion(modes.model, mixture, x, num_particles=4000)
    error = (found.lml.log_prob - exact).abs()
    assert (error < 5 * found.lml.stderr + 0.02).all()
    within(found.lml.mean, exact.mean().item(), found.lml.mean_mc_stderr + 2e-3)
    assert found.misses.all()
    assert "the guide misses mass at 30 of 30 data" in found.summary()
    # The guide's share of the weights is about its cluster's share of the posterior.
    assert torch.allclose(found.shares[:, 0], (missed - exact).exp(), atol=0.12)
    # Where the guide has the cluster that counts, nothing is said.
    modes.shares = torch.tensor([0.98, 0.02])
    modes.prior.distribution = dist.MixtureSameFamily(
        dist.Categorical(modes.shares.double()), modes.prior.distribution.component_distribution
    )
    found = pv.second_opinion(modes.model, mixture, x, num_particles=1000)
    assert not found.misses.any()
    assert "misses" not in found.summary()


def test_the_weights_are_unbiased(double):
    """E[w] = p(x), although the codes are chosen by the datum itself."""
    modes = TwoModes()
    x = modes.data(2)
    mixture = DefensiveMixture(
        modes.guide(), modes.prior, 0.4, widen=1.5, codes=modes.parameters(modes.data(40), 1), model=modes.model
    )
    drawn = pv.log_weights(modes.model, mixture, x.repeat_interleave(400, 0), num_particles=60).T.reshape(2, -1)
    ratio = (drawn - modes.log_parts(x).logsumexp(1, keepdim=True)).exp()
    for row in ratio:
        assert row.std() > 0.3
        within(row.mean().item(), 1.0, row.std().item() / math.sqrt(len(row)))


def test_shares_are_those_of_the_posterior(double):
    """E[ w_k q_k / q' ] over p(z|x), in one dimension by quadrature; the same draws as log_marginal_likelihood's."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.square(), 0.5).to_event(1), obs=x)

    guide = guides.MeanFieldNormal(nn.Identity(), 1, num_features=1)
    with torch.no_grad():
        guide.head.weight.copy_(torch.tensor([[0.6], [0.0]]))
        guide.head.bias.copy_(torch.tensor([0.0, -1.5]))
    codes = torch.tensor([[-1.4, -1.5], [0.3, -1.0], [2.0, -1.0]])
    mixture = DefensiveMixture(
        guide, priors.StandardNormal(1).double(), 0.4, widen=3, codes=codes, model=model, num_codes=2
    )
    x = torch.tensor([[2.0]])
    grid = torch.linspace(-6, 6, 6001).reshape(-1, 1, 1)
    joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid.square(), 0.5).log_prob(x)
    with torch.no_grad():
        posterior = mixture.posterior(x)
        parts = (posterior.log_parts(grid) - posterior.log_prob(grid)).exp()  # (K, grid, 1)
        truth = (parts * joint.squeeze(-1).softmax(0)).sum(1).squeeze(-1)
    expected = [truth[0], truth[1], truth[2], truth[3:].sum()]
    found = pv.second_opinion(model, mixture, x.repeat(200, 1), num_particles=1000)
    assert found.components == ("guide", "prior", "widened", "codes")
    for column, value in zip(found.shares.T, expected, strict=True):
        within(column.mean().item(), value.item(), column.std().item() / math.sqrt(200) + 1e-3)
    assert torch.allclose(found.shares.sum(1), torch.ones(200))
    results = []
    for estimate in (pv.second_opinion, pv.log_marginal_likelihood):
        pyro.set_rng_seed(3)
        results.append(estimate(model, mixture, x.repeat(5, 1), num_particles=40, particle_batch_size=15))
    assert torch.equal(results[0].lml.log_prob, results[1].log_prob)
    looped = pv.second_opinion(model, mixture, x.repeat(40, 1), num_particles=100, vectorize_particles=False)
    within(looped.shares[:, 0].mean().item(), truth[0].item(), looped.shares[:, 0].std().item() / math.sqrt(40) + 5e-3)


def test_recorded_draws_are_the_eager_ones(double, uncompiled):
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [8], 6), 6)).double()
    guide = guides.FullRankNormal(nets.MLP(6, [8]), 2).double()
    x, others = model.generate(9), model.generate(20)
    mixture = DefensiveMixture(
        guide, model.prior, 0.3, widen=2, codes=guide.encode(others).detach(), model=model, num_codes=3
    )
    found = []
    for compile in (False, True):
        pyro.set_rng_seed(4)
        options = {"num_particles": 20, "particle_batch_size": 5, "data_batch_size": 4, "compile": compile}
        found.append(pv.log_weights(model, mixture, x, **options))
    assert torch.allclose(*found, rtol=1e-10)
    flow = guides.NeuralSplineFlow(nets.MLP(6, [8]), 2, hidden_features=(16,), num_context=4).double()
    mixture = DefensiveMixture(flow, model.prior, 0.3, widen=2, codes=flow.encode(others), model=model, num_codes=2)
    assert pv.second_opinion(model, mixture, x, num_particles=30).lml.log_prob.isfinite().all()
    assert not mixture.codes.requires_grad


def test_errors_of_second_opinions(linear_gaussian):
    guide, prior, x = linear_guide(5, 3), priors.StandardNormal(3).double(), linear_gaussian.data(6)
    codes, model = guide.encode(x), linear_gaussian.model
    for options, match in (
        ({"widen": 1.0}, "widen must be above 1"),
        ({"widen": math.nan}, "widen must be above 1"),
        ({"codes": codes}, "pass both, codes= and model=, or neither"),
        ({"model": model}, "pass both, codes= and model=, or neither"),
        ({"codes": codes[:3], "model": model}, r"at least num_codes=5 rows; found shape \(3, 6\)"),
        ({"codes": [1.0], "model": model}, "found list"),
        ({"num_codes": 0}, "num_codes must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=match):
            DefensiveMixture(guide, prior, **options)
    with pytest.raises(TypeError, match="guide must be a pyrovae.guides.DefensiveMixture.*found MeanFieldNormal"):
        pv.second_opinion(model, guide, x)

    class OnAnInterval(guides.Guide):
        def encode(self, x):
            return x[:, :3].exp()

        def distribution(self, parameters):
            return dist.Beta(parameters, 1.0).to_event(1)

    with pytest.raises(ValueError, match="mean of Beta, whose support .* is not all real numbers: leave widen"):
        DefensiveMixture(OnAnInterval(3), prior, widen=2).posterior(x)

    def more_sites(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        model(x)

    with pytest.raises(ValueError, match=r"one latent site 'z', and the model has the sites \['w', 'z'\]"):
        DefensiveMixture(guide, prior, codes=codes, model=more_sites).encode(x)
    mixture = DefensiveMixture(guide, prior, 0.2, widen=2, codes=codes, model=model, num_codes=3)
    assert "weight=0.2, widen=2, num_codes=3 of 6, latent_dim=3" in repr(mixture)
