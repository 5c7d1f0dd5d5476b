"""Convolutional networks: any image size, any leading dimensions, data apart from each other, a sane start."""

import math

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyrovae as pv
from pyrovae import nets

SHAPES = [(28, 28), (1, 28, 28), (8, 8), (28, 20), (3, 32, 32), (2, 5, 7), (1, 1), (2, 3, 4, 6)]
ENCODERS = {"conv": nets.ConvEncoder, "residual": nets.ResidualEncoder}
DECODERS = {"conv": nets.ConvDecoder, "residual": nets.ResidualDecoder}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_of_any_image(name, shape, double):
    encoder = ENCODERS[name](shape, [4, 8], 6)
    assert encoder.out_features == 6
    x = torch.rand(2, 3, *shape)
    features = encoder(x)
    assert features.shape == (2, 3, 6)
    apart = torch.stack([torch.stack([encoder(datum) for datum in row]) for row in x])
    assert torch.allclose(features, apart, rtol=1e-10, atol=1e-12), "a datum's features depend on other data"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_of_any_image(name, shape, double):
    decoder = DECODERS[name](3, shape, [8, 4])
    z = torch.randn(2, 5, 3)
    images = decoder(z)
    assert images.shape == (2, 5, *shape)
    apart = torch.stack([torch.stack([decoder(latent) for latent in row]) for row in z])
    assert torch.allclose(images, apart, rtol=1e-10, atol=1e-12), "a datum's image depends on other data"


@pytest.mark.parametrize("name", ENCODERS)
def test_every_pixel_is_seen_and_made(name, double):
    """Halving an odd size loses no border, doubling makes all of it: every pixel depends and is depended on."""
    shape = (2, 7, 5)
    x = torch.rand(1, *shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(ENCODERS[name](shape, [4, 8], 6)(x).square().sum(), x)
    assert (gradient.abs() > 1e-9).all()
    z = torch.randn(4)
    jacobian = torch.autograd.functional.jacobian(DECODERS[name](4, shape, [8, 4]), z)
    assert (jacobian.abs().sum(-1) > 1e-9).all()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.Tanh, lambda: nn.LeakyReLU(0.2)])
@pytest.mark.parametrize("normalize", [True, False])
def test_any_activation(activation, normalize):
    for name in ENCODERS:
        encoder = ENCODERS[name]((8, 8), [8], 16, activation=activation, normalize=normalize)
        decoder = DECODERS[name](16, (8, 8), [8], activation=activation, normalize=normalize)
        assert any(isinstance(part, type(activation())) for part in encoder.modules())
        assert any(isinstance(part, nn.GroupNorm) for part in decoder.modules()) == normalize
        decoder(encoder(torch.rand(3, 8, 8))).sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in [*encoder.parameters(), *decoder.parameters()])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_blocks", [0, 1, 8])
def test_starts_at_a_good_size(normalize, num_blocks):
    """Features of size 1, images of a small one, and no gradient lost or blown up on the way, however deep."""
    kind, options = ("residual", {"num_blocks": num_blocks}) if num_blocks else ("conv", {})
    encoder = ENCODERS[kind]((1, 28, 28), (16, 32, 32), normalize=normalize, **options)
    features = encoder(torch.rand(50, 1, 28, 28))
    assert 0.05 < features.std() < 3
    decoder = DECODERS[kind](40, (2, 1, 28, 28), (32, 32, 16), normalize=normalize, **options)
    z = torch.randn(50, 40, requires_grad=True)
    images = decoder(z)
    assert 0.03 < images.std() < 1
    (gradient,) = torch.autograd.grad(images, z, torch.randn_like(images) / images.detach().std())
    assert 1 < gradient.std() < 30, "about the root of 2 * 784 pixels / 40 latents, were the network linear"


def test_groups_divide_the_channels():
    for width in (1, 3, 7, 12, 20, 64):
        nets.ConvEncoder((8, 8), [width])(torch.rand(2, 8, 8))
        nets.ResidualDecoder(3, (8, 8), [width])(torch.rand(2, 3))


def test_widths_come_to_the_guide():
    guide = pv.guides.MeanFieldNormal(nets.ResidualEncoder((28, 20), [4], 11), latent_dim=3)
    assert guide.num_features == 11
    assert guide.posterior(torch.rand(5, 28, 20)).mean.shape == (5, 3)


