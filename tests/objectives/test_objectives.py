"""Objectives against what is exact: quadrature over the guide's noise, enumeration, closed forms.

No gradient is compared with a long run: each datum of a batch is given one node of the quadrature (or one of the
configurations of discrete draws) and parameters of its own, so that the gradients of a single call, weighted, are the
estimator's expectation.
"""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from shared.parts import LATENT_DIM, PRIORS, SHAPE
from torch import nn
from torch.distributions import constraints

import pyrovae as pv
from pyrovae.distributions.zuko_adapter import FlowDistribution, import_zuko
from pyrovae.objectives import (
    VIMCO,
    AnalyticKL,
    DoublyReparameterised,
    ImportanceWeighted,
    MonteCarloKL,
    StickingTheLanding,
)

KL_OBJECTIVES = [MonteCarloKL, AnalyticKL, StickingTheLanding]
WEIGHT_OBJECTIVES = [ImportanceWeighted, DoublyReparameterised, VIMCO]


def gradients(objective, model, guide, parameters, *args):
    loss = objective.differentiable_loss(model, guide, *args)
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def fix_noise(monkeypatch, noise):
    """Normal draws become `noise` wherever that has their shape; the last of a list of noises is for the last draw."""
    queue = list(noise) if isinstance(noise, list) else None

    def standard_normal(shape, dtype, device):
        if queue is not None and queue and shape == queue[0].shape:
            return queue.pop(0)
        if queue is None and shape == noise.shape:
            return noise
        return torch.randn(shape, dtype=dtype, device=device)

    monkeypatch.setattr("torch.distributions.normal._standard_normal", standard_normal)


def quadrature(num_noises, num_nodes):
    """Nodes (num_noises, K) and weights (K,) of the expectation over independent standard normal noises."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    nodes, weights = torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())
    grid = torch.cartesian_prod(*[nodes] * num_noises).reshape(-1, num_noises)
    weight = torch.cartesian_prod(*[weights] * num_noises).reshape(-1, num_noises).prod(1)
    return grid.T.contiguous(), weight


# --- a model with a curved likelihood, and a prior that shares the guide's parameters -----------------------------------


class Curved:
    """z ~ sum_j 1/2 N(a u_j + b, s) as a VampPrior, or N(0, 1); x | z ~ N(z + c z^2, 0.7); q(z|x) = N(a x + b, s).

    Every parameter has one value per datum.
    """

    def __init__(self, num_data, shared):
        values = {"a": 0.4, "b": -0.3, "log_s": -0.4, "c": 0.25}
        self.parameters = {name: torch.full((num_data,), value).requires_grad_() for name, value in values.items()}
        self.shared = shared
        self.x = torch.full((num_data,), 1.3)

    def encode(self, x):
        return self.parameters["a"] * x + self.parameters["b"], self.parameters["log_s"].exp()

    def prior(self):
        if not self.shared:
            return dist.Normal(torch.zeros_like(self.x), 1.0)
        encoded = [self.encode(torch.full_like(self.x, pseudo_input)) for pseudo_input in (-1.0, 2.0)]
        loc, scale = (torch.stack(pair, -1) for pair in zip(*encoded, strict=True))
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros_like(loc)), dist.Normal(loc, scale))

    def model(self):
        with pyro.plate("data", len(self.x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z + self.parameters["c"] * z**2, 0.7), obs=self.x)

    def guide(self):
        with pyro.plate("data", len(self.x)):
            pyro.sample("z", dist.Normal(*self.encode(self.x)))

    def expected(self, objective, weights):
        """The expectation of the objective's gradient."""
        found = gradients(objective, self.model, self.guide, list(self.parameters.values()))
        return {name: (weights * grad).sum().item() for name, grad in zip(self.parameters, found, strict=True)}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("make", "truth", "num_particles"),
    [(StickingTheLanding, MonteCarloKL, 1), (DoublyReparameterised, ImportanceWeighted, 2)],
)
def test_gradients_without_score_are_unbiased(make, truth, num_particles, shared, double, monkeypatch):
    """Expected gradient, by quadrature, of the estimator and of the bound itself; also where the prior is a VampPrior."""
    noise, weights = quadrature(num_particles, 140)
    curved = Curved(len(weights), shared)
    fix_noise(monkeypatch, noise if num_particles > 1 else noise[0])
    exact = curved.expected(truth(num_particles=num_particles), weights)
    found = curved.expected(make(num_particles=num_particles), weights)
    assert found == pytest.approx(exact, rel=1e-5, abs=1e-7)
    assert all(abs(value) > 0.01 for value in exact.values())


def test_sticking_the_landing_is_unbiased_under_every_weight(double, monkeypatch):
    noise, weights = quadrature(1, 120)
    curved = Curved(len(weights), False)
    fix_noise(monkeypatch, noise[0])
    exact = curved.expected(MonteCarloKL(beta=0.3), weights)
    assert curved.expected(StickingTheLanding(beta=0.3), weights) == pytest.approx(exact, rel=1e-6)


