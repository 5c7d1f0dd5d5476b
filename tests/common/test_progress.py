"""Long work shows how far it has come and how long it still takes, where it is asked to, and nothing where it is not."""

import inspect
import io
import re
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae as pv
from pyrovae.common.reporting import progress_bar

X = torch.ones(6, 5)
X[::2, :3] = 0


@pytest.fixture
def pair():
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 5), 5))
    return model, pv.guides.MeanFieldNormal(pv.nets.MLP(5, [4]), 2)


def evaluated(pair):
    return pv.log_marginal_likelihood(*pair, X, num_particles=30)


# name -> (call(pair, **progress), what its bars are called): every public function that can take long
ANNEALING = {"num_chains": 4, "num_temperatures": 3, "num_leapfrog_steps": 2}


def two_classes(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(y.to(x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_z(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


LONG = {
    "active_units": (lambda pair, **progress: pv.active_units(pair[1], X, **progress), {"active units"}),
    "anneal_a_slice": (
        lambda pair, **progress: pv.anneal_a_slice(
            pair[0], pv.log_marginal_likelihood(*pair, X, num_particles=3), X, num_annealed=2, **ANNEALING, **progress
        ),
        {"annealing"},
    ),
    "sequential_monte_carlo": (
        lambda pair, **progress: pv.sequential_monte_carlo(pair[0], X, num_populations=2, **ANNEALING, **progress),
        {"annealing"},
    ),
    "annealed_importance_sampling": (
        lambda pair, **progress: pv.annealed_importance_sampling(pair[0], X, **ANNEALING, **progress),
        {"annealing"},
    ),
    "bidirectional_monte_carlo": (
        lambda pair, **progress: pv.bidirectional_monte_carlo(pair[0], X, **ANNEALING, **progress),
        {"annealing"},
    ),
    "fit": (lambda pair, **progress: pv.fit(*pair, X, epochs=1, device="cpu", **progress), {"training"}),
    "inference_gaps": (
        lambda pair, **progress: pv.inference_gaps(*pair, X, num_particles=30, max_num_steps=2, **progress),
        {"refining", "log weights"},
    ),
    "latent_use": (lambda pair, **progress: pv.latent_use(*pair, X, **progress), {"latent use"}),
    "log_marginal_likelihood": (
        lambda pair, **progress: pv.log_marginal_likelihood(*pair, X, num_particles=30, **progress),
        {"log weights"},
    ),
    "log_weights": (
        lambda pair, **progress: pv.log_weights(*pair, X, num_particles=30, **progress),
        {"log weights"},
    ),
    "particles_for": (lambda pair, **progress: pv.particles_for(*pair, X, stderr=0.1, **progress), {"log weights"}),
    "aggregate_posterior": (
        lambda pair, **progress: pv.aggregate_posterior(*pair, X, **progress),
        {"aggregate posterior"},
    ),
    "rate_distortion": (
        lambda pair, **progress: pv.rate_distortion(pair[0], X, **ANNEALING, **progress),
        {"annealing"},
    ),
    "classify": (lambda pair, **progress: pv.classify(two_classes, of_z, torch.randn(4), **progress), {"classes"}),
    "impute": (
        lambda pair, **progress: pv.impute(*pair, X, observed=torch.ones_like(X, dtype=torch.bool), **progress),
        {"imputation"},
    ),
    "second_opinion": (
        lambda pair, **progress: pv.second_opinion(
            pair[0], pv.guides.DefensiveMixture(pair[1], pair[0].prior), X, num_particles=30, **progress
        ),
        {"second opinion"},
    ),
    "simulation_based_calibration": (
        lambda pair, **progress: pv.simulation_based_calibration(*pair, X, **progress),
        {"calibration"},
    ),
    "to_inference_data": (
        lambda pair, **progress: pv.to_inference_data(
            evaluated(pair), model=pair[0], guide=pair[1], args=(X,), num_draws=3, **progress
        ),
        {"draws"},
    ),
}
BAR = re.compile(r"([a-z ]+): +\d+%\|[^|]*\| *\S+/\S+ \[\S+<\S+")  # name: share, done/total [time gone<time left


def test_every_function_that_takes_progress_is_listed():
    functions = {name: getattr(pv, name) for name in pv.__all__ if inspect.isfunction(getattr(pv, name))}
    taking = {name for name, function in functions.items() if "progress" in inspect.signature(function).parameters}
    assert taking == set(LONG)


@pytest.mark.parametrize("name", LONG)
def test_shown_with_the_time_left(name, pair, capfd):
    call, bars = LONG[name]
    call(pair, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert set(BAR.findall(err)) == bars
    assert "100%" in err


@pytest.mark.parametrize("name", LONG)
def test_silent_otherwise(name, pair, capfd):
    LONG[name][0](pair, progress=False)
    assert capfd.readouterr() == ("", "")
    default = inspect.signature(getattr(pv, name)).parameters["progress"].default
    assert default is (name == "fit")


class Stream(io.StringIO):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def isatty(self):
        return self.kind == "terminal"


class NotebookStream(Stream):
    __module__ = "ipykernel.iostream"


@pytest.mark.parametrize(("kind", "cls"), [("terminal", Stream), ("notebook", NotebookStream), ("log", Stream)])
def test_a_log_file_gets_few_lines(kind, cls, monkeypatch):
    """Each state is appended to a log, so it gets one every ten seconds; elsewhere, a state replaces the one before it."""
    now = [0.0]
    monkeypatch.setattr(sys, "stderr", cls(kind))
    with progress_bar("steps", 400, "steps", True) as bar:
        bar._time = lambda: now[0]
        bar.last_print_t = bar.start_t = 0.0
        for _ in range(400):
            now[0] += 0.1
            bar.update(1)
    states = sys.stderr.getvalue().count("steps:")
    assert 2 <= states <= 6 if kind == "log" else states > 30
