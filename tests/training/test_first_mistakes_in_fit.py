"""What people hand to `fit` by mistake: counts as whole numbers train, all else is refused with its remedy."""

import logging
import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from pyrovae.training.non_finite import NotFiniteError

OPTIONS = {"epochs": 2, "batch_size": 30, "progress": False, "device": "cpu", "compile": False}
COUNTS = torch.poisson(torch.full((60, 3), 3.0), generator=torch.Generator().manual_seed(0)).long()


def pair(likelihood=pv.likelihoods.LearnedScaleNormal):
    torch.manual_seed(0)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood(nn.Linear(2, 3), (3,)))
    return model, pv.guides.MeanFieldNormal(nn.Linear(3, 4), 2, num_features=4)


def with_gap(scale=1.0):
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    x[:, 2] *= scale
    x[3, 0] = math.nan
    return x


@pytest.mark.parametrize(
    "form",
    [
        COUNTS,
        COUNTS.int(),
        COUNTS.numpy(),
        COUNTS.numpy().astype(np.uint16),
        COUNTS.to(torch.uint8),
        COUNTS.double(),
        pd.DataFrame(COUNTS.numpy(), columns=list("abc")),
        {"x": COUNTS},
        (COUNTS,),
        TensorDataset(COUNTS),
    ],
    ids=["int64", "int32", "numpy", "uint16", "uint8", "float64", "frame", "mapping", "tuple", "TensorDataset"],
)
def test_counts_as_whole_numbers_are_the_same_data(form):
    def trained(data, validation):
        model, guide = pair(pv.likelihoods.Poisson)
        torch.manual_seed(2)
        last = pv.fit(model, guide, data, validation=validation, **OPTIONS).history[-1]
        return last["elbo"], last["validation_elbo"]

    assert trained(form, form) == trained(COUNTS.float(), COUNTS.float())


def test_a_loader_and_a_transform_may_give_counts():
    loader = DataLoader(TensorDataset(COUNTS, torch.arange(60)), batch_size=30)
    model, guide = pair(pv.likelihoods.Poisson)
    result = pv.fit(model, guide, loader, transform=lambda batch: batch[0], **(OPTIONS | {"batch_size": None}))
    assert math.isfinite(result.history[-1]["elbo"])


def test_counts_that_float32_does_not_hold_are_refused():
    with pytest.raises(ValueError, match=r"train: found torch.int64 .* 16777217 to 16777216.*torch.float64"):
        pv.fit(*pair(pv.likelihoods.Poisson), torch.full((60, 3), 2**24 + 1), **OPTIONS)


def test_labels_and_tokens_of_own_programs_stay_whole():
    seen = []
    table = nn.Embedding(5, 2)

    def model(tokens, labels):
        seen.append((tokens.dtype, labels.dtype))
        with pyro.plate("data", len(tokens)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Categorical(logits=table(tokens).sum(1) @ torch.ones(2, 5) + z[..., :1]), obs=labels)

    def guide(tokens, labels):
        pyro.module("table", table)
        with pyro.plate("data", len(tokens)):
            pyro.sample("z", dist.Normal(table(tokens).mean(1), 1.0).to_event(1))

    pv.fit(model, guide, (torch.randint(5, (60, 4)), torch.randint(5, (60,))), **OPTIONS)
    assert set(seen) == {(torch.int64, torch.int64)}


def test_a_masked_gap_is_not_blamed_for_unscaled_columns():
    x = with_gap(scale=1e25)
    with pytest.raises(
        NotFiniteError, match=r"site 'z' of the guide has a Normal whose scale is inf.*scale the data"
    ) as error:
        pv.fit(*pair(), {"x": x, "observed": ~x.isnan()}, **OPTIONS)
    assert "data themselves" not in str(error.value)
    assert "mean nan" not in str(error.value)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"x": x, "observed": torch.ones_like(x, dtype=torch.bool)}])
