"""Every part of the library by name, as small as it goes: what `test_parts` runs its one body over.

A part that is not listed here fails `test_every_part_is_listed`.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae as pv
from pyrovae import guides, likelihoods, nets, priors

SHAPE = (1, 4, 3)
LATENT_DIM = 2


def plain_model(x):
    """A model without parameters, for `Refined` to raise the ELBO of."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT_DIM), 1.0).to_event(1))
        logits = z @ torch.linspace(-2, 3, 12 * LATENT_DIM).reshape(LATENT_DIM, 12).to(x)
        pyro.sample("x", dist.Bernoulli(logits=logits.unflatten(-1, SHAPE), validate_args=False).to_event(3), obs=x)


# name -> make(guide): the guide is there for priors that share its parameters
PRIORS = {
    "StandardNormal": lambda guide: priors.StandardNormal(LATENT_DIM),
    "DiagonalNormal": lambda guide: priors.DiagonalNormal(LATENT_DIM),
    "MixtureOfNormals": lambda guide: priors.MixtureOfNormals(LATENT_DIM, 3),
    "VampPrior": lambda guide: priors.VampPrior(guide, torch.rand(4, *SHAPE)),
    "NeuralSplineFlow": lambda guide: priors.NeuralSplineFlow(LATENT_DIM, hidden_features=[8]),
    "MaskedAutoregressiveFlow": lambda guide: priors.MaskedAutoregressiveFlow(LATENT_DIM, hidden_features=[8]),
    "RealNVP": lambda guide: priors.RealNVP(LATENT_DIM, hidden_features=[8]),
}

# name -> make()
GUIDES = {
    "MeanFieldNormal": lambda: guides.MeanFieldNormal(nets.MLP(12, [8]), LATENT_DIM),
    "FullRankNormal": lambda: guides.FullRankNormal(nets.MLP(12, [8]), LATENT_DIM),
    "LowRankNormal": lambda: guides.LowRankNormal(nets.MLP(12, [8]), LATENT_DIM, rank=1),
    "InverseAutoregressiveFlow": lambda: guides.InverseAutoregressiveFlow(
        nets.MLP(12, [8]), LATENT_DIM, hidden_features=(16,), num_context=4
    ),
    "NeuralSplineFlow": lambda: guides.NeuralSplineFlow(
        nets.MLP(12, [8]), LATENT_DIM, hidden_features=(16,), num_context=4
    ),
    "Refined": lambda: guides.Refined(guides.MeanFieldNormal(nets.MLP(12, [8]), LATENT_DIM), plain_model, num_steps=3),
    "DefensiveMixture": lambda: guides.DefensiveMixture(
        guides.MeanFieldNormal(nets.MLP(12, [8]), LATENT_DIM), priors.StandardNormal(LATENT_DIM)
    ),
}

