"""Models of several layers and their guides: exact evidence, densities, sites, gradients, recordings."""

import copy
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import Trace_ELBO
from shared.hierarchies import LinearHierarchy, LinearNormal, affine, linear_layer
from shared.parts import GUIDES, PRIORS
from shared.recorded import assert_same_step, eager_step, recorded_step
from torch import nn

import pyrovae as pv
from pyrovae import guides, likelihoods, nets, priors
from pyrovae.compiled.record import Recording
from pyrovae.models.layers import Chain, ConditionalNormal

SHAPE = (1, 4, 3)


@pytest.fixture
def as_recorded(monkeypatch):
    """Recordings run without Inductor, which takes seconds."""
    monkeypatch.setattr(Recording, "compiler", staticmethod(lambda graph: graph))


@pytest.fixture
def hierarchy(double):
    return LinearHierarchy()


@pytest.mark.parametrize("direction", ["bottom_up", "top_down"])
def test_exact_posterior_gives_constant_weights(hierarchy, direction):
    x = hierarchy.data(7)
    log_weights = pv.log_weights(hierarchy.model(), getattr(hierarchy, direction)(), x, num_particles=6)
    assert torch.allclose(log_weights, hierarchy.log_prob(x).expand(6, 7), atol=1e-10, rtol=0)


@pytest.mark.parametrize("direction", ["bottom_up", "top_down"])
def test_evidence_with_another_guide(hierarchy, direction):
    """Wider than the posterior in one layer, in the wrong place in the other."""
    guide = getattr(hierarchy, direction)()
    with torch.no_grad():
        guide.layers[0].head.bias[: guide.layers[0].latent_dim] += 0.3
        first = guide.bottom if direction == "bottom_up" else guide.top
        first.head.bias[first.latent_dim : 2 * first.latent_dim] += 0.4
    x = hierarchy.data(8)
    lml = pv.log_marginal_likelihood(hierarchy.model(), guide, x, num_particles=5000)
    assert lml.gap.min() > 0.05
    within(lml.mean, hierarchy.log_prob(x).mean().item(), lml.mean_mc_stderr + abs(lml.bias_estimate))


def test_evidence_where_the_likelihood_is_given_all_layers(hierarchy):
    """x ~ N(W z1 + V z2 + w, s^2), estimated with the prior as guide."""
    of_z2 = torch.linspace(-0.5, 1, 10).reshape(5, 2)
    likelihood = LinearNormal(affine(torch.cat([hierarchy.W, of_z2], 1), hierarchy.w), (5,), hierarchy.s)
    model = pv.HierarchicalModel(priors.StandardNormal(2), hierarchy.model().layers, likelihood, skip=True)
    onto_z2 = hierarchy.W @ hierarchy.A + of_z2
    covariance = onto_z2 @ onto_z2.T + hierarchy.s1**2 * hierarchy.W @ hierarchy.W.T + hierarchy.s**2 * torch.eye(5)
    truth = dist.MultivariateNormal(hierarchy.mean_x, covariance)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            model.latents(pyro.sample)

    x = truth.sample((6,))
    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=20_000)
    within(lml.mean, truth.log_prob(x).mean().item(), lml.mean_mc_stderr + abs(lml.bias_estimate))


