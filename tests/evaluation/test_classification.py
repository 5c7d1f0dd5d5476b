"""p(y | x) of summed classes: against the posterior in closed form, brute force and the backward algorithm."""

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae as pv

MARK = {"enumerate": "parallel"}


@pytest.fixture(autouse=True)
def _double(double):
    pass


def nothing(*args):
    pass


PRIOR, LOCS = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-2.0, 0.0, 1.5])


def mixture(x):
    """y -> z -> x: z | y ~ N(loc_y, 1/4), x | z ~ N(z, 1)."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(PRIOR.to(x)), infer=MARK)
        z = pyro.sample("z", dist.Normal(LOCS.to(x)[y], 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.3))


def guide_of_both(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.ones(len(x), 3) / 3), infer=MARK)
        pyro.sample("z", dist.Normal(x / 2 + LOCS.to(x)[y] / 2, 0.8))


def posterior(x):
    return (PRIOR.to(x).log() + dist.Normal(LOCS.to(x), 1.25**0.5).log_prob(x[:, None])).softmax(1)


@pytest.mark.parametrize("proposal", [guide, guide_of_both])
@pytest.mark.parametrize(
    "options", [{}, {"vectorize_particles": False}, {"data_batch_size": 4, "particle_batch_size": 7}]
)
def test_a_mixture_vae(proposal, options):
    x = torch.linspace(-4, 4, 11)
    num_particles = 200 if options.get("vectorize_particles") is False else 4000
    found = pv.classify(mixture, proposal, x, num_particles=num_particles, **options)
    assert found.probs.shape == (11, 3)
    assert torch.allclose(found.probs.sum(1), torch.ones(11), atol=1e-12)
    # 4.5 standard errors; the bias of the ratio is of order 1 / S
    assert ((found.probs - posterior(x)).abs() <= 4.5 * found.stderr + 2 / num_particles).all()
    assert (found.ess <= num_particles).all()
    assert (found.ess > 0.2 * num_particles).all()
    assert found.stderr.max() < 1 / num_particles**0.5
    assert found.values.tolist() == [0, 1, 2]
    assert torch.equal(found.predicted, found.probs.argmax(1))
    assert "p(y | x)" in found.summary()
    assert "11 data" in repr(found)


def test_one_particle_has_no_standard_error():
    found = pv.classify(mixture, guide, torch.tensor([0.3, -2.0]), num_particles=1)
    assert found.stderr.isnan().all()
    assert found.probs.isfinite().all()


def test_data_with_a_known_class_are_refused():
    """With obs_mask, the site of the unknown classes is masked out for them, and its posterior is the prior."""

    @pyro.infer.config_enumerate
    def labelled(x, y, known):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(PRIOR.to(x)), obs=y, obs_mask=known)
            pyro.sample("x", dist.Normal(LOCS.to(x)[y], 1.25**0.5), obs=x)

    x, y = torch.tensor([0.3, -2.0, 1.0]), torch.tensor([0, 2, 1])
    with pytest.raises(ValueError, match="site 'y_unobserved' is masked out for some data.*classify data of unknown"):
        pv.classify(labelled, nothing, x, y, torch.tensor([True, False, False]))
    found = pv.classify(labelled, nothing, x, y, torch.zeros(3, dtype=torch.bool))
    assert torch.allclose(found.probs, posterior(x))


def test_the_ess_and_the_error_by_hand():
    """With weights known by hand: p(y | x, z) and w at the draws of the guide."""
    x, draws = torch.tensor([0.3, -2.0]), []

    def noted(x):
        with pyro.plate("data", len(x)):
            draws.append(pyro.sample("z", dist.Normal(x / 2, 1.3)))

    found = pv.classify(mixture, noted, x, num_particles=5, data_batch_size=None)
    z = draws[-1].reshape(5, 2)
    joint = PRIOR.log() + dist.Normal(LOCS, 0.5).log_prob(z[..., None])
    log_w = joint.logsumexp(-1) + dist.Normal(z, 1.0).log_prob(x) - dist.Normal(x / 2, 1.3).log_prob(z)
    weight, share = log_w.softmax(0), joint.softmax(-1)
    probs = (weight[..., None] * share).sum(0)
    assert torch.allclose(found.probs, probs, atol=1e-12)
    assert torch.allclose(found.ess, 1 / weight.square().sum(0), atol=1e-12)
    assert torch.allclose(found.stderr, (weight[..., None] * (share - probs)).square().sum(0).sqrt(), atol=1e-12)


def test_states_of_a_chain():
    """Exact without other latents: the marginals of each state, by brute force over paths."""
    steps, x = torch.randn(3, 3).softmax(-1), torch.randn(4, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            state = None
            for t in pyro.markov(range(4)):
                state = pyro.sample(f"h{t}", dist.Categorical(PRIOR if state is None else steps[state]), infer=MARK)
                pyro.sample(f"x{t}", dist.Normal(LOCS[state], 1.0), obs=x[:, t])

    paths = list(product(range(3), repeat=4))
    terms = []
    for path in paths:
        prior = PRIOR[path[0]].log() + sum(steps[path[t - 1], path[t]].log() for t in range(1, 4))
        terms.append(prior + sum(dist.Normal(LOCS[h], 1.0).log_prob(x[:, t]) for t, h in enumerate(path)))
    weight = torch.stack(terms).softmax(0)
    for t in range(4):
        exact = torch.stack([weight[[path[t] == k for path in paths]].sum(0) for k in range(3)], 1)
        found = pv.classify(model, nothing, x, site=f"h{t}", num_particles=10)
        assert torch.allclose(found.probs, exact, atol=1e-10)
        assert (found.ess == 10).all()
        assert (found.stderr == 0).all()
    with pytest.raises(ValueError, match="several sites are summed out of the model.*say which one, site='h0'"):
        pv.classify(model, nothing, x)
    with pytest.raises(ValueError, match="site 'x0' is not summed out"):
        pv.classify(model, nothing, x, site="x0")


def test_elements_of_a_plate_inside_a_datum():
    x = torch.randn(5, 2)

    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("elements", 2, dim=-1):
            y = pyro.sample("y", dist.OneHotCategorical(PRIOR), infer=MARK)
            pyro.sample("x", dist.Normal((y * LOCS).sum(-1), 1.0), obs=x)

    found = pv.classify(model, nothing, x, plate="data", num_particles=1)
    exact = (PRIOR.log() + dist.Normal(LOCS, 1.0).log_prob(x[..., None])).softmax(-1)
    assert torch.allclose(found.probs, exact, atol=1e-10)
    assert torch.equal(found.predicted, torch.eye(3)[exact.argmax(-1)])


def test_without_a_summed_class():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="no site is summed out of the model.*mark the class"):
        pv.classify(model, guide, torch.randn(3))
