"""The convolutional networks over one and three axes: any size, data apart from each other, a sane start, files."""

import math
import re

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyrovae as pv
from pyrovae import nets

ENCODERS = {"conv": nets.ConvEncoder, "residual": nets.ResidualEncoder}
DECODERS = {"conv": nets.ConvDecoder, "residual": nets.ResidualDecoder}
SHAPES = [
    *[(1, shape) for shape in ((12,), (1, 7), (9, 16), (3, 2, 5), (5, 1))],
    *[(3, shape) for shape in ((4, 5, 6), (1, 8, 8, 8), (2, 3, 7, 5), (5, 3, 7, 1), (2, 2, 4, 4, 4))],
]


@pytest.mark.parametrize(("spatial_dims", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_any_size(name, spatial_dims, shape, double):
    encoder = ENCODERS[name](shape, [4, 8], 6, spatial_dims=spatial_dims)
    x = torch.rand(2, 3, *shape)
    features = encoder(x)
    assert features.shape == (2, 3, 6)
    apart = torch.stack([torch.stack([encoder(datum) for datum in row]) for row in x])
    assert torch.allclose(features, apart, rtol=1e-10, atol=1e-12), "a datum's features depend on other data"
    decoder = DECODERS[name](6, shape, [8, 4], spatial_dims=spatial_dims)
    made = decoder(features)
    assert made.shape == x.shape
    apart = torch.stack([torch.stack([decoder(latent) for latent in row]) for row in features])
    assert torch.allclose(made, apart, rtol=1e-10, atol=1e-12), "a datum depends on other data"


@pytest.mark.parametrize(("spatial_dims", "shape"), [(1, (2, 13)), (3, (2, 5, 7, 3))], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_every_element_is_seen_and_made(name, spatial_dims, shape, double):
    x = torch.rand(1, *shape, requires_grad=True)
    encoder = ENCODERS[name](shape, [4, 8], 6, spatial_dims=spatial_dims)
    (gradient,) = torch.autograd.grad(encoder(x).square().sum(), x)
    assert (gradient.abs() > 1e-9).all()
    decoder = DECODERS[name](4, shape, [8, 4], spatial_dims=spatial_dims)
    jacobian = torch.autograd.functional.jacobian(decoder, torch.randn(4))
    assert (jacobian.abs().sum(-1) > 1e-9).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_one_axis_is_convolved(name, double):
    """The channels of a series are not neighbours: far along the series nothing changes, in all channels it does."""
    encoder = ENCODERS[name]((3, 64), [4], 6, spatial_dims=1, normalize=False)
    convolutions = encoder.layers[: next(i for i, layer in enumerate(encoder.layers) if isinstance(layer, nn.Flatten))]
    x = torch.rand(3, 64)
    change = torch.zeros(3, 64)
    change[1, 20] = 1.0
    moved = (convolutions(x[None]) - convolutions((x + change)[None])).abs()[0]
    reach = 2 if name == "conv" else 4  # places of stride 2
    assert (moved[:, 10].sum(0) > 1e-9).all()
    assert (moved[:, : 10 - reach] == 0).all()
    assert (moved[:, 11 + reach :] == 0).all()
    permuted = encoder.layers[0](x[None, [2, 0, 1]])
    assert not torch.allclose(permuted, encoder.layers[0](x[None])), "each channel has weights of its own"


@pytest.mark.parametrize(("spatial_dims", "shape"), [(1, (9, 128)), (3, (1, 16, 16, 16))], ids=str)
@pytest.mark.parametrize("num_blocks", [0, 1, 4])
def test_starts_at_a_good_size_over_other_axes(num_blocks, spatial_dims, shape):
    kind, options = ("residual", {"num_blocks": num_blocks}) if num_blocks else ("conv", {})
    options["spatial_dims"] = spatial_dims
    features = ENCODERS[kind](shape, (16, 32, 32), **options)(torch.rand(50, *shape))
    assert 0.05 < features.std() < 3
    decoder = DECODERS[kind](20, (2, *shape), (32, 32, 16), **options)
    z = torch.randn(50, 20, requires_grad=True)
    made = decoder(z)
    assert made.shape == (50, 2, *shape)
    assert 0.02 < made.std() < 1
    (gradient,) = torch.autograd.grad(made.square().sum().sqrt(), z)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("spatial_dims", "shape"), [(1, (2, 9)), (3, (1, 4, 5, 3))], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_a_pair_over_other_axes(name, spatial_dims, shape, tmp_path):
    """Training, evaluation and files; recorded as eager."""
    encoder = ENCODERS[name](shape, [4, 8], 6, spatial_dims=spatial_dims)
    decoder = DECODERS[name](2, (2, *shape), [8, 4], spatial_dims=spatial_dims)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.HeteroscedasticNormal(decoder, shape))
    guide = pv.guides.MeanFieldNormal(encoder, 2)
    x = torch.randn(8, *shape)
    history = pv.fit(model, guide, x, epochs=20, batch_size=8, learning_rate=0.01, progress=False).history
    assert history[-1]["elbo"] > history[0]["elbo"]
    assert math.isfinite(pv.log_marginal_likelihood(model, guide, x, num_particles=30).mean)
    pv.save(tmp_path / "pair.pt", model, guide)
    made = pv.load(tmp_path / "pair.pt")
    z = torch.randn(3, 2)
    assert torch.equal(made["model"].decode(z), model.decode(z))
    assert torch.equal(made["guide"].posterior(x).mean, guide.posterior(x).mean)
    with torch.no_grad():
        recorded = make_fx(lambda x: decoder.layers(encoder(x)[:, :2]))(x)
        assert torch.allclose(recorded(x + 1), decoder.layers(encoder(x + 1)[:, :2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nets.ConvEncoder((3, 8), spatial_dims=4), "spatial_dims must be 1 .*, 2 .* or 3 .*, found 4"),
        (
            lambda: nets.ConvEncoder((8, 8), spatial_dims=3),
            r"for volumes, \(depth, height, width\) or .* found \(8, 8\)",
        ),
        (
            lambda: nets.ConvDecoder(3, (), spatial_dims=1),
            r"for series, \(length,\) or \(channels, length\); found \(\)",
        ),
        (
            lambda: nets.ResidualEncoder((16, 20, 24, 3), spatial_dims=3),
            r"looks like channels last, 16x20x24 with 3.*movedim\(-1, -4\), and pass the shape "
            + re.escape("(3, 16, 20, 24)"),
        ),
        (lambda: nets.ResidualEncoder((16, 32, 32, 32)), "looks like a volume, .*: pass spatial_dims=3"),
        (
            lambda: nets.ConvEncoder((9, 16), [4], spatial_dims=1)(torch.zeros(5, 9, 17)),
            r"data \(..., 9, 16\), found \(5, 9, 17\)",
        ),
    ],
)
def test_errors_of_axes(make, match):
    with pytest.raises(ValueError, match=match):
        make()
