"""A context in a mapping, or by keyword: Pyro's handlers have an argument of that name, so it goes by position."""

import pyro
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import pyrovae as pv

X, LABELS = torch.rand(30, 6), torch.arange(30) % 3
MASK = torch.rand(30, 6) < 0.7


def pair():
    torch.manual_seed(0)
    decoder = pv.nets.Concatenate(pv.nets.MLP(2 + 3, [8], 6), num_classes=3)
    encoder = pv.nets.Concatenate(pv.nets.MLP(6 + 3, [8]), num_classes=3)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Normal(decoder, 6))
    return model, pv.guides.MeanFieldNormal(encoder, 2)


class Items(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"x": X[index], "context": LABELS[index]}


def trained(data, **options):
    model, guide = pair()
    pyro.set_rng_seed(1)
    result = pv.fit(model, guide, data, epochs=3, batch_size=10, progress=False, **options)
    return result.history[-1]["elbo"], result.history[-1]["validation_bound"]


@pytest.mark.parametrize("compile", [False, True])
def test_a_mapping_trains_as_the_tuple(uncompiled, compile):
    named = {"x": X, "context": LABELS}
    found = trained(named, validation=named, compile=compile)
    assert found == trained((X, LABELS), validation=(X, LABELS), compile=compile)


def test_loaders_transforms_and_masks():
    expected = trained((X, LABELS))[0]
    assert trained(Items())[0] == pytest.approx(expected, abs=1.0)
    assert trained((LABELS, X), transform=lambda batch: {"x": batch[1], "context": batch[0]})[0] == expected
    model, guide = pair()
    loader = DataLoader(Items(), batch_size=10)
    pv.fit(model, guide, loader, epochs=1, progress=False)
    holes = torch.where(MASK, X, torch.nan)
    pv.fit(model, guide, {"x": holes, "context": LABELS, "observed": MASK}, epochs=1, progress=False)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_evaluations():
    model, guide = pair()

    def evaluate(*args, **kwargs):
        pyro.set_rng_seed(0)
        return pv.log_marginal_likelihood(model, guide, *args, num_particles=30, **kwargs).log_prob

    expected = evaluate(X, LABELS)
    assert torch.equal(evaluate(x=X, context=LABELS), expected)
    assert torch.equal(evaluate(X, context=LABELS), expected)
    assert torch.equal(evaluate({"context": LABELS, "x": X}), expected)
    masked = evaluate(X, LABELS, observed=MASK)
    assert torch.equal(evaluate({"x": X, "context": LABELS, "observed": MASK}), masked)