# name -> (make(make_decoder), draw data (5, *SHAPE)); make_decoder(out_shape) gives a network for that output
LIKELIHOODS = {
    "Bernoulli": (
        lambda make_decoder: likelihoods.Bernoulli(make_decoder(SHAPE), SHAPE),
        lambda: (torch.rand(5, *SHAPE) < 0.5) * 1.0,
    ),
    "ContinuousBernoulli": (
        lambda make_decoder: likelihoods.ContinuousBernoulli(make_decoder(SHAPE), SHAPE),
        lambda: torch.rand(5, *SHAPE),
    ),
    "Normal": (
        lambda make_decoder: likelihoods.Normal(make_decoder(SHAPE), SHAPE, scale=0.5),
        lambda: torch.randn(5, *SHAPE),
    ),
    "LearnedScaleNormal": (
        lambda make_decoder: likelihoods.LearnedScaleNormal(make_decoder(SHAPE), SHAPE),
        lambda: torch.randn(5, *SHAPE),
    ),
    "HeteroscedasticNormal": (
        lambda make_decoder: likelihoods.HeteroscedasticNormal(make_decoder((2, *SHAPE)), SHAPE),
        lambda: torch.randn(5, *SHAPE),
    ),
    "DiscretizedLogistic": (
        lambda make_decoder: likelihoods.DiscretizedLogistic(make_decoder((6, *SHAPE)), SHAPE, num_components=2),
        lambda: torch.randint(0, 256, (5, *SHAPE)) / 255,
    ),
    "Categorical": (
        lambda make_decoder: likelihoods.Categorical(make_decoder((7, *SHAPE)), SHAPE, num_levels=7),
        lambda: torch.randint(0, 7, (5, *SHAPE)) / 6,
    ),
    "Poisson": (
        lambda make_decoder: likelihoods.Poisson(make_decoder(SHAPE), SHAPE),
        lambda: torch.randint(0, 9, (5, *SHAPE)) * 1.0,
    ),
    "NegativeBinomial": (
        lambda make_decoder: likelihoods.NegativeBinomial(make_decoder(SHAPE), SHAPE),
        lambda: torch.randint(0, 9, (5, *SHAPE)) * 1.0,
    ),
    "ZeroInflatedNegativeBinomial": (
        lambda make_decoder: likelihoods.ZeroInflatedNegativeBinomial(
            make_decoder((3, *SHAPE)), SHAPE, network_dispersion=True
        ),
        lambda: torch.randint(0, 9, (5, *SHAPE)) * 1.0,
    ),
    "StudentT": (
        lambda make_decoder: likelihoods.StudentT(make_decoder(SHAPE), SHAPE, learn_df=True),
        lambda: torch.randn(5, *SHAPE),
    ),
    "LogNormal": (
        lambda make_decoder: likelihoods.LogNormal(make_decoder(SHAPE), SHAPE),
        lambda: torch.randn(5, *SHAPE).exp(),
    ),
    "Scaled": (
        lambda make_decoder: likelihoods.Scaled(likelihoods.Normal(make_decoder(SHAPE), SHAPE), 5.0, 2.0),
        lambda: 5 + 2 * torch.randn(5, *SHAPE),
    ),
    "Categories": (
        lambda make_decoder: likelihoods.Categories(make_decoder((3, *SHAPE)), SHAPE, num_categories=3),
        lambda: torch.randint(0, 3, (5, *SHAPE)) * 1.0,
    ),
}

# name -> (make(), draw data): likelihoods of rows, not of any shape
TABLES = {
    "Columns": (
        lambda: likelihoods.Columns(
            nets.MLP(LATENT_DIM, [8], 5),
            {
                "height": likelihoods.Scaled(likelihoods.LearnedScaleNormal(None, 1), 170.0, 10.0),
                "visits": likelihoods.Poisson(None, 1),
                "blood.group": likelihoods.Categories(None, 1, num_categories=3),
            },
        ),
        lambda: torch.stack([170 + 10 * torch.randn(5), torch.randint(0, 5, (5,)), torch.randint(0, 3, (5,))], 1),
    ),
}

# name -> make(out_shape): decoders latent -> out_shape (channels first)
DECODERS = {
    "MLP": lambda out_shape: nets.MLP(LATENT_DIM, [8], torch.Size(out_shape).numel()),
    "ConvDecoder": lambda out_shape: nets.ConvDecoder(LATENT_DIM, out_shape, [8, 4]),
    "ResidualDecoder": lambda out_shape: nets.ResidualDecoder(LATENT_DIM, out_shape, [8, 4]),
}

# name -> make(): encoders of data of SHAPE
ENCODERS = {
    "MLP": lambda: nets.MLP(12, [8]),
    "ConvEncoder": lambda: nets.ConvEncoder(SHAPE, [4, 8], 8),
    "ResidualEncoder": lambda: nets.ResidualEncoder(SHAPE, [4, 8], 8),
    "TableEncoder": lambda: nets.TableEncoder(nets.MLP(14, [8]), [0.5] * 12, [2.0] * 12, [0] * 10 + [2, 2]),
}

