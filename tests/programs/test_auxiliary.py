"""Guides that carry auxiliary draws to the latents: the change of variables has to be right, and there has to be one."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import LinearGaussian, within
from pyro.infer import autoguide

import pyrovae as pv
from pyrovae.programs import auxiliary

AUXILIARY = {"is_auxiliary": True}
A, B = 2.0, 0.5  # rate ~ Gamma(A, B), x ~ Poisson(rate)


def rate_model(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(A, B))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def rate_guide(log_density, wrap=lambda delta: delta):
    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(((A + x) / (B + 1)).log(), 0.6), infer=AUXILIARY)
            pyro.sample("rate", wrap(dist.Delta(u.exp(), log_density=log_density(u))))

    return guide


COUNTS = torch.tensor([0.0, 1.0, 4.0, 9.0])


@pytest.fixture(autouse=True)
def _clear():
    yield
    pyro.clear_param_store()


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: d.mask(True), lambda d: d.to_event(0)])
def test_a_change_of_variables_written_by_hand(double, wrap):
    """u ~ N, rate = exp(u), log_density = -u: the log-normal guide, and the negative binomial evidence."""
    x = COUNTS
    lml = pv.log_marginal_likelihood(rate_model, rate_guide(lambda u: -u, wrap), x, num_particles=10_000)
    for datum, truth in enumerate(dist.GammaPoisson(A, B).log_prob(x).tolist()):
        within(lml.log_prob[datum].item(), truth, lml.stderr[datum].item())


@pytest.mark.parametrize("num_data", [1, 4, 100])
@pytest.mark.parametrize("log_density", [lambda u: 0.0, lambda u: u, lambda u: -u - 0.1], ids=["none", "sign", "off"])
def test_a_wrong_log_density_is_refused(log_density, num_data):
    x = COUNTS.repeat(25)[:num_data] if num_data != 1 else COUNTS[2:3]
    with pytest.raises(ValueError, match=r"Delta sites \['rate'\] of the guide carry the auxiliary draws \['u'\]"):
        pv.log_marginal_likelihood(rate_model, rate_guide(log_density), x, num_particles=5)


def shifted_pair(log_density):
    """A non-centred guide of two numbers that mix: z = m + L u."""
    linear = LinearGaussian(latent_dim=2)
    scale_tril = torch.linalg.cholesky(1.3 * linear.covariance)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1), infer=AUXILIARY)
            z = linear.posterior_mean(x) + u @ scale_tril.T
            pyro.sample("z", dist.Delta(z, log_density=log_density(scale_tril), event_dim=1))

    return linear, guide


def test_a_change_of_variables_that_mixes_dimensions(double):
    linear, guide = shifted_pair(lambda scale_tril: -scale_tril.diagonal().log().sum())
    x = linear.data(6)
    lml = pv.log_marginal_likelihood(linear.model, guide, x, num_particles=4000)
    for datum, truth in enumerate(linear.log_prob(x).tolist()):
        within(lml.log_prob[datum].item(), truth, lml.stderr[datum].item())
    _, wrong = shifted_pair(lambda scale_tril: -scale_tril.sum())
    with pytest.raises(ValueError, match="log determinant of the Jacobian"):
        pv.log_marginal_likelihood(linear.model, wrong, x, num_particles=5)


def test_a_latent_drawn_directly_beside_one_that_is_carried(double):
    """rate depends on the other latent z, which is drawn in the open: only d rate / d u counts."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 0.3))
            rate = pyro.sample("rate", dist.Gamma(A, B))
            pyro.sample("x", dist.Poisson(rate * z.exp()), obs=x)

    def guide(log_density):
        def run(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 0.3))
                u = pyro.sample("u", dist.Normal(((A + x) / (B + 1)).log(), 0.6), infer=AUXILIARY)
                pyro.sample("rate", dist.Delta((u - z).exp(), log_density=log_density(u, z)))

        return run

    wide = pv.log_marginal_likelihood(model, guide(lambda u, z: z - u), COUNTS, num_particles=10_000)
    nodes, weights = torch.linspace(-2.4, 2.4, 4001), 4.8 / 4000  # the truth by quadrature over z
    for datum, x in enumerate(COUNTS):
        # Gamma-Poisson with exposure e^z: x ~ NB(A, B / e^z)
        terms = dist.Normal(0.0, 0.3).log_prob(nodes) + dist.GammaPoisson(A, B * (-nodes).exp()).log_prob(x)
        truth = (terms.logsumexp(0) + math.log(weights)).item()
        within(wide.log_prob[datum].item(), truth, wide.stderr[datum].item())
    with pytest.raises(ValueError, match="log determinant of the Jacobian"):
        pv.log_marginal_likelihood(model, guide(lambda u, z: -u), COUNTS, num_particles=5)


