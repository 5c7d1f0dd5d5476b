"""Sites marked for enumeration: every sum against brute force over all assignments, the forward algorithm or closed forms."""

import math
from itertools import pairwise, product

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import config_enumerate
from torch import nn

import pyrovae as pv

MARK = {"enumerate": "parallel"}


@pytest.fixture(autouse=True)
def _double(double):
    pass


def nothing(*args):
    pass


def weights(model, guide, *args, num_particles=3, **options):
    return pv.log_weights(model, guide, *args, num_particles=num_particles, **options)


def close(found, exact):
    assert torch.allclose(found, exact.expand_as(found), rtol=0, atol=1e-10), (found - exact).abs().max()


def refused(match, model, guide, *args, run=weights, **options):
    with pytest.raises(ValueError, match=match):
        run(model, guide, *args, **options)


def matrix(*sizes):
    return torch.randn(*sizes).softmax(-1)


# --- brute force over all assignments ---------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(num_classes=st.integers(1, 5), num_data=st.integers(1, 6), size=st.integers(1, 3), seed=st.integers(0, 99))
def test_gaussian_mixture(num_classes, num_data, size, seed):
    torch.manual_seed(seed)
    prior, locs, x = matrix(num_classes), 3 * torch.randn(num_classes, size), torch.randn(num_data, size)

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(prior))
            pyro.sample("x", dist.Normal(locs[y], 0.7).to_event(1), obs=x)

    terms = [prior[k].log() + dist.Normal(locs[k], 0.7).log_prob(x).sum(-1) for k in range(num_classes)]
    close(weights(model, nothing, x), torch.stack(terms).logsumexp(0))


class Chain:
    """A hidden Markov model of K states."""

    def __init__(self, num_states, seed=0):
        torch.manual_seed(seed)
        self.start, self.steps, self.locs = matrix(num_states), matrix(num_states, num_states), torch.randn(num_states)

    def plate_outside(self, x):
        with pyro.plate("data", len(x)):
            state = None
            for t in pyro.markov(range(x.shape[1])):
                probs = self.start if state is None else self.steps[state]
                state = pyro.sample(f"h{t}", dist.Categorical(probs), infer=MARK)
                pyro.sample(f"x{t}", dist.Normal(self.locs[state], 1.0), obs=x[:, t])

    def plate_inside(self, x):
        plate, state = pyro.plate("data", len(x)), None
        for t in pyro.markov(range(x.shape[1])):
            with plate:
                probs = self.start if state is None else self.steps[state]
                state = pyro.sample(f"h{t}", dist.Categorical(probs), infer=MARK)
                pyro.sample(f"x{t}", dist.Normal(self.locs[state], 1.0), obs=x[:, t])

    def padded(self, x, lengths):
        """Data of different lengths: what lies beyond is masked."""
        with pyro.plate("data", len(x)):
            state = None
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=t < lengths):
                    probs = self.start if state is None else self.steps[state]
                    state = pyro.sample(f"h{t}", dist.Categorical(probs), infer=MARK)
                    pyro.sample(f"x{t}", dist.Normal(self.locs[state], 1.0), obs=x[:, t])

    def forward(self, x):
        """The forward algorithm."""
        alpha = self.start.log() + dist.Normal(self.locs, 1.0).log_prob(x[:, 0, None])
        for t in range(1, x.shape[1]):
            step = (alpha[:, :, None] + self.steps.log()).logsumexp(1)
            alpha = step + dist.Normal(self.locs, 1.0).log_prob(x[:, t, None])
        return alpha.logsumexp(1)


@pytest.mark.parametrize("where", ["plate_outside", "plate_inside"])
@pytest.mark.parametrize(("num_steps", "num_states"), [(12, 3), (1, 4), (40, 2)])
def test_chain_against_the_forward_algorithm(where, num_steps, num_states):
    chain, x = Chain(num_states), torch.randn(5, num_steps)
    close(weights(getattr(chain, where), nothing, x), chain.forward(x))


