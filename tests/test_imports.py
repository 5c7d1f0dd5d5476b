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
        {"pareto", "estimators", "modules", "conv_nets", "nets", "splits", "data", "flows", "mixtures"},
        {"encoding", "prior_contract", "pixels", "likelihood_contract"},
        {
            "priors",
            "flow_priors",
            "likelihoods",
            "level_likelihoods",
            "layers",
            "defensive",
            "flow_guides",
            "refinement",
        },
        {"guides"},
        {"model", "hierarchy", "uses"},
        {"extract"},
        {"supports", "traces", "auxiliary", "inspection", "agreement", "draws", "pair", "particles", "weights"},
        {"objective_contract", "kl_objectives", "objectives"},
        {"potential", "anneal", "simulation"},
        {"optimization", "steps", "training", "evaluation", "bounds", "comparison", "checkpoint"},
        {"inference_data", "plots", "registry"},
    ]
    level_of = {name: level for level, names in enumerate(levels) for name in names}
    for path in Path(pv.__file__).parent.glob("*.py"):
        if path.stem == "__init__":
            continue
        for line in path.read_text().splitlines():
            if line.startswith("from pyrovae"):  # not the ones inside functions
                imported = line.split()[1].removeprefix("pyrovae").strip(".")
                for name in [imported] if imported else line.split("import")[1].replace(",", " ").split():
                    assert level_of[name] <= level_of[path.stem], f"{path.stem} imports {name}"
