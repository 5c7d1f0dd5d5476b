"""The parts of examples/semi_supervised.py: which images are labelled, and the loss, against sums by hand."""

import math
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

import pyrovae as pv

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from semi_supervised import ClassGuide, ClassModel, WithClassification, joined, labelled_first


def test_the_labelled_images():
    """As many of each class, first; no image twice; another seed takes others."""
    labels = torch.arange(200) % 10
    orders = [labelled_first(labels, 30, seed) for seed in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(200))
        assert torch.bincount(labels[order[:30]]).tolist() == [3] * 10
    assert set(orders[0][:30].tolist()) != set(orders[1][:30].tolist())


def test_labelled_and_unlabelled_losses(double):
    """TraceEnum_ELBO of the example against both lines of its docstring, summed by hand; and alpha log q(label|x)."""
    likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2 + 10, [5], 6), (6,))
    model, guide = ClassModel(likelihood, 2), ClassGuide(6, 2, 7)
    x, label = torch.rand(4, 6).round(), torch.tensor([3, 0, 9, 5])
    labelled = torch.tensor([True, False, True, False])
    pyro.set_rng_seed(2)
    value = TraceEnum_ELBO(max_plate_nesting=1).loss(WithClassification(model, guide, 0.7), guide, x, label, labelled)
    pyro.set_rng_seed(2)
    noise = torch.randn(10, 4, 2)  # of every class and datum, in the guide's one draw
    q_y = dist.Categorical(logits=guide.classifier(x))
    by_class = []
    for y in range(10):
        loc, scale = guide.normal_of(x, torch.tensor(y))
        z = loc + scale * noise[y]
        log_joint = -math.log(10) + dist.Normal(0, 1).log_prob(z).sum(-1)
        log_joint += likelihood(joined(z, torch.tensor(y))).log_prob(x)
        by_class.append(log_joint - dist.Normal(loc, scale).log_prob(z).sum(-1))
    terms = torch.stack(by_class, 1)  # L(x, y), (N, 10)
    unlabelled = (q_y.probs * (terms - q_y.logits)).sum(1)
    known = terms.gather(1, label[:, None]).squeeze(1) + 0.7 * q_y.log_prob(label)
    assert value == pytest.approx(-torch.where(labelled, known, unlabelled).sum().item(), abs=1e-10)
