"""Imputation against closed forms: every pattern of five columns, classes on a grid, tables of mixed columns."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from shared.hierarchies import LinearNormal, affine
from shared.parts import LIKELIHOODS, SHAPE
from torch import nn

import pyrovae as pv
from pyrovae import guides, likelihoods, nets, priors

PATTERNS = torch.tensor(list(itertools.product([False, True], repeat=5)))  # all 32, the empty one included


class Posterior(guides.Guide):
    """The posterior given the observed columns, of precision I + W_o^T W_o / s^2; its covariance times `inflate`."""

    def __init__(self, weight, bias, scale, inflate=1.0):
        super().__init__(2)
        self.weight, self.bias, self.scale, self.inflate = weight, bias, scale, inflate

    def encode(self, x, context=None, *, observed=None):
        return torch.cat([torch.where(observed, x, 0), observed.to(x.dtype)], -1)

    def distribution(self, parameters):
        x, known = parameters.chunk(2, -1)
        weight = known.unsqueeze(-1) * self.weight
        precision = torch.eye(2) + weight.mT @ weight / self.scale**2
        shift = ((x - self.bias).unsqueeze(-2) @ weight).squeeze(-2) / self.scale**2
        mean = torch.linalg.solve(precision, shift.unsqueeze(-1)).squeeze(-1)
        return dist.MultivariateNormal(mean, precision_matrix=precision / self.inflate)


class Linear:
    """z ~ N(0, I), x | z ~ N(W z + b, s^2 I): the missing columns given the others are normal, in closed form."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.W, self.b = torch.randn(5, 2, generator=generator), torch.randn(5, generator=generator)
        self.s = 0.6
        likelihood = LinearNormal(affine(self.W, self.b), (5,), self.s)
        self.model = pv.GenerativeModel(priors.StandardNormal(2), likelihood).double()

    def plain_model(self, x, observed):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            cells = dist.Normal(z @ self.W.T + self.b, self.s).mask(observed)
            pyro.sample("x", cells.to_event(1), obs=torch.where(observed, x, 0))

    def plates_model(self, x, observed):
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 2), 1.0).to_event(1))
            with pyro.plate("columns", 5, dim=-1):
                loc = (z @ self.W.T + self.b).squeeze(-2)
                pyro.sample("x", dist.Normal(loc, self.s).mask(observed), obs=torch.where(observed, x, 0))

    def exact_guide(self, x, observed):
        posterior = self.posterior()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", posterior.distribution(posterior.encode(x, observed=observed)))

    def plates_guide(self, x, observed):
        posterior = self.posterior(inflate=1.5)
        with pyro.plate("rows", len(x), dim=-2):
            q = posterior.distribution(posterior.encode(x, observed=observed).unsqueeze(1))
            pyro.sample("z", q)

    def posterior(self, inflate=1.0):
        return Posterior(self.W, self.b, self.s, inflate)

    def conditional(self, x, observed):
        """Mean and standard deviation of each cell given the observed ones; of observed cells, x and 0."""
        covariance = self.W @ self.W.T + self.s**2 * torch.eye(5)
        means, stds = x.clone(), torch.zeros_like(x)
        for row, known in enumerate(observed):
            gain = covariance[~known][:, known] @ torch.linalg.inv(covariance[known][:, known])
            means[row, ~known] = self.b[~known] + gain @ (x[row, known] - self.b[known])
            stds[row, ~known] = (covariance[~known][:, ~known] - gain @ covariance[known][:, ~known]).diagonal().sqrt()
        return means, stds


@pytest.fixture
def linear(double):
    return Linear()


@pytest.fixture
def data(linear):
    """All 32 patterns, with NaN for what is missing; and x itself."""
    x = linear.model.generate(32)
    return torch.where(PATTERNS, x, torch.nan), PATTERNS, x


