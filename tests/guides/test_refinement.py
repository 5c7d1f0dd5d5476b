"""Guides made better for evaluation: refined per datum to the best of their family, and mixed with the prior."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import Trace_ELBO
from shared.parts import GUIDES, SHAPE
from torch import nn

import pyrovae as pv
from pyrovae import guides, likelihoods, nets, priors
from pyrovae.guides import DefensiveMixture, Refined, refinement


def normal_guide(family=guides.FullRankNormal, latent_dim=3, data_dim=5):
    """An untrained guide, the same normal about 0 for all data: a gap of many nats."""
    guide = family(nn.Identity(), latent_dim, num_features=data_dim)
    nn.init.zeros_(guide.head.weight)
    nn.init.zeros_(guide.head.bias)
    return guide


def true_gap(linear_gaussian, guide, x):
    """KL(q || p(z|x)) per datum, in closed form."""
    with torch.no_grad():
        posterior = guide.posterior(x)
    covariance = (
        posterior.variance.diag_embed() if isinstance(posterior, dist.Independent) else posterior.covariance_matrix
    )
    exact = dist.MultivariateNormal(linear_gaussian.posterior_mean(x), linear_gaussian.covariance)
    return torch.distributions.kl_divergence(dist.MultivariateNormal(posterior.mean, covariance), exact)


# Refined


def test_refinement_reaches_the_best_of_the_family(linear_gaussian):
    x = linear_gaussian.data(6)
    for family, best in ((guides.FullRankNormal, 0.0), (guides.MeanFieldNormal, linear_gaussian.mean_field_gap())):
        guide = normal_guide(family)
        gaps = [true_gap(linear_gaussian, guide, x)]
        for num_steps in (10, 50, 250):
            refined = Refined(guide, linear_gaussian.model, num_steps, learning_rate=0.1, num_particles=20)
            gaps.append(true_gap(linear_gaussian, refined, x))
        means = [gap.mean().item() for gap in gaps]
        assert means[0] > 3
        assert means == sorted(means, reverse=True)
        assert torch.allclose(gaps[-1], torch.tensor(best), atol=0.01)


def test_evidence_with_a_refined_guide(linear_gaussian):
    """Exact, from a start whose own estimate is nats off; and the ELBO is the exact evidence minus the exact gap."""
    x = linear_gaussian.data(10)
    guide = normal_guide()
    refined = Refined(guide, linear_gaussian.model, 60, learning_rate=0.1)
    exact = linear_gaussian.log_prob(x).mean().item()
    lml = pv.log_marginal_likelihood(linear_gaussian.model, refined, x, num_particles=500)
    within(lml.mean, exact, lml.mean_mc_stderr)
    gap = true_gap(linear_gaussian, refined, x)
    within(lml.elbo.mean().item(), exact - gap.mean().item(), lml.elbo_stderr.square().sum().sqrt().item() / len(x))
    assert pv.log_marginal_likelihood(linear_gaussian.model, guide, x, num_particles=500).elbo.mean() < exact - 3


def test_few_steps_leave_a_lower_bound(linear_gaussian):
    """E[w] = p(x) for a half-refined guide, whose weights vary: its draws have nothing of the noise that refined it."""
    x = linear_gaussian.data(2)
    refined = Refined(
        normal_guide(guides.MeanFieldNormal), linear_gaussian.model, 10, learning_rate=0.05, num_particles=1
    )
    repeated = x.repeat_interleave(500, 0)
    log_weights = pv.log_weights(linear_gaussian.model, refined, repeated, num_particles=40).T.reshape(2, -1)
    ratio = (log_weights - linear_gaussian.log_prob(x).unsqueeze(1)).exp()
    assert ratio.std(1).min() > 0.2
    for row in ratio:
        within(row.mean().item(), 1.0, row.std().item() / math.sqrt(len(row)))


@pytest.mark.parametrize("name", [name for name in GUIDES if name not in ("Refined", "DefensiveMixture")])
def test_a_datum_is_refined_for_itself(name, double, monkeypatch):
    """q(z|x) depends on no other datum, on no seed, and on how often it was asked for; flows too."""
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE)).double()
    x = model.generate(7)
    guide = GUIDES[name]().double()
    refined = Refined(guide, model, 15)
    seeds = []
    monkeypatch.setattr(refinement, "seed_generators", lambda *args: seeds.append(args))
    with torch.no_grad():
        together = refined.encode(x)
        torch.manual_seed(99)
        assert torch.allclose(torch.cat([refined.encode(part) for part in x.split([1, 4, 2])]), together, atol=1e-9)
        assert torch.allclose(refined.encode(x.flip(0)).flip(0), together, atol=1e-9)
        assert not torch.allclose(together, guide.encode(x), atol=1e-3)
    assert not seeds  # drawn for all data at once, not for one after the other


@pytest.mark.parametrize("name", [name for name in GUIDES if name not in ("Refined", "DefensiveMixture")])
def test_recorded_refinement_is_that_of_the_eager_steps(name, double, uncompiled):
    """Every family; recorded once for so many data, others eagerly; weights are read at every call."""
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE)).double()
    guide, x = GUIDES[name]().double(), model.generate(5)
    eager = Refined(guide, model, 15)
    recorded = eager.compiled(5)
    with torch.no_grad():
        for _ in range(3):
            assert torch.allclose(recorded.encode(x), eager.encode(x), atol=1e-9)
            assert not torch.allclose(recorded.encode(x), guide.encode(x), atol=1e-3)
            for parameter in (*guide.parameters(), *model.parameters()):
                parameter.mul_(0.9)
            x = x.flip(0)
        state = torch.get_rng_state()
        assert torch.equal(recorded.encode(x[:2]), eager.encode(x[:2]))
        assert torch.equal(torch.get_rng_state(), state)
    assert recorded._recorded.num_recordings == 1
    assert eager._recorded is None


def test_refinement_compiled(double):
    """By Inductor."""
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE)).double()
    eager, x = Refined(GUIDES["FullRankNormal"]().double(), model, 15), model.generate(5)
    compiled = eager.compiled(5)
    with torch.no_grad():
        assert torch.allclose(compiled.encode(x), eager.encode(x), atol=1e-9)
    assert compiled._recorded is not None


@pytest.mark.parametrize("mixed", [False, True])
def test_each_evaluation_records_refinement_anew(mixed, double, uncompiled, monkeypatch):
    """For blocks of one size alone, not for the looks at the program; attributes may change between evaluations."""
    recordings, original = [], refinement.record
    monkeypatch.setattr(refinement, "record", lambda *args: (recordings.append(1), original(*args))[1])
    likelihood = likelihoods.Normal(nets.MLP(2, [8], 6), 6, scale=1.0)
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihood).double()
    guide, x = guides.MeanFieldNormal(nets.MLP(6, [8]), 2).double(), torch.randn(20, 6)
    refined = Refined(guide, model, 15)
    if mixed:
        refined = DefensiveMixture(refined, model.prior)
    for count, scale in ((1, 1.0), (2, 0.1)):
        likelihood.scale = scale
        found = []
        for compile in (False, True):
            pyro.set_rng_seed(4)
            found.append(pv.log_weights(model, refined, x, num_particles=20, data_batch_size=8, compile=compile))
        assert torch.allclose(*found, atol=1e-6)
        assert len(recordings) == count


def test_recorded_refinement_refuses_what_the_eager_one_refuses(uncompiled):
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE))
    compiled = Refined(GUIDES["MeanFieldNormal"](), model, 5).compiled(5)
    with pytest.raises(ValueError, match="pixels are 0 or 1"):
        compiled.encode(3 * torch.rand(5, *SHAPE))


def test_nothing_else_changes(linear_gaussian):
    """Parameters, gradients, modes, the random state: evaluation leaves them as they are, with and without gradients."""
    likelihood = likelihoods.Bernoulli(nn.Sequential(nn.Linear(2, 12), nn.BatchNorm1d(12), nn.Dropout(0.5)), SHAPE)
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihood)
    guide = guides.MeanFieldNormal(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8)), 2, num_features=8)
    refined = Refined(guide, model, 5)
    x = model.generate(6)
    for part in (model, guide):
        part.train()
        for parameter in part.parameters():
            parameter.grad = torch.ones_like(parameter)
    before = [tensor.clone() for part in (model, guide) for tensor in part.state_dict().values()]
    random_state = torch.get_rng_state()
    model_state = [tensor.clone() for tensor in model.state_dict().values()]
    refined.eval()
    model.train()
    refined.encode(x)  # BatchNorm in the model saw nothing of it
    assert all(
        torch.equal(first, second) for first, second in zip(model_state, model.state_dict().values(), strict=True)
    )
    assert all(module.training for module in model.modules())
    guide.train()
    with torch.no_grad(), pv.programs.reach.evaluation_mode(refined):
        encoded = refined.encode(x)
    assert not encoded.requires_grad
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.inference_mode():
        pv.log_weights(model, refined, x, num_particles=4)
    pv.log_marginal_likelihood(model, refined, x, num_particles=4)
    after = [tensor for part in (model, guide) for tensor in part.state_dict().values()]
    assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))
    assert all((parameter.grad == 1).all() for part in (model, guide) for parameter in part.parameters())
    assert all(module.training for part in (model, guide) for module in part.modules())


def test_refinement_is_not_seen_by_handlers(linear_gaussian):
    """A trace around it holds the guide's one site, and its steps run the model as if alone: inside a plate of that name too."""
    refined = Refined(normal_guide(), linear_gaussian.model, 2)
    x = linear_gaussian.data(3)

    def guide_of_a_user(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=0.5):
            return pyro.sample("z", refined.posterior(x))

    alone = refined.encode(x)
    for guide in (refined, guide_of_a_user):
        trace = poutine.trace(guide).get_trace(x)
        assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} <= {"data", "z"}
        assert torch.equal(trace.nodes["z"]["fn"].mean, refined.distribution(alone).mean)
    with pyro.plate("data", 3), pytest.raises(ValueError, match="duplicate plate"):  # the plates are back
        linear_gaussian.model(x)