def test_chain_against_brute_force():
    chain, x = Chain(3), torch.randn(4, 5)
    terms = []
    for path in product(range(3), repeat=5):
        prior = chain.start[path[0]].log() + sum(chain.steps[a, b].log() for a, b in pairwise(path))
        terms.append(prior + sum(dist.Normal(chain.locs[h], 1.0).log_prob(x[:, t]) for t, h in enumerate(path)))
    close(weights(chain.plate_outside, nothing, x), torch.stack(terms).logsumexp(0))


def test_padded_sequences():
    chain, x, lengths = Chain(3), torch.randn(6, 7), torch.tensor([7, 1, 3, 5, 7, 2])
    exact = torch.cat([chain.forward(x[n : n + 1, :length]) for n, length in enumerate(lengths)])
    close(weights(chain.padded, nothing, x, lengths), exact)


def test_a_chain_that_moves_one_way_only():
    """Probabilities of 0, which torch rounds up: a path that the chain cannot take fits the data far better."""
    chain, x = Chain(3), torch.tensor([[60.0, 0.0, -60.0, 60.0]])
    chain.start, chain.locs = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([-60.0, 0.0, 60.0])
    chain.steps = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    paths = [(0, a, b, c) for a, b, c in product(range(3), repeat=3)]
    paths = [p for p in paths if all(chain.steps[a, b] > 0 for a, b in pairwise(p))]
    terms = [
        sum(chain.steps[a, b].log() for a, b in pairwise(path))
        + sum(dist.Normal(chain.locs[h], 1.0).log_prob(x[:, t]) for t, h in enumerate(path))
        for path in paths
    ]
    close(weights(chain.plate_outside, nothing, x), torch.stack(terms).logsumexp(0))


def test_maxima_far_apart():
    """log p(y) and log p(x | y) whose maxima lie 2000 nats apart: the product of their exponentials is 0 everywhere."""
    prior, x = torch.tensor([0.0, -2000.0]), torch.tensor([50.0])

    def model(x):
        with pyro.plate("data", 1):
            y = pyro.sample("y", dist.Categorical(logits=prior), infer=MARK)
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 50.0])[y], 0.5), obs=x)

    exact = (prior + dist.Normal(torch.tensor([0.0, 50.0]), 0.5).log_prob(x)).logsumexp(0)
    assert exact < -1000
    close(weights(model, nothing, x), exact)


@settings(max_examples=10, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 3)] * 3), num_data=st.integers(1, 4), inner=st.integers(1, 3))
def test_coupled_classes_with_a_plate_inside(sizes, num_data, inner):
    """y and w per datum, k per element of a plate inside it: the sum over k is within the product over elements."""
    first, second, third = matrix(sizes[0]), matrix(sizes[0], sizes[1]), matrix(sizes[1], sizes[2])
    locs, x = torch.randn(sizes[0], sizes[2]), torch.randn(num_data, inner)

    def model(x):
        with pyro.plate("data", num_data, dim=-2):
            y = pyro.sample("y", dist.Categorical(first), infer=MARK)
            w = pyro.sample("w", dist.Categorical(second[y]), infer=MARK)
            with pyro.plate("elements", inner, dim=-1):
                k = pyro.sample("k", dist.Categorical(third[w]), infer=MARK)
                pyro.sample("x", dist.Normal(locs[y, k], 1.0), obs=x)

    values = [range(sizes[0]), range(sizes[1]), *[range(sizes[2])] * inner]
    terms = []
    for y, w, *ks in product(*values):
        prior = first[y].log() + second[y, w].log() + sum(third[w, k].log() for k in ks)
        terms.append(prior + sum(dist.Normal(locs[y, k], 1.0).log_prob(x[:, i]) for i, k in enumerate(ks)))
    options = {"plate": "data"}  # of one element, both plates could be it
    close(weights(model, nothing, x, **options), torch.stack(terms).logsumexp(0))


