"""Training: the loss by hand, models that do not touch each other, what is kept, what is refused."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from shared.runs import binary, make, parameters, same
from torch import nn
from torch.nn import functional

import pyrovae as pv
from pyrovae.data.forms import as_batch
from pyrovae.training.optimization import OneOptimizer
from pyrovae.training.state import TrainingState
from pyrovae.training.validation import validate


def test_trace_elbo_is_the_loss_written_by_hand(double):
    """-ELBO and its gradients, under the same noise, to float64's rounding."""
    model, guide = (module.double() for module in make())
    x = binary().double()
    every = [*model.named_parameters(), *guide.named_parameters()]
    pyro.set_rng_seed(3)
    loss = Trace_ELBO().loss_and_grads(model, guide, x)
    grads = [parameter.grad.clone() for _, parameter in every]
    for _, parameter in every:
        parameter.grad = None

    pyro.set_rng_seed(3)
    loc, log_scale = guide.head(guide.encoder_net(x)).chunk(2, -1)
    noise = torch.randn(40, 2)
    z = loc + log_scale.exp() * noise
    logits = model.likelihood.decoder_net(z) + model.likelihood.bias.flatten()
    log_likelihood = -functional.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="sum")
    log_prior = -0.5 * (z**2).sum() - 40 * math.log(2 * math.pi)
    log_posterior = (-0.5 * noise**2 - log_scale).sum() - 40 * math.log(2 * math.pi)
    by_hand = -(log_likelihood + log_prior - log_posterior)
    by_hand.backward()

    assert loss == pytest.approx(by_hand.item(), rel=1e-12)
    for (name, parameter), grad in zip(every, grads, strict=True):
        assert torch.allclose(parameter.grad, grad, rtol=1e-9, atol=1e-10), name


def test_one_optimizer_is_pyros_adam_with_a_common_clip():
    x = binary()
    ours, theirs = make(), make()
    rate = 0.01
    optimizers = OneOptimizer([p for m in ours for p in m.parameters()], rate), pyro.optim.Adam({"lr": rate})
    for (model, guide), optimizer in zip((ours, theirs), optimizers, strict=True):
        pyro.set_rng_seed(7)
        svi = SVI(model, guide, optimizer, Trace_ELBO())
        for _ in range(20):
            svi.step(x)
    for a, b in zip(parameters(*ours), parameters(*theirs), strict=True):
        assert torch.allclose(a, b, atol=1e-5)

    parameter, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    parameter.grad, other.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    norms = []
    optimizer = OneOptimizer([parameter, other], rate, clip_norm=1.0)
    original = torch.optim.Adam.step
    try:
        torch.optim.Adam.step = lambda self: norms.append(torch.stack([parameter.grad, other.grad]).norm().item())
        optimizer([parameter, other])
    finally:
        torch.optim.Adam.step = original
    assert norms == pytest.approx([1.0], rel=1e-4)


def steps_by_hand(pairs, turns):
    """Hand-written SVI over several pairs by turns, each with noise of its own; no clear_param_store."""
    svis = [SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()) for model, guide in pairs]
    for turn in range(turns):
        for number, svi in enumerate(svis):
            pyro.set_rng_seed(100 * number + turn)
            svi.step(binary())


