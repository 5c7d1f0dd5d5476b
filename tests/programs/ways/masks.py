"""Masks: what they leave of a density in the model, in the guide, in both."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalMessenger

from ways import Pair, normal_data, normal_evidence, normal_model, way, wide_guide

MASK = (True, False, True)


def masked_evidence(x, mask):
    return torch.where(mask, normal_evidence(x), 0.0)


def pair(model, guide, exact, x=None, mask=None, **options):
    x = normal_data() if x is None else x
    mask = torch.tensor(MASK) if mask is None else mask
    return Pair(model, guide, (x, mask), exact(x, mask) if exact else None, options=options)


def plain_guide(x, mask):
    wide_guide(x)


def observed_mask(x, mask):
    """The observation alone masked by a handler."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def whole_model(x, mask):
    with pyro.plate("data", len(x)), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def whole_guide(x, mask):
    with pyro.plate("data", len(x)), poutine.mask(mask=mask):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


MASKS = "masks"


@way(MASKS)
def of_observations_by_a_handler():
    return pair(observed_mask, plain_guide, masked_evidence)


@way(MASKS)
def of_observations_in_the_distribution():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(mask), obs=x)

    return pair(model, plain_guide, masked_evidence)


@way(MASKS)
def of_elements_inside_an_event():
    x = torch.tensor([[0.5, 1.0], [-1.0, 0.3], [2.0, 1.2]])
    mask = torch.tensor([[True, False], [True, True], [False, False]])

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand((*z.shape, 2)).mask(mask).to_event(1), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))

    def exact(x, mask):
        both = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1).log_prob(x[1])
        return torch.stack([normal_evidence(x[0, 0]), both, torch.tensor(0.0)])

    return pair(model, guide, exact, x, mask)


@way(MASKS)
def of_observations_that_are_nan():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0, validate_args=False).mask(mask), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(mask, x / 2, 0.0), 0.9))

    x = torch.tensor([0.5, math.nan, 2.0])
    return pair(model, guide, lambda x, mask: masked_evidence(x.nan_to_num(), mask), x)


@way(MASKS)
def false_as_a_plain_bool():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=False):
                pyro.sample("extra", dist.Normal(z, 1.0), obs=x + 1)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return pair(model, plain_guide, lambda x, mask: normal_evidence(x))


@way(MASKS)
def true_everywhere():
    def model(x, mask):
        with poutine.mask(mask=True):
            normal_model(x)

    return pair(model, plain_guide, lambda x, mask: normal_evidence(x))


@way(MASKS)
def of_latents_and_observations_in_both():
    return pair(whole_model, whole_guide, masked_evidence)


@way(MASKS)
def of_latents_in_both_by_the_distributions():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).mask(mask))
            pyro.sample("x", dist.Normal(z, 1.0).mask(mask), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8).mask(mask))

    return pair(model, guide, masked_evidence)


@way(MASKS)
def around_both_programs():
    def model(x, mask):
        with poutine.mask(mask=mask):
            normal_model(x)

    def guide(x, mask):
        with poutine.mask(mask=mask):
            wide_guide(x)

    return pair(model, guide, masked_evidence)


@way(MASKS)
def padded_steps_of_a_chain():
    """z_t ~ N(z_(t-1), 1), x_t ~ N(z_t, 1) for t up to each datum's length; masked in both programs alike."""
    x, lengths = torch.tensor([[0.5, 1.0], [-1.0, 0.0], [2.0, 1.5]]), torch.tensor([2, 1, 2])

    def model(x, lengths):
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in pyro.markov(range(2)):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def guide(x, lengths):
        with pyro.plate("data", len(x)):
            for t in range(2):
                with poutine.mask(mask=t < lengths):
                    pyro.sample(f"z_{t}", dist.Normal(x[:, t] / 2, 1.2))

    two = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 1.0], [1.0, 3.0]])).log_prob(x)
    exact = torch.where(lengths == 2, two, normal_evidence(x[:, 0]))
    return Pair(model, guide, (x, lengths), exact)


# --- in one program alone ---

ONE = "masks of latents in one program alone"