def test_a_gap_that_counts_is_blamed_and_the_mask_named(wrap):
    with pytest.raises(NotFiniteError, match=r"data themselves.*train\[3\].*'observed': ~x.isnan\(\).*data\.table"):
        pv.fit(*pair(), wrap(with_gap()), **OPTIONS)


def test_gradients_that_are_finite_but_too_large_are_named():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.ones(3))

        def forward(self, x):
            pyro.module("steep", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z[:, None] + self.loc, 1e-10).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(NotFiniteError, match=r"gradients up to \d\.\de\+2\d, whose squares overflow torch.float32"):
        pv.fit(Steep(), guide, torch.randn(60, 3), **OPTIONS)


@pytest.mark.parametrize(
    ("likelihood", "x", "words"),
    [
        (pv.likelihoods.ContinuousBernoulli, torch.full((60, 3), 1e6), r"lie in \[0, 1\], found 1e\+06"),
        (pv.likelihoods.Bernoulli, torch.full((60, 3), 1e30), "Bernoulli pixels are 0 or 1"),
        (pv.likelihoods.Normal, torch.full((60, 1, 3), math.nan), r"shape \(N, 3\), found \(30, 1, 3\)"),
    ],
)
def test_data_are_refused_before_what_the_guide_computes_of_them(likelihood, x, words):
    """The scale of q(z|x) is 0 or NaN there, and Pyro would say that, with all numbers."""
    with pytest.raises(ValueError, match=words):
        pv.fit(*pair(likelihood), x, **OPTIONS)


def test_a_table_needs_its_mask():
    frame = pd.DataFrame({"a": [1.0, None, 3.0] * 20, "b": ["u", "v", "v"] * 20, "c": np.arange(60.0) / 60})
    table = pv.data.table(frame)
    with pytest.raises(TypeError, match=r"train is a Table.*'observed': table.observed"):
        pv.fit(*pair(), table, **OPTIONS)
    with pytest.warns(UserWarning, match="20 missing cells hold 0"):
        pv.fit(*pair(), table.values, **OPTIONS)
    pv.fit(*pair(), {"x": table.values, "observed": table.observed}, **OPTIONS)  # warnings are errors here
    pv.fit(*pair(), table.values.clone(), **OPTIONS)


@pytest.mark.filterwarnings("ignore:Found .*vars in")
def test_swapped_programs():
    model, guide = pair()
    with pytest.raises(ValueError, match=r"guide observes site\(s\) \['x'\].*swapped"):
        pv.fit(guide, model, torch.randn(60, 3), **OPTIONS)


class Sites(nn.Module):
    """Programs with a latent u in the model alone, the guide alone, or both, and perhaps x observed by the guide."""

    def __init__(self, in_model=None, in_guide=None, observes=False):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.in_model, self.in_guide, self.observes = in_model, in_guide, observes

    def model(self, x):
        pyro.module("sites", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            u = 0.0 if self.in_model is None else pyro.sample("u", *self.in_model[:1], infer=self.in_model[1])
            pyro.sample("x", dist.Normal(z + u, self.scale.exp()), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))
            if self.in_guide is not None:
                pyro.sample("u", *self.in_guide[:1], infer=self.in_guide[1])
            if self.observes:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


NARROW = dist.Normal(0.0, 0.01)
LOSSES = [
    Trace_ELBO(),
    Trace_ELBO(num_particles=3, vectorize_particles=False),
    TraceMeanField_ELBO(),
    RenyiELBO(num_particles=2),
]


@pytest.mark.filterwarnings("ignore:Found .*vars in")
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize(
    ("sites", "words"),
    [
        (Sites(in_model=(NARROW, {})), "'u' of the model is latent, and the guide does not sample it"),
        (Sites(in_guide=(NARROW, {})), "guide samples site 'u'.*no latent site"),
        (Sites(observes=True), "'x' of the guide is observed"),
    ],
    ids=["model alone", "guide alone", "observed"],
)
def test_an_elbo_that_is_no_bound_is_refused(sites, words, loss):
    with pytest.raises(ValueError, match=words):
        pv.fit(sites.model, sites.guide, torch.randn(60), loss=loss, **OPTIONS)