def in_a_plate(value, *sizes):
    return value.expand(*sizes, *value.shape)


@pytest.mark.parametrize(
    "prior",
    [
        dist.Bernoulli(torch.tensor(0.3)),
        dist.Categorical(torch.tensor([0.2, 0.5, 0.3])),
        dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])),
        dist.Binomial(torch.tensor(4.0), torch.tensor(0.4)),
        dist.BetaBinomial(torch.tensor(2.0), torch.tensor(1.5), torch.tensor(3.0)),
    ],
    ids=lambda prior: type(prior).__name__,
)
@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_families(prior, how):
    x = torch.randn(4)

    def loc(y):
        return (y * torch.tensor([-1.0, 0.5, 2.0])).sum(-1) if prior.event_shape else 0.7 * y

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", prior, infer={"enumerate": how})
            pyro.sample("x", dist.Normal(loc(y), 1.0), obs=x)

    terms = [prior.log_prob(y) + dist.Normal(loc(y), 1.0).log_prob(x) for y in prior.enumerate_support()]
    close(weights(model, nothing, x), torch.stack(terms).logsumexp(0))


@pytest.mark.parametrize("sequential", [False, True])
def test_one_datum_without_a_common_plate(sequential):
    """A class of all data: log p of the whole."""
    prior, locs, x = matrix(3), torch.randn(3), torch.randn(5)

    def model(x):
        y = pyro.sample("y", dist.Categorical(prior), infer=MARK)
        if sequential:
            for i in pyro.plate("data", len(x)):
                pyro.sample(f"x{i}", dist.Normal(locs[y], 1.0), obs=x[i])
        else:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(locs[y], 1.0), obs=x)

    exact = (prior.log() + dist.Normal(locs, 1.0).log_prob(x[:, None]).sum(0)).logsumexp(0)
    close(weights(model, nothing, x), exact.reshape(1))
    refused("site 'y' of the model is outside plate 'data'", model, nothing, x, plate="data")


def test_sequential_plate():
    prior, locs, x = matrix(3), torch.randn(3), torch.randn(3)

    def model(x):
        for i in pyro.plate("data", len(x)):
            y = pyro.sample(f"y{i}", dist.Categorical(prior), infer=MARK)
            z = pyro.sample(f"z{i}", dist.Normal(locs[y], 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(x[i] / 2, 1.5))

    exact = (prior.log() + dist.Normal(locs, math.sqrt(2)).log_prob(x[:, None])).logsumexp(1)
    result = pv.log_marginal_likelihood(model, guide, x, num_particles=80, plate="data", vectorize_particles=False)
    for found, truth, stderr in zip(result.log_prob, exact, result.stderr, strict=True):
        within(found, truth, stderr)


# --- beside latents that the guide draws ------------------------------------------------------------------------------


class MixtureVAE(nn.Module):
    """y -> z -> x, and y -> x: p(z | y) and p(x | z, y) depend on the class."""

    def __init__(self, num_classes=3, latent_dim=2, size=4):
        super().__init__()
        self.prior, self.locs = matrix(num_classes), 1.5 * torch.randn(num_classes, latent_dim)
        self.decoder, self.shift = nn.Linear(latent_dim, size), torch.randn(num_classes, size)

    def model(self, x, y=None):
        mark = None if y is not None else MARK
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(self.prior), obs=y, infer=mark)
            z = pyro.sample("z", dist.Normal(self.locs[y], 0.8).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + self.shift[y], 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2] / 2, 1.5).to_event(1))

    def guide_of_both(self, x):
        """q(y | x) q(z | x, y), marked."""
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=x[:, :1] * self.prior), infer=MARK)
            pyro.sample("z", dist.Normal(self.locs[y] / 2 + x[:, :2] / 4, 1.0).to_event(1))

    def log_joint(self, x, z):
        """log p(x, z, y) for each y, (S, N, K), by the model conditioned on it."""
        terms = []
        for k in range(len(self.prior)):
            prior = dist.Normal(self.locs[k], 0.8).to_event(1).log_prob(z)
            likelihood = dist.Normal(self.decoder(z) + self.shift[k], 1.0).to_event(1).log_prob(x)
            terms.append(self.prior[k].log() + prior + likelihood)
        return torch.stack(terms, -1)

    def evidence(self, x):
        """log p(x, y) in closed form, (N, K)."""
        matrix, bias = self.decoder.weight, self.decoder.bias
        covariance = torch.eye(x.shape[1]) + 0.64 * matrix @ matrix.T
        terms = []
        for k in range(len(self.prior)):
            loc = matrix @ self.locs[k] + bias + self.shift[k]
            terms.append(self.prior[k].log() + dist.MultivariateNormal(loc, covariance).log_prob(x))
        return torch.stack(terms, 1).detach()