def check_against_truth(linear, data, imputed):
    """Means within their standard errors, each cell by itself; the spread within that of a variance of ESS draws."""
    _, observed, x = data
    mean, std = linear.conditional(x, observed)
    assert torch.equal(imputed.mean[observed], x[observed])
    assert (imputed.std[observed] == 0).all()
    assert (imputed.stderr[observed] == 0).all()
    away = (imputed.mean - mean).abs() / imputed.stderr
    assert away[~observed].max() < 5  # 80 cells
    relative = (imputed.std / std).square() - 1
    ess = imputed.ess[:, None].expand_as(x)
    assert (relative.abs() * (ess / 2).sqrt())[~observed].max() < 6
    # The errors are about as large as they say, and not much smaller.
    assert 0.6 < away[~observed].square().mean().sqrt() < 1.5
    assert torch.equal(imputed.observed, observed)


@pytest.mark.parametrize("inflate", [1.0, 2.0])
def test_every_pattern_of_five_columns(linear, data, inflate):
    """With the exact posterior as the guide, and with one of twice its covariance, moved by importance weights."""
    holes, observed, _ = data
    guide = linear.posterior(inflate)
    imputed = pv.impute(linear.model, guide, holes, observed=observed, num_particles=20_000)
    check_against_truth(linear, data, imputed)
    if inflate == 1:
        assert torch.allclose(imputed.ess, torch.full((32,), 20_000.0, dtype=torch.double))
    else:
        assert (imputed.ess < 16_000).all()


def test_a_guide_that_is_wrong(linear, data):
    """The prior proposes, whatever is observed."""
    guide = guides.MeanFieldNormal(nn.Identity(), 2, num_features=5)
    guide.head = affine(torch.zeros(4, 5), torch.zeros(4))
    holes, observed, _ = data
    imputed = pv.impute(linear.model, guide, holes, observed=observed, num_particles=30_000)
    check_against_truth(linear, data, imputed)
    assert imputed.ess.min() < 6000


def test_the_means_are_of_the_decoder_and_not_of_draws(linear, data):
    """Rao-Blackwell: with the exact posterior, the error is that of E[x|z] alone, and does not see the noise s."""
    holes, observed, x = data
    imputed = pv.impute(linear.model, linear.posterior(), holes, observed=observed, num_particles=4000)
    _, std = linear.conditional(x, observed)
    expected = ((std**2 - linear.s**2).clamp_min(0) / 4000).sqrt()
    assert torch.allclose(imputed.stderr[~observed], expected[~observed], rtol=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"data_batch_size": 7, "particle_batch_size": 300},
        {"particle_batch_size": 1999},
        {"data_batch_size": None},
        {"vectorize_particles": False},
    ],
)
def test_blocks_and_chunks_change_nothing(linear, data, options):
    holes, observed, _ = data
    num_particles = 500 if "vectorize_particles" in options else 4000
    imputed = pv.impute(
        linear.model, linear.posterior(2.0), holes, observed=observed, num_particles=num_particles, **options
    )
    check_against_truth(linear, data, imputed)
    assert imputed.draws.shape == (5, 32, 5)


def test_draws(linear, data):
    """1,000 completed data sets: mean, standard deviation and correlation of the missing cells in closed form."""
    holes, observed, x = data
    num_draws = 1000
    imputed = pv.impute(
        linear.model,
        linear.posterior(1.5),
        holes,
        observed=observed,
        num_particles=100_000,
        particle_batch_size=40_000,
        num_draws=num_draws,
    )
    mean, std = linear.conditional(x, observed)
    assert (imputed.draws[:, observed] == x[observed]).all()
    away = (imputed.draws.mean(0) - mean) / std * math.sqrt(num_draws)
    assert away[~observed].abs().max() < 5.5
    spread = imputed.draws.var(0) / std.square() - 1
    assert spread[~observed].abs().max() < 5.5 * math.sqrt(2 / num_draws)
    both = ~observed[:, 0] & ~observed[:, 1] & observed[:, 2:].any(1)
    for row in both.nonzero().flatten():
        known = observed[row]
        covariance = linear.W @ linear.W.T + linear.s**2 * torch.eye(5)
        gain = covariance[:, known] @ torch.linalg.inv(covariance[known][:, known])
        left = covariance - gain @ covariance[known]
        correlation = left[0, 1] / (left[0, 0] * left[1, 1]).sqrt()
        found = torch.corrcoef(imputed.draws[:, row, :2].T)[0, 1]
        assert abs(found - correlation) < 5 * (1 - correlation**2) / math.sqrt(num_draws)


