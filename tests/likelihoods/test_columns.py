"""Tables of mixed columns, data in their own units, and counts of unequal exposure: against exact evidence."""

import math

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from torch import nn

import pyrovae as pv
from pyrovae import likelihoods, nets
from pyrovae.likelihoods import (
    Categories,
    Columns,
    LearnedScaleNormal,
    LogNormal,
    NegativeBinomial,
    Normal,
    Poisson,
    Scaled,
    StudentT,
    ZeroInflatedNegativeBinomial,
)


def mixed_columns():
    return {
        "height": Scaled(LearnedScaleNormal(None, 1, initial_scale=0.8), 170.0, 10.0),
        "income": Scaled(LogNormal(None, 1, initial_scale=0.5), 0.0, 30_000.0),
        "score": StudentT(None, 1, df=5.0, initial_scale=1.0),
        "visits": Poisson(None, 1, data_mean=torch.tensor([2.0])),
        "cells": NegativeBinomial(None, 1, network_dispersion=True),
        "smokes": likelihoods.Bernoulli(None, 1),
        "blood.group": Categories(None, 1, num_categories=4, frequencies=torch.tensor([0.4, 0.1, 0.05, 0.45])),
    }


def rows(num_rows):
    """Data in the support of every column."""
    return torch.stack(
        [
            170 + 10 * torch.randn(num_rows),
            30_000 * torch.randn(num_rows).exp(),
            torch.randn(num_rows),
            dist.Poisson(torch.full((num_rows,), 3.0)).sample(),
            dist.Poisson(torch.full((num_rows,), 9.0)).sample(),
            (torch.rand(num_rows) < 0.3) * 1.0,
            torch.randint(0, 4, (num_rows,)) * 1.0,
        ],
        1,
    )


def test_a_row_is_the_sum_of_its_columns(double):
    """Each column under its own likelihood with its own share of the network's output, in order."""
    columns = mixed_columns()
    net = nn.Linear(2, Columns.num_parameters(columns))
    likelihood = Columns(net, columns)
    z, x = torch.randn(3, 6, 2), rows(6)
    output, start, wanted = net(z), 0, []
    for place, column in enumerate(columns.values()):
        width = column.parameters_shape.numel()
        share = output[..., start : start + width].reshape(3, 6, *column.parameters_shape)
        wanted.append(column.distribution(share).log_prob(x[:, place : place + 1]))
        start += width
    assert start == output.shape[-1] == 11
    found = likelihood(z)
    assert (found.batch_shape, found.event_shape) == ((3, 6), (7,))
    assert torch.allclose(found.base_dist.log_prob(x), torch.stack(wanted, -1), rtol=1e-12)
    assert torch.allclose(found.log_prob(x), torch.stack(wanted, -1).sum(-1), rtol=1e-12)
    likelihood.check(found.sample().reshape(-1, 7))


def test_means_of_a_table_are_those_of_its_columns_and_the_most_probable_category(tmp_path):
    """The mean of the codes of four categories is no code; of two, the probability of the second says more than a code."""
    columns = mixed_columns() | {"member": Categories(None, 1, num_categories=2)}
    net = nn.Linear(2, Columns.num_parameters(columns))
    model, z = pv.GenerativeModel(pv.priors.StandardNormal(2), Columns(net, columns)), 2 * torch.randn(20, 2)
    parts = model.likelihood(z).base_dist.parts
    found = model.decode(z)
    assert torch.equal(found[:, :6], model.likelihood(z).mean[:, :6])
    assert torch.equal(found[:, 6], parts[6].logits.argmax(-1)[:, 0].float())
    assert torch.allclose(found[:, 7], parts[7].logits.softmax(-1)[:, 0, 1])
    codes = model.generate(30, mean=True)[:, 6]
    assert (codes == codes.round()).all()
    guide = pv.guides.MeanFieldNormal(nn.Linear(8, 4), 2)
    pv.export(model, guide, tmp_path / "pair")
    assert torch.allclose(torch.export.load(tmp_path / "pair" / "decoder.pt2").module()(z), found, atol=1e-5)


