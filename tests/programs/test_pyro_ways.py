"""Pyro's own ways against exact values: each is right, or refused with the words that its entry in `ways` names."""

import re
from collections import Counter
from pathlib import Path

import pyro.distributions.transforms
import pyro.infer.autoguide
import pyro.infer.reparam
import pytest
from ways import LISTS, judge, load, table
from ways.flows import CONDITIONAL, UNCONDITIONAL, UNTOUCHED
from ways.guides import FLOWS, IN_PLATES, NO_GUIDES, POINTS, TOGETHER

WAYS = load()
HERE = Path(__file__).parent


@pytest.mark.parametrize("name", WAYS)
def test_a_way_of_pyro(double, name):
    found = WAYS[name]
    outcome, why = judge(found.make(), found.refusal)
    assert outcome == ("right" if found.refusal is None else "refused"), why


def test_the_table_in_the_readme_counts_these_ways():
    """None is wrong, or the test above fails; so the table follows from the lists."""
    count = Counter((way.kind, "right" if way.refusal is None else "refused") for way in WAYS.values())
    written = (HERE.parent / "README.md").read_text()
    assert "\n".join(table(count)) in written, "\n".join(["put this into tests/README.md:", *table(count)])


def test_every_list_of_ways_is_loaded():
    assert {path.stem for path in (HERE / "ways").glob("[!_]*.py")} == set(LISTS)


def test_every_automatic_guide_has_its_ways():
    tried = {name.split(",")[0].split(" ")[0] for name in (IN_PLATES | TOGETHER | FLOWS | POINTS)}
    tried |= {"AutoLaplaceApproximation"}
    together = (HERE / "ways/guides_together.py").read_text()
    tried |= {name for name in ("AutoDiscreteParallel", "AutoGuideList", "AutoCallable") if name in together}
    assert tried | set(NO_GUIDES) == set(pyro.infer.autoguide.__all__)


def test_every_reparametrisation_has_its_way():
    written = "".join((HERE / f"ways/{name}.py").read_text() for name in ("reparam", "reparam_auxiliary"))
    assert set(re.findall(r"(\w+Reparam)\(", written)) == set(pyro.infer.reparam.__all__)


# Functions of `transforms` that make no flow of the plane.
NO_FLOWS = {
    "conditional_generalized_channel_permute": "of images",
    "generalized_channel_permute": "of images",
    "elu": "reaches no value below -1",
    "identity_transform": "does nothing",
    "iterated": "repeats another; the automatic guides use it",
    "leaky_relu": "leaves out half of the plane in all but name",
    "permute": "used between two couplings",
}


def test_every_flow_of_pyro_has_its_way():
    functions = {name for name in pyro.distributions.transforms.__all__ if name.islower()}
    written = (HERE / "ways/flows.py").read_text()
    used = set(re.findall(r"T\.(\w+)\(", written)) & functions | {"polynomial"}
    assert len(UNCONDITIONAL) + len(CONDITIONAL) + len(UNTOUCHED) >= len(used)
    assert functions - used - set(NO_FLOWS) == set()


def test_a_wrong_number_is_called_wrong(double):
    """The judge itself: a value that is off, one too many, an answer to what must be refused, other words."""
    right = WAYS["arguments: one"].make()
    assert judge(right, None)[0] == "right"
    assert judge(right._replace(exact=right.exact + 0.05), None)[0] == "wrong"
    assert judge(right._replace(exact=right.exact.sum()), None)[0] == "wrong"
    assert judge(right, "site 'z'")[0] == "wrong"
    assert judge(right._replace(guide=lambda x: None), None)[0] == "wrong"
    assert judge(right._replace(guide=lambda x: None), "carries a scale")[0] == "wrong"
    assert judge(right._replace(guide=lambda x: None), "does not sample")[0] == "refused"
