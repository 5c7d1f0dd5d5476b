"""The page on missing values runs, and its numbers are those of its code."""

import re
from pathlib import Path

import pyro
import pytest
import torch

from pyrovae import docs

PAGE = (Path(docs.__file__).parent / "missing_values.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page():
    """The namespace that the page's code leaves, its blocks in order."""
    pyro.set_rng_seed(0)
    blocks = [part.split("```")[0] for part in PAGE.split("```python\n")[1:]]
    assert len(blocks) == 3
    namespace = {"__name__": "__main__"}
    exec(compile("\n".join(blocks), "missing_values.md", "exec"), namespace)
    return namespace


def test_the_frame_is_filled_better_than_by_its_most_usual_values(page):
    frame, complete, filled = page["frame"], page["complete"], page["filled"]
    assert not filled.isna().any().any()
    for column in ("height", "weight"):
        missing = frame[column].isna()
        error = (filled[column] - complete[column])[missing].pow(2).mean() ** 0.5
        assert error < 0.8 * complete[column].std()
        assert (filled[column] - complete[column])[~missing].abs().max() < 1e-4
    missing = frame["shirt"].isna()
    right = (filled["shirt"].astype(str) == complete["shirt"])[missing].mean()
    assert right > (complete["shirt"] == complete["shirt"].mode()[0])[missing].mean() + 0.1
    assert len(page["several"]) == 5
    assert not any(table.isna().any().any() for table in page["several"])


def test_draws_keep_the_spread_that_means_lose(page):
    missing = page["frame"]["height"].isna()
    spread = page["complete"]["height"][missing].std()
    drawn = torch.tensor([table["height"][missing].std() for table in page["several"]]).mean().item()
    assert page["filled"]["height"][missing].std() < drawn
    assert drawn == pytest.approx(spread, rel=0.25)


def test_a_model_of_the_mask_removes_most_of_the_bias(page):
    """The numbers of the page, up to what another version of torch may change in the training."""
    bias = page["bias"]
    assert abs(bias["not-MIWAE"]) < abs(bias["MIWAE"]) / 4
    for name, found in bias.items():
        stated = re.search(rf"^\| {name} \| (\S+) \|$", PAGE, re.M)
        assert found == pytest.approx(float(stated.group(1)), abs=0.06), name
