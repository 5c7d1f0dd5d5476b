"""The recorded and compiled step against Pyro's own: same noise, same loss, same gradients; what stays alive in it."""

import logging
import os
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from shared.parts import build, combinations, draw
from shared.processes import run
from shared.recorded import assert_same_step, eager_step, recorded_step
from shared.runs import binary, make, parameters
from torch import nn

import pyrovae as pv
from pyrovae.compiled.record import Recording, record
from pyrovae.data.forms import as_batch
from pyrovae.training.acceleration import record_step, step_pays_off
from pyrovae.training.optimization import OneOptimizer


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_compiled_step_is_pyros_step(dtype, rtol, num_particles):
    model, guide = (module.to(dtype) for module in make())
    batch, loss = binary().to(dtype), Trace_ELBO(num_particles=num_particles)
    assert_same_step(eager_step(model, guide, batch, loss), recorded_step(model, guide, batch, loss), rtol)


@pytest.mark.parametrize(("prior", "guide", "likelihood", "decoder", "encoder"), list(combinations()))
def test_every_part_records_as_pyros_step(uncompiled, double, prior, guide, likelihood, decoder, encoder):
    eager = guide in ("Refined", "DefensiveMixture")  # made for evaluation: `fit` runs them eagerly, and says so
    model, guide = (module.double() for module in build(prior, guide, likelihood, decoder, encoder))
    batch = draw(likelihood).double()
    if eager:
        assert (
            record_step(
                model,
                guide,
                Trace_ELBO(),
                None,
                [model, guide],
                None,
                None,
                as_batch(batch, batch.dtype),
                torch.arange(len(batch)),
            )
            is None
        )
        return
    assert_same_step(eager_step(model, guide, batch), recorded_step(model, guide, batch), 1e-9)


def fit(compile, **options):
    model, guide = (module.double() for module in make())
    pyro.set_rng_seed(2)
    grey = torch.rand(47, 1, 4, 3, dtype=torch.float64)
    result = pv.fit(
        model,
        guide,
        grey,
        transform=pv.data.binarize,
        validation=binary().double(),
        epochs=4,
        batch_size=10,
        learning_rate=1e-2,
        compile=compile,
        progress=False,
        **options,
    )
    return result, parameters(model, guide)