@way(ONE)
def in_the_model():
    return pair(whole_model, plain_guide, masked_evidence)


@way(ONE, "site 'z'.*mask|mask.*site 'z'")
def in_the_guide():
    return pair(observed_mask, whole_guide, masked_evidence)


@way(ONE, "site 'z'.*mask|mask.*site 'z'")
def in_the_guide_by_its_distribution():
    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8).mask(mask))

    return pair(observed_mask, guide, masked_evidence)


@way(ONE, "site 'z'.*mask|mask.*site 'z'")
def false_in_the_guide():
    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8).mask(False))

    return pair(observed_mask, guide, masked_evidence)


@way(ONE, "site 'z'.*mask|mask.*site 'z'")
def false_in_the_model():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return pair(model, plain_guide, None)


@way(ONE, "site 'z'.*mask|mask.*site 'z'")
def other_masks_in_model_and_guide():
    def guide(x, mask):
        whole_guide(x, ~mask)

    return pair(whole_model, guide, masked_evidence)


@way(ONE)
def per_element_in_the_model():
    x, mask = torch.randn(3, 2), torch.tensor([[True, False], [True, True], [False, False]])

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).mask(mask).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).mask(mask).to_event(1), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8).to_event(1))

    return pair(model, guide, lambda x, mask: torch.where(mask, normal_evidence(x), 0.0).sum(-1), x, mask)


# --- values known in part ---


def partly_observed(x, mask):
    """Pyro makes three sites of it: x_observed, x_unobserved (a latent) and x."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=mask)


@way("obs_mask=")
def with_a_guide_for_the_rest():
    def guide(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.where(mask, x / 2, 0.0), 0.95))
            with poutine.mask(mask=~mask):
                pyro.sample("x_unobserved", dist.Normal(z, 1.1))

    return pair(partly_observed, guide, masked_evidence)


def _automatic(make_guide, together=False):
    """Two data, the second unknown; z and x_unobserved together are wider than either."""
    x, mask = torch.tensor([0.5, 0.0]), torch.tensor([True, False])
    exact = masked_evidence(x, mask)
    guide = make_guide(partly_observed, init_scale=1.7)
    return Pair(partly_observed, guide, (x, mask), exact.sum() if together else exact)


way("obs_mask=", name="with AutoNormal")(lambda: _automatic(AutoNormal))
way("obs_mask=", name="with AutoMultivariateNormal")(lambda: _automatic(AutoMultivariateNormal, together=True))
way("obs_mask=", name="with AutoNormalMessenger")(lambda: _automatic(AutoNormalMessenger))


@way("obs_mask=")
def of_elements_of_an_event_with_auto_normal():
    x = torch.tensor([[0.5, 1.0], [-1.0, 0.3], [2.0, 1.2]])
    mask = torch.tensor([[True, False], [True, True], [False, False]])

    def model(x, mask):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 2, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=mask)

    both = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1).log_prob(x[1])
    exact = torch.stack([normal_evidence(x[0, 0]), both, torch.tensor(0.0)])
    return Pair(model, AutoNormal(model, init_scale=2.0), (x, mask), exact)


@way(MASKS)
def padded_latents_with_an_automatic_guide():
    """The guide draws the padded ones too, and nothing depends on them."""
    return pair(whole_model, AutoNormal(whole_model, init_scale=1.0), masked_evidence)


@way(MASKS)
def padded_latents_with_a_messenger():
    return pair(whole_model, AutoNormalMessenger(whole_model, init_scale=1.0), masked_evidence)


@way(ONE, "mask")
def a_padded_step_that_the_next_one_depends_on():
    """z_0 is masked in the model, and z_1 ~ N(z_0, 1) is not: without its prior there is no p(x)."""

    def model(x, mask):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=mask):
                first = pyro.sample("z", dist.Normal(0.0, 1.0))
            last = pyro.sample("u", dist.Normal(first, 1.0))
            pyro.sample("x", dist.Normal(last, 1.0), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 3, 1.1))
            pyro.sample("u", dist.Normal(2 * x / 3, 1.1))

    return pair(model, guide, None)