def test_three_layers(hierarchy):
    """z3 on top, z2 given z3 of size 2, z1 given z2 of size 3: the evidence with the prior as guide; and its sites."""
    onto_z2, scale = torch.tensor([[0.7], [-1.2]]), torch.tensor([0.5, 0.3])
    upper = linear_layer(onto_z2, torch.zeros(2), scale)
    likelihood = LinearNormal(affine(hierarchy.W, hierarchy.w), (5,), hierarchy.s)
    model = pv.HierarchicalModel(priors.StandardNormal(1), [upper, *hierarchy.model().layers], likelihood)
    assert model.latent_dims == (3, 2, 1)
    assert model.latent_dim == 6
    onto_x = hierarchy.W @ hierarchy.A
    cov2 = onto_z2 @ onto_z2.T + scale.square().diag()
    covariance = onto_x @ cov2 @ onto_x.T + hierarchy.s1**2 * hierarchy.W @ hierarchy.W.T
    truth = dist.MultivariateNormal(hierarchy.mean_x, covariance + hierarchy.s**2 * torch.eye(5))

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            model.latents(pyro.sample)

    x = truth.sample((6,))
    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=20_000)
    within(lml.mean, truth.log_prob(x).mean().item(), lml.mean_mc_stderr + abs(lml.bias_estimate))
    # Both kinds of guide, of three layers.
    up = pv.BottomUpGuide(guides.MeanFieldNormal(nets.MLP(5, [4]), 3), [small(3, 2), small(2, 1)])
    down = pv.TopDownGuide(
        guides.MeanFieldNormal(nets.MLP(5, [4]), 1), [small(1 + 4, 2), small(2 + 4, 3)], nets.MLP(5, [4])
    )
    for guide in (up, down):
        assert guide.latent_dims == (3, 2, 1)
        assert pv.log_weights(model, guide, x, num_particles=4).shape == (4, 6)
        assert guide.posterior(x).sample((7,)).shape == (7, 6, 6)


def small(given_dim, latent_dim):
    return ConditionalNormal(nets.MLP(given_dim, [4]), latent_dim)


def pair(kind="bottom-up", sizes=(3, 2), vamp=False, skip=False):
    z1, z2 = sizes
    if kind == "bottom-up":
        guide = pv.BottomUpGuide(guides.MeanFieldNormal(nets.MLP(12, [8]), z1), [small(z1, z2)])
    else:
        top = guides.MeanFieldNormal(nets.MLP(12, [8]), z2)
        guide = pv.TopDownGuide(top, [small(z2 + 8, z1)], nets.MLP(12, [8]))
    prior = (
        priors.VampPrior(guide.top, torch.rand(4, *SHAPE), learn_weights=True) if vamp else priors.StandardNormal(z2)
    )
    likelihood = likelihoods.Bernoulli(nets.MLP(z1 + z2 if skip else z1, [8], 12), SHAPE)
    return pv.HierarchicalModel(prior, [small(z2, z1)], likelihood, skip=skip), guide


PAIRS = {
    "bottom-up": lambda: pair("bottom-up"),
    "top-down": lambda: pair("top-down"),
    "top-down, skip": lambda: pair("top-down", skip=True),
    "top-down, vamp": lambda: pair("top-down", vamp=True),
}


def binary(num_data=5):
    return (torch.rand(num_data, *SHAPE) < 0.4) * 1.0


@pytest.mark.parametrize("name", PAIRS)
def test_sites_gradients_training_and_files(name, tmp_path):
    model, guide = PAIRS[name]()
    x = binary()
    guide_trace = poutine.trace(guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x)
    for trace in (guide_trace, model_trace):
        for site, size in (("z1", 3), ("z2", 2)):
            node = trace.nodes[site]
            assert node["value"].shape == (5, size)
            assert node["fn"].event_shape == (size,)
            assert [(frame.name, frame.dim) for frame in node["cond_indep_stack"]] == [("data", -1)]
    assert model_trace.nodes["x"]["is_observed"]

    Trace_ELBO().loss_and_grads(model, guide, x)
    for parameter_name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name

    assert model.generate(6).shape == (6, *SHAPE)
    assert model.generate(6, mean=True).shape == (6, *SHAPE)
    assert model.decode(torch.zeros(3, 4, 5)).shape == (3, 4, *SHAPE)

    before = [parameter.clone() for parameter in model.parameters()]
    history = pv.fit(model, guide, x, epochs=60, batch_size=5, learning_rate=0.02, progress=False).history
    assert history[-1]["elbo"] > history[0]["elbo"]
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    pv.save(tmp_path / "pair.pt", model, guide)
    other_model, other_guide = PAIRS[name]()
    pv.load(tmp_path / "pair.pt", other_model, other_guide)
    z = torch.randn(4, 5)
    assert torch.equal(other_model.decode(z), model.decode(z))
    assert torch.equal(other_guide.posterior(x).mean, guide.posterior(x).mean)
    assert torch.equal(other_model.latent_prior().log_prob(z), model.latent_prior().log_prob(z))
    assert "latent_dims=(3, 2)" in repr(model)
    assert "latent_dims=(3, 2)" in repr(guide)
    copy.deepcopy((model, guide))


