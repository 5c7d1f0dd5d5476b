"""Values that are no grey values in [0, 1] are refused, with how to scale them; those that are go through as they did."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.runs import binary

import pyrovae as pv
from pyrovae.common.arguments import without_checks
from pyrovae.data import Splits, binarize, dequantize

DRAWS = {"binarize": binarize, "dequantize": dequantize}


def grey(num_data=40, num_levels=256):
    """Grey images that have both ends in every datum."""
    x = torch.randint(0, num_levels, (num_data, 1, 4, 3)) / (num_levels - 1)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = 0, 1
    return x


def splits(**parts):
    parts = {name: parts.get(name, grey()) for name in ("train", "validation", "test")}
    return Splits("own", **parts, train_labels=None, validation_labels=None, test_labels=None)


# What people have, and what mends it.
OTHERS = {
    "0..255": (lambda x: x * 255, ValueError, r"in \[0, 1\], found 0 to 255: divide grey images .*x / 255 for bytes"),
    "0..16": (lambda x: x * 16, ValueError, "found 0 to 16: divide grey images by their largest level"),
    "[-1, 1]": (lambda x: x * 2 - 1, ValueError, r"found -1 to 1: scale images in \[-1, 1\] back by \(x \+ 1\) / 2"),
    "standardised": (lambda x: (x - 0.1) / 0.3, ValueError, r"found -0.333333 to 3: undo the standardisation"),
    "log counts": (
        lambda x: (x * 30).log1p(),
        ValueError,
        "data that are not grey images need a likelihood for real values",
    ),
    "NaN": (
        lambda x: x.masked_fill(x == 1, torch.nan),
        ValueError,
        r"found nan in 40 of 40 data, the first x\[0\]: remove",
    ),
    "infinite": (
        lambda x: x.index_put((torch.tensor([7]),), torch.tensor(torch.inf)),
        ValueError,
        r"found inf in 1 of 40 .*x\[7\]",
    ),
    "bytes": (
        lambda x: (x * 255).byte(),
        TypeError,
        r"floating-point values in \[0, 1\], found torch.uint8: x.float\(\) / 255",
    ),
    "whole numbers": (lambda x: x.long(), TypeError, "found torch.int64: .*x.float"),
    "bool": (lambda x: x > 0.5, TypeError, r"found torch.bool: x.float\(\)"),
    "an array": (lambda x: x.numpy(), TypeError, r"a tensor, found ndarray: torch.as_tensor"),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_values_are_refused(kind, draw):
    change, error, match = OTHERS[kind]
    with pytest.raises(error, match=f"^{draw}: images must .*{match}"):
        DRAWS[draw](change(grey()))


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("make", ["dynamic", "static", "dequantized"])
@pytest.mark.parametrize("kind", [kind for kind in OTHERS if kind != "an array"])
def test_splits_name_the_part(kind, make, part):
    change, error, match = OTHERS[kind]
    data = splits(**{part: change(grey())})
    with pytest.raises(error, match=f"^the {part} images of 'own' must .*{match}"):
        data.dequantized() if make == "dequantized" else data.binarized(make)


@settings(max_examples=60, deadline=None)
@given(low=st.floats(-300, 300), width=st.floats(0, 300), seed=st.integers(0, 1000))
def test_the_range_decides(low, width, seed):
    """Judged by the values themselves, up to the rounding of half precision."""
    x = low + width * torch.rand(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    outside = max(-x.min().item(), x.max().item() - 1)
    if outside < 0.9e-3:
        assert set(binarize(x).unique().tolist()) <= {0.0, 1.0}
    elif outside > 1.1e-3:
        with pytest.raises(ValueError, match=r"binarize: images must be values in \[0, 1\]"):
            binarize(x)


@settings(max_examples=60, deadline=None)
@given(
    num_levels=st.sampled_from([2, 5, 17, 256, 4096]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_every_level_is_drawn_within(num_levels, dtype, seed):
    level = torch.randint(0, num_levels, (50,), generator=torch.Generator().manual_seed(seed))
    x = (level / (num_levels - 1)).to(dtype)
    if dtype == torch.float16 and num_levels > 1000:
        return  # it holds no such levels
    drawn = dequantize(x.double() if dtype == torch.float64 else x, num_levels).double() * num_levels
    slack = 2e-3 * num_levels if dtype == torch.float16 else 1e-3
    assert ((drawn >= level - slack) & (drawn <= level + 1 + slack)).all()


@pytest.mark.parametrize(
    ("x", "num_levels", "match"),
    [
        (torch.arange(256) / 256, 256, r"grey levels k / 255, found 0.5 = 127.5 / 255: .*divided by 255, not 256"),
        (torch.arange(17) / 16, 256, r"k / 255, found .*set num_levels="),
        (torch.rand(1000), 256, "k / 255, found .*already continuous"),
        (torch.tensor([0.0, 0.3, 1.0]), 2, "k / 1, found 0.3 = 0.3 / 1"),
    ],
)
def test_values_between_levels_are_refused(x, num_levels, match):
    with pytest.raises(ValueError, match=match):
        dequantize(x, num_levels)
    with pytest.raises(ValueError, match="the train images of 'own' must be grey levels"):
        Splits("own", x, None, x, None, None, None, num_levels=num_levels).dequantized()


def test_other_numbers_of_levels():
    with pytest.raises(ValueError, match="num_levels must be 2 or more, found 1"):
        dequantize(grey(), 1)
    torch.manual_seed(0)
    drawn = dequantize(grey(3, 17), np.int64(17))
    assert 0 <= drawn.min() <= drawn.max() <= 1


def test_what_was_right_stays():
    """Values at both ends, without any, of one number, with gradients, a little beyond by rounding."""
    for x in (
        torch.zeros(0, 3),
        torch.tensor(1.0),
        torch.ones(2, 2, requires_grad=True),
        torch.tensor([1 + 1e-6, -1e-7]),
    ):
        assert torch.equal(binarize(x), x.detach().round())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert binarize(torch.tensor([0.0, 1.0], dtype=dtype)).dtype == dtype
        assert dequantize(torch.tensor([0.0, 1.0], dtype=dtype)).dtype == dtype
    assert dequantize(torch.zeros(0, 3)).shape == (0, 3)


def pair():
    likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [4], 12), (1, 4, 3))
    return pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood), pv.guides.MeanFieldNormal(
        pv.nets.MLP(12, [4]), 2
    )


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["0..255", "[-1, 1]", "NaN"])
def test_fit_refuses_them_in_its_first_epoch(kind, compile, uncompiled):
    change, error, match = OTHERS[kind]
    options = {"epochs": 2, "batch_size": 40, "transform": binarize, "progress": False, "compile": compile}
    with pytest.raises(error, match=match.replace(r"x\[0\]", r"x\[\d+\]")):
        pv.fit(*pair(), change(grey()), **options)
    assert len(pv.fit(*pair(), grey(), **options).history) == 2


def test_a_recording_looks_at_no_values():
    with without_checks():
        assert binarize(torch.tensor([2.0, -1.0])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (
            binary(20) * 0.5,
            r"0 or 1, found 0.5: binarise the data if they are grey values .*binarize.*DiscretizedLogistic",
        ),
        (
            binary(20) * 200,
            r"found 200: values are whole numbers up to 200; if they are bytes .*counts, use a likelihood of counts",
        ),
        ((binary(20) * 39).log1p(), r"found 3.68888: for data from 0 to 3.68888 use a likelihood for real values"),
        (binary(20) - 0.5, r"found -?0.5: for data from -0.5 to 0.5 use a likelihood for real values"),
        (binary(20) * torch.nan, "found nan: remove these data, fill in their values, or say which are missing"),
    ],
)
def test_advice_fits_the_data(x, match):
    """No advice for images where the values cannot be grey ones."""
    model, guide = pair()
    with pytest.raises(ValueError, match=match) as caught:
        pv.log_weights(model, guide, x, num_particles=2)
    if "real values" in match or "nan" in match:
        assert "binari" not in re.sub("binary", "", str(caught.value))


@pytest.mark.parametrize("name", DRAWS)
def test_the_call_for_bytes_is_given(name):
    call = f"pyrovae.fit(model, guide, x.float() / 255, transform=pyrovae.data.{name})"
    for x in (grey() * 255, (grey() * 255).byte()):
        with pytest.raises((TypeError, ValueError), match=re.escape(f", as in {call}")):
            DRAWS[name](x)
    with pytest.raises(ValueError, match="largest level") as raised:
        DRAWS[name](grey() * 16)
    assert "pyrovae.fit" not in str(raised.value)
