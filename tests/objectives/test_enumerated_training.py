"""What a run over enumerated latents reports: the sum over their values, by brute force; and Pyro's other losses."""

import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from torch import nn

import pyrovae as pv

OPTIONS = {"epochs": 1, "learning_rate": 1e-9, "progress": False}


class Mixture(nn.Module):
    """Classes and a sign beside them; every log density of a value is at hand."""

    def __init__(self, num_classes):
        super().__init__()
        self.locs, self.encoder = nn.Parameter(torch.randn(num_classes) * 2), nn.Linear(1, num_classes)
        self.sign = nn.Parameter(torch.tensor(0.3))

    def model(self, x):
        pyro.module("mixture", self)
        num_classes = len(self.locs)
        with pyro.plate("d", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(num_classes) / num_classes))
            s = pyro.sample("s", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(self.locs[y] + s, 0.7), obs=x)

    def guide(self, x):
        pyro.module("mixture", self)
        with pyro.plate("d", len(x)):
            pyro.sample("y", dist.Categorical(logits=self.encoder(x[:, None])))
            pyro.sample("s", dist.Bernoulli(logits=self.sign * x))

    @torch.no_grad()
    def terms(self, x):
        """(log p(x, y, s), log q(y, s | x)), each (values, N)."""
        joint, proposal = [], []
        classes, sign = dist.Categorical(logits=self.encoder(x[:, None])), dist.Bernoulli(logits=self.sign * x)
        for y, s in product(range(len(self.locs)), (0.0, 1.0)):
            prior = -math.log(len(self.locs)) + dist.Bernoulli(torch.tensor(0.4)).log_prob(torch.tensor(s))
            joint.append(prior + dist.Normal(self.locs[y] + s, 0.7).log_prob(x))
            proposal.append(classes.log_prob(torch.full(x.shape, y)) + sign.log_prob(torch.full_like(x, s)))
        return torch.stack(joint), torch.stack(proposal)


@settings(max_examples=12, deadline=None)
@given(
    num_classes=st.integers(2, 4),
    how=st.sampled_from(["sequential", "parallel"]),
    num_data=st.integers(1, 12),
    batch_size=st.integers(2, 7),
    num_particles=st.integers(1, 3),
)
def test_enumerated_in_the_guide(num_classes, how, num_data, batch_size, num_particles):
    pyro.clear_param_store()
    mixture, x, held_out = Mixture(num_classes), torch.randn(num_data), torch.randn(9)
    loss = TraceEnum_ELBO(max_plate_nesting=1, num_particles=num_particles)
    row = pv.fit(
        mixture.model,
        config_enumerate(mixture.guide, how),
        x,
        loss=loss,
        batch_size=batch_size,
        validation=held_out,
        **OPTIONS,
    ).history[0]
    for data, columns in ((x, ("objective", "elbo")), (held_out, ("validation_bound", "validation_elbo"))):
        joint, proposal = mixture.terms(data)
        exact = (proposal.exp() * (joint - proposal)).sum(0).mean().item()
        for column in columns:
            assert row[column] == pytest.approx(exact, rel=1e-4, abs=1e-4), column
    assert all(math.isnan(row[name]) for name in ("reconstruction", "kl", "validation_reconstruction", "validation_kl"))


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_enumerated_in_the_model(num_classes):
    """log p(x) itself."""
    mixture, x, held_out = Mixture(num_classes), torch.randn(20), torch.randn(600)
    marked, loss = config_enumerate(mixture.model, "parallel"), TraceEnum_ELBO(max_plate_nesting=1)
    row = pv.fit(marked, nothing, x, loss=loss, validation=held_out, **OPTIONS).history[0]
    for data, columns in ((x, ("objective", "elbo")), (held_out, ("validation_bound", "validation_elbo"))):
        exact = mixture.terms(data)[0].logsumexp(0).mean().item()
        for column in columns:
            assert row[column] == pytest.approx(exact, rel=1e-4), column