def test_draws_come_from_all_chunks(linear):
    """Each of the draws is of a particle with the particle's share of all weights, whichever chunk it was in."""
    x = torch.full((2000, 5), torch.nan)
    observed = torch.zeros(2000, 5, dtype=torch.bool)
    imputed = pv.impute(
        linear.model, linear.posterior(), x, observed=observed, num_particles=4, particle_batch_size=1, num_draws=2
    )
    # Two of four equal particles are the same once in four: cov of their codes is 1/4 of the variance.
    code = (imputed.draws - linear.b) @ torch.linalg.pinv(linear.W).T
    noise = linear.s**2 * torch.linalg.inv(linear.W.T @ linear.W).diagonal()
    product = (code[0] * code[1]).mean(0)
    within(product.mean().item(), 0.25, ((1 + noise) / math.sqrt(2000)).max().item())
    within(code.square().mean().item(), (1 + noise).mean().item(), ((1 + noise) * 2 / math.sqrt(4000)).max().item())


@pytest.mark.parametrize("names", [("plain_model", "exact_guide"), ("plates_model", "plates_guide")])
def test_programs_without_a_part_of_the_library(linear, data, names):
    holes, observed, _ = data
    model, guide = (getattr(linear, name) for name in names)
    options = {"plate": "rows"} if names[0] == "plates_model" else {}
    imputed = pv.impute(model, guide, holes, observed=observed, num_particles=10_000, **options)
    check_against_truth(linear, data, imputed)
    assert imputed.draws.shape == (5, 32, 5)


def test_missing_cells_as_latents(linear, data):
    """The missing cells are sites of both programs, drawn from p(x|z): the same answers, with more noise."""
    holes, observed, x = data
    posterior = linear.posterior(1.5)

    def cells(z, observed):
        return dist.Normal(z @ linear.W.T + linear.b, linear.s).mask(~observed).to_event(1)

    def model(x, observed):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("missing", cells(z, observed))
            known = dist.Normal(z @ linear.W.T + linear.b, linear.s).mask(observed)
            pyro.sample("x", known.to_event(1), obs=torch.where(observed, x, 0))

    def guide(x, observed):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", posterior.distribution(posterior.encode(x, observed=observed)))
            pyro.sample("missing", cells(z, observed))

    imputed = pv.impute(model, guide, holes, observed=observed, site="missing", num_particles=20_000, num_draws=3)
    check_against_truth(linear, data, imputed)
    assert torch.equal(imputed.draws[:, observed], x[observed].expand(3, -1))
    again = pv.impute(model, guide, holes, observed=observed, num_particles=20_000)  # site "x": means of p(x|z)
    check_against_truth(linear, data, again)
    assert (again.stderr < imputed.stderr)[~observed].all()


def test_nothing_missing_gives_x_and_everything_missing_the_prior(linear):
    x = linear.model.generate(6)
    everything, nothing = torch.ones_like(x, dtype=torch.bool), torch.zeros_like(x, dtype=torch.bool)
    imputed = pv.impute(linear.model, linear.posterior(), x, observed=everything, num_particles=30)
    assert torch.equal(imputed.mean, x)
    assert torch.equal(imputed.draws, x.expand(5, 6, 5))
    assert "imputed 0 of 30 cells (0.0%)" in imputed.summary()
    imputed = pv.impute(linear.model, linear.posterior(), x, observed=nothing, num_particles=10_000)
    assert ((imputed.mean - linear.b).abs() < 5 * imputed.stderr).all()
    prior_std = (linear.W.square().sum(1) + linear.s**2).sqrt()
    assert torch.allclose(imputed.std, prior_std.expand(6, 5), rtol=0.05)
    assert imputed.evidence.log_prob.abs().max() < 1e-12


SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
RATES = torch.tensor([[0.9, 0.2, 0.6, 0.1], [0.3, 0.7, 0.5, 0.8], [0.1, 0.1, 0.9, 0.5]]).double()


def class_model(x, observed):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Categorical(SHARES))
        cells = dist.Bernoulli(RATES[z]).mask(observed)
        pyro.sample("x", cells.to_event(1), obs=torch.where(observed, x, 0))


def class_guide(x, observed):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.3, 0.5]).expand(len(x), 3)))


def test_a_sum_over_classes(double):
    """z in three classes, x | z Bernoulli: E[x_mis | x_obs] by Bayes' rule, for all 81 rows of 0, 1 and missing."""
    rows = torch.tensor(list(itertools.product([0.0, 1.0, torch.nan], repeat=4)))
    observed = ~rows.isnan()
    masses = torch.where(rows[:, None] == 1, RATES, 1 - RATES)
    masses = torch.where(observed[:, None], masses, 1).prod(-1) * SHARES
    truth = torch.where(observed, rows, masses / masses.sum(1, keepdim=True) @ RATES)
    imputed = pv.impute(class_model, class_guide, rows, observed=observed, num_particles=5000, num_draws=200)
    away = ((imputed.mean - truth).abs() / imputed.stderr)[~observed]
    assert away.max() < 5
    evidence = imputed.evidence
    assert ((evidence.log_prob - masses.sum(1).log()).abs() < 5 * evidence.stderr + 1e-9).all()
    assert torch.allclose(imputed.std, torch.where(observed, 0, (truth * (1 - truth)).sqrt()), atol=0.05)
    draws = imputed.draws[:, ~observed]
    assert ((draws == 0) | (draws == 1)).all()
    expected = truth[~observed]
    assert ((draws.mean(0) - expected).abs() < 5.5 * (expected * (1 - expected) / 200).sqrt()).all()


def mixed_pair():
    """A table of a number in thousands, three categories and a count, whose network gives the same whatever z is."""
    columns = {
        "income": likelihoods.Scaled(likelihoods.Normal(None, 1, scale=1.0), 3000.0, 500.0),
        "colour": likelihoods.Categories(None, 1, num_categories=3),
        "visits": likelihoods.Poisson(None, 1),
    }
    likelihood = likelihoods.Columns(affine(torch.zeros(5, 2), torch.zeros(5)), columns)
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihood).double()
    guide = guides.MeanFieldNormal(nn.Identity(), 2, num_features=3)
    guide.head = affine(torch.zeros(4, 3), torch.zeros(4))
    return model, guide, likelihood


def test_columns_in_their_own_units(double):
    """z is independent of x: a missing cell has its column's own mean, spread and probabilities."""
    model, guide, likelihood = mixed_pair()
    with torch.no_grad():
        likelihood.columns[1].bias.copy_(torch.tensor([[0.1], [0.6], [0.3]]).log())
    x = torch.tensor([[2500.0, 2.0, 7.0], [2500.0, torch.nan, 0.0], [torch.nan, 0.0, torch.nan]])
    observed = ~x.isnan()
    imputed = pv.impute(model, guide, x, observed=observed, num_particles=100, num_draws=1000)
    assert torch.allclose(imputed.mean, torch.tensor([[2500.0, 2, 7], [2500, 1, 0], [3000, 0, 1]]), rtol=1e-6)
    assert imputed.std[2, 0].item() == pytest.approx(500)
    assert imputed.std[2, 2].item() == pytest.approx(1)
    assert imputed.std[1, 1].isnan()
    assert list(imputed.probabilities) == [1]
    shares = torch.tensor([[0.0, 0, 1], [0.1, 0.6, 0.3], [1, 0, 0]])
    assert torch.allclose(imputed.probabilities[1], shares, atol=1e-6)
    drawn = imputed.draws[:, 1, 1]
    for code, share in enumerate(shares[1]):
        within((drawn == code).double().mean().item(), share.item(), math.sqrt(0.25 / 1000))
    within(imputed.draws[:, 2, 0].mean().item(), 3000.0, 500 / math.sqrt(1000))


