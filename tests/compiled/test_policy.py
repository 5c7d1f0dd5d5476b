"""When a recording pays off: one function decides for training, evaluation, annealing and refinement."""

import pytest
import torch
from shared.runs import binary, make
from torch import nn

import pyrovae as pv
from pyrovae.annealing import blocks
from pyrovae.compiled.policy import mark_compiled, pays_off
from pyrovae.compiled.record import Recording
from pyrovae.evaluation import local_search, log_weights
from pyrovae.training import acceleration


class ThirdParty(nn.Linear):
    pass


def plain(x):
    return x


def test_it_pays_off_from_fifteen_seconds_on():
    """nn.Linear(999, 1000): a million parameters, 1e-11 s each per row and run."""
    layer = nn.Linear(999, 1000)
    assert pays_off(15_001, 100, [layer])
    assert pays_off(100, 15_001, [layer])
    assert not pays_off(14_999, 100, [layer])
    assert pays_off(10_000, 100, [layer], saved_per_run=5.1e-4)
    assert not pays_off(10_000, 100, [layer], saved_per_run=4.9e-4)


def test_what_was_compiled_before_pays_off_from_one_and_a_half_seconds_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer = nn.Linear(999, 1000)
    described = (layer, 50, 26)
    assert not pays_off(1_600, 100, [layer], described=described)
    mark_compiled(described)
    assert pays_off(1_600, 100, [layer], described=described)
    assert not pays_off(1_400, 100, [layer], described=described)
    assert not pays_off(1_600, 100, [layer], described=(layer, 50, 27)), "other sizes"
    assert not pays_off(1_600, 100, [layer]), "nothing known of it"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other"))
    assert not pays_off(1_600, 100, [layer], described=described), "another cache"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    mark_compiled((1,))
    assert not pays_off(1_600, 100, [nn.Linear(999, 1000)], described=(1,))


def test_what_runs_once_is_no_work_but_must_be_known():
    small, large = nn.Linear(1, 1), nn.Linear(999, 1000)
    assert pays_off(15_001, 100, [large], once=[small])
    assert not pays_off(15_001, 100, [small], once=[large])
    assert not pays_off(15_001, 100, [large], once=[ThirdParty(1, 1)])


@pytest.mark.parametrize("inductor", [False, True])
@pytest.mark.parametrize("program", [ThirdParty(999, 1000), plain])
def test_unknown_parts_never_pay_off(program, inductor):
    assert not pays_off(10**9, 10**9, [program], inductor=inductor)
    assert not pays_off(10**9, 10**9, [nn.Linear(999, 1000)], known=False, inductor=inductor)


def test_without_inductor_known_parts_always_pay_off():
    assert pays_off(1, 1, [nn.Linear(1, 1)], inductor=False)
    assert not pays_off(1, 1, [nn.Linear(1, 1)])


RUNS = {
    acceleration: lambda model, guide, x: pv.fit(model, guide, x, epochs=2, batch_size=20, progress=False),
    log_weights: lambda model, guide, x: pv.log_weights(model, guide, x, num_particles=4, particle_batch_size=2),
    blocks: lambda model, guide, x: pv.annealed_importance_sampling(
        model, x, num_temperatures=3, num_chains=2, progress=False
    ),
    local_search: lambda model, guide, x: pv.inference_gaps(model, guide, x, num_particles=3, max_num_steps=2),
}


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize("caller", RUNS, ids=lambda module: module.__name__)
def test_every_caller_asks_and_does_what_it_is_told(uncompiled, short_pilots, monkeypatch, caller, answer):
    recordings, original, asked = [], Recording._record, []
    monkeypatch.setattr(Recording, "_record", lambda self, *args: recordings.append(1) or original(self, *args))
    monkeypatch.setattr(caller, "pays_off", lambda *args, **kwargs: asked.append(1) or answer)
    model, guide = make()
    with torch.no_grad() if caller is not acceleration else torch.enable_grad():
        RUNS[caller](model, guide, binary(40 if caller is acceleration else 6))
    assert asked
    assert bool(recordings) == answer
