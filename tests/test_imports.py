"""Importing pyrovae is quick, needs neither torchvision nor matplotlib, and leaves global settings as they were."""

import subprocess
import sys
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


def test_a_file_imports_only_from_levels_above_it():
    levels = [
        {
            *("estimators", "nets", "data", "distributions", "distributed"),
            *("programs.modules", "programs.specification", "progress", "over_data"),
            *(
                "programs.compiler",
                "programs.extract",
                "programs.frozen",
                "programs.signature",
            ),  # of any function of tensors
        },
        {"marginal_likelihood", "detection"},
        {"priors", "likelihoods", "guides"},
        {"models", "uses"},
        {"programs"},
        {"weights"},
        {"objectives", "evaluation", "comparison"},
        {"gaps"},
        {"training", "annealing", "calibration", "checkpoint"},
        {"inference_data", "plots", "registry"},
    ]
    level_of = {name: level for level, names in enumerate(levels) for name in names}

    def level(module):
        """Of the module by its full name, else by its folder."""
        return level_of.get(module, level_of.get(module.partition(".")[0]))

    root = Path(pv.__file__).parent
    for path in root.rglob("*.py"):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if module == "__init__":
            continue
        for line in path.read_text().splitlines():
            if line.startswith("from pyrovae"):  # not the ones inside functions
                source, _, names = line.removeprefix("from pyrovae").partition(" import ")
                for imported in [source[1:]] if source else names.split(", "):
                    assert level(imported) <= level(module), f"{module} imports {imported}"
