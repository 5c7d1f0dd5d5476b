"""Padded sequences with lengths: the deep Markov example, whose padding must not matter, and its linear-Gaussian case.

The programs are those of `examples/deep_markov.py`. With linear maps in them, the Kalman filter gives log p(x) and the
smoother gives the exact guide.
"""

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from torch import nn

import pyrovae as pv

spec = importlib.util.spec_from_file_location("deep_markov", Path(__file__).parents[2] / "examples/deep_markov.py")
deep_markov = importlib.util.module_from_spec(spec)
spec.loader.exec_module(deep_markov)

LENGTHS = torch.tensor([3, 5, 1, 4, 2, 5])


# --- a network: padding does not matter ----------------------------------------------------------------------------------


def networks(family=pv.likelihoods.LearnedScaleNormal):
    """A model and a guide with random weights; latents of 2 dimensions, data of 3."""
    torch.manual_seed(3)
    decoder = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
    model = deep_markov.DeepMarkovModel(deep_markov.GatedTransition(2, 5), family(decoder, (3,)), 2)
    guide = deep_markov.StructuredGuide(3, 2, 6)
    for parameter in guide.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, guide


FAMILIES = {
    pv.likelihoods.LearnedScaleNormal: lambda *shape: torch.randn(*shape),
    pv.likelihoods.Bernoulli: lambda *shape: torch.rand(*shape).round(),
}


def padded(draw, steps=5):
    """Data whose padding holds other numbers than 0."""
    return draw(len(LENGTHS), steps, 3)


def weights_of(model, guide, x, lengths, **options):
    pyro.set_rng_seed(7)
    return pv.log_weights(model, guide, x, lengths, num_particles=50, **options)


