"""Log densities with dimensions that nothing declares, and masks of latents: right by brute force, or refused by name."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from torch import nn

import pyrovae as pv
from pyrovae import objectives

EVIDENCE = dist.Normal(0.0, torch.tensor(2.0, dtype=torch.float64).sqrt())


def normal_guide(x, *_):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def normal_model(x, *_):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


# --- axes -------------------------------------------------------------------------------------------------------------


def column_model(x):
    """z (N, 1) against x (N,)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def column_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.reshape(-1, 1) / 2, 0.8).to_event(1))


def undeclared_data(x):
    """x (N, D) whose D is no event."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.reshape(-1, 1).expand(-1, len(x)))


def broadcast_event(x):
    """x (N, 1) against an event of 3."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 3), 1.0).to_event(1), obs=x.reshape(-1, 1))


def scale_of_another_shape(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.squeeze(-1), torch.ones(len(x), 1)), obs=x)


def factor_of_another_shape(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.factor("x", -((z - x) ** 2))


WRONG_AXES = {
    model.__name__: model
    for model in (
        column_model,
        undeclared_data,
        broadcast_event,
        scale_of_another_shape,
        factor_of_another_shape,
    )
}


@pytest.mark.parametrize("name", WRONG_AXES)
@settings(max_examples=5, deadline=None)
@given(num_data=st.integers(2, 6), vectorise=st.booleans(), data_batch_size=st.sampled_from(["auto", None]))
def test_undeclared_axes_are_refused(name, num_data, vectorise, data_batch_size):
    pyro.clear_param_store()
    x = torch.randn(num_data)
    options = {"vectorize_particles": vectorise, "data_batch_size": data_batch_size, "num_particles": 5}
    for evaluate in (pv.log_weights, pv.log_marginal_likelihood):
        with pytest.raises(ValueError, match="site 'x'"):
            evaluate(WRONG_AXES[name], column_guide, x, **options)


@pytest.mark.parametrize("name", WRONG_AXES)
def test_undeclared_axes_are_refused_by_annealing(name):
    with pytest.raises(ValueError, match="site 'x'"):
        pv.annealed_importance_sampling(WRONG_AXES[name], torch.randn(4), num_temperatures=3, num_chains=2)


OBJECTIVES = {
    "Trace_ELBO": Trace_ELBO,
    "MonteCarloKL": objectives.MonteCarloKL,
    "AnalyticKL": objectives.AnalyticKL,
    "StickingTheLanding": objectives.StickingTheLanding,
    "ImportanceWeighted": lambda: objectives.ImportanceWeighted(3),
    "DoublyReparameterised": lambda: objectives.DoublyReparameterised(3),
    "VIMCO": lambda: objectives.VIMCO(3),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("wrong", ["in the model", "in the guide"])
def test_no_objective_trains_on_undeclared_axes(objective, wrong):
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                loc = self.net(x.reshape(-1, 1))
                loc = loc.squeeze(-1) if wrong == "in the model" else loc
                pyro.sample("z", dist.Normal(loc, 0.8))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z.unsqueeze(-1) if wrong == "in the model" else z
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"site 'x'|site 'z'|site \"x\"|site \"z\"|at site x|at site z"):
        pv.fit(model, Guide(), torch.randn(6), epochs=1, progress=False, loss=OBJECTIVES[objective]())


@settings(max_examples=20, deadline=None)
@given(
    num_data=st.integers(1, 5),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    how=st.sampled_from(["event", "plates"]),
)
def test_declared_axes_are_right(num_data, rows, columns, how):
    """The twin of the above: every dimension in an event or in a plate, whatever sizes coincide."""
    x = torch.randn(num_data, rows, columns, dtype=torch.float64)

    def model(x):
        loc = torch.zeros(rows, columns, dtype=x.dtype)
        if how == "event":
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(2))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(2), obs=x)
        else:
            with pyro.plate("data", len(x), dim=-3), pyro.plate("rows", rows, dim=-2), pyro.plate("columns", columns):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        posterior = dist.Normal(x / 2, math.sqrt(0.5))
        if how == "event":
            with pyro.plate("data", len(x)):
                pyro.sample("z", posterior.to_event(2))
        else:
            with pyro.plate("data", len(x), dim=-3), pyro.plate("rows", rows, dim=-2), pyro.plate("columns", columns):
                pyro.sample("z", posterior)

    found = pv.log_marginal_likelihood(model, guide, x, num_particles=3, plate="data").log_prob
    assert torch.allclose(found, EVIDENCE.log_prob(x).sum((1, 2)), atol=1e-10)


