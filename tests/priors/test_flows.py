"""The flow adapter: draw and density in one call, right under gradients, changes and recordings; torch left as it was."""

import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyrovae.compiled.record import record
from pyrovae.distributions.zuko_adapter import FlowDistribution, _spread_points, import_zuko, start_near_identity

IMPORT = """
import torch, pyro
Distribution = torch.distributions.Distribution
before = Distribution._validate_args, Distribution.__dict__["arg_constraints"]
assert before[0] is {validation}
from pyrovae.distributions.zuko_adapter import import_zuko, FlowDistribution
zuko = import_zuko()
assert import_zuko() is zuko
assert (Distribution._validate_args, Distribution.__dict__["arg_constraints"]) == before
flow = FlowDistribution(zuko.flows.NSF(2, 3)(torch.zeros(4, 3)))  # without a warning
assert flow.log_prob(flow.expand((5, 4)).sample()).shape == (5, 4)
zuko.distributions.Mixture(torch.distributions.Normal(torch.zeros(2), 1.0), torch.zeros(2)).log_prob(torch.zeros(()))
try:
    torch.distributions.Normal(0.0, -1.0)
    refused = False
except ValueError:
    refused = True
assert refused is {validation}
"""


@pytest.mark.parametrize("validation", [True, False])
def test_import_leaves_the_validation_of_distributions(validation):
    code = IMPORT.format(validation=validation)
    if not validation:
        code = "import pyro; pyro.enable_validation(False)\n" + code
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def make(kind="IAF", latent_dim=3, num_context=4):
    """A conditional flow far from the identity; IAF: quick to draw from."""
    zuko = import_zuko()
    flow = {"NSF": zuko.flows.NSF}.get(kind, zuko.flows.MAF)(
        latent_dim, num_context, transforms=2, hidden_features=[16]
    )
    if kind == "IAF":
        flow = zuko.lazy.Flow([transform.inv for transform in flow.transform.transforms], flow.base)
    start_near_identity(flow, 3.0)
    return flow


def distribution(flow, context):
    return FlowDistribution(flow(context), parameters=flow.parameters())


@pytest.fixture
def densities(monkeypatch):
    """The values whose density had to be computed anew."""
    calls = []
    kind = import_zuko().distributions.NormalizingFlow
    log_prob = kind.log_prob
    monkeypatch.setattr(kind, "log_prob", lambda self, value: (calls.append(value), log_prob(self, value))[1])
    return calls


@pytest.mark.parametrize("kind", ["IAF", "MAF", "NSF"])
@pytest.mark.parametrize("draw", ["sample", "rsample"])
def test_the_density_of_a_draw_is_the_density(kind, draw, double, densities):
    q = distribution(make(kind), torch.randn(5, 4))
    for shaped in (q, q.expand((7, 5)), q.expand_by((2,))):
        for sample_shape in ((), (6,), (6, 2)):
            value = getattr(shaped, draw)(sample_shape)
            assert value.shape == (*sample_shape, *shaped.batch_shape, 3)
            assert value.requires_grad == (draw == "rsample")
            with torch.no_grad():
                given = shaped.log_prob(value)
                assert not densities
                assert not given.requires_grad
                afresh = shaped.log_prob(value.clone())
                assert torch.allclose(given, afresh, rtol=1e-9, atol=1e-9)
            assert densities
            densities.clear()


@pytest.mark.parametrize("kind", ["IAF", "MAF", "NSF"])
def test_other_shapes_of_values(kind, double):
    flow, context = make(kind), torch.randn(5, 4)
    q = distribution(flow, context)
    values = torch.randn(6, 5, 3)
    one_by_one = torch.stack([q.log_prob(value) for value in values])
    assert torch.allclose(q.log_prob(values), one_by_one)
    assert torch.allclose(q.expand((6, 5)).log_prob(values), one_by_one)
    assert torch.allclose(q.expand((6, 5)).log_prob(values[0]), one_by_one[0].expand(6, 5))
    each = torch.cat([distribution(flow, one[None]).log_prob(values[0, :1]) for one in context])
    assert torch.allclose(q.log_prob(values[0, 0]), each)
    assert torch.allclose(q.log_prob(values[:, :1])[0], each)