def test_a_frame_in_and_out():
    """A pandas frame with holes, imputed in its own units and categories."""
    import pandas as pd

    frame = pd.DataFrame(
        {"age": [31.0, None, 45.0, 60.0], "smokes": ["no", "yes", None, "no"], "island": ["a", "b", "c", None]}
    )
    table = pv.data.table(frame)
    columns = likelihoods.Columns.for_table(table)
    model = pv.GenerativeModel(
        priors.StandardNormal(2),
        likelihoods.Columns(nets.MLP(2, [4], likelihoods.Columns.num_parameters(columns)), columns),
    )
    width = nets.TableEncoder.num_features(table.num_categories)
    encoder = nets.TableEncoder(nets.MLP(width, [4]), table.loc, table.scale, table.num_categories)
    guide = guides.MeanFieldNormal(encoder, 2)
    imputed = pv.impute(model, guide, table.values, observed=table.observed, num_particles=50)
    for filled in (table.frame(imputed.mean), table.frame(imputed.draws[3])):
        assert not filled.isna().any().any()
        assert filled["age"][[0, 2, 3]].tolist() == [31.0, 45.0, 60.0]
        assert filled["smokes"][[0, 1, 3]].tolist() == ["no", "yes", "no"]
        assert filled["island"][3] in ("a", "b", "c")
    assert list(imputed.probabilities) == [1, 2]
    assert torch.allclose(imputed.probabilities[2].sum(1), torch.ones(4))


def test_categories_of_all_elements(double):
    likelihood = likelihoods.Categories(affine(torch.zeros(6, 2), torch.zeros(6)), 2, num_categories=3)
    with torch.no_grad():
        likelihood.bias.copy_(torch.tensor([[0.1, 0.5], [0.6, 0.2], [0.3, 0.3]]).log())
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihood).double()
    guide = guides.MeanFieldNormal(nn.Identity(), 2, num_features=2)
    x = torch.tensor([[2.0, torch.nan], [torch.nan, 1.0]])
    imputed = pv.impute(model, guide, x, observed=~x.isnan(), num_particles=20)
    assert imputed.mean.tolist() == [[2, 0], [1, 1]]
    assert torch.allclose(imputed.probabilities[0], torch.tensor([[0, 0, 1], [0.1, 0.6, 0.3]]), atol=1e-6)
    assert torch.allclose(imputed.probabilities[1], torch.tensor([[0.5, 0.2, 0.3], [0, 1, 0]]), atol=1e-6)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood(name):
    """Of missing cells, the mean and spread are those of draws of the model's own for the same z (here: any)."""
    make, draw_data = LIKELIHOODS[name]
    likelihood = make(lambda shape: affine(torch.zeros(math.prod(shape), 2), torch.zeros(math.prod(shape))))
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihood)
    guide = guides.MeanFieldNormal(nets.MLP(12, [4]), 2)
    guide.head = affine(torch.zeros(4, 4), torch.zeros(4))  # the posterior is the prior: all weights are equal
    x = draw_data()
    if name == "DiscretizedLogistic":
        x = torch.randint(0, 256, x.shape) / 255
    if name == "Categorical":
        x = torch.randint(0, 7, x.shape) / 6
    observed = torch.rand(5, *SHAPE) < 0.6
    x = torch.where(observed, x, torch.nan)
    imputed = pv.impute(model, guide, x, observed=observed, num_particles=4000)
    assert torch.equal(imputed.mean[observed], x[observed])
    assert imputed.draws.shape == (5, 5, *SHAPE)
    assert imputed.draws.isfinite().all()
    if name == "Categories":
        assert len(imputed.probabilities) == 12
        return
    draws = likelihood(torch.zeros(4000, 2)).sample()
    mean, std = (moment.expand(5, *SHAPE)[~observed] for moment in (draws.mean(0), draws.std(0)))
    assert ((imputed.mean[~observed] - mean).abs() < 6 * std / math.sqrt(4000) + 1e-6).all()
    if name != "StudentT":  # its fourth moment is infinite
        assert torch.allclose(imputed.std[~observed], std, rtol=0.25)


