"""Whatever is put in, by hypothesis: the right answer, or a ValueError or TypeError that says what is wrong.

The inputs are drawn alike in every run (derandomize), so that a failure comes again.
"""

import math
import struct
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from shared.runs import make

import pyrovae as pv
from pyrovae.data.idx import _check_idx

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def some(number):
    return settings(max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=CHECKS)


PAIR = make()
SHAPE = (1, 4, 3)


@st.composite
def batches(draw):
    """(x, whether it is a batch of binary images, of any dtype: all become the programs' float32)."""
    num_data = draw(st.sampled_from([0, 1, 2, 5]))
    shape = draw(st.sampled_from([SHAPE] * 6 + [(1, 3, 4), (12,), (4, 3), (1, 8, 8), (), (2, 1, 4, 3)]))
    dtype = draw(
        st.sampled_from([torch.float32] * 5 + [torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool])
    )
    x = torch.rand(num_data, *shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).round()
    is_good = num_data > 0 and shape == SHAPE
    bad = draw(st.sampled_from([None] * 4 + [0.5, 2.0, -1.0, math.nan, math.inf]))
    if bad is not None and x.numel() and dtype.is_floating_point:
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = bad
    x = x.to(dtype)
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
    if layout == "transposed" and x.ndim > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "strided" and x.ndim > 0:
        x = torch.stack([x, x], -1)[..., 0]
    elif layout == "expanded" and x.ndim > 0 and len(x):
        x = x[:1].expand(x.shape)
    return x, is_good and bool(((x == 0) | (x == 1)).all())


@given(batches(), st.sampled_from([1, 2, 30]))
@some(60)
def test_any_batch_is_evaluated_rightly_or_refused(batch, num_particles):
    """Right: as the same numbers in a fresh tensor of float32, datum by datum at this seed."""
    x, is_good = batch
    if not is_good:
        with pytest.raises((ValueError, TypeError), match=r"\w+ .*\w+"):
            pv.log_marginal_likelihood(*PAIR, x, num_particles=num_particles)
        return
    pyro.set_rng_seed(1)
    found = pv.log_weights(*PAIR, x, num_particles=num_particles)
    pyro.set_rng_seed(1)
    fresh = x.to(torch.float32).clone(memory_format=torch.contiguous_format)
    expected = pv.log_weights(*PAIR, fresh, num_particles=num_particles)
    assert found.shape == (num_particles, len(x))
    assert torch.equal(found, expected)


@given(batches())
@some(40)
def test_any_batch_is_trained_on_or_refused(batch):
    x, is_good = batch
    model, guide = make()
    if not is_good:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=r"\w+ .*\w+"):
            pv.fit(model, guide, x, epochs=1, batch_size=3, progress=False)
    else:
        assert math.isfinite(pv.fit(model, guide, x, epochs=1, batch_size=3, progress=False).history[0]["elbo"])
    assert all(parameter.isfinite().all() for module in (model, guide) for parameter in module.parameters())


NOT_COUNTS = st.sampled_from([0, -1, -(10**9), 1.0, 2.5, math.nan, "3", None, True, [1]])


@given(NOT_COUNTS, st.sampled_from(["epochs", "batch_size"]))
@some(30)
def test_what_is_no_count_is_refused_by_fit(value, name):
    assume((name, value) != ("batch_size", None))  # which stands for 200, or a loader's own
    options = {"epochs": 1, "batch_size": 2, name: value}
    with pytest.raises((ValueError, TypeError), match=name):
        pv.fit(*PAIR, torch.zeros(2, *SHAPE), progress=False, **options)


@given(NOT_COUNTS)
@some(15)
def test_what_is_no_count_of_particles_is_refused(value):
    for function in (pv.log_weights, pv.log_marginal_likelihood):
        with pytest.raises((ValueError, TypeError), match="num_particles"):
            function(*PAIR, torch.zeros(2, *SHAPE), num_particles=value)
    with pytest.raises((ValueError, TypeError), match="num_samples"):
        PAIR[0].generate(value)