def drawn(guide, record):
    """A guide that notes what it draws."""

    def noted(x):
        trace = poutine.trace(guide).get_trace(x)
        record.append(trace.nodes["z"]["value"])

    return noted


@pytest.mark.parametrize("options", [{}, {"vectorize_particles": False}, {"particle_batch_size": 3}])
def test_mixture_vae_particle_by_particle(options):
    """The log weights are logsumexp over models conditioned on each class, at the same draws."""
    vae, x, draws = MixtureVAE(), torch.randn(6, 4), []
    found = weights(vae.model, drawn(vae.guide, draws), x, num_particles=6, data_batch_size=None, **options)
    size = 1 if "vectorize_particles" in options else options.get("particle_batch_size", 6)
    z = torch.cat([draw.reshape(-1, 6, 2) for draw in draws[-6 // size :]])
    with torch.no_grad():
        exact = vae.log_joint(x, z).logsumexp(-1) - dist.Normal(x[:, :2] / 2, 1.5).to_event(1).log_prob(z)
    close(found, exact)


@pytest.mark.parametrize(
    ("guide", "options"),
    [
        ("guide", {}),
        ("guide_of_both", {}),
        ("guide", {"data_batch_size": 7, "particle_batch_size": 90}),
        ("guide_of_both", {"compile": True, "particle_batch_size": 100}),
    ],
)
def test_mixture_vae(guide, options):
    vae, x = MixtureVAE(), torch.randn(20, 4)
    result = pv.log_marginal_likelihood(vae.model, getattr(vae, guide), x, num_particles=2000, **options)
    exact = vae.evidence(x).logsumexp(1)
    for found, truth, stderr in zip(result.log_prob, exact, result.stderr, strict=True):
        within(found, truth, stderr)
    assert result.stderr.mean() < 0.1


def test_summing_both_sides_of_a_guide_lowers_the_variance():
    """q(z) = sum_y q(y) q(z | y), against weights of the pair (y, z) drawn together."""
    vae, x = MixtureVAE(), torch.randn(50, 4)

    def unmarked(x):
        with poutine.infer_config(config_fn=lambda site: {"enumerate": None}):
            vae.guide_of_both(x)

    both = pv.log_marginal_likelihood(vae.model, vae.guide_of_both, x, num_particles=1000)
    joint = pv.log_marginal_likelihood(vae.model, unmarked, x, num_particles=1000)
    exact = vae.evidence(x).logsumexp(1).mean()
    for result in (both, joint):
        within(result.mean, exact, result.mean_mc_stderr)
    assert both.stderr.square().mean() < 0.9 * joint.stderr.square().mean()


def test_a_mixture_that_the_guide_alone_has():
    """A marked site of the guide that the model does not have is a mixture of proposals."""
    x = torch.randn(6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(x),), 0.3)), infer=MARK)
            pyro.sample("z", dist.Normal(x / 2 + k - 0.5, 0.8))

    result = pv.log_marginal_likelihood(model, guide, x, num_particles=2000)
    for found, truth, stderr in zip(result.log_prob, dist.Normal(0.0, 2**0.5).log_prob(x), result.stderr, strict=True):
        within(found, truth, stderr)