def test_fit_gives_the_same_numbers_compiled(caplog):
    """Shuffling, binarisation and latents drawn alike; a ragged last batch, the schedule and clipping included."""
    eager, expected = fit(False, clip_norm=1.0)
    with caplog.at_level(logging.WARNING, "pyrovae"):
        compiled, found = fit(True, clip_norm=1.0)
    assert not caplog.records
    for name in ("objective", "elbo", "reconstruction", "kl", "validation_elbo", "learning_rate"):
        assert [row[name] for row in compiled.history] == pytest.approx([row[name] for row in eager.history], rel=1e-9)
    assert compiled.best_epoch == eager.best_epoch
    for first, second in zip(expected, found, strict=True):
        assert torch.allclose(first, second, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_a_library_that_a_killed_process_left_unfinished_is_compiled_again(tmp_path, monkeypatch, caplog):
    program = """
import logging, sys, torch
from pyrovae.compiled.record import record
logging.basicConfig()
layer = torch.nn.Linear(3, 2)
found = record(lambda x: (layer(x).sin().exp().sum(),), [layer], (torch.ones(5, 3),))
print("compiled" if found is not None else "eager")
"""

    def compiled():
        done = run(program, TORCHINDUCTOR_CACHE_DIR=tmp_path)
        return done.stdout.strip(), done.stderr

    assert compiled()[0] == "compiled"
    libraries = [path for path in tmp_path.rglob("*.so") if path.stat().st_size]
    assert libraries
    for path in libraries:
        path.write_bytes(b"")
    assert compiled() == ("compiled", "")


def test_what_stays_alive_in_a_recording(uncompiled):
    """Noise, parameters, captured tensors changed in place; what does not: Python's numbers, as documented."""
    layer = nn.Linear(3, 1)
    beta, frozen = torch.tensor(1.0), [2.0]

    def function(x):
        return layer(x).sum() * beta * frozen[0], torch.randn(())

    x = torch.ones(4, 3)
    recorded = record(function, [layer], (x,), gradients=True)
    state = torch.get_rng_state()
    (first, noise), _ = recorded(x)
    (second, other_noise), gradients = recorded(x)
    assert first == second == layer(x).sum() * 2
    assert noise != other_noise
    torch.set_rng_state(state)
    assert noise == torch.randn(())
    assert [gradient.shape for gradient in gradients] == [(1, 3), (1,)]
    beta.fill_(3.0)
    with torch.no_grad():
        layer.weight += 1
    frozen[0] = 100.0
    assert recorded(x)[0][0].item() == pytest.approx((layer(x).sum() * 3 * 2).item())
    assert recorded.num_recordings == 1


def test_recording_takes_no_random_numbers_and_leaves_buffers_and_gradients(uncompiled):
    layer = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout())
    before, state = [buffer.clone() for buffer in layer.buffers()], torch.get_rng_state()
    assert record(
        lambda x: (layer(x).sum(),), [layer], (torch.randn(4, 3, generator=torch.Generator()),), gradients=True
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_changes_of_shape_dtype_and_mode_are_noticed(uncompiled):
    layer = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.999))
    recorded = record(lambda x: (layer(x),), [layer], (torch.ones(4, 3),))
    recorded(torch.ones(4, 3))
    assert recorded.num_recordings == 1
    assert recorded(torch.ones(5, 3))[0][0].shape == (5, 2)
    assert recorded.num_recordings == 2
    layer.eval()
    assert torch.equal(recorded(torch.ones(4, 3))[0][0], layer(torch.ones(4, 3)))
    layer.double()
    assert recorded(torch.ones(4, 3).double())[0][0].dtype == torch.float64
    assert recorded.num_recordings == 4
    layer.float().train()
    recorded(torch.ones(4, 3))  # as at first: nothing to record
    assert recorded.num_recordings == 4
    for size in range(10, 30):
        recorded(torch.ones(size, 3))
    assert len(recorded._recorded) == Recording.CAPACITY


@pytest.mark.slow
def test_batch_norm_keeps_its_running_statistics_compiled():
    """Buffers that a step changes in place: the compiled step changes them too."""
    batch = torch.randn(20, 3)
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    torch.manual_seed(0)
    compiled = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    recorded = record(lambda x: (compiled(x).square().sum(),), [compiled], (batch,), gradients=True)
    for _ in range(3):
        eager(batch)
        recorded(batch)
    for expected, found in zip(eager.buffers(), compiled.buffers(), strict=True):
        assert torch.allclose(expected.float(), found.float(), rtol=1e-5)
    assert compiled[1].num_batches_tracked == 3


def falls_back(caplog, model, guide, batch, text, loss=None):
    with caplog.at_level(logging.WARNING, "pyrovae"):
        result = pv.fit(model, guide, batch, epochs=2, batch_size=20, compile=True, loss=loss, progress=False)
    assert len(result.history) == 2
    assert len(caplog.records) == 1
    assert text in caplog.text


def test_control_flow_on_values_runs_eagerly(caplog):
    model, guide = make()

    def branching(x):
        if x.sum() > 0:
            model(x)

    falls_back(caplog, branching, guide, binary(), "runs eagerly")


