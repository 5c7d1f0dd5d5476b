"""`generate` and `decode` take a context as a tensor, an array, a list or one label, and refuse all else in words."""

import numpy as np
import pytest
import torch
from torch import nn

import pyrovae as pv


def conditional(labels):
    torch.manual_seed(0)
    net = pv.nets.Concatenate(nn.Linear(2 + 4, 3), **({"num_classes": 4} if labels else {}))
    return pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.LearnedScaleNormal(net, (3,)))


def results(model, context):
    torch.manual_seed(1)
    return model.generate(5, context=context), model.decode(torch.ones(5, 2), context=context)


@pytest.mark.parametrize("context", [2, np.int64(2), torch.tensor(2), [2], [2] * 5, np.full(5, 2), torch.full((1,), 2)])
def test_labels(context):
    model = conditional(labels=True)
    for found, expected in zip(results(model, context), results(model, torch.full((5,), 2)), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(results(model, context)[1], results(model, 1)[1])


@pytest.mark.parametrize("kind", [np.asarray, lambda rows: rows.tolist(), lambda rows: rows[:1]])
def test_covariates(kind):
    model, rows = conditional(labels=False), torch.tensor([[0.5, -1.0, 0.25, 2.0]]).expand(5, 4)
    for found, expected in zip(results(model, kind(rows)), results(model, rows), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("context", "error", "words"),
    [
        ("three", TypeError, "text|must be a tensor"),
        (object(), TypeError, "the context must be a tensor"),
        ([[1.0], [1.0, 2.0]], TypeError, "context: expected numbers"),
        (torch.zeros(3, 4), ValueError, "for each of the 5 data"),
        ([1, 2], ValueError, "for each of the 5 data"),
    ],
)
def test_refuses(context, error, words):
    model = conditional(labels=False)
    with pytest.raises(error, match=words):
        model.generate(5, context=context)
    with pytest.raises(error, match=words):
        model.decode(torch.zeros(5, 2), context=context)