class Layers:
    """p(z2) p(z1|z2) p(x|z1) and the bottom-up guide q(z1|x) q(z2|z1): what is drawn first is the other's child."""

    def __init__(self, num_data):
        values = {"a": 0.5, "b": 0.2, "log_s": -0.4, "log_r": -0.8, "d": 0.6}
        self.parameters = {name: torch.full((num_data,), value).requires_grad_() for name, value in values.items()}
        self.x = torch.full((num_data,), 0.9)

    def p(self, z1, z2):
        d = self.parameters["d"]
        return (
            dist.Normal(0.0, 1.0).log_prob(z2)
            + dist.Normal(d * z2, 0.8).log_prob(z1)
            + dist.Normal(z1 + 0.2 * z1**2, 0.7).log_prob(self.x)
        )

    def q(self, parameters, z1=None, z2=None, noise=None):
        """The draws, or the log density of values, under `parameters`."""
        a, b, s, r = (parameters[name] for name in ("a", "b", "log_s", "log_r"))
        first = dist.Normal(a * self.x + b, s.exp())
        if noise is not None:
            z1 = first.loc + first.scale * noise[0]
        second = dist.Normal(b * z1**2 + z1, r.exp())
        if noise is not None:
            return z1, second.loc + second.scale * noise[1]
        return first.log_prob(z1) + second.log_prob(z2)

    def model(self):
        with pyro.plate("data", len(self.x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(self.parameters["d"] * z2, 0.8))
            pyro.sample("x", dist.Normal(z1 + 0.2 * z1**2, 0.7), obs=self.x)

    def guide(self):
        a, b, s, r = (self.parameters[name] for name in ("a", "b", "log_s", "log_r"))
        with pyro.plate("data", len(self.x)):
            z1 = pyro.sample("z1", dist.Normal(a * self.x + b, s.exp()))
            pyro.sample("z2", dist.Normal(b * z1**2 + z1, r.exp()))


@pytest.mark.parametrize("vectorize_particles", [True, False])
@pytest.mark.parametrize("make", [StickingTheLanding, DoublyReparameterised])
def test_layers_by_hand_with_detached_parameters(make, vectorize_particles, double, monkeypatch):
    """The same noise through the formula with a detached copy of the parameters in log q, layer upon layer."""
    layers = Layers(7)
    noise = torch.randn(2, 3, 7)
    objective = make(3, vectorize_particles=vectorize_particles)
    objective.loss(layers.model, layers.guide)  # looks at the programs
    fix_noise(monkeypatch, [*noise] if vectorize_particles else [*noise.transpose(0, 1).flatten(0, 1)])
    found = gradients(objective, layers.model, layers.guide, list(layers.parameters.values()))

    z1, z2 = layers.q(layers.parameters, noise=noise)
    held = {name: parameter.detach() for name, parameter in layers.parameters.items()}
    log_weights = layers.p(z1, z2) - layers.q(held, z1, z2)
    if make is StickingTheLanding:
        surrogate = log_weights.mean(0).sum()
    else:
        normalised = log_weights.detach().softmax(0)
        theta = layers.p(z1.detach(), z2.detach())
        through_z = log_weights - theta  # the value is beside the point, and d's own gradient goes
        surrogate = (normalised**2 * through_z).sum() + (normalised * theta).sum()
    by_hand = torch.autograd.grad(-surrogate, list(layers.parameters.values()))
    for name, one, other in zip(layers.parameters, found, by_hand, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12), name
        assert other.abs().min() > 1e-6


def test_no_gradient_is_left_at_the_exact_posterior(linear_gaussian):
    """STL and DReG vanish for the guide's parameters at each draw; the plain gradients do not."""
    loc, tril = torch.zeros(5, requires_grad=True), torch.zeros(3, requires_grad=True)
    x = linear_gaussian.data(6)

    def guide(x):
        scale_tril = torch.linalg.cholesky(linear_gaussian.covariance) @ torch.diag(tril.exp())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(linear_gaussian.posterior_mean(x + loc), scale_tril=scale_tril))

    for objective in (StickingTheLanding(), DoublyReparameterised(4)):
        for grad in gradients(objective, linear_gaussian.model, guide, [loc, tril], x):
            assert grad.abs().max() < 1e-9
    for objective in (MonteCarloKL(), ImportanceWeighted(4)):
        for grad in gradients(objective, linear_gaussian.model, guide, [loc, tril], x):
            assert grad.abs().min() > 1e-3