# name -> make(): encoders of data of SHAPE that take a context (N, 3) or the mask of what is known
ENCODERS_OF_MORE = {
    "Concatenate": lambda: nets.Concatenate(nets.MLP(12 + 3, [8])),
    "ConcatenateMask": lambda: nets.ConcatenateMask(nets.MLP(2 * 12, [8])),
}

CONTEXT_DIM = 3


def _context_options():
    return {"context_net": nets.MLP(CONTEXT_DIM, [6])}


# name -> make(): p(z|c), c (N, CONTEXT_DIM)
CONDITIONAL_PRIORS = {
    "DiagonalNormal": lambda: priors.DiagonalNormal(LATENT_DIM, **_context_options()),
    "MixtureOfNormals": lambda: priors.MixtureOfNormals(LATENT_DIM, 3, **_context_options()),
    "NeuralSplineFlow": lambda: priors.NeuralSplineFlow(LATENT_DIM, hidden_features=[8], **_context_options()),
    "MaskedAutoregressiveFlow": lambda: priors.MaskedAutoregressiveFlow(
        LATENT_DIM, hidden_features=[8], **_context_options()
    ),
    "RealNVP": lambda: priors.RealNVP(LATENT_DIM, hidden_features=[8], **_context_options()),
}

# name -> make(encoder, model): guides with an encoder of 8 features; the model is there for guides that refer to one
GUIDES_ON_AN_ENCODER = {
    "MeanFieldNormal": lambda encoder, model: guides.MeanFieldNormal(encoder, LATENT_DIM),
    "FullRankNormal": lambda encoder, model: guides.FullRankNormal(encoder, LATENT_DIM),
    "LowRankNormal": lambda encoder, model: guides.LowRankNormal(encoder, LATENT_DIM, rank=1),
    "InverseAutoregressiveFlow": lambda encoder, model: guides.InverseAutoregressiveFlow(
        encoder, LATENT_DIM, hidden_features=(16,), num_context=4
    ),
    "NeuralSplineFlow": lambda encoder, model: guides.NeuralSplineFlow(
        encoder, LATENT_DIM, hidden_features=(16,), num_context=4
    ),
    "Refined": lambda encoder, model: guides.Refined(
        guides.MeanFieldNormal(encoder, LATENT_DIM), model, num_steps=3, num_particles=2
    ),
    "DefensiveMixture": lambda encoder, model: guides.DefensiveMixture(
        guides.MeanFieldNormal(encoder, LATENT_DIM), model.prior
    ),
}


def combinations():
    """All pairs of prior and guide; all pairs of likelihood and decoder; every encoder."""
    for prior in PRIORS:
        for guide in GUIDES:
            yield pytest.param(prior, guide, "Bernoulli", "MLP", "MLP", id=f"{prior}-{guide}")
    for likelihood in LIKELIHOODS:
        for decoder in DECODERS:
            yield pytest.param("StandardNormal", None, likelihood, decoder, "MLP", id=f"{likelihood}-{decoder}")
    for encoder in ENCODERS:
        yield pytest.param("StandardNormal", None, "Bernoulli", "MLP", encoder, id=encoder)
    for table in TABLES:
        yield pytest.param("StandardNormal", None, table, None, None, id=table)


def build(prior, guide, likelihood, decoder, encoder):
    if likelihood in TABLES:
        made = TABLES[likelihood][0]()
        encoder_net = nets.TableEncoder(nets.MLP(5, [8]), [170.0, 2.0, 0.0], [10.0, 2.0, 1.0], [0, 0, 3])
    else:
        made = LIKELIHOODS[likelihood][0](DECODERS[decoder])
        encoder_net = None if guide else ENCODERS[encoder]()
    guide = GUIDES[guide]() if guide else guides.MeanFieldNormal(encoder_net, LATENT_DIM)
    return pv.GenerativeModel(PRIORS[prior](guide), made), guide


def draw(likelihood):
    """Five data for that likelihood."""
    return (LIKELIHOODS | TABLES)[likelihood][1]()
