"""Objectives on models with sites marked for enumeration: marginalised models, and sums over all values by brute force."""

import functools
import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.optim import Adam
from torch import nn

import pyrovae as pv
from pyrovae.objectives import (
    VIMCO,
    AnalyticKL,
    DoublyReparameterised,
    ImportanceWeighted,
    MonteCarloKL,
    StickingTheLanding,
)
from pyrovae.programs import reruns

K, D, PIXELS = 3, 2, 5
MAKERS = [
    lambda **options: ImportanceWeighted(4, **options),
    lambda **options: DoublyReparameterised(4, **options),
    lambda **options: VIMCO(4, **options),
    lambda **options: MonteCarloKL(4, **options),
    lambda **options: MonteCarloKL(**options),
    lambda **options: StickingTheLanding(4, **options),
]
NAMES = ["ImportanceWeighted", "DoublyReparameterised", "VIMCO", "MonteCarloKL", "one particle", "StickingTheLanding"]


def mixture():
    """(MixtureVAE, the same model with y summed out by its prior, a guide)."""
    prior = pv.priors.MixtureOfNormals(D, K)
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.4, -0.7, 0.1]))
        prior.log_scales += 0.3 * torch.randn(K, D)
    likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(D, [6], PIXELS), (PIXELS,))
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(PIXELS, [6]), D)
    return pv.models.MixtureVAE(prior, likelihood), pv.GenerativeModel(prior, likelihood), guide


def binary(num_data=4):
    return torch.rand(num_data, PIXELS).round()


def loss_and_gradients(objective, model, guide, parameters, *args):
    pyro.set_rng_seed(3)
    loss, parts = objective.surrogate(model, guide, *args)
    return [loss.detach(), *torch.autograd.grad(loss, parameters)], parts


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_mixture_vae_is_the_model_of_the_mixture_prior(make, vectorised, double):
    model, same, guide = mixture()
    x, parameters = binary(), [*model.parameters(), *guide.parameters()]
    found, parts = loss_and_gradients(make(vectorize_particles=vectorised), model, guide, parameters, x)
    expected, known = loss_and_gradients(make(vectorize_particles=vectorised), same, guide, parameters, x)
    assert_same(found, expected)
    assert all(gradient.abs().max() > 1e-3 for gradient in found[1:])
    assert parts.reconstruction.isnan()
    assert parts.kl.isnan()
    assert known.reconstruction.isfinite()


class Classes(nn.Module):
    """Two classes, the second drawn given the first, both behind a latent and the data; a subsample if asked for."""

    def __init__(self, subsample_size=None):
        super().__init__()
        self.subsample_size = subsample_size
        self.first, self.second = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2, 3))
        self.locs, self.shift = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(3))
        self.slope, self.log_scale = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(-0.2))

    def plate(self, x):
        return pyro.plate("data", len(x), subsample_size=self.subsample_size)

    def model(self, x):
        with self.plate(x) as index:
            a = pyro.sample("a", dist.Categorical(logits=self.first), infer={"enumerate": "parallel"})
            b = pyro.sample("b", dist.Categorical(logits=self.second[a]), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.locs[a], 0.8))
            pyro.sample("x", dist.Normal(z * (1.0 + a) + self.shift[b], 0.6), obs=x[index])

    def guide(self, x):
        with self.plate(x) as index:
            pyro.sample("z", dist.Normal(self.slope * x[index], self.log_scale.exp()))

    def log_joint(self, x, z):
        """log p(x, z), by a sum over the pairs of classes."""
        terms = []
        for a, b in product(range(2), range(3)):
            prior = self.first.log_softmax(-1)[a] + self.second.log_softmax(-1)[a, b]
            latent = dist.Normal(self.locs[a], 0.8).log_prob(z)
            terms.append(prior + latent + dist.Normal(z * (1 + a) + self.shift[b], 0.6).log_prob(x))
        return torch.stack(terms).logsumexp(0)


class Marginal(Classes):
    """The classes summed out by hand, as a factor."""

    def model(self, x):
        with self.plate(x) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            # The factor holds everything but the prior of z, which objectives count.
            own = dist.Normal(torch.zeros(()), 1.0).log_prob(z)
            pyro.sample("x", dist.Unit(self.log_joint(x[index], z) - own), obs=torch.empty(0))


