"""Whatever holds data becomes the arguments of a program, with nothing lost and nothing dropped."""

import collections

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyrovae as pv
from pyrovae.data.forms import as_batch, is_stream

X = torch.arange(12.0).reshape(4, 3) / 8
Y = torch.tensor([0, 1, 1, 0])
Pair = collections.namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    ("data", "args", "kwargs"),
    [
        (X, [X], {}),
        (X.numpy(), [X], {}),
        (X.double().numpy(), [X], {}),
        (X.double(), [X], {}),
        (X.half().numpy(), [X], {}),
        (np.asfortranarray(X.numpy())[:, ::-1], [X.flip(1)], {}),
        (X.numpy().astype(">f4"), [X], {}),
        (X.double().numpy().astype(">f8"), [X], {}),
        (pd.DataFrame(X.numpy(), columns=["a", "b", "c"]), [X], {}),
        ((X, Y), [X, Y], {}),
        ([X, Y.numpy()], [X, Y], {}),
        (Pair(X, Y), [X, Y], {}),
        (TensorDataset(X), [X], {}),
        (TensorDataset(X, Y), [X, Y], {}),
        ({"x": X, "y": Y}, [], {"x": X, "y": Y}),
        (collections.OrderedDict(x=X.numpy(), y=pd.Series(Y.numpy())), [], {"x": X, "y": Y}),
        ((X, {"y": Y, "z": [Y.numpy()]}), [X, {"y": Y, "z": [Y]}], {}),
        (((X * 8).to(torch.uint8), Y.to(torch.uint8)), [X * 8, Y], {}),
        (((X * 8).to(torch.uint8).numpy(), (Y > 0).numpy()), [X * 8, Y > 0], {}),
        ((X * 8).to(torch.int32), [(X * 8).to(torch.int32)], {}),
        ((X * 8).numpy().astype(np.uint16), [(X * 8).long()], {}),
        ((X, 0.5, None, "word", torch.ones(2)), [X, 0.5, None, "word", torch.ones(2)], {}),
    ],
)
def test_a_form_becomes_arguments(data, args, kwargs):
    batch = as_batch(data)
    torch.testing.assert_close((list(batch.args), batch.kwargs), (args, kwargs), rtol=0, atol=0) if not any(
        value is None or isinstance(value, str) for value in args
    ) else None
    assert batch.num_data == 4
    assert [type(value) for value in batch.args] == [type(value) for value in args]
    index = torch.tensor([2, 0])
    cut = batch.rows(index)
    assert cut.num_data == 2
    assert torch.equal(cut.data, batch.data[index])
    assert torch.equal(batch.rows(slice(1, None)).data, batch.data[1:])


def test_constants_stay_whole():
    batch = as_batch({"x": X, "weights": torch.ones(3), "scale": torch.tensor(2.0), "nested": (Y, torch.ones(5, 4))})
    cut = batch.rows(torch.tensor([1]))
    assert cut.kwargs["weights"].shape == (3,)
    assert cut.kwargs["scale"].ndim == 0
    assert cut.kwargs["nested"][0].tolist() == [1]
    assert cut.kwargs["nested"][1].shape == (5, 4)
    assert list(batch.tensors) == [
        "argument 'x'",
        "argument 'weights'",
        "argument 'scale'",
        "argument 'nested', item 1",
        "argument 'nested', item 2",
    ]


def test_frames_with_missing_cells_and_nullable_columns():
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, None], "c": pd.array([3, None], dtype="Int64"), "d": [True, False]})
    expected = torch.tensor([[1, 0.5, 3, 1], [2, np.nan, np.nan, 0]])
    torch.testing.assert_close(as_batch(frame).args[0], expected, equal_nan=True, rtol=0, atol=0)