def test_plate_scale_is_left_out_of_refinement(linear_gaussian):
    """A subsampled plate multiplies log p(x, z) and not log q: with it in, q would shrink to a point."""
    x = linear_gaussian.data(4)

    def scaled(x):
        with poutine.scale(scale=1000.0):
            return linear_gaussian.model(x)

    guide = normal_guide()
    with torch.no_grad():
        plain = Refined(guide, linear_gaussian.model, 30).encode(x)
        assert torch.allclose(Refined(guide, scaled, 30).encode(x), plain)


def test_masked_data_are_left_out_of_refinement(linear_gaussian):
    """With every pixel masked, the best q is the prior."""
    x = linear_gaussian.data(2)

    def masked(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            with poutine.mask(mask=False):
                pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 0.1).expand([len(x), 5]).to_event(1), obs=x)

    guide = normal_guide()
    nn.init.ones_(guide.head.bias)
    posterior = Refined(guide, masked, 200, num_particles=50).posterior(x)
    assert torch.allclose(posterior.mean, torch.zeros(2, 3), atol=0.1)
    assert torch.allclose(posterior.covariance_matrix, torch.eye(3).expand(2, 3, 3), atol=0.2)


@pytest.mark.parametrize("top_down", [False, True])
def test_refinement_of_layers(top_down, double):
    """Guides of several sites: what they encode is refined, the layers stay; the ELBO is the grid's."""

    def layer(width):
        normal = pv.ConditionalNormal(nn.Identity(), 1, num_features=width)
        nn.init.zeros_(normal.head.weight[1])  # a scale exp(z) has an infinite ELBO
        return normal

    likelihood = likelihoods.Bernoulli(nets.MLP(1, [8], 12), SHAPE)
    model = pv.HierarchicalModel(priors.StandardNormal(1), [layer(1)], likelihood).double()
    first = guides.MeanFieldNormal(nets.MLP(12, [8]), 1)
    guide = pv.TopDownGuide(first, [layer(9)], nets.MLP(12, [8])) if top_down else pv.BottomUpGuide(first, [layer(1)])
    guide = guide.double()
    x = model.generate(3)
    refined = Refined(guide, model, 60)
    axis = torch.linspace(-8, 8, 161)
    grid = torch.cartesian_prod(axis, axis)
    log_joint = model.latent_prior().log_prob(grid).unsqueeze(1) + model.likelihood_at(grid.unsqueeze(1)).log_prob(x)
    with torch.no_grad():
        log_q = refined.posterior(x).log_prob(grid.unsqueeze(1))
    exact = (log_q.exp() * (log_joint - log_q)).sum(0) * (axis[1] - axis[0]) ** 2
    before, after = (pv.log_marginal_likelihood(model, g, x, num_particles=2000) for g in (guide, refined))
    assert after.elbo.mean() > before.elbo.mean() + 0.05
    for value, elbo, stderr in zip(after.elbo.tolist(), exact.tolist(), after.elbo_stderr.tolist(), strict=True):
        within(value, elbo, stderr)


