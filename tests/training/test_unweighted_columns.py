"""The ELBO of the history is that of the programs: with scaled latents, plates inside a datum, and latents of all data."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv

SGD = partial(torch.optim.SGD, lr=1e-30)  # moves nothing
NOTHING = {"optimizer": SGD, "schedule": None, "progress": False}
NUM_DATA, DIM = 40, 6


class Factor(nn.Module):
    """One factor: x ~ N(z a, 1), z ~ N(0, 1), with its exact posterior as the guide, so that ELBO = log p(x).

    weight: of the latent in both programs
    of_data: weight of the data
    """

    def __init__(self, weight=1.0, full_size=None, pixels=DIM, of_data=1.0):
        super().__init__()
        self.of_data = of_data
        self.loading = nn.Parameter(torch.linspace(-1, 1.5, DIM))
        self.weight, self.full_size, self.pixels = weight, full_size, pixels

    def plate(self, x):
        return pyro.plate("data", self.full_size or len(x), subsample=torch.arange(len(x)), dim=-1)

    def model(self, x):
        pyro.module("factor", self)
        with self.plate(x):
            with poutine.scale(scale=self.weight):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pixels = pyro.plate("pixels", DIM, dim=-2, subsample_size=self.pixels)
            with poutine.scale(scale=self.of_data), pixels as index:
                pyro.sample("x", dist.Normal(z * self.loading[index][:, None], 1.0), obs=x.T[index])

    def guide(self, x):
        precision = 1 + self.loading.square().sum()
        with self.plate(x), poutine.scale(scale=self.weight):
            pyro.sample("z", dist.Normal(x @ self.loading / precision, precision**-0.5))

    def log_prob(self, x):
        covariance = torch.eye(DIM) + self.loading.outer(self.loading)
        return dist.MultivariateNormal(torch.zeros(DIM), covariance).log_prob(x).mean().item()


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.randn(NUM_DATA, 1) * torch.linspace(-1, 1.5, DIM) + torch.randn(NUM_DATA, DIM)


def history(factor, data, **more):
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    options = {**NOTHING, "epochs": 3, "batch_size": 20, "compile": False, "validation": data, **more}
    return pv.fit(factor.model, factor.guide, data, **options).history


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("full_size", [None, 1000])
@pytest.mark.parametrize("weight", [0.01, 0.1, 3.0, torch.tensor(0.1)])
def test_a_weight_of_the_kl_is_not_in_the_elbo(weight, full_size, compile, data, uncompiled):
    """`poutine.scale` around the latents, as in Pyro's own examples: the loss has the weight, ELBO and KL do not."""
    rows = history(factor := Factor(weight, full_size), data, compile=compile)
    for row in rows:
        assert row["elbo"] == pytest.approx(factor.log_prob(data), abs=1e-4)
        for name in ("validation_elbo", "validation_bound"):
            assert row[name] == pytest.approx(factor.log_prob(data), abs=1e-4)
        assert row["objective"] == pytest.approx(row["reconstruction"] - float(weight) * row["kl"], abs=1e-4)


OBJECTIVES = {name: getattr(pv.objectives, name) for name in ("MonteCarloKL", "AnalyticKL", "StickingTheLanding")}


def noise_of(loss):
    """A KL in closed form does not cancel the noise of log p(x|z), as the sampled KL of an exact posterior does."""
    return 0.5 if loss == "AnalyticKL" else 1e-4


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("loss", [None, *OBJECTIVES])
@pytest.mark.parametrize("weights", [(0.1, 1.0), (0.05, 0.05), (1.0, 0.5), (torch.tensor(3.0), torch.tensor(0.5))])
@pytest.mark.parametrize("full_size", [None, 1000])
def test_no_weight_is_in_the_elbo(weights, loss, full_size, compile, data, uncompiled):
    """Of the latents, of all sites, of the data, as a tensor: by Pyro's loss and by the objectives."""
    factor, held_out = Factor(weights[0], full_size, of_data=weights[1]), data[:20]
    rows = history(factor, data, compile=compile, loss=loss and OBJECTIVES[loss](), validation=held_out)
    for row in rows:
        assert row["elbo"] == pytest.approx(factor.log_prob(data), abs=noise_of(loss))
        for name in ("validation_elbo", "validation_bound"):
            assert row[name] == pytest.approx(factor.log_prob(held_out), abs=1e-4)
        weighted = float(weights[1]) * row["reconstruction"] - float(weights[0]) * row["kl"]
        assert row["objective"] == pytest.approx(weighted, abs=1e-4)


