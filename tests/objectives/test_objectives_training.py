"""Objectives in use: by SVI and by `fit`, recorded, with programs of every kind; and what they refuse."""

import copy
import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO
from shared.parts import LATENT_DIM, PRIORS, SHAPE
from torch import nn

import pyrovae as pv
from pyrovae import objectives
from pyrovae.compiled.record import record
from pyrovae.objectives import runs
from pyrovae.training.losses import EpochSums, ReportingLoss, surrogate

# name -> make(): every objective, with what it can be asked for
OBJECTIVES = {
    "MonteCarloKL": lambda: objectives.MonteCarloKL(2, beta=0.9, free_bits=0.01),
    "AnalyticKL": lambda: objectives.AnalyticKL(beta=0.9, kl_warmup_steps=30),
    "StickingTheLanding": lambda: objectives.StickingTheLanding(2),
    "ImportanceWeighted": lambda: objectives.ImportanceWeighted(5),
    "DoublyReparameterised": lambda: objectives.DoublyReparameterised(5),
    "VIMCO": lambda: objectives.VIMCO(5),
}


class Codes(nn.Module):
    """A model and guide with a discrete latent."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(3, 12), nn.Linear(12, 3)

    def model(self, x):
        pv.programs.parameters.emit_parameters(self, "codes")
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(logits=torch.zeros(3)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(b)).to_event(1), obs=x.flatten(1))

    def guide(self, x):
        pv.programs.parameters.emit_parameters(self, "codes")
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=self.encoder(x.flatten(1))).to_event(1))


def make(seed=0):
    torch.manual_seed(seed)
    model = pv.GenerativeModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 12), (1, 4, 3))
    )
    return model, pv.guides.MeanFieldNormal(pv.nets.MLP(12, [8]), 2)


def binary(num_data=40):
    """Two kinds of pictures, so that there is something to encode."""
    generator = torch.Generator().manual_seed(1)
    kind = torch.bernoulli(torch.full((num_data, 1, 1, 1), 0.4), generator=generator)
    return torch.bernoulli((0.1 + 0.8 * kind).expand(num_data, 1, 4, 3), generator=generator)


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


@pytest.fixture
def not_compiled(monkeypatch):
    """Recordings run as they are: the graph is what is tested, and Inductor takes seconds."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)


def test_every_objective_is_listed():
    import inspect

    concrete = {
        name for name in objectives.__all__ if name != "Parts" and not inspect.isabstract(getattr(objectives, name))
    }
    assert concrete == set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_svi_and_fit_lower_the_loss(name):
    x = binary()
    model, guide = make()
    objective = OBJECTIVES[name]()
    before = [parameter.detach().clone() for module in (model, guide) for parameter in module.parameters()]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), objective)
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 15
    for old, new in zip(before, [*model.parameters(), *guide.parameters()], strict=True):
        assert not torch.equal(old, new)
    assert isinstance(svi.evaluate_loss(x), float)

    x = binary(400)  # where both averages are known to 0.1 nats
    model, guide = make()
    options = {"epochs": 20, "batch_size": 100, "learning_rate": 0.03, "progress": False}
    result = pv.fit(model, guide, x, loss=OBJECTIVES[name](), validation=x, **options)
    first, last = result.history[0], result.history[-1]
    assert last["validation_elbo"] > first["validation_elbo"] + 0.5
    assert last["elbo"] == pytest.approx(last["reconstruction"] - last["kl"])
    # elbo is the real one, of whatever objective: the training's average lies near the validation's.
    assert abs(last["elbo"] - last["validation_elbo"]) < 0.6
    assert not {"surrogate", "_get_trace"} & set(vars(objective)), "the loss is given back as it came"


