"""The parts of the gap against closed forms on a linear-Gaussian model, whose posteriors are correlated normals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import LinearGaussian, within
from torch import nn

import pyrovae as pv
from pyrovae import guides, priors
from pyrovae.common.networks import Inputs
from pyrovae.evaluation import inference_gaps, local_search


@pytest.fixture
def linear_gaussian(double):
    """A mean-field posterior of this one leaves importance weights of finite variance: k = 0.43."""
    return LinearGaussian(scale=1.5)


def linear_guide(family, linear_gaussian):
    """A guide on the data themselves; its head gives a linear encoder."""
    return family(nn.Identity(), linear_gaussian.latent_dim, num_features=linear_gaussian.data_dim)


def exact_mean_field(linear_gaussian):
    """The best diagonal normal for every x: mean M (x - b), scale 1 / sqrt(precision)."""
    guide = linear_guide(guides.MeanFieldNormal, linear_gaussian)
    matrix = linear_gaussian.posterior_mean(torch.eye(5)) - linear_gaussian.posterior_mean(torch.zeros(5))
    with torch.no_grad():
        guide.head.weight[:3], guide.head.weight[3:] = matrix.T, 0.0
        guide.head.bias[:3] = linear_gaussian.posterior_mean(torch.zeros(5))
        guide.head.bias[3:] = linear_gaussian.mean_field_scale().log()
    return guide


def bad_encoder(family, linear_gaussian):
    """The same standard normal for every x."""
    guide = linear_guide(family, linear_gaussian)
    nn.init.zeros_(guide.head.weight)
    nn.init.zeros_(guide.head.bias)
    return guide


def mean_within(values, truth, stderrs, slack=0.0):
    stderr = stderrs.square().sum().sqrt().item() / len(stderrs)
    within(values.mean().item(), truth, stderr + slack)


def divergence(linear_gaussian, guide, x):
    with torch.no_grad():
        q = guide.posterior(x)
    covariance = q.variance.diag_embed() if isinstance(q, dist.Independent) else q.covariance_matrix
    exact = dist.MultivariateNormal(linear_gaussian.posterior_mean(x), linear_gaussian.covariance)
    return torch.distributions.kl_divergence(dist.MultivariateNormal(q.mean, covariance), exact)


def test_the_family_alone(linear_gaussian):
    """Mean field on a correlated posterior, the encoder exact: all of the gap is the family's."""
    x = linear_gaussian.data(20)
    found = pv.inference_gaps(linear_gaussian.model, exact_mean_field(linear_gaussian), x, num_particles=4000)
    true_gap = linear_gaussian.mean_field_gap()
    assert true_gap > 0.09
    mean_within(found.log_prob, linear_gaussian.log_prob(x).mean().item(), found.stderr, slack=2e-3)  # bias
    mean_within(found.approximation, true_gap, found.approximation_stderr, slack=2e-3)
    mean_within(found.amortization, 0.0, found.amortization_stderr)
    mean_within(found.best_elbo, linear_gaussian.log_prob(x).mean().item() - true_gap, found.best_elbo_stderr)
    assert found.approximation_stderr.square().sum().sqrt() / 20 < 0.003
    assert found.converged.all()
    assert (found.num_steps >= 200).all()  # two lengths at least, so that there is a gain to look at
    assert found.num_steps.double().mean() < 400
    assert torch.allclose(found.total, found.approximation + found.amortization)
    errors = (found.approximation - true_gap) / found.approximation_stderr
    assert 0.4 < errors.std() < 1.8


def test_the_encoder_alone(linear_gaussian):
    """Full rank, the encoder bad: all of the gap is the encoder's."""
    x = linear_gaussian.data(10)
    guide = bad_encoder(guides.FullRankNormal, linear_gaussian)
    true_gap = divergence(linear_gaussian, guide, x).mean().item()
    found = pv.inference_gaps(linear_gaussian.model, guide, x, num_particles=1000, learning_rate=0.1, max_num_steps=400)
    assert true_gap > 1.5
    assert found.converged.double().mean() > 0.5
    assert -0.001 < found.approximation.mean() < 0.06  # what the tolerance leaves
    mean_within(found.amortization, true_gap, found.amortization_stderr, slack=0.012)
    mean_within(found.log_prob, linear_gaussian.log_prob(x).mean().item(), found.stderr, slack=1e-3)


def test_both(linear_gaussian):
    x = linear_gaussian.data(10)
    guide = bad_encoder(guides.MeanFieldNormal, linear_gaussian)
    family = linear_gaussian.mean_field_gap()
    encoder = divergence(linear_gaussian, guide, x).mean().item() - family
    found = pv.inference_gaps(linear_gaussian.model, guide, x, num_particles=1000, learning_rate=0.1, max_num_steps=400)
    mean_within(found.approximation, family, found.approximation_stderr, slack=0.01)
    mean_within(found.amortization, encoder, found.amortization_stderr, slack=0.01)