def test_no_gradient_is_left_at_the_exact_posterior_of_an_autoguide(double):
    """AutoNormal on z ~ LogNormal: an auxiliary draw and its transform, whose Jacobian is part of log q."""

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.LogNormal(z.log(), 0.5), obs=torch.tensor([0.5, 1.5, 4.0]))

    pyro.clear_param_store()
    guide = AutoNormal(model)
    guide()
    with torch.no_grad():
        guide.locs.z.copy_(torch.tensor([0.5, 1.5, 4.0]).log() * 0.8)
        guide.scales.z = torch.full((3,), math.sqrt(0.2))
    truth = dist.LogNormal(0.0, math.sqrt(1.25)).log_prob(torch.tensor([0.5, 1.5, 4.0])).sum().item()
    for objective in (StickingTheLanding(), DoublyReparameterised(4)):
        assert -objective.loss(model, guide) == pytest.approx(truth, rel=1e-10)
        for grad in gradients(objective, model, guide, list(guide.parameters())):
            assert grad.abs().max() < 1e-9
    assert min(g.abs().min() for g in gradients(MonteCarloKL(), model, guide, list(guide.parameters()))) > 1e-3
    assert AnalyticKL().loss(model, guide) == pytest.approx(-truth, rel=1e-10)
    pyro.clear_param_store()


def test_dreg_has_less_variance_at_64_particles(double):
    curved = Curved(2000, False)
    found = {}
    for objective in (ImportanceWeighted(64), DoublyReparameterised(64)):
        objective.loss(curved.model, curved.guide)
        pyro.set_rng_seed(1)
        grads = gradients(objective, curved.model, curved.guide, list(curved.parameters.values()))
        found[type(objective)] = dict(zip(curved.parameters, grads, strict=True))
    for name in ("a", "b", "log_s"):
        assert found[DoublyReparameterised][name].var() < 0.2 * found[ImportanceWeighted][name].var(), name
    assert torch.allclose(found[DoublyReparameterised]["c"], found[ImportanceWeighted]["c"]), "the model's is the same"


# --- values -------------------------------------------------------------------------------------------------------------


def test_importance_weighted_value_is_the_reducers(linear_gaussian):
    x = linear_gaussian.data(6)
    for objective in (ImportanceWeighted(5), DoublyReparameterised(5), VIMCO(5)):
        objective.loss(linear_gaussian.model, linear_gaussian.mean_field_guide, x)
        pyro.set_rng_seed(4)
        loss = objective.loss(linear_gaussian.model, linear_gaussian.mean_field_guide, x)
        pyro.set_rng_seed(4)
        loc, scale = linear_gaussian.posterior_mean(x), linear_gaussian.mean_field_scale()
        z = loc + scale * torch.randn(5, 6, 3)
        mean = z @ linear_gaussian.weight.T + linear_gaussian.bias
        log_weights = (
            dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
            + dist.Normal(mean, linear_gaussian.scale).log_prob(x).sum(-1)
            - dist.Normal(loc, scale).log_prob(z).sum(-1)
        )
        assert -loss == pytest.approx(pv.estimators.importance_weighted_bound(log_weights).sum().item(), rel=1e-12)


def test_the_bound_of_the_exact_posterior_is_log_p(linear_gaussian):
    x = linear_gaussian.data(6)
    truth = linear_gaussian.log_prob(x).sum().item()
    for objective in (*(make(2) for make in (MonteCarloKL, StickingTheLanding)), ImportanceWeighted(3), VIMCO(3)):
        assert -objective.loss(linear_gaussian.model, linear_gaussian.guide, x) == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("num_particles", [1, 4])
def test_monte_carlo_kl_is_trace_elbo(num_particles, double):
    """Same loss, gradients and parts as Pyro's, with a subsampled plate inside and `pyro.param`s of the global store."""
    x = torch.randn(60) + 2

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("rows", 60, subsample_size=20) as index, poutine.mask(mask=x[index] > 1):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        scale = pyro.param("scale", torch.tensor(0.6), constraint=constraints.positive)
        with pyro.plate("rows", 60, subsample_size=20) as index, poutine.mask(mask=x[index] > 1):
            pyro.sample("z", dist.Normal(x[index] / 2, scale))

    pyro.clear_param_store()
    model(x), guide(x)
    parameters = [pyro.get_param_store()._params[name] for name in ("loc", "scale")]
    results = []
    theirs = Trace_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)
    for loss in (theirs, MonteCarloKL(num_particles)):
        loss.loss(model, guide, x)
        for parameter in parameters:
            parameter.grad = None
        pyro.set_rng_seed(2)
        value = loss.loss_and_grads(model, guide, x)
        results.append([value, *(parameter.grad.item() for parameter in parameters)])
    assert results[1] == pytest.approx(results[0], rel=1e-12)
    assert loss.last.full_size == 60
    assert (loss.last.kl - loss.last.reconstruction).item() == pytest.approx(results[0][0], rel=1e-12)
    pyro.clear_param_store()


