"""A result declares its estimates once: a new one is a function and a line, and shows in summary, export and file."""

import math
from dataclasses import asdict, dataclass, field

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae as pv
from pyrovae.annealing import annealed_sampling
from pyrovae.common.reporting import import_arviz
from pyrovae.estimators.weights import Weights
from pyrovae.evaluation import importance_sampling
from pyrovae.evaluation.declared import estimate
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood


def harmonic_mean(log_weights):
    """-log 1/S sum_s 1/w, (N,)."""
    weights = Weights.of(log_weights)
    return math.log(len(weights)) - (-weights.log).logsumexp(0)


@dataclass(frozen=True, repr=False, kw_only=True)
class WithHarmonicMean(LogMarginalLikelihood):
    """The fields as they are with one line more."""

    harmonic: torch.Tensor = field(metadata=estimate(harmonic_mean, "harmonic mean", "not a bound", of_annealed=False))


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


@pytest.fixture
def _with_harmonic_mean(monkeypatch):
    for module in (importance_sampling, annealed_sampling):
        monkeypatch.setattr(module, "LogMarginalLikelihood", WithHarmonicMean)


def read(path):
    arviz = import_arviz()
    if "InferenceData" in vars(arviz):
        return arviz.from_netcdf(str(path))
    import xarray

    return xarray.open_datatree(path).load()


@pytest.mark.usefixtures("_with_harmonic_mean")
def test_a_new_estimate_shows_everywhere(double, tmp_path):
    x = torch.linspace(-2, 2, 50)
    pyro.set_rng_seed(1)
    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=40, data_batch_size=20)
    pyro.set_rng_seed(1)
    log_weights = pv.log_weights(model, guide, x, num_particles=40, data_batch_size=20)
    expected = -((-log_weights).exp().mean(0)).log()
    torch.testing.assert_close(lml.harmonic, expected)
    assert (lml.harmonic < lml.log_prob).all()  # the inequality of the means
    assert f"  harmonic mean   {expected.mean():10.3f}   not a bound" in lml.summary().splitlines()
    # What holds for every estimate holds for it: a selection, a joint result, the export, the file.
    torch.testing.assert_close(lml[10:13].harmonic, expected[10:13])
    torch.testing.assert_close(WithHarmonicMean.concatenate([lml[:10], lml[10:]]).harmonic, expected)
    data = lml.to_inference_data()
    np.testing.assert_allclose(data.sample_stats["harmonic"].values, expected.numpy())
    data.to_netcdf(str(tmp_path / "e.nc"))
    np.testing.assert_allclose(read(tmp_path / "e.nc").sample_stats["harmonic"].values, expected.numpy())
    torch.save(asdict(lml), tmp_path / "e.pt")
    again = WithHarmonicMean(**torch.load(tmp_path / "e.pt", weights_only=True))
    torch.testing.assert_close(again.harmonic, expected)
    assert again.summary() == lml.summary()


@pytest.mark.usefixtures("_with_harmonic_mean", "short_pilots")
def test_an_estimate_that_annealed_weights_do_not_have(tmp_path):
    lml = pv.annealed_importance_sampling(model, torch.zeros(4), num_chains=4, num_temperatures=5, num_leapfrog_steps=1)
    assert lml.harmonic.isnan().all()
    assert "harmonic" not in lml.summary()
    assert "ELBO" not in lml.summary()
    assert "acceptance" in lml.summary()
    stats = lml.to_inference_data().sample_stats
    assert np.isnan(stats["harmonic"].values).all()
    np.testing.assert_allclose(stats["acceptance"].values, lml.acceptance.numpy())


def test_the_tail_is_fitted_once(monkeypatch):
    """`pareto_k` and `smoothed` share the fit, which takes most of the time."""
    from pyrovae.estimators import tails

    fits, original = [], tails.smooth_tail
    monkeypatch.setattr(tails, "smooth_tail", lambda *args: fits.append(1) or original(*args))
    LogMarginalLikelihood.from_log_weights(torch.randn(100, 3))
    assert len(fits) == 1


def test_a_result_has_its_declared_estimates_and_no_more():
    of_weights = LogMarginalLikelihood.from_log_weights(torch.randn(30, 5))
    annealed = LogMarginalLikelihood.from_annealed(torch.randn(30, 5), torch.ones(5))
    assert set(annealed.per_datum()) - set(of_weights.per_datum()) == {"acceptance"}
    for result in (of_weights, annealed):
        assert all(values.shape == (5,) and values.dtype == torch.float64 for values in result.per_datum().values())