@pytest.mark.parametrize("subsample_size", [None, 3])
@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_coupled_classes_against_the_sum_over_all_pairs(make, vectorised, subsample_size, double):
    classes, marginal = Classes(subsample_size), Marginal(subsample_size)
    marginal.load_state_dict(classes.state_dict())
    x = torch.randn(7)
    results = []
    for pair in (classes, marginal):
        objective = make(vectorize_particles=vectorised)
        results.append(loss_and_gradients(objective, pair.model, pair.guide, [*pair.parameters()], x)[0])
    assert_same(*results)
    assert all(gradient.abs().max() > 1e-4 for gradient in results[0][1:])


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_plates_inside_a_datum_and_a_chain(make, double):
    """Two elements with a class each, and a chain of three states, for each datum; sums over all 4 * 8 assignments."""
    logits, locs, x = torch.randn(2, requires_grad=True), torch.randn(2, requires_grad=True), torch.randn(4, 2)
    steps = torch.randn(2, 2, requires_grad=True)
    width = torch.tensor(0.1, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
            with pyro.plate("elements", 2, dim=-1):
                y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(z + locs[y], 0.6), obs=x)
            state = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(3)):
                state = pyro.sample(f"s{t}", dist.Categorical(logits=steps[state]), infer={"enumerate": "parallel"})
                pyro.sample(f"o{t}", dist.Normal(z * state, 0.9), obs=x[:, :1])

    def by_hand(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
            classes = logits.log_softmax(-1) + dist.Normal(z.unsqueeze(-1) + locs, 0.6).log_prob(x.unsqueeze(-1))
            paths = []
            for states in product(range(2), repeat=3):
                path = torch.zeros(())
                for before, now in zip((0, *states), states, strict=False):
                    path = path + steps.log_softmax(-1)[before, now] + dist.Normal(z * now, 0.9).log_prob(x[:, :1])
                paths.append(path)
            total = classes.logsumexp(-1).sum(-1, keepdim=True) + torch.stack(paths).logsumexp(0)
            pyro.sample("x", dist.Unit(total), obs=torch.empty(0))

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), width.exp()))

    parameters = [logits, locs, steps, width]
    results = [loss_and_gradients(make(plate="data"), program, guide, parameters, x)[0] for program in (model, by_hand)]
    assert_same(*results)


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_a_sequential_plate(make, double):
    """The sites of each datum are summed apart; the same numbers as brute force."""
    classes, x = Classes(), torch.randn(3)

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(classes.slope * x[i], classes.log_scale.exp()))

    def model(x):
        for i in pyro.plate("data", len(x)):
            a = pyro.sample(f"a{i}", dist.Categorical(logits=classes.first), infer={"enumerate": "parallel"})
            b = pyro.sample(f"b{i}", dist.Categorical(logits=classes.second[a]), infer={"enumerate": "parallel"})
            z = pyro.sample(f"z{i}", dist.Normal(classes.locs[a], 0.8))
            pyro.sample(f"x{i}", dist.Normal(z * (1.0 + a) + classes.shift[b], 0.6), obs=x[i])

    def by_hand(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(torch.zeros(()), 1.0))
            own = dist.Normal(torch.zeros(()), 1.0).log_prob(z)
            pyro.sample(f"x{i}", dist.Unit(classes.log_joint(x[i], z) - own), obs=torch.empty(0))

    parameters = [*classes.parameters()]
    results = [loss_and_gradients(make(), program, guide, parameters, x)[0] for program in (model, by_hand)]
    assert_same(*results)


def test_value_by_hand(double):
    """The bound from the guide's own draws, and the sum over all pairs of classes."""
    classes, x = Classes(), torch.randn(6)
    draws = []

    def noted(x):
        with poutine.trace() as tracer:
            classes.guide(x)
        draws.append(tracer.trace.nodes["z"])

    loss = ImportanceWeighted(5).loss(classes.model, noted, x)
    z, q = draws[-1]["value"], draws[-1]["fn"]
    assert z.shape == (5, 6)
    expected = (classes.log_joint(x, z) - q.log_prob(z)).logsumexp(0) - math.log(5)
    assert loss == pytest.approx(-expected.sum().item(), abs=1e-10)


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_without_other_latents_the_loss_is_log_p(make, double):
    logits, locs = torch.randn(K, requires_grad=True), torch.randn(K, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[y], 0.7), obs=x)

    x = torch.randn(8)
    exact = (logits.log_softmax(-1) + dist.Normal(locs, 0.7).log_prob(x.unsqueeze(-1))).logsumexp(-1).sum()
    found, _ = loss_and_gradients(make(), model, lambda x: None, [logits, locs], x)
    assert_same(found, [-exact.detach(), *torch.autograd.grad(-exact, [logits, locs])])