def masked_pair(mask_of, guide_masks):
    """x ~ N(z + b, 1), z ~ N(0, 1), some data left out by a mask; the exact posterior if b = 0."""

    def model(x, mask):
        b = pyro.param("b", torch.zeros(()))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask_of(mask)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + b, 1.0), obs=x)

    def guide(x, mask):
        scale = pyro.param("scale", torch.tensor(0.5**0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)), poutine.mask(mask=mask if guide_masks else True):
            pyro.sample("z", dist.Normal(x / 2, scale))

    return model, guide


def of_masked(data, **more):
    x, mask = data[:, 0], torch.arange(NUM_DATA) % 3 > 0
    pyro.clear_param_store()
    exact = torch.where(mask, dist.Normal(0.0, 2**0.5).log_prob(x), 0.0).mean().item()
    options = {**NOTHING, "epochs": 3, "batch_size": 20, "compile": False, "validation": (x, mask), **more}
    return exact, lambda *pair: pv.fit(*pair, (x, mask), **options).history


@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("guide_masks", [False, True])
def test_masks_of_latents_are_aligned(loss, guide_masks, data):
    """In the guide or not: the ELBO of training and of validation is that of the data that are not masked."""
    exact, fit = of_masked(data, loss=OBJECTIVES[loss]())
    for row in fit(*masked_pair(lambda mask: mask, guide_masks)):
        assert row["elbo"] == pytest.approx(exact, abs=noise_of(loss))
        for name in ("validation_elbo", "validation_bound"):
            assert row[name] == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("loss", [None, TraceGraph_ELBO(), TraceMeanField_ELBO(), RenyiELBO(0.5)])
def test_a_mask_of_one_program_is_refused_by_losses_that_do_not_align_it(loss, data):
    exact, fit = of_masked(data, loss=loss)
    pair = masked_pair(lambda mask: mask, guide_masks=False)
    with pytest.raises(ValueError, match=r"the model masks latent site 'z'.*loss=pyrovae.objectives.MonteCarloKL\(\)"):
        fit(*pair)
    with pytest.raises(ValueError, match="the model masks latent site 'z'"):  # a later batch may leave data out
        fit(*masked_pair(torch.ones_like, guide_masks=False))
    with pytest.raises(ValueError, match="the guide masks site 'z'"):
        fit(*masked_pair(lambda mask: True, guide_masks=True))
    if loss is None:
        for row in fit(*masked_pair(lambda mask: mask, guide_masks=True)):
            for name in ("elbo", "validation_elbo", "validation_bound"):
                assert row[name] == pytest.approx(exact, abs=1e-4)


def test_missing_values_by_obs_mask_with_an_autoguide(data):
    """`obs_mask=` makes a latent of the missing values that the model masks; an autoguide counts it."""
    x, seen = data[:, 0], torch.arange(NUM_DATA) % 3 > 0

    def model(x, seen):
        b = pyro.param("b", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(b, 2**0.5), obs=x, obs_mask=seen)

    exact = torch.where(seen, dist.Normal(0.0, 2**0.5).log_prob(x), 0.0).mean().item()
    # The guide starts at N(0, 0.1^2), and the missing values follow N(0, 2).
    kl = (math.log(2**0.5 / 0.1) + 0.01 / 4 - 0.5) * (~seen).double().mean().item()
    options = {**NOTHING, "epochs": 1, "compile": False, "validation": (x, seen)}
    in_order = DataLoader(TensorDataset(x, seen), batch_size=NUM_DATA)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="the model masks latent site 'x_unobserved'"):
        pv.fit(model, AutoNormal(model), in_order, **options)
    pyro.clear_param_store()
    rows = pv.fit(model, AutoNormal(model), in_order, loss=pv.objectives.MonteCarloKL(), **options).history
    for name in ("elbo", "validation_bound"):  # one draw has an error of 0.06
        assert rows[0][name] == pytest.approx(exact - kl, abs=0.25)


