"""The networks and the optimizer of the VampPrior paper's published code, for rows that are compared with its numbers.

Widths, initialisation, limits and rates are those of that code, and so is the split into tensors, because its optimizer
divides the gradient of each tensor by its norm. Three things differ slightly: the weight of the KL grows at every step,
not at every epoch; Adam's epsilon is added after the bias correction; the loss is a sum over the batch, not a mean, so
that the epsilon of the norm is smaller beside the gradient.

References:
    Tomczak & Welling, VAE with a VampPrior (2018), and github.com/jmtomczak/vae_vampprior.
"""

import math
from functools import partial
from itertools import pairwise

import pyro.distributions as dist
import torch
from support import parts
from torch import nn

import pyrovae as pv

HIDDEN, LATENT_DIM, NUM_PSEUDO_INPUTS = (300, 300), 40, 500


class NormalisedAdam(torch.optim.Adam):
    """Adam on gradients that are divided, tensor by tensor, by their Euclidean norm plus 1e-7.

    The size of a tensor's gradient then does not matter, only its direction. A gradient that is not finite stays so.
    The arguments are those of `torch.optim.Adam`.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if parameters:
            gradients = [p.grad for p in parameters]
            norms = torch._foreach_add(torch._foreach_norm(gradients), 1e-7)
            # Not in place, because two parameters may share the tensor of their gradient.
            for parameter, gradient in zip(parameters, torch._foreach_div(gradients, norms), strict=True):
                parameter.grad = gradient
        super().step()
        return loss


class GatedLayer(nn.Module):
    """h = (W x + b) * sigmoid(V x + c), with W and V in tensors of their own."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.value = linear(in_features, out_features)
        self.gate = linear(in_features, out_features)

    def forward(self, x):
        return self.value(x) * self.gate(x).sigmoid()


class Joined(nn.Module):
    """A layer for each of two inputs that lie side by side, and a gated one over what both give."""

    def __init__(self, first, second, *, layer_norm=False):
        super().__init__()
        self.first, self.second = first, second
        self.joint = GatedLayer(2 * HIDDEN[0], HIDDEN[-1])
        self.norm = nn.LayerNorm(HIDDEN[-1]) if layer_norm else nn.Identity()

    def forward(self, x):
        first, second = x[..., :LATENT_DIM], x[..., LATENT_DIM:]
        return self.norm(self.joint(torch.cat([self.first(first), self.second(second)], -1)))


class Heads(nn.Module):
    """Mean and log-variance, side by side, from the features of a network; the log-variance is clamped to [-6, 2]."""

    def __init__(self):
        super().__init__()
        self.mean = linear(HIDDEN[-1], LATENT_DIM)
        self.log_variance = linear(HIDDEN[-1], LATENT_DIM)

    def forward(self, features):
        return torch.cat([self.mean(features), self.log_variance(features).clamp(-6, 2)], -1)


def normal_of(parameters):
    """The normal with the mean and log-variance that `Heads` gives."""
    loc, log_variance = parameters.chunk(2, -1)
    return dist.Normal(loc, (log_variance / 2).exp()).to_event(1)


class ClampedNormal(nn.Module):
    """Normal given other tensors, whose log-variance is clamped."""

    latent_dim = LATENT_DIM

    def __init__(self, net):
        super().__init__()
        self.net, self.heads = net, Heads()

    def forward(self, *given):
        batch_shape = torch.broadcast_shapes(*(part.shape[:-1] for part in given))
        return normal_of(self.heads(self.net(torch.cat([part.expand(*batch_shape, -1) for part in given], -1))))


class PublishedGuide(pv.guides.Guide):
    """Mean-field normal guide whose log-variance is clamped."""

    def __init__(self, num_pixels, *, hidden_layers):
        super().__init__(LATENT_DIM)
        self.encoder_net = nn.Sequential(nn.Flatten(), *hidden_layers(num_pixels))
        self.heads = Heads()

    def encode(self, x):
        return self.heads(self.encoder_net(x))

    def distribution(self, parameters):
        return normal_of(parameters)


class ClampedBernoulli(pv.likelihoods.Bernoulli):
    """Bernoulli pixels whose probabilities, sigmoid(decoder_net(z)), are clamped to [1e-5, 1 - 1e-5].

    The network's last layer has a bias; that of `pv.likelihoods.Bernoulli` stays 0.
    """

    largest_logit = math.log1p(-1e-5) - math.log(1e-5)

    def __init__(self, decoder_net, data_shape):
        super().__init__(decoder_net, data_shape)
        del self.bias
        self.register_buffer("bias", torch.zeros(self.data_shape))

    def distribution(self, parameters):
        return super().distribution(parameters.clamp(-self.largest_logit, self.largest_logit))