def test_masked_data(double):
    """Elements of the data that are masked out do not count."""
    model, same, guide = mixture()
    x, mask, parameters = binary(), torch.rand(4, PIXELS) > 0.4, [*model.parameters(), *guide.parameters()]
    results = []
    for program in (model, same):
        masked = functools.partial(program, observed=mask)
        results.append(loss_and_gradients(ImportanceWeighted(3), masked, guide, parameters, x)[0])
    assert_same(*results)
    assert not torch.allclose(
        results[0][0], loss_and_gradients(ImportanceWeighted(3), same, guide, parameters, x)[0][0]
    )


def options(**more):
    return {"batch_size": 10, "learning_rate": 1e-2, "progress": False, **more}


@pytest.mark.parametrize("compile", [False, True])
def test_fit_trains_as_the_marginalised_model(compile, double):
    """Parameters and history at the same seed, of the two models; recorded too."""
    x, held_out, results = binary(40), binary(12), []
    for which in (0, 1):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        programs = mixture()
        model, guide = programs[which], programs[2]
        pyro.set_rng_seed(6)
        run = pv.fit(
            *(model, guide, x),
            **options(epochs=3, validation=held_out, loss=ImportanceWeighted(5), compile=compile),
        )
        results.append((run.history, [*model.parameters(), *guide.parameters()]))
    (history, found), (expected_history, expected) = results
    for row, other in zip(history, expected_history, strict=True):
        for name in ("objective", "validation_bound"):
            assert math.isfinite(row[name])
            assert row[name] == pytest.approx(other[name], abs=1e-8)
        for name in ("elbo", "reconstruction", "kl", "validation_elbo", "validation_reconstruction", "validation_kl"):
            assert math.isnan(row[name]), name
    assert history[-1]["objective"] > history[0]["objective"]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-7)


@pytest.mark.parametrize("num_particles", [1, 5])
def test_history_is_that_of_the_log_weights(num_particles, double, monkeypatch):
    """At the draws of validation, which is one block here."""
    # A guide with given draws looks like one with a seed, which several particles could not use; here there is one each.
    monkeypatch.setattr(reruns, "_refuse_seeds", lambda pair, draws: None)
    model, _, guide = mixture()
    x, held_out = binary(40), binary(12)
    more = {"epochs": 2, "validation": held_out, "batch_size": 20, "learning_rate": 1e-12}
    history = pv.fit(model, guide, x, **options(loss=ImportanceWeighted(num_particles), **more)).history
    torch.manual_seed(20260101)
    draws = guide.posterior(held_out).sample((num_particles,))
    log_weights = []
    for z in draws:
        drawn = poutine.trace(guide).get_trace(held_out)
        drawn.nodes["z"]["value"] = z
        at_z = poutine.replay(guide, trace=drawn)
        log_weights.append(pv.log_weights(model, at_z, held_out, num_particles=1, vectorize_particles=False))
    log_weights = torch.cat(log_weights)
    exact = (log_weights.logsumexp(0) - math.log(num_particles)).mean().item()
    for row in history:
        assert row["validation_bound"] == pytest.approx(exact, abs=1e-8)
        elbos = [row["elbo"], row["validation_elbo"]]
        if num_particles == 1:
            assert elbos == [row["objective"], row["validation_bound"]]
        else:
            assert all(map(math.isnan, elbos))


def test_the_elbo_of_sums_is_measured_by_the_objective(double):
    """Trace_ELBO would draw y from its prior."""
    model, same, guide = mixture()
    x, held_out = binary(40), binary(12)
    rows = []
    for program, loss in ((model, MonteCarloKL()), (same, Trace_ELBO())):
        pyro.set_rng_seed(6)
        more = {"epochs": 1, "validation": held_out, "loss": loss, "learning_rate": 1e-9, "batch_size": 20}
        rows.append(pv.fit(program, guide, x, **options(**more)).history[0])
    for name in ("objective", "elbo", "validation_bound", "validation_elbo"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-6), name


def test_an_objective_serves_pairs_with_and_without_sums(double):
    model, same, guide = mixture()
    objective, x = MonteCarloKL(2), binary()
    for program, sums in ((model, True), (same, False), (model, True)):
        objective.loss(program, guide, x)
        assert objective.sums_out is sums