def test_labels_of_a_part_of_the_data():
    """obs_mask: classes that are known are observed, the others are summed out."""
    vae, x = MixtureVAE(), torch.randn(12, 4)
    labels, known = torch.randint(3, (12,)), torch.arange(12) % 2 == 0

    @config_enumerate  # Pyro drops infer= beside obs_mask=
    def model(x, labels, known):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(vae.prior), obs=labels, obs_mask=known)
            z = pyro.sample("z", dist.Normal(vae.locs[y], 0.8).to_event(1))
            pyro.sample("x", dist.Normal(vae.decoder(z) + vae.shift[y], 1.0).to_event(1), obs=x)

    evidence = vae.evidence(x)
    exact = torch.where(known, evidence.gather(1, labels[:, None]).squeeze(1), evidence.logsumexp(1))
    result = pv.log_marginal_likelihood(
        model, lambda x, labels, known: vae.guide(x), x, labels, known, num_particles=2000
    )
    for found, truth, stderr in zip(result.log_prob, exact, result.stderr, strict=True):
        within(found, truth, stderr)


# --- annealing --------------------------------------------------------------------------------------------------------


def potential_of(model, guide, x, num_chains=3):
    from pyrovae.annealing.potential import block_potential, prior_of
    from pyrovae.programs.splitting import inspect

    pair = inspect(model, guide or prior_of(model), (x,), {})
    return block_potential(pair, 0, len(x), num_chains, from_prior=guide is None)


@pytest.mark.parametrize("guide", [None, "guide", "guide_of_both"])
def test_densities_and_gradients_of_annealing(guide):
    """log q + beta log w, with both sums, against the formula; the gradient against finite differences."""
    vae, x = MixtureVAE(), torch.randn(4, 4)
    potential = potential_of(vae.model, None if guide is None else getattr(vae, guide), x)
    u, beta = torch.randn(3, 4, 2), torch.tensor(0.6)
    energy = potential.energy(u, beta)
    if guide == "guide":
        log_q = dist.Normal(x[:, :2] / 2, 1.5).to_event(1).log_prob(u)
    else:
        locs = vae.locs if guide is None else vae.locs / 2 + x[:, None, :2] / 4
        logits = vae.prior.log() if guide is None else (x[:, :1] * vae.prior).log_softmax(-1)
        scale = 0.8 if guide is None else 1.0
        log_q = (logits + dist.Normal(locs, scale).to_event(1).log_prob(u[:, :, None])).logsumexp(-1)
    with torch.no_grad():
        log_w = vae.log_joint(x, u).logsumexp(-1) - log_q
    assert torch.allclose(energy.log_start, log_q, atol=1e-10)
    assert torch.allclose(energy.log_weight, log_w, atol=1e-10)
    for d in range(2):
        step = torch.zeros(2).scatter(0, torch.tensor(d), 1e-5)
        ends = [potential.energy(u + sign * step, beta) for sign in (1, -1)]
        up, down = (end.log_start + beta * end.log_weight for end in ends)
        assert torch.allclose(energy.gradient[..., d], (up - down) / 2e-5, atol=1e-6)


@pytest.mark.parametrize(("guide", "compile"), [(None, True), ("guide_of_both", False)])
def test_annealing_of_a_known_evidence(guide, compile):
    vae, x = MixtureVAE(), torch.randn(12, 4)
    start = None if guide is None else getattr(vae, guide)
    result = pv.annealed_importance_sampling(
        vae.model, x, guide=start, num_chains=64, num_temperatures=30, num_leapfrog_steps=3, compile=compile
    )
    for found, truth, stderr in zip(result.log_prob, vae.evidence(x).logsumexp(1), result.stderr, strict=True):
        within(found, truth, stderr)
    assert result.stderr.mean() < 0.1