def test_attributes():
    q = distribution(make(), torch.randn(5, 4))
    assert q.has_rsample
    assert q.support is dist.constraints.real_vector
    assert repr(q) == "FlowDistribution(batch_shape=(5,), event_shape=(3,))"
    with pytest.raises(ValueError, match="support"):
        q.log_prob(torch.full((5, 3), torch.nan))
    with pytest.raises(ValueError, match="shape"):
        q.log_prob(torch.zeros(5, 2))
    zuko = import_zuko()
    base = torch.distributions.Independent(torch.distributions.Bernoulli(torch.full((3,), 0.5)), 1)
    coins = FlowDistribution(
        zuko.distributions.NormalizingFlow(zuko.transforms.PermutationTransform(torch.arange(3)), base)
    )
    assert not coins.has_rsample
    with pytest.raises(NotImplementedError, match="use `sample`"):
        coins.rsample()
    assert coins.sample((4,)).shape == (4, 3)


def gradients(of, flow, context):
    return torch.autograd.grad(of.sum(), [context, *flow.parameters()], allow_unused=True)


def same(first, second):
    return all(torch.allclose(a, b, rtol=1e-7, atol=1e-7) for a, b in zip(first, second, strict=True))


def test_the_gradient_of_a_reparameterised_draws_density_is_whole(double, densities):
    flow, context = make(), torch.randn(5, 4, requires_grad=True)
    pyro.set_rng_seed(0)
    q = distribution(flow, context)
    value = q.rsample((6,))
    given = gradients(q.log_prob(value) * value.sum(-1), flow, context)
    assert not densities
    pyro.set_rng_seed(0)
    q = distribution(flow, context)
    value = q.rsample((6,))
    afresh = gradients(q.flow.log_prob(value) * value.sum(-1), flow, context)
    assert same(given, afresh)
    assert given[0].abs().sum() > 0


def test_the_gradient_of_a_constant_draws_density_is_the_score(double, densities):
    """`sample`, or a draw without gradients, and then a density with: the value is a constant."""
    flow, context = make(), torch.randn(5, 4, requires_grad=True)
    q = distribution(flow, context)
    with torch.no_grad():
        drawn_without = q.rsample((6,))
        q.log_prob(drawn_without)
    for value in (drawn_without, q.sample((6,))):
        densities.clear()
        score = gradients(q.log_prob(value), flow, context)
        assert densities
        assert same(score, gradients(q.flow.log_prob(value.clone()), flow, context))


def test_a_density_by_the_value_alone(double):
    """With parameters that have no gradient, a draw made to require one gets it."""
    flow = make().requires_grad_(False)
    q = distribution(flow, torch.randn(5, 4))
    value = q.rsample()
    value.requires_grad_()
    (slope,) = torch.autograd.grad(q.log_prob(value).sum(), value)
    other = value.detach().requires_grad_()
    assert torch.allclose(slope, torch.autograd.grad(q.flow.log_prob(other).sum(), other)[0])


@pytest.mark.parametrize("changed", ["value", "parameter"])
def test_a_density_is_not_given_again_after_a_change(changed, double, densities):
    flow = make()
    q = distribution(flow, torch.randn(5, 4))
    with torch.no_grad():
        value = q.sample()
        before = q.log_prob(value)
        assert not densities
        (value if changed == "value" else next(flow.parameters())).mul_(1.5)
        assert not torch.allclose(q.log_prob(value), before)
        assert len(densities) == 1


def test_inference_mode(double):
    with torch.inference_mode():
        q = distribution(make(), torch.randn(5, 4))
        value = q.sample()
        before = q.log_prob(value)
        assert torch.allclose(before, q.flow.log_prob(value))
        value.mul_(2)
        assert torch.allclose(q.log_prob(value), q.flow.log_prob(value))


def test_pyro_does_not_invert(double, densities):
    """The guide's own draw has its density at hand: under plates, when the model is run on it, in Pyro's ELBO."""
    flow, context = make(), torch.randn(5, 4)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", distribution(flow, x))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., [0, 1, 2, 0]], 1.0).to_event(1), obs=x)

    for num_particles in (None, 6):

        def under_plate(program, num_particles=num_particles):
            if num_particles is None:
                return program
            return lambda x: pyro.plate("particles", num_particles, dim=-2)(program)(x)

        guide_trace = poutine.trace(under_plate(guide)).get_trace(context)
        model_trace = poutine.trace(poutine.replay(under_plate(model), trace=guide_trace)).get_trace(context)
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
        site = guide_trace.nodes["z"]
        assert site["log_prob"].shape == ((5,) if num_particles is None else (6, 5))
        assert model_trace.nodes["z"]["value"] is site["value"]
        assert not densities
        assert torch.allclose(site["log_prob"], site["fn"].flow.log_prob(site["value"]))
        densities.clear()
    Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1).loss_and_grads(model, guide, context)
    assert not densities
    assert all(parameter.grad is None for parameter in flow.parameters())  # no param sites here: nothing to train


