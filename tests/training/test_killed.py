"""A run that is killed again and again ends, bit for bit, as one never stopped.

PYROVAE_KILLS=20 python -m pytest tests/training/test_killed.py -s
"""

import os
import random
import signal
import time

import pytest
import torch
from shared.processes import Program

from pyrovae.training.checkpoint_file import earlier, read

NUM_KILLS = int(os.environ.get("PYROVAE_KILLS", "5"))

RUN = """
import sys, torch, pyro, pyrovae as pv
path, epochs, compiled = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
torch.set_num_threads(1)
data = pv.data.digits()
pyro.set_rng_seed(0)
guide = pv.guides.MeanFieldNormal(pv.nets.MLP(64, [32]), 4)
prior = pv.priors.VampPrior(guide, data.train[:5])
model = pv.GenerativeModel(prior, pv.likelihoods.Bernoulli(pv.nets.MLP(4, [32], 64), data.data_shape))
print("ready", flush=True)
pv.fit(
    model, guide, data.train[:400], transform=data.transform, validation=data.validation[:50], epochs=epochs,
    batch_size=100, learning_rate=1e-3, loss=pv.objectives.AnalyticKL(kl_warmup_steps=50), compile=compiled,
    checkpoint=path, checkpoint_every=0, resume=True, progress=False,
)
"""


@pytest.fixture(autouse=True)
def _own_compilations(tmp_path_factory, monkeypatch):
    """A killed process may leave half a library in Inductor's cache: not in the one that all of the user's runs share."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))


def start(path, epochs, compiled):
    process = Program(RUN, path, epochs, compiled)
    process.wait_for("ready")
    return process


def ended(path, epochs, compiled):
    """What a run that is left alone from here on ends in: all that would decide how it goes on, and the pair."""
    process = start(path, epochs, compiled)
    _, stderr = process.communicate(timeout=3600)
    assert process.returncode == 0, stderr
    content = read(path)
    return {name: content[name] for name in ("model", "guide", "training")}


def kill(process, path, during_a_write):
    """Kill the run at a random moment after its first save, or at the first write after that; whether it lived so long."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None and (path.stat().st_mtime_ns if path.exists() else 0) == before:
        time.sleep(0.001)
    time.sleep(random.uniform(0.0, 0.3))
    if during_a_write:
        deadline = time.monotonic() + 20
        temporary = path.with_name(f".{path.name}.{process.pid}.tmp")
        while process.poll() is None and not temporary.exists() and time.monotonic() < deadline:
            pass
        time.sleep(random.uniform(0.0, 0.005))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def same(first, second):
    if isinstance(first, dict):
        skipped = {"seconds", "data_per_second"}
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first.keys() - skipped)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return first == second or (first != first and second != second)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_killed_at_random_moments_and_during_writes(tmp_path, compiled):
    epochs, path = 30 * NUM_KILLS, tmp_path / "run.pt"
    kills, in_writes = 0, 0
    for number in range(NUM_KILLS if not compiled else max(1, NUM_KILLS // 5)):
        process = start(path, epochs, compiled)
        if not kill(process, path, during_a_write=number % 2 == 1):
            break  # it was quicker
        kills += 1
        in_writes += any(found.suffix in (".tmp", ".link") for found in tmp_path.iterdir())
        for file in (path, earlier(path)):
            assert not file.exists() or read(file), "whole at any moment"
    done = len(read(path)["training"]["state"]["history"]) if path.exists() else 0
    found, expected = ended(path, epochs, compiled), ended(tmp_path / "whole.pt", epochs, compiled)
    assert same(found, expected)
    print(f"\n{kills} kills, {in_writes} of them while a file was written; {done} of {epochs} epochs done by then")
    assert kills > 0
    assert sorted(found.name for found in tmp_path.iterdir() if "run" in found.name) == ["run.pt", "run.pt.previous"]
