"""Examples and notebooks use the library as its users do: `import pyrovae as pv` and public names."""

import ast
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

import pyrovae as pv

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(path for ending in ("py", "ipynb") for path in EXAMPLES.rglob(f"*.{ending}"))


def code_of(path):
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


def private_names(code):
    """Imports and attribute chains of the library that are not public."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyrovae":
            found.append(f"from {node.module} import ...: take `import pyrovae as pv`")
        if isinstance(node, ast.Import):
            wrong = [name for name in node.names if name.name.split(".")[0] == "pyrovae"]
            found += [name.name for name in wrong if (name.name, name.asname) != ("pyrovae", "pv")]
        if isinstance(node, ast.Attribute):
            names = [node.attr]
            while isinstance(node := node.value, ast.Attribute):
                names.append(node.attr)
            if isinstance(node, ast.Name) and node.id == "pv":
                found += _hidden(pv, names[::-1])
    return found


def _hidden(module, names):
    for name in names:
        if name not in module.__all__:
            return [f"{module.__name__}.{name}"]
        module = getattr(module, name)
        if not isinstance(module, ModuleType):
            break
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_public_names(path):
    assert private_names(code_of(path)) == []


def test_all_kinds_are_looked_at():
    assert {path.suffix for path in FILES} == {".py", ".ipynb"}
    assert {path.parent.name for path in FILES} == {"examples", "benchmarks", "reproductions", "support"}


def test_private_names_are_found():
    assert private_names("import pyrovae as pv\npv.fit(pv.nets.MLP(1, [2]).layers)") == []
    for code in (
        "from pyrovae.programs.pair import Pair",
        "def f():\n    from pyrovae import fit",
        "import pyrovae.programs.pair",
        "import pyrovae.programs.pair as pv",
        "import pyrovae",
        "pv.programs.pair.Pair",
        "pv.nets.mlp",
        "pv.estimators.reducers.elbo(x)",
    ):
        assert private_names(code), code
