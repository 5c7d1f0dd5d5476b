"""Supports: masks inside events, guides as narrow as the posterior, data that cannot be, wherever they stand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within

import pyrovae as pv
from pyrovae.programs.supports import innermost, is_possible


def site(distribution, value, mask=None):
    return {"fn": distribution, "value": value, "mask": mask, "name": "x", "is_observed": True, "type": "sample"}


# --- masks inside events ----------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()


def holes(x):
    return torch.where(MASK, x, torch.nan)


LIKELIHOODS = {
    "mask inside": lambda loc, mask: dist.Normal(loc, 1.0).mask(mask).to_event(1),
    "mask inside, checked": lambda loc, mask: dist.Normal(loc, 1.0, validate_args=True).mask(mask).to_event(1),
    "mask inside an event of two": lambda loc, mask: (
        dist.Normal(loc, 1.0).mask(mask).to_event(1).mask(True).to_event(0)
    ),
    "masks on both levels": lambda loc, mask: dist.Normal(loc, 1.0).mask(mask).to_event(1).mask(mask.any(-1)),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_mask_inside_an_event_hides_nan(double, name):
    """z ~ N(0, 1), x_d ~ N(z, 1) where seen: the seen are normal with covariance I + 1."""
    x = torch.randn(4, 3)

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", LIKELIHOODS[name](z.unsqueeze(-1).expand(*z.shape, 3), mask), obs=x)

    def guide(x, mask):
        precision = 1 + mask.sum(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(mask, x, 0.0).sum(1) / precision, precision.rsqrt()))

    lml = pv.log_marginal_likelihood(model, guide, holes(x), MASK, num_particles=30)
    truth = [
        dist.MultivariateNormal(torch.zeros(k), torch.eye(k) + 1).log_prob(row[seen]).item()
        if (k := int(seen.sum()))
        else 0.0
        for row, seen in zip(x, MASK, strict=True)
    ]
    assert lml.log_prob.tolist() == pytest.approx(truth, abs=1e-10)
    assert lml.stderr.tolist() == [0] * 4


def test_what_a_mask_inside_an_event_shows_is_still_checked():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            logits = z.unsqueeze(-1).expand(*z.shape, 3)
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).mask(mask).to_event(1), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = holes(torch.ones(4, 3))
    assert pv.log_weights(model, guide, x, MASK, num_particles=3).isfinite().all()
    x[3, 1] = 0.25
    with pytest.raises(
        ValueError, match=r"'x' has data outside the support of Bernoulli: found 0.25, expected Boolean"
    ):
        pv.log_weights(model, guide, x, MASK, num_particles=3)


def test_is_possible_through_every_wrapper():
    value = torch.tensor([[0.5, torch.nan], [-1.0, 2.0]])
    seen = torch.tensor([[1, 0], [0, 1]]).bool()
    positive = dist.Exponential(torch.ones(2, 2), validate_args=False)
    assert is_possible(site(positive, value)).tolist() == [[True, False], [False, True]]
    assert is_possible(site(positive.to_event(1), value)).tolist() == [False, False]
    assert is_possible(site(positive.mask(seen).to_event(1), value)).tolist() == [True, True]
    assert is_possible(site(positive.mask(seen).to_event(2), value)).tolist() is True
    assert is_possible(site(positive.mask(~seen).to_event(1), value)).tolist() == [False, False]
    assert is_possible(site(positive.to_event(1).mask(seen[:, 0]), value)).tolist() == [False, True]
    assert is_possible(site(positive.to_event(1), value, mask=torch.tensor([False, True]))).tolist() == [True, False]
    assert is_possible(site(positive.mask(False).to_event(1), value)).tolist() == [True, True]
    simplex = dist.Dirichlet(torch.ones(3), validate_args=False).expand([2]).mask(seen[0]).to_event(1)
    assert is_possible(site(simplex, torch.tensor([[0.2, 0.3, 0.5], [1.0, 1.0, 1.0]]))).item() is True
    assert innermost(simplex).event_shape == (3,)
    # One number that stands for three, as `log_prob` takes it.
    assert is_possible(site(dist.Exponential(torch.ones(4, 3)).to_event(1), torch.tensor(-1.0))).tolist() == [False] * 4


# --- guides as narrow as the posterior --------------------------------------------------------------------------------

LOW, SHAPE = 0.5, 3.0


def pareto_model(x):
    """theta ~ Pareto(low, shape), x_i | theta ~ U(0, theta): theta | x ~ Pareto(max(low, x), shape + n)."""
    with pyro.plate("data", len(x)):
        theta = pyro.sample("theta", dist.Pareto(LOW, SHAPE))
        pyro.sample("x", dist.Uniform(0.0, theta.unsqueeze(-1).expand(*theta.shape, 2)).to_event(1), obs=x)


def pareto_guide(widen=1.0):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("theta", dist.Pareto(x.amax(1).clamp_min(LOW) * widen, SHAPE + 2))

    return guide


def pareto_evidence(x):
    posterior_low = x.amax(1).clamp_min(LOW)
    return math.log(SHAPE) + SHAPE * math.log(LOW) - math.log(SHAPE + 2) - (SHAPE + 2) * posterior_low.log()


@pytest.mark.parametrize("num_data", [3, 80])
def test_a_guide_as_narrow_as_the_posterior_is_exact(double, num_data):
    x = 1.3 * torch.rand(num_data, 2)
    lml = pv.log_marginal_likelihood(pareto_model, pareto_guide(), x, num_particles=20)
    assert torch.allclose(lml.log_prob, pareto_evidence(x), atol=1e-10)
    assert lml.gap.tolist() == [0] * num_data


def test_a_guide_narrower_than_the_posterior_is_refused(double):
    x = 0.6 * torch.rand(80, 2)
    with pytest.raises(ValueError, match="does not cover the prior at site 'theta'"):
        pv.log_marginal_likelihood(pareto_model, pareto_guide(1.5), x, num_particles=20)


def test_a_narrow_guide_for_a_whole_program(double):
    """No plate: the program is one datum, and impossible as soon as one x is."""
    x = torch.tensor([0.2, 1.1, 0.4])

    def model(x):
        theta = pyro.sample("theta", dist.Pareto(LOW, SHAPE))
        with pyro.plate("draws", len(x)):
            pyro.sample("x", dist.Uniform(0.0, theta), obs=x)

    def guide(x):
        pyro.sample("theta", dist.Pareto(x.max().clamp_min(LOW), SHAPE + 3))

    def too_narrow(x):
        pyro.sample("theta", dist.Pareto(3 * x.max(), SHAPE + 3))

    truth = math.log(SHAPE) + SHAPE * math.log(LOW) - math.log(SHAPE + 3) - (SHAPE + 3) * math.log(1.1)
    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=20)
    assert lml.log_prob.item() == pytest.approx(truth, abs=1e-10)
    # 32 prior draws are looked at, of which each is missed with probability 0.09: seen in 95 of 100 calls.
    refused = 0
    for _ in range(12):
        try:
            pv.log_weights(model, too_narrow, x, num_particles=2)
        except ValueError as error:
            refused += "does not cover the prior" in str(error)
    assert refused > 2


def test_a_factor_decides_what_is_possible(double):
    """z ~ N(0, 1) cut to z > 1 by a factor: p = P(z > 1), and a guide on z > 1 covers all there is."""
    tail = 0.15865525393145707

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("cut", torch.where(z > 1, 0.0, -torch.inf))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Pareto(1.0, 3.0 + x))

    lml = pv.log_marginal_likelihood(model, guide, torch.zeros(4), num_particles=4000)
    for datum in range(4):
        within(lml.log_prob[datum].item(), math.log(tail), lml.stderr[datum].item())


# --- data that cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"data_batch_size": 7}, {"data_batch_size": None}, {"vectorize_particles": False}]
)
@pytest.mark.parametrize("row", [0, 36, 99])
def test_impossible_data_behind_bounds_of_their_own(options, row):
    """Bounds that are arguments, one pair per datum, and a datum outside of its own in some block."""
    low = torch.rand(100)
    x = low + 0.5
    x[row] = low[row] + 1.25

    def model(x, low):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(low, low + 1, validate_args=False), obs=x)

    def guide(x, low):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    found = f"found {x[row].item():g}"
    with pytest.raises(ValueError, match=f"'x' has data outside the support of Uniform: {found}"):
        pv.log_marginal_likelihood(model, guide, x, low, num_particles=4, **options)
    x[row] = low[row]
    lml = pv.log_marginal_likelihood(model, guide, x, low, num_particles=4, **options)
    assert torch.allclose(lml.log_prob, torch.zeros(100, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("vectorize", [True, False])
def test_bounds_that_a_discrete_latent_moves_are_no_error(double, vectorize):
    """z in {1, 2} with 0.3, 0.7, x ~ U(0, z): p(1.5) = 0.35, however often two runs draw the same z."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.7))
            pyro.sample("x", dist.Uniform(0.0, 1 + z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5).expand([len(x)]))

    for _ in range(10):
        x = torch.tensor([1.5])
        lml = pv.log_marginal_likelihood(model, guide, x, num_particles=80, vectorize_particles=vectorize)
        assert lml.log_prob.exp().item() == pytest.approx(0.35, abs=0.35 * 5 * 80**-0.5)


