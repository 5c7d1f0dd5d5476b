"""Priors: normalised densities, evidence against quadrature and closed forms, parameters shared with a guide."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from shared.parts import LATENT_DIM, PRIORS, SHAPE
from torch import nn

import pyrovae as pv
from pyrovae import guides, likelihoods, nets, priors
from pyrovae.compiled.record import record
from pyrovae.distributions.mixtures import Mixture
from pyrovae.distributions.zuko_adapter import FlowDistribution, import_zuko, start_near_identity

LEARNED = {
    "DiagonalNormal": priors.DiagonalNormal,
    "MixtureOfNormals": lambda latent_dim: priors.MixtureOfNormals(latent_dim, 3),
    "VampPrior": lambda latent_dim: priors.VampPrior(vamp_guide(latent_dim), torch.rand(3, 4), learn_weights=True),
    "NeuralSplineFlow": lambda latent_dim: priors.NeuralSplineFlow(latent_dim, hidden_features=[8]),
    "MaskedAutoregressiveFlow": lambda latent_dim: priors.MaskedAutoregressiveFlow(latent_dim, hidden_features=[8]),
    "RealNVP": lambda latent_dim: priors.RealNVP(latent_dim, hidden_features=[8]),
}


def vamp_guide(latent_dim):
    return guides.MeanFieldNormal(nets.MLP(4, [8]), latent_dim)


def trained(name, latent_dim):
    """A prior as it may be after training: far from its start, without any symmetry, of mass within [-10, 10]."""
    prior = LEARNED[name](latent_dim)
    with torch.no_grad():
        for path, parameter in prior.named_parameters():
            parameter += (0.2 if "flow" in path else 0.7) * (2 * torch.rand_like(parameter) - 1)
    return prior


def grid_of(latent_dim, num_points, half_width=12.0):
    """(points (M, latent_dim), volume of each)."""
    axis = torch.linspace(-half_width, half_width, num_points)
    return torch.cartesian_prod(*[axis] * latent_dim).reshape(-1, latent_dim), (axis[1] - axis[0]).item() ** latent_dim


@torch.no_grad()
def mass_on_grid(distribution, latent_dim):
    points, volume = grid_of(latent_dim, 20_001 if latent_dim == 1 else 401)
    return points, distribution.log_prob(points).exp() * volume


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("name", LEARNED)
def test_density_integrates_to_one_and_draws_follow_it(name, latent_dim, double):
    """Where networks or knots bend, a grid errs: by less than 1e-3 in two dimensions."""
    distribution = trained(name, latent_dim)()
    assert distribution.event_shape == (latent_dim,)
    assert distribution.batch_shape == ()
    points, mass = mass_on_grid(distribution, latent_dim)
    assert mass.sum().item() == pytest.approx(1, abs=1e-5 if latent_dim == 1 else 1e-3)
    draws = distribution.sample((20_000,))
    assert draws.shape == (20_000, latent_dim)
    assert draws.abs().max() < 12
    for of in (
        lambda z: z[:, 0],
        lambda z: z[:, -1].square(),
        lambda z: z[:, 0] * z[:, -1],
        lambda z: (z[:, -1] > 0.5) * 1.0,
    ):
        stderr = of(draws).std().item() / math.sqrt(20_000)
        within(of(draws).mean().item(), (mass * of(points)).sum().item(), stderr + 1e-3)
    mean = (mass[:, None] * points).sum(0)
    spread = draws.std(0).max().item()
    assert torch.allclose(distribution.mean, mean, atol=0.25 * spread)  # of a flow: 128 draws


@pytest.mark.parametrize("name", PRIORS)
def test_shapes_support_and_seed(name):
    prior = PRIORS[name](guides.MeanFieldNormal(nets.MLP(12, [8]), LATENT_DIM))
    distribution = prior()
    assert distribution.has_rsample is (name not in ("MixtureOfNormals", "VampPrior"))
    assert distribution.support.event_dim == 1
    assert distribution.support.check(torch.tensor([[0.0, 1e6], [0.0, torch.nan]])).tolist() == [True, False]
    assert distribution.log_prob(torch.zeros(4, 5, 2)).shape == (4, 5)
    assert distribution.expand((5,)).log_prob(torch.zeros(2)).shape == (5,)
    assert distribution.expand((5,)).log_prob(torch.zeros(4, 5, 2)).shape == (4, 5)
    assert distribution.expand((5,)).sample((4,)).shape == (4, 5, 2)
    assert distribution.expand((5,)).mean.shape == (5, 2)
    assert not distribution.sample().requires_grad
    before = torch.get_rng_state()
    text = repr(prior)
    repr(distribution)
    assert torch.equal(torch.get_rng_state(), before)
    assert text.startswith(f"{name}(")
    assert "latent_dim=2" in text
    assert len(text.splitlines()) < 20
    pyro.set_rng_seed(3)
    first = distribution.sample((4,))
    pyro.set_rng_seed(3)
    assert torch.equal(prior().sample((4,)), first)
    assert prior.double()().log_prob(torch.zeros(2, dtype=torch.double)).dtype == torch.double


# ---- starts


@pytest.mark.parametrize("make", [priors.NeuralSplineFlow, priors.MaskedAutoregressiveFlow, priors.RealNVP])
def test_flows_start_near_the_standard_normal(make):
    distribution, normal = make(20)(), priors.StandardNormal(20)()
    z = distribution.sample((1000,))
    assert 0 < (distribution.log_prob(z) - normal.log_prob(z)).mean().item() < 0.1  # KL(p || N(0, I)) in nats


def test_mixture_starts_as_wide_as_the_standard_normal_with_components_that_differ(double):
    prior = priors.MixtureOfNormals(3, 20_000)
    assert torch.allclose(prior.locs.var(0) + (2 * prior.log_scales).exp().mean(0), torch.ones(3), atol=0.05)
    assert len(prior.locs.unique(dim=0)) == 20_000
    assert torch.equal(priors.DiagonalNormal(3)().log_prob(prior.locs), priors.StandardNormal(3)().log_prob(prior.locs))


# ---- splines beyond their knots


def test_splines_beyond_their_knots(double):
    """Knots end at 5 of the scaled z: wherever these come to lie, tails are normal, and the whole has mass 1."""
    prior = trained("NeuralSplineFlow", 1)
    affine = prior.flow.transform.transforms[0]
    with torch.no_grad():
        affine.phi[0].fill_(0.4)  # shift
        affine.phi[1].fill_(-1.0)  # log scale, about
    scale = import_zuko().transforms.MonotonicAffineTransform(affine.phi[0], affine.phi[1]).scale.item()
    distribution = prior()
    points, volume = grid_of(1, 40_001, 40.0)
    mass = distribution.log_prob(points).exp() * volume
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)
    assert mass[points[:, 0].abs() > 5].sum() > 0.05  # beyond the knots of splines that nothing scales
    for noise in (-9.0, -5.0001, 5.0001, 20.0):
        z = torch.tensor([(noise - 0.4) / scale])
        tail = dist.Normal(0.0, 1.0).log_prob(torch.tensor(noise)).item() + math.log(scale)
        assert distribution.log_prob(z).item() == pytest.approx(tail, abs=1e-9)
    assert distribution.log_prob(torch.tensor([-0.4 / scale])).item() != pytest.approx(
        dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)).item() + math.log(scale), abs=1e-3
    )


@pytest.mark.parametrize("make", [priors.NeuralSplineFlow, priors.MaskedAutoregressiveFlow, priors.RealNVP])
def test_far_values_have_finite_densities_and_gradients(make):
    """In float32, on the knots and far beyond them."""
    prior = make(3)
    z = torch.tensor([[5.0, -5.0, 0.0], [-100.0, 3.0, 100.0], [0.0, 4.9999995, 5.0000005]], requires_grad=True)
    log_prob = prior().log_prob(z)
    gradients = torch.autograd.grad(log_prob.sum(), [z, *prior.parameters()])
    assert all(tensor.isfinite().all() for tensor in (log_prob, *gradients))


def test_coupling_halves(double):
    """In each layer of RealNVP the first half depends on itself alone, one by one, and the second on the first."""
    prior = trained("RealNVP", 5)
    jacobians = [
        torch.autograd.functional.jacobian(transform(), torch.randn(5)) for transform in prior.flow.transform.transforms
    ]
    for layer, jacobian in enumerate(jacobians):
        allowed = torch.eye(5, dtype=torch.bool)
        first = slice(0, 3) if layer % 2 == 0 else slice(2, 5)
        second = slice(3, 5) if layer % 2 == 0 else slice(0, 2)
        allowed[second, first] = True
        assert ((jacobian != 0) == allowed).all()
    assert prior.flow.transform.transforms[0].passes == 2


# ---- mixtures


def test_a_mixture_is_its_sum(double):
    prior = trained("MixtureOfNormals", 2)
    z = torch.randn(4, 5, 2)
    weights = prior.logits.softmax(0)
    by_hand = sum(
        weights[k] * dist.Normal(prior.locs[k], prior.log_scales[k].exp()).to_event(1).log_prob(z).exp()
        for k in range(3)
    ).log()
    assert torch.allclose(prior().log_prob(z), by_hand)
    assert torch.allclose(prior().mean, weights @ prior.locs)
    theirs = dist.MixtureSameFamily(
        dist.Categorical(logits=prior.logits), dist.Normal(prior.locs, prior.log_scales.exp()).to_event(1)
    )
    assert torch.allclose(prior().log_prob(z), theirs.log_prob(z))


def test_a_mixture_of_normals_keeps_its_digits_in_float32():
    """Its matrix products cancel where z is near m and s small, and the gradient of each parameter is that of the sum."""
    locs, log_scales, logits = torch.randn(30, 5), torch.randn(30, 5) - 3, torch.randn(30)
    values = torch.cat([locs + log_scales.exp() * torch.randn(30, 5), 3 * torch.randn(30, 5)])  # near, and far

    def density(mixture, *parts):
        parts = [part.clone().requires_grad_() for part in parts]
        log_prob = mixture(*parts[:3]).log_prob(parts[3])
        return log_prob.detach(), torch.autograd.grad(log_prob.sum(), parts)

    def ours(logits, locs, log_scales):
        return Mixture(
            logits.log_softmax(-1), lambda index: dist.Normal(locs[index], log_scales.exp()[index]).to_event(1)
        )

    def plain(logits, locs, log_scales):
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(locs, log_scales.exp()).to_event(1))

    parts = (logits, locs, log_scales, values)
    expected, expected_gradients = density(plain, *(part.double() for part in parts))
    found, gradients = density(ours, *parts)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)


def test_a_mixture_of_normals_at_its_extremes(double):
    """Far from 0, at a component's middle, and where a value is infinite."""
    loc, scale = 100 + 1e-2 * torch.randn(6, 3), torch.full((6, 3), 1e-5)
    mixture = Mixture(torch.zeros(6).log_softmax(-1), lambda index: dist.Normal(loc[index], scale[index]).to_event(1))
    plain = dist.MixtureSameFamily(dist.Categorical(torch.ones(6)), dist.Normal(loc, scale).to_event(1))
    assert torch.allclose(mixture.log_prob(loc), plain.log_prob(loc), rtol=0, atol=1e-8)
    assert mixture.log_prob(torch.tensor([100.0, torch.inf, 100.0])) == -torch.inf