def test_a_parameter_of_no_module_runs_eagerly(caplog):
    """It would get no gradient in the recording."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z.unsqueeze(-1)).to_event(1), obs=x.flatten(1))

    layer = nn.Linear(12, 1)

    def guide(x):
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(layer(x.flatten(1)).squeeze(-1), 1.0))

    falls_back(caplog, model, guide, binary(), "belongs to none of its modules")
    assert pyro.param("loc").item() != 0
    pyro.clear_param_store()


def test_draws_without_a_reparameterisation_run_eagerly(caplog):
    model, _ = make()
    layer = nn.Linear(12, 2)

    class Coarse(dist.Normal):
        has_rsample = False

    def guide(x):
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            pyro.sample("z", Coarse(layer(x.flatten(1)), 1.0).to_event(1))

    falls_back(caplog, model, guide, binary(), "not reparameterised")


def test_a_loss_without_a_surrogate_runs_eagerly(caplog):
    falls_back(caplog, *make(), binary(), "TraceGraph_ELBO has no surrogate", loss=TraceGraph_ELBO())


def test_without_a_compiler_it_runs_eagerly(tmp_path):
    """A machine without C++: one line says so, and the numbers are the eager ones."""
    code = (
        "import logging, torch, pyro; logging.basicConfig(); import pyrovae as pv; pyro.set_rng_seed(0)\n"
        "model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 6), 6))\n"
        "guide = pv.guides.MeanFieldNormal(pv.nets.MLP(6, [8]), 2)\n"
        "print(pv.fit(model, guide, torch.ones(40, 6), epochs=3, batch_size=10, compile=True, progress=False).num_steps)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}
    environment |= {"PATH": str(tmp_path), "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "12\n"
    assert done.stderr.count("\n") == 1, done.stderr
    assert "runs eagerly" in done.stderr


def test_auto_compiles_long_runs_of_our_own_parts():
    model = pv.GenerativeModel(
        pv.priors.StandardNormal(40), pv.likelihoods.Bernoulli(pv.nets.MLP(40, [400, 400], 784), 784)
    )
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(784, [400, 400]), 40)
    ours = [model, guide]
    assert step_pays_off(8_500, 200, ours, Trace_ELBO(), pv.data.binarize)
    assert step_pays_off(8_500, 200, ours, Trace_ELBO(), None)
    assert not step_pays_off(100, 200, ours, Trace_ELBO(), None)
    assert not step_pays_off(8_500, 200, ours, TraceGraph_ELBO(), None)
    assert not step_pays_off(8_500, 200, ours, Trace_ELBO(), lambda x: x)

    class Strange(nn.Linear):
        pass

    assert not step_pays_off(8_500, 200, [*ours, Strange(2, 2)], Trace_ELBO(), None)


def test_the_optimizer_moves_what_the_recording_gives(uncompiled):
    model, guide = make()
    optimizer = OneOptimizer([*model.parameters(), *guide.parameters()], 1e-2)
    optimizer(optimizer.order)  # as the first eager step does
    before = parameters(model, guide)
    batch = binary()
    step = record_step(
        model,
        guide,
        Trace_ELBO(),
        optimizer,
        [model, guide],
        None,
        None,
        as_batch(batch, batch.dtype),
        torch.arange(40),
    )
    value, [parts], _ = step(as_batch(batch, batch.dtype), torch.arange(40))
    assert value.item() == pytest.approx((parts.kl - parts.reconstruction).item())
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters(model, guide), strict=True))


def test_checks_are_still_made(caplog):
    model, guide = make()
    with pytest.raises(ValueError, match="Bernoulli"):
        pv.fit(model, guide, binary() * 0.5, epochs=2, batch_size=20, compile=True, progress=False)


def test_compile_must_be_a_known_word():
    with pytest.raises(ValueError, match="compile must be"):
        pv.fit(*make(), binary(), compile="always", progress=False)


def test_shared_modules_stay_whole(uncompiled):
    """A VampPrior holds the guide: its parameters are still the guide's own after a recording, and train as eagerly."""
    ends = []
    for compile in (False, True):
        torch.manual_seed(4)
        guide = pv.guides.MeanFieldNormal(pv.nets.MLP(12, [5]), 2)
        prior = pv.priors.VampPrior(guide, torch.rand(3, 12))
        model = pv.GenerativeModel(prior, pv.likelihoods.Bernoulli(pv.nets.MLP(2, [5], 12), 12)).double()
        before = list(guide.parameters())
        x = binary().double().flatten(1)
        pyro.set_rng_seed(9)
        pv.fit(model, guide, x, epochs=4, batch_size=20, learning_rate=1e-2, compile=compile, progress=False)
        assert all(a is b for a, b in zip(before, guide.parameters(), strict=True))
        ends.append(parameters(model, guide))
    for expected, found in zip(*ends, strict=True):
        assert torch.allclose(expected, found, rtol=1e-7, atol=1e-9)


