"""Every part of the library by name, as small as it goes: what `test_parts` runs its one body over.

A part that is not listed here fails `test_every_part_is_listed`.
"""

import torch

from pyrovae import guides, likelihoods, nets, priors

SHAPE = (1, 4, 3)
LATENT_DIM = 2

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
}

# name -> (make(make_decoder), draw data (5, *SHAPE)); make_decoder(out_shape) gives a network for that output
LIKELIHOODS = {
    "Bernoulli": (
        lambda make_decoder: likelihoods.Bernoulli(make_decoder(SHAPE), SHAPE),
        lambda: (torch.rand(5, *SHAPE) < 0.5) * 1.0,
    ),
}

# name -> make(out_shape): decoders latent -> out_shape (channels first)
DECODERS = {
    "MLP": lambda out_shape: nets.MLP(LATENT_DIM, [8], torch.Size(out_shape).numel()),
}

# name -> make(): encoders of data of SHAPE
ENCODERS = {
    "MLP": lambda: nets.MLP(12, [8]),
}