def test_a_likelihood_without_a_mean_says_so():
    likelihood = likelihoods.StudentT(nn.Linear(2, 3), 3, df=1.0)
    model = pv.GenerativeModel(priors.StandardNormal(2), likelihood)
    x = torch.tensor([[0.0, torch.nan, 1.0]]).expand(4, 3)
    imputed = pv.impute(model, guides.MeanFieldNormal(nets.MLP(3, [4]), 2), x, observed=~x.isnan(), num_particles=30)
    assert imputed.mean[:, 1].isnan().all()
    assert torch.equal(imputed.mean[:, [0, 2]], x[:, [0, 2]])
    assert imputed.draws.isfinite().all()


def test_context():
    """The context goes to both programs, cut along with the data."""
    weight = torch.tensor([[2.0], [-1.0]])

    def model(x, c, observed):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1e-3).to_event(1))
            cells = dist.Normal(c @ weight.T + z, 1.0).mask(observed)
            pyro.sample("x", cells.to_event(1), obs=torch.where(observed, x, 0))

    def guide(x, c, observed):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1e-3).to_event(1))

    x, c = torch.full((40, 2), torch.nan), torch.randn(40, 1)
    imputed = pv.impute(model, guide, x, c, observed=~x.isnan(), num_particles=10, data_batch_size=16)
    assert torch.allclose(imputed.mean, c @ weight.T, atol=0.01)


def test_a_hierarchy_of_images():
    model, guide = pv.two_layer_vae(SHAPE, latent_dims=(3, 2), hidden_features=(6, 5))
    x, observed = (torch.rand(4, *SHAPE) < 0.5) * 1.0, torch.rand(4, *SHAPE) < 0.5
    imputed = pv.impute(model, guide, x, observed=observed, num_particles=300)
    assert imputed.mean.shape == x.shape
    assert ((imputed.draws == 0) | (imputed.draws == 1)).all()


def test_result(linear, data):
    holes, observed, _ = data
    pyro.set_rng_seed(1)
    imputed = pv.impute(linear.model, linear.posterior(2.0), holes, observed=observed, num_particles=100, num_draws=0)
    pyro.set_rng_seed(1)
    again = pv.impute(linear.model, linear.posterior(2.0), holes, observed=observed, num_particles=100, num_draws=0)
    assert torch.equal(imputed.mean[~observed], again.mean[~observed])
    assert imputed.draws.shape == (0, 32, 5)
    assert len(imputed) == 32
    assert imputed.ess.shape == imputed.pareto_k.shape == (32,)
    assert "imputed 80 of 160 cells (50.0%); of the observed part:\nlog p(x) by importance" in imputed.summary()
    assert "Pareto k" in imputed.summary()
    assert "Imputation(32 data, 80 of 160 cells imputed, 0 draws, median ESS" in repr(imputed)
    one = pv.impute(linear.model, linear.posterior(), holes, observed=observed, num_particles=1)
    assert one.stderr[~observed].isnan().all()
    as_numbers = pv.impute(linear.model, linear.posterior(), holes, observed=observed.double(), num_particles=2)
    assert torch.equal(as_numbers.observed, observed)


def test_weights_far_apart(linear):
    """Chunks whose weights differ by thousands of nats: sums stay finite, and the largest weight decides."""
    x = torch.full((3, 5), torch.nan)
    x[:, 0] = 300.0
    guide = guides.MeanFieldNormal(nn.Identity(), 2, num_features=5)
    guide.head = affine(torch.zeros(4, 5), torch.tensor([0.0, 0.0, 3.0, 3.0]))
    imputed = pv.impute(
        linear.model, guide, x, observed=~x.isnan(), num_particles=200, particle_batch_size=10, num_draws=50
    )
    assert imputed.mean.isfinite().all()
    assert imputed.ess.max() < 20
    assert ((imputed.draws.mean(0) - imputed.mean).abs() < 5.5 * imputed.std / math.sqrt(50) + 1e-9).all()