def test_the_name_of_a_transformed_likelihood():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.LogNormal(z, 1.0, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    with pytest.raises(ValueError, match=r"outside the support of LogNormal: found -1, expected GreaterThan"):
        pv.log_marginal_likelihood(model, guide, torch.tensor([1.0, -1.0]), num_particles=4)


# ---- angles: a density that goes on beyond one turn


def angle_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.VonMises(0.5, 2.0))
        pyro.sample("x", dist.Normal(3 * torch.cos(z), 0.5), obs=x)


def angle_guide(make):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", make(len(x)))

    return guide


@pytest.mark.parametrize(
    "make",
    [
        lambda n: dist.VonMises(torch.full((n,), 0.2), 0.5),
        lambda n: dist.Uniform(-math.pi, math.pi).expand([n]),
    ],
)
def test_guides_of_one_turn_are_right(double, make):
    x = torch.tensor([2.5, -1.0, 0.3])
    grid = torch.linspace(-math.pi, math.pi, 20_001)[:-1]
    integrand = dist.VonMises(0.5, 2.0).log_prob(grid) + dist.Normal(3 * torch.cos(grid), 0.5).log_prob(x[:, None])
    exact = integrand.logsumexp(-1) + math.log(2 * math.pi / 20_000)
    result = pv.log_marginal_likelihood(angle_model, angle_guide(make), x, num_particles=20_000)
    assert ((result.log_prob - exact).abs() < 4.5 * result.stderr).all()


def test_guides_of_many_turns_are_refused():
    normal = angle_guide(lambda n: dist.Normal(torch.zeros(n), 10.0))
    automatic = pyro.infer.autoguide.AutoNormal(angle_model)
    automatic(torch.zeros(3))
    for guide in (normal, automatic):
        with pytest.raises(ValueError, match="'z' of the model is an angle or a direction"):
            pv.log_marginal_likelihood(angle_model, guide, torch.zeros(3), num_particles=10)