@pytest.mark.parametrize("guide", [None, "guide_of_both"])
def test_bounds_from_both_sides(guide):
    vae, x = MixtureVAE(), torch.randn(60, 4)
    start = None if guide is None else getattr(vae, guide)
    bounds = pv.bidirectional_monte_carlo(
        vae.model, x, guide=start, num_chains=16, num_temperatures=60, num_leapfrog_steps=3
    )
    exact = vae.evidence(bounds.data["x"]).logsumexp(1)
    for bound, sign in ((bounds.lower, -1), (bounds.upper, 1)):
        excess = sign * (bound - exact)
        assert excess.mean() > -4.5 * excess.std() / len(x) ** 0.5
        assert excess.mean() < 0.1
    assert bounds.latents["y"].shape == (60,)


def test_states_that_cannot_be_reached_have_a_gradient():
    """A chain with probabilities of 0 beside a latent: intermediate sums are -inf, and the gradient is not NaN."""
    chain = Chain(3)
    chain.start, chain.steps = torch.tensor([1.0, 0.0, 0.0]), torch.eye(3).roll(1, 1)
    x = torch.randn(4, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            state = None
            for t in pyro.markov(range(3)):
                probs = chain.start if state is None else chain.steps[state]
                state = pyro.sample(f"h{t}", dist.Categorical(probs), infer=MARK)
                pyro.sample(f"x{t}", dist.Normal(chain.locs[state] + z, 1.0), obs=x[:, t])

    potential, u = potential_of(model, None, x), torch.randn(3, 4, 1)
    energy = potential.energy(u, torch.tensor(1.0))
    path = chain.locs  # 0, 1, 2
    exact = dist.Normal(path + u, 1.0).log_prob(x).sum(-1)
    assert torch.allclose(energy.log_weight, exact, atol=1e-10)
    assert torch.allclose(energy.gradient[..., 0], (x - path - u).sum(-1) - u[..., 0], atol=1e-10)


def test_gaps_of_a_mixture():
    """The best member's weights give log p(x), which the closed form knows; the ELBO at the best member is higher."""
    vae, x = MixtureVAE(), torch.randn(10, 4)
    vae.locs, vae.shift = vae.locs / 4, vae.shift / 4  # one mode, so that a normal reaches it
    guide = pv.guides.MeanFieldNormal(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), 2, num_features=8)
    gaps = pv.inference_gaps(vae.model, guide, x, num_particles=2000)
    for found, truth, stderr in zip(gaps.log_prob, vae.evidence(x).logsumexp(1), gaps.stderr, strict=True):
        within(found, truth, stderr)
    assert (gaps.amortization > 0.1).any()
    assert (gaps.amortization > -4.5 * gaps.amortization_stderr).all()


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prior", "match"),
    [
        (lambda: dist.Poisson(2.0), r"'y' of the model is marked .*Poisson.*cannot be listed: give it a distribution"),
        (lambda: dist.Normal(0.0, 1.0), "'y' of the model is marked for enumeration.*cannot be listed"),
        (lambda: dist.Binomial(torch.tensor([1.0, 2.0, 3.0]), 0.5), "'y' of the model.*same number of values"),
    ],
)
def test_values_that_cannot_be_listed(prior, match):
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", prior(), infer=MARK)
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    refused(match, model, nothing, torch.randn(3))


def test_bits_of_one_event_are_refused_with_a_remedy_that_works():
    x = torch.randn(3)

    def bits(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3 * torch.ones(2)).to_event(1), infer=MARK)
            pyro.sample("x", dist.Normal(y.sum(-1), 1.0), obs=x)

    refused("replace .to_event.* by a plate", bits, nothing, x)


def test_scales_are_refused():
    chain = Chain(2)
    refused("carries a scale of 2", poutine.scale(chain.plate_outside, scale=2.0), nothing, torch.randn(3, 2))


