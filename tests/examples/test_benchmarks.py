"""The benchmarks run, and their tables say what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples/benchmarks"
# script -> the smallest run of it
SCRIPTS = {
    "training.py": ("--batch-sizes", 64),
    "evaluation.py": ("--num-particles", 300),
    "annealing.py": ("--model", "mlp", "--rows", 16),
}


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import turns

    yield turns
    del sys.modules["turns"]


def test_every_benchmark_is_tested():
    programs = {path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text()}
    assert programs == set(SCRIPTS)


def test_turns_are_taken_and_medians_compared(turns, capsys):
    calls = []

    def competitor(name, rates):
        rates = iter(rates)
        return lambda: calls.append(name) or next(rates)

    def broken():
        raise RuntimeError("no such thing\nmore of it")

    rows = turns.in_turns(
        "setting",
        {
            "slow": competitor("slow", [1.0, 10.0, 30.0, 20.0]),  # the first is for warming up
            "quick": competitor("quick", [1.0, 100.0, 1.0, 50.0]),
            "broken": broken,
            "absent": turns.NOT_INSTALLED,
        },
        rounds=3,
        base="slow",
    )
    assert [set(calls[i : i + 2]) for i in range(0, 8, 2)] == [{"slow", "quick"}] * 4
    assert [(row.name, row.rate, row.ratio) for row in rows] == [
        ("slow", 20.0, 1.0),
        ("quick", 50.0, 2.5),
        ("broken", None, None),
        ("absent", None, None),
    ]
    assert rows[2].note == "RuntimeError: no such thing"
    table = turns.show(rows, "images/s", "x slow")
    assert "| setting | quick | 50 | 25.5 - 75 | 2.50 |  |" in table
    assert "| setting | absent | - | - | - | not installed |" in table


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmark_runs(script, tmp_path):
    options = ("--quick", "--rounds", 1, "--threads", 1, "--data-dir", tmp_path, "--out", tmp_path / "table")
    command = [sys.executable, FOLDER / script, *options, *SCRIPTS[script]]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "table.json").read_text())
    assert {"machine", "cores", "versions", "command", "rounds", "data"} <= found.keys()
    for row in found["rows"]:
        assert row["note"] == "not installed" or row["rate"] > 0, row
    assert (tmp_path / "table.md").read_text() in done.stdout
