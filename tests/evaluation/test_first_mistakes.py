"""What people hand to evaluations by mistake: numbers of other dtypes are the same data, all else is refused with its remedy."""

import re

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv

COUNTS = torch.poisson(torch.full((12, 3), 3.0), generator=torch.Generator().manual_seed(0)).long()
CHAINS = {"num_chains": 2, "num_temperatures": 10}


def pair(likelihood=pv.likelihoods.Poisson, dtype=torch.float32):
    torch.manual_seed(0)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood(nn.Linear(2, 3), (3,)))
    return model.to(dtype), pv.guides.MeanFieldNormal(nn.Linear(3, 4), 2, num_features=4).to(dtype)


FORMS = {
    "int64": COUNTS,
    "int32": COUNTS.int(),
    "uint8": COUNTS.to(torch.uint8),
    "float64": COUNTS.double(),
    "numpy": COUNTS.numpy(),
    "frame": pd.DataFrame(COUNTS.numpy(), columns=list("abc")),
    "mapping": {"x": COUNTS.to(torch.uint8)},
    "tuple": (COUNTS.double(),),
    "TensorDataset": TensorDataset(COUNTS),
}


def under_one_seed(estimate, *args, **options):
    torch.manual_seed(1)
    return estimate(*args, **options)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_evaluation_takes_the_numbers_that_fit_takes(form):
    found = under_one_seed(pv.log_marginal_likelihood, *pair(), form, num_particles=20)
    expected = under_one_seed(pv.log_marginal_likelihood, *pair(), COUNTS.float(), num_particles=20)
    assert torch.equal(found.log_prob, expected.log_prob)


def test_so_do_imputation_use_of_latents_and_annealing():
    model, guide = pair()
    observed = torch.rand(12, 3, generator=torch.Generator().manual_seed(2)) > 0.3
    for estimate, read in (
        (lambda x: pv.impute(model, guide, x, observed=observed, num_particles=20), lambda result: result.mean),
        (lambda x: pv.latent_use(model, guide, x), lambda result: torch.as_tensor(result.advantage)),
        (lambda x: pv.annealed_importance_sampling(model, x, **CHAINS), lambda result: result.log_prob),
        (lambda x: pv.bidirectional_monte_carlo(model, x, **CHAINS), lambda result: result.lower),
    ):
        found, expected = (read(under_one_seed(estimate, x)) for x in (COUNTS, COUNTS.float()))
        assert torch.equal(found, expected)


def test_a_loader_of_float64_for_programs_in_float64():
    model, guide = pair(pv.likelihoods.LearnedScaleNormal, torch.float64)
    x = torch.randn(12, 3, dtype=torch.float64)
    loader = DataLoader(x, batch_size=12, generator=torch.Generator())  # which draws nothing from torch's own
    found = under_one_seed(pv.log_marginal_likelihood, model, guide, loader, num_particles=20)
    expected = under_one_seed(pv.log_marginal_likelihood, model, guide, x, num_particles=20)
    assert torch.equal(found.log_prob, expected.log_prob)


@pytest.mark.parametrize("x", [torch.rand(12, 3, dtype=torch.float64) + 1e-12, torch.full((12, 3), 2**24 + 1)])
def test_numbers_that_would_change_are_refused(x):
    with pytest.raises(ValueError, match="argument 1: found torch.*would change 36 of 36 values"):
        pv.log_marginal_likelihood(*pair(pv.likelihoods.LearnedScaleNormal), x, num_particles=20)


@pytest.mark.parametrize(
    "estimate", [pv.annealed_importance_sampling, pv.sequential_monte_carlo, pv.bidirectional_monte_carlo]
)
@pytest.mark.parametrize("as_method", [False, True])
def test_a_guide_in_place_of_the_data(estimate, as_method):
    model, guide = pair()
    with pytest.raises(TypeError, match=r"expected data.*guide=guide"):
        estimate(model, guide.forward if as_method else guide, COUNTS.float(), **CHAINS)


def test_a_guide_in_place_of_the_results_of_importance_sampling():
    model, guide = pair()
    x = COUNTS.float()
    importance = pv.log_marginal_likelihood(model, guide, x, num_particles=20)
    for wrong in (guide, x):
        with pytest.raises(TypeError, match="second argument is what log_marginal_likelihood gave"):
            pv.anneal_a_slice(model, wrong, x)
    with pytest.raises(TypeError, match="guide=guide"):
        pv.anneal_a_slice(model, importance, guide, x)