@given(st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_no_value_of_a_tensor_changes_in_silence(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    if (tensor.float().double() != tensor).any():
        with pytest.raises(ValueError, match="float64"):
            as_batch(tensor, torch.float32)
    else:
        assert torch.equal(as_batch(tensor, torch.float32).args[0].double(), tensor)


@given(st.lists(st.one_of(st.floats(allow_nan=False), st.integers(-(2**53), 2**53)), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_whole_numbers_of_arrays_are_kept_or_refused(values):
    array = np.array(values, dtype=np.float64)
    is_whole = (array == np.round(array)) & (np.abs(array) <= 2**53)
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float32).astype(np.float64)
    bad = (rounded != array) & (is_whole | np.isinf(rounded) | (rounded == 0))
    if bad.any():
        with pytest.raises(ValueError, match="cannot hold"):
            as_batch(array, torch.float32)
    else:
        assert np.array_equal(as_batch(array, torch.float32).args[0].double().numpy(), rounded)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (pd.DataFrame({"age": [1.0], "sex": ["f"]}), TypeError, "column 'sex' holds no numbers.*'f'"),
        (pd.DataFrame({"day": pd.to_datetime(["2026-11-26"])}), TypeError, "column 'day'.*dates"),
        (pd.DataFrame(index=[0, 1]), ValueError, "without columns"),
        (pd.DataFrame({"id": [2**60]}), ValueError, r"column 'id'.*2\^53"),
        (np.array([[2.0**24 + 1]]), ValueError, "16777217.0"),
        (np.array([2**64 - 1], dtype=np.uint64), ValueError, "no torch integer"),
        (np.array(["a"]), TypeError, "text"),
        (np.array([object()]), TypeError, "Python objects"),
        (np.ma.masked_array([1.0, 2.0], [False, True]), TypeError, "observed=~array.mask"),
        (torch.tensor([0.1], dtype=torch.float64), ValueError, r"0\.1 to.*\.to\(torch\.float32\)"),
        ((X, torch.tensor([0.1], dtype=torch.float64)), ValueError, "argument 2"),
        ({"x": X, "y": {"z": np.array(["a"])}}, TypeError, "argument 'y', 'z'"),
        ([1.0, 2.0], TypeError, "list of numbers"),
        (torch.tensor(1.0), ValueError, r"shape \(\)"),
        (torch.ones(0, 3), ValueError, "at least one datum"),
        ((), ValueError, "tensor of data"),
        ({}, ValueError, "tensor of data"),
        ({1: X}, TypeError, "key 1"),
        (None, TypeError, "NoneType"),
        ("mnist", TypeError, "str"),
        (lambda: X, TypeError, "function"),
    ],
)
def test_what_holds_no_data_is_refused(data, error, words):
    with pytest.raises(error, match=words):
        as_batch(data)


class Items(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return X[index]


class LikeHuggingFace:
    """Indexed by position, without being a torch data set."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"x": X[index]}

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("data", [Items(), DataLoader(Items()), LikeHuggingFace(), DataLoader(TensorDataset(X))])
def test_streams(data):
    assert is_stream(data)


@pytest.mark.parametrize("data", [X, X.numpy(), (X,), {"x": X}, TensorDataset(X), pd.DataFrame({"a": [1]}), None])
def test_data_in_one_piece(data):
    assert not is_stream(data)


def test_rows_with_other_labels_are_refused():
    """Labels shuffled apart from the data: pandas would align them, and rows are taken in order."""
    frame, labels = pd.DataFrame(X.numpy()), pd.Series(Y.numpy())
    shuffled, shorter = frame.loc[[2, 0, 3, 1]], pd.Series([1, 2], index=[7, 8])
    for data in ((shuffled, labels), {"x": shuffled, "y": labels}, (shuffled, {"y": [labels]})):
        with pytest.raises(
            ValueError, match=r"row 0 has the label 0 in argument .* and 2 in argument .*b.loc\[a.index\]"
        ):
            as_batch(data)
    for data in (
        (shuffled, labels.loc[shuffled.index]),
        (shuffled, labels.to_numpy()),
        (shuffled.reset_index(drop=True), labels),
        (frame.rename(index={3: np.nan}), labels.rename(index={3: np.nan})),
        (frame, labels, shorter),  # a constant, not rows
        (frame, labels.rename_axis("digit")),
    ):
        assert as_batch(data).num_data == 4


def test_frames_with_the_same_columns_in_another_order_are_refused():
    """A mask or validation data of another order would belong to other columns."""
    frame = pd.DataFrame(X.numpy(), columns=["a", "b", "c"])
    known, other = frame > 0.2, pd.DataFrame(X.numpy(), columns=["d", "e", "f"])
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(3, [5]), 2)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Normal(pv.nets.MLP(2, [5], 3), (3,)))
    observed, options = known[["c", "a", "b"]], {"epochs": 1, "batch_size": 2, "progress": False}
    for call in (
        lambda: as_batch({"x": frame, "observed": observed}),
        lambda: pv.uses.embed(guide, frame, observed=observed),
        lambda: pv.uses.interpolate(model, guide, frame, frame[["b", "a", "c"]]),
        lambda: pv.log_marginal_likelihood(model, guide, frame, observed=observed, num_particles=2),
        lambda: pv.fit(model, guide, frame, validation=frame[["a", "c", "b"]], **options),
        lambda: pv.fit(model, guide, {"x": frame}, validation={"x": frame[["a", "c", "b"]]}, **options),
    ):
        with pytest.raises(
            ValueError, match=r"the columns of .* are [abc, ]+, and those of .*, b\[a.columns\], or pass"
        ):
            call()
    for data in ((frame, known), (frame, other), (frame, known[["a", "b"]]), {"x": frame, "y": frame["a"]}):
        assert as_batch(data).num_data == 4
    assert pv.uses.interpolate(model, guide, frame, frame, 3).shape == (4, 3, 3)
    pv.fit(model, guide, frame, validation=frame, **options)


def test_uses_of_rows_with_other_labels_are_refused():
    frame, context = pd.DataFrame(X.numpy()), pd.DataFrame({"c": Y.numpy().astype(float)}, index=[1, 0, 2, 3])
    guide = pv.guides.MeanFieldNormal(pv.nets.Concatenate(pv.nets.MLP(4, [5])), 2)
    likelihood = pv.likelihoods.Normal(pv.nets.Concatenate(pv.nets.MLP(3, [5], 3)), (3,))
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood)
    mask = context["c"] == 1
    for call in (
        lambda: pv.uses.embed(guide, frame, context=context),
        lambda: pv.uses.sample_posterior(guide, frame, 2, context=context),
        lambda: pv.uses.reconstruct(model, guide, frame, context=context),
        lambda: pv.uses.edit(model, guide, frame, torch.ones(2), [1.0], context=context),
        lambda: pv.uses.attribute_direction(guide, frame, mask, context=context),
        lambda: pv.uses.attribute_direction(guide, frame, mask.to_numpy(), context=context),
        lambda: pv.log_marginal_likelihood(model, guide, frame, context=context, num_particles=2),
    ):
        with pytest.raises(ValueError, match="row 0 has the label 1 in .* and 0 in"):
            call()
    context.index = frame.index
    assert pv.uses.embed(guide, frame, context=context).shape == (4, 2)