def test_a_mixture_draws_from_the_component_chosen(double):
    drawn = []

    def components_at(index):
        drawn.append(index)
        return dist.Normal(torch.tensor([-10.0, 0.0, 10.0])[index], 0.1)

    weights = torch.tensor([0.7, 0.1, 0.2])
    mixture = Mixture(weights.log(), components_at).expand((2, 5))
    assert len(drawn) == 1  # an expansion finds no components anew
    draws = mixture.sample((3_000,))
    assert draws.shape == (3_000, 2, 5)
    assert drawn[1].shape == (30_000,)
    for place, weight in zip((-10, 0, 10), weights.tolist(), strict=True):
        for column in (draws, draws[:500], draws[:, 1, 2]):
            share = ((column - place).abs() < 5).double()
            within(share.mean().item(), weight, math.sqrt(weight * (1 - weight) / share.numel()))
    with pytest.raises(ValueError, match=r"2 components must have batch shape \(2,\), found \(3,\)"):
        Mixture(weights[:2].log(), lambda index: dist.Normal(torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match="support"):
        mixture.log_prob(torch.full((2, 5), torch.nan))


# ---- evidence


@pytest.mark.parametrize("name", LEARNED)
def test_evidence_against_quadrature(name, double):
    """log p(x) = log of the integral of p(z) N(x; W z + b, s^2 I) on a grid, against importance sampling."""
    prior = trained(name, 2)
    weight, bias, scale = torch.randn(5, 2), torch.randn(5), 0.8

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z @ weight.T + bias, scale).to_event(1), obs=x)

    covariance = torch.linalg.inv(weight.T @ weight / scale**2 + 0.2 * torch.eye(2))

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            loc = (x - bias) @ weight / scale**2 @ covariance
            pyro.sample("z", dist.MultivariateNormal(loc, 1.5 * covariance))

    x = (prior().sample((3,)) @ weight.T + bias + scale * torch.randn(3, 5)).detach()
    points, mass = mass_on_grid(prior(), 2)
    exact = torch.stack(
        [
            (mass.log() + dist.Normal(points @ weight.T + bias, scale).to_event(1).log_prob(datum)).logsumexp(0)
            for datum in x
        ]
    )
    found = pv.log_marginal_likelihood(model, guide, x, num_particles=4_000)
    assert (found.pareto_k < 0.7).all()
    for datum in range(3):
        within(found.log_prob[datum].item(), exact[datum].item(), found.stderr[datum].item() + 1e-3)
    if name == "MixtureOfNormals":
        components = dist.MultivariateNormal(
            prior.locs @ weight.T + bias,
            weight @ torch.diag_embed((2 * prior.log_scales).exp()) @ weight.T + scale**2 * torch.eye(5),
        )
        closed_form = dist.MixtureSameFamily(dist.Categorical(logits=prior.logits), components).log_prob(x)
        assert torch.allclose(closed_form, exact, atol=1e-9)


