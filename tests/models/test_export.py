"""Exported programs give what the pair gives, for batches of any size, in a process that does not know pyrovae."""

import subprocess
import sys

import pytest
import torch
from shared.parts import DECODERS, ENCODERS, GUIDES, LATENT_DIM, LIKELIHOODS, SHAPE
from torch import nn

import pyrovae as pv
from pyrovae.models.export import export
from pyrovae.models.uses import embed

ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pyrovae", "pyro", "zuko"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
folder = sys.argv[1]
given = torch.load(folder + "/given.pt")
for name, (value, expected) in given.items():
    found = torch.export.load(f"{folder}/{name}.pt2").module()(value)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(found) == 7
"""


def of(guide=None, likelihood=None):
    torch.manual_seed(1)
    likelihood = likelihood or pv.likelihoods.Bernoulli(
        pv.nets.MLP(LATENT_DIM, [8], 12), SHAPE, data_mean=torch.rand(SHAPE)
    )
    return (
        pv.GenerativeModel(pv.priors.StandardNormal(LATENT_DIM), likelihood).eval(),
        (guide or pv.guides.MeanFieldNormal(pv.nets.MLP(12, [8]), LATENT_DIM)).eval(),
    )


def check(model, guide, tmp_path):
    files = export(model, guide, tmp_path)
    for num_data in (1, 2, 9):
        x = torch.rand(num_data, *SHAPE)
        z = embed(guide, x)
        torch.testing.assert_close(torch.export.load(files.encoder).module()(x), z, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.export.load(files.decoder).module()(z), model.decode(z), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood(name, tmp_path):
    make, _ = LIKELIHOODS[name]
    check(*of(likelihood=make(DECODERS["MLP"])), tmp_path)


@pytest.mark.parametrize("name", sorted(GUIDES.keys() - {"Refined"}))
def test_every_guide(name, tmp_path):
    check(*of(guide=GUIDES[name]()), tmp_path)


@pytest.mark.parametrize("name", ["ConvDecoder", "ResidualDecoder"])
def test_every_decoder(name, tmp_path):
    check(*of(likelihood=pv.likelihoods.Bernoulli(DECODERS[name](SHAPE), SHAPE)), tmp_path)


@pytest.mark.parametrize("name", ["ConvEncoder", "ResidualEncoder"])
def test_every_encoder(name, tmp_path):
    check(*of(guide=pv.guides.MeanFieldNormal(ENCODERS[name](), LATENT_DIM)), tmp_path)


def test_without_pyrovae(tmp_path):
    model, guide = of()
    export(model, guide, tmp_path)
    x = torch.rand(7, *SHAPE)
    z = embed(guide, x)
    torch.save({"encoder": (x, z), "decoder": (z, model.decode(z))}, tmp_path / "given.pt")
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True)
    # The network alone lacks the bias of the pixels.
    assert (model.likelihood.decoder_net(z).reshape(-1, *SHAPE).sigmoid() - model.decode(z)).abs().max() > 0.01


def test_the_pair_stays_as_it_was(tmp_path):
    model, guide = of()
    model.train(), guide.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, guide, tmp_path / "a/b")
    assert model.training
    assert guide.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["decoder.pt2", "encoder.pt2"]


class Branches(nn.Module):
    out_features = 8

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 8)

    def forward(self, x):
        features = self.linear(x.flatten(1))
        return features if x.sum() > 0 else -features


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path):
    model, _ = of()
    with pytest.raises(ValueError, match="does not take the encoder"):
        export(model, pv.guides.MeanFieldNormal(Branches(), LATENT_DIM), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(TypeError, match="guide must be"):
        export(model, lambda x: x, tmp_path)
    with pytest.raises(TypeError, match="model must be"):
        export(lambda x: x, of()[1], tmp_path)


def test_a_conditional_pair(tmp_path):
    torch.manual_seed(0)
    likelihood = pv.likelihoods.Bernoulli(pv.nets.Concatenate(pv.nets.MLP(LATENT_DIM + 2, [8], 12)), SHAPE)
    model = pv.GenerativeModel(pv.priors.StandardNormal(LATENT_DIM), likelihood).eval()
    guide = pv.guides.MeanFieldNormal(pv.nets.Concatenate(pv.nets.MLP(14, [8])), LATENT_DIM).eval()
    files = export(model, guide, tmp_path, context=torch.randn(3, 2))
    x, context = torch.rand(7, *SHAPE), torch.randn(7, 2)
    z = guide.posterior(x, context).mean
    torch.testing.assert_close(torch.export.load(files.encoder).module()(x, context), z, rtol=1e-5, atol=1e-6)
    decoded = model.decode(z, context=context)
    torch.testing.assert_close(torch.export.load(files.decoder).module()(z, context), decoded, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="3 rows or more, found 2"):
        export(model, guide, tmp_path, context=context[:2])


def test_arguments_in_the_order_of_save(tmp_path):
    model, guide = of()
    for wrong in ((tmp_path, model, guide), (guide, model, tmp_path)):
        with pytest.raises(
            TypeError, match=r"model must be .*: call pyrovae.export\(model, guide, path\), the path last"
        ):
            pv.export(*wrong)
