"""The pairs that `density_table.py` trains, as functions data -> (model, guide) with the sizes given in the papers."""

from functools import partial

from support import parts

import pyrovae as pv


def mlp(
    data, *, hidden, latent_dim, prior="standard-normal", guide="mean-field", layer_norm=True, dropout=0.0, **options
):
    """One layer of latents; encoder and decoder have the same widths. Only the decoder has dropout."""
    pixels = data.data_shape.numel()
    options["layer_norm"] = layer_norm
    encoder = pv.nets.MLP(pixels, hidden, **options)
    decoder = pv.nets.MLP(latent_dim, hidden, pixels, dropout=dropout, **options)
    return one_layer(data, encoder, decoder, latent_dim, prior, guide)


def images(data, *, network, latent_dim, prior, guide="mean-field"):
    """One layer of latents, with image networks named as in `parts.NETWORKS`."""
    nets = parts.NETWORKS[network]
    encoder = nets.encoder(data.data_shape, ())
    return one_layer(data, encoder, nets.decoder(latent_dim, data.data_shape, ()), latent_dim, prior, guide)


def one_layer(data, encoder, decoder, latent_dim, prior, guide):
    guide = parts.GUIDES[guide](encoder, latent_dim)
    prior = parts.PRIORS[prior](latent_dim, guide, data.train)
    return pv.GenerativeModel(prior, bernoulli(decoder, data)), guide


def two_layers(data):
    """784 - 200 - 200 - z1 100 - 100 - 100 - z2 50, tanh (Burda 2016)."""
    return pv.two_layer_vae(data.data_shape, data_mean=data.train.mean(0))


def hierarchy(data, *, hidden=300, latent_dim=40, num_pseudo_inputs=500):
    """z2 above z1; the decoder sees both, and the guide samples z2 first, then z1 (Tomczak & Welling 2018)."""
    pixels = data.data_shape.numel()
    net = partial(pv.nets.MLP, layer_norm=True)
    normal = pv.ConditionalNormal
    top = pv.guides.MeanFieldNormal(net(pixels, [hidden, hidden]), latent_dim)
    below = normal(net(latent_dim + hidden, [hidden]), latent_dim)
    guide = pv.TopDownGuide(top, [below], net(pixels, [hidden]))
    prior = pv.priors.VampPrior(top, data.train[:num_pseudo_inputs].clone())
    likelihood = bernoulli(net(2 * latent_dim, [hidden, hidden], pixels), data)
    layers = [normal(net(latent_dim, [hidden, hidden]), latent_dim)]
    return pv.HierarchicalModel(prior, layers, likelihood, skip=True), guide


def bernoulli(decoder, data):
    return pv.likelihoods.Bernoulli(decoder, data.data_shape, data_mean=data.train.mean(0))