# ---- VampPrior


class FlowGuide(nn.Module):
    """The least that a VampPrior asks for: `posterior` and `latent_dim`."""

    def __init__(self):
        super().__init__()
        self.latent_dim = 2
        self.flow = import_zuko().flows.MAF(2, 4, hidden_features=[8])
        start_near_identity(self.flow, 2.0)

    def posterior(self, x):
        return FlowDistribution(self.flow(x), parameters=self.flow.parameters())


@pytest.mark.parametrize("make", [lambda: vamp_guide(2), FlowGuide])
@pytest.mark.parametrize("learn_weights", [False, True])
def test_vamp_prior_is_the_mixture_of_posteriors(make, learn_weights, double):
    guide, given = make(), torch.rand(7, 4)
    prior = priors.VampPrior(guide, given, learn_weights=learn_weights)
    if learn_weights:
        nn.init.normal_(prior.logits)
    assert torch.allclose(prior.pseudo_inputs, given)
    weights = prior.logits.softmax(0) if learn_weights else torch.full((7,), 1 / 7)
    for z in (torch.randn(2), torch.randn(5, 2), torch.randn(3, 5, 2)):
        by_hand = 0.0
        for k in range(7):
            one = guide.posterior(prior.pseudo_inputs[k : k + 1])
            by_hand = by_hand + weights[k] * one.log_prob(z.unsqueeze(-2)).exp().squeeze(-1)
        assert torch.allclose(prior().log_prob(z), by_hand.log())
    under_plate = prior().expand((5,))
    assert torch.allclose(under_plate.log_prob(z), by_hand.log())
    assert torch.allclose(under_plate.log_prob(z[0, 0]), by_hand[0, 0].log().expand(5))
    means = torch.cat([guide.posterior(u[None]).mean for u in prior.pseudo_inputs])
    assert torch.allclose(prior().mean, weights @ means)