@pytest.mark.parametrize("name", PAIRS)
def test_particles_are_drawn_together_and_encoded_once(name):
    """No warning (they are errors) that particles are drawn one by one; and the seam that evaluation uses."""
    model, guide = PAIRS[name]()
    x = binary(40)
    first = guide.bottom if name == "bottom-up" else guide.top
    encodings = []
    first.head.register_forward_hook(lambda *_: encodings.append(1))
    counts = []
    for particle_batch_size in (50, 5):
        encodings.clear()
        options = {"num_particles": 50, "data_batch_size": 16, "particle_batch_size": particle_batch_size}
        assert pv.log_marginal_likelihood(model, guide, x, **options).log_prob.isfinite().all()
        counts.append(len(encodings))
    if "vamp" not in name:  # whose prior encodes its pseudo-inputs at each call
        assert counts[0] == counts[1]
    pyro.set_rng_seed(0)
    direct = poutine.trace(guide).get_trace(x)
    pyro.set_rng_seed(0)
    encoded = poutine.trace(guide.given(guide.encode(x))).get_trace(x)
    for site in ("z1", "z2"):
        assert torch.equal(direct.nodes[site]["value"], encoded.nodes[site]["value"])
    # The joint distribution has the density of the sites together, and the layers in their places.
    z = torch.cat([direct.nodes["z1"]["value"], direct.nodes["z2"]["value"]], -1)
    direct.compute_log_prob()
    total = direct.nodes["z1"]["log_prob"] + direct.nodes["z2"]["log_prob"]
    assert torch.allclose(guide.posterior(x).log_prob(z), total, atol=1e-5)
    assert torch.equal(direct.nodes["_RETURN"]["value"], z)


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_on_top(name):
    _, guide = pair("top-down")
    likelihood = likelihoods.Bernoulli(nets.MLP(3, [8], 12), SHAPE)
    check_pair(pv.HierarchicalModel(PRIORS[name](guide.top), [small(2, 3)], likelihood), guide)


@pytest.mark.parametrize("name", GUIDES)
def test_every_guide_as_the_layer_drawn_first(name):
    model, _ = pair(sizes=(2, 2))
    check_pair(model, pv.BottomUpGuide(GUIDES[name](), [small(2, 2)]))
    model, _ = pair(sizes=(3, 2))
    check_pair(model, pv.TopDownGuide(GUIDES[name](), [small(2 + 8, 3)], nets.MLP(12, [8])))


def check_pair(model, guide):
    x = binary()
    Trace_ELBO().loss_and_grads(model, guide, x)
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert pv.log_weights(model, guide, x, num_particles=4).isfinite().all()
    assert model.generate(3).shape == (3, *SHAPE)
    assert guide.posterior(x).mean.shape == (5, model.latent_dim)


@pytest.mark.parametrize("kind", ["bottom-up", "top-down"])
def test_density_integrates_to_one(kind, double):
    """Of the model's p(z1, z2) and the guide's q(z1, z2|x), with means that are not linear."""
    model, guide = pair(kind, sizes=(1, 1))
    for layer in (model.layers[0], guide.layers[0]):
        layer.head.weight.data[0] *= 3
    axis = torch.linspace(-25, 25, 501)
    grid = torch.cartesian_prod(axis, axis)
    element = (axis[1] - axis[0]) ** 2
    assert (model.latent_prior().log_prob(grid).exp().sum() * element).item() == pytest.approx(1, abs=1e-6)
    posterior = guide.posterior(torch.rand(3, *SHAPE))
    density = posterior.log_prob(grid.unsqueeze(1)).exp() * element
    assert torch.allclose(density.sum(0), torch.ones(3), atol=1e-6)
    # Samples have the moments of that density: means, and the product, which knows of the dependence.
    samples = posterior.sample((40_000,))
    for statistic in (lambda z: z[..., 0], lambda z: z[..., 1], lambda z: z[..., 0] * z[..., 1]):
        expected = (density * statistic(grid).unsqueeze(1)).sum(0)
        values = statistic(samples)
        for datum in range(3):
            within(values[:, datum].mean().item(), expected[datum].item(), values[:, datum].std().item() / 200)


