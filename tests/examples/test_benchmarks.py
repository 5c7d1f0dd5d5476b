"""The benchmarks run, and their tables say what was measured."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from shared.processes import run

FOLDER = Path(__file__).parents[2] / "examples/benchmarks"
# script -> the smallest run of it
SCRIPTS = {
    "training.py": ("--batch-sizes", 64),
    "evaluation.py": ("--num-particles", 300),
    "precision.py": ("--precisions", "float32", "bf16"),
    "ranks.py": ("--batch-sizes", 256, "--threads", 2),
}


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import turns

    return turns


@pytest.fixture
def run_all(turns):
    import run_all

    return run_all


def test_every_benchmark_is_tested():
    programs = {path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text()}
    assert programs == {*SCRIPTS, "annealing.py", "run_all.py"}


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


def test_one_command_runs_what_the_page_shows(run_all):
    page = (FOLDER.parents[1] / "pyrovae/docs/benchmarks.md").read_text()
    prefix = "python examples/benchmarks/"
    shown = [line.removeprefix(prefix) for line in page.splitlines() if line.startswith(prefix)]
    commands = list(run_all.COMMANDS.values())
    assert [command for command in shown if command in commands] == commands
    others = [command.split()[0] for command in shown if command not in commands]  # the same scripts on other machines
    assert set(others) <= {"run_all.py", *(command.split()[0] for command in commands)}


def test_one_command_runs_all(run_all, monkeypatch, tmp_path, capfd):
    """With scripts that only say how they were called: the page holds all tables, a failure is named at the end."""
    script = "import sys; from pathlib import Path; Path(sys.argv[sys.argv.index('--out') + 1] + '.md').write_text(str(sys.argv))"
    (tmp_path / "good.py").write_text(script)
    (tmp_path / "bad.py").write_text("raise SystemExit('it broke')")
    monkeypatch.setattr(run_all, "FOLDER", tmp_path)
    monkeypatch.setattr(run_all, "COMMANDS", {"first": "good.py --rounds 3", "broken": "bad.py", "last": "good.py"})
    words = ["--quick", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run_all.py", *words])
    with pytest.raises(SystemExit, match="broken failed, see above; --only broken runs them again"):
        run_all.main()
    assert "it broke" in capfd.readouterr().err
    page = (tmp_path / "all.md").read_text()
    assert page.count("good.py") == 2
    assert page.index("'--rounds', '3'") < page.index("'--quick', '--rounds', '1'")
    monkeypatch.setattr(sys, "argv", ["run_all.py", *words, "--only", "last"])
    run_all.main()
    assert (tmp_path / "all.md").read_text() == page  # what was measured before stays on it


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx avx2 avx512f avx512_bf16\n", ["AVX2", "AVX-512", "AVX-512 bf16"]),
        ("flags\t\t: fpu avx2 avx512f amx_bf16 amx_tile\n", ["AVX2", "AVX-512", "AMX bf16"]),
        ("Features\t: fp asimd sve bf16\n", ["NEON", "SVE", "bf16"]),
        (None, []),
    ],
)
def test_tables_name_the_instruction_sets(turns, monkeypatch, cpuinfo, expected):
    def read_text(path):
        assert str(path) == "/proc/cpuinfo"
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr(turns.Path, "read_text", read_text)
    used = f"torch uses {torch.backends.cpu.get_cpu_capability()}"
    assert turns.instruction_sets().split(", ") == [*expected, used]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmark_runs(script, tmp_path):
    # One script compiles; the others run their recordings as they are, which shows the same tables in half of the time.
    environment = {} if script == "training.py" else {"TORCHDYNAMO_DISABLE": "1"}
    done = run(FOLDER / script, *smallest(tmp_path), *SCRIPTS[script], timeout=1200, **environment)
    assert done.returncode == 0, done.stderr
    check_tables(tmp_path, done.stdout)


@pytest.mark.usefixtures("turns", "uncompiled", "short_pilots")
def test_benchmark_of_annealing_runs(tmp_path, monkeypatch, capsys):
    """In this process, where its pilot chains can be short."""
    import annealing

    monkeypatch.setattr(sys, "argv", ["annealing.py", *smallest(tmp_path), "--model", "mlp", "--rows", "64"])
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(logging.getLogger("pyrovae"), "filters", [])
    annealing.main()
    check_tables(tmp_path, capsys.readouterr().out)


def smallest(folder):
    """Options of a run that is as small as can be and writes its tables to the folder."""
    return ["--quick", "--rounds", "1", "--threads", "1", "--data-dir", str(folder), "--out", str(folder / "table")]


def check_tables(folder, printed):
    found = json.loads((folder / "table.json").read_text())
    assert {"machine", "instructions", "cores", "versions", "command", "rounds", "data"} <= found.keys()
    assert found["rows"]
    for row in found["rows"]:
        assert row["note"] in ("not installed", "needs 2 cores, found 1") or row["rate"] > 0, row
    assert (folder / "table.md").read_text() in printed