def test_few_steps_are_reported(linear_gaussian):
    x = linear_gaussian.data(6)
    guide = bad_encoder(guides.FullRankNormal, linear_gaussian)
    found = pv.inference_gaps(linear_gaussian.model, guide, x, num_particles=50, max_num_steps=5)
    assert not found.converged.any()
    assert (found.num_steps == 5).all()
    assert "6 of 6 data had not converged after 5 steps" in found.summary()
    assert found.approximation.mean() > 1


@pytest.mark.parametrize(("learning_rate", "max_num_steps"), [(20.0, 400), (1e-5, 100)])
def test_steps_too_large_or_too_few_are_no_convergence(linear_gaussian, learning_rate, max_num_steps):
    guide = bad_encoder(guides.FullRankNormal, linear_gaussian)
    options = {"num_particles": 50, "learning_rate": learning_rate, "max_num_steps": max_num_steps}
    found = pv.inference_gaps(linear_gaussian.model, guide, linear_gaussian.data(4), **options)
    assert not found.converged.any()
    assert "had not converged" in found.summary()


def test_annealed_weights_are_averaged_in(linear_gaussian):
    x = linear_gaussian.data(8)
    guide = exact_mean_field(linear_gaussian)
    truth = linear_gaussian.log_prob(x)
    weights = truth + 0.5 * torch.randn(64, 8) - 0.125
    annealed = pv.LogMarginalLikelihood.from_annealed(weights, torch.full((8,), 0.65))
    pyro.set_rng_seed(3)
    alone = pv.inference_gaps(linear_gaussian.model, guide, x, num_particles=400)
    pyro.set_rng_seed(3)
    both = pv.inference_gaps(linear_gaussian.model, guide, x, num_particles=400, annealed=annealed)
    assert torch.allclose(both.log_prob.exp(), (alone.log_prob.exp() + annealed.log_prob.exp()) / 2)
    assert torch.equal(both.best_elbo, alone.best_elbo)
    assert ((both.log_prob - truth).abs() < 5 * both.stderr + 0.01).all()
    assert torch.allclose(both.stderr, (alone.stderr**2 + annealed.stderr**2).sqrt() / 2, rtol=0.3)


def test_the_error_of_what_shares_its_draws(double):
    """approximation_stderr against the spread of repeats: the same datum 400 times; with and without annealed weights."""
    linear_gaussian = LinearGaussian(scale=2.0)  # weights with a fourth moment, and no more
    x = linear_gaussian.data(1).repeat(400, 1)
    weights = linear_gaussian.log_prob(x) + 0.6 * torch.randn(40, 400) - 0.18
    for annealed in (None, pv.LogMarginalLikelihood.from_annealed(weights, torch.full((400,), 0.65))):
        found = pv.inference_gaps(
            linear_gaussian.model,
            exact_mean_field(linear_gaussian),
            x,
            num_particles=2000,  # with 200 the delta method is 15 % too low
            annealed=annealed,
            max_num_steps=1,
            learning_rate=1e-9,
        )
        for name in ("approximation", "amortization"):
            spread = getattr(found, name).std().item()
            assert getattr(found, f"{name}_stderr").mean().item() == pytest.approx(spread, rel=0.2), name


def test_any_guide_of_the_library(double):
    """Flows and hierarchies too; two latent sites, a flow whose context moves."""
    model, guide = pv.two_layer_vae((1, 2, 3), latent_dims=(3, 2), hidden_features=(6, 5))
    x = model.generate(5)
    found = pv.inference_gaps(model, guide, x, num_particles=200, max_num_steps=50)
    assert len(found) == 5
    assert found.amortization.mean() > -0.1
    flow = guides.NeuralSplineFlow(pv.nets.MLP(6, [8]), 2, hidden_features=(16,), num_context=4)
    model = pv.GenerativeModel(
        priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 6), (1, 2, 3))
    ).double()
    found = pv.inference_gaps(model, flow.double(), x, num_particles=100, max_num_steps=10)
    assert found.approximation.isfinite().all()
    assert "InferenceGaps(5 data, 100 particles" in repr(found)


def test_the_random_state_and_the_modules_are_left_as_they_were(linear_gaussian):
    guide = exact_mean_field(linear_gaussian)
    guide.train()
    before = [parameter.clone() for parameter in guide.parameters()]
    pv.inference_gaps(linear_gaussian.model, guide, linear_gaussian.data(3), num_particles=20, max_num_steps=3)
    assert guide.training
    assert all(torch.equal(first, second) for first, second in zip(before, guide.parameters(), strict=True))


def test_what_is_refused(linear_gaussian):
    x = linear_gaussian.data(4)
    guide = exact_mean_field(linear_gaussian)
    with pytest.raises(TypeError, match="guide must be a Pyro program to call, found int"):
        pv.inference_gaps(linear_gaussian.model, 3, x)
    other = pv.LogMarginalLikelihood.from_annealed(torch.randn(9, 3), torch.full((3,), 0.65))
    for options, match in (
        ({"num_particles": 1}, "one particle"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"max_num_steps": 0}, "max_num_steps"),
        ({"compile": "yes"}, "compile must be True, False or 'auto', found 'yes'"),
        ({"annealed": other}, "the same 4 data, found LogMarginalLikelihood\\(3 data"),
    ):
        with pytest.raises(ValueError, match=match):
            pv.inference_gaps(linear_gaussian.model, guide, x, **options)
    mixed = guides.DefensiveMixture(guide, priors.StandardNormal(3))
    with pytest.raises(ValueError, match="reparameterised"):
        pv.inference_gaps(linear_gaussian.model, mixed, x, num_particles=20)


