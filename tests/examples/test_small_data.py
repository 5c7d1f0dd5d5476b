"""Densities of small data sets: the script on few epochs, and the model without latents that it compares with."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from shared.processes import run

import pyrovae as pv

SCRIPT = Path(__file__).parents[2] / "examples/reproductions/small_data.py"


def test_small_data(tmp_path):
    options = ("--seeds", 1, "--epochs", 2, "--num-particles", 30, "--priors", "standard-normal", "vamp")
    done = run(SCRIPT, "--tasks", "digits", "wine", *options, "--out", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["task"], row["prior"]) for row in found["rows"]] == [
        (task, prior) for task in ("digits", "wine") for prior in ("standard-normal", "vamp")
    ]
    assert all(math.isfinite(row["nll"]) and row["nll"] <= -row["elbo"] for row in found["rows"])
    assert [row["sizes"] for row in found["rows"][1:3]] == [[1197, 300, 300], [124, 27, 27]]
    assert found["rows"][0]["without_latents"] is None
    logs = [np.log(split.values.double().numpy() + 1e-3) for split in (pv.data.wine().train, pv.data.wine().test)]
    train, test = ((rows - logs[0].mean(0)) / logs[0].std(0, ddof=1) for rows in logs)
    covariance = train.T @ train / len(train)  # the mean is 0
    squares = np.einsum("ni,ij,nj->n", test, np.linalg.inv(covariance), test)
    nll = (squares + np.linalg.slogdet(2 * math.pi * covariance)[1]).mean() / 2
    assert found["rows"][2]["without_latents"] == pytest.approx(nll, rel=1e-4)


def test_missing_data_are_named(tmp_path):
    done = run(SCRIPT, "--tasks", "freyfaces", "--data-dir", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: freyfaces: ")
    assert "Traceback" not in done.stderr