@pytest.mark.parametrize("name", ENCODERS)
def test_can_be_recorded(name):
    encoder, decoder = ENCODERS[name]((1, 7, 5), [4, 8], 6), DECODERS[name](6, (2, 1, 7, 5), [8, 4])
    x, other = torch.rand(2, 3, 4, 1, 7, 5)
    with torch.no_grad():
        recorded = make_fx(lambda x: decoder(encoder(x)))(x)
        assert torch.allclose(recorded(other), decoder(encoder(other)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nets.ConvEncoder((784,)), r"\(height, width\).*found \(784,\): take an MLP"),
        (lambda: nets.ConvDecoder(3, (0, 28)), "for images"),
        (lambda: nets.ResidualEncoder((8, 8), []), "one stage or more"),
        (lambda: nets.ResidualEncoder((8, 8), [0]), "channels must be 1 or more"),
        (lambda: nets.ResidualDecoder(3, (8, 8), num_blocks=0), "num_blocks must be 1 or more"),
        (lambda: nets.ConvEncoder((8, 8), out_features=0), "out_features must be 1 or more"),
        (lambda: nets.ConvDecoder(0, (8, 8)), "in_features must be 1 or more"),
        (lambda: nets.ConvEncoder((1, 8, 8))(torch.zeros(5, 8, 8)), r"data \(..., 1, 8, 8\), found \(5, 8, 8\)"),
    ],
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.slow
def test_compiled_training_as_eager(double):
    """A run of `fit` with the step compiled ends where the eager one does; with a likelihood of several parameters."""

    def trained(compile):
        torch.manual_seed(0)
        x = torch.randint(0, 17, (40, 1, 8, 8)) / 16
        decoder = nets.ConvDecoder(2, (2, 1, 8, 8), [8])
        likelihood = pv.likelihoods.DiscretizedLogistic(decoder, (1, 8, 8), num_levels=17)
        model = pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood)
        guide = pv.guides.MeanFieldNormal(nets.ConvEncoder((1, 8, 8), [8], 16), 2)
        return pv.fit(model, guide, x, epochs=3, batch_size=20, compile=compile, progress=False).history[-1]["elbo"]

    compiled = trained(True)
    assert math.isfinite(compiled)
    assert compiled == pytest.approx(trained(False), rel=1e-9)


def test_gated_units_by_definition(double):
    net = nets.MLP(5, [4, 3], 2, gated=True)
    first, second, last = (layer for layer in net.layers if isinstance(layer, nn.Linear))
    h = torch.randn(6, 5)
    x = h
    for layer, width in ((first, 4), (second, 3)):
        value, gate = h @ layer.weight[:width].T + layer.bias[:width], h @ layer.weight[width:].T + layer.bias[width:]
        h = value / (1 + (-gate).exp())
    torch.testing.assert_close(net(x), last(h))
    assert nets.MLP(5, [4, 3], gated=True, layer_norm=True)(x).shape == (6, 3)


def test_dropout_in_training_alone():
    net = nets.MLP(5, [1000], dropout=0.3, activation=nn.Softplus)  # positive: a unit at 0 has been dropped
    x = torch.randn(200, 5)
    dropped = (net(x) == 0).double().mean().item()
    assert dropped == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 200_000) ** 0.5)
    net.eval()
    plain = nets.MLP(5, [1000], activation=nn.Softplus)
    plain.load_state_dict(net.state_dict())
    assert torch.equal(net(x), plain(x))
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="share of units"):
            nets.MLP(5, [4], dropout=share)


def test_an_mlp_is_made_again_from_its_file(tmp_path):
    options = {"gated": True, "dropout": 0.2, "layer_norm": True}
    guide = pv.guides.MeanFieldNormal(nets.MLP(6, [8], **options), 2)
    likelihood = pv.likelihoods.Bernoulli(nets.MLP(2, [8], 6, **options), (6,))
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood)
    pv.save(tmp_path / "pair.pt", model, guide)
    made = pv.load(tmp_path / "pair.pt")
    assert repr(made["model"]) == repr(model)
    x = torch.ones(3, 6)
    found = []
    for pair in ((model, guide), (made["model"], made["guide"])):
        torch.manual_seed(0)
        found.append(pv.log_weights(*pair, x, num_particles=4))
    assert torch.equal(*found)