@given(st.sampled_from([0, -1.0, math.nan, -math.inf, "fast", None]), st.sampled_from(["learning_rate", "clip_norm"]))
@some(20)
def test_rates_and_norms_that_are_none(value, name):
    if value is None:  # the default of both
        return
    with pytest.raises((ValueError, TypeError), match=name):
        pv.fit(*PAIR, torch.zeros(2, *SHAPE), epochs=1, progress=False, **{name: value})


# --- programs ---------------------------------------------------------------------------------------------------------


def plates_of(names, size):
    """One plate inside the other, from the right."""
    return [pyro.plate(name, size if rank == 0 else 1, dim=-1 - rank) for rank, name in enumerate(names)]


@st.composite
def programs(draw):
    """A conjugate pair, z ~ N(0, 1), x ~ N(z, 1), whose guide is the posterior; with faults in plates and sites."""
    plates = st.sampled_from([["data"]] * 4 + [[], ["rows"], ["data", "rows"]])
    sites = st.sampled_from([["z"]] * 5 + [[], ["z", "w"], ["y"]])
    of_model, of_guide, guide_sites = draw(plates), draw(plates), draw(sites)
    model_sites = draw(st.sampled_from([["z"]] * 5 + [["z", "w"]]))
    observes = draw(st.sampled_from([True] * 5 + [False]))

    def model(x):
        with contexts(plates_of(of_model, len(x))):
            values = [pyro.sample(name, dist.Normal(x.new_zeros(len(x)), 1.0)) for name in model_sites]
            return pyro.sample("x", dist.Normal(values[0], 1.0), obs=x if observes else None)

    def guide(x):
        with contexts(plates_of(of_guide, len(x))):
            for name in guide_sites:
                pyro.sample(
                    name, dist.Normal(x / 2, 0.5**0.5) if name == "z" else dist.Normal(torch.zeros_like(x), 1.0)
                )

    return model, guide


def contexts(plates):
    from contextlib import ExitStack

    stack = ExitStack()
    for plate in plates:
        stack.enter_context(plate)
    return stack


@given(programs(), st.sampled_from([None, "data", "rows"]), st.sampled_from([1, 2, 4]))
@some(60)
def test_any_pair_of_programs_is_evaluated_exactly_or_refused(pair, plate, num_data):
    """With the posterior as guide every weight is p(x): log_prob is exact, per datum or for the whole program."""
    x = torch.linspace(-1.0, 2.0, num_data, dtype=torch.float64)
    exact = dist.Normal(torch.zeros((), dtype=torch.float64), 2**0.5).log_prob(x)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of draws made in a loop
            lml = pv.log_marginal_likelihood(*pair, x, plate=plate, num_particles=3)
    except ValueError:
        return
    if len(lml) == num_data:
        assert torch.allclose(lml.log_prob, exact, atol=1e-6)
    else:
        assert len(lml) == 1
        assert torch.allclose(lml.log_prob, exact.sum(), atol=1e-6)


# --- files ------------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=300))
@some(60)
def test_any_bytes_are_no_checkpoint(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt"):
        pv.load(tmp_path / "a.pt")


@given(st.integers(0, 27), st.integers(0, 255), st.integers(0, 28), st.booleans())
@some(80)
def test_any_damage_of_an_idx_file_is_named(tmp_path, place, byte, length, cut):
    """A file of two 2x3 images: header of 16 bytes, 12 pixels. Changed pixels alone cannot be noticed."""
    whole = struct.pack(">IIII", 0x0803, 2, 2, 3) + bytes(range(12))
    damaged = whole[:length] if cut else whole[:place] + bytes([byte]) + whole[place + 1 :]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damaged)
    if damaged[:16] == whole[:16] and len(damaged) == len(whole):
        _check_idx(path, 3)
        return
    with pytest.raises(ValueError, match="train-images-idx3-ubyte .*(damaged|not an IDX file)"):
        _check_idx(path, 3)
