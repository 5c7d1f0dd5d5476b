"""log p(x) as a detector: areas under known curves, their errors, and the sets to try."""

import math

import numpy as np
import pytest
import torch
from conftest import within

from pyrovae import LogMarginalLikelihood, detection


def test_area_of_two_normals():
    """Scores N(d, 1) and N(0, 1): AUC = Phi(d / sqrt 2)."""
    shift = 0.8
    exact = 0.5 * (1 + math.erf(shift / 2))
    found = detection.roc(torch.randn(3000) + shift, torch.randn(2000))
    within(found.auc, exact, found.stderr)
    swapped = detection.roc(torch.randn(3000), torch.randn(2000) + shift)
    within(swapped.auc, 1 - exact, swapped.stderr)
    assert (found.num_inside, found.num_outside) == (3000, 2000)
    # P(outside < 5 % quantile of inside)
    at = 0.5 * (1 + math.erf((shift - 1.6449) / math.sqrt(2)))
    assert found.caught_at(0.05) == pytest.approx(at, abs=0.06)


def test_the_error_is_the_spread_of_repeats():
    repeats = [detection.roc(torch.randn(40) + 0.7, torch.randn(60)) for _ in range(300)]
    spread = np.std([found.auc for found in repeats], ddof=1)
    assert np.mean([found.stderr for found in repeats]) == pytest.approx(spread, rel=0.2)


def test_by_hand():
    found = detection.roc([1.0, 2.0, 3.0], [0.0, 2.0])
    assert found.auc == pytest.approx((1 + 1 + 1 + 0 + 0.5 + 1) / 6)
    perfect = detection.roc([1.0, 2.0], [-math.inf, 0.0])
    assert (perfect.auc, perfect.stderr, perfect.caught_at(0.0)) == (1.0, 0.0, 1.0)
    assert detection.roc([1.0, 1.0], [1.0, 1.0]).auc == 0.5
    assert detection.roc([0.0, 1.0], [2.0, 3.0]).auc == 0.0
    curve = detection.roc(torch.randn(20), torch.randn(30))
    assert curve.auc == pytest.approx(torch.trapezoid(*map(torch.as_tensor, (curve.caught, curve.false_alarms))).item())
    for scores, match in (([1.0], "2 data or more"), ([1.0, math.nan], "1 NaN"), ([[1.0, 2.0]], "shape")):
        with pytest.raises(ValueError, match=match):
            detection.roc(scores, [1.0, 2.0])


def test_sets_from_elsewhere():
    x = torch.rand(6, 3, 4, 5)
    assert torch.allclose(detection.inverted(x), 1 - x)
    turned = detection.rotated(x)
    assert turned.shape == (6, 3, 5, 4)
    assert torch.equal(turned[..., -1, 0], x[..., 0, 0])  # the upper left corner goes to the lower left
    assert torch.equal(detection.rotated(x, 4), x)
    mixed = detection.shuffled(x)
    assert mixed.shape == x.shape
    before, after = (images.flatten(2).transpose(1, 2) for images in (x, mixed))
    for image, other in zip(before, after, strict=True):
        assert {tuple(pixel) for pixel in image.tolist()} == {tuple(pixel) for pixel in other.tolist()}
    assert not torch.equal(mixed, x)
    order = [
        (row.unsqueeze(0) == image.unsqueeze(1)).all(-1).nonzero()[:, 1]
        for row, image in zip(before, after, strict=True)
    ]
    assert not torch.equal(order[0], order[1])  # an order of its own for each


def test_results_are_scored_by_their_log_prob():
    inside, outside = (LogMarginalLikelihood.from_log_weights(torch.randn(30, num).double()) for num in (20, 15))
    expected = detection.roc(inside.log_prob, outside.log_prob)
    for pair in ((inside, outside), (inside, outside.log_prob), (inside.log_prob.numpy(), outside)):
        assert detection.roc(*pair).auc == expected.auc


@pytest.mark.parametrize("scores", [{"a": [1.0, 2.0]}, object(), ["a", "b"], [[1.0], [1.0, 2.0]]])
def test_what_holds_no_scores(scores):
    with pytest.raises(TypeError, match="outside must be scores .* or a result of log_marginal_likelihood; found"):
        detection.roc([1.0, 2.0], scores)


def test_sets_from_other_images():
    """1 - x of bytes wraps around, and images without channels would have their columns shuffled alike."""
    for dtype in (torch.long, torch.uint8, torch.bool):
        zero_one = torch.tensor([0, 1]).to(dtype)
        assert torch.equal(detection.inverted(zero_one), zero_one.flip(0))
    for x in (torch.arange(256).byte(), torch.rand(9) * 255, torch.rand(50) * 2 - 1, torch.full((3,), torch.nan)):
        with pytest.raises(ValueError, match=r"inverted: x must be values in \[0, 1\]"):
            detection.inverted(x)
    with pytest.raises(ValueError, match=r"found \(5, 8, 8\): .*x.unsqueeze\(1\)"):
        detection.shuffled(torch.rand(5, 8, 8))


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, list])
@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 1], [0.0, 0.0, 1.0, 0.0, 0.0], [True, False, True, False, True]])
def test_labels_are_no_scores(kind, labels):
    """The order of scikit-learn, `roc_auc_score(labels, scores)`, and the other one."""
    scores = torch.randn(5)
    with pytest.raises(ValueError, match="outside holds only 0 and 1, as labels do: .*scores\\[labels == 0\\]"):
        detection.roc(scores, kind(labels))
    with pytest.raises(ValueError, match="inside holds only 0 and 1"):
        detection.roc(kind(labels), scores)
    assert detection.roc(labels, labels).auc == 0.5  # two classifiers' answers


def test_scores_of_zero_and_one():
    assert detection.roc([0.0, 1.0, 1.0], [-1.0, -2.0]).auc == 1.0