def test_a_resumed_run_validates_by_the_objective(tmp_path, double):
    """A resumed run validates with a new objective, which learns from its first look that it sums."""
    x, held_out, rows = binary(40), binary(12), []
    for resumed in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        model, _, guide = mixture()
        path = tmp_path / f"{resumed}.pt"
        more = {"epochs": 3, "validation": held_out, "checkpoint": path, "checkpoint_every": 0.0}
        if resumed:

            def stop(progress):
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                pv.fit(model, guide, x, **options(loss=MonteCarloKL(2), callback=stop, **more))
            pyro.clear_param_store()
        found = pv.fit(model, guide, x, **options(loss=MonteCarloKL(2), resume=resumed, **more))
        rows.append([(row["objective"], row["validation_bound"]) for row in found.history])
    assert rows[0] == rows[1]


def test_svi(double):
    model, _, guide = mixture()
    svi = pyro.infer.SVI(model, guide, Adam({"lr": 1e-2}), ImportanceWeighted(3))
    x = binary(20)
    losses = [svi.step(x) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (AnalyticKL(), "AnalyticKL takes the KL of each site"),
        (MonteCarloKL(beta=2.0), "beta=2.* weighs the KL"),
        (MonteCarloKL(kl_warmup_steps=3), "kl_warmup_steps=3.* weighs the KL"),
        (StickingTheLanding(free_bits=0.1), "free_bits=0.1.* weighs the KL"),
    ],
)
def test_objectives_that_need_a_kl_of_its_own_are_refused(objective, said):
    model, _, guide = mixture()
    with pytest.raises(ValueError, match=rf"{said}.*site\(s\) \['y'\].*no KL apart from its reconstruction"):
        objective.loss(model, guide, binary())


class Proposal(Classes):
    """A guide that marks class a too: q(z|x) = sum_a q(a|x) q(z|a, x)."""

    def __init__(self):
        super().__init__()
        self.weight, self.spread = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))

    def guide(self, x):
        with self.plate(x):
            logits = self.weight * x.unsqueeze(-1)
            a = pyro.sample("a", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(self.slope * x + self.spread[a], self.log_scale.exp()))

    def components(self, x):
        return dist.Normal((self.slope * x).unsqueeze(-1) + self.spread, self.log_scale.exp())

    def log_proposal(self, x, z):
        """log q(a|x) + log q(z|a, x), with a in the last dimension."""
        prior = (self.weight * x.unsqueeze(-1)).log_softmax(-1)
        return prior + self.components(x).log_prob(z.unsqueeze(-1))

    def log_weight(self, x, z):
        return self.log_joint(x, z) - self.log_proposal(x, z).logsumexp(-1)


def mean_gradient(objective, pair, x, parameters, number):
    """(mean, standard error of the mean) of the loss and its gradients per datum."""
    found = []
    for _ in range(number):
        loss, _ = objective.surrogate(pair.model, pair.guide, x)
        gradients = torch.autograd.grad(loss, parameters)
        found.append(torch.cat([loss.detach().reshape(1), *(gradient.flatten() for gradient in gradients)]) / len(x))
    found = torch.stack(found)
    return found.mean(0), found.std(0) / number**0.5


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_a_guide_with_sums_against_quadrature(num_particles, vectorised, double):
    """The ELBO of q(z|x), and its gradient, which has the score of the class that the guide draws."""
    pair, x = Proposal(), torch.tensor([0.7])
    parameters = [*pair.parameters()]
    nodes = torch.linspace(-12, 12, 4001)
    terms = pair.log_proposal(x.expand(4001), nodes).logsumexp(-1).exp() * pair.log_weight(x.expand(4001), nodes)
    exact = -torch.trapezoid(terms, nodes)
    expected = torch.cat([exact.reshape(1), *(g.flatten() for g in torch.autograd.grad(exact, parameters))]).detach()
    objective = MonteCarloKL(num_particles, vectorize_particles=vectorised)
    mean, error = mean_gradient(objective, pair, x.expand(300), parameters, 60)
    assert objective.sums_out
    assert ((mean - expected).abs() <= 4.5 * error + 1e-9).all()
    assert (expected[1:].abs() > 5 * error[1:]).sum() > 8  # the test sees most gradients