def constrained_model(x):
    """Latents on every kind of support: the line, the half line, an interval, a simplex; one of them global."""
    shared = pyro.sample("shared", dist.HalfNormal(1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + shared * share + weights[..., 0].unsqueeze(-1), 1.0), obs=x)


AUTOMATIC = {
    "AutoNormal": lambda model: autoguide.AutoNormal(model),
    "AutoDiagonalNormal": lambda model: autoguide.AutoDiagonalNormal(model),
    "AutoMultivariateNormal": lambda model: autoguide.AutoMultivariateNormal(model),
    "AutoLowRankMultivariateNormal": lambda model: autoguide.AutoLowRankMultivariateNormal(model, rank=2),
    "AutoIAFNormal": lambda model: autoguide.AutoIAFNormal(model, hidden_dim=[12]),
    "AutoStructured, normal": lambda model: autoguide.AutoStructured(model, conditionals="normal"),
    "AutoStructured, mvn": lambda model: autoguide.AutoStructured(model, conditionals="mvn"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", AUTOMATIC)
def test_automatic_guides_are_taken_as_they_are(name, dtype, monkeypatch):
    """The stretch of space that Pyro's guides claim is the one that autograd finds, and nothing is refused."""
    seen, original = [], auxiliary._claimed_and_found
    monkeypatch.setattr(auxiliary, "_claimed_and_found", lambda *args: seen.append(original(*args)) or seen[-1])
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        x = torch.randn(4)
        guide = AUTOMATIC[name](constrained_model)
        lml = pv.log_marginal_likelihood(constrained_model, guide, x, num_particles=30, vectorize_particles=False)
    finally:
        torch.set_default_dtype(default)
    assert lml.log_prob.shape == (1,)
    assert lml.log_prob.isfinite().all()
    assert len(seen) >= 3
    for claimed, found in seen:
        assert torch.allclose(claimed, found, atol=1e-2 if dtype == torch.float32 else 1e-8)


def two_latents(x):
    with pyro.plate("data", len(x)):
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        second = pyro.sample("second", dist.Normal(first, 1.0))
        pyro.sample("x", dist.Normal(second, 1.0), obs=x)


def test_delta_conditionals_of_auto_structured():
    x = torch.randn(4)
    everywhere = autoguide.AutoStructured(two_latents, conditionals="delta")
    with pytest.raises(ValueError, match="all its mass on one point at site 'first'"):
        pv.log_marginal_likelihood(two_latents, everywhere, x, num_particles=5)
    kinds = {"first": "normal", "second": "delta"}
    one = autoguide.AutoStructured(two_latents, conditionals=kinds, dependencies={"second": {"first": "linear"}})
    one(x)
    with pytest.raises(ValueError, match="all its mass on one point at site 'second'|draws 4 numbers .* a surface"):
        pv.log_marginal_likelihood(two_latents, one, x, num_particles=5)
    with torch.no_grad():  # trained, the point moves with the other latent: random, and still without a density
        one.deps.second.first.weight.fill_(0.5)
    with pytest.raises(
        ValueError, match=r"draws 4 numbers .* for 8 latent ones, .*\['first', 'second'\] put all mass on a"
    ):
        pv.log_marginal_likelihood(two_latents, one, x, num_particles=5)


def test_points_inside_events_are_points():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.ones(len(x), 2)).to_event(1))

    with pytest.raises(ValueError, match="all its mass on one point at site 'z'"):
        pv.log_marginal_likelihood(model, guide, torch.randn(4), num_particles=5)