def test_epochs_with_different_weights_are_compared_by_the_same_bound(data):
    """While the weight grows and nothing moves, the bound that chooses the best epoch stays as it is."""
    factor = Factor(0.01)
    factor.register_buffer("scale", torch.tensor(0.01))
    factor.weight = factor.scale
    rows = history(factor, data, epochs=5, callback=lambda _: factor.scale.mul_(3) is None)
    assert max(row["validation_bound"] for row in rows) - min(row["validation_bound"] for row in rows) < 1e-4


@pytest.mark.parametrize("loss", [None, pv.objectives.MonteCarloKL(), pv.objectives.AnalyticKL()])
@pytest.mark.parametrize("full_size", [None, 1000])
def test_a_subsampled_plate_inside_a_datum(full_size, loss, data):
    """It scales up within a datum: the ELBO per datum is divided by the number of data all the same."""
    rows = history(factor := Factor(full_size=full_size, pixels=DIM - 1), data, epochs=80, loss=loss)
    elbo = torch.tensor([row["elbo"] for row in rows])
    assert elbo.mean().item() == pytest.approx(factor.log_prob(data), abs=4 * elbo.std().item() / 80**0.5)
    # Its noise is the same at each epoch: one draw of the pixels.
    assert rows[0]["validation_elbo"] == pytest.approx(factor.log_prob(data), abs=6 * elbo.std().item())


class Gradients(torch.optim.SGD):
    seen: list = []

    def step(self, *args, **kwargs):
        self.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return super().step(*args, **kwargs)


def test_accumulated_gradients_with_a_plate_inside_a_datum_add_up(data):
    found = []
    for batch_size, accumulate in ((40, 1), (20, 2)):
        Gradients.seen.clear()
        factor = Factor(pixels=DIM - 1)
        history(
            factor,
            data,
            epochs=200,
            batch_size=batch_size,
            accumulate=accumulate,
            optimizer=partial(Gradients, lr=1e-30),
        )
        found.append(torch.stack([gradients[0] for gradients in Gradients.seen]).sum(1))
    error = sum(gradient.var() / len(gradient) for gradient in found).sqrt()
    assert (found[0].mean() - found[1].mean()).abs() < 4 * error
    assert found[0].mean().abs() > 8 * error  # so half of it would be seen


class Regression(nn.Module):
    """y ~ N(X w, 1), w ~ N(0, I) for all data together, with the exact posterior as the guide."""

    def __init__(self, x, y, full_size=None):
        super().__init__()
        self.nothing, self.full_size = nn.Parameter(torch.zeros(())), full_size
        self.precision = torch.eye(x.shape[1]) + x.T @ x
        self.mean = torch.linalg.solve(self.precision, x.T @ y)

    def model(self, x, y):
        pyro.module("regression", self)
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("data", self.full_size or len(x), subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x @ w + 0 * self.nothing, 1.0), obs=y)

    def guide(self, x, y):
        pyro.sample("w", dist.MultivariateNormal(self.mean + 0 * self.nothing, precision_matrix=self.precision))


@pytest.mark.parametrize("num_data", [30, 1200])
def test_a_latent_of_all_data_counts_once(num_data, caplog):
    torch.manual_seed(0)
    x = torch.randn(num_data, 5)
    y = x @ torch.randn(5) + torch.randn(num_data)
    covariance = torch.eye(num_data, dtype=torch.float64) + x.double() @ x.double().T
    exact = dist.MultivariateNormal(torch.zeros(num_data).double(), covariance).log_prob(y.double()).item() / num_data
    for full_size, batch_size in ((None, num_data), (num_data, num_data // 3)):
        pyro.clear_param_store()
        program = Regression(x, y, full_size)
        options = {**NOTHING, "epochs": 40 if full_size else 1, "batch_size": batch_size, "compile": False}
        rows = pv.fit(program.model, program.guide, (x, y), validation=(x, y), **options).history
        elbo = torch.tensor([row["elbo"] for row in rows])
        assert elbo.mean().item() == pytest.approx(
            exact, abs=1e-4 if full_size is None else 5 * elbo.std().item() / 40**0.5
        )
        assert rows[0]["validation_elbo"] == pytest.approx(exact, abs=1e-4)
    assert "lie outside plate" not in caplog.text
    pyro.clear_param_store()
    program = Regression(x, y)
    pv.fit(program.model, program.guide, (x, y), batch_size=num_data // 3, epochs=1, compile=False, **NOTHING)
    assert "latent(s) ['w'] lie outside plate 'data', so each of the 3 batches" in caplog.text