def test_chain_draws_with_gradients_and_expands():
    _, guide = pair("top-down")
    posterior = guide.posterior(binary())
    assert posterior.has_rsample
    assert posterior.rsample((3,)).requires_grad
    assert not posterior.sample((3,)).requires_grad
    expanded = posterior.expand((3, 5))
    assert expanded.batch_shape == (3, 5)
    assert expanded.sample((2,)).shape == (2, 3, 5, 5)
    z = posterior.sample((3,))
    assert torch.allclose(expanded.log_prob(z), posterior.log_prob(z))
    discrete = Chain(dist.Bernoulli(torch.full((2,), 0.5)).to_event(1), [small(2, 1)], (1, 2), top_down=True)
    assert not discrete.has_rsample
    assert discrete.sample((4,)).shape == (4, 3)


def test_mean_of_a_linear_posterior_is_exact(hierarchy):
    x = hierarchy.data(4)
    cross = torch.cat([hierarchy.cov1 @ hierarchy.W.T, hierarchy.A.T @ hierarchy.W.T])
    prior_mean = torch.cat([hierarchy.a, torch.zeros(2)])
    expected = prior_mean + (x - hierarchy.mean_x) @ torch.linalg.inv(hierarchy.cov_x) @ cross.T
    for guide in (hierarchy.bottom_up(), hierarchy.top_down()):
        assert torch.allclose(guide.posterior(x).mean, expected, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS)