def test_draws_that_vmap_cannot_share(caplog):
    """A guide of the user's, with Gamma draws: one by one, each datum still refined for itself, and not recorded."""

    class GammaGuide(guides.EncoderGuide):
        def __init__(self):
            super().__init__(nn.Identity(), 1, 1, num_parameters=2)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

        def distribution(self, parameters):
            concentration, rate = parameters.exp().unsqueeze(-1).unbind(-2)
            return dist.Gamma(concentration, rate).to_event(1)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0).expand([1]).to_event(1))
            pyro.sample("x", dist.Poisson(z).to_event(1), obs=x)

    x = torch.tensor([[1.0], [6.0], [3.0]])
    refined = Refined(GammaGuide(), model, 300, learning_rate=0.1, num_particles=50)
    with torch.no_grad():
        posterior = refined.posterior(x)
        assert torch.allclose(refined.encode(x[1:]), refined.encode(x)[1:], atol=1e-4)
    # The exact posterior is Gamma(2 + x, 1 + 1).
    assert torch.allclose(posterior.mean, (2 + x) / 2, rtol=0.05)
    assert torch.allclose(posterior.variance, (2 + x) / 4, rtol=0.1)
    refined = Refined(GammaGuide(), model, 3).compiled(3)
    found = [refined.encode(x) for _ in range(2)]
    assert torch.equal(*found)
    lines = [record.message for record in caplog.records if record.name == "pyrovae"]
    assert [line.partition(":")[0] for line in lines] == ["runs eagerly"]