def test_pseudo_inputs_stay_near_the_data_and_have_a_gradient_everywhere(double):
    """Gradients by differences, black and white pixels among the pseudo-inputs; far steps end within 5 % of the range."""
    given = torch.tensor([[0.0, 1.0, 0.3, 1.0], [1.0, 0.0, 0.0, 0.9]])
    prior = priors.VampPrior(vamp_guide(2), given, learn_weights=True)
    z = torch.randn(3, 2)

    def density(unconstrained, logits):
        return torch.func.functional_call(prior, {"unconstrained": unconstrained, "logits": logits}).log_prob(z)

    assert torch.autograd.gradcheck(density, (prior.unconstrained, prior.logits))
    (gradient,) = torch.autograd.grad(prior().log_prob(z).sum(), prior.unconstrained)
    assert (gradient != 0).all()
    with torch.no_grad():
        prior.unconstrained += 100 * torch.randn_like(given)
    assert prior.pseudo_inputs.min() >= -0.05 - 1e-12
    assert prior.pseudo_inputs.max() <= 1.05 + 1e-12
    wider = priors.VampPrior(vamp_guide(2), given, data_range=(-1.0, 3.0))
    assert torch.allclose(wider.pseudo_inputs, given)
    assert torch.allclose(torch.stack([wider.low, wider.high]), torch.tensor([-1.2, 3.2]))