def test_one_recording_for_a_whole_run(uncompiled, monkeypatch):
    """Four epochs after the eager one, each with a ragged last batch, parameters and learning rate changing at every step."""
    recordings, original = [], Recording._record
    monkeypatch.setattr(Recording, "_record", lambda self, *args: recordings.append(1) or original(self, *args))
    pv.fit(*make(), binary(), epochs=5, batch_size=15, compile=True, progress=False)
    assert len(recordings) == 1


def transposed(net):
    for part in net.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(part.weight.detach().t().contiguous().t())


def orthogonal(net):
    for part in net.modules():
        if isinstance(part, nn.Linear):
            nn.utils.parametrizations.orthogonal(part)


def as_made(net):
    pass


@pytest.mark.parametrize("change", [as_made, transposed, orthogonal])
@pytest.mark.parametrize("double_weights", [False, True])
def test_gradients_of_another_memory_layout_reach_their_own_elements(uncompiled, change, double_weights):
    histories, ends = [], []
    for compile in (False, True):
        torch.manual_seed(4)
        nets = [pv.nets.MLP(2, [16], 5), pv.nets.MLP(5, [16])]
        if double_weights:
            for net in nets:
                net.double()
        for net in nets:
            change(net)
        model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Normal(nets[0], 5))
        guide = pv.guides.MeanFieldNormal(nets[1], 2)
        if double_weights:
            model, guide = model.double(), guide.double()
        x = torch.randn(200, 5).to(next(model.parameters()).dtype)
        pyro.set_rng_seed(9)
        result = pv.fit(model, guide, x, epochs=4, batch_size=50, learning_rate=1e-2, compile=compile, progress=False)
        histories.append([row["objective"] for row in result.history])
        ends.append(parameters(model, guide))
    assert histories[1] == pytest.approx(histories[0], rel=1e-9 if double_weights else 1e-4)
    for expected, found in zip(*ends, strict=True):
        assert torch.allclose(expected, found, atol=1e-9 if double_weights else 1e-3)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_optimizer_pairs_elements_not_places_in_memory(order):
    """Also with moments that a checkpoint has in another layout: Adam's first steps go against the sign of the gradient."""
    gradient = torch.randn(3, 4, 5)
    shape = gradient.permute(order).shape
    weight = nn.Parameter(torch.zeros(shape).permute([order.index(dim) for dim in range(3)]))
    assert weight.shape == gradient.shape
    optimizer = OneOptimizer([weight], 0.1)
    for _ in range(3):
        weight.grad = gradient.clone()
        optimizer([weight])
        state = optimizer.inner.state_dict()
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].contiguous()
        optimizer.restore([weight], state)
    assert torch.allclose(weight, -0.3 * gradient.sign(), atol=1e-3)


@pytest.mark.parametrize(
    "view", [lambda wide: wide[:8, :12], lambda wide: wide[:16:2, ::3][:, :12], lambda wide: wide.t()[:8, :12]]
)
def test_a_parameter_with_gaps_in_memory_is_refused(view):
    """The fused step would write into what lies between."""
    model, guide = make()
    layer = next(part for part in guide.modules() if isinstance(part, nn.Linear))
    layer.weight = nn.Parameter(view(torch.randn(20, 40)))
    with pytest.raises(ValueError, match=r"shape \(8, 12\) .* without gaps.*nn\.Parameter\(tensor\.clone"):
        pv.fit(model, guide, binary(), epochs=1, progress=False)
    layer.weight = nn.Parameter(layer.weight.detach().clone(memory_format=torch.contiguous_format))
    pv.fit(model, guide, binary(), epochs=1, progress=False)