@pytest.mark.parametrize("loss", [objectives.VIMCO(5), objectives.MonteCarloKL(5), objectives.AnalyticKL(5)])
def test_discrete_codes_train(loss):
    x, codes = binary(), Codes()
    result = pv.fit(codes.model, codes.guide, x, loss=loss, epochs=40, learning_rate=0.05, progress=False)
    assert result.history[-1]["elbo"] > result.history[0]["elbo"] + 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_recorded_is_eager(name, double, not_compiled):
    """Loss, parts and gradients of a recording, and of the eager loss under the same noise."""
    model, guide = (module.double() for module in make())
    x = binary().double()
    objective = OBJECTIVES[name]()
    parameters = [*model.parameters(), *guide.parameters()]
    objective.differentiable_loss(model, guide, x)
    recorded = record(
        lambda x: surrogate(objective, model, guide, x), [model, guide, *objective.modules], (x,), gradients=True
    )
    assert recorded is not None
    for seed in range(2):
        pyro.set_rng_seed(seed)
        (loss, reconstruction, kl), found = recorded(x)
        pyro.set_rng_seed(seed)
        eager = objective.differentiable_loss(model, guide, x)
        assert loss.item() == pytest.approx(eager.item(), rel=1e-10)
        assert reconstruction.item() == pytest.approx(objective.last.reconstruction.item(), rel=1e-10)
        assert kl.item() == pytest.approx(objective.last.kl.item(), rel=1e-10)
        for one, other in zip(found, gradients(eager, parameters), strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prior", ["VampPrior", pytest.param("NeuralSplineFlow", marks=pytest.mark.slow)])
def test_recorded_is_eager_for_other_priors(prior, double, not_compiled):
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(12, [8]), LATENT_DIM).double()
    model = pv.GenerativeModel(PRIORS[prior](guide), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 12), SHAPE)).double()
    x, objective = binary().double(), objectives.DoublyReparameterised(3)
    objective.loss(model, guide, x)
    recorded = record(lambda x: surrogate(objective, model, guide, x), [model, guide], (x,), gradients=True)
    pyro.set_rng_seed(0)
    (loss, _, _), found = recorded(x)
    pyro.set_rng_seed(0)
    eager = objective.differentiable_loss(model, guide, x)
    assert loss.item() == pytest.approx(eager.item(), rel=1e-10)
    for one, other in zip(found, gradients(eager, recorded.parameters), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_recorded_discrete_codes(double, not_compiled):
    x, codes = binary().double(), Codes()
    for objective in (objectives.VIMCO(3), objectives.MonteCarloKL(2)):
        objective.differentiable_loss(codes.model, codes.guide, x)
        model, guide = codes.model, codes.guide
        recorded = record(lambda x: surrogate(objective, model, guide, x), [codes], (x,), gradients=True)  # noqa: B023
        pyro.set_rng_seed(0)
        (loss, _, _), found = recorded(x)
        pyro.set_rng_seed(0)
        eager = objective.differentiable_loss(model, guide, x)
        assert loss.item() == pytest.approx(eager.item(), rel=1e-10)
        for one, other in zip(found, gradients(eager, list(codes.parameters())), strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_recording_sees_the_schedule_move(compiled, double, request):
    if not compiled:
        request.getfixturevalue("not_compiled")
    model, guide = (module.double() for module in make())
    x = binary().double()
    objective = objectives.AnalyticKL(beta=0.5, kl_warmup_steps=4)
    objective.loss(model, guide, x)
    recorded = record(
        lambda x: surrogate(objective, model, guide, x), [model, guide, *objective.modules], (x,), gradients=True
    )
    for step in range(6):
        (loss, reconstruction, kl), _ = recorded(x)
        weight = 0.5 * min(1.0, step / 4)
        assert loss.item() == pytest.approx((weight * kl - reconstruction).item(), rel=1e-12)
        objective.advance()
    objective.load_state_dict({"num_steps": 2})
    (loss, reconstruction, kl), _ = recorded(x)
    assert loss.item() == pytest.approx((0.25 * kl - reconstruction).item(), rel=1e-12)
    assert recorded.num_recordings == 1


@pytest.mark.parametrize("name", ["AnalyticKL", pytest.param("DoublyReparameterised", marks=pytest.mark.slow)])
def test_fit_compiled_is_fit(name):
    """Two ragged epochs: same parameters, same history, same number of steps on the clock."""
    runs = []
    for compile in (False, True):
        model, guide = make()
        objective = OBJECTIVES[name]()
        pyro.set_rng_seed(1)
        options = {"epochs": 3, "batch_size": 15, "progress": False, "compile": compile, "loss": objective}
        result = pv.fit(model, guide, binary(), **options)
        rows = [[row[key] for key in ("objective", "elbo", "kl")] for row in result.history]
        runs.append((rows, [*model.parameters(), *guide.parameters()], objective.state_dict()))
    (rows, parameters, state), (other_rows, other_parameters, other_state) = runs
    assert state == other_state
    assert state.get("num_steps", 9) == 9
    for row, other in zip(rows, other_rows, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    for one, other in zip(parameters, other_parameters, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_holds_the_schedule(tmp_path):
    model, guide = make()
    objective = objectives.AnalyticKL(kl_warmup_steps=10)
    pv.fit(model, guide, binary(), loss=objective, epochs=2, batch_size=10, progress=False)
    assert objective.state_dict() == {"num_steps": 8, "beta": 1.0}
    pv.save(tmp_path / "pair.pt", model, guide, objective=objective.state_dict())
    other = objectives.AnalyticKL(kl_warmup_steps=10)
    other.load_state_dict(pv.load(tmp_path / "pair.pt", *make())["objective"])
    assert other.state_dict() == {"num_steps": 8, "beta": 1.0}
    assert objectives.ImportanceWeighted(2).state_dict() == {}


def test_looking_at_a_pair_leaves_noise_and_modes_alone():
    model, guide = make()
    guide.eval()
    before = torch.get_rng_state()
    objectives.ImportanceWeighted(3)._look_at(model, guide, (binary(),), {})
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert not guide.training


@pytest.mark.parametrize("name", OBJECTIVES)
def test_particles_one_by_one_are_the_same_estimator(name, double):
    """A program that no outer plate fits: drawn by turns, of one and the same subsample; exact at the posterior."""
    x = torch.randn(10)

    def model(x):
        with pyro.plate("data", 10, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
            pyro.sample("x", dist.Normal(z.reshape(4), 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", 10, subsample_size=4) as index:
            pyro.sample("z", dist.Normal(x[index] / 2, math.sqrt(0.5)))

    objective = getattr(objectives, name)(3)
    evidence = dist.Normal(0.0, math.sqrt(2)).log_prob(x)
    pyro.set_rng_seed(0)
    value = -objective.loss(model, guide, x)
    assert not objective._looked_at[model, guide][1], "drawn by turns"
    if name != "AnalyticKL":  # whose integrand is not constant
        values = 2.5 * torch.combinations(evidence, 4).sum(1)
        assert (values - value).abs().min() < 1e-9, "all particles belong to one subsample"


def test_sequential_plates(double):
    """The same numbers from a loop over the data as from a vectorised plate, DReG's weights in their places."""
    x = torch.tensor([0.3, -1.0, 2.0])
    a = torch.tensor(0.4, requires_grad=True)

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(a * x[i], 0.9))

    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 0.7), obs=x[i])

    for make in (objectives.DoublyReparameterised, objectives.ImportanceWeighted, objectives.StickingTheLanding):
        objective = make(4, plate="data")
        objective.loss(model, guide, x)
        pyro.set_rng_seed(5)
        (found,) = gradients(objective.differentiable_loss(model, guide, x), [a])
        pyro.set_rng_seed(5)
        noise = torch.stack([torch.randn(4) for _ in x], 1)
        z = a * x + 0.9 * noise
        q = dist.Normal((a if make is objectives.ImportanceWeighted else a.detach()) * x, 0.9).log_prob(z)
        log_weights = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.7).log_prob(x) - q
        if make is objectives.DoublyReparameterised:
            surrogate = (log_weights.detach().softmax(0) ** 2 * log_weights).sum()
        elif make is objectives.ImportanceWeighted:
            surrogate = log_weights.logsumexp(0).sum()
        else:
            surrogate = log_weights.mean(0).sum()
        assert torch.allclose(found, gradients(-surrogate, [a])[0], rtol=1e-10)
    with pytest.raises(ValueError, match="a sequential plate has a site for each datum"):
        objectives.MonteCarloKL(free_bits=0.1, plate="data").loss(model, guide, x)


def test_a_program_without_a_common_plate_is_one_datum(double):
    """Bayesian regression: a global latent and a subsampled plate, the ELBO of which is linear in every scale."""
    x = torch.randn(20) + 1

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])

    scale = torch.tensor(0.3, requires_grad=True)

    def guide(x):
        pyro.sample("loc", dist.Normal(0.9, scale))

    losses = []
    for objective in (Trace_ELBO(), objectives.MonteCarloKL()):
        objective.loss(model, guide, x)
        pyro.set_rng_seed(1)
        loss = objective.differentiable_loss(model, guide, x)
        losses.append([loss.item(), gradients(loss, [scale])[0].item()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert objective.last.full_size == 20
    with pytest.raises(ValueError, match="carries a scale of 4"):
        objectives.ImportanceWeighted(3).loss(model, guide, x)


def test_history_of_pyros_enumeration_claims_no_parts():
    """Log densities of enumerated sites are no draws: the parts are unavailable, the ELBO is what the loss knows."""
    x, codes = binary(), Codes()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Bernoulli(logits=codes.decoder(b.unsqueeze(-1) * torch.ones(3))).to_event(1), obs=x)

    @pyro.infer.config_enumerate
    def guide(x):
        pv.programs.parameters.emit_parameters(codes, "codes")
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("b", dist.Bernoulli(logits=codes.encoder(x).sum(-1)))

    loss = TraceEnum_ELBO(max_plate_nesting=1)
    result = pv.fit(model, guide, x.flatten(1), loss=loss, epochs=30, learning_rate=0.05, progress=False)
    assert result.history[-1]["objective"] > result.history[0]["objective"] + 1
    assert all(math.isnan(row[key]) for row in result.history for key in ("kl", "reconstruction"))
    assert all(row["elbo"] == row["objective"] for row in result.history)


def test_fit_reads_the_parts_off_thesurrogate():
    model, guide = make()
    objective = objectives.AnalyticKL(beta=3.0)
    _, parts = ReportingLoss(objective).loss_and_grads(model, guide, binary())
    sums = EpochSums()
    sums.add(parts, 40)
    elbo, reconstruction, kl = sums.means()
    assert reconstruction == pytest.approx(objective.last.reconstruction.item() / 40)
    assert kl == pytest.approx(objective.last.kl.item() / 40)
    assert elbo == pytest.approx(reconstruction - kl)


@pytest.mark.parametrize(
    "loss",
    [Trace_ELBO(), Trace_ELBO(num_particles=2), TraceEnum_ELBO(strict_enumeration_warning=False), objectives.VIMCO(3)],
    ids=lambda loss: type(loss).__name__,
)
def test_a_reporting_loss_is_the_loss(loss):
    """Same numbers and noise; its state is the loss's own (the depth of plates, guessed once), which stays as it was."""
    model, guide = make()
    ReportingLoss(loss).loss(model, guide, binary())
    assert loss.max_plate_nesting == (1 if isinstance(loss, TraceEnum_ELBO) else math.inf)
    kinds, state = [], []
    for run in (loss.loss_and_grads, ReportingLoss(loss).loss_and_grads):
        pyro.set_rng_seed(0)
        found = run(model, guide, binary())
        kinds.append(found[0] if isinstance(found, tuple) else found)
        state.append((vars(loss).keys(), loss.max_plate_nesting, torch.rand(3).tolist()))
    assert kinds[0] == kinds[1]
    assert state[0] == state[1]
    assert "_get_trace" not in vars(loss)
    pyro.set_rng_seed(0)
    value, parts = ReportingLoss(loss).loss(model, guide, binary())
    if not isinstance(loss, objectives.VIMCO):
        assert -value == pytest.approx(sum(part.reconstruction - part.kl for part in parts).item(), rel=1e-6)
    assert len(parts) == (1 if isinstance(loss, objectives.VIMCO) else loss.num_particles)


@pytest.mark.parametrize(
    ("loss", "bound"),
    [
        (objectives.ImportanceWeighted(1), "ELBO"),
        (objectives.ImportanceWeighted(2), "importance-weighted bound"),
        (objectives.DoublyReparameterised(2), "importance-weighted bound"),
        (objectives.AnalyticKL(beta=4.0), "ELBO"),
        (Trace_ELBO(num_particles=5), "ELBO"),
        (RenyiELBO(), "ELBO"),
        (TraceEnum_ELBO(strict_enumeration_warning=False), "ELBO"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_result_names_the_bound_of_its_validation(loss, bound):
    result = pv.fit(*make(), binary(), validation=binary(), loss=loss, epochs=1, progress=False)
    assert result.bound == bound
    assert ("validation bound" in repr(result)) == (bound != "ELBO")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_leaves_nothing_behind(name, monkeypatch):
    """No circle of references through autograd's graph, whose tensors would wait for the garbage collector."""
    draws = []
    original = runs.draw_runs

    def draw_runs(*arguments):
        runs = original(*arguments)
        draws.extend(weakref.ref(run.guide_trace.nodes["z"]["value"]) for run in runs)
        draws.extend(weakref.ref(run.paths.drawn[0]) for run in runs if run.paths is not None)
        return runs

    monkeypatch.setattr("pyrovae.objectives.base.draw_runs", draw_runs)
    objective, (model, guide) = OBJECTIVES[name](), make()
    gc.collect()
    gc.disable()
    try:
        objective.loss_and_grads(model, guide, binary())
        assert draws
        assert not any(draw() is not None for draw in draws)
    finally:
        gc.enable()


def test_num_particles_and_repr_agree():
    for make in OBJECTIVES.values():
        objective = make()
        assert isinstance(objective, pyro.infer.ELBO)
        assert f"num_particles={objective.num_particles}" in repr(objective)
        assert repr(objective).startswith(type(objective).__name__)
        assert copy.deepcopy(objective).num_particles == objective.num_particles


def test_an_elbo_module_as_pyro_makes_it():
    model, guide = make()
    module = objectives.StickingTheLanding()(model, guide)
    module(binary()).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: objectives.ImportanceWeighted(0), "num_particles must be 1 or more"),
        (lambda: objectives.VIMCO(1), "num_particles must be 2 or more, found 1"),
        (lambda: objectives.AnalyticKL(beta=-1.0), "beta must be 0 or more, found -1"),
        (lambda: objectives.AnalyticKL(beta=math.nan), "beta must be 0 or more, found nan"),
        (lambda: objectives.MonteCarloKL(free_bits=-0.1), "free_bits must be 0 or more"),
        (lambda: objectives.MonteCarloKL(kl_warmup_steps=-3), "kl_warmup_steps must be 1 or more"),
        (
            lambda: objectives.MonteCarloKL(vectorize_particles="yes"),
            "vectorize_particles must be True, False or 'auto'",
        ),
        (lambda: objectives.AnalyticKL().load_state_dict({"step": 1}), "found \\['step'\\]"),
        (lambda: objectives.VIMCO(2).load_state_dict({"num_steps": 1}), "VIMCO has no state"),
    ],
)
def test_errors_at_construction(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("name", ["StickingTheLanding", "DoublyReparameterised", "ImportanceWeighted"])
def test_draws_that_are_not_reparameterised_are_refused(name):
    codes = Codes()
    with pytest.raises(ValueError, match=r"site 'b' \(Bernoulli\) is not reparameterised: take VIMCO or MonteCarloKL"):
        OBJECTIVES[name]().loss_and_grads(codes.model, codes.guide, binary())


@pytest.mark.parametrize("flow", ["planar", "radial", "sylvester", "block_autoregressive"])
def test_flows_without_an_inverse(flow):
    """Each knows the density of its last draw alone; the loss of several particles is that of Pyro, draw by draw."""
    torch.manual_seed(0)
    parts = nn.ModuleList([nn.Linear(3, 4), nn.Linear(2, 3), getattr(transforms, flow)(2)])
    x = torch.randn(20, 3)

    def model(x):
        pyro.module("parts", parts)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(parts[1](z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("parts", parts)
        with pyro.plate("data", len(x)):
            loc, log_scale = parts[0](x).chunk(2, -1)
            base = dist.Normal(loc, log_scale.exp()).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [parts[2]]))

    found = []
    for loss in (Trace_ELBO(num_particles=3), objectives.MonteCarloKL(3)):
        pyro.set_rng_seed(1)
        found.append(loss.loss_and_grads(model, guide, x))
        found.append(torch.cat([p.grad.flatten() for p in parts.parameters()]))
        parts.zero_grad()
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    torch.testing.assert_close(found[3], found[1], rtol=1e-4, atol=1e-4)
    assert objectives.ImportanceWeighted(3).loss(model, guide, x) < found[0]
    for loss in (objectives.StickingTheLanding(2), objectives.DoublyReparameterised(2)):
        with pytest.raises(ValueError, match="density of site 'z' cannot be computed at a given value"):
            loss.loss_and_grads(model, guide, x)


def test_pairs_that_do_not_match_are_refused():
    model, _ = make()
    x = binary()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"does not sample the model's latent site\(s\) \['z'\]"):
        objectives.MonteCarloKL().loss(model, guide, x)

    def enumerated(x):
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1), infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match="marked for enumeration"):
        objectives.VIMCO(2).loss(Codes().model, enumerated, x)

    def no_latents(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(torch.full((12,), 0.5)).to_event(1), obs=x.flatten(1))

    with pytest.raises(ValueError, match="no latent sites"):
        objectives.MonteCarloKL().loss(no_latents, lambda x: None, x)

    def odd(x):
        with pyro.plate("data", 40):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Bernoulli(logits=z.reshape(40, 2)[:, :1] * torch.ones(12)).to_event(1), obs=x.flatten(1)
            )

    _, guide = make()
    with pytest.raises(ValueError, match="cannot draw its particles under an outer plate"):
        objectives.ImportanceWeighted(2, vectorize_particles=True).loss(odd, guide, x)
    assert math.isfinite(objectives.ImportanceWeighted(2).loss(odd, guide, x))


