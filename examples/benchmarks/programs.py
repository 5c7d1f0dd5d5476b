"""The same variational autoencoder as users write it with Pyro, plain PyTorch, NumPyro and Pythae.

The network is that of Pyro's own example: 784 pixels, 400 hidden units with softplus, 50 latent dimensions, Bernoulli
pixels. "deep" is the network of `mnist_svi.py`: two hidden layers of 400 with LayerNorm and SiLU, 40 latent dimensions.
"""

import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import nn

import pyrovae as pv

PIXELS, HIDDEN, LATENT_DIM, PSEUDO_INPUTS = 784, 400, 50, 200
MODELS = ("mlp", "conv", "vamp", "nsf-prior", "iaf")


def images(num_data: int, data_dir: str | None, device: str = "cpu") -> tuple[torch.Tensor, str]:
    """Binary images (N, 784), drawn once, and the name of their source."""
    generator = torch.Generator().manual_seed(0)
    if data_dir and (Path(data_dir) / "MNIST/raw").is_dir():
        grey, name = pv.data.mnist(data_dir, binarization=None).train.flatten(1), "MNIST"
    else:
        grey, name = torch.rand(10_000, PIXELS, generator=generator) ** 4, "random pixels"
    grey = grey.repeat(-(-num_data // len(grey)), 1)[:num_data]
    return torch.bernoulli(grey, generator=generator).to(device), name


def latents(model: str) -> int:
    """Dimensions of z."""
    return 40 if model == "deep" else LATENT_DIM


def networks(model: str, latent_dim: int | None = None) -> tuple[nn.Module, nn.Module]:
    """(encoder trunk, decoder)."""
    latent_dim = latent_dim or latents(model)
    if model == "deep":
        hidden = [HIDDEN, HIDDEN]
        return (
            pv.nets.MLP(PIXELS, hidden, layer_norm=True),
            pv.nets.MLP(latent_dim, hidden, PIXELS, layer_norm=True),
        )
    if model == "conv":
        return (
            nn.Sequential(nn.Unflatten(1, (1, 28, 28)), pv.nets.ConvEncoder((1, 28, 28))),
            nn.Sequential(pv.nets.ConvDecoder(latent_dim, (1, 28, 28)), nn.Flatten()),
        )
    return (
        pv.nets.MLP(PIXELS, [HIDDEN], activation=nn.Softplus),
        pv.nets.MLP(latent_dim, [HIDDEN], PIXELS, activation=nn.Softplus),
    )


def width(model: str) -> int:
    return 256 if model == "conv" else HIDDEN


def ours(model: str, data: torch.Tensor, latent_dim: int | None = None) -> tuple[pv.GenerativeModel, pv.guides.Guide]:
    """The model and guide made of this library's parts."""
    latent_dim = latent_dim or latents(model)
    encoder, decoder = networks(model, latent_dim)
    kind = pv.guides.InverseAutoregressiveFlow if model == "iaf" else pv.guides.MeanFieldNormal
    guide = kind(encoder, latent_dim, num_features=width(model))
    priors = {
        "vamp": lambda: pv.priors.VampPrior(guide, data[:PSEUDO_INPUTS].clone()),
        "nsf-prior": lambda: pv.priors.NeuralSplineFlow(latent_dim),
    }
    prior = priors.get(model, lambda: pv.priors.StandardNormal(latent_dim))()
    return pv.GenerativeModel(prior, pv.likelihoods.Bernoulli(decoder, PIXELS)).to(data.device), guide.to(data.device)


class PyroVAE(nn.Module):
    """The VAE of Pyro's example, with `pyro.module` and a plate; for "vamp" the prior is a mixture of encoder normals."""

    def __init__(self, model: str, data: torch.Tensor):
        super().__init__()
        self.trunk, self.decoder = networks(model)
        self.latent_dim = latents(model)
        self.loc, self.log_scale = (nn.Linear(width(model), self.latent_dim) for _ in range(2))
        if model == "vamp":
            self.pseudo_inputs = nn.Parameter(data[:PSEUDO_INPUTS].clone().clamp(0.01, 0.99).logit())
        self.is_vamp = model == "vamp"
        self.to(data.device)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.trunk(x)
        return self.loc(hidden), self.log_scale(hidden).exp()

    def prior(self, x: torch.Tensor) -> dist.TorchDistribution:
        if self.is_vamp:
            components = dist.Normal(*self.encode(self.pseudo_inputs.sigmoid())).to_event(1)
            return dist.MixtureSameFamily(dist.Categorical(logits=x.new_zeros(PSEUDO_INPUTS)), components)
        return dist.Normal(x.new_zeros(len(x), self.latent_dim), x.new_ones(len(x), self.latent_dim)).to_event(1)

    def model(self, x: torch.Tensor) -> None:
        pyro.module("decoder", self.decoder)
        if self.is_vamp:
            pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            pixels = torch.sigmoid(self.decoder(z))
            pyro.sample("x", dist.Bernoulli(pixels, validate_args=False).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        for name in ("trunk", "loc", "log_scale"):
            pyro.module(name, getattr(self, name))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.encode(x)).to_event(1))


class TorchVAE(nn.Module):
    """The negative ELBO of a batch in plain PyTorch, without distributions."""

    def __init__(self, model: str, data: torch.Tensor):
        super().__init__()
        self.trunk, self.decoder = networks(model)
        self.head = nn.Linear(width(model), 2 * LATENT_DIM)
        self.is_vamp = model == "vamp"
        if self.is_vamp:
            self.pseudo_inputs = nn.Parameter(data[:PSEUDO_INPUTS].clone().clamp(0.01, 0.99).logit())
        self.to(data.device)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(self.trunk(x)).chunk(2, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loc, log_scale = self.encode(x)
        noise = torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        if not self.is_vamp:
            return reconstruction + 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()
        other_loc, other_log_scale = self.encode(self.pseudo_inputs.sigmoid())
        scaled = (z[:, None] - other_loc) * (-other_log_scale).exp()
        log_prior = (-0.5 * scaled.square() - other_log_scale).sum(-1).logsumexp(-1) - math.log(PSEUDO_INPUTS)
        return reconstruction + (-0.5 * noise.square() - log_scale).sum() - log_prior.sum()


def pythae_vae(data: torch.Tensor, model: str = "mlp"):
    """Pythae's VAE with the same networks; its decoder must end in a sigmoid."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = networks(model)[0], nn.Linear(HIDDEN, 2 * latents(model))

        def forward(self, x):
            loc, log_covariance = self.head(self.trunk(x)).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_covariance)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.net = networks(model)[1]

        def forward(self, z):
            return ModelOutput(reconstruction=self.net(z).sigmoid())

    config = VAEConfig(input_dim=(PIXELS,), latent_dim=latents(model), reconstruction_loss="bce")
    return VAE(config, encoder=Encoder(), decoder=Decoder()).to(data.device)


def numpyro_epoch(data: torch.Tensor, batch_size: int, model: str = "mlp", dynamic: bool = False):
    """Prepare training with NumPyro, with the whole epoch jitted, as in its example.

    Args:
        data: binary images (N, 784); grey ones with `dynamic`.
        batch_size: data per step.
        model: "mlp" or "deep".
        dynamic: draw binary images from grey data at every use.

    Returns:
        (initial state, epoch(state) -> (loss, state), parameters(state)).
    """
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from jax.example_libraries import stax

    latent_dim = latents(model)

    def init_norm(key, shape):
        return shape, (jnp.ones(shape[-1:]), jnp.zeros(shape[-1:]))

    def norm(parameters, x, **_):
        scale, shift = parameters
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + shift

    def trunk(num_out):
        if model == "deep":
            layers = (stax.Dense(HIDDEN), (init_norm, norm), stax.elementwise(jax.nn.silu)) * 2
        else:
            layers = (stax.Dense(HIDDEN), stax.Softplus)
        return stax.serial(*layers, stax.Dense(num_out))

    def program(x):
        decode = numpyro.module("decoder", trunk(PIXELS), (batch_size, latent_dim))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", ndist.Normal(0, 1).expand([latent_dim]).to_event(1))
            numpyro.sample("x", ndist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x):
        encode = numpyro.module("encoder", trunk(2 * latent_dim), (batch_size, PIXELS))
        loc, log_scale = jnp.split(encode(x), 2, -1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", ndist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    pixels = jnp.asarray(data.cpu().numpy())
    svi = numpyro.infer.SVI(program, guide, numpyro.optim.Adam(1e-3), numpyro.infer.Trace_ELBO())
    state = jax.jit(svi.init)(jax.random.PRNGKey(0), (pixels[:batch_size] > 0.5).astype(pixels.dtype))

    @jax.jit
    def epoch(state, order, key):
        def step(number, carry):
            total, state = carry
            batch = pixels[jax.lax.dynamic_slice_in_dim(order, number * batch_size, batch_size)]
            if dynamic:
                drawn = jax.random.bernoulli(jax.random.fold_in(key, number), batch)
                batch = drawn.astype(pixels.dtype)
            state, loss = svi.update(state, batch)
            return total + loss, state

        return jax.lax.fori_loop(0, len(order) // batch_size, step, (0.0, state))

    def run(state):
        key = jax.random.PRNGKey(int(torch.randint(2**31, ())))
        total, state = epoch(state, jax.random.permutation(key, len(pixels)), jax.random.fold_in(key, 1))
        return float(total), state

    return state, run, svi.get_params