def by_loops(model, guide, x, lengths, seed):
    """log w of one particle of one sequence: its steps alone, without masks, padding or batches."""
    x, total = x[:, :lengths], 0.0
    pyro.set_rng_seed(seed)
    drawn = poutine.trace(guide).get_trace(x, torch.tensor([lengths]))
    h, hidden = torch.zeros(1, 1, 6), []
    for t in reversed(range(lengths)):
        h = guide.rnn(x[:, t : t + 1], h)[1]
        hidden.insert(0, h[0, 0])
    before_p, before_q = model.start, guide.start
    for t in range(lengths):
        z = drawn.nodes[f"z_{t + 1}"]["value"][0]
        joined = (guide.from_latent(before_q).tanh() + hidden[t]) / 2
        q = dist.Normal(guide.loc(joined), 1e-3 + nn.functional.softplus(guide.raw_scale(joined)))
        total = total + model.transition(before_p).log_prob(z) - q.log_prob(z).sum(-1)
        total = total + model.likelihood(z).log_prob(x[0, t])
        before_p = before_q = z
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_log_weights_are_those_of_each_sequence_by_hand(double, family):
    model, guide = networks(family)
    x = padded(FAMILIES[family])
    for n, length in enumerate(LENGTHS.tolist()):
        one = (x[n : n + 1, :length], LENGTHS[n : n + 1])
        pyro.set_rng_seed(5)
        drawn = poutine.trace(guide).get_trace(*one)
        joint = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*one)
        weight = joint.log_prob_sum() - drawn.log_prob_sum()
        assert torch.allclose(weight, by_loops(model, guide, x[n : n + 1], length, seed=5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vectorised", [True, False])
def test_padded_values_change_no_log_weight(double, family, vectorised):
    model, guide = networks(family)
    draw = FAMILIES[family]
    x, is_step = padded(draw), deep_markov.steps_of(padded(draw), LENGTHS).unsqueeze(-1)
    before = weights_of(model, guide, x, LENGTHS, vectorize_particles=vectorised)
    other = torch.where(is_step, x, draw(*x.shape))
    assert not torch.equal(other, x)
    assert torch.equal(weights_of(model, guide, other, LENGTHS, vectorize_particles=vectorised), before)
    if draw is FAMILIES[pv.likelihoods.LearnedScaleNormal]:
        other = torch.where(is_step, x, 1e6)
        assert torch.equal(weights_of(model, guide, other, LENGTHS, vectorize_particles=vectorised), before)
    # A step of a sequence that changes does change its weights, and no others.
    changed = x.clone()
    changed[0, 2] = 1 - changed[0, 2]
    differs = (weights_of(model, guide, changed, LENGTHS, vectorize_particles=vectorised) != before).all(0)
    assert differs.tolist() == [True] + [False] * 5


def log_densities(model, guide, x, lengths, values):
    """log q(z|x) and log p(x, z) of each sequence, at these latents."""
    totals = []
    for program in (guide, model):
        trace = poutine.trace(poutine.condition(program, values)).get_trace(x, lengths)
        trace.compute_log_prob()
        totals.append(sum(trace.nodes[name]["log_prob"] for name in trace.nodes if name == "x" or name in values))
    return totals


def test_a_batch_of_mixed_lengths_equals_each_sequence_alone(double):
    """Cut to its length, at the same latents, a sequence has the same densities."""
    model, guide = networks()
    x = padded(torch.randn)
    values = {f"z_{t}": torch.randn(len(x), 2) for t in range(1, 6)}
    totals = log_densities(model, guide, x, LENGTHS, values)
    for n, length in enumerate(LENGTHS.tolist()):
        own = {f"z_{t}": values[f"z_{t}"][n : n + 1] for t in range(1, length + 1)}
        alone = log_densities(model, guide, x[n : n + 1, :length], LENGTHS[n : n + 1], own)
        for whole, one in zip(totals, alone, strict=True):
            assert torch.allclose(whole[n], one, rtol=0, atol=1e-12)


def test_more_padding_changes_no_density(double):
    """Not exactly: sums over more zeros round in another order."""
    model, guide = networks()
    x = padded(torch.randn)
    values = {f"z_{t}": torch.randn(len(x), 2) for t in range(1, 6)}
    totals = log_densities(model, guide, x, LENGTHS, values)
    longer = torch.cat([x, torch.randn(len(x), 4, 3)], 1)
    more = values | {f"z_{t}": torch.randn(len(x), 2) for t in range(6, 10)}
    for before, after in zip(totals, log_densities(model, guide, longer, LENGTHS, more), strict=True):
        assert torch.allclose(after, before, rtol=0, atol=1e-12)


def test_gradients_of_padded_values_are_zero(double):
    model, guide = networks()
    x = padded(torch.randn).requires_grad_()
    drawn = poutine.trace(guide).get_trace(x, LENGTHS)
    joint = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x, LENGTHS)
    (joint.log_prob_sum() - drawn.log_prob_sum()).backward()
    is_step = deep_markov.steps_of(x, LENGTHS)
    assert (x.grad[~is_step] == 0).all()
    assert (x.grad[is_step] != 0).all()


def test_a_mask_in_the_guide_alone_is_refused(double):
    """The guide's density would leave out what the model's counts."""
    model, guide = networks()

    def unmasked(x, lengths):
        with poutine.mask(mask=True):
            return model(x, torch.full_like(lengths, x.shape[1]))

    with pytest.raises(ValueError, match="the guide masks site 'z_2'"):
        pv.log_weights(unmasked, guide, padded(torch.randn), LENGTHS, num_particles=3)


def test_gates_choose_between_the_linear_map_and_the_network(double):
    transition = deep_markov.GatedTransition(2, 5)
    z = torch.randn(4, 3, 2)
    with torch.no_grad():
        transition.gate[2].weight.zero_()
        for openness, expected in ((-50.0, z), (50.0, transition.proposal(z)), (0.0, (z + transition.proposal(z)) / 2)):
            transition.gate[2].bias.fill_(openness)
            assert torch.allclose(transition(z).mean, expected)  # the linear map starts as the identity


def test_sequences_are_reversed_within_their_lengths():
    x = torch.arange(1.0, 11).reshape(2, 5, 1)
    reversed_ = deep_markov.reverse(x, torch.tensor([3, 5]))
    assert reversed_.squeeze(-1).tolist() == [[3, 2, 1, 4, 5], [10, 9, 8, 7, 6]]
    assert torch.equal(deep_markov.reverse(reversed_, torch.tensor([3, 5])), x)


# --- linear maps: the Kalman filter gives log p(x) -----------------------------------------------------------------------


class LinearStateSpace:
    """z_t = A z_{t-1} + b + noise(Q), z_0 = start, x_t = C z_t + d + noise(R), with Q and R diagonal."""

    def __init__(self):
        self.A, self.b = torch.tensor([[0.9, 0.4], [-0.3, 0.7]]), torch.tensor([0.1, -0.2])
        self.C, self.d = torch.tensor([[1.0, 0.5], [-0.7, 1.2], [0.3, 0.0]]), torch.tensor([0.0, 0.3, -0.5])
        self.q, self.r = torch.tensor([0.6, 0.3]), torch.tensor([0.5, 0.8, 0.4])  # standard deviations
        self.start = torch.tensor([0.5, -1.0])

    def model(self):
        transition = _Linear(self.A, self.b, self.q)
        model = deep_markov.DeepMarkovModel(transition, _Linear(self.C, self.d, self.r), 2)
        model.start.data = self.start
        return model

    def simulate(self, num_data, steps):
        z, x = self.start.expand(num_data, 2), []
        for _ in range(steps):
            z = z @ self.A.T + self.b + self.q * torch.randn(num_data, 2)
            x.append(z @ self.C.T + self.d + self.r * torch.randn(num_data, 3))
        return torch.stack(x, 1)

    def evidence(self, x):
        """log p(x) of one sequence (T, 3), by the Kalman filter."""
        mean, covariance, total = self.start, torch.zeros(2, 2), torch.tensor(0.0)
        for observed in x:
            mean, covariance = self.A @ mean + self.b, self.A @ covariance @ self.A.T + self.q.square().diag()
            spread = self.C @ covariance @ self.C.T + self.r.square().diag()
            total = total + dist.MultivariateNormal(self.C @ mean + self.d, spread).log_prob(observed)
            gain = covariance @ self.C.T @ spread.inverse()
            mean = mean + gain @ (observed - self.C @ mean - self.d)
            covariance = covariance - gain @ self.C @ covariance
        return total

    def evidence_by_one_normal(self, x):
        """The same by brute force: all of x is one normal."""
        powers = [torch.linalg.matrix_power(self.A, t) for t in range(len(x) + 1)]
        blocks = torch.stack([powers[t] for t in range(1, len(x) + 1)])
        mean = blocks @ self.start + torch.stack(
            [sum(powers[s] for s in range(t)) @ self.b for t in range(1, len(x) + 1)]
        )
        noise = torch.zeros(2 * len(x), 2 * len(x))  # from all innovations to all states
        for t in range(len(x)):
            for s in range(t + 1):
                noise[2 * t : 2 * t + 2, 2 * s : 2 * s + 2] = powers[t - s] @ self.q.diag()
        emit = torch.block_diag(*[self.C] * len(x))
        covariance = emit @ noise @ noise.T @ emit.T + self.r.square().repeat(len(x)).diag()
        return dist.MultivariateNormal((mean @ self.C.T + self.d).flatten(), covariance).log_prob(x.flatten())

    def guide(self, x, lengths, inflate=1.0, shift=0.0):
        """p(z_t | z_{t-1}, x_t ... x_T), the exact posterior at inflate=1 and shift=0.

        The future of z_t has log density -z' L z / 2 + l' z; padding adds nothing to L and l.
        """
        is_step, eye = deep_markov.steps_of(x, lengths), torch.eye(2)
        seen, of_x = self.C.T @ (self.C / self.r.square().unsqueeze(-1)), (x - self.d) / self.r.square() @ self.C
        message, vector, conditionals = torch.zeros(len(x), 2, 2), torch.zeros(len(x), 2), []
        for t in reversed(range(x.shape[1])):
            message = torch.where(is_step[:, t, None, None], message + seen, 0.0)
            vector = torch.where(is_step[:, t, None], vector + of_x[:, t], 0.0)
            covariance = (self.q.square().reciprocal().diag() + message).inverse()
            conditionals.insert(0, (covariance, vector))
            shrunk = (eye + message @ self.q.square().diag()).inverse()
            vector = (shrunk @ (vector - message @ self.b).unsqueeze(-1)).squeeze(-1) @ self.A
            message = self.A.T @ shrunk @ message @ self.A
        with pyro.plate("data", len(x)):
            z = self.start
            for t, (covariance, vector) in enumerate(conditionals):
                natural = (z @ self.A.T + self.b) / self.q.square() + vector
                mean = (covariance @ natural.unsqueeze(-1)).squeeze(-1) + shift
                with poutine.mask(mask=is_step[:, t]):
                    z = pyro.sample(f"z_{t + 1}", dist.MultivariateNormal(mean, inflate * covariance))


class _Linear(nn.Module):
    def __init__(self, weight, bias, scale):
        super().__init__()
        self.weight, self.bias, self.scale = weight, bias, scale

    def forward(self, z):
        return dist.Normal(z @ self.weight.T + self.bias, self.scale).to_event(1)


@pytest.fixture
def state_space(double):
    return LinearStateSpace()


def mixed(state_space, num_data, steps):
    """Sequences of all lengths from 1 to `steps`; the padding holds simulated steps, which must not count."""
    lengths = torch.arange(num_data) % steps + 1
    x = state_space.simulate(num_data, steps)
    truth = torch.stack([state_space.evidence(one[:length]) for one, length in zip(x, lengths, strict=True)])
    return x, lengths, truth


def test_the_filter_agrees_with_one_normal(state_space):
    for one in state_space.simulate(3, 6):
        assert torch.allclose(state_space.evidence(one), state_space.evidence_by_one_normal(one), rtol=0, atol=1e-10)


@pytest.mark.parametrize("data_batch_size", ["auto", 5, None])
@pytest.mark.parametrize("vectorised", [True, False])
def test_each_particle_of_the_smoother_gives_the_evidence(state_space, vectorised, data_batch_size):
    """Every log weight is log p(x) of the sequence, cut to its length; also in blocks of data, and with more padding."""
    x, lengths, truth = mixed(state_space, 12, 6)
    options = {"vectorize_particles": vectorised, "data_batch_size": data_batch_size}
    for longer in (x, torch.cat([x, torch.randn(12, 3, 3)], 1)):
        weights = pv.log_weights(state_space.model(), state_space.guide, longer, lengths, num_particles=3, **options)
        assert torch.allclose(weights, truth.expand(3, -1), rtol=0, atol=1e-9)
    lml = pv.log_marginal_likelihood(state_space.model(), state_space.guide, x, lengths, num_particles=1, **options)
    assert torch.allclose(lml.log_prob, truth, rtol=0, atol=1e-9)


def test_a_wrong_guide_still_estimates_the_evidence(state_space):
    """Each sequence within its error, and its ELBO below log p(x) by more at greater lengths."""
    x, lengths, truth = mixed(state_space, 30, 5)

    def guide(x, lengths):
        state_space.guide(x, lengths, inflate=1.3, shift=0.1)

    lml = pv.log_marginal_likelihood(state_space.model(), guide, x, lengths, num_particles=4000)
    assert lml.stderr.max() < 0.05
    for n in range(len(x)):
        within(lml.log_prob[n].item(), truth[n].item(), lml.stderr[n].item())
    gap = (truth - lml.elbo).reshape(-1, 5).mean(0)  # by length, 1 to 5
    assert (gap.diff() > 0).all()


@pytest.mark.parametrize("start", ["the prior", "a guide"])
def test_annealing_of_mixed_lengths_estimates_the_evidence(state_space, uncompiled, short_pilots, start):
    """E[w] = p(x), so the mean of estimate / p(x) over the data is 1."""
    x, lengths, truth = mixed(state_space, 60, 4)

    def guide(x, lengths):
        state_space.guide(x, lengths, inflate=1.5, shift=0.3)

    result = pv.annealed_importance_sampling(
        state_space.model(),
        x,
        lengths,
        guide=None if start == "the prior" else guide,
        num_chains=8,
        num_temperatures=30,
        num_leapfrog_steps=4,
    )
    ratio = (result.log_prob - truth).exp()
    stderr = ratio.std().item() / math.sqrt(len(x))
    assert stderr < 0.1
    within(ratio.mean().item(), 1.0, stderr)


# --- the example as a script ---------------------------------------------------------------------------------------------


def vowels():
    """Series as `pv.data.japanese_vowels` gives them, of other lengths."""
    lengths = torch.tensor([3, 6, 4, 6, 5, 3, 6, 4])
    series = SimpleNamespace(values=torch.randn(8, 6, 12), lengths=lengths)
    return SimpleNamespace(train=series, validation=series, test=series)


def run_example(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["deep_markov.py", *options, "--quiet"])
    deep_markov.main()


@pytest.mark.parametrize("dataset", ["digits", "japanese-vowels"])
def test_the_example_ends_in_a_report(monkeypatch, capsys, short_pilots, dataset):
    monkeypatch.setattr(pv.data, "japanese_vowels", vowels, raising=False)
    few = ("--epochs", "1", "--num-particles", "30", "--num-annealed", "2", "--num-temperatures", "3")
    run_example(monkeypatch, "--dataset", dataset, *few)
    lines = capsys.readouterr().out.splitlines()
    for words in ("log p(x) by importance sampling", "nats per step", "annealing from the prior", "independent steps"):
        assert any(words in line for line in lines), words
    lengths = ["4", "5", "6", "7", "8"] if dataset == "digits" else ["3", "4", "5", "6"]
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows if len(row) == 5 and (row[0].isdigit() or row[0] == "all")] == [*lengths, "all"]
    assert len([row for row in rows if "±" in row and len(row) == 9]) == 2


