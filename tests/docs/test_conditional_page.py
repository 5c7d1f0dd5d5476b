"""The page on conditional VAEs runs, and what it says of its results is true."""

import math
from pathlib import Path

import pytest
import torch

import pyrovae as pv
from pyrovae import docs

PAGE = (Path(docs.__file__).parent / "conditional.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page():
    """The namespace that the page's code leaves, its blocks in order."""
    blocks = [part.split("```")[0] for part in PAGE.split("```python\n")[1:]]
    assert len(blocks) == 5
    namespace = {}
    exec(compile("\n".join(blocks), "conditional.md", "exec"), namespace)
    return namespace


def test_the_label_matters_by_as_much_as_the_page_says(page):
    """The page says "about 2.4 nats"; the training of another version of torch may give another number near it."""
    difference = page["right"].log_prob - page["wrong"].log_prob
    assert 1.5 < difference.mean() < 3.5
    assert (page["right"].gap >= 0).all()


def test_classes_by_bayes_rule(page):
    assert 0.7 < page["accuracy"] < 0.95
    probs = page["class_probs"]
    assert probs.shape == (300, 10)
    torch.testing.assert_close(probs.sum(1), torch.ones(300, dtype=probs.dtype))


def test_the_own_class_of_the_table_is_the_evaluation_with_the_labels(page):
    """Two evaluations of one number with different draws, so they agree up to their errors."""
    own = page["log_prob"].gather(1, page["labels"].unsqueeze(1)).squeeze(1)
    spread = (own - page["right"].log_prob).std() / math.sqrt(len(own))
    bias = 0.1  # nats; 100 particles against 500
    assert abs((own - page["right"].log_prob).mean()) < 4.5 * spread + bias
    assert (page["log_prob_without_label"] >= own - math.log(10) - 1e-9).all()


def test_generated_digits_follow_their_label(page):
    """What sets the mean image of a label apart from the mean of all images is most like that of the label's training images."""
    data, drawn = page["data"], page["model"].generate(200, context=torch.arange(10).repeat(20), mean=True)
    trained = torch.stack([data.train[data.train_labels == label].mean(0) for label in range(10)]).flatten(1)
    generated = drawn.reshape(20, 10, 64).mean(0)
    of_trained, of_generated = trained - trained.mean(0), generated - generated.mean(0)
    alike = torch.nn.functional.cosine_similarity(of_generated.unsqueeze(1), of_trained, dim=-1)
    assert (alike.argmax(1) == torch.arange(10)).sum() >= 9
    assert page["one_of_each"].shape == (10, 1, 8, 8)
    assert page["many_sevens"].shape == (16, 1, 8, 8)
    assert page["codes"].shape == (300, 8)
    assert page["again"].shape == page["as_threes"].shape == (300, 1, 8, 8)


def test_validation_images_stay_as_they_are_under_the_transform(page):
    images = page["data"].validation
    drawn, _ = page["draw_binary"]((images, page["data"].validation_labels))
    assert torch.equal(drawn, images)
    assert isinstance(page["result"], pv.FitResult)