def test_subsampled_plates_give_a_lower_bound_as_renyi_does_not(double):
    """With alike data, whichever are drawn: below the exact log p(x), where Pyro's bound lies above it."""
    x = torch.full((40,), 1.5)
    truth = dist.Normal(0.0, math.sqrt(2)).log_prob(x).sum().item()

    def programs(scale):
        def model(x):
            with pyro.plate("data", 40, subsample_size=4) as index:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        def guide(x):
            with pyro.plate("data", 40, subsample_size=4) as index:
                pyro.sample("z", dist.Normal(x[index] / 2, scale))

        return model, guide

    def mean(loss, scale, repeats=300):
        values = torch.tensor([-loss.loss(*programs_of[scale], x) for _ in range(repeats)])
        return values.mean().item(), values.std().item() / math.sqrt(repeats)

    programs_of = {scale: programs(scale) for scale in (math.sqrt(0.5), 1.5)}
    for loss in (ImportanceWeighted(5), DoublyReparameterised(5), VIMCO(5)):
        assert mean(loss, math.sqrt(0.5), 3)[0] == pytest.approx(truth, rel=1e-10)  # the posterior
        bound, stderr = mean(loss, 1.5)
        assert truth - 15 < bound < truth - 4.5 * stderr
    renyi, stderr = mean(RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1), 1.5)
    assert renyi > truth + 4.5 * stderr


def test_scales_that_would_be_in_the_exponent_are_refused(double):
    x = torch.randn(4)

    def model(x):
        with pyro.plate("data", 4), poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 4), poutine.scale(scale=0.5):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    with pytest.raises(ValueError, match="carries a scale of 0.5"):
        ImportanceWeighted(2).loss(model, guide, x)
    pyro.set_rng_seed(1)
    theirs = Trace_ELBO().loss(model, guide, x)
    ours = MonteCarloKL()
    ours.loss(model, guide, x)
    pyro.set_rng_seed(1)
    assert ours.loss(model, guide, x) == pytest.approx(theirs, rel=1e-12)


# --- the KL and its weights ---------------------------------------------------------------------------------------------


