"""The data walk through few functions before the user's model sees them (`python tests/walk.py` lists them)."""

import pytest
from walk import BOUNDS, WALKS, walk


@pytest.mark.parametrize("name", BOUNDS)
def test_the_data_walk_through_few_functions(name):
    found = walk(WALKS[name])
    most_places, most_returns = BOUNDS[name]
    assert found.places[0][1] == name
    assert found.places[-1][1].rpartition(".")[2] in ("trace_program", "prior")
    assert len(found.places) <= most_places, str(found)
    assert found.returns <= most_returns, str(found)