def test_memory_does_not_grow_with_the_particles(linear):
    x = torch.full((4, 5), torch.nan)
    alive = []

    def count(module, inputs, output):
        alive.append(output.shape[:-1].numel())

    handle = linear.model.likelihood.decoder_net.register_forward_hook(count)
    pv.impute(linear.model, linear.posterior(), x, observed=~x.isnan(), num_particles=20_000)
    handle.remove()
    assert max(alive) <= 2048  # rows of the decoder at once
    assert sum(alive) >= 80_000


def test_refusals(linear, data):
    holes, observed, x = data
    guide = linear.posterior()
    with pytest.raises(ValueError, match="mask of the data's shape"):
        pv.impute(linear.model, guide, holes, observed=observed[:, :2])
    with pytest.raises(ValueError, match=r"no site 'y' that would hold x: found \['x', 'z'\]; pass site="):
        pv.impute(linear.model, guide, holes, observed=observed, site="y")
    with pytest.raises(ValueError, match="site 'z' has 2 numbers per datum, and x has 5"):
        pv.impute(linear.model, guide, holes, observed=observed, site="z")
    with pytest.raises(ValueError, match="num_draws"):
        pv.impute(linear.model, guide, holes, observed=observed, num_draws=-1)

    def counts_all(x, observed):
        return linear.plain_model(torch.where(observed, x, 0), torch.ones_like(observed))

    with pytest.raises(ValueError, match="counts cells in log p that observed= calls missing"):
        pv.impute(counts_all, linear.exact_guide, torch.where(observed, x, 0), observed=observed)

    def other(x, observed):
        return linear.plain_model(x + 1, observed)

    with pytest.raises(ValueError, match="does not observe x as it was passed"):
        pv.impute(other, linear.exact_guide, holes, observed=observed)

    def joint(x, observed):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            cells = dist.MultivariateNormal(z @ linear.W.T, torch.eye(5)).mask(observed.all(1))
            pyro.sample("x", cells, obs=torch.where(observed, x, 0))

    with pytest.raises(ValueError, match="depend on each other given z"):
        pv.impute(joint, linear.exact_guide, holes, observed=observed)

    def one_datum(x, observed):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        cells = dist.Normal(z @ linear.W.T, 1.0).expand(x.shape).mask(observed)
        pyro.sample("x", cells.to_event(2), obs=torch.where(observed, x, 0))

    def of_one(x, observed):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="one plate over all 32 rows of x, found no plate"):
        pv.impute(one_datum, of_one, holes, observed=observed)


def test_all_weights_of_a_datum_are_zero(double):
    """x = 1.5 is possible in the second class alone, which one particle in five proposes."""

    def model(x, observed):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.8, 0.2])))
            scale = torch.where(z == 1, 1.0, 1e-200).unsqueeze(-1)  # squares of 1.5 / 1e-200 are infinite
            cells = dist.Normal(torch.zeros(2), scale).mask(observed)
            pyro.sample("x", cells.to_event(1), obs=torch.where(observed, x, 0))

    def guide(x, observed):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Categorical(torch.tensor([0.8, 0.2]).expand(len(x), 2)))

    x, observed = torch.full((100, 2), 1.5), torch.tensor([True, False]).expand(100, 2)
    with pytest.raises(ValueError, match=r"all 1 weights are 0 for \d+ data, the first of them row \d+: use more part"):
        pv.impute(model, guide, x, observed=observed, num_particles=1, data_batch_size=50)
    imputed = pv.impute(model, guide, x, observed=observed, num_particles=200, particle_batch_size=2, num_draws=20)
    assert (imputed.mean[:, 0] == 1.5).all()
    assert torch.allclose(imputed.std[:, 1], torch.ones(100))  # of the second class, in whichever chunk it came
    away = imputed.draws[..., 1].abs() > 1e-100
    assert away.all()