def normal_pair(x):
    """z ~ N(0, I_2), x | z ~ N(z, 0.5); q = N(loc, scale) with the same for every datum."""
    loc, scale = torch.tensor([0.8, -0.02], requires_grad=True), torch.tensor([0.5, 0.98], requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    kl = 0.5 * (scale**2 + loc**2 - 1 - (scale**2).log())
    return model, guide, loc, scale, kl


def test_analytic_kl_is_the_closed_form(double):
    x = torch.randn(5, 2)
    model, guide, _, _, kl = normal_pair(x)
    objective, pyros = AnalyticKL(), TraceMeanField_ELBO()
    value = objective.loss(model, guide, x)
    objective.loss_and_grads(model, guide, x)
    assert objective.last.kl.item() == pytest.approx(5 * kl.sum().item(), rel=1e-12)
    pyro.set_rng_seed(3)
    value = objective.loss(model, guide, x)
    pyro.set_rng_seed(3)
    assert value == pytest.approx(pyros.loss(model, guide, x), rel=1e-12)
    draws = torch.tensor([MonteCarloKL(num_particles=200).surrogate(model, guide, x)[1].kl for _ in range(100)])
    within(draws.mean().item(), 5 * kl.sum().item(), draws.std().item() / 10)


def test_analytic_kl_of_layers_that_the_guide_draws_in_another_order(double, monkeypatch):
    """KL(q(z1|x) || p(z1|z2)) is no term of the ELBO where z2 is drawn given z1; Pyro's mean-field ELBO takes it for one."""
    noise, weights = quadrature(2, 40)
    layers = Layers(len(weights))
    values = {}
    for loss in (MonteCarloKL(), AnalyticKL()):
        loss.loss(layers.model, layers.guide)
        fix_noise(monkeypatch, [*noise])
        found = gradients(loss, layers.model, layers.guide, list(layers.parameters.values()))
        values[type(loss)] = [(weights * grad).sum().item() for grad in found]
        monkeypatch.undo()
    assert values[AnalyticKL] == pytest.approx(values[MonteCarloKL], rel=1e-6)

    z1, z2 = layers.q(layers.parameters, noise=noise)
    a, b, s = (layers.parameters[name] for name in ("a", "b", "log_s"))
    q1, p1 = dist.Normal(a * layers.x + b, s.exp()), dist.Normal(layers.parameters["d"] * z2, 0.8)
    right = (weights * (q1.log_prob(z1) - p1.log_prob(z1))).sum().item()
    wrong = (weights * torch.distributions.kl_divergence(q1, p1)).sum().item()
    assert abs(right - wrong) > 0.1


@pytest.mark.parametrize("make", KL_OBJECTIVES)
def test_beta_and_warm_up(make, double):
    x = torch.randn(5, 2)
    model, guide, loc, _, _ = normal_pair(x)

    def loss_of(objective):
        pyro.set_rng_seed(8)
        value = objective.differentiable_loss(model, guide, x)
        return value, objective.last

    plain = make(3)
    loss_of(plain)
    value, parts = loss_of(plain)
    assert value.item() == pytest.approx((parts.kl - parts.reconstruction).item(), rel=1e-12)
    for beta in (0.0, 0.1, 4.0):
        objective = make(3, beta=beta)
        loss_of(objective)
        value, weighted = loss_of(objective)
        assert value.item() == pytest.approx((beta * parts.kl - parts.reconstruction).item(), rel=1e-12)
        assert [part.item() for part in weighted[:2]] == pytest.approx([part.item() for part in parts[:2]], rel=1e-12)

    warm = make(3, beta=2.0, kl_warmup_steps=4)
    warm.loss(model, guide, x)  # no step
    losses = [loss_of(warm)[0].item() for _ in range(6)]
    expected = [min(1.0, step / 4) * 2 * parts.kl.item() - parts.reconstruction.item() for step in range(6)]
    assert losses == pytest.approx(expected, rel=1e-12)
    assert warm.state_dict() == {"num_steps": 6, "beta": 2.0}
    other = make(3, beta=2.0, kl_warmup_steps=4)
    other.load_state_dict({"num_steps": 1})
    other.loss(model, guide, x)
    assert loss_of(other)[0].item() == pytest.approx(expected[1], rel=1e-12)

    no_kl = make(3, beta=0.0)
    loss_of(no_kl)
    pyro.set_rng_seed(8)
    (grad,) = gradients(no_kl, model, guide, [loc], x)
    pyro.set_rng_seed(8)
    z = loc + torch.tensor([0.5, 0.98]) * torch.randn(3, 5, 2)
    (by_hand,) = torch.autograd.grad(-dist.Normal(z, 0.5).log_prob(x).sum() / 3, [loc])
    assert torch.allclose(grad, by_hand, rtol=1e-10)


def test_free_bits_by_hand(double):
    """Each dimension's KL has its floor, the batch's mean, and no gradient below it."""
    x = torch.randn(5, 2)
    model, guide, loc, scale, kl = normal_pair(x)
    assert kl[1] < 0.1 < kl[0]
    for beta, free_bits in ((1.0, 0.1), (0.5, 0.1), (1.0, 3.0), (1.0, 1e-9)):
        objective = AnalyticKL(beta=beta, free_bits=free_bits)
        objective.loss(model, guide, x)
        pyro.set_rng_seed(1)
        found = gradients(objective, model, guide, [loc, scale], x)
        pyro.set_rng_seed(1)
        value = objective.loss(model, guide, x)
        pyro.set_rng_seed(1)
        z = loc + scale * torch.randn(5, 2)
        reconstruction = dist.Normal(z, 0.5).log_prob(x).sum()
        kl = 0.5 * (scale**2 + loc**2 - 1 - (scale**2).log())
        loss = beta * 5 * torch.maximum(kl, torch.tensor(free_bits)).sum() - reconstruction
        assert value == pytest.approx(loss.item(), rel=1e-12)
        for one, other in zip(found, torch.autograd.grad(loss, [loc, scale]), strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
        assert objective.last.kl.item() == pytest.approx(5 * kl.sum().item(), rel=1e-12), "the real KL"


@pytest.mark.parametrize("make", KL_OBJECTIVES)
def test_free_bits_by_sampling_and_for_densities_that_do_not_factorise(make, double):
    """A full-rank guide has one group, whose floor is its dimensions' together; a mean-field one has one per dimension."""
    x = torch.randn(50, 2)
    model, guide, loc, scale, _ = normal_pair(x)

    def full_rank(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale.diag()))

    for program, groups in ((guide, True), (full_rank, False)):
        objective = make(20, free_bits=0.4)
        objective.loss(model, program, x)
        pyro.set_rng_seed(1)
        loss, parts = objective.surrogate(model, program, x)
        pyro.set_rng_seed(1)
        z = loc + scale * torch.randn(20, 50, 2)
        kl = dist.Normal(loc, scale).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
        kl = kl.mean(0).sum(0)
        if make is AnalyticKL and groups:
            kl = 50 * 0.5 * (scale**2 + loc**2 - 1 - (scale**2).log())
        floored = torch.maximum(kl, torch.tensor(20.0)).sum() if groups else torch.maximum(kl.sum(), torch.tensor(40.0))
        assert loss.item() == pytest.approx((floored - parts.reconstruction).item(), rel=1e-10)
        assert floored > kl.sum()
        assert parts.kl.item() == pytest.approx(kl.sum().item(), rel=1e-10)


def test_free_bits_of_a_subsampled_plate_count_for_all_its_data(double):
    x = torch.randn(5, 2)

    def model(x):
        with pyro.plate("data", 50, subsample_size=5):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 50, subsample_size=5):
            pyro.sample("z", dist.Normal(torch.zeros(2), 0.9).to_event(1))

    loss, parts = AnalyticKL(free_bits=5.0).surrogate(model, guide, x)
    assert loss.item() == pytest.approx(50 * 2 * 5.0 - parts.reconstruction.item(), rel=1e-10)


