"""How often the chi-square upper bound lies below log p(x): the reason why no result reports it."""

import math
from dataclasses import fields

import pytest
import torch
from conftest import within

from pyrovae import estimators
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood


def log_normal(scale):
    """Weights of mean 1."""
    return lambda *shape: scale * torch.randn(shape, dtype=torch.float64) - scale**2 / 2


def rare(probability):
    """Weights of mean 1, half of which is that of one large value: 1 / (2 probability), and log-normal ones otherwise."""

    def draw(*shape):
        usual = log_normal(0.3)(*shape) - math.log(2 * (1 - probability))
        large = torch.rand(shape, dtype=torch.float64) < probability
        return torch.where(large, -math.log(2 * probability), usual)

    return draw


# The table of the docstring: shares below log p(x) of those with k < 0.5, at these numbers of particles.
TABLE = {
    "log-normal, s = 0.3": (log_normal(0.3), {25: 0.26, 100: 0.09, 1000: 0.0, 5000: 0.0}),
    "log-normal, s = 1": (log_normal(1.0), {25: 0.18, 100: 0.01, 1000: 0.0, 5000: 0.0}),
    "log-normal, s = 2": (log_normal(2.0), {25: 0.44, 100: 0.11, 1000: 0.0, 5000: 0.0}),
    "5,000 once in 10,000 draws": (rare(1e-4), {25: 1.0, 100: 1.0, 1000: 1.0, 5000: 0.79}),
}


@pytest.mark.parametrize("name", TABLE)
def test_how_often_it_is_no_bound(name):
    draw, expected = TABLE[name]
    for num_particles, share in expected.items():
        bound = estimators.chi_square_bound(draw(num_particles, 600))
        shown = bound[bound.isfinite()]
        below = (shown < 0).double().mean().item()
        error = math.sqrt(max(share * (1 - share), 0.01) / len(shown))
        within(below, share, error)


def test_no_diagnostic_tells_a_weight_that_was_not_drawn():
    """Where the rare weight is missing, everything is as for weights without it; the bound is half a nat too low or more."""
    log_weights = rare(1e-5)(1000, 100)
    clean = log_weights[:, (log_weights < 5).all(0)]  # the large one is 10.8
    assert clean.shape[1] > 90
    assert (estimators.pareto_k(clean) < 0.5).double().mean() > 0.95
    assert (estimators.effective_sample_size(clean) > 800).all()
    assert (estimators.importance_weighted_bound_stderr(clean) < 0.02).all()
    assert (estimators.chi_square_bound(clean).nan_to_num(-1.0) < -0.5).all()


def test_no_result_reports_it():
    result = LogMarginalLikelihood.from_log_weights(log_normal(0.3)(1000, 4))
    assert {"upper_bound", "chi_square_bound"}.isdisjoint({field.name for field in fields(result)})
    assert "upper_bound" not in result.to_inference_data().sample_stats
    assert "upper" not in result.summary()