def test_evidence_of_a_table_is_exact(double):
    """One latent: the evidence by quadrature against importance sampling from a guide that is not the posterior."""
    columns = mixed_columns()
    likelihood = Columns(nn.Linear(1, Columns.num_parameters(columns)), columns)
    model, x = pv.GenerativeModel(pv.priors.StandardNormal(1), likelihood), rows(4)
    with torch.no_grad():
        grid = torch.linspace(-9, 9, 4001).reshape(-1, 1, 1)
        log_joint = likelihood(grid.expand(-1, 4, 1)).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(grid[..., 0])
        exact = log_joint.logsumexp(0) + math.log(18 / 4000)
        center = (log_joint.softmax(0) * grid[..., 0]).sum(0)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(center.unsqueeze(-1), 0.9).to_event(1))

    found = pv.log_marginal_likelihood(model, guide, x, num_particles=20_000)
    for estimate, truth, stderr in zip(found.log_prob.tolist(), exact.tolist(), found.stderr.tolist(), strict=True):
        within(estimate, truth, stderr)


def test_evidence_without_latents_is_that_of_the_columns(double):
    """A network that ignores z: the evidence is the sum of the columns', each in the units of the table."""
    columns = mixed_columns()
    net = nn.Linear(2, Columns.num_parameters(columns))
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    model, x = pv.GenerativeModel(pv.priors.StandardNormal(2), Columns(net, columns)), rows(5)

    def prior_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    by_hand = (
        dist.Normal(170.0, 8.0).log_prob(x[:, 0])
        + dist.LogNormal(math.log(30_000.0), 0.5).log_prob(x[:, 1])
        + dist.StudentT(5.0).log_prob(x[:, 2])
        + dist.Poisson(2.0).log_prob(x[:, 3])
        + dist.NegativeBinomial(1.0, logits=torch.tensor(0.0)).log_prob(x[:, 4])
        + dist.Bernoulli(0.5).log_prob(x[:, 5])
        + torch.tensor([0.4, 0.1, 0.05, 0.45]).log()[x[:, 6].long()]
    )
    found = pv.log_marginal_likelihood(model, prior_guide, x, num_particles=3)
    assert torch.allclose(found.log_prob, by_hand, rtol=1e-10)


def test_scaled_evidence_is_that_of_standardised_data_and_the_jacobian(linear_gaussian):
    """Linear-Gaussian data in other units per column: log p(x) is that of the raw units, in closed form."""
    loc, scale = torch.tensor([100.0, 0.0, -5.0, 3.0, 0.1]), torch.tensor([10.0, 1.0, 0.01, 500.0, 2.0])
    net = nn.Linear(3, 5)
    net.weight.data, net.bias.data = linear_gaussian.weight.clone(), linear_gaussian.bias.clone()
    likelihood = Scaled(Normal(net, 5, scale=linear_gaussian.scale), loc, scale)
    model = pv.GenerativeModel(pv.priors.StandardNormal(3), likelihood)
    y = linear_gaussian.data(6)

    def guide(x):
        linear_gaussian.guide((x - loc) / scale)

    found = pv.log_marginal_likelihood(model, guide, loc + scale * y, num_particles=10)
    covariance = linear_gaussian.weight @ linear_gaussian.weight.T + linear_gaussian.scale**2 * torch.eye(5)
    raw = dist.MultivariateNormal(loc + scale * linear_gaussian.bias, scale[:, None] * covariance * scale)
    assert torch.allclose(found.log_prob, raw.log_prob(loc + scale * y), rtol=1e-9)


@pytest.fixture
def context(double):
    """Exposures, and a covariate."""
    return torch.tensor([[0.3, 9.0], [1.0, 9.0], [7.5, 9.0], [120.0, 9.0]])


