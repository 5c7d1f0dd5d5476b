"""The parts of the gap of hand-written guides, whose family is that of their sites' distributions at each datum."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import LinearGaussian, within
from pyro import poutine
from torch import nn
from torch.distributions import transforms as maps

import pyrovae as pv
from pyrovae import guides
from pyrovae.guides.program_guide import guide_of


@pytest.fixture
def linear_gaussian(double):
    """A mean-field posterior of this one leaves importance weights of finite variance: k = 0.43."""
    return LinearGaussian(scale=1.5)


def mean_within(values, truth, stderrs, slack=0.0):
    within(values.mean().item(), truth, stderrs.square().sum().sqrt().item() / len(stderrs) + slack)


def amortised(shift, factor):
    """A mean-field guide whose encoder is off: means by `shift`, scales by `factor`, in units known in closed form."""

    def make(linear_gaussian):
        def guide(x):
            with pyro.plate("data", len(x), dim=-1):
                loc = linear_gaussian.posterior_mean(x) + shift
                pyro.sample("z", dist.Normal(loc, factor * linear_gaussian.mean_field_scale()).to_event(1))

        return guide

    return make


def test_both_parts_in_closed_form(linear_gaussian):
    """approximation = KL(best diagonal normal || posterior); amortization = KL(guide || posterior) - that."""
    shift, factor = torch.tensor([0.4, -0.3, 0.2]), 1.6
    guide = amortised(shift, factor)(linear_gaussian)
    x = linear_gaussian.data(20)
    covariance = (factor * linear_gaussian.mean_field_scale()).square().diag_embed()
    of_guide = dist.MultivariateNormal(shift, covariance)
    exact = dist.MultivariateNormal(torch.zeros(3), linear_gaussian.covariance)
    whole, family = torch.distributions.kl_divergence(of_guide, exact).item(), linear_gaussian.mean_field_gap()
    assert family > 0.09
    assert whole - family > 0.5
    found = pv.inference_gaps(linear_gaussian.model, guide, x, num_particles=3000, tolerance=0.02)
    mean_within(found.log_prob, linear_gaussian.log_prob(x).mean().item(), found.stderr, slack=2e-3)
    mean_within(found.approximation, family, found.approximation_stderr, slack=2e-3)
    mean_within(found.amortization, whole - family, found.amortization_stderr, slack=2e-3)
    assert found.converged.all()


def test_the_numbers_of_the_librarys_guide(linear_gaussian):
    """A library guide called by a function is the same family in the same coordinates, so the same steps find it."""
    guide = guides.MeanFieldNormal(nn.Identity(), 3, num_features=5)
    x = linear_gaussian.data(6)
    found = []
    for program in (guide, lambda x: guide(x)):
        pyro.set_rng_seed(4)
        found.append(pv.inference_gaps(linear_gaussian.model, program, x, num_particles=2000, max_num_steps=400))
    ours, theirs = found
    for name in ("approximation", "amortization", "elbo", "best_elbo"):
        difference = (getattr(ours, name) - getattr(theirs, name)).mean().item()
        errors = torch.stack([getattr(result, f"{name}_stderr") for result in found]).square().sum().sqrt().item() / 6
        within(difference, 0.0, errors)
    # As functions of the data both start at the same q, and the parameters are the same numbers.
    family = guide_of(linear_gaussian.model, lambda x: guide(x), (x,), {})
    with torch.no_grad():
        assert torch.allclose(family.encode(x), guide.encode(x))
        refined = [guides.Refined(q, linear_gaussian.model, 20).encode(x) for q in (guide, family)]
    assert torch.allclose(*refined, atol=1e-8)


class Nested:
    """mu ~ N(0, 1), b_j ~ N(0, 1) for j in a plate within a datum, x_j ~ N(mu + b_j, s): normal, so all is known.

    The plate of the data is at -2, left of the plate inside (`inside_left=False`), or at -1.
    """

    num_parts, scale = 3, 0.8

    def __init__(self, inside_left):
        self.inside_left = inside_left
        self.data_dim, self.part_dim = (-1, -2) if inside_left else (-2, -1)

    def plates(self, x):
        return pyro.plate("data", len(x), dim=self.data_dim), pyro.plate("parts", 3, dim=self.part_dim)

    def shaped(self, values):
        """(N, 3) as the batch shape of the plates."""
        return values.T if self.inside_left else values

    def model(self, x):
        data, parts = self.plates(x)
        with data:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with parts:
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(mu + b, self.scale), obs=self.shaped(x))

    def guide(self, x):
        data, parts = self.plates(x)
        with data:
            pyro.sample("mu", dist.Normal(0.5 * (x.mean(1) if self.inside_left else x.mean(1, keepdim=True)), 0.6))
            with parts:
                pyro.sample("b", dist.Normal(self.shaped(0.3 * x), 0.7))

    def posterior(self, x):
        """Over (mu, b_1, b_2, b_3)."""
        matrix = torch.cat([torch.ones(3, 1), torch.eye(3)], 1)
        precision = torch.eye(4) + matrix.T @ matrix / self.scale**2
        mean = torch.linalg.solve(precision, (x @ matrix / self.scale**2).T).T
        evidence = dist.MultivariateNormal(torch.zeros(3), matrix @ matrix.T + self.scale**2 * torch.eye(3))
        return mean, precision, evidence.log_prob(x)


@pytest.mark.parametrize("inside_left", [True, False])
def test_several_sites_and_a_plate_within_a_datum(inside_left, double):
    """Two sites, of which one has an element for each part: mean field over four numbers, in closed form."""
    nested = Nested(inside_left)
    x = torch.randn(12, 3) * 1.5 + torch.tensor([0.5, -1.0, 2.0])
    mean, precision, evidence = nested.posterior(x)
    family = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()
    loc = torch.cat([0.5 * x.mean(1, keepdim=True), 0.3 * x], 1)
    scale = torch.tensor([0.6, 0.7, 0.7, 0.7])
    q = dist.MultivariateNormal(loc, scale.square().diag_embed())
    exact = dist.MultivariateNormal(mean, precision_matrix=precision.expand(12, 4, 4))
    whole = torch.distributions.kl_divergence(q, exact)
    found = pv.inference_gaps(nested.model, nested.guide, x, num_particles=3000, plate="data", tolerance=0.02)
    mean_within(found.log_prob, evidence.mean().item(), found.stderr, slack=5e-3)
    mean_within(found.approximation, family, found.approximation_stderr, slack=5e-3)
    errors = (found.amortization - (whole - family)) / (found.amortization_stderr + 5e-3)
    assert errors.abs().max() < 4.5
    assert (whole - family).max() > 0.2


FAMILIES = {
    "Gamma": lambda x: dist.Gamma(x.exp() + 1, (0.3 * x).exp()).to_event(1),
    "LogNormal": lambda x: dist.LogNormal(0.1 * x, (0.2 * x).exp()).to_event(1),
    "Beta, transformed": lambda x: dist.TransformedDistribution(
        dist.Beta(x.exp(), 1 + x.exp()).to_event(1), [maps.AffineTransform(0.0, 9.0)]
    ),
    "exp of a normal": lambda x: dist.TransformedDistribution(dist.Normal(x, 0.5).to_event(1), [maps.ExpTransform()]),
    "inverse": lambda x: dist.TransformedDistribution(
        dist.Normal(x, 0.5),
        [maps.ComposeTransform([maps.ExpTransform(), maps.ExpTransform().inv, maps.ExpTransform()])],
    ).to_event(1),
    "Weibull": lambda x: dist.Weibull(x.exp(), torch.tensor(1.5)).to_event(1),
}
REAL = {
    "full rank": lambda x: dist.MultivariateNormal(
        x, scale_tril=torch.diag_embed(0.1 * x.exp()) + 0.1 * torch.ones(2, 2).tril(-1)
    ),
    "covariance": lambda x: dist.MultivariateNormal(x, torch.eye(2) + 0.5 * torch.ones(2, 2)),
    "low rank": lambda x: dist.LowRankMultivariateNormal(x, 0.3 * x.unsqueeze(-1), x.exp()),
    "StudentT": lambda x: dist.StudentT(3.0, x, (0.1 * x).exp()).to_event(1),
    "Laplace": lambda x: dist.Laplace(x, 0.5).to_event(1),
}


def programs(q, positive):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            prior = dist.Gamma(2.0, 1.0) if positive else dist.Normal(0.0, 1.0)
            z = pyro.sample("z", prior.expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", q(x))

    return model, guide


@pytest.mark.parametrize("name", [*FAMILIES, *REAL])
def test_a_family_goes_through_its_free_parameters(name, double):
    """encode and back is the guide's own density, for data other than those looked at too; and moving them moves q."""
    model, guide = programs({**FAMILIES, **REAL}[name], name in FAMILIES)
    x = torch.randn(40, 2)
    family = guide_of(model, guide, (x,), {})
    with torch.no_grad():
        parameters = family.encode(x[33:])
    trace = poutine.trace(guide).get_trace(x[33:])
    site = trace.nodes["z"]
    assert torch.allclose(family.distribution(parameters).log_prob(site["value"]), site["fn"].log_prob(site["value"]))
    given = poutine.trace(family.given(parameters)).get_trace()
    assert torch.allclose(given.nodes["z"]["fn"].log_prob(site["value"]), site["fn"].log_prob(site["value"]))
    changed = [
        not torch.allclose(
            family.distribution(parameters + 0.1 * torch.eye(parameters.shape[1])[column]).log_prob(site["value"]),
            site["fn"].log_prob(site["value"]),
        )
        for column in range(parameters.shape[1])
    ]
    # Of a matrix with zeros above its diagonal, the number that stands for the zero does nothing.
    assert changed.count(False) == (1 if name in ("full rank", "covariance") else 0)