def test_gradient_in_training_is_that_at_the_refined_parameters(linear_gaussian):
    """First order: the encoder's bias gets, summed over data, d ELBO / d lambda where refinement ended."""
    x = linear_gaussian.data(4)
    guide = normal_guide(guides.MeanFieldNormal)
    refined = Refined(guide, linear_gaussian.model, 7)
    torch.manual_seed(5)
    Trace_ELBO().loss_and_grads(linear_gaussian.model, refined, x)
    with torch.no_grad():
        parameters = refined.encode(x)
    parameters.requires_grad_()
    torch.manual_seed(5)
    Trace_ELBO().differentiable_loss(linear_gaussian.model, refined.given(parameters), x).backward()
    assert torch.allclose(guide.head.bias.grad, parameters.grad.sum(0))
    assert torch.allclose(guide.head.weight.grad, parameters.grad.T @ x)


@pytest.mark.slow
def test_training_with_refinement(double):
    """The model and the encoder both move, also where a compiled step was asked for: that one steps aside."""
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE)).double()
    refined = Refined(GUIDES["MeanFieldNormal"]().double(), model, 3)
    x = (torch.rand(20, *SHAPE) < torch.linspace(0.05, 0.95, 12).reshape(SHAPE)) * 1.0
    history = pv.fit(
        model, refined, x, epochs=40, batch_size=20, learning_rate=0.05, compile=True, progress=False
    ).history
    assert history[-1]["elbo"] > history[0]["elbo"] + 1


def test_looking_at_a_refined_guide_takes_few_steps(linear_gaussian, monkeypatch):
    """Each block is refined once, and looking at the pair takes two refinements more and a few steps."""
    counted = []
    log_joint = Refined._log_joint
    monkeypatch.setattr(Refined, "_log_joint", lambda self, *args: (counted.append(1), log_joint(self, *args))[1])
    refined = Refined(normal_guide(), linear_gaussian.model, 100)
    mixture = DefensiveMixture(refined, priors.StandardNormal(3).double())
    for guide in (refined, mixture):
        counted.clear()
        pv.log_weights(linear_gaussian.model, guide, linear_gaussian.data(10), num_particles=5, data_batch_size=5)
        assert len(counted) < 600