def test_dropout_is_the_same_in_draw_and_density(double):
    """A second run of the guide would drop other units, and compare a draw with another q."""
    net = nn.Sequential(nn.Linear(2, 6), nn.Dropout(0.5), nn.Linear(6, 4))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        loc, log_scale = net(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    x = torch.randn(9, 2)
    values = []
    for objective in (Trace_ELBO(), StickingTheLanding(), DoublyReparameterised(1)):
        objective.loss(model, guide, x)
        pyro.set_rng_seed(6)
        values.append(objective.loss_and_grads(model, guide, x))
    assert values == pytest.approx(values[:1] * 3, rel=1e-12)


# --- discrete latents ---------------------------------------------------------------------------------------------------


class Codes:
    """Two binary codes b ~ Bernoulli, x | b ~ N(c0 b0 + c1 b1 + b0 b1, 0.6); q(b|x) = Bernoulli(sigmoid(w x + v)).

    With each datum given one configuration of the S draws, and parameters of its own.
    """

    def __init__(self, num_particles):
        bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * (2 * num_particles))
        self.draws = bits.reshape(-1, num_particles, 2).movedim(0, 1)  # (S, configurations, 2)
        num_data = len(bits)
        self.parameters = {
            "w": torch.tensor([0.8, -0.5]).expand(num_data, 2).clone().requires_grad_(),
            "v": torch.tensor([-0.2, 0.4]).expand(num_data, 2).clone().requires_grad_(),
            "prior": torch.tensor([-0.7, 0.3]).expand(num_data, 2).clone().requires_grad_(),
            "c": torch.tensor([1.0, -2.0]).expand(num_data, 2).clone().requires_grad_(),
        }
        self.x = torch.full((num_data, 1), 0.9)

    def q(self):
        return dist.Bernoulli(logits=self.parameters["w"] * self.x + self.parameters["v"])

    def p(self):
        return dist.Bernoulli(logits=self.parameters["prior"])

    def likelihood(self, b):
        return dist.Normal((self.parameters["c"] * b).sum(-1) + b.prod(-1), 0.6)

    def model(self):
        with pyro.plate("data", len(self.x)):
            b = pyro.sample("b", self.p().to_event(1))
            pyro.sample("x", self.likelihood(b), obs=self.x[:, 0])

    def guide(self):
        with pyro.plate("data", len(self.x)):
            pyro.sample("b", self.q().to_event(1))

    def expected(self, objective, monkeypatch):
        """Expected loss gradient over all draws, by parameter."""
        objective.loss(self.model, self.guide)
        draws = self.draws[0] if len(self.draws) == 1 else self.draws
        monkeypatch.setattr(torch, "bernoulli", lambda probs: draws.reshape(probs.shape))
        found = gradients(objective, self.model, self.guide, list(self.parameters.values()))
        monkeypatch.undo()
        weights = self.probability().detach().unsqueeze(-1)
        return torch.stack([(weights * grad).sum(0) for grad in found])

    def probability(self):
        return self.q().log_prob(self.draws).sum(-1).sum(0).exp()

    def exact(self):
        """Gradient of - E[L_S], by enumeration."""
        b = self.draws
        log_weights = (
            self.p().log_prob(b).sum(-1) + self.likelihood(b).log_prob(self.x[:, 0]) - self.q().log_prob(b).sum(-1)
        )
        loss = -(self.probability() * (log_weights.logsumexp(0) - math.log(len(b)))).sum()
        found = torch.autograd.grad(loss, list(self.parameters.values()))
        return torch.stack([grad.sum(0) for grad in found])


@pytest.mark.parametrize(("make", "num_particles"), [(VIMCO, 2), (VIMCO, 3), (MonteCarloKL, 1), (AnalyticKL, 1)])
def test_score_function_gradients_against_enumeration(make, num_particles, double, monkeypatch):
    codes = Codes(num_particles)
    found, exact = codes.expected(make(num_particles), monkeypatch), codes.exact()
    assert torch.allclose(found, exact, rtol=1e-9)
    assert exact.abs().min() > 1e-3


@pytest.mark.parametrize("make", [MonteCarloKL, AnalyticKL])
def test_score_function_baseline_against_enumeration(make, double, monkeypatch):
    """Two particles, each the other's baseline: the ELBO's gradient still, beta included."""
    exact = Codes(1).exact()
    assert torch.allclose(Codes(2).expected(make(2), monkeypatch), exact, rtol=1e-9)
    weighted = [Codes(s).expected(make(s, beta=0.4), monkeypatch) for s in (1, 2)]
    assert torch.allclose(*weighted, rtol=1e-9)
    assert not torch.allclose(weighted[0], exact, rtol=1e-2)