def gamma_poisson(x, context, likelihood):
    """A rate that is Gamma(2.5, 2.5 / 4) and shared by the counts of one datum; z is its log."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.5, 2.5 / 4.0))
        pyro.sample("x", likelihood(rate.log().unsqueeze(-1), context), obs=x)


def test_gamma_poisson_evidence_with_exposures(context):
    """Poisson(t rate) with a gamma rate is negative binomial of mean 4 t, in closed form; the posterior is gamma."""
    likelihood = Poisson(nn.Identity(), 1, exposure_column=0)
    x = torch.tensor([[0.0], [3.0], [41.0], [395.0]])
    exposure = context[:, 0]

    def guide(x, context, likelihood, inflate=1.0):
        with pyro.plate("data", len(x)):
            shape, rate = (2.5 + x[:, 0]) / inflate, (2.5 / 4.0 + exposure) / inflate
            pyro.sample("rate", dist.Gamma(shape, rate))

    exact = dist.NegativeBinomial(2.5, logits=(exposure * 4 / 2.5).log()).log_prob(x[:, 0])
    found = pv.log_marginal_likelihood(gamma_poisson, guide, x, context, likelihood, num_particles=10)
    assert torch.allclose(found.log_prob, exact, rtol=1e-9)

    def wide_guide(x, context, likelihood):
        return guide(x, context, likelihood, inflate=1.5)

    rough = pv.log_marginal_likelihood(gamma_poisson, wide_guide, x, context, likelihood, num_particles=20_000)
    for estimate, truth, stderr in zip(rough.log_prob.tolist(), exact.tolist(), rough.stderr.tolist(), strict=True):
        within(estimate, truth, stderr)
    marginal = NegativeBinomial(nn.Identity(), 1, inverse_dispersion=2.5, exposure_column=0)
    log_mean = torch.full((4, 1), math.log(4.0))
    assert torch.allclose(marginal(log_mean, context).log_prob(x), exact, rtol=1e-12)


@pytest.mark.parametrize("kind", [Poisson, NegativeBinomial, ZeroInflatedNegativeBinomial])
def test_exposure_multiplies_the_mean(kind, context):
    likelihood = kind(nn.Identity(), (2, 3), exposure_column=0)
    parameters = torch.randn(5, 4, likelihood.parameters_shape.numel())
    found = likelihood(parameters, context)
    plain = kind(nn.Identity(), (2, 3))(parameters)
    assert (found.batch_shape, found.event_shape) == ((5, 4), (2, 3))
    assert torch.allclose(found.mean, plain.mean * context[:, 0].reshape(4, 1, 1))
    assert torch.equal(likelihood.network_context(context), context[:, 1:])
    assert likelihood.network_context(context[:, :1]) is None
    assert likelihood.network_context(None) is None
    assert torch.equal(kind(nn.Identity(), 1).network_context(context), context)
    with pytest.raises(ValueError, match=r"column of a context \(N, C\), found none: pass the context"):
        likelihood(parameters)
    with pytest.raises(ValueError, match=r"exposure_column=0 .* found rows of shape \(\)"):
        likelihood(parameters, context[:, 0])
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"exposures must be positive and finite, found {wrong:g} in column 0"):
            likelihood(parameters, torch.cat([context[:3], torch.tensor([[wrong, 9.0]])]))


def test_exposures_of_columns(context):
    """A table in which some counts have an exposure; the network gets what is left of the context."""
    columns = {"deaths": Poisson(None, 1, exposure_column=1), "smokes": likelihoods.Bernoulli(None, 1)}
    likelihood = Columns(nn.Identity(), columns)
    parameters, exposure, context = torch.randn(4, 2), context[:, 0], context.flip(1)
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [7.0, 1.0], [130.0, 0.0]])
    found = likelihood(parameters, context).base_dist.log_prob(x)
    assert torch.allclose(found[:, 0], dist.Poisson(parameters[:, 0].exp() * exposure).log_prob(x[:, 0]))
    assert torch.equal(likelihood.network_context(context), context[:, :1])
    with pytest.raises(ValueError, match="pass the context"):
        likelihood(parameters)


def test_far_off_latents_have_finite_counts():
    """A log rate of thousands, as from data that were not standardised: a finite log mass, and a gradient of the rest."""
    for kind in (Poisson, NegativeBinomial, ZeroInflatedNegativeBinomial):
        likelihood = kind(nn.Identity(), 2)
        z = torch.full((likelihood.parameters_shape.numel(),), 5000.0, requires_grad=True)
        log_prob = likelihood(z).log_prob(torch.tensor([3.0, 0.0]))
        assert log_prob.isfinite()
        gradients = torch.autograd.grad(log_prob, [z, *likelihood.parameters()])
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_table_is_made_again_from_its_file(tmp_path):
    columns = mixed_columns()
    net = nets.MLP(2, [8], Columns.num_parameters(columns))
    x = rows(30)
    encoder = nets.TableEncoder(nets.MLP(10, [8]), [0.0] * 7, [1.0] * 7, [0, 0, 0, 0, 0, 0, 4])
    guide = pv.guides.MeanFieldNormal(encoder, 2)
    for likelihood in (Columns(net, columns), Columns(decoder_net=net, columns=list(columns.items()))):
        model = pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood)
        pv.save(tmp_path / "pair.pt", model, guide)
        made = pv.load(tmp_path / "pair.pt")
        assert repr(made["model"]) == repr(model)
        assert torch.equal(made["model"].likelihood(torch.ones(2)).log_prob(x), likelihood(torch.ones(2)).log_prob(x))
        assert torch.equal(made["guide"].posterior(x / 1e4).mean, guide.posterior(x / 1e4).mean)


def test_from_a_frame_to_a_fit():
    """Train on a frame in its own units: the bound rises, and a generated frame has the names and categories."""
    num = 200
    frame = pd.DataFrame(
        {
            "height": 170 + 10 * torch.randn(num).numpy(),
            "sex": pd.Series(["f", "m"]).sample(num, replace=True, random_state=0).to_numpy(),
            "visits": torch.randint(0, 5, (num,)).numpy(),
        }
    )
    table = pv.data.table(frame)
    columns = Columns.for_table(table) | {"visits": NegativeBinomial(None, 1)}
    likelihood = Columns(nets.MLP(2, [16], Columns.num_parameters(columns)), columns)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood)
    net = nets.MLP(nets.TableEncoder.num_features(table.num_categories), [16])
    encoder = nets.TableEncoder(net, table.loc, table.scale, table.num_categories)
    guide = pv.guides.MeanFieldNormal(encoder, 2)
    history = pv.fit(model, guide, table.values, epochs=15, batch_size=50, learning_rate=0.01, progress=False).history
    assert history[-1]["elbo"] > history[0]["elbo"]
    found = table.frame(model.generate(50))
    assert list(found.columns) == ["height", "sex", "visits"]
    assert set(found["sex"]) == {"f", "m"}
    assert 100 < found["height"].mean() < 240
    # Centimetres to metres: the same evidence but for the Jacobian, log 100 per row.
    metres = pv.data.table(frame.assign(height=frame["height"] / 100))
    in_metres = Columns(likelihood.decoder_net, Columns.for_table(metres) | {"visits": columns["visits"]})
    z = torch.randn(num, 2)
    change = in_metres(z).log_prob(metres.values) - likelihood(z).log_prob(table.values)
    trained = likelihood.columns[0].likelihood.state_dict()
    in_metres.columns[0].likelihood.load_state_dict(trained)
    in_metres.columns[1].load_state_dict(likelihood.columns[1].state_dict())
    change = in_metres(z).log_prob(metres.values) - likelihood(z).log_prob(table.values)
    assert torch.allclose(change, torch.tensor(math.log(100.0)), atol=1e-3)


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (3, 0.5, "column 'visits': counts are whole numbers of 0 or more, found 0.5"),
        (6, 4.0, "column 'blood.group': categories are coded 0 to 3, found 4"),
        (1, -1.0, "column 'income': log-normal data are positive numbers"),
        (0, math.nan, "column 'height': normal pixels are real numbers, found nan"),
    ],
)
def test_a_wrong_cell_is_named_by_its_column(place, value, match):
    columns = mixed_columns()
    x = rows(5)
    likelihood = Columns(nn.Identity(), columns)
    likelihood.check(x)
    x[3, place] = value
    with pytest.raises(ValueError, match=match):
        likelihood.check(x)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Columns(nn.Identity(), {}), ValueError, "a likelihood for each column, found none"),
        (lambda: Columns(nn.Identity(), [("a", Poisson(None, 1))] * 2), ValueError, r"found \['a'\] more than once"),
        (lambda: Columns(nn.Identity(), {"a": Poisson}), TypeError, r"column 'a' must be a likelihood"),
        (
            lambda: Columns(nn.Identity(), {"a": Poisson(nn.Identity(), 1)}),
            ValueError,
            r"column 'a' must have no network of its own .* found a network Identity .* by Poisson\(None, 1, ...\)",
        ),
        (lambda: Columns(nn.Identity(), {"a": Poisson(None, 2)}), ValueError, r"data shape \(2,\)"),
        (lambda: Categories(None, 1, num_categories=1), ValueError, "num_categories must be 2 or more, found 1"),
        (
            lambda: Categories(None, 1, num_categories=2, frequencies=torch.ones(3)),
            ValueError,
            "frequencies must be the shares of 2 categories",
        ),
        (lambda: Scaled(StudentT(None, 3), 0.0, 0.0), ValueError, "scale must be positive and finite"),
        (
            lambda: Scaled(StudentT(None, 3), torch.zeros(2), 1.0),
            ValueError,
            r"loc must be a number or of shape \(3,\)",
        ),
        (lambda: Scaled(Poisson(nn.Identity(), 1), 0.0, 2.0)(torch.zeros(1, 1)), ValueError, "masses, which do not"),
        (lambda: StudentT(None, 1, df=0.0), ValueError, "df must be positive"),
        (lambda: StudentT(None, 1, df=1.0, learn_df=True), ValueError, "above 1"),
        (lambda: LogNormal(None, 1, initial_scale=-1.0), ValueError, "initial_scale must be positive"),
        (lambda: NegativeBinomial(None, 1, inverse_dispersion=0.0), ValueError, "inverse_dispersion must be positive"),
        (lambda: Poisson(None, 1, exposure_column=-1), ValueError, "exposure_column must be 0 or more"),
    ],
)
def test_errors_at_construction_of_columns(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_table_encoder_by_definition():
    encoder = nets.TableEncoder(nets.MLP(5, [4]), [10.0, 0.0, 2.0], [5.0, 1.0, 0.5], [0, 3, 0])
    x = torch.tensor([[15.0, 2.0, 1.0], [0.0, 0.0, 2.0]])
    features = torch.tensor([[1.0, 0.0, 0.0, 1.0, -2.0], [-2.0, 1.0, 0.0, 0.0, 0.0]])
    assert torch.equal(encoder(x), encoder.net(features))
    # Six rows on both sides: some processors round a product of two rows otherwise.
    assert torch.equal(encoder(x.expand(3, 2, 3)), encoder.net(features.repeat(3, 1)).view(3, 2, 4))
    observed = torch.tensor([[True, False, True], [False, True, False]])
    features = torch.tensor([[1.0, 0.0, 0.0, 0.0, -2.0], [0.0, 1.0, 0.0, 0.0, 0.0]])
    assert torch.equal(encoder(x, observed=observed), encoder.net(features))
    assert torch.equal(encoder(torch.where(observed, x, math.nan), observed=observed), encoder.net(features))
    with pytest.raises(ValueError, match=r"rows of 3 columns, found shape \(2, 4\)"):
        encoder(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one entry per column, found 1, 2 and 1"):
        nets.TableEncoder(nets.MLP(5, [4]), [0.0], [1.0, 1.0], [0])
    with pytest.raises(ValueError, match="scale must be positive"):
        nets.TableEncoder(nets.MLP(5, [4]), [0.0], [0.0], [0])


def test_missing_cells_of_a_table(double):
    """The evidence of what is known, by quadrature over z, for every pattern; with importance sampling beside."""
    columns = mixed_columns()
    likelihood = Columns(nn.Linear(1, Columns.num_parameters(columns)), columns)
    model = pv.GenerativeModel(pv.priors.StandardNormal(1), likelihood)
    observed = (torch.arange(128).unsqueeze(-1) // 2 ** torch.arange(7)) % 2 == 1
    x = torch.where(observed, rows(128), math.nan)
    encoder = nets.TableEncoder(
        nets.MLP(10, [8]), [170.0, 4e4, 0, 3, 9, 0, 0], [10.0, 4e4, 1, 2, 3, 1, 1], [0] * 6 + [4]
    )
    guide = pv.guides.MeanFieldNormal(encoder, 1)
    with torch.no_grad():
        guide.head.weight *= 0.1
        guide.head.bias.zero_()
        grid = torch.linspace(-9, 9, 2001).reshape(-1, 1, 1)
        each = likelihood(grid.expand(-1, 128, 1)).base_dist.log_prob(likelihood.filled(x, observed))
        log_joint = torch.where(observed, each, 0.0).sum(-1) + dist.Normal(0.0, 1.0).log_prob(grid[..., 0])
        exact = log_joint.logsumexp(0) + math.log(18 / 2000)
    found = pv.log_marginal_likelihood(model, guide, x, observed=observed, num_particles=4000)
    assert found.log_prob[0].item() == pytest.approx(0.0, abs=0.1), "nothing known"
    for estimate, truth, stderr in zip(found.log_prob.tolist(), exact.tolist(), found.stderr.tolist(), strict=True):
        within(estimate, truth, stderr)


def test_counts_of_unequal_exposure_through_the_model(context):
    """`model(x, context)`: the exposure goes to the rate and the covariate to the network; a constant log rate is exact."""
    net = nets.Concatenate(nn.Linear(3, 2))
    nn.init.zeros_(net.net.weight)
    likelihood = Poisson(net, 2, exposure_column=0)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood)
    guide = pv.guides.MeanFieldNormal(nets.MLP(2, [4]), 2)
    for parameter in guide.head.parameters():
        nn.init.zeros_(parameter)  # the prior, which is the posterior
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [7.0, 9.0], [130.0, 90.0]])
    exact = dist.Poisson(net.net.bias.exp() * context[:, :1]).to_event(1).log_prob(x)
    found = pv.log_marginal_likelihood(model, guide, x, context, num_particles=20)
    assert torch.allclose(found.log_prob, exact, rtol=1e-9)
    assert likelihood.takes_context
    assert not Poisson(nn.Identity(), 2).takes_context
    assert Columns(nn.Identity(), {"a": Poisson(None, 1, exposure_column=0)}).takes_context
    assert not Columns(nn.Identity(), {"a": Scaled(LogNormal(None, 1), 0.0, 2.0)}).takes_context