def test_vimco_of_a_guide_with_sums_at_its_own_draws(double):
    pair, x = Proposal(), torch.randn(6)
    parameters = [*pair.parameters()]
    draws = []

    def noted(x):
        with poutine.trace() as tracer:
            pair.guide(x)
        draws.append(tracer.trace)

    loss, parts = VIMCO(4).surrogate(pair.model, noted, x)
    found = [loss.detach(), *torch.autograd.grad(loss, parameters)]
    classes, noise = next(
        (t.nodes["a"]["value"], t.nodes["z"]) for t in draws[::-1] if t.nodes["a"]["value"].shape == (4, 6)
    )
    fixed = ((noise["value"] - noise["fn"].loc) / noise["fn"].scale).detach()
    z = pair.slope * x + pair.spread[classes] + pair.log_scale.exp() * fixed
    log_w = pair.log_weight(x, z)
    bound = log_w.logsumexp(0) - math.log(4)
    signal = []
    for s in range(4):
        others = torch.cat([log_w[:s], log_w[s + 1 :]])
        without = torch.cat([others, others.mean(0, keepdim=True)]).logsumexp(0) - math.log(4)
        signal.append((bound - without).detach())
    score = dist.Categorical(logits=pair.weight * x.unsqueeze(-1)).log_prob(classes)
    surrogate = -(bound.sum() + (torch.stack(signal) * (score - score.detach())).sum())
    assert_same(found, [surrogate.detach(), *torch.autograd.grad(surrogate, parameters)])
    assert parts.kl.isnan()


@pytest.mark.parametrize("objective", [ImportanceWeighted(3), DoublyReparameterised(3), StickingTheLanding()])
def test_a_summed_class_of_the_guide_has_no_path(objective, double):
    pair = Proposal()
    with pytest.raises(ValueError, match=r"site 'a' .Categorical. is not reparameterised.*VIMCO"):
        objective.loss(pair.model, pair.guide, torch.randn(4))


@pytest.mark.parametrize("compile", [False, True])
def test_a_guide_with_sums_is_trained_and_validated(compile, double):
    pair, x, held_out = Proposal(), torch.randn(40), torch.randn(12)

    def model(x):
        pyro.module("pair", pair)
        pair.model(x)

    def guide(x):
        pyro.module("pair", pair)
        pair.guide(x)

    more = {"epochs": 30, "validation": held_out, "batch_size": 20, "learning_rate": 2e-2}
    history = pv.fit(model, guide, x, **options(loss=VIMCO(5), compile=compile, **more)).history
    assert history[-1]["validation_bound"] > history[0]["validation_bound"] + 0.1
    with torch.no_grad():
        nodes = torch.linspace(-12, 12, 4001).unsqueeze(-1)
        evidence = torch.trapezoid(pair.log_joint(held_out, nodes).exp(), nodes, dim=0).log().mean().item()
    assert evidence - 0.5 < max(row["validation_bound"] for row in history) < evidence + 0.3


@pytest.mark.parametrize("layer", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(4)])
def test_a_guide_with_sums_and_other_runs_in_training_is_refused(layer, double):
    pair, net = Proposal(), nn.Sequential(nn.Linear(1, 4), layer(), nn.Linear(4, 2)).double()
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=net(x.unsqueeze(-1))), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(pair.spread[a], 1.0))

    with pytest.raises(ValueError, match=r"site\(s\) \['a'\] of the guide .*in training mode the two runs differ"):
        VIMCO(2).loss(pair.model, guide, torch.randn(6))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.eval()
    assert math.isfinite(VIMCO(2).loss(pair.model, guide, torch.randn(6)))


def test_a_marked_site_that_the_guide_draws_is_a_latent_like_others(double):
    """As in an evaluation: VIMCO has its score, and the importance-weighted bound with path gradients refuses it."""
    classes, x = Classes(), torch.randn(5)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(classes.slope * x, 0.8))
            pyro.sample("a", dist.Categorical(logits=torch.zeros(2)))

    objective = VIMCO(3)
    assert math.isfinite(objective.loss(classes.model, guide, x))
    assert objective.sums_out
    with pytest.raises(ValueError, match="site 'a' .Categorical. is not reparameterised"):
        ImportanceWeighted(3).loss(classes.model, guide, x)


def test_what_cannot_be_summed_is_refused(double):
    def mixing(x):
        """The density of a datum depends on the classes of the others."""
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + y.roll(1, -1), 1.0), obs=x)

    def scaled(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

    def masked(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=torch.arange(len(x)) > 1):
                y = pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="has another log density with all values of site"):
        MonteCarloKL().loss(mixing, guide, torch.randn(6))
    with pytest.raises(ValueError, match=r"site 'x' carries a scale of 0\.5"):
        MonteCarloKL().loss(scaled, guide, torch.randn(6))
    with pytest.raises(ValueError, match="the model masks latent site 'y'"):
        MonteCarloKL().loss(masked, guide, torch.randn(6))