def test_a_plate_without_a_size_takes_it_from_its_sites(double):
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    x = torch.randn(70)
    found = pv.log_marginal_likelihood(model, guide, x, num_particles=3)
    assert torch.allclose(found.log_prob, EVIDENCE.log_prob(x), atol=1e-10)
    for loss in (objectives.MonteCarloKL(), objectives.ImportanceWeighted(3)):
        assert math.isclose(-loss.loss(model, guide, x), EVIDENCE.log_prob(x).sum(), rel_tol=1e-10)


# --- masks of latents -------------------------------------------------------------------------------------------------


def masking(program, mask, how):
    """A program whose latent is masked: by a handler, or by its distribution."""
    if how == "handler":
        return poutine.mask(program, mask=mask)

    def run(x):
        with pyro.plate("data", len(x)):
            if program is normal_guide:
                pyro.sample("z", dist.Normal(x / 2, 0.8).mask(mask))
            else:
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).mask(mask))
                pyro.sample("x", dist.Normal(z, 1.0).mask(mask), obs=x)

    return run


masks = st.lists(st.booleans(), min_size=1, max_size=6).map(torch.tensor)


@settings(max_examples=25, deadline=None)
@given(mask=masks, how=st.sampled_from(["handler", "distribution"]), guide_too=st.booleans(), vectorise=st.booleans())
def test_a_latent_masked_in_the_model_has_weight_one(mask, how, guide_too, vectorise):
    x = torch.linspace(-1.0, 2.0, len(mask), dtype=torch.float64)
    model = masking(normal_model, mask, how)
    guide = masking(normal_guide, mask, how) if guide_too else normal_guide
    draws = {"num_particles": 4000 if vectorise else 500, "vectorize_particles": vectorise and "auto"}
    log_weights = pv.log_weights(model, guide, x, data_batch_size=None, **draws)
    assert (log_weights[:, ~mask] == 0).all()
    estimate = pv.LogMarginalLikelihood.from_log_weights(log_weights)
    assert ((estimate.log_prob - EVIDENCE.log_prob(x)).abs() <= 5 * estimate.stderr)[mask].all()


@settings(max_examples=15, deadline=None)
@given(mask=masks.filter(lambda mask: not mask.all()), how=st.sampled_from(["handler", "distribution"]))
def test_a_latent_masked_in_the_guide_alone_is_refused(mask, how):
    x = torch.linspace(-1.0, 2.0, len(mask))
    with pytest.raises(ValueError, match="the guide masks site 'z'"):
        pv.log_weights(normal_model, masking(normal_guide, mask, how), x)
    with pytest.raises(ValueError, match="the guide masks site 'z'"):
        objectives.ImportanceWeighted(3).loss(normal_model, masking(normal_guide, mask, how), x)


FAMILIES = {
    "product": lambda x: dist.Normal(x / 2, 0.8).to_event(1),
    "joint": lambda x: dist.MultivariateNormal(x / 2, 0.6 * torch.eye(x.shape[-1], dtype=x.dtype)),
}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(bits=st.lists(st.booleans(), min_size=6, max_size=6), guide_too=st.booleans())
def test_some_elements_of_an_event_masked(family, bits, guide_too):
    """Padding: element d of datum n is masked in the model, in z and in x; the guide may mask it too, or draw it anyhow."""
    mask = torch.tensor(bits).reshape(2, 3)
    x = torch.randn(2, 3, dtype=torch.float64)

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).mask(mask).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).mask(mask).to_event(1), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            proposal = FAMILIES[family](x)
            if guide_too and family == "product":
                proposal = dist.Normal(x / 2, 0.8).mask(mask).to_event(1)
            pyro.sample("z", proposal)

    estimate = pv.log_marginal_likelihood(model, guide, x, mask, num_particles=10_000)
    exact = torch.where(mask, EVIDENCE.log_prob(x), 0.0).sum(1)
    assert ((estimate.log_prob - exact).abs() <= 5 * estimate.stderr + 1e-9).all()