def test_the_example_says_that_a_package_is_missing(monkeypatch):
    def missing():
        raise ImportError("pip install aeon")

    monkeypatch.setattr(pv.data, "japanese_vowels", missing, raising=False)
    with pytest.raises(SystemExit, match="error: pip install aeon"):
        run_example(monkeypatch, "--dataset", "japanese-vowels")


def test_the_score_of_independent_steps_is_that_by_hand(double):
    """Of the steps that are there: fitted to those of the training data, summed over those of each test sequence."""
    train = (torch.tensor([[[1.0], [0.0]], [[1.0], [9.0]]]), torch.tensor([2, 1]))
    test = (torch.tensor([[[0.0], [1.0]], [[1.0], [0.0]]]), torch.tensor([2, 1]))
    found = deep_markov.log_prob_of_independent_steps(train, test, is_binary=True)
    assert found.tolist() == pytest.approx([math.log(2 / 9), math.log(2 / 3)])
    found = deep_markov.log_prob_of_independent_steps(train, test, is_binary=False)
    normal = dist.Normal(2 / 3, math.sqrt(1 / 3))
    by_hand = [normal.log_prob(torch.tensor([0.0, 1.0])).sum(), normal.log_prob(torch.tensor(1.0))]
    assert found.tolist() == pytest.approx([each.item() for each in by_hand])