def vamp_pair(seed=0, num_components=6):
    pyro.set_rng_seed(seed)
    guide = guides.MeanFieldNormal(nets.MLP(12, [8]), 2)
    prior = priors.VampPrior(guide, torch.rand(num_components, *SHAPE))
    return pv.GenerativeModel(prior, likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE)), guide


def binary(num_data=40):
    return (torch.rand(num_data, *SHAPE) < torch.linspace(0.1, 0.9, 12).reshape(SHAPE)) * 1.0


def state(*modules):
    return [tensor.detach().clone() for module in modules for tensor in module.state_dict().values()]


def test_shared_parameters_get_the_sum_of_gradients_and_one_step(double):
    """A step of plain gradient descent in hand-written SVI: minus the rate times the gradient of the loss, once."""
    model, guide = vamp_pair()
    x = binary()
    parameters = list(dict.fromkeys([*model.parameters(), *guide.parameters()]))
    assert len(parameters) == len(list(model.parameters()))  # the guide's are among the prior's
    before = [parameter.detach().clone() for parameter in parameters]
    pyro.set_rng_seed(1)
    guide_trace = poutine.trace(guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x)
    loss = guide_trace.log_prob_sum() - model_trace.log_prob_sum()
    gradients = torch.autograd.grad(loss, parameters)
    pyro.set_rng_seed(1)
    SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO()).step(x)
    for parameter, old, gradient in zip(parameters, before, gradients, strict=True):
        assert gradient.abs().sum() > 0
        assert torch.allclose(parameter, old - 1e-3 * gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("by", ["fit", "svi"])
def test_training_by_turns_moves_all_of_one_pair_and_nothing_of_the_other(by, double):
    pairs, x = [vamp_pair(0), vamp_pair(1)], binary()
    svis = [SVI(*pair, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()) for pair in pairs]
    for turn in range(4):
        before, other = state(*pairs[turn % 2]), state(*pairs[1 - turn % 2])
        if by == "fit":
            pv.fit(*pairs[turn % 2], x, epochs=2, batch_size=20, learning_rate=0.01, progress=False)
        else:
            for _ in range(2):
                svis[turn % 2].step(x)
        assert all(torch.equal(a, b) for a, b in zip(other, state(*pairs[1 - turn % 2]), strict=True))
        model, guide = pairs[turn % 2]
        assert model.prior.guide is guide
        names = [*model.state_dict(), *guide.state_dict()]
        moved = {name for name, a, b in zip(names, before, state(model, guide), strict=True) if not torch.equal(a, b)}
        assert moved == set(names) - {"prior.low", "prior.high", "likelihood.bias"} or moved == set(names) - {
            "prior.low",
            "prior.high",
        }


def test_the_bound_rises_with_pseudo_inputs_learned(double):
    model, guide = vamp_pair()
    start = model.prior.pseudo_inputs.detach().clone()
    history = pv.fit(model, guide, binary(), epochs=40, batch_size=20, learning_rate=0.02, progress=False).history
    assert history[-1]["elbo"] > history[0]["elbo"] + 0.5
    assert (model.prior.pseudo_inputs - start).abs().max() > 0.05
    found = pv.log_marginal_likelihood(model, guide, binary(10), num_particles=100)
    assert found.log_prob.isfinite().all()
    assert (found.log_prob >= found.elbo).all()


def test_a_saved_pair_keeps_its_tie(tmp_path, double):
    model, guide = vamp_pair(0)
    pv.fit(model, guide, binary(), epochs=1, batch_size=20, progress=False)
    pv.save(tmp_path / "pair.pt", model, guide)
    rebuilt = pv.load(tmp_path / "pair.pt")
    assert rebuilt["model"].prior.guide is rebuilt["guide"]
    other_model, other_guide = vamp_pair(1)
    with torch.no_grad():  # another range too
        other_model.prior.low -= 1
    pv.load(tmp_path / "pair.pt", other_model, other_guide)
    assert other_model.prior.guide is other_guide
    assert torch.equal(other_model.prior.pseudo_inputs, model.prior.pseudo_inputs)
    z = torch.randn(5, 2)
    assert torch.equal(other_model.prior().log_prob(z), model.prior().log_prob(z))
    pv.fit(other_model, other_guide, binary(), epochs=1, batch_size=20, progress=False)
    assert all(
        torch.equal(tensor, other_model.state_dict()[f"prior.guide.{name}"])
        for name, tensor in other_guide.state_dict().items()
    )
    copied_model, copied_guide = copy.deepcopy((model, guide))
    assert copied_model.prior.guide is copied_guide


# ---- recordings


def surrogate(model, guide, num_draws):
    def function(x):
        guide_trace = poutine.trace(guide).get_trace(x)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x)
        loss = guide_trace.log_prob_sum() - model_trace.log_prob_sum()
        return loss, model.prior().sample((num_draws,)) if num_draws else loss

    return function