def test_pyros_own_losses_serve_for_discrete_latents(double, monkeypatch):
    """Trace_ELBO by its expectation; TraceEnum_ELBO is exact at each call, parallel enumeration in the guide."""
    codes = Codes(1)
    exact = codes.exact()
    assert torch.allclose(codes.expected(Trace_ELBO(), monkeypatch), exact, rtol=1e-9)

    # Enumeration needs one site per code; one datum carries the parameters.
    w, v, prior, c = (parameter[0].detach().clone().requires_grad_() for parameter in codes.parameters.values())

    def model():
        with pyro.plate("data", 1):
            b0, b1 = (pyro.sample(f"b{i}", dist.Bernoulli(logits=prior[i])) for i in range(2))
            pyro.sample("x", dist.Normal(c[0] * b0 + c[1] * b1 + b0 * b1, 0.6), obs=torch.tensor([0.9]))

    @pyro.infer.config_enumerate
    def guide():
        with pyro.plate("data", 1):
            for i in range(2):
                pyro.sample(f"b{i}", dist.Bernoulli(logits=0.9 * w[i] + v[i]))

    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide)
    assert torch.allclose(torch.stack(torch.autograd.grad(loss, [w, v, prior, c])), exact, rtol=1e-9)


def test_vimco_with_weights_of_zero(double):
    """Against the gradient written out, for draws where the model gives 0, 1, 2 or all of 3 particles no density."""
    bits = torch.tensor(
        [[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    ).T  # (S, N): 0 is impossible
    v = torch.tensor([0.3, -0.4, 0.8, 0.1], requires_grad=True)
    x = torch.linspace(-1, 2, 4)

    def model():
        with pyro.plate("data", 4):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5)))
            pyro.factor("support", torch.where(b == 1, math.log(2), -math.inf))
            pyro.sample("x", dist.Normal(b, 0.8), obs=x)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("b", dist.Bernoulli(logits=v))

    with pytest.MonkeyPatch.context() as patch:
        objective = VIMCO(3)
        patch.setattr(torch, "bernoulli", lambda probs: torch.ones_like(probs))
        objective.loss(model, guide)
        patch.setattr(torch, "bernoulli", lambda probs: bits)
        (found,) = gradients(objective, model, guide, [v])
    probs = v.detach().sigmoid()
    score = bits - probs  # d log q / d v
    prior = torch.where(bits == 1, 0.0, -math.inf)
    log_weights = prior + dist.Normal(bits, 0.8).log_prob(x) - dist.Bernoulli(probs).log_prob(bits)
    signal = torch.zeros(3, 4)
    for particle in range(3):
        others = log_weights[[index for index in range(3) if index != particle]]
        replaced = torch.cat([others, others.mean(0, keepdim=True)]).logsumexp(0)
        signal[particle] = torch.where(replaced.isfinite(), log_weights.logsumexp(0) - replaced, 0.0)
    exact = -((signal - log_weights.softmax(0)) * score).sum(0)
    assert signal[2, 3] == 0  # the only one with a weight
    assert signal[1, 1] < 0  # the only one without
    assert torch.allclose(found, exact, rtol=1e-12)
    assert found.isfinite().all()


def test_vimco_takes_reparameterised_latents_too(double, monkeypatch):
    """A discrete and a continuous latent: draws of one enumerated, of the other by quadrature."""
    noise, weights = quadrature(2, 24)
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2).T.contiguous()  # (S, 4)
    noise, bits = noise.repeat_interleave(4, 1), bits.repeat(1, len(weights))
    weights = weights.repeat_interleave(4)
    a, v, s = (torch.full_like(weights, value).requires_grad_() for value in (0.5, -0.3, 0.7))
    x = torch.full_like(weights, 0.8)

    def model():
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(z + b * z - b, 0.8), obs=x)

    def guide():
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(a * x, s))
            pyro.sample("b", dist.Bernoulli(logits=v + z))  # a score that depends on the draw

    objective = VIMCO(2)
    objective.loss(model, guide)
    fix_noise(monkeypatch, noise)
    monkeypatch.setattr(torch, "bernoulli", lambda probs: bits)
    z = a * x + s * noise
    q = dist.Bernoulli(logits=v + z)
    probability = q.log_prob(bits).sum(0).exp()
    log_weights = (
        dist.Normal(0.0, 1.0).log_prob(z)
        + dist.Bernoulli(torch.tensor(0.4)).log_prob(bits)
        + dist.Normal(z + bits * z - bits, 0.8).log_prob(x)
        - dist.Normal(a * x, s).log_prob(z)
        - q.log_prob(bits)
    )
    loss = -(weights * probability * (log_weights.logsumexp(0) - math.log(2))).sum()
    exact = [grad.sum().item() for grad in torch.autograd.grad(loss, [a, v, s])]
    found = gradients(objective, model, guide, [a, v, s])
    expected = [(weights * probability.detach() * grad).sum().item() for grad in found]
    assert expected == pytest.approx(exact, rel=1e-5)


