"""Convolutional networks: any image size, any leading dimensions, data apart from each other, a sane start."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from hypothesis import given, settings
from hypothesis import strategies as st
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
        (lambda: nets.ConvEncoder((784,)), r"\(height, width\).*found \(784,\): use an MLP"),
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
        with pytest.raises(ValueError, match="fraction of units"):
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


@settings(max_examples=80, deadline=None)
@given(leading=st.lists(st.integers(0, 4), max_size=3), width=st.integers(1, 6), gated=st.booleans())
def test_an_mlp_keeps_leading_dimensions(leading, width, gated):
    """As one row after the other, sizes of 1 and 0 included."""
    net = nets.MLP(width, [4], 3, gated=gated).double()
    x = torch.randn(*leading, width, dtype=torch.float64)
    found = net(x)
    assert found.shape == (*leading, 3)
    rows = [net(row) for row in x.reshape(-1, width)]
    assert all(row.shape == (3,) for row in rows)
    expected = torch.stack(rows) if rows else torch.zeros(0, 3, dtype=torch.float64)
    assert torch.allclose(found.reshape(-1, 3), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    leading=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    data_shape=st.lists(st.integers(1, 4), min_size=2, max_size=3),
)
def test_an_mlp_flattens_data(leading, data_shape):
    """Each datum as its numbers in a row; the first dimension is never taken for a part of one."""
    width = math.prod(data_shape)
    if data_shape[-1] == width:
        leading, data_shape = [*leading, *data_shape[:-1]], data_shape[-1:]  # the last dimension is the datum
    elif len(leading) == 2 and data_shape[0] == 1:
        data_shape = data_shape[1:]
        if data_shape[-1] == width:
            return
    net = nets.MLP(width, [4], 3).double()
    x = torch.randn(*leading, *data_shape, dtype=torch.float64)
    assert net(x).shape == (*leading, 3)
    assert torch.equal(net(x), net(x.reshape(*leading, width)))


@pytest.mark.parametrize("num_data", [1, 2])
@pytest.mark.parametrize("shape", [(1, 28, 28), (28, 28), (3, 4, 2), (1, 1, 5, 1), (6,)], ids=str)
def test_an_mlp_takes_images_by_the_batch(shape, num_data):
    assert nets.MLP(math.prod(shape), [4], 3)(torch.rand(num_data, *shape)).shape == (num_data, 3)


@pytest.mark.parametrize("shape", [(1, 5), (1, 1, 5), (5,)], ids=str)
def test_data_with_axes_of_one_reach_the_guide(shape):
    guide = pv.guides.MeanFieldNormal(nets.MLP(5, [4]), 2)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Normal(nets.MLP(2, [4], 5), shape))
    x = torch.randn(7, *shape)
    assert guide.posterior(x).mean.shape == (7, 2)
    assert pv.log_weights(model, guide, x, num_particles=3).shape == (3, 7)


@pytest.mark.parametrize("num_data", [1, 5])
def test_programs_of_others_run_over_particles_at_once(num_data):
    """A decoder called with z of shape (S, N, D) in a plain Pyro program: no loop, and the numbers of a loop."""
    decoder, encoder = nets.MLP(2, [8], 4).double(), nets.MLP(4, [8], 2).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.8).to_event(1))

    x = torch.randn(num_data, 4, dtype=torch.float64)
    found = pv.log_marginal_likelihood(model, guide, x, num_particles=4000, vectorize_particles=True)
    looped = pv.log_marginal_likelihood(model, guide, x, num_particles=1000, vectorize_particles=False)
    for one, other, error in zip(
        found.log_prob, looped.log_prob, (found.stderr**2 + looped.stderr**2).sqrt(), strict=True
    ):
        within(one.item(), other.item(), error.item())


@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 8), (0, 9), (12,), ()], ids=str)
def test_an_mlp_refuses_data_of_another_size(shape):
    with pytest.raises(ValueError, match=rf"network MLP does not take .* {re.escape(str(shape))} .*in_features are 6"):
        nets.MLP(6, [4])(torch.zeros(shape))


@pytest.mark.parametrize(
    "shape",
    [(32, 24, 3), (28, 28, 1), (8, 8, 1), (64, 64, 4), (218, 178, 3), (720, 1280, 3), (5, 9, 3)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["encoder", "decoder", "parameters"])
def test_channels_last_are_refused(shape, kind):
    expected = (shape[2], *shape[:2])
    if kind == "parameters":
        shape, expected = (2, *shape), (2, *expected)
    make = (lambda: nets.ConvEncoder(shape)) if kind == "encoder" else (lambda: nets.ResidualDecoder(3, shape))
    match = (
        rf"found {re.escape(str(shape))}, which looks like channels last.*movedim\(-1, -3\).*{re.escape(str(expected))}"
    )
    with pytest.raises(ValueError, match=match):
        make()
    images = torch.zeros(2, *((28, 20, 3)))
    with pytest.raises(
        ValueError,
        match=r"for data \(..., 3, 28, 20\), found \(2, 28, 20, 3\): move the channels, which come last, to the front: x.movedim",
    ):
        nets.ConvEncoder((3, 28, 20), [4])(images)


@pytest.mark.parametrize("shape", [(1, 16, 32, 32), (3, 8, 16, 16), (2, 1, 16, 16, 16), (16, 32, 32, 5)], ids=str)
def test_volumes_are_refused(shape):
    match = rf"found {re.escape(str(shape))}, which looks like a volume"
    with pytest.raises(ValueError, match=match):
        nets.ResidualEncoder(shape)
    if shape[0] == 1:
        with pytest.raises(ValueError, match=match):
            nets.ConvDecoder(3, shape)
    with pytest.raises(ValueError, match=re.escape(f"found {(2, *shape)}, which looks like a volume")):
        nets.ConvDecoder(3, (2, *shape))


@pytest.mark.parametrize(
    "shape",
    [(16, 8, 3), (1, 4, 3), (3, 4, 4), (6, 128, 3), (64, 1000, 1), (16, 16, 16), (4, 3, 20, 20), (12, 1), (5, 3)],
    ids=str,
)
def test_shapes_that_can_be_images_are_taken(shape):
    encoder, decoder = nets.ConvEncoder(shape, [4], 6), nets.ConvDecoder(6, (2, *shape), [4])
    assert decoder(encoder(torch.zeros(3, *shape))).shape == (3, 2, *shape)
    assert nets.ResidualDecoder(6, (2, 16, 8, 8), [4])(torch.zeros(3, 6)).shape == (3, 2, 16, 8, 8)


RUNS = {
    "ConvEncoder": (lambda: nets.ConvEncoder((3, 16, 16), [4], 6), (2, 3, 16, 16)),
    "ResidualEncoder": (lambda: nets.ResidualEncoder((3, 16, 16), [4], 6), (2, 3, 16, 16)),
    "ConvDecoder": (lambda: nets.ConvDecoder(5, (8, 8), [4]), (2, 5)),
    "ResidualDecoder": (lambda: nets.ResidualDecoder(5, (8, 8), [4]), (2, 5)),
    "MLP": (lambda: nets.MLP(12, [4]), (2, 12)),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    ("dtype", "match"),
    [
        (torch.uint8, r"torch.uint8 .*x.float\(\) / 255 for images of bytes, x.to\(torch.float32\)"),
        (torch.int64, r"torch.int64 .*: x.to\(torch.float32\)"),
        (torch.bool, r"torch.bool .*: x.to\(torch.float32\)"),
        (
            torch.float64,
            r"torch.float64 .*: x.to\(torch.float32\), the dtype of its parameters, or .*.to\(torch.float64\)",
        ),
    ],
)
def test_other_dtypes_are_told_apart(name, dtype, match):
    make, shape = RUNS[name]
    with pytest.raises(ValueError, match=rf"the network {name} does not take .*{match}"):
        make()(torch.ones(shape).to(dtype))


@pytest.mark.parametrize("layer", [nn.Conv2d(1, 4, 3), nn.Linear(8, 4), nn.LayerNorm(8), nn.ConvTranspose2d(1, 2, 3)])
@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.uint8, r"x.float\(\) / 255"), (torch.float64, r"x.to\(torch.float32\)")]
)
def test_networks_of_others_too(layer, dtype, remedy):
    net = nn.Sequential(layer, nn.Flatten())
    guide = pv.guides.MeanFieldNormal(net, 2, num_features=4)
    with pytest.raises(ValueError, match=rf"the network Sequential does not take .*{dtype}.*{remedy}"):
        guide.encode(torch.ones(3, 1, 8, 8).to(dtype))


def test_a_decoder_is_given_its_latents():
    for name in ("ConvDecoder", "ResidualDecoder"):
        with pytest.raises(ValueError, match=rf"the network {name} .*make it for 4 latents \(in_features=5\)"):
            RUNS[name][0]()(torch.zeros(2, 4))


@pytest.mark.parametrize(
    "net", [lambda: nets.ConvEncoder((3, 8, 8)), lambda: nets.ResidualEncoder((3, 8, 8)), lambda: nets.MLP(192, [4])]
)
def test_arrays_of_numpy_are_named(net):
    with pytest.raises(TypeError, match=r"takes a tensor, found ndarray: torch\.as_tensor\(x\)"):
        net()(np.zeros((2, 3, 8, 8), "float32"))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nets.MLP(64, 64), r"hidden_features must be a list of sizes, such as \[64\], found 64"),
        (lambda: nets.ConvEncoder(1, 8), r"data_shape must be a list of sizes, such as \(1, 28, 28\), found 1"),
        (lambda: nets.ConvEncoder((8, 8), 8), r"channels must be a list of sizes, such as \[32, 64\], found 8"),
        (lambda: nets.ResidualEncoder((8, 8), 8), "channels must be a list"),
        (lambda: nets.ConvDecoder(2, 8), r"out_shape must be a list of sizes, such as \(1, 28, 28\), found 8"),
        (lambda: nets.ResidualDecoder(2, (8, 8), 8), "channels must be a list"),
    ],
)
def test_a_number_in_place_of_sizes(make, match):
    with pytest.raises(TypeError, match=match):
        make()