class ClampedVampPrior(pv.priors.VampPrior):
    """VampPrior whose pseudo-inputs start near 0.05, nearly alike, and are clamped to [0, 1]."""

    def __init__(self, guide, data_shape, num_pseudo_inputs=NUM_PSEUDO_INPUTS):
        start = 0.05 + 0.01 * torch.randn(num_pseudo_inputs, *data_shape)
        super().__init__(guide, start.clamp(0, 1), data_range=(0, 1))
        self.unconstrained = nn.Parameter(start)

    @property
    def pseudo_inputs(self):
        return self.unconstrained.clamp(0, 1)


def published(data, prior="standard-normal", **change):
    """Model and guide with one layer of latents; `change` is passed to `hidden_layers`.

    Args:
        data: images, of which the model takes the shape and a VampPrior its first pseudo-inputs.
        prior: a name in `parts.PRIORS`, or "published-vamp" for the paper's own VampPrior.
    """
    pixels = data.data_shape.numel()
    guide = PublishedGuide(pixels, hidden_layers=partial(hidden_layers, **change))
    decoder = nn.Sequential(*hidden_layers(LATENT_DIM, **change), linear(HIDDEN[-1], pixels))
    return pv.GenerativeModel(prior_of(prior, guide, data), ClampedBernoulli(decoder, data.data_shape)), guide


def published_hierarchy(data, prior="standard-normal", *, layer_norm=False):
    """Two levels: p(z2) p(z1|z2) p(x|z1, z2) and q(z2|x) q(z1|x, z2), with layers of their own for each input.

    Args:
        data, prior: as in `published`.
        layer_norm: normalise what the layers before each distribution give.
    """
    pixels = data.data_shape.numel()
    layers_of = partial(hidden_layers, layer_norm=layer_norm)
    joined = partial(Joined, layer_norm=layer_norm)
    top = PublishedGuide(pixels, hidden_layers=layers_of)
    encoder = nn.Sequential(nn.Flatten(), GatedLayer(pixels, HIDDEN[0]))
    of_latent = partial(GatedLayer, LATENT_DIM, HIDDEN[0])
    below = ClampedNormal(joined(of_latent(), nn.Identity()))  # of z2 and of what the encoder gives
    guide = pv.TopDownGuide(top, [below], encoder, num_features=HIDDEN[0])
    decoder = nn.Sequential(joined(of_latent(), of_latent()), linear(HIDDEN[-1], pixels))
    layers = [ClampedNormal(nn.Sequential(*layers_of(LATENT_DIM)))]
    likelihood = ClampedBernoulli(decoder, data.data_shape)
    return pv.HierarchicalModel(prior_of(prior, top, data), layers, likelihood, skip=True), guide


def prior_of(name, guide, data):
    if name == "published-vamp":
        return ClampedVampPrior(guide, data.data_shape)
    return parts.PRIORS[name](LATENT_DIM, guide, data.train)


def hidden_layers(in_features, *, gated=True, he=True, layer_norm=False):
    """Two hidden layers of 300: as published, or with one change.

    Args:
        in_features: size of the input.
        gated: if False, SiLU(W x + b) instead of (W x + b) * sigmoid(V x + c).
        he: if False, torch's own initial weights.
        layer_norm: normalise what each layer gives.
    """
    layers = []
    for widths in pairwise([in_features, *HIDDEN]):
        layers += [GatedLayer(*widths)] if gated else [linear(*widths), nn.SiLU()]
        layers += [nn.LayerNorm(widths[1])] if layer_norm else []
    if not he:
        for layer in nn.ModuleList(layers).modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    return layers


def linear(in_features, out_features):
    """A linear layer with normal weights of variance 2 / in_features (He 2015), and torch's biases."""
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / in_features))
    return layer


# Settings of a row. The weight of the KL grows from 0 to 1 over 100 epochs; training stops after 50 epochs without a
# better validation bound.
SETTINGS = {
    "epochs": 2000,
    "batch_size": 100,
    "learning_rate": 5e-4,
    "optimizer": NormalisedAdam,
    "kl_warmup": 100,
    "patience": 50,
    "draw": "seed-777",
}
