"""What a guide never draws, what is a mass against a density, and angles counted twice: found by asking log_prob, or right."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyrovae as pv
from pyrovae import objectives

CENTRES = torch.tensor([-2.0, -1.0, 0.5, 2.0])


def mixture(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.ones(4) / 4))
        pyro.sample("x", dist.Normal(CENTRES[y], 0.7), obs=x)


def joint(x: Tensor) -> Tensor:
    """log p(x, y) (N, 4)."""
    return math.log(0.25) + dist.Normal(CENTRES, 0.7).log_prob(x.unsqueeze(-1))


# --- a mass of 0 ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    zero=st.lists(st.booleans(), min_size=4, max_size=4).filter(lambda zero: not all(zero)),
    at=st.sampled_from([-2.0, 0.0, 30.0]),
    how=st.sampled_from(["probs", "logits", "one-hot"]),
)
def test_classes_of_probability_zero(zero, at, how):
    """Refused if prior and data allow a class that is never drawn: brute force is the judge."""
    x, zero = torch.tensor([at, at + 0.3]), torch.tensor(zero)
    logits = torch.where(zero, -torch.inf, 0.0)
    parameters = {"probs": logits.softmax(-1)} if how == "probs" else {"logits": logits}

    def one_hot_mixture(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(4) / 4))
            pyro.sample("x", dist.Normal(y @ CENTRES, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            kind = dist.OneHotCategorical if how == "one-hot" else dist.Categorical
            pyro.sample("y", kind(**parameters))

    model = one_hot_mixture if how == "one-hot" else mixture
    posterior = joint(x).softmax(-1)
    if (posterior[:, zero].sum(-1) > 1e-5).any():
        with pytest.raises(ValueError, match="does not cover the prior at site 'y'"):
            pv.log_weights(model, guide, x)
    elif (posterior[:, zero].sum(-1) < 1e-7).all():
        estimate = pv.log_marginal_likelihood(model, guide, x, num_particles=4000)
        assert ((estimate.log_prob - joint(x).logsumexp(-1)).abs() <= 5 * estimate.stderr + 1e-5).all()


@settings(max_examples=15, deadline=None)
@given(zero=st.integers(0, 4), value=st.sampled_from([0.0, 1.0]))
def test_one_bit_of_many_that_never_comes(zero, value):
    """A rare value of one bit: prior draws alone hardly ever show it."""
    x = torch.randn(3)
    rare = torch.full((5,), 1e-4 if value else 1 - 1e-4)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(rare).to_event(1))
            pyro.sample("x", dist.Normal(y.sum(-1), 1.0), obs=x)

    def guide(x):
        probs = torch.full((len(x), 5), 0.5)
        probs[:, zero] = 1 - value
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(probs).to_event(1))

    with pytest.raises(ValueError, match="does not cover the prior at site 'y'"):
        pv.log_weights(model, guide, x)


def test_a_count_beyond_the_guide():
    """Binomial(3) for a Poisson latent."""

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Poisson(torch.tensor(0.2)))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Binomial(3, torch.tensor(0.3)).expand([len(x)]))

    with pytest.raises(ValueError, match="does not cover the prior at site 'y'"):
        pv.log_weights(model, guide, torch.tensor([3.0, 4.0]))


# --- supports that can be compared ------------------------------------------------------------------------------------


def beta_binomial(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Beta(torch.tensor(1.0), torch.tensor(200.0)))
        pyro.sample("x", dist.Binomial(10, z), obs=x)


def exponential_normal(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Exponential(torch.tensor(1.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_normal(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


RANGES = {
    "Uniform(0, .05) for Beta(1, 200)": (beta_binomial, torch.tensor([1.0, 4.0]), (0.0, 0.05), True),
    "Uniform(0, 1) for Beta(1, 200)": (beta_binomial, torch.tensor([1.0, 4.0]), (0.0, 1.0), False),
    "Uniform(0, 9) for Exponential(1)": (exponential_normal, torch.tensor([8.0]), (0.0, 9.0), True),
    "Uniform(0, 30) for Exponential(1)": (exponential_normal, torch.tensor([8.0]), (0.0, 30.0), False),
    "Uniform(-4, 4) for Normal, data at 5": (normal_normal, torch.tensor([5.0]), (-4.0, 4.0), True),
    "Uniform(-9, 9) for Normal": (normal_normal, torch.tensor([0.5, -1.0]), (-9.0, 9.0), False),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_support_narrower_than_the_prior(name):
    """Integrals decide: refused if a share of p(x) above 1e-6 is never drawn, right if it is not."""
    model, x, (low, high), refused = RANGES[name]

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.tensor(low), high).expand([len(x)]))

    if refused:
        with pytest.raises(ValueError, match="does not cover the prior at site 'z'"):
            pv.log_weights(model, guide, x)
        return
    grid = torch.linspace(low, high, 200_001, dtype=torch.float64)[1:-1]

    def log_joint(value):
        with pyro.poutine.block():
            trace = pyro.poutine.trace(pyro.condition(model, data={"z": grid})).get_trace(value.expand(len(grid)))
        return sum(trace.nodes[site]["fn"].log_prob(trace.nodes[site]["value"]) for site in ("z", "x"))

    exact = torch.stack([log_joint(value).logsumexp(0) + math.log(high - low) - math.log(len(grid) + 1) for value in x])
    estimate = pv.log_marginal_likelihood(model, guide, x, num_particles=100_000)
    assert ((estimate.log_prob - exact).abs() <= 5 * estimate.stderr + 1e-3).all()


@settings(max_examples=15, deadline=None)
@given(width=st.floats(0.1, 3.0), shift=st.floats(-1.0, 1.0))
def test_a_truncated_guide_whose_nominal_support_is_the_line(width, shift):
    """An affine transform of a Uniform says that its support is the real line; its log_prob knows better."""

    def guide(x):
        base = dist.Uniform(torch.zeros(len(x)), 1.0)
        affine = dist.transforms.AffineTransform(shift - width / 2, width)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [affine]))

    with pytest.raises(ValueError, match="does not cover the prior at site 'z'"):
        pv.log_weights(normal_normal, guide, torch.randn(40))


def evidence_on_a_grid(prior, x, scale, low, high):
    """log p(x) of z ~ prior, x ~ Normal(z, scale), by integration."""
    grid = torch.linspace(low, high, 400_001, dtype=torch.float64)[1:-1]
    density = torch.nan_to_num(prior.log_prob(grid), nan=-torch.inf)
    joint = density + dist.Normal(grid, scale).log_prob(x.double().unsqueeze(-1))
    return joint.logsumexp(-1) + math.log((high - low) / 400_000)


SHIFT = dist.transforms.AffineTransform


def one():
    return torch.tensor(1.0, dtype=torch.float64)


SHIFTED_PRIORS = {
    "an exponential that starts at .5": (
        lambda: dist.TransformedDistribution(dist.Exponential(one()), [SHIFT(0.5, 1.0)]),
        0.5,
        40.0,
    ),
    "one that ends at 1": (
        lambda: dist.TransformedDistribution(dist.Exponential(one()), [SHIFT(1.0, -1.0)]),
        -40.0,
        1.0,
    ),
    "a gamma from -1": (
        lambda: dist.TransformedDistribution(dist.Gamma(2 * one(), one()), [SHIFT(-1.0, 1.0)]),
        -1.0,
        40.0,
    ),
}


@pytest.mark.parametrize("name", SHIFTED_PRIORS)
def test_a_shifted_prior_has_no_mass_beyond_its_end(name):
    """Its nominal support is the real line, and its base has a finite log_prob outside its own support."""
    make, low, high = SHIFTED_PRIORS[name]
    x = torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", make())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.5))

    estimate = pv.log_marginal_likelihood(model, guide, x, num_particles=60_000)
    assert (
        (estimate.log_prob - evidence_on_a_grid(make(), x, 1.0, low, high)).abs() <= 5 * estimate.stderr + 1e-3
    ).all()


class Truncated(dist.Normal):
    def log_prob(self, value):
        return torch.where(value < 0, -torch.inf, super().log_prob(value) + math.log(2))

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).abs()


NARROW = {
    "a class derived from Normal": lambda n: Truncated(torch.zeros(n), 1.0),
    "a shifted exponential": lambda n: dist.TransformedDistribution(
        dist.Exponential(torch.ones(n)), [SHIFT(-0.5, 1.0)]
    ),
    "a mirrored exponential": lambda n: dist.TransformedDistribution(
        dist.Exponential(torch.ones(n)), [SHIFT(1.0, -1.0)]
    ),
    "a squeezed sigmoid": lambda n: dist.TransformedDistribution(
        dist.Normal(torch.zeros(n), 1.0), [dist.transforms.SigmoidTransform(), SHIFT(0.0, 0.5)]
    ),
    "a squeezed beta": lambda n: dist.TransformedDistribution(dist.Beta(2 * torch.ones(n), 2.0), [SHIFT(0.0, 0.5)]),
}


@pytest.mark.parametrize("name", NARROW)
def test_a_guide_narrower_than_its_nominal_support(name):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", NARROW[name](len(x)))

    with pytest.raises(ValueError, match="does not cover the prior at site 'z'"):
        pv.log_weights(normal_normal, guide, torch.tensor([1.0, 2.5, 0.2, -0.5]))


CLAMPED = {
    "multinomial": (
        lambda: dist.Multinomial(3, torch.tensor([0.5, 0.5])),
        lambda n: dist.Multinomial(3, torch.tensor([1.0, 0.0])).expand([n]),
        lambda y: y[..., 0],
    ),
    "mixture": (
        lambda: dist.Categorical(torch.ones(4) / 4),
        lambda n: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(n, 2)),
            dist.Categorical(torch.tensor([[0.5, 0.5, 0, 0], [0.7, 0.3, 0, 0]]).expand(n, 2, 4)),
        ),
        lambda y: CENTRES[y.long()],
    ),
}


@pytest.mark.parametrize("name", CLAMPED)
def test_probabilities_that_torch_clamps(name):
    prior, proposal, loc = CLAMPED[name]

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc(pyro.sample("y", prior())), 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", proposal(len(x)))

    with pytest.raises(ValueError, match="does not cover the prior at site 'y'"):
        pv.log_weights(model, guide, torch.tensor([1.0, 2.5, 0.2]))


def test_a_bounded_guide_of_an_unbounded_count_is_right():
    """What lies beyond ten has no share of p(x) that counts."""
    x = torch.tensor([1.0, 3.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Poisson(torch.tensor(2.0)))
            pyro.sample("x", dist.Normal(y.float(), 0.3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(torch.ones(len(x), 10)))

    counts = torch.arange(40.0)
    exact = (dist.Poisson(2.0).log_prob(counts) + dist.Normal(counts, 0.3).log_prob(x.unsqueeze(-1))).logsumexp(-1)
    estimate = pv.log_marginal_likelihood(model, guide, x, num_particles=20_000)
    assert ((estimate.log_prob - exact).abs() <= 5 * estimate.stderr).all()


# --- a mass against a density -----------------------------------------------------------------------------------------


def bits(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(0.3 * torch.ones(3)).to_event(1))
        pyro.sample("x", dist.Normal(y.sum(-1), 0.7), obs=x)


def one_hot(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3))
        pyro.sample("x", dist.Normal(y @ CENTRES[:3], 0.7), obs=x)


def count(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Poisson(torch.tensor(2.0)))
        pyro.sample("x", dist.Normal(y, 0.7), obs=x)


def share(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Beta(torch.tensor(2.0), 2.0))
        pyro.sample("x", dist.Normal(y, 0.7), obs=x)


def relaxed(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.RelaxedBernoulli(torch.tensor(0.5), probs=0.3 * torch.ones(3)).to_event(1))
        pyro.sample("x", dist.Normal(y.sum(-1), 0.7), obs=x)


HALF = torch.tensor(0.5)
KINDS = {
    "straight-through bits": (
        bits,
        lambda n: dist.RelaxedBernoulliStraightThrough(HALF, logits=torch.zeros(n, 3)).to_event(1),
    ),
    "relaxed bits": (bits, lambda n: dist.RelaxedBernoulli(HALF, logits=torch.zeros(n, 3)).to_event(1)),
    "a normal for bits": (bits, lambda n: dist.Normal(torch.zeros(n, 3), 1.0).to_event(1)),
    "a straight-through class": (
        one_hot,
        lambda n: dist.RelaxedOneHotCategoricalStraightThrough(HALF, logits=torch.zeros(n, 3)),
    ),
    "a relaxed class": (one_hot, lambda n: dist.RelaxedOneHotCategorical(HALF, logits=torch.zeros(n, 3))),
    "a density for a count": (count, lambda n: dist.Gamma(2.0 * torch.ones(n), 1.0)),
    "a bit for a share": (share, lambda n: dist.Bernoulli(0.5 * torch.ones(n))),
    "straight-through for a relaxed bit": (
        relaxed,
        lambda n: dist.RelaxedBernoulliStraightThrough(HALF, logits=torch.zeros(n, 3)).to_event(1),
    ),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("evaluate", [pv.log_weights, objectives.VIMCO(2).loss])
def test_a_mass_against_a_density_is_refused(name, evaluate):
    model, proposal = KINDS[name]

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", proposal(len(x)))

    with pytest.raises(ValueError, match="site 'y'"):
        evaluate(model, guide, torch.tensor([-1.0, 0.0, 0.6]))


def test_the_same_kind_on_both_sides_is_right(double):
    """Straight-through gradients of a discrete distribution leave its mass as it is; relaxed against relaxed are densities."""
    x = torch.tensor([-1.0, 0.6, 2.2])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.OneHotCategoricalStraightThrough(torch.ones(len(x), 3) / 3))

    exact = (math.log(1 / 3) + dist.Normal(CENTRES[:3].double(), 0.7).log_prob(x.unsqueeze(-1))).logsumexp(-1)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(y @ CENTRES[:3].double(), 0.7), obs=x)

    estimate = pv.log_marginal_likelihood(model, guide, x, num_particles=5000)
    assert ((estimate.log_prob - exact).abs() <= 5 * estimate.stderr).all()


# --- angles -----------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(start=st.floats(-7.0, 3.0), width=st.floats(0.2, 3.5), concentration=st.floats(0.2, 3.0))
def test_an_angle_is_counted_once(start, width, concentration):
    """Right from an interval of one turn that starts anywhere in the first turn; refused if it is longer or leaves some out."""
    x = torch.tensor([0.4, -1.0], dtype=torch.float64)
    width = 1.0 if abs(width - 1) < 0.3 else width  # turns
    low = -math.pi if width == 1.0 else start

    def model(x):
        with pyro.plate("data", len(x)):
            angle = pyro.sample("angle", dist.VonMises(torch.zeros_like(x), torch.tensor(concentration, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(angle.cos(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("angle", dist.Uniform(torch.full_like(x, low), low + 2 * math.pi * width))

    if width != 1.0:
        with pytest.raises(ValueError, match="site 'angle'"):
            pv.log_weights(model, guide, x)
        return
    grid = torch.linspace(-math.pi, math.pi, 100_001, dtype=torch.float64)[1:]
    prior = dist.VonMises(0.0, torch.tensor(concentration, dtype=x.dtype)).log_prob(grid)
    values = prior + dist.Normal(grid.cos(), 1.0).log_prob(x.unsqueeze(-1))
    exact = values.logsumexp(-1) + math.log(2 * math.pi / 100_000)
    estimate = pv.log_marginal_likelihood(model, guide, x, num_particles=20_000)
    assert ((estimate.log_prob - exact).abs() <= 5 * estimate.stderr + 1e-4).all()


TURNS = {  # (prior, guide, refused)
    "a wider VonMises": (
        lambda: dist.VonMises(0.0, 1.0),
        lambda n: dist.TransformedDistribution(dist.VonMises(torch.zeros(n), 0.1), [SHIFT(0.0, 2.0)]),
        True,
    ),
    "degrees": (
        lambda: dist.TransformedDistribution(dist.VonMises(0.0, 1.0), [SHIFT(0.0, 180 / math.pi)]),
        lambda n: dist.Uniform(-180 * torch.ones(n), 180.0),
        False,
    ),
    "half angles": (
        lambda: dist.TransformedDistribution(dist.VonMises(0.0, 1.0), [SHIFT(0.0, 0.5)]),
        lambda n: dist.Uniform(-math.pi / 2 * torch.ones(n), math.pi / 2),
        False,
    ),
    "degrees, two turns": (
        lambda: dist.TransformedDistribution(dist.VonMises(0.0, 1.0), [SHIFT(0.0, 180 / math.pi)]),
        lambda n: dist.Uniform(-360 * torch.ones(n), 360.0),
        True,
    ),
    "a shifted angle": (
        lambda: dist.TransformedDistribution(dist.VonMises(0.0, 1.0), [SHIFT(math.pi, 1.0)]),
        lambda n: dist.Uniform(torch.zeros(n), 2 * math.pi),
        False,
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_turns_of_transformed_angles(name):
    prior, proposal, refused = TURNS[name]
    x = torch.tensor([0.4, -1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            angle = pyro.sample("angle", prior().expand([len(x)]))
            pyro.sample("x", dist.Normal((angle / 50).cos(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("angle", proposal(len(x)))

    if refused:
        with pytest.raises(ValueError, match="site 'angle'"):
            pv.log_weights(model, guide, x)
        return
    draws = prior().expand([200_000]).sample()
    values = dist.Normal((draws / 50).cos(), 1.0).log_prob(x.unsqueeze(-1)).double()
    exact = values.logsumexp(-1) - math.log(len(draws))
    estimate = pv.log_marginal_likelihood(model, guide, x, num_particles=50_000)
    assert ((estimate.log_prob - exact).abs() <= 5 * estimate.stderr + 5e-3).all()


class WrappedCauchy(dist.TorchDistribution):
    """A family of one's own on the circle, whose support torch would call the real line."""

    arg_constraints: dict = {}
    support = dist.constraints.real
    has_rsample = False

    def __init__(self, shape=()):
        super().__init__(torch.Size(shape), validate_args=False)

    def expand(self, shape, _instance=None):
        return WrappedCauchy(shape)

    def sample(self, sample_shape=()):
        draws = torch.distributions.Cauchy(0.0, 0.5).sample(torch.Size(sample_shape) + self.batch_shape)
        return torch.remainder(draws + math.pi, 2 * math.pi) - math.pi

    def log_prob(self, value):
        return math.log(math.sinh(0.5) / (2 * math.pi)) - (math.cosh(0.5) - value.cos()).log()