def test_recorded_step_is_the_eager_one(name, double, as_recorded):
    model, guide = PAIRS[name]()
    x = binary()
    assert_same_step(eager_step(model, guide, x), recorded_step(model, guide, x), 1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_recorded_weights_are_the_eager_ones(name, double, as_recorded):
    model, guide = PAIRS[name]()
    x, drawn = binary(), {}
    for compiled in (True, False):
        pyro.set_rng_seed(2)
        options = {"num_particles": 12, "particle_batch_size": 4, "compile": compiled}
        drawn[compiled] = pv.log_weights(model, guide, x, **options)
    assert torch.allclose(drawn[True], drawn[False], rtol=1e-12)


@pytest.mark.slow
def test_compiled_weights_are_the_eager_ones():
    model, guide = pv.two_layer_vae()
    x, drawn = (torch.rand(5, 1, 28, 28) < 0.2) * 1.0, {}
    for compiled in (True, False):
        pyro.set_rng_seed(2)
        options = {"num_particles": 12, "particle_batch_size": 4, "compile": compiled}
        drawn[compiled] = pv.log_weights(model, guide, x, **options)
    assert torch.allclose(drawn[True], drawn[False], rtol=1e-5)


def test_two_layer_vae_has_the_sizes_of_the_paper():
    def count(*widths):
        return sum(a * b + b for a, b in pairwise(widths))

    model, guide = pv.two_layer_vae()
    # Each normal has a mean and a scale: heads twice as wide as the layer.
    assert sum(p.numel() for p in guide.parameters()) == count(784, 200, 200, 2 * 100) + count(100, 100, 100, 2 * 50)
    decoder = count(50, 100, 100, 2 * 100) + count(100, 200, 200, 784)
    pixel_bias = 784  # `Bernoulli` has one beside the network's
    assert sum(p.numel() for p in model.parameters()) == decoder + pixel_bias
    assert sum(isinstance(module, nn.Tanh) for module in [*model.modules(), *guide.modules()]) == 8
    assert model.latent_dims == guide.latent_dims == (100, 50)
    mean = torch.rand(SHAPE).clamp(0.1, 0.9)
    prior = priors.StandardNormal(3)
    model, guide = pv.two_layer_vae(SHAPE, latent_dims=(4, 3), hidden_features=(6, 5), prior=prior, data_mean=mean)
    assert model.prior is prior
    assert torch.allclose(model.likelihood.bias.sigmoid(), mean)
    assert pv.log_weights(model, guide, binary(), num_particles=2).shape == (2, 5)


# --- decoding from above ----------------------------------------------------------------------------------------------


def test_decode_from_the_upper_layers(hierarchy):
    model = hierarchy.model()
    z2 = torch.randn(4, 3, 2)
    z1 = z2 @ hierarchy.A.T + hierarchy.a
    assert torch.allclose(model.decode(z2), z1 @ hierarchy.W.T + hierarchy.w)
    assert torch.allclose(model.decode(torch.cat([z1 + 1, z2], -1)), (z1 + 1) @ hierarchy.W.T + hierarchy.w)
    # With mean=False z1 is drawn too: x has the variance of both.
    draws = model.decode(z2[0, 0].expand(40_000, 2), mean=False)
    covariance = hierarchy.s1**2 * hierarchy.W @ hierarchy.W.T + hierarchy.s**2 * torch.eye(5)
    within(
        draws[:, 0].mean().item(), (z1[0, 0] @ hierarchy.W.T + hierarchy.w)[0].item(), draws[:, 0].std().item() / 200
    )
    variance = covariance[1, 1].item()
    within(draws[:, 1].var().item(), variance, variance * (2 / 40_000) ** 0.5)
    with pytest.raises(
        ValueError, match=r"width 5 \(layers of \(3, 2\)\), or \[2\] for the upper layers alone; found 3"
    ):
        model.decode(torch.zeros(4, 3))


def test_generated_data_have_the_moments_of_the_model(hierarchy):
    x = hierarchy.model().generate(40_000)
    for pixel in range(5):
        variance = hierarchy.cov_x[pixel, pixel].item()
        within(x[:, pixel].mean().item(), hierarchy.mean_x[pixel].item(), (variance / 40_000) ** 0.5)
        within(x[:, pixel].var().item(), variance, variance * (2 / 40_000) ** 0.5)


def test_modules_are_put_back():
    model, guide = pair("top-down")
    model.layers[0].eval()
    modes = [module.training for module in [*model.modules(), *guide.modules()]]
    model.decode(torch.zeros(4, 5))
    model.decode(torch.zeros(4, 2), mean=False)
    model.generate(3)
    assert [module.training for module in [*model.modules(), *guide.modules()]] == modes


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors():
    likelihood = likelihoods.Bernoulli(nets.MLP(3, [4], 12), SHAPE)
    bottom = guides.MeanFieldNormal(nets.MLP(12, [8]), 3)
    with pytest.raises(ValueError, match="at least one layer"):
        pv.HierarchicalModel(priors.StandardNormal(2), [], likelihood)
    with pytest.raises(ValueError, match="at least one layer"):
        pv.BottomUpGuide(bottom, [])
    with pytest.raises(ValueError, match="at least one layer"):
        pv.TopDownGuide(bottom, [], nets.MLP(12, [8]))
    with pytest.raises(ValueError, match="pass num_features="):
        pv.TopDownGuide(bottom, [small(11, 2)], nn.Flatten())
    with pytest.raises(ValueError, match="pass num_features="):
        ConditionalNormal(nn.Tanh(), 2)
    with pytest.raises(ValueError, match="latent_dim must be 1 or more"):
        small(3, 0)
    with pytest.raises(ValueError, match=r"takes 9 numbers \(its in_features\), and is given 3 \+ 8: make it for 11"):
        pv.TopDownGuide(bottom, [small(9, 2)], nets.MLP(12, [8]))(binary())
    with pytest.raises(ValueError, match="must give features"):
        ConditionalNormal(nets.MLP(3, [4]), 2, num_features=5)(torch.zeros(2, 3))
    model, guide = pair()
    with pytest.raises(ValueError, match=r"shape \(N, 1, 4, 3\)"):
        model(torch.zeros(3, 12))
    with pytest.raises(ValueError, match="found 0.5: binarise"):
        model(torch.full((2, *SHAPE), 0.5))
    one_layer = pv.GenerativeModel(priors.StandardNormal(3), likelihood)
    with pytest.raises(ValueError, match=r"does not sample the model's latent site\(s\) \['z'\]"):
        pv.log_weights(one_layer, guide, binary(), num_particles=2)