@pytest.mark.filterwarnings("ignore:Found .*vars in")
@pytest.mark.parametrize(
    ("sites", "loss", "is_logged"),
    [
        (Sites(), Trace_ELBO(), False),
        (Sites(in_model=(NARROW, {}), in_guide=(NARROW, {})), Trace_ELBO(), False),
        (Sites(in_model=(dist.Delta(torch.tensor(0.5)), {})), Trace_ELBO(), False),
        (Sites(in_model=(NARROW.mask(False), {})), Trace_ELBO(), False),
        (Sites(in_model=(dist.Bernoulli(0.3), {"enumerate": "parallel"})), TraceEnum_ELBO(max_plate_nesting=1), False),
        (Sites(in_model=(dist.Bernoulli(0.3), {})), Trace_ELBO(), True),
    ],
    ids=["same", "both", "constant", "masked", "summed out", "discrete"],
)
def test_an_elbo_that_stays_a_bound_trains(sites, loss, is_logged, caplog):
    with caplog.at_level(logging.WARNING, logger="pyrovae"):
        pv.fit(sites.model, sites.guide, torch.randn(60), loss=loss, **OPTIONS)
    assert ("stays a bound" in caplog.text) == is_logged


def test_without_the_check_such_an_elbo_lies_above_the_evidence():
    x = torch.randn(200, generator=torch.Generator().manual_seed(3))
    sites = Sites(in_model=(NARROW, {}))
    with pytest.warns(UserWarning, match="vars in model but not guide"):
        elbo = -Trace_ELBO(num_particles=50).loss(sites.model, sites.guide, x)
    exact = dist.Normal(0.0, (1 + 1e-4 + math.exp(2)) ** 0.5).log_prob(x).sum().item()
    assert elbo > exact + 100


def test_a_transform_of_one_tensor_given_several():
    images, labels = torch.rand(60, 1, 2, 2), torch.arange(60)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(nn.Linear(2, 4), (1, 2, 2)))
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(4, [4]), 2)
    with pytest.raises(
        TypeError, match=r"tuple of 2 items: transform=lambda batch: \(data.transform\(batch\[0\]\), batch\[1\]\)"
    ):
        pv.fit(model, guide, (images, labels), transform=pv.data.binarize, **OPTIONS)
    with pytest.raises(TypeError, match=r"dict of 2 items.*\{\*\*batch, 'x': data.transform\(batch\['x'\]\)\}"):
        pv.fit(model, guide, {"x": images, "y": labels}, transform=pv.data.binarize, **OPTIONS)


def test_the_summary_shows_what_was_measured():
    x = torch.randn(60, 3)
    assert "validation" not in repr(pv.fit(*pair(), x, **OPTIONS))
    assert "nan" not in repr(pv.fit(*pair(), x, loss=pv.objectives.ImportanceWeighted(2), **OPTIONS))
    shown = repr(pv.fit(*pair(), x, validation=x, loss=pv.objectives.ImportanceWeighted(2), **OPTIONS))
    assert "validation elbo -" in shown
    assert "validation bound -" in shown


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (pd.DataFrame(np.ones((60, 3)), columns=["a", "a", "b"]), ValueError, r"several columns of one name, \['a'\]"),
        (torch.eye(60, 3).to_sparse(), ValueError, "train is a sparse tensor.*to_dense"),
        (torch.ones(60, 3, dtype=torch.complex64), TypeError, "complex64 for programs of real numbers"),
    ],
)
def test_data_in_a_form_that_would_be_misread(data, error, words):
    with pytest.raises(error, match=words):
        pv.fit(*pair(), data, **OPTIONS)