def test_a_pair_is_looked_at_before_it_is_recorded(not_compiled, caplog):
    model, guide = make()
    objective = objectives.AnalyticKL()
    assert record(lambda x: surrogate(objective, model, guide, x), [model, guide], (binary(),)) is None
    assert "run one step eagerly" in caplog.text


def test_handlers_outside_are_honoured():
    """An objective's own handlers nest in the user's: a masked program trains on what is left."""
    model, guide = make()
    x = binary()
    masked = poutine.mask(model, mask=False), poutine.mask(guide, mask=False)
    assert objectives.MonteCarloKL().loss(*masked, x) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "loss", [pv.objectives.MonteCarloKL(), pv.objectives.AnalyticKL(), pv.objectives.ImportanceWeighted(2)]
)
def test_objectives_refuse_half_precision(dtype, loss):
    model, guide = (module.to(dtype) for module in make())
    with pytest.raises(ValueError, match=r"the log density of site .* is in torch\.b?float16.*model\.float\(\)"):
        pv.fit(model, guide, binary().to(dtype), loss=loss, epochs=1, progress=False)


@pytest.mark.parametrize(
    "loss",
    [
        pv.objectives.MonteCarloKL(num_particles=700, vectorize_particles=False),
        pv.objectives.ImportanceWeighted(700, vectorize_particles=False),
        pv.objectives.DoublyReparameterised(700, vectorize_particles=False),
    ],
)
def test_many_particles_one_by_one(loss):
    """As many as Python could not call through one inside the other."""
    model, guide = make()
    value = loss.loss_and_grads(model, guide, binary(2))
    assert math.isfinite(value)
