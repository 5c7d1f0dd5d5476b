"""Importing pyrovae is quick, needs neither torchvision nor matplotlib, and leaves global settings as they were."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pyrovae as pv

CHECK = """
import sys, torch, pyro, warnings
refused = {"torchvision", "matplotlib", "arviz", "arviz_stats", "sklearn", "xarray"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ImportError(name + " is broken here")
sys.meta_path.insert(0, Refuse())
def settings():
    return (
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.distributions.Distribution._validate_args, pyro.settings.get(), torch.get_rng_state().sum().item(),
        list(warnings.filters),
    )
before = settings()
import pyrovae as pv
assert settings() == before
refused -= {"arviz", "arviz_stats", "sklearn", "xarray"}  # torch looks for scikit-learn
model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 6), 6))
guide = pv.guides.MeanFieldNormal(pv.nets.MLP(6, [4]), 2)
pv.fit(model, guide, torch.ones(4, 6), epochs=1, progress=False)
assert len(pv.log_marginal_likelihood(model, guide, torch.ones(4, 6), num_particles=10)) == 4
"""


def test_import_and_work_without_optional_libraries():
    subprocess.run([sys.executable, "-W", "error", "-c", CHECK], check=True)


def test_import_adds_little_to_pyro():
    """Which modules are new, as time is not for a test: a dozen of ours, and none of another library's but tqdm's."""
    code = "import pyro, pyro.infer, torch, sys; a = set(sys.modules); import pyrovae; print(*(set(sys.modules) - a))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = {name.split(".")[0] for name in done.stdout.split()} - {"pyrovae", "tqdm"} - sys.stdlib_module_names
    assert not foreign


def test_public_names():
    assert set(pv.__all__) <= set(dir(pv))
    for name in ("GenerativeModel", "fit", "log_marginal_likelihood", "log_weights", "save", "load", "data", "plots"):
        assert name in pv.__all__


# A folder imports from itself and from folders above it in this list (`pyrovae/docs/architecture.md`).
FOLDERS = [
    *(
        "common",
        "nets",
        "data",
        "distributions",
        "programs",
        "compiled",
        "priors",
        "guides",
        "likelihoods",
        "objectives",
    ),
    *("models", "estimators", "evaluation", "annealing", "training", "plots", "docs"),
]


def imports_of(path):
    """The modules of this package that a file imports, inside functions too; not those for the type checker alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pyrovae":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "pyrovae")


def test_folders_are_those_of_the_list():
    root = Path(pv.__file__).parent
    assert {path.name for path in root.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)
    assert [path.name for path in root.glob("*.py")] == ["__init__.py"]


def test_no_two_files_of_one_name():
    names = Counter(path.stem for path in Path(pv.__file__).parent.rglob("*.py"))
    assert [name for name, count in names.items() if count > 1 and name not in ("__init__", "base")] == []


def test_a_folder_imports_only_from_folders_above_it():
    root = Path(pv.__file__).parent
    for path in root.rglob("*/*.py"):
        folder = path.relative_to(root).parts[0]
        for imported in imports_of(path):
            source = imported.partition(".")[2].partition(".")[0]
            if source in FOLDERS:
                assert FOLDERS.index(source) <= FOLDERS.index(folder), f"{path.relative_to(root)} imports {imported}"


def test_no_circles_between_files():
    root = Path(pv.__file__).parent
    graph = {}
    for path in root.rglob("*.py"):
        name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        if path.stem != "__init__":
            targets = (
                imported if _is_file(root, imported) else imported.rpartition(".")[0] for imported in imports_of(path)
            )
            graph[name] = {target for target in targets if _is_file(root, target)}
    TopologicalSorter(graph).prepare()  # raises CycleError


def _is_file(root, module):
    return root.parent.joinpath(*module.split(".")).with_suffix(".py").exists()