def test_two_models_by_turns_in_a_hand_written_svi():
    pairs = [make(0), make(1)]
    starts = [parameters(*pair) for pair in pairs]
    steps_by_hand(pairs, 10)
    assert not any(name for name in pyro.get_param_store()), "nothing is left in Pyro's store"
    for number in range(2):
        alone = [make(0), make(1)]
        svi = SVI(*alone[number], pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        for turn in range(10):
            pyro.set_rng_seed(100 * number + turn)
            svi.step(binary())
        assert same(parameters(*alone[number]), parameters(*pairs[number]))
        for start, now in zip(starts[number], parameters(*pairs[number]), strict=True):
            assert not torch.equal(start, now), "every parameter moves"


def test_two_models_by_turns_with_fit():
    together, apart = [make(0), make(1)], [make(0), make(1)]
    options = {"epochs": 1, "batch_size": 10, "learning_rate": 0.01, "progress": False}
    for turn in range(3):
        for number, pair in enumerate(together):
            pyro.set_rng_seed(100 * number + turn)
            pv.fit(*pair, binary(), **options)
    for number, pair in enumerate(apart):
        for turn in range(3):
            pyro.set_rng_seed(100 * number + turn)
            pv.fit(*pair, binary(), **options)
        assert same(parameters(*pair), parameters(*together[number]))


def test_same_seed_same_training():
    runs = []
    for _ in range(2):
        pyro.set_rng_seed(5)
        model, guide = make()
        result = pv.fit(model, guide, binary(), epochs=3, batch_size=7, validation=binary(20, 2), progress=False)
        runs.append((parameters(model, guide), [row["validation_elbo"] for row in result.history]))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_validation_leaves_the_training_noise_alone():
    runs = []
    for validation in (None, binary(20, 2)):
        pyro.set_rng_seed(5)
        model, guide = make()
        pv.fit(model, guide, binary(), epochs=1, batch_size=7, validation=validation, progress=False)
        runs.append(parameters(model, guide))
    assert same(*runs)


def test_best_validation_state_is_kept():
    """A rate that ruins the model after its best epoch: what is kept scores what that epoch scored."""
    pyro.set_rng_seed(2)
    model, guide = make()
    train, validation = binary(10), binary(200, 2)
    result = pv.fit(
        model, guide, train, epochs=60, batch_size=5, learning_rate=0.05, validation=validation, progress=False
    )
    elbos = [row["validation_elbo"] for row in result.history]
    assert result.best_epoch == 1 + max(range(60), key=elbos.__getitem__) < 60
    assert validate(model, guide, as_batch(validation), Trace_ELBO(), 5)["validation_elbo"] == pytest.approx(
        max(elbos), rel=1e-6
    )
    assert elbos[-1] < max(elbos) - 0.01
    assert "best epoch" in repr(result)


def test_importance_weighted_training_is_validated_by_its_own_bound():
    """The bound of as many particles chooses the epoch, measured as an evaluation would; the ELBO may fall meanwhile."""
    pyro.set_rng_seed(3)
    model, guide = make()
    train, validation = binary(40), binary(2010, 2)  # the last block is ragged
    options = {"epochs": 3, "batch_size": 20, "learning_rate": 0.02, "validation": validation, "progress": False}
    result = pv.fit(model, guide, train, loss=pv.objectives.ImportanceWeighted(20), **options)
    row = result.history[result.best_epoch - 1]
    assert result.bound == "importance-weighted bound"
    assert "validation bound" in repr(result)
    lml = pv.log_marginal_likelihood(model, guide, validation, num_particles=20)
    elbo_error = lml.elbo_stderr.square().sum().sqrt().item() / len(lml)
    for column, found, error in (
        ("validation_bound", lml.mean, lml.mean_mc_stderr),
        ("validation_elbo", lml.elbo.mean().item(), elbo_error),
    ):
        assert abs(found - row[column]) < 5 * math.sqrt(2) * error  # both are Monte Carlo
    assert row["validation_bound"] > row["validation_elbo"] + 0.1

    rows = [(-100.0, -90.0), (-98.0, -91.0), (-99.0, -89.0)]  # bound, elbo
    state = TrainingState(Trace_ELBO(), OneOptimizer([], 1e-3), [nn.Linear(1, 1)], torch.device("cpu"))
    for bound, elbo in rows:
        state.finish_epoch({"validation_bound": bound, "validation_elbo": elbo})
    assert state.best_epoch == 2


def test_validation_of_nothing_touches_no_generator(monkeypatch):
    """On a GPU a seed set after each epoch would have every epoch see the same noise."""
    pair = make()
    monkeypatch.setattr(torch, "manual_seed", None)
    assert all(math.isnan(value) for value in validate(*pair, None, Trace_ELBO(), 10).values())


def test_validation_under_a_subsampled_plate():
    """Blocks that are each scaled up to the full size count by their data: the mean of a ragged division is that of all."""
    data = torch.randn(503, generator=torch.Generator().manual_seed(1))

    def model(x):
        with pyro.plate("data", 10_000, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 10_000, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # the posterior: log weights are log p(x)

    truth = dist.Normal(0.0, 2**0.5).log_prob(data).mean().item()
    for loss in (Trace_ELBO(), pv.objectives.ImportanceWeighted(5)):
        found = validate(model, guide, as_batch(data), loss, 100)
        assert found["validation_bound"] == pytest.approx(truth, rel=1e-5)
        assert found["validation_elbo"] == pytest.approx(truth, rel=1e-5)


def test_history_is_the_real_elbo_whatever_the_objective():
    """elbo = reconstruction - kl is the ELBO also where the loss is another bound, or many particles."""
    x = binary(400)
    model, guide = make()
    truth = pv.log_marginal_likelihood(model, guide, x, num_particles=500)
    losses = [
        Trace_ELBO(),
        Trace_ELBO(num_particles=4),
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(),
        RenyiELBO(num_particles=3),
    ]
    for loss in losses:
        model, guide = make()
        result = pv.fit(
            model, guide, x, epochs=1, batch_size=400, learning_rate=1e-9, loss=loss, schedule=None, progress=False
        )
        row = result.history[0]
        assert row["elbo"] == pytest.approx(row["reconstruction"] - row["kl"])
        spread = 3 / math.sqrt(400)  # nats; the sd of one datum's log weight is below 1
        assert abs(row["elbo"] - truth.elbo.mean().item()) < spread, type(loss)
        if type(loss) is Trace_ELBO:
            assert row["objective"] == pytest.approx(row["elbo"], rel=1e-5)
        assert "_get_trace" not in vars(loss), "the loss is given back as it came"


def test_fit_of_a_program_with_global_parameters():
    """Plain functions with pyro.param, and a plate that scales up to the full data set."""
    x = torch.randn(60, dtype=torch.float32) + 3

    def model(x):
        loc = pyro.param("test_loc", torch.tensor(0.0))
        with pyro.plate("rows", 60, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", 60, subsample_size=len(x)):
            pyro.sample("z", dist.Normal((x + pyro.param("test_loc")) / 2, 0.5**0.5))

    pyro.clear_param_store()
    pyro.param("test_loc", torch.tensor(0.0))
    result = pv.fit(model, guide, x, epochs=60, batch_size=20, learning_rate=0.1, progress=False)
    within(pyro.param("test_loc").item(), x.mean().item(), 0.02)
    exact = dist.Normal(pyro.param("test_loc").detach(), 2**0.5).log_prob(x).mean().item()
    assert result.history[-1]["elbo"] == pytest.approx(exact, abs=0.02), "per datum, the plate's scale taken out"
    pyro.clear_param_store()


def test_transform_is_applied_at_every_use():
    calls = []

    def transform(batch):
        calls.append(batch)
        return pv.data.binarize(batch)

    pv.fit(*make(), torch.rand(10, 1, 4, 3), epochs=2, batch_size=4, transform=transform, progress=False)
    assert [len(call) for call in calls] == [4, 4, 2, 4, 4, 2]


def test_fit_refuses():
    model, guide = make()
    x = binary()
    for options, error, match in (
        ({"epochs": 0}, ValueError, "epochs must be 1 or more, found 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be a whole number"),
        ({"batch_size": -1}, ValueError, "batch_size must be 1 or more"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive"),
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate must be a number, found '1e-3'"),
        ({"clip_norm": True}, TypeError, "clip_norm must be a number, found True"),
        ({"loss": "elbo"}, TypeError, "pyro.infer.ELBO"),
        ({"loss": Trace_ELBO}, TypeError, r"loss must be a pyro.infer.ELBO, Trace_ELBO\(\) for instance"),
        (
            {"schedule": "plateau"},
            TypeError,
            "schedule must be a function from the fraction .* 'plateau' cannot be called",
        ),
        (
            {"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau},
            TypeError,
            "schedule must be a function .* raises TypeError when called with 0.5",
        ),
        ({"schedule": lambda done: "half"}, TypeError, "schedule must be a function .* raises ValueError"),
        ({"transform": "binarize"}, TypeError, "transform must be a function of a batch, or None; found 'binarize'"),
        ({"device": "gpu"}, ValueError, "device must be 'auto', 'cpu' or 'cuda'.*found 'gpu'"),
        (
            {"loss": JitTrace_ELBO()},
            TypeError,
            r"loss=JitTrace_ELBO\(\) reads .* take Trace_ELBO\(\), with compile=True",
        ),
        ({"validation": x[:0]}, ValueError, "validation must hold at least one datum"),
    ):
        with pytest.raises(error, match=match):
            pv.fit(model, guide, x, **{"epochs": 1, "progress": False, **options})
    with pytest.raises(TypeError, match="train must be a tensor"):
        pv.fit(model, guide, [1, 2], progress=False)
    with pytest.raises(ValueError, match="found 0.5: binarise"):
        pv.fit(model, guide, x * 0.5, progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no GPU"):
            pv.fit(model, guide, x, device="cuda", progress=False)


def test_numbers_of_numpy(tmp_path):
    """They train as Python's do, and a checkpoint holds them as such."""
    runs = []
    for number, real in ((lambda n: n, float), (np.int64, np.float64), (np.int32, np.float32)):
        pyro.set_rng_seed(1)
        pair = make()

        def constant(done, one=number(1)):
            return one

        options = {"checkpoint": tmp_path / f"{real.__name__}.pt", "progress": False, "schedule": constant}
        pv.fit(
            *pair,
            binary(),
            epochs=2,
            learning_rate=real(0.25),
            clip_norm=real(2),
            **options,
        )
        pv.fit(
            *make(),
            binary(),
            epochs=2,
            learning_rate=0.25,
            clip_norm=2.0,
            resume=True,
            **options,
        )
        runs.append(parameters(*pair))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_a_loss_that_is_not_finite_stops_the_run():
    model, guide = make()
    with torch.no_grad():
        guide.head.bias.fill_(torch.nan)
    with pytest.raises((RuntimeError, ValueError), match="nan|NaN|constraint"):
        pv.fit(model, guide, binary(), epochs=1, progress=False)


def test_global_settings_are_left_as_they_were():
    import pyro.poutine

    state = pyro.distributions.is_validation_enabled(), pyro.poutine.util.is_validation_enabled(), torch.get_rng_state()
    model, guide = make()
    pv.fit(model, guide, binary(), epochs=1, validation=binary(), progress=False)
    pv.log_marginal_likelihood(model, guide, binary(), num_particles=3)
    assert (pyro.distributions.is_validation_enabled(), pyro.poutine.util.is_validation_enabled()) == state[:2]
    assert model.training
    assert guide.training
    assert not torch.equal(torch.get_rng_state(), state[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model, guide = make()
    result = pv.fit(model, guide, binary(), epochs=2, validation=binary(), progress=False)
    assert result.device.type == "cuda"
    lml = pv.log_marginal_likelihood(model, guide, binary(), num_particles=50)
    assert lml.log_prob.device.type == "cpu"
    assert lml.log_prob.isfinite().all()


def test_programs_without_parameters_are_refused():
    """Modules that neither make param sites of their own nor go through pyro.module."""
    layer = nn.Linear(12, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z.sum(-1, keepdim=True)).to_event(1), obs=x.flatten(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(layer(x.flatten(1)), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"no parameters to train: a plain nn.Module needs pyro.module"):
        pv.fit(model, guide, binary(), epochs=1, batch_size=20, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"checkpoint_every": -1}, ValueError, "checkpoint_every must be 0 seconds or more, found -1"),
        ({"checkpoint_every": float("nan")}, ValueError, "checkpoint_every must be 0 seconds or more, found nan"),
        ({"checkpoint_every": "1"}, TypeError, "checkpoint_every must be a number of seconds, found '1'"),
        ({"resume": True}, ValueError, "found resume=True without a checkpoint"),
        ({"resume": "yes"}, TypeError, "resume must be True or False, found 'yes'"),
        ({"schedule": lambda done: -1.0}, ValueError, r"schedule gives -1 at the fraction 0\.25"),
        (
            {"schedule": lambda done: math.nan if done > 0.6 else 1.0},
            ValueError,
            r"schedule gives nan at the fraction 0\.75",
        ),
        ({"schedule": lambda done: math.inf}, ValueError, "schedule gives inf"),
    ],
)
def test_what_would_be_trained_or_saved_wrongly_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        pv.fit(*make(), binary(), epochs=2, progress=False, **options)


@pytest.mark.parametrize("batch_size", [41, 10**9, 2**62])
def test_a_batch_size_beyond_the_data_costs_nothing(batch_size):
    ends = []
    for size in (40, batch_size):
        pair = make()
        pyro.set_rng_seed(2)
        pv.fit(*pair, binary(), epochs=2, batch_size=size, progress=False)
        ends.append(parameters(*pair))
    assert same(*ends)


@pytest.mark.parametrize("change", [lambda v: v * torch.nan, lambda v: v[..., :2], lambda v: v.long()[0]])
def test_an_error_of_the_validation_data_says_so(change):
    with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
        pv.fit(*make(), binary(), validation=change(binary(6)), epochs=1, progress=False)
    assert "data of validation=" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compile", [False, True])
def test_a_scripted_network(compile):
    """torch keeps its parameters in a mapping of its own."""
    decoder = torch.jit.script(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 12), nn.Unflatten(1, (1, 4, 3))))
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(decoder, (1, 4, 3)))
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(12, [8], 4), 2)
    result = pv.fit(
        model, guide, binary(60), epochs=3, batch_size=20, learning_rate=0.05, compile=compile, progress=False
    )
    assert result.history[-1]["elbo"] > result.history[0]["elbo"]