@pytest.mark.parametrize("kind", ["IAF", "NSF"])
def test_mean(kind, double):
    flow, context = make(kind), torch.randn(5, 4, requires_grad=True)
    before = torch.get_rng_state()
    mean = distribution(flow, context).mean
    assert torch.equal(torch.get_rng_state(), before)
    draws = distribution(flow, context).sample((5_000,))
    for datum in range(5):
        for dim in range(3):
            # At worst it errs as 128 independent draws do.
            stderr = draws[:, datum, dim].std().item() * (1 / 128 + 1 / 5_000) ** 0.5
            within(draws[:, datum, dim].mean().item(), mean[datum, dim].item(), stderr)
    # Its own for each datum, whatever the others and the shape of the batch.
    assert torch.allclose(distribution(flow, context[2:3]).mean, mean[2:3])
    assert torch.allclose(distribution(flow, context).expand((4, 5)).mean, mean.expand(4, 5, 3))
    assert all(gradient.abs().sum() > 0 for gradient in gradients(mean, flow, context))


def test_mean_of_an_affine_flow_is_exact(double):
    zuko = import_zuko()
    flow = zuko.lazy.Flow([zuko.flows.ElementWiseTransform(3)], zuko.flows.MAF(3).base)
    shift, log_scale = flow.transform.transforms[0].phi
    scale = zuko.transforms.MonotonicAffineTransform(shift, log_scale).scale
    assert torch.allclose(FlowDistribution(flow()).mean, -shift / scale)


def test_points_of_the_mean_are_spread_evenly():
    points = torch.as_tensor(_spread_points(128, 7))
    assert points.shape == (128, 7)
    for column in points.T:
        assert (torch.histc(column, 64, 0.0, 1.0) == 2).all()
    assert torch.allclose(points.mean(0), torch.full((7,), 0.5, dtype=torch.double))
    assert (torch.corrcoef(points.T) - torch.eye(7)).abs().max() < 4.5 / 64**0.5


def test_in_many_pieces_the_mean_is_the_same(double, monkeypatch):
    q = distribution(make(), torch.randn(5, 4))
    whole = q.mean
    monkeypatch.setattr("pyrovae.distributions.zuko_adapter._MEAN_ROWS", 35)  # 7 points at a time, and 2
    assert torch.allclose(q.mean, whole)


@pytest.mark.parametrize("kind", ["IAF", "NSF"])
def test_recorded_draw_density_mean_and_gradients_are_the_eager_ones(kind, double, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)  # recorded, not compiled
    flow, context = make(kind, latent_dim=2), torch.randn(5, 4)

    def function(context):
        q = distribution(flow, context)
        value = q.rsample((2,))
        log_prob = q.log_prob(value)
        return (value.square().sum(-1) + log_prob).sum(), value, log_prob, q.mean

    recorded = record(function, [flow], [context], gradients=True)
    for seed in (0, 1):  # and with other parameters
        pyro.set_rng_seed(seed)
        outputs, grads = recorded(context)
        pyro.set_rng_seed(seed)
        eager = function(context)
        assert same(outputs, eager)
        assert same(grads, torch.autograd.grad(eager[0], list(flow.parameters())))
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.mul_(0.5)


def test_near_identity(double):
    flow = import_zuko().flows.NSF(3, 4)
    start_near_identity(flow, 1e-6)
    z = torch.randn(5, 3)
    normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    assert torch.allclose(flow(torch.randn(5, 4)).log_prob(z), normal.log_prob(z), atol=1e-4)


def test_moments_follow_the_density(double):
    """E_q[g] of draws against a grid of the density, in two dimensions."""
    q = distribution(make("NSF", latent_dim=2), torch.randn(1, 4))
    axis = torch.linspace(-9, 9, 301)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = q.log_prob(grid.unsqueeze(1)).exp().squeeze(1) * (axis[1] - axis[0]) ** 2
    assert mass.sum().item() == pytest.approx(1, abs=1e-3)
    draws = q.sample((20_000,)).squeeze(1)
    for of in (lambda z: z[:, 0], lambda z: z[:, 1].square(), lambda z: z[:, 0] * z[:, 1]):
        within(of(draws).mean().item(), (mass * of(grid)).sum().item(), of(draws).std().item() / 20_000**0.5 + 1e-3)