def test_data_that_influence_each_other_are_not_cut(linear_gaussian):
    """A model that couples data couples what is refined: found in two steps, and refused where blocks were asked for."""
    likelihood = likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE)
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihood)

    def coupled(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", likelihood(z - z.mean(-2, keepdim=True)), obs=x)

    x = model.generate(10)
    refined = Refined(GUIDES["MeanFieldNormal"](), coupled, 20)
    with pytest.raises(ValueError, match="cannot be fed its data in blocks"):
        pv.log_weights(model, refined, x, num_particles=4, data_batch_size=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_refinement_on_a_gpu():
    """Each datum for itself, its ELBO better than before, and the generator left alone."""
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE)).cuda()
    x = model.generate(6)
    guide = GUIDES["FullRankNormal"]().cuda()
    refined = Refined(guide, model, 50)
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    with torch.no_grad():
        together = refined.encode(x)
        assert torch.allclose(torch.cat([refined.encode(part) for part in x.split([1, 5])]), together, atol=1e-3)
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    elbos = [pv.log_marginal_likelihood(model, g, x, num_particles=500).elbo.mean() for g in (guide, refined)]
    assert elbos[1] > elbos[0]


def test_errors_of_refinement(linear_gaussian):
    guide, model, x = normal_guide(), linear_gaussian.model, linear_gaussian.data(2)
    with pytest.raises(ValueError, match="num_steps must be 1 or more, found 0"):
        Refined(guide, model, 0)
    with pytest.raises(ValueError, match="num_particles must be 1 or more"):
        Refined(guide, model, 1, num_particles=0)
    with pytest.raises(ValueError, match="learning_rate must be positive, found 0"):
        Refined(guide, model, 1, learning_rate=0)
    with pytest.raises(TypeError, match=r"must be a pyrovae.guides.Guide, .* found function"):
        Refined(lambda x: None, model, 1)
    with pytest.raises(TypeError, match="model must be a Pyro program"):
        Refined(guide, None, 1)
    mixture = DefensiveMixture(guide, priors.StandardNormal(3))
    with pytest.raises(ValueError, match="DefensiveMixture has none at site 'z': refine a guide"):
        Refined(mixture, model, 1).encode(x)
    with pytest.raises(ValueError, match=r"sites of its guide, \['z'\]; found \['w', 'z'\]"):
        Refined(guide, lambda x: (pyro.sample("w", dist.Normal(0.0, 1.0)), model(x)), 1).encode(x)
    with pytest.raises(ValueError, match=r"sites of its guide, \['z'\]; found \['w'\]"):
        Refined(guide, lambda x: pyro.sample("w", dist.Normal(0.0, 1.0)), 1).encode(x)
    with pytest.raises(RuntimeError, match="not finite: lower learning_rate"):
        Refined(guide, model, 2).encode(torch.full((2, 5), torch.nan))


def test_refined_repr_and_files(tmp_path):
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE))
    refined = Refined(GUIDES["FullRankNormal"](), model, 4)
    assert "Refined(\n  num_steps=4, latent_dim=2, " in repr(refined)
    pv.save(tmp_path / "pair.pt", model, refined)
    other_model = pv.GenerativeModel(priors.StandardNormal(2), likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE))
    other = Refined(GUIDES["FullRankNormal"](), other_model, 4)
    pv.load(tmp_path / "pair.pt", other_model, other)
    x = model.generate(3)
    assert torch.equal(other.encode(x), refined.encode(x))
    assert other.model is other_model


# DefensiveMixture


def narrow_and_off(scale):
    """A guide at z = 2 +- scale whatever the data, for posteriors that lie elsewhere."""
    guide = guides.MeanFieldNormal(nn.Identity(), 1, num_features=1)
    with torch.no_grad():
        guide.head.weight.zero_()
        guide.head.bias.copy_(torch.tensor([2.0, math.log(scale)]))
    return guide