@settings(max_examples=8, deadline=None)
@given(mask=masks)
def test_obs_mask_with_an_automatic_guide(mask):
    """The guide draws what is not observed, and masks nothing: Pyro's own way to missing values."""
    pyro.clear_param_store()
    x = torch.linspace(-1.0, 1.5, len(mask), dtype=torch.float64)

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=mask)

    # A scale above 1.62 bounds the weights where x is drawn.
    guide = AutoNormal(model, init_scale=1.7, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"z": x / 2}))
    estimate = pv.log_marginal_likelihood(model, guide, x, mask, num_particles=20_000)
    exact = torch.where(mask, EVIDENCE.log_prob(x), 0.0)
    assert ((estimate.log_prob - exact).abs() <= 5 * estimate.stderr + 1e-9).all()


def test_obs_mask_with_one_draw_for_all_latents(double):
    """The guide's density cannot be told apart by site, so the model's own stands in for what is masked."""
    x, mask = torch.tensor([0.5]), torch.tensor([True])

    def model(x, mask):
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=mask)

    guide = AutoMultivariateNormal(model, init_scale=1.0)
    guide(x, mask)
    estimate = pv.log_marginal_likelihood(model, guide, x, mask, num_particles=50_000)
    assert abs(estimate.log_prob - EVIDENCE.log_prob(x)) < 5 * estimate.stderr


@pytest.mark.parametrize("guide_too", [False, True])
def test_a_masked_latent_that_matters_is_refused(guide_too):
    """Without its prior, and with an observation that depends on it, there is no p(x)."""
    x, mask = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = masking(normal_guide, mask, "handler") if guide_too else normal_guide
    with pytest.raises(ValueError, match="the model masks latent site 'z'"):
        pv.log_marginal_likelihood(model, guide, x)


@pytest.mark.parametrize("in_model", [True, False])
def test_an_observed_point_beside_a_masked_latent(double, in_model):
    """A Delta that is data changes nothing about the masks of latents."""
    x, mask = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("point", dist.Delta(x), obs=x)
            with poutine.mask(mask=mask if in_model else torch.tensor(True)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    if not in_model:
        with pytest.raises(ValueError, match="the guide masks site 'z'"):
            pv.log_weights(model, masking(normal_guide, mask, "handler"), x)
        return
    found = pv.log_marginal_likelihood(model, normal_guide, x, num_particles=5000)
    assert ((found.log_prob - torch.where(mask, EVIDENCE.log_prob(x), 0.0)).abs() <= 5 * found.stderr).all()


def test_data_that_their_distribution_masks_itself(double):
    """NaN is no real number, and NanMaskedNormal knows its log density all the same."""
    x = torch.randn(40, 3)
    x[torch.rand_like(x) < 0.4] = torch.nan

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.NanMaskedNormal(z.unsqueeze(-1).expand(*z.shape, 3), 1.0).to_event(1), obs=x)

    def guide(x):
        precision = 1 + x.isfinite().sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.nansum(-1) / precision, precision.rsqrt()))

    exact = []
    for row in x:
        seen = row[row.isfinite()]
        covariance = torch.eye(len(seen)) + 1
        exact.append(
            dist.MultivariateNormal(torch.zeros(len(seen)), covariance).log_prob(seen) if len(seen) else torch.zeros(())
        )
    assert torch.allclose(
        pv.log_marginal_likelihood(model, guide, x, num_particles=3).log_prob, torch.stack(exact), atol=1e-9
    )
    with pytest.raises(ValueError, match="site 'x' has NaN among its data"):
        pv.log_marginal_likelihood(normal_model, normal_guide, x[:, 0])
