"""What README and pages tell a reader to type exists: every command with its options, every path, and a test that runs it."""

import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / ".github").glob("*.md")),
    *sorted((ROOT / "examples/results").glob("*.md")),
    *sorted((ROOT / "pyrovae/docs").glob("*.md")),
    ROOT / "tests/README.md",
]
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# what a command begins with -> the test that runs it (on little data, if it takes long)
RUN_BY = {
    "examples/mnist_svi.py": "test_examples.py::test_digits_end_in_a_result",
    "examples/bounds.py": "test_examples.py::test_bounds",
    "examples/compare_estimates.py": "test_examples.py::test_compare_estimates",
    "examples/semi_supervised.py": "test_examples.py::test_semi_supervised",
    "examples/compare_parts.py": "test_examples.py::test_compare_parts",
    "examples/benchmarks/training.py": "test_benchmarks.py::test_benchmark_runs",
    "examples/benchmarks/evaluation.py": "test_benchmarks.py::test_benchmark_runs",
    "examples/benchmarks/annealing.py": "test_benchmarks.py::test_benchmark_runs",
    "examples/benchmarks/ranks.py": "test_benchmarks.py::test_benchmark_runs",
    "examples/benchmarks/precision.py": "test_benchmarks.py::test_benchmark_runs",
    "examples/benchmarks/run_all.py": "test_benchmarks.py::test_one_command_runs_all",
    "examples/reproductions/density_table.py": "test_density_table.py::test_a_row_and_its_table",
    "examples/reproductions/small_data.py": "test_small_data.py::test_small_data",
    "examples/reproductions/time_to_quality.py": "test_time_to_quality.py::test_all_of_it",
    "tests/mutations.py": "test_mutations.py::test_it_can_be_planted",
    "ways": "test_pyro_ways.py::test_a_way_of_pyro",
    "torchrun": "test_distributed.py::test_torchrun_of_the_example",
    "pyrovae.docs": "test_docs.py::test_reference_builds",
}


def commands_in(text):
    """The commands in blocks of shell and in code within the text, one for each `&&`, without comments."""
    shell = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    parts = [part.strip() for line in shell + inline for part in re.sub(r"\s#.*", "", line).split("&&")]
    parts = [re.sub(r"^(\w+=\S+ )+", "", part) for part in parts]  # variables of the environment
    return {part for part in parts if re.match(r"(python|pip|torchrun) \S|(ruff|mypy)\b", part)}


COMMANDS = sorted(set().union(*map(commands_in, TEXT.values())))


@cache
def help_of(script):
    command = [sys.executable, str(ROOT / script), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize(
    ("page", "some"),
    [
        ("README.md", "torchrun --nproc-per-node=2 examples/mnist_svi.py"),
        ("pyrovae/docs/benchmarks.md", "python examples/benchmarks/evaluation.py --tables memory"),
        ("pyrovae/docs/bounds.md", "python -m pytest tests/evaluation/test_mnist_grid.py -s"),
        ("examples/results/README.md", "python examples/compare_parts.py --dataset mnist --epochs 30"),
        ("examples/results/density.md", "python examples/reproductions/density_table.py --table"),
        ("tests/README.md", "python -m pytest tests/training/test_killed.py -s"),
        (".github/CONTRIBUTING.md", "ruff check ."),
    ],
)
def test_commands_are_found(page, some):
    assert some in commands_in(TEXT[page])


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    words = shlex.split(command)
    options = [word for word in words if word.startswith("--")]
    script = next((word for word in words if word.endswith(".py") and "pytest" not in words), None)
    if script is not None:
        own = words[words.index(script) :]
        if any(option in own for option in options):
            assert all(option in help_of(script) for option in own if option.startswith("--")), command
        ran = "torchrun" if words[0] == "torchrun" else script
    elif "pytest" in words:
        paths = [word for word in words if "/" in word]
        for path in paths:
            assert (ROOT / path).exists(), path
        if "-k" in words:
            pattern = words[words.index("-k") + 1]
            assert any(re.search(rf"def test_\w*{pattern}", (ROOT / path).read_text()) for path in paths), command
        return
    elif "pip" in words:
        for word in words[words.index("install") + 1 :]:
            place, _, extra = word.partition("[")
            if place == ".":
                assert "-e" in words
                assert not extra or extra.rstrip("]") in PROJECT["optional-dependencies"], command
        return
    elif words[0] in ("ruff", "mypy"):
        assert command.replace("format .", "format --check .") in (ROOT / ".ci/run").read_text(), command
        return
    else:
        assert words[:2] == ["python", "-m"], f"{command}: say here what runs it"
        ran = words[2]
        assert not options
    file, test = RUN_BY[ran].split("::")
    (path,) = (ROOT / "tests").rglob(file)
    assert f"def {test}(" in path.read_text()


@pytest.mark.parametrize("page", TEXT)
def test_paths_exist(page):
    prose = re.sub(r"```.*?```", "", TEXT[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        assert ((ROOT / page).parent / target).exists(), target
    for path in re.findall(r"`((?:examples|tests|pyrovae)/[\w./]+)`", prose):
        assert (ROOT / path).exists(), path


def test_front_page_is_short():
    assert len(README.splitlines()) <= 150


def test_printed_table_is_the_examples():
    block = README.partition("```text\n")[2].partition("```")[0]
    labels = re.findall(r"^  (\S.{22}) ", block, re.MULTILINE)
    assert len(labels) >= 6
    for label in labels:
        assert f'"{label.strip()}"' in (ROOT / "examples/support/report.py").read_text(), label


def test_architecture_names_the_folders():
    table = TEXT["pyrovae/docs/architecture.md"].partition("| in `pyrovae/` |")[2].partition("\n\n")[0]
    cells = "\n".join(row.split("|")[1] for row in table.splitlines()[2:])
    for folder in re.findall(r"`(\w+)/`", cells):
        assert (ROOT / "pyrovae" / folder).is_dir(), folder


def test_versions_are_those_of_the_package():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {PROJECT['version']}\n" in citation
    assert f"license: {PROJECT['license']}\n" in citation
    assert "this is an alpha" in README
    assert PROJECT["version"].startswith("0.")
    minors = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
    assert f"Python {minors[0]} to {minors[-1]}" in README
    assert f"Python {', '.join(minors[:-1])} and {minors[-1]} are supported" in TEXT[".github/CONTRIBUTING.md"]
