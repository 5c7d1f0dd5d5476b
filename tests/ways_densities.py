"""Masks and scales: what they leave of a density in the model, in the guide, in both."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
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


# --- masks that have an answer ----------------------------------------------------------------------------------------------

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
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand(z.shape + (2,)).mask(mask).to_event(1), obs=x)

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


# --- masks in one program alone: right, or refused with the site; both are an answer ----------------------------------------

ONE = "masks of latents in one program alone"


@way(ONE, "site 'z'.*mask|mask.*site 'z'")
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


@way(ONE, "site 'z'.*mask|mask.*site 'z'")
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


# --- values known in part ----------------------------------------------------------------------------------------------------


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


def _automatic(make_guide, exact):
    guide = make_guide(partly_observed)
    return pair(partly_observed, guide, exact, num_particles=1000)


@way("obs_mask=", "site 'x_unobserved'.*mask|mask.*site 'x_unobserved'")
def with_auto_normal():
    return _automatic(lambda model: AutoNormal(model, init_scale=1.0), masked_evidence)


@way("obs_mask=", "site 'x_unobserved'.*mask|mask.*site 'x_unobserved'")
def with_auto_multivariate_normal():
    return _automatic(lambda m: AutoMultivariateNormal(m, init_scale=1.0), lambda x, m: masked_evidence(x, m).sum())


# --- scales ----------------------------------------------------------------------------------------------------------------

SCALES = "scales"


def _scaled(program, scale):
    def run(x):
        with poutine.scale(scale=scale):
            program(x)

    return run


@way(SCALES, "site 'z' carries a scale of 0.5")
def of_the_model():
    return Pair(_scaled(normal_model, 0.5), wide_guide, (normal_data(),))


@way(SCALES, "site 'z' carries a scale of 2")
def of_the_guide():
    return Pair(normal_model, _scaled(wide_guide, 2.0), (normal_data(),))


@way(SCALES, "site 'z' carries a scale of 3")
def of_both():
    return Pair(_scaled(normal_model, 3.0), _scaled(wide_guide, 3.0), (normal_data(),))


@way(SCALES, "site 'z' carries a scale of 0.1")
def of_the_kl_alone():
    """Annealing as Pyro's tutorials write it: the latent scaled in both, the observation whole."""

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Pair(model, _scaled(wide_guide, 0.1), (normal_data(),))


@way(SCALES, "site 'x' carries a scale of 2")
def of_an_observation_per_datum():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=torch.tensor([1.0, 2.0, 1.0])):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Pair(model, wide_guide, (normal_data(),))


@way(SCALES)
def of_one():
    return Pair(_scaled(normal_model, 1.0), wide_guide, (normal_data(),), normal_evidence(normal_data()))


@way(SCALES)
def of_a_subsample_that_is_given():
    x, chosen = torch.tensor([0.5, -1.0, 2.0, 0.3, 1.0]), torch.tensor([4, 0, 2])

    def model(x):
        with pyro.plate("data", len(x), subsample=chosen) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample=chosen) as index:
            pyro.sample("z", dist.Normal(x[index] / 2, 0.8))

    return Pair(model, guide, (x,), normal_evidence(x[chosen]))


@way(SCALES)
def of_a_plate_larger_than_the_batch():
    """A minibatch with the size of the whole data: plate(size=1000, subsample=x)."""

    def model(x):
        with pyro.plate("data", 1000, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 1000, subsample=x):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return Pair(model, guide, (normal_data(),), normal_evidence(normal_data()))


@way(SCALES)
def of_pyro_subsample():
    x = torch.full((6,), 0.7)

    def model(x):
        with pyro.plate("data", 6, subsample_size=4):
            batch = pyro.subsample(x, event_dim=0)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

    def guide(x):
        with pyro.plate("data", 6, subsample_size=4):
            pyro.sample("z", dist.Normal(pyro.subsample(x, event_dim=0) / 2, 0.8))

    return Pair(model, guide, (x,), normal_evidence(x[:4]))


@way(SCALES, "scale of 3")
def of_a_subsample_in_the_model_alone():
    """Global latents, and rows of a regression drawn at random: a third of the data stand for all of them."""
    x = torch.randn(6)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6, subsample_size=2) as index:
            pyro.sample("x", dist.Normal(mean.unsqueeze(-1), 1.0), obs=x[index])

    def guide(x):
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    return Pair(model, guide, (x,))


@way(SCALES)
def of_an_automatic_guide_in_a_subsample():
    x = torch.full((6,), 0.7)

    def model(x):
        with pyro.plate("data", 6, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = AutoNormal(model, init_scale=0.9, create_plates=lambda x: pyro.plate("data", 6, subsample_size=4))
    return Pair(model, guide, (x,), normal_evidence(x[:4]))