def search(model, guide, num_data, **options):
    options = local_search.SearchOptions(num_particles=2, learning_rate=0.05, **options)
    return local_search.search_for(model, guide, num_data, options)


def test_gain_uses_the_same_noise(linear_gaussian):
    """Of parameters against themselves: exactly nothing."""
    x = linear_gaussian.data(7)
    guide = exact_mean_field(linear_gaussian)
    steps = search(linear_gaussian.model, guide, 7, tolerance=0.05, max_num_steps=100, data_batch_size=7, compile=False)
    parameters = guide.encode(x).detach()
    assert torch.equal(steps._gain(Inputs(x, None, None), parameters, parameters), torch.zeros(7))
    worse = parameters + 0.3
    gain = steps._gain(Inputs(x, None, None), worse, parameters)
    assert (gain > 0.05).all()


def test_compiled_and_in_batches(double, uncompiled):
    """Full batches by one recording, what is left over eagerly: the parameters and steps that the eager steps find."""
    model = pv.GenerativeModel(priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 6), 6)).double()
    guide = guides.MeanFieldNormal(pv.nets.MLP(6, [8]), 2).double()
    x = model.generate(11)
    found = {}
    for compile in (False, True):
        steps = search(model, guide, 11, tolerance=0.02, max_num_steps=400, data_batch_size=4, compile=compile)
        settled = []
        pyro.set_rng_seed(8)
        found[compile] = *steps.best(Inputs(x, None, None), settled.append), sum(settled)
        recorded = steps.compiled._recorded
        assert recorded is None if not compile else recorded.num_recordings == 1
    parameters, num_steps, _, settled = found[True]
    assert torch.allclose(parameters, found[False][0], atol=1e-8)
    assert torch.equal(num_steps, found[False][1])
    assert settled == 11
    assert num_steps.unique().tolist() != [400]  # some settle before others


def test_programs_of_known_parameters_can_be_recorded(double, uncompiled, monkeypatch, chunks):
    """As `compile="auto"` does where there is much to evaluate: the eager numbers, the encoder left out."""
    model = pv.GenerativeModel(priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 6), 6)).double()
    guide = guides.FullRankNormal(pv.nets.MLP(6, [8]), 2).double()
    x = model.generate(7)
    parameters = guide.encode(x).detach() + 0.3
    results = []
    for compile in (False, True):
        pyro.set_rng_seed(8)
        results.append(
            pv.log_weights(
                *local_search.given_encoding(model, guide),
                x,
                parameters,
                num_particles=20,
                particle_batch_size=4,
                compile=compile,
            )
        )
    assert len(chunks) == 4
    assert torch.allclose(*results, rtol=1e-10)
    monkeypatch.setattr(guide, "encode", None)  # not asked again
    pv.log_weights(*local_search.given_encoding(model, guide), x, parameters, num_particles=3)


def test_an_encoding_that_is_a_view_of_a_parameter(linear_gaussian):
    """Refinement works on a copy."""

    class Shared(guides.Guide):
        def __init__(self):
            super().__init__(3)
            self.parameters_of_all = nn.Parameter(torch.zeros(1, 6))

        def encode(self, x):
            return self.parameters_of_all.expand(len(x), 6)

        def distribution(self, parameters):
            loc, log_scale = parameters.chunk(2, -1)
            return dist.Normal(loc, log_scale.exp()).to_event(1)

    guide = Shared()
    found = pv.inference_gaps(linear_gaussian.model, guide, linear_gaussian.data(4), num_particles=50, max_num_steps=20)
    assert (guide.parameters_of_all == 0).all()
    assert found.amortization.mean() > 0.1


def test_an_interrupted_evaluation_gives_the_first_data(linear_gaussian, monkeypatch):
    original, lengths = inference_gaps.log_marginal_likelihood, iter([4, 3])
    monkeypatch.setattr(
        inference_gaps, "log_marginal_likelihood", lambda *args, **options: original(*args, **options)[: next(lengths)]
    )
    x = linear_gaussian.data(6)
    annealed = pv.LogMarginalLikelihood.from_annealed(torch.randn(9, 6), torch.full((6,), 0.65))
    found = pv.inference_gaps(
        linear_gaussian.model,
        exact_mean_field(linear_gaussian),
        x,
        num_particles=20,
        max_num_steps=2,
        annealed=annealed,
    )
    for name in ("log_prob", "approximation_stderr", "amortization", "num_steps", "converged", "pareto_k"):
        assert getattr(found, name).shape == (3,), name