def test_the_best_of_a_family_on_positive_numbers(double):
    """x ~ Poisson(z), z ~ Gamma(2, 1): the posterior Gamma(2 + x, 2) is in the family, so the encoder has all of the gap."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Gamma(1.0 + 0.5 * x, 1.0))

    x = torch.tensor([1.0, 4.0, 7.0])
    found = pv.inference_gaps(model, guide, x, num_particles=2000, learning_rate=0.1, max_num_steps=400, tolerance=0.02)
    exact = dist.NegativeBinomial(2.0, probs=torch.tensor(0.5)).log_prob(x)
    whole = torch.distributions.kl_divergence(dist.Gamma(1.0 + 0.5 * x, 1.0), dist.Gamma(2 + x, torch.tensor(2.0)))
    for row in range(3):
        within(found.log_prob[row].item(), exact[row].item(), found.stderr[row].item() + 2e-3)
        within(found.approximation[row].item(), 0.0, found.approximation_stderr[row].item() + 5e-3)
        within(found.amortization[row].item(), whole[row].item(), found.amortization_stderr[row].item() + 5e-3)


def test_a_single_datum(linear_gaussian):
    x = linear_gaussian.data(1)
    exact = linear_gaussian.log_prob(x).item()
    found = pv.inference_gaps(linear_gaussian.model, linear_gaussian.guide, x, num_particles=100, max_num_steps=100)
    assert found.elbo.item() == pytest.approx(exact, abs=1e-8)  # the guide is the posterior
    within(found.log_prob.item(), exact, found.stderr.item() + 1e-4)
    assert abs(found.amortization.item()) < 0.02  # noise of refinement


def test_context_and_mask_reach_a_written_guide(linear_gaussian):
    """The second argument and `observed` go to both programs as they are."""

    def model(x, c, observed=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(c, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).mask(observed).to_event(1), obs=x)

    def guide(x, c, observed=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(c + 0.3 * x, 1.0).to_event(1))

    x, c = torch.randn(8, 2), torch.randn(8, 2)
    observed = torch.rand(8, 2) < 0.6
    found = pv.inference_gaps(model, guide, x, c, observed=observed, num_particles=2000, tolerance=0.02)
    exact = (dist.Normal(c, math.sqrt(2)).log_prob(x) * observed).sum(1)
    mean_within(found.log_prob, exact.mean().item(), found.stderr, slack=1e-3)
    mean_within(found.approximation, 0.0, found.approximation_stderr, slack=5e-3)


class _Shifted(dist.Normal):
    """A normal whose constructor moves its mean, so that its own arguments do not make it again."""

    def __init__(self, loc, scale=1.0, validate_args=None):
        super().__init__(loc + 1, scale, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(_Shifted, _instance))


class _Detached(dist.Normal):
    has_rsample = False


def _sites(*draws):
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            values = [pyro.sample(name, draw(x)) for name, draw in draws[:1]]
            for name, draw in draws[1:]:
                pyro.sample(name, draw(values[0]))

    return guide


def _z(x):
    return dist.Normal(x[..., 0], 1.0)


REFUSED = {
    "depends on a draw": (
        _sites(("z", _z), ("w", lambda z: dist.Normal(z, 1.0))),
        r"parameters of site 'w' of the guide change from run to run, because they depend on draws \(other sites: \['z'\]\)",
    ),
    "a transform of each datum": (
        _sites(("z", lambda x: dist.TransformedDistribution(_z(x), [maps.AffineTransform(x[..., 1], 2.0)]))),
        "transform AffineTransform of site 'z' of the guide may hold parameters of each datum",
    ),
    "no class of named arguments": (
        _sites(("z", lambda x: _Shifted(x[..., 0]))),
        r"_Shifted at site 'z' of the guide cannot be made again from its `arg_constraints` \(its density is then another",
    ),
    "bounds that depend on each other": (
        _sites(("z", lambda x: dist.Uniform(x[..., 0] - 90, x[..., 0] + 90))),
        r"Uniform at site 'z' of the guide cannot be made again from its `arg_constraints`",
    ),
    "no reparameterised draws": (
        _sites(("z", lambda x: _Detached(x[..., 0], 1.0))),
        r"reparameterised draws, and site 'z' of the guide has none \(_Detached\)",
    ),
    "a mask": (
        poutine.mask(_sites(("z", _z)), mask=torch.tensor([True, True, False, True, True])),
        "mask",
    ),
    "no plate": (None, "put the sites of model and guide into"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_by_name(name, double):
    guide, match = REFUSED[name]

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if name == "depends on a draw":
                pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 2]).to_event(1), obs=x)

    def whole(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).expand([len(x), 2]).to_event(2), obs=x)

    if guide is None:
        model, guide = whole, lambda x: pyro.sample("z", dist.Normal(x.mean(0), 1.0).to_event(1))
    with pytest.raises(ValueError, match=match):
        pv.inference_gaps(model, guide, torch.randn(5, 2), num_particles=20)
