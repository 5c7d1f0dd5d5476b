"""The reference builds without a warning, and the code of its pages runs and is right."""

import functools
import importlib
import re
from pathlib import Path

import pyro
import pytest
import torch

import pyrovae as pv
from pyrovae import docs
from pyrovae.docs.__main__ import _with_anchors, build

PAGES = Path(docs.__file__).parent


@pytest.fixture(scope="module")
def own_parts():
    """The namespace that the page's code leaves, its blocks in order; its own checks are asserts."""
    pyro.set_rng_seed(0)
    page = (PAGES / "own_parts.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    assert len(blocks) == 7
    namespace = {}
    exec(compile("\n".join(blocks), "own_parts.md", "exec"), namespace)
    return namespace


def test_own_parts_run(own_parts):
    result = own_parts["result"]
    assert result.log_prob.isfinite().all()
    assert (result.log_prob >= result.elbo).all()
    assert own_parts["model"].generate(3, mean=True).shape == (3, 12)


def test_own_prior_is_normalised(own_parts):
    prior = own_parts["FullRankNormalPrior"](2)
    with torch.no_grad():
        prior.triangle[1, 0], prior.log_diagonal[0] = 0.7, 0.2
    axis = torch.linspace(-12, 12, 401)
    density = prior().log_prob(torch.cartesian_prod(axis, axis)).exp().detach()
    assert density.sum().item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=1e-3)


def test_own_likelihood_has_its_mean_and_refuses(own_parts):
    mean = torch.tensor([0.5, 3.0, 11.0])
    likelihood = own_parts["OverdispersedCounts"](pv.nets.MLP(2, [4], 6), 3, data_mean=mean)
    with torch.no_grad():
        for parameter in likelihood.decoder_net.parameters():
            parameter.zero_()
    torch.testing.assert_close(likelihood(torch.zeros(2)).mean.detach(), mean)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood)
    with pytest.raises(ValueError, match=r"whole numbers of 0 or more, found 0\.5"):
        model(torch.full((4, 3), 0.5))


def test_the_error_of_heavy_weights_is_as_the_page_on_bounds_says():
    page = (PAGES / "bounds.md").read_text(encoding="utf-8")
    (code,) = (part.split("```")[0] for part in page.split("```python\n")[1:] if "torch.manual_seed(0)" in part)
    namespace: dict = {}
    exec(compile(code, "bounds.md", "exec"), namespace)
    lml, covered = namespace["lml"], namespace["covered"]
    assert lml.log_prob.mean().item() == pytest.approx(-0.36, abs=0.04)
    assert lml.log_prob.std().item() == pytest.approx(0.65, abs=0.04)
    assert lml.stderr.mean().item() == pytest.approx(0.36, abs=0.04)
    assert covered.double().mean().item() == pytest.approx(0.56, abs=0.04)
    assert lml.bias_estimate == pytest.approx(0.14, abs=0.03)
    assert lml.pareto_k.median().item() == pytest.approx(1.3, abs=0.1)


def test_every_page_is_in_the_reference():
    assert sorted(docs.PAGES) == sorted(page.name for page in PAGES.glob("*.md"))


ROOT = Path(pv.__file__).parents[1]
TEXTS = [*ROOT.glob("README.md"), *(ROOT / "pyrovae").rglob("*.py"), *(ROOT / "pyrovae").rglob("*.md")]


def test_every_name_of_the_library_in_a_text_is_there():
    found = {name for path in TEXTS for name in names_in(path.read_text(encoding="utf-8"))}
    assert len(found) > 50
    assert [name for name in sorted(found) if not is_there(name)] == []


def test_a_name_that_is_not_there_is_found():
    assert names_in("see `pyrovae.estimators.bits` and pv.fit(x), in pyrovae/fit.py") == {
        "pyrovae.estimators.bits",
        "pyrovae.fit",
    }
    assert not is_there("pyrovae.estimators.bits")
    assert is_there("pyrovae.fit")


def names_in(text):
    names = re.findall(r"\b(?:pyrovae|pv)((?:\.[A-Za-z_]\w*)+)(?!\w)", text)
    return {f"pyrovae{name}" for name in names}


def is_there(name):
    """Whether it is a module, or an attribute of one."""
    parts = name.split(".")
    for number in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:number]))
        except ImportError:
            continue
        try:
            functools.reduce(getattr, parts[number:], module)
        except AttributeError:
            return False
        return True
    return False


def test_reference_builds(tmp_path):
    build(tmp_path)
    for name in ("index.html", "pyrovae.html", "pyrovae/guides.html", "pyrovae/docs.html"):
        assert (tmp_path / name).stat().st_size > 100, name
    pages = (tmp_path / "pyrovae/docs.html").read_text()
    assert "which is which" in pages
    assert "what the same seed gives" in pages
    assert "OverdispersedCounts" in pages
    assert "A conditional VAE" in pages
    assert "Benchmarks: how fast, and how measured" in pages
    assert "Against other libraries" in pages
    assert "Architecture: where things are" in pages
    assert 'src="data:image/png;base64' in pages  # figures are part of the page, not links to the source tree
    assert "log_marginal_likelihood" in (tmp_path / "pyrovae.html").read_text()
    links = re.findall(r'href="([^"]*)"', pages)
    assert [link for link in links if ".md" in link] == []
    assert "#benchmarks-how-fast-and-how-measured" in links
    names = set(re.findall(r'id="([^"]*)"', pages))
    assert [link for link in links if link.startswith("#") and link[1:] not in names] == []


def test_a_link_between_pages_leads_to_a_heading():
    """Every page's heading is the anchor that pdoc makes of it; a heading inside a page is named by the link itself."""
    assert _with_anchors("[a](training.md), [b](bounds.md#a-part)") == (
        "[a](#training-your-data-optimizers-callbacks-averages), [b](#a-part)"
    )


def test_a_public_name_without_docstring_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(pv.nets.MLP, "__doc__", None)
    with pytest.raises(RuntimeError, match=r"pyrovae\.nets\.MLP"):
        build(tmp_path)


def test_docstrings_are_shown_by_their_sections(tmp_path):
    """Google style, which pdoc knows: headings for the sections, a list of arguments, equations as code."""
    build(tmp_path)
    page = (tmp_path / "pyrovae.html").read_text()
    for heading in ("Arguments", "Returns", "Raises", "References"):
        assert f">{heading}:<" in page, heading
    assert "<strong>num_particles</strong>" in page.replace(":</strong>", "</strong>")
    assert "pdoc-code" in page
