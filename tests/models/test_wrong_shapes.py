"""Parts that do not fit each other or their contracts: said where it shows first, with what was found and expected."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from shared.runs import binary
from torch import nn

import pyrovae as pv


def likelihood(latent_dim=2, net=None):
    return pv.likelihoods.Bernoulli(net or pv.nets.MLP(latent_dim, [8], 12), (1, 4, 3))


def guide(latent_dim=2, **options):
    return pv.guides.MeanFieldNormal(pv.nets.MLP(12, [8]), latent_dim, **options)


class NotAnEvent(pv.priors.Prior):
    def forward(self):
        return dist.Normal(torch.zeros(self.latent_dim), 1.0)


class Wider(pv.priors.Prior):
    def forward(self):
        return dist.Normal(torch.zeros(self.latent_dim + 1), 1.0).to_event(1)


class GuideWithoutEvent(pv.guides.Guide):
    def encode(self, x):
        return x.flatten(1)[:, :2]

    def distribution(self, parameters):
        return dist.Normal(parameters, 1.0)


class OneRowForAll(GuideWithoutEvent):
    def encode(self, x):
        return torch.zeros(1, 2)

    def distribution(self, parameters):
        return dist.Normal(parameters, 1.0).to_event(1)


class PixelsAsBatch(pv.likelihoods.Likelihood):
    def distribution(self, parameters):
        return dist.Bernoulli(logits=parameters)

    def check(self, x):
        pass


NORMAL = pv.priors.StandardNormal
WRONG = {
    "prior without an event": (
        lambda: (pv.GenerativeModel(NotAnEvent(2), likelihood()), guide()),
        r"NotAnEvent must give batch shape \(\) and event shape \(2,\), its latent_dim; found \(2,\) and \(\): .*to_event\(1\)",
    ),
    "prior of another size": (
        lambda: (pv.GenerativeModel(Wider(2), likelihood()), guide()),
        r"Wider must give batch shape \(\) and event shape \(2,\), its latent_dim; found \(\) and \(3,\)",
    ),
    "guide without an event": (
        lambda: (pv.GenerativeModel(NORMAL(2), likelihood()), GuideWithoutEvent(2)),
        r"GuideWithoutEvent.distribution must give batch shape \(20,\) and event shape \(2,\).*found \(20, 2\) and \(\)",
    ),
    "guide with one row for all": (
        lambda: (pv.GenerativeModel(NORMAL(2), likelihood()), OneRowForAll(2)),
        r"OneRowForAll.encode must give parameters \(N, P\) for N data, one row for each; found \(1, 2\) for 20 data"
        r"|site 'x' has 20 data, but plate 'data' has 1",
    ),
    "likelihood without an event": (
        lambda: (pv.GenerativeModel(NORMAL(2), PixelsAsBatch(pv.nets.MLP(2, [8], 12), (1, 4, 3))), guide()),
        r"PixelsAsBatch must give batch shape \(20,\) and event shape \(1, 4, 3\), its data_shape; found \(20, 1, 4, 3\)",
    ),
    "prior and guide of different sizes": (
        lambda: (pv.GenerativeModel(NORMAL(3), likelihood(3)), guide(2)),
        r"site 'z' has 3 dimensions in the model, and a value of shape \(20, 2\) was given.*one latent_dim",
    ),
    "a guide of one number, which would be broadcast": (
        lambda: (pv.GenerativeModel(NORMAL(3), likelihood(3)), guide(1)),
        r"site 'z' has 3 dimensions in the model, and a value of shape \(20, 1\)",
    ),
    "layers of different sizes": (
        lambda: (
            pv.two_layer_vae((1, 4, 3), latent_dims=(3, 2), hidden_features=(4, 4))[0],
            pv.two_layer_vae((1, 4, 3), latent_dims=(3, 1), hidden_features=(4, 4))[1],
        ),
        r"site 'z2' has 2 dimensions in the model, and a value of shape \(20, 1\)",
    ),
    "a decoder that does not say what it takes": (
        lambda: (pv.GenerativeModel(NORMAL(2), likelihood(net=nn.Sequential(nn.Linear(3, 12)))), guide()),
        r"the network Sequential does not take input of shape \(20, 2\) .*make the decoder for the prior's number of latents",
    ),
    "an encoder for other images": (
        lambda: (pv.GenerativeModel(NORMAL(2), likelihood()), pv.guides.MeanFieldNormal(pv.nets.MLP(784, [8]), 2)),
        r"the network MLP does not take input of shape \(20, 1, 4, 3\) and dtype torch.float32 .*pass data with",
    ),
    "a convolutional encoder for other images": (
        lambda: (
            pv.GenerativeModel(NORMAL(2), likelihood()),
            pv.guides.MeanFieldNormal(pv.nets.ConvEncoder((1, 8, 8), [4], 8), 2),
        ),
        r"this encoder is for data \(..., 1, 8, 8\), found \(20, 1, 4, 3\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("use", ["fit", "log_weights"])
def test_parts_that_do_not_fit(case, use):
    make, match = WRONG[case]
    model, guide = make()
    uses = {
        "fit": lambda: pv.fit(model, guide, binary(20), epochs=1, batch_size=20, progress=False),
        "log_weights": lambda: pv.log_weights(model, guide, binary(20), num_particles=3),
    }
    with pytest.raises(ValueError, match=match) as caught:
        uses[use]()
    assert "Trace Shapes" not in str(caught.value), "without Pyro's table of sites"


@pytest.mark.parametrize(
    "make",
    [
        lambda: pv.GenerativeModel(NORMAL(2), likelihood(3)),
        lambda: pv.GenerativeModel(NORMAL(2), likelihood(net=pv.nets.ConvDecoder(5, (1, 4, 3), [4]))),
        lambda: pv.HierarchicalModel(NORMAL(2), [pv.ConditionalNormal(pv.nets.MLP(2, [4]), 3)], likelihood(2)),
        lambda: pv.HierarchicalModel(
            NORMAL(2), [pv.ConditionalNormal(pv.nets.MLP(2, [4]), 3)], likelihood(3), skip=True
        ),
    ],
)
def test_a_decoder_for_other_latents_is_refused_at_once(make):
    with pytest.raises(ValueError, match=r"decoder network takes \d latents \(its in_features\), and the prior has \d"):
        make()


def test_the_table_of_sites_stays_where_the_error_is_the_users():
    """Of a program of one's own the shapes are what one looks for."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.reshape(3, 3), 1.0).to_event(1), obs=x)

    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    with pytest.raises(RuntimeError, match="Trace Shapes"):
        pv.fit(model, program, torch.zeros(4, 3), epochs=1, progress=False)


@pytest.mark.parametrize(
    ("prior", "other", "match"),
    [
        (
            likelihood(),
            NORMAL(2),
            "found the likelihood Bernoulli in place of the prior, .*StandardNormal.*: swap them",
        ),
        (
            NORMAL(2),
            pv.nets.MLP(2, [8], 12),
            r"likelihood must be .*, found MLP: .* make it Bernoulli\(MLP\(...\), data_sh",
        ),
        (
            NORMAL(2),
            None,
            r"likelihood must be .*Likelihood, such as Bernoulli\(decoder, data_shape\), found NoneType$",
        ),
        (2, likelihood(), r"prior must be .*Prior, such as StandardNormal\(latent_dim\), found int"),
    ],
)
def test_parts_in_the_wrong_place(prior, other, match):
    with pytest.raises(TypeError, match=match):
        pv.GenerativeModel(prior, other)
    with pytest.raises(TypeError, match=match):
        pv.HierarchicalModel(prior, [], other)