def coin_model(x):
    """z ~ N(0, 1), x | z ~ Bernoulli(sigmoid(3 z)): p(x) = 1/2 by symmetry."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=3 * z).to_event(1), obs=x)


def test_mixture_density(double):
    """Exactly that of a mixture, which torch has for components of one family."""
    guide = narrow_and_off(0.3)
    mixture = DefensiveMixture(guide, priors.StandardNormal(1).double(), weight=0.2)
    posterior = mixture.posterior(torch.ones(2, 1))
    normals = dist.Normal(torch.tensor([2.0, 0.0]), torch.tensor([0.3, 1.0]))
    expected = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.8, 0.2])), normals)
    z = torch.linspace(-4, 4, 33).reshape(-1, 1, 1).expand(33, 2, 1)
    assert torch.allclose(posterior.log_prob(z), expected.log_prob(z).squeeze(-1), atol=1e-12)
    assert torch.allclose(posterior.mean, expected.mean.expand(2, 1))
    draws = posterior.expand((5000, 2)).sample()
    share = (draws < 0.5).double().mean(0).squeeze(-1)  # 5 standard deviations of the guide below its mean
    truth = expected.cdf(torch.tensor(0.5)).item()
    for column in share:
        within(column.item(), truth, math.sqrt(truth * (1 - truth) / 5000))


def test_weights_are_bounded_where_the_guide_misses(double):
    """p(x, z) / q'(z) <= p(x|z) / weight <= 1 / weight; log p(x) is right although the guide alone is nowhere near."""
    x = torch.zeros(3, 1)
    guide = narrow_and_off(0.1)
    mixture = DefensiveMixture(guide, priors.StandardNormal(1).double(), weight=0.1)
    log_weights = pv.log_weights(coin_model, mixture, x, num_particles=4000)
    assert log_weights.max() <= math.log(1 / 0.1) + 1e-12
    lml = pv.log_marginal_likelihood(coin_model, mixture, x, num_particles=4000)
    assert lml.mean_mc_stderr < 0.05
    within(lml.mean, math.log(0.5), lml.mean_mc_stderr)
    alone = pv.log_marginal_likelihood(coin_model, guide, x, num_particles=4000)
    assert alone.mean < math.log(0.5) - 2  # and its error bars would not say so


def test_supports_that_differ(double):
    """Draws of the one component where the other has no mass: density of the other alone, a weight of 0 outside the prior."""

    class UniformPrior(nn.Module):
        def forward(self):
            return dist.Uniform(torch.zeros(1), torch.ones(1)).to_event(1)

    class BetaGuide(guides.Guide):
        def encode(self, x):
            return torch.zeros(len(x), 1)

        def distribution(self, parameters):
            return dist.Beta(parameters.new_full((len(parameters), 1), 2.0), 3.0).to_event(1)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", UniformPrior()())
            pyro.sample("x", dist.Bernoulli(z).to_event(1), obs=x)

    x = torch.tensor([[1.0], [0.0]])
    for guide in (BetaGuide(1), narrow_and_off(2.0)):
        mixture = DefensiveMixture(guide, UniformPrior(), weight=0.3)
        lml = pv.log_marginal_likelihood(model, mixture, x, num_particles=4000)
        for value, stderr in zip(lml.log_prob.tolist(), lml.stderr.tolist(), strict=True):
            within(value, math.log(0.5), stderr)
    outside = DefensiveMixture(BetaGuide(1), UniformPrior()).posterior(x)
    with pyro.validation_enabled(False):
        assert (outside.log_prob(torch.full((2, 1), 1.5)) == -torch.inf).all()


def test_refined_and_defensive_together(linear_gaussian):
    x = linear_gaussian.data(4)
    refined = Refined(normal_guide(), linear_gaussian.model, 60, learning_rate=0.1)
    mixture = DefensiveMixture(refined, priors.StandardNormal(3).double(), weight=0.1)
    lml = pv.log_marginal_likelihood(linear_gaussian.model, mixture, x, num_particles=1000)
    within(lml.mean, linear_gaussian.log_prob(x).mean().item(), lml.mean_mc_stderr)


def test_errors_of_mixtures():
    guide = normal_guide()
    for weight in (0, 1, -0.1, math.nan):
        with pytest.raises(ValueError, match="weight must lie between 0 and 1"):
            DefensiveMixture(guide, priors.StandardNormal(3), weight)
    with pytest.raises(ValueError, match=r"found event shape \(2,\) and latent_dim=3"):
        DefensiveMixture(guide, priors.StandardNormal(2))
    with pytest.raises(TypeError, match=r"must be a pyrovae.guides.Guide"):
        DefensiveMixture(nn.Identity(), priors.StandardNormal(3))
    with pytest.raises(NotImplementedError):
        DefensiveMixture(guide, priors.StandardNormal(3)).posterior(torch.zeros(2, 5)).rsample()
    assert "weight=0.25, latent_dim=3" in repr(DefensiveMixture(guide, priors.StandardNormal(3), 0.25))