def assert_recorded_is_eager(name, num_draws):
    guide = guides.MeanFieldNormal(nets.MLP(12, [8]), LATENT_DIM)
    model = pv.GenerativeModel(PRIORS[name](guide), likelihoods.Bernoulli(nets.MLP(2, [8], 12), SHAPE))
    function, x = surrogate(model, guide, num_draws), binary(5)
    recorded = record(function, [model, guide], [x], gradients=True)
    for seed in (1, 2):
        pyro.set_rng_seed(seed)
        (loss, draws), gradients = recorded(x)
        pyro.set_rng_seed(seed)
        eager_loss, eager_draws = function(x)
        assert loss.item() == pytest.approx(eager_loss.item(), rel=1e-10)
        assert torch.allclose(draws, eager_draws)
        eager = torch.autograd.grad(eager_loss, recorded.parameters)
        assert len(eager) == len(set(recorded.parameters))
        for gradient, eager_gradient in zip(gradients, eager, strict=True):
            assert torch.allclose(gradient, eager_gradient, rtol=1e-8, atol=1e-10)
        with torch.no_grad():
            for parameter in recorded.parameters:
                parameter += 0.1


@pytest.mark.parametrize("name", PRIORS)
def test_recorded_step_is_the_eager_one(name, double, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)  # recorded, not compiled
    assert_recorded_is_eager(name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["VampPrior", "NeuralSplineFlow"])
def test_compiled_step_is_the_eager_one(name, double):
    assert_recorded_is_eager(name, 0)  # a flow's draw is long to compile


# ---- errors


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: priors.DiagonalNormal(0), ValueError, "latent_dim must be 1 or more"),
        (lambda: priors.MixtureOfNormals(2, 0), ValueError, "num_components must be 1 or more, found 0"),
        (lambda: priors.MixtureOfNormals(2, 1.5), TypeError, "num_components must be a whole number"),
        (lambda: priors.NeuralSplineFlow(2, num_transforms=0), ValueError, "num_transforms must be 1 or more"),
        (lambda: priors.NeuralSplineFlow(2, num_bins=1), ValueError, "num_bins must be 2 or more, found 1"),
        (lambda: priors.RealNVP(2, hidden_features=[8, 0]), ValueError, "each of hidden_features must be 1 or more"),
        (lambda: priors.MaskedAutoregressiveFlow(2.0), TypeError, "latent_dim must be a whole number"),
        (lambda: priors.VampPrior(nn.Linear(4, 2), torch.rand(3, 4)), TypeError, "`posterior"),
        (lambda: priors.VampPrior(vamp_guide(2), [[0.5]]), TypeError, "floating-point tensor.*found list"),
        (lambda: priors.VampPrior(vamp_guide(2), torch.ones(3, 4).long()), TypeError, "found torch.int64"),
        (
            lambda: priors.VampPrior(vamp_guide(2), torch.rand(4)),
            ValueError,
            r"\(K, \*data_shape\), found shape \(4,\)",
        ),
        (lambda: priors.VampPrior(vamp_guide(2), torch.rand(0, 4)), ValueError, r"found shape \(0, 4\)"),
        (lambda: priors.VampPrior(vamp_guide(2), torch.full((3, 4), torch.nan)), ValueError, "finite"),
        (lambda: priors.VampPrior(vamp_guide(2), torch.ones(3, 4)), ValueError, "whose ends differ"),
        (lambda: priors.VampPrior(vamp_guide(2), torch.rand(3, 4), data_range=(0.0, 0.1)), ValueError, "data_range"),
    ],
)
def test_errors(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_guide_of_the_wrong_shape_is_named():
    class Sums(nn.Module):
        latent_dim = 2

        def posterior(self, x):
            return dist.Normal(x.sum(0)[:2], 1.0).to_event(1)

    with pytest.raises(ValueError, match=r"3 components must have batch shape \(3,\), found \(\)"):
        priors.VampPrior(Sums(), torch.rand(3, 4))()