@pytest.mark.parametrize("turns", [1, 2])
def test_an_angle_of_ones_own_is_known_by_its_period(turns):
    x = torch.tensor([0.4, -1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            angle = pyro.sample("angle", WrappedCauchy())
            pyro.sample("x", dist.Normal(angle.cos(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("angle", dist.Uniform(-turns * math.pi * torch.ones(len(x)), turns * math.pi))

    if turns == 2:
        with pytest.raises(ValueError, match="site 'angle'"):
            pv.log_weights(model, guide, x)
        return
    grid = torch.linspace(-math.pi, math.pi, 100_001)[1:]
    joint = WrappedCauchy().log_prob(grid) + dist.Normal(grid.cos(), 1.0).log_prob(x.unsqueeze(-1))
    exact = joint.double().logsumexp(-1) + math.log(2 * math.pi / 100_000)
    estimate = pv.log_marginal_likelihood(model, guide, x, num_particles=20_000)
    assert ((estimate.log_prob - exact).abs() <= 5 * estimate.stderr + 1e-3).all()


def test_an_angle_for_a_latent_on_the_line_is_refused():
    """VonMises draws from one turn, and its log density goes on beyond it as if it did not."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.VonMises(torch.zeros(len(x)), 1.0))

    with pytest.raises(ValueError, match="does not cover the prior at site 'z'"):
        pv.log_weights(normal_normal, guide, torch.tensor([3.0, 4.0]))


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["everywhere", "in the likelihood"])
def test_half_precision_is_refused(dtype, where):
    x = torch.randn(5).to(dtype)
    latent = dtype if where == "everywhere" else torch.float32

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=latent), 1.0))
            pyro.sample("x", dist.Normal(z.to(dtype), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x / 2).to(latent), 0.8))

    site = "z" if where == "everywhere" else "x"
    for evaluate in (pv.log_weights, pv.log_marginal_likelihood):
        with pytest.raises(ValueError, match=f"site '{site}' is in {dtype}"):
            evaluate(model, guide, x)
    with pytest.raises(ValueError, match=f"is in {dtype}"):
        pv.annealed_importance_sampling(model, x, num_temperatures=3, num_chains=2)
