"""The notebooks: stored as they ran, with figures and without a machine's traces; and they run again, quietly."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.ipynb"))}
MACHINE = re.compile(r"/home/|/root\b|/tmp/|/work/|/opt/|/Users/|site-packages|[A-Z]:\\|https?://(localhost|127\.)")
LARGEST = 2_000_000  # bytes: figures are stored in the file


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output):
    """What a reader sees as text: printed, shown or raised."""
    shown = output.get("data", {}).get("text/plain", "")
    return "\n".join([output.get("text", ""), shown, *output.get("traceback", [])])


def num_figures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def faults(notebook):
    """What is wrong with a notebook that has run."""
    found = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        if cell.execution_count != number:
            found.append(f"cell {number} was run as number {cell.execution_count}: run all, from a fresh kernel")
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {number}: {text_of(output)}")
            if output.output_type == "display_data" and "image/png" not in output.data:
                found.append(f"cell {number} shows what is no picture: {sorted(output.data)}")
            if machine := MACHINE.search(text_of(output)):
                found.append(f"cell {number} shows a path of one machine: {machine.group()}")
    return found


def test_the_notebooks_are_there():
    assert set(NOTEBOOKS) == {
        "conditional_digits",
        "evaluate_any_pyro_model",
        "swap_priors_and_guides",
        "vae_from_first_principles",
        "your_own_data",
    }


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(notebook)
    assert faults(notebook) == []
    assert sum(map(num_figures, code_cells(notebook))) >= 3
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert NOTEBOOKS[name].stat().st_size < LARGEST
    source = "\n".join(cell.source for cell in notebook.cells)
    assert not MACHINE.search(source)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_quietly(name, monkeypatch, tmp_path):
    """With small settings and the embedded digits; whatever goes to stderr is a fault."""
    monkeypatch.setenv("PYROVAE_QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    stored = [num_figures(cell) for cell in code_cells(notebook)]
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert faults(notebook) == []
    assert [num_figures(cell) for cell in code_cells(notebook)] == stored
    logs = tmp_path / "runs"  # of TensorBoard, one folder for each of the two trainings
    if name == "your_own_data" and find_spec("tensorboard"):
        assert len(list(logs.glob("your_own_data/*/events*"))) == 2
    else:
        assert not logs.exists()


def test_faults_are_found():
    """The checks above can fail."""
    cell = nbformat.v4.new_code_cell("1", execution_count=2)
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        nbformat.v4.new_output("stream", name="stdout", text="written to /tmp/x"),
        nbformat.v4.new_output("error", ename="E", evalue="", traceback=["it broke"]),
    ]
    cell.outputs = outputs
    found = faults(nbformat.v4.new_notebook(cells=[cell]))
    assert [any(word in fault for fault in found) for word in ("number 2", "a warning", "/tmp/", "broke")] == [True] * 4