def test_tensor_monte_carlo_is_validated_by_itself_and_is_no_elbo():
    mixture, x, held_out = Mixture(3), torch.randn(20), torch.randn(15)
    marked, loss = config_enumerate(mixture.model, "parallel"), TraceTMC_ELBO(max_plate_nesting=1)
    row = pv.fit(marked, nothing, x, loss=loss, validation=held_out, **OPTIONS).history[0]
    assert row["validation_bound"] == pytest.approx(-loss.loss(marked, nothing, held_out) / 15, rel=1e-4)
    assert math.isnan(row["elbo"])
    assert math.isnan(row["validation_elbo"])


def nothing(x):
    pass


def test_the_best_epoch_is_the_losss():
    """A rate that ruins the mixture after its best epoch: what is kept scores best by the sum over classes."""
    mixture, x, held_out = Mixture(3), torch.randn(20) + 1, torch.randn(50) + 1
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    options = {**OPTIONS, "epochs": 40, "learning_rate": 0.5, "batch_size": 5, "schedule": None}
    result = pv.fit(config_enumerate(mixture.model, "parallel"), nothing, x, loss=loss, validation=held_out, **options)
    bounds = [row["validation_bound"] for row in result.history]
    assert result.best_epoch == 1 + max(range(40), key=bounds.__getitem__)
    exact = mixture.terms(held_out)[0].logsumexp(0).mean().item()
    assert max(bounds) == pytest.approx(exact, rel=1e-4)


class Exact(nn.Module):
    """The guide is the posterior, so that every weight is p(x): sums taken wrongly show without Monte Carlo error."""

    def __init__(self):
        super().__init__()
        self.loc, self.slope = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.5))

    def model(self, x):
        pyro.module("exact", self)
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        pyro.module("exact", self)
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 0.5**0.5))


VECTORISED = {"vectorize_particles": True, "max_plate_nesting": 1}


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(num_particles=3),
        Trace_ELBO(num_particles=3, **VECTORISED),
        Trace_ELBO(retain_graph=True),
        TraceGraph_ELBO(num_particles=3),
        TraceMeanField_ELBO(num_particles=3, **VECTORISED),
        TraceEnum_ELBO(num_particles=3, max_plate_nesting=1),
        TraceEnum_ELBO(num_particles=3, **VECTORISED),
        TraceTMC_ELBO(max_plate_nesting=1),
        RenyiELBO(num_particles=3),
        RenyiELBO(alpha=0.5, num_particles=3, **VECTORISED),
        pv.objectives.ImportanceWeighted(3),
    ],
    ids=lambda loss: type(loss).__name__,
)
@pytest.mark.filterwarnings("ignore:.*ound no sample sites")
def test_the_elbo_of_other_losses(loss):
    pair, x, held_out = Exact(), 2**0.5 * torch.randn(31), torch.randn(520)
    row = pv.fit(pair.model, pair.guide, x, loss=loss, batch_size=10, validation=held_out, **OPTIONS).history[0]
    for data, columns in ((x, ("elbo",)), (held_out, ("validation_bound", "validation_elbo"))):
        exact = dist.Normal(0.0, 2**0.5).log_prob(data).mean().item()
        for column in columns:
            assert row[column] == pytest.approx(exact, rel=1e-4), column
    if type(loss) is not TraceMeanField_ELBO:  # its KL is no draw
        assert row["objective"] == pytest.approx(row["elbo"], rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "gives"),
    [
        (ReweightedWakeSleep(num_particles=3), r"ReweightedWakeSleep\(\) gives two losses"),
        (
            TraceTailAdaptive_ELBO(num_particles=3, **VECTORISED),
            r"TraceTailAdaptive_ELBO\(\) gives gradients without a loss",
        ),
    ],
)
def test_losses_without_one_number(loss, gives):
    pair = Exact()
    with pytest.raises(TypeError, match=f"loss={gives}.*take RenyiELBO"):
        pv.fit(pair.model, pair.guide, torch.randn(9), loss=loss, **OPTIONS)
