"""What the README tells a reader to type is there: every command with its options, every path, and what runs it."""

import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# what a command begins with -> the test that runs it (small, where it is long)
RUN_BY = {
    "examples/mnist_svi.py": "test_examples.py::test_digits_end_in_a_result",
    "examples/bounds.py": "test_examples.py::test_bounds",
    "examples/compare_parts.py": "test_examples.py::test_compare_parts",
    "examples/benchmarks/training.py": "test_benchmarks.py::test_benchmark_runs",
    "examples/benchmarks/evaluation.py": "test_benchmarks.py::test_benchmark_runs",
    "examples/benchmarks/annealing.py": "test_benchmarks.py::test_benchmark_runs",
    "examples/density_table.py": "test_density_table.py::test_a_row_and_its_table",
    "examples/time_to_quality.py": "test_time_to_quality.py::test_all_of_it",
    "torchrun": "test_distributed.py::test_torchrun_of_the_example",
    "pyrovae.docs": "test_docs.py::test_reference_builds",
}


def commands():
    """Of blocks of shell and of code in the text, one for each `&&`."""
    shell = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    said = [part.strip() for line in shell + inline for part in line.split("&&")]
    return sorted({command for command in said if re.match(r"(python|pip|torchrun|ruff|mypy)\b", command)})


@cache
def help_of(script):
    command = [sys.executable, str(ROOT / script), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_there_are_commands():
    assert len(commands()) > 10
    assert any(command.startswith("torchrun") for command in commands())


@pytest.mark.parametrize("command", commands())
def test_command(command):
    words = shlex.split(command)
    options = [word for word in words if word.startswith("--")]
    script = next((word for word in words if word.endswith(".py") and word.startswith("examples/")), None)
    if script is not None:
        own = words[words.index(script) :]
        assert all(option in help_of(script) for option in own if option.startswith("--")), command
        ran = "torchrun" if words[0] == "torchrun" else script
    elif "pytest" in words:
        paths = [word for word in words if word.startswith("tests/")]
        for path in paths:
            assert (ROOT / path).is_file(), path
        if "-k" in words:
            pattern = words[words.index("-k") + 1]
            assert any(re.search(rf"def test_\w*{pattern}", (ROOT / path).read_text()) for path in paths), command
        return
    elif "pip" in words:
        place, _, extra = words[-1].partition("[")
        assert place == "."
        assert "-e" in words
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert not extra or extra.rstrip("]") in extras, command
        return
    elif words[0] in ("ruff", "mypy"):
        assert command.replace("format .", "format --check .") in (ROOT / ".ci/run").read_text(), command
        return
    else:
        assert words[:2] == ["python", "-m"], f"{command}: say here what runs it"
        ran = words[2]
        assert not options
    file, test = RUN_BY[ran].split("::")
    assert f"def {test}(" in (ROOT / "tests" / file).read_text()


def test_paths_are_there():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:examples|tests|pyrovae)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    table = README.partition("| in `pyrovae/` |")[2].partition("\n\n")[0]
    for path in re.findall(r"`([a-z_]+(?:/|\.py))`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:])):
        assert (ROOT / "pyrovae" / path).exists(), path


def test_versions_are_those_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version = {{{version}}}" in README
    assert f"this is version {version}" in README