@pytest.mark.parametrize(
    "loc",
    [
        lambda y: y.double().roll(1, -1),
        lambda y: y.double().mean(-1, keepdim=True),
        lambda y: torch.ones(()) if y.flatten()[0] > 0 else torch.zeros(()),
    ],
    ids=["neighbours", "all data", "if"],
)
def test_programs_that_mix_or_decide_by_values_are_refused(loc):
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.3, 0.4])), infer=MARK)
            pyro.sample("x", dist.Normal(3.0 * loc(y), 1.0), obs=x)

    refused("'x' has another log density with all values|couples the data", model, nothing, torch.randn(40))


def test_a_sum_over_a_plate_inside_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            with pyro.plate("elements", 3, dim=-1):
                k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.3, 0.4])), infer=MARK)
            pyro.sample("x", dist.Normal(k.double().sum(-1, keepdim=True), 1.0), obs=x[:, None])

    refused("another log density|cannot be summed out", model, nothing, torch.randn(5))


def test_programs_that_fail_with_all_values_at_once_are_refused():
    net = nn.Linear(4, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3), infer=MARK)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(torch.cat([z[..., None], y], -1))[..., 0], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    refused(r"fails with all values of site\(s\) \['y'\] at once.*broadcast", model, guide, torch.randn(5))


def test_a_masked_class_that_others_depend_on_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=torch.arange(len(x)) > 1):
                y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.3, 0.4])), infer=MARK)
            pyro.sample("x", dist.Normal(2.0 * y, 1.0), obs=x)

    refused("masks .*site.* 'y'", model, nothing, torch.randn(5))


def test_nothing_to_anneal():
    chain = Chain(2)
    refused(
        "no latent sites.*exact",
        chain.plate_outside,
        nothing,
        torch.randn(3, 2),
        run=lambda model, guide, x: pv.annealed_importance_sampling(model, x, num_temperatures=3),
    )


# --- more programs ----------------------------------------------------------------------------------------------------


def test_a_chain_that_switches_latents():
    """h_t drives z_t, which the guide draws: the forward algorithm at the draws of each particle."""
    chain, x, draws = Chain(3), torch.randn(5, 4), []

    def model(x):
        with pyro.plate("data", len(x)):
            state, z = None, torch.zeros(())
            for t in pyro.markov(range(4)):
                state = pyro.sample(
                    f"h{t}", dist.Categorical(chain.start if state is None else chain.steps[state]), infer=MARK
                )
                z = pyro.sample(f"z{t}", dist.Normal(chain.locs[state] + 0.5 * z, 0.7))
                pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def guide(x):
        with pyro.plate("data", len(x)):
            z = [pyro.sample(f"z{t}", dist.Normal(x[:, t] / 2, 1.3)) for t in pyro.markov(range(4))]
            draws.append(torch.stack(z, -1))

    found = weights(model, guide, x, num_particles=7, data_batch_size=None)
    z = draws[-1].reshape(7, 5, 4)
    before = torch.cat([torch.zeros(7, 5, 1), z[..., :-1]], -1)
    alpha = chain.start.log()
    for t in range(4):
        if t:
            alpha = (alpha[..., :, None] + chain.steps.log()).logsumexp(-2)
        alpha = alpha + dist.Normal(chain.locs + 0.5 * before[..., t, None], 0.7).log_prob(z[..., t, None])
    likelihood = dist.Normal(z, 1.0).log_prob(x) - dist.Normal(x / 2, 1.3).log_prob(z)
    close(found, alpha.logsumexp(-1) + likelihood.sum(-1))


def test_factors_count_at_each_value():
    prior, x = matrix(3), torch.randn(5)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(prior), infer=MARK)
            pyro.factor("f", 0.3 * y * x)

    close(weights(model, nothing, x), (prior.log() + 0.3 * torch.arange(3) * x[:, None]).logsumexp(1))