@pytest.mark.parametrize(
    "estimate",
    [
        pv.latent_use,
        pv.inference_gaps,
        lambda model, guide, x: pv.impute(model, guide, x, observed=COUNTS > 0),
        lambda model, _, x: pv.bidirectional_monte_carlo(model, x, **CHAINS),
    ],
)
def test_a_loader_if_the_data_must_be_in_memory(estimate):
    with pytest.raises(TypeError, match=r"found a DataLoader.*torch.cat\(list\(loader\)\)"):
        estimate(*pair(), DataLoader(COUNTS.float(), batch_size=4))


def test_a_table_and_a_mapping_in_place_of_values_and_mask():
    model, guide = pair(pv.likelihoods.LearnedScaleNormal)
    frame = pd.DataFrame({"a": [1.0, None, 3.0] * 4, "b": ["u", "v", "v"] * 4, "c": np.arange(12.0)})
    table = pv.data.table(frame)
    for estimate in (
        lambda: pv.log_marginal_likelihood(model, guide, table, num_particles=20),
        lambda: pv.impute(model, guide, table, observed=table.observed, num_particles=20),
    ):
        with pytest.raises(TypeError, match=r"argument 1 is a Table.*observed=table.observed"):
            estimate()
    with pytest.warns(UserWarning, match="4 missing cells hold 0"):
        pv.log_marginal_likelihood(model, guide, table.values, num_particles=20)
    pv.log_marginal_likelihood(model, guide, table.values, observed=table.observed, num_particles=20)
    with pytest.raises(TypeError, match="values and the mask apart"):
        pv.impute(model, guide, {"x": table.values}, observed=table.observed)


@pytest.mark.parametrize(
    "estimate",
    [
        lambda model, guide, x: pv.log_marginal_likelihood(model, guide, x, num_particles=20),
        pv.latent_use,
        lambda model, guide, x: pv.impute(model, guide, x, observed=x > 0),
    ],
)
def test_swapped_programs(estimate):
    model, guide = pair()
    with pytest.raises(ValueError, match="swapped"):
        estimate(guide, model, COUNTS.float())


def test_simulation_says_what_to_do_with_a_mask():
    model, _ = pair()
    with pytest.raises(ValueError, match=r"'x' is masked.*leave the mask out.*annealed_importance_sampling"):
        pv.bidirectional_monte_carlo(model, COUNTS.float(), observed=COUNTS > 0, **CHAINS)


def observed_by(model, x):
    return pyro.condition(model, data={"x": x})


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda model, guide, x: pv.log_marginal_likelihood(model, guide, x, num_samples=10), "num_particles=?"),
        (
            lambda model, guide, x: pv.log_marginal_likelihood(observed_by(model, x), guide, x, num_samples=10),
            "num_parti",
        ),
        (lambda model, guide, x: pv.log_weights(model, guide, x, num_sample=10), "num_particles=?"),
        (lambda model, guide, x: pv.latent_use(model, guide, x, num_draw=10), "num_draws=?"),
        (lambda model, guide, x: pv.classify(model, guide, x, sit="y"), "site=?"),
        (lambda model, guide, x: pv.annealed_importance_sampling(model, x, num_chain=10), "num_chains=?"),
        (lambda model, guide, x: pv.annealed_importance_sampling(model, x, guid=guide), "guide=?"),
        (lambda model, guide, x: pv.sequential_monte_carlo(model, x, num_population=2), "num_populations=?"),
        (lambda model, guide, x: pv.simulation_based_calibration(model, guide, x, num_draw=9), "num_draws=?"),
    ],
)
def test_a_misspelt_option(call, match):
    model, guide = pair()
    match = f"no option of that name, nor do the programs take such an argument: did you mean {re.escape(match)}"
    with pytest.raises(TypeError, match=match):
        call(model, guide, COUNTS.float())


def test_an_argument_that_the_programs_lack():
    model, guide = pair()
    with pytest.raises(TypeError, match="found y=, .*: leave it out; options are .*num_particles"):
        pv.log_marginal_likelihood(model, guide, COUNTS.float(), y=COUNTS)
    with pytest.raises(TypeError, match="the programs take no argument observed=: give both of them an argument"):
        pv.impute(lambda x: None, lambda x: None, COUNTS.float(), observed=COUNTS > 0)


def test_an_argument_by_keyword_is_taken():
    def model(x, **options):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(options["shift"], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, shift):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + shift) / 2, 0.5**0.5))

    result = pv.log_marginal_likelihood(model, guide, torch.zeros(5), shift=2.0, num_particles=3)
    torch.testing.assert_close(
        result.log_prob.float(), torch.full((5,), dist.Normal(2.0, 2**0.5).log_prob(torch.tensor(0.0)))
    )