# --- this library's priors, and flows as guides -------------------------------------------------------------------------


def path_and_prior(make, z, held_weights, log_joint):
    """Minus the loss by hand: what goes through z at parameters held fixed, and the model's own gradient at fixed z."""
    if make is StickingTheLanding:
        return (held_weights + log_joint(z.detach()) - log_joint(z.detach()).detach()).mean(0).sum()
    normalised = held_weights.detach().softmax(0)
    return (normalised**2 * held_weights).sum() + (normalised * log_joint(z.detach())).sum()


@pytest.mark.parametrize("make", [StickingTheLanding, DoublyReparameterised])
def test_vamp_prior_by_hand_with_a_detached_copy(make, double):
    """The path holds the shared encoder fixed in the guide's density and in the prior's; the prior then moves it too."""
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(12, [8]), 2)
    prior = pv.priors.VampPrior(guide, torch.rand(4, 12))
    model = pv.GenerativeModel(prior, pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 12), 12))
    model.double(), guide.double()
    held_model, held_guide = copy.deepcopy((model, guide))
    for parameter in (*held_model.parameters(), *held_guide.parameters()):
        parameter.requires_grad_(False)
    parameters = list(dict.fromkeys([*guide.parameters(), *model.parameters()]))
    x = (torch.rand(6, 12) < 0.5) * 1.0
    objective = make(3)
    objective.loss(model, guide, x)
    pyro.set_rng_seed(3)
    found = gradients(objective, model, guide, parameters, x)

    def joint(model, z):
        return model.prior().log_prob(z) + model.likelihood(z).log_prob(x)

    pyro.set_rng_seed(3)
    z = guide.posterior(x).expand([3, 6]).rsample()
    held_weights = joint(held_model, z) - held_guide.posterior(x).log_prob(z)
    surrogate = path_and_prior(make, z, held_weights, lambda z: joint(model, z))
    for one, other in zip(found, torch.autograd.grad(-surrogate, parameters), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)
        assert other.abs().sum() > 0


@pytest.mark.parametrize("make", [StickingTheLanding, DoublyReparameterised])
def test_flow_guide_by_hand_with_a_detached_copy(make, double):
    """A flow that keeps the density of its own draw is inverted, and gives the gradient at the draw."""
    flow = import_zuko().flows.MAF(2, context=2, hidden_features=[8])
    held_flow = copy.deepcopy(flow).requires_grad_(False)
    x = torch.randn(5, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + 0.2 * z**2, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", FlowDistribution(flow(x), parameters=flow.parameters()))

    def joint(z):
        return dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(z + 0.2 * z**2, 0.5).log_prob(x).sum(-1)

    objective = make(3)
    objective.loss(model, guide, x)
    pyro.set_rng_seed(3)
    found = gradients(objective, model, guide, list(flow.parameters()), x)
    pyro.set_rng_seed(3)
    z = FlowDistribution(flow(x)).expand([3, 5]).rsample()
    surrogate = path_and_prior(make, z, joint(z) - held_flow(x).log_prob(z), joint)
    for one, other in zip(found, torch.autograd.grad(-surrogate, list(flow.parameters())), strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-10)
        assert other.abs().sum() > 0


@pytest.mark.parametrize("name", PRIORS)
def test_every_objective_takes_every_prior(name, double):
    """Finite, with a gradient for every parameter; and the same ELBO whichever way its gradient is estimated."""
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(12, [8]), LATENT_DIM)
    model = pv.GenerativeModel(PRIORS[name](guide), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 12), SHAPE))
    model.double(), guide.double()
    x = (torch.rand(5, *SHAPE) < 0.5) * 1.0
    parameters = list(dict.fromkeys([*guide.parameters(), *model.parameters()]))
    losses = []
    for objective in (*(make(2) for make in KL_OBJECTIVES), *(make(2) for make in WEIGHT_OBJECTIVES)):
        objective.loss(model, guide, x)
        pyro.set_rng_seed(1)
        for grad in gradients(objective, model, guide, parameters, x):
            assert grad.isfinite().all()
            assert grad.abs().sum() > 0
        pyro.set_rng_seed(1)
        losses.append(objective.loss(model, guide, x))
        assert math.isfinite(losses[-1])
    assert losses[0] == pytest.approx(losses[2], rel=1e-10)
    assert losses[3:] == pytest.approx([losses[3]] * 3, rel=1e-10)