def test_a_masked_latent_beside_a_class():
    """Elements of z that the model masks have no density, whatever their class."""
    prior, locs, x, known = matrix(3), torch.randn(3), torch.randn(6), torch.arange(6) % 2 == 0

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(prior), infer=MARK)
            with poutine.mask(mask=known):
                z = pyro.sample("z", dist.Normal(locs[y], 0.5))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    result = pv.log_marginal_likelihood(model, guide, x, num_particles=2000)
    exact = (prior.log() + dist.Normal(locs, 1.25**0.5).log_prob(x[:, None])).logsumexp(1) * known
    for found, truth, stderr in zip(result.log_prob, exact, result.stderr, strict=True):
        within(found, truth, stderr + 1e-12)
    assert torch.allclose(result.log_prob[~known], torch.zeros(3), atol=1e-12)


def test_automatic_guides_of_the_other_latents():
    vae, x = MixtureVAE(), torch.randn(8, 4)
    guide = pyro.infer.autoguide.AutoNormal(poutine.block(vae.model, hide=["y"]), init_scale=1.0)
    result = pv.log_marginal_likelihood(vae.model, guide, x, num_particles=20_000)
    for found, truth, stderr in zip(result.log_prob, vae.evidence(x).logsumexp(1), result.stderr, strict=True):
        within(found, truth, stderr)


def test_no_value_is_possible():
    """A density of NaN at one value is named; a value of probability 0 has no part in the sum."""

    def model(x, locs):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])), infer=MARK)
            pyro.sample("x", dist.Normal(locs[y], 1.0), obs=x)

    refused("density of site 'x' of the model is NaN", model, nothing, torch.randn(4), torch.tensor([0.0, math.nan]))


def test_a_loop_without_markov_is_refused_before_it_needs_too_many_dimensions():
    chain, x = Chain(2), torch.randn(3, 70)

    def model(x):
        with pyro.plate("data", len(x)):
            state = None
            for t in range(x.shape[1]):
                probs = chain.start if state is None else chain.steps[state]
                state = pyro.sample(f"h{t}", dist.Categorical(probs), infer=MARK)
                pyro.sample(f"x{t}", dist.Normal(chain.locs[state], 1.0), obs=x[:, t])

    refused("has 70 sites to sum out, each with a dimension of its own.*pyro.markov", model, nothing, x)
    close(weights(model, nothing, x[:, :8]), chain.forward(x[:, :8]))


def test_calibration_ranks_the_other_latents():
    """The exact posterior given x: a mixture, marked in the guide too."""
    prior, locs = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(prior), infer=MARK)
            z = pyro.sample("z", dist.Normal(locs[y], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            logits = prior.log() + dist.Normal(locs, 2**0.5).log_prob(x[:, None])
            k = pyro.sample("k", dist.Categorical(logits=logits), infer=MARK)
            pyro.sample("z", dist.Normal((x + locs[k]) / 2, 0.5**0.5))

    calibration = pv.simulation_based_calibration(model, guide, torch.zeros(400))
    assert calibration.names == ["z"]
    assert calibration.p_value > 1e-5
    shifted = pv.simulation_based_calibration(model, lambda x: guide(x + 1), torch.zeros(400))
    assert shifted.p_value < 1e-5


def test_export_of_draws():
    """The log weights of the export are those of the sum; predictive draws would need a class of each draw."""
    vae, x = MixtureVAE(), torch.randn(6, 4)
    result = pv.log_marginal_likelihood(vae.model, vae.guide, x, num_particles=30)
    data = pv.to_inference_data(result, model=vae.model, guide=vae.guide, args=(x,), num_draws=5, predictive=False)
    z = torch.as_tensor(data["posterior"]["z"].values)[0]
    with torch.no_grad():
        exact = vae.log_joint(x, z).logsumexp(-1) - dist.Normal(x[:, :2] / 2, 1.5).to_event(1).log_prob(z)
    assert torch.allclose(torch.as_tensor(data["sample_stats"]["log_weight"].values)[0], exact, atol=1e-10)
    assert "y" not in data["posterior"]
    with pytest.raises(ValueError, match="marked for enumeration are summed out: pass predictive=False"):
        pv.to_inference_data(result, model=vae.model, guide=vae.guide, args=(x,), num_draws=5)
