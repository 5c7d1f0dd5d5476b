"""Training that would move nothing, or the wrong thing: each kind is refused with names and a remedy, and its right form trains."""

import gc
import logging

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from shared.runs import binary, make, parameters, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv

OPTIONS = {"epochs": 2, "batch_size": 50, "learning_rate": 0.02, "progress": False}


class Plain(nn.Module):
    """A VAE of Pyro's tutorial: its parts are declared by `pyro.module`, unless told otherwise."""

    def __init__(self, declared=("decoder", "encoder")):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.declared = declared

    def declare(self, name):
        if name in self.declared:
            pyro.module(name, getattr(self, name))

    def model(self, x):
        self.declare("decoder")
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        self.declare("encoder")
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.7).to_event(1))


class Own(PyroModule):
    """The same as a PyroModule, which declares what it uses by itself."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = PyroModule[nn.Linear](2, 3), PyroModule[nn.Linear](3, 2)

    def forward(self, x):
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.7).to_event(1))


class OwnGuide(PyroModule):
    def __init__(self, own):
        super().__init__()
        self.encoder = own.encoder

    def forward(self, x):
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.7).to_event(1))


class Scaled(PyroModule):
    """Its parameter is constrained, so that PyroModule exchanges it for the one in the store."""

    def __init__(self, name=""):
        super().__init__(name)
        self.scale = PyroParam(torch.rand(3) + 0.5, dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, self.scale).to_event(1), obs=x)


def centred(x):
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))


def global_mean(x):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    with pyro.plate("d", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def plain():
    vae = Plain()
    return vae.model, vae.guide, vae


def own():
    vae = Own()
    guide = OwnGuide(vae)
    return vae, guide, nn.ModuleList([vae, guide])


def scaled():
    module = Scaled()
    return module, centred, module


def automatic():
    guide = AutoNormal(global_mean)
    return global_mean, guide, guide


def data():
    return torch.randn(100, 3) + 2


@pytest.mark.parametrize("kind", [plain, own, scaled, automatic])
def test_a_second_model_under_the_names_of_the_first(kind):
    """Refused with nothing moved, in either; right once the store is cleared; and the first may always go on."""
    x = data()
    model, guide, first = kind()
    pv.fit(model, guide, x, **OPTIONS)
    before = parameters(first)
    pv.fit(model, guide, x, **OPTIONS)
    assert not same(before, parameters(first)), "the same model trains on"

    before, other = parameters(first), kind()
    start = parameters(other[2])
    with pytest.raises(ValueError, match=r"Pyro's store has .* another model .*[Cc]all pyro\.clear_param_store\(\)"):
        pv.fit(*other[:2], x, **OPTIONS)
    assert same(before, parameters(first))
    assert not start or same(start, parameters(other[2]))  # an automatic guide has none before
    assert not {id(p) for p in first.parameters()} & {id(p) for p in other[2].parameters()}

    pyro.clear_param_store()
    start = parameters(other[2])
    pv.fit(*other[:2], x, **OPTIONS)
    assert all(not torch.equal(a, b) for a, b in zip(start, parameters(other[2]), strict=True))
    assert same(before, parameters(first))


def test_two_models_under_names_of_their_own():
    modules = [Scaled("first"), Scaled("second")]
    for module in modules:
        before = [parameters(other) for other in modules]
        pv.fit(module, centred, data(), **OPTIONS)
        assert [same(*pair) for pair in zip(before, map(parameters, modules), strict=True)] == [
            other is not module for other in modules
        ]


def named():
    module = nn.Linear(3, 3)

    def guide(x):
        pyro.module("encoder", module)
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(module(x), 0.7).to_event(1))

    return local, guide, module


@pytest.mark.parametrize("kind", [plain, own, scaled, automatic, named])
def test_a_second_model_after_the_first_is_gone(kind, tmp_path):
    """A fold of cross-validation, a cell run again: it does not begin where the first ended, unless told to."""
    x = data()
    checkpoint = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 0}
    model, guide, first = kind()
    pv.fit(model, guide, x, **OPTIONS, **checkpoint)
    ends = [parameter.detach().clone() for parameter in pyro.get_param_store()._params.values()]
    del model, guide, first
    gc.collect()
    model, guide, second = kind()
    start = parameters(second)
    with pytest.raises(ValueError, match=r"Pyro's store has .* another model .*clear_param_store"):
        pv.fit(model, guide, x, **OPTIONS)
    assert not start or same(start, parameters(second))
    if kind in (plain, own, named):
        return

    model, guide, third = kind()
    pv.fit(model, guide, x, **OPTIONS, **checkpoint, resume=True)  # all values come from the file
    assert same(ends, [pyro.get_param_store()._params[name] for name in pyro.get_param_store()._params])

    del model, guide, second, third
    gc.collect()
    model, guide, fourth = kind()
    guide(x)
    poutine.condition(model, data={})(x)
    pv.fit(model, guide, x, **{**OPTIONS, "learning_rate": 1e-9})
    found = {id(parameter) for parameter in fourth.parameters()}
    assert found & {id(parameter) for parameter in pyro.get_param_store()._params.values()}
    for kept, stored in zip(ends, pyro.get_param_store()._params.values(), strict=True):
        assert torch.allclose(kept, stored, atol=1e-6)


def test_parameters_of_plain_functions_go_on():
    """They are nobody's own: Pyro means them to be found again."""
    x = data()
    for _ in range(2):
        before = parameters_in_store()
        pv.fit(table_free_model, amortised, x, **OPTIONS)
        after = parameters_in_store()
        assert not before or not same(before, after)


def table_free_model(x):
    loc = pyro.param("prior_loc", torch.zeros(3))
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def parameters_in_store():
    return [parameter.detach().clone() for parameter in pyro.get_param_store()._params.values()]


@pytest.mark.parametrize(
    ("make_pair", "named"),
    [
        (lambda: Plain(("encoder",)), "Plain.decoder.weight, Plain.decoder.bias"),
        (lambda: Plain(("decoder",)), "Plain.encoder.0.weight, Plain.encoder.0.bias"),
    ],
)
def test_a_part_that_nobody_declares(make_pair, named):
    vae = make_pair()
    before, buffers = parameters(vae), [buffer.clone() for buffer in vae.buffers()]
    match = (
        rf"parameters that training would not change: {named}.*pyro\.module\(name, module\).*requires_grad_\(False\)"
    )
    with pytest.raises(ValueError, match=match):
        pv.fit(vae.model, vae.guide, data(), **OPTIONS)
    assert same(before, parameters(vae))
    assert same(buffers, list(vae.buffers()))
    assert all(parameter.grad is None for parameter in vae.parameters())
    undeclared = vae.decoder if "decoder" not in vae.declared else vae.encoder
    undeclared.requires_grad_(False)  # said to stay as it is
    pv.fit(vae.model, vae.guide, data(), **OPTIONS)
    assert [not torch.equal(a, b) for a, b in zip(before, parameters(vae), strict=True)] == [
        parameter.requires_grad for parameter in vae.parameters()
    ]


def test_a_tensor_that_nobody_declares():
    weight = torch.ones(3, requires_grad=True)

    def model(x):
        pyro.param("bias", torch.zeros(3))
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * weight + pyro.param("bias"), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"goes through 1 parameters .*a tensor of shape \(3,\)"):
        pv.fit(model, centred, data(), **OPTIONS)


@pytest.mark.parametrize("loss", [Trace_ELBO(), Trace_ELBO(num_particles=3), pv.objectives.ImportanceWeighted(3)])
def test_every_loss_shows_it(loss):
    vae = Plain(("encoder",))
    with pytest.raises(ValueError, match=r"Plain\.decoder\.weight"):
        pv.fit(vae.model, vae.guide, data(), loss=loss, **OPTIONS)


def test_a_resumed_run_is_looked_at_too(tmp_path):
    first, second = Plain(), Plain()
    options = {**OPTIONS, "checkpoint": tmp_path / "run.pt"}
    pv.fit(first.model, first.guide, data(), **{**options, "epochs": 2})
    x = data()
    (tmp_path / "run.pt").unlink()
    pv.fit(first.model, first.guide, x, **options)
    before = parameters(first)
    with pytest.raises(ValueError, match=r"Pyro's store has those of another model"):
        pv.fit(second.model, second.guide, x, **options, resume=True)
    assert same(before, parameters(first))


def test_gradients_that_are_cut_off():
    class Cut(Plain):
        def model(self, x):
            with torch.no_grad():
                super().model(x)

        def guide(self, x):
            self.declare("encoder")
            with torch.no_grad(), pyro.plate("d", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x), 0.7).to_event(1))

    vae = Cut()
    with pytest.raises(ValueError, match=r"no parameter gets a gradient.*Look for detach\(\)"):
        pv.fit(vae.model, vae.guide, data(), **OPTIONS)


def test_a_part_without_a_gradient_is_logged(caplog):
    class Headed(Plain):
        def __init__(self):
            super().__init__()
            self.decoder.head = nn.Linear(2, 2)

    vae = Headed()
    before = parameters(vae)
    with caplog.at_level(logging.WARNING, "pyrovae"):
        pv.fit(vae.model, vae.guide, data(), **OPTIONS)
    assert [record.message for record in caplog.records] == [
        "2 of 8 parameters get no gradient in the first step, and stay as they are until they do: decoder.head.weight, "
        "decoder.head.bias"
    ]
    assert sum(torch.equal(a, b) for a, b in zip(before, parameters(vae), strict=True)) == 2


def test_gradients_from_before_are_not_trained_on():
    pairs = [make(), make()]
    for parameter in pairs[0][0].parameters():
        parameter.grad = torch.ones_like(parameter)
    for pair in pairs:
        pyro.set_rng_seed(1)
        pv.fit(*pair, binary(), epochs=1, progress=False)
    assert same(parameters(*pairs[0]), parameters(*pairs[1]))


def without_obs(x):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


def obs_is_none(x, y=None):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1))
        if y is not None:
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


def deterministic_only(x):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1))
        pyro.deterministic("x", z + x)


def also_x(x):
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))
        pyro.sample("x", dist.Normal(x, 0.7).to_event(1))


@pytest.mark.parametrize(
    ("model", "guide"), [(without_obs, also_x), (obs_is_none, centred), (deterministic_only, centred)]
)
def test_a_model_that_observes_nothing(model, guide):
    with pytest.raises(ValueError, match=r"the model observes nothing \(latent sites: \[.*'z'.*obs="):
        pv.fit(model, guide, data(), **OPTIONS)
    assert pyro.param("loc").eq(0).all()


def test_what_counts_as_an_observation():
    def factor(x):
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1))
            pyro.factor("x", -(z - x).square().sum(-1))

    def conditioned(x):
        return poutine.condition(without_obs, data={"x": x})(x)

    for model in (factor, conditioned):
        pyro.clear_param_store()
        pv.fit(model, centred, data(), **OPTIONS)
        assert pyro.param("loc").ne(0).all()


def masked_model(how, mask):
    def model(x):
        weight = pyro.param("weight", torch.ones(3))
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            density = dist.Normal(z * weight, 1.0)
            seen = mask(x)
            if how == "elements":
                pyro.sample("x", density.mask(seen).to_event(1), obs=x.nan_to_num())
            elif how == "events":
                seen = seen if seen is False else seen.all(-1)
                pyro.sample("x", density.to_event(1).mask(seen), obs=x.nan_to_num())
            else:
                with poutine.mask(mask=seen if seen is False else seen.all(-1)):
                    pyro.sample("x", density.to_event(1), obs=x.nan_to_num())

    return model


def of_what_is_there(x):
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.3)) * x.nan_to_num(), 0.7).to_event(1))


@pytest.mark.parametrize("how", ["elements", "events", "handler"])
@pytest.mark.parametrize("mask", [lambda x: False, lambda x: torch.zeros(x.shape, dtype=torch.bool), torch.isnan])
def test_a_model_whose_data_are_all_masked_out(how, mask):
    with pytest.raises(ValueError, match=r"observes nothing .*all data are masked out at \['x'\]; look at the mask"):
        pv.fit(masked_model(how, mask), of_what_is_there, data(), **OPTIONS)
    assert pyro.param("weight").eq(1).all()


@pytest.mark.parametrize("how", ["elements", "events", "handler"])
@pytest.mark.parametrize("as_loader", [False, True])
def test_a_first_batch_without_any_data(how, as_loader):
    """Most labels are missing: a batch may have none, and the next one does."""
    x = torch.full((60, 3), torch.nan)
    x[-1] = 1.0
    train = DataLoader(TensorDataset(x), batch_size=2) if as_loader else x
    options = OPTIONS if as_loader else {**OPTIONS, "batch_size": 2}
    options = {**options, "batch_size": None} if as_loader else options
    pv.fit(masked_model(how, lambda x: ~x.isnan()), of_what_is_there, train, **options)
    assert pyro.param("weight").ne(1).all()


def local(x):
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def table_guide(x):
    loc = pyro.param("loc", torch.zeros_like(x))
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))


def first_rows_guide(x):
    """A table longer than any batch."""
    loc = pyro.param("loc", torch.zeros(500, x.shape[1]))[: len(x)]
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))


class Embedded(nn.Module):
    def __init__(self, num_data, dim):
        super().__init__()
        self.table = nn.Embedding(num_data, dim)

    def forward(self, x):
        pyro.module("embedded", self)
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(self.table(torch.arange(len(x))), 0.7).to_event(1))


def amortised(x):
    weight = pyro.param("weight", torch.tensor(0.3))
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(weight * x, 0.7).to_event(1))


def table_model(x):
    loc = pyro.param("prior_loc", torch.zeros_like(x))
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def holds_its_data(num_data, dim):
    covariates = torch.randn(num_data, dim)

    def model(x):
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(covariates, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return model


def mixed(x):
    """A latent for all data beside those of each."""
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        pyro.sample("x", dist.Normal(z + shift, 1.0).to_event(1), obs=x)


BY_POSITION = {
    "AutoNormal": lambda n, d: (local, AutoNormal(local), "z"),
    "AutoDiagonalNormal": lambda n, d: (local, AutoDiagonalNormal(local), "z"),
    "AutoMultivariateNormal": lambda n, d: (local, AutoMultivariateNormal(local), "z"),
    "AutoLowRankMultivariateNormal": lambda n, d: (local, AutoLowRankMultivariateNormal(local), "z"),
    "global and local": lambda n, d: (mixed, AutoNormal(mixed), "z"),
    "table": lambda n, d: (local, table_guide, "z"),
    "longer table": lambda n, d: (local, first_rows_guide, "z"),
    "embedding": lambda n, d: (local, Embedded(n, d), "z"),
    "model": lambda n, d: (table_model, amortised, "z"),
    "closure": lambda n, d: (holds_its_data(n, d), amortised, "z"),
}


@pytest.mark.parametrize("kind", BY_POSITION)
@settings(max_examples=4, deadline=None)
@given(num_data=st.integers(2, 60), dim=st.integers(1, 4), shuffled_loader=st.booleans())
def test_numbers_that_go_by_the_place_in_the_batch(kind, num_data, dim, shuffled_loader):
    """Refused under shuffling, and right with all data in one batch and one order."""
    pyro.clear_param_store()
    x = torch.randn(num_data, dim) + 1
    model, guide, site = BY_POSITION[kind](num_data, dim)
    train = DataLoader(TensorDataset(x), num_data, shuffle=True) if shuffled_loader else x
    match = rf"the numbers of site '{site}' go by the place of a datum .*fit shuffles.*instead of x"
    with pytest.raises(ValueError, match=match):
        pv.fit(model, guide, train, epochs=2, progress=False)
    pv.fit(model, guide, DataLoader(TensorDataset(x), num_data), epochs=2, progress=False)


def test_parameters_per_datum_in_one_order_reach_the_posterior():
    x = torch.linspace(-2, 2, 40)[:, None]
    guide = AutoNormal(local)
    loader = DataLoader(TensorDataset(x), batch_size=40)
    row = pv.fit(
        local, guide, loader, epochs=500, learning_rate=0.05, progress=False, loss=Trace_ELBO(num_particles=8)
    ).history[-1]
    exact = dist.Normal(0, 2**0.5).log_prob(x).mean().item()
    assert row["elbo"] == pytest.approx(exact, abs=0.05)
    several = DataLoader(TensorDataset(x), batch_size=20)
    pyro.clear_param_store()
    guide = AutoNormal(local)
    with pytest.raises(ValueError, match="go by the place"):  # two data share each place
        pv.fit(local, guide, several, epochs=1, progress=False)


class Dropped(nn.Module):
    """What in a guide differs from run to run, or by a batch's own numbers, and not by the place."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.norm, self.kind = nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=kind != "batch"), kind
        self.runs = 0

    def forward(self, x):
        pyro.module("dropped", self)
        self.runs += 1
        h = self.norm(self.layer(x))
        if self.kind == "noise":
            h = h + torch.randn_like(h)
        if self.kind == "dropout":
            h = nn.functional.dropout(h, 0.5, training=True)
        if self.kind == "counts":
            h = h / self.runs
        if self.kind == "set":
            h = h - h.softmax(0)
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(h, 0.7).to_event(1))


@pytest.mark.parametrize("kind", ["noise", "dropout", "counts", "set", "batch"])
def test_other_dependence_is_left_alone(kind):
    pv.fit(local, Dropped(kind), data(), **OPTIONS)


def test_programs_that_carry_their_data_along():
    table, x = torch.randn(60, 3), torch.arange(60)

    def by_index(index):
        with pyro.plate("d", 60, subsample=index):
            loc = pyro.param("loc", torch.zeros(60, 3), event_dim=1)
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=table[index])

    def guide(index):
        with pyro.plate("d", 60, subsample=index):
            pyro.sample("z", dist.Normal(pyro.param("q", torch.zeros(60, 3), event_dim=1), 0.7).to_event(1))

    def pixels(x):
        """As many pixels as data in a batch."""
        with pyro.plate("pixels", 20, dim=-1), pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.arange(20.0), 20.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def pixels_guide(x):
        with pyro.plate("pixels", 20, dim=-1), pyro.plate("rows", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x * pyro.param("w", torch.ones(20)), 1.0))

    def in_a_loop(x):
        for i in pyro.plate("d", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def loop_guide(x):
        for i in pyro.plate("d", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(pyro.param("w", torch.tensor(0.4)) * x[i], 1.0))

    for pair, train in (
        ((by_index, guide), x),
        ((pixels, pixels_guide), torch.randn(60, 20)),
        ((in_a_loop, loop_guide), torch.randn(20)),
        ((global_mean, AutoNormal(global_mean)), data()),
    ):
        pyro.clear_param_store()
        pv.fit(*pair, train, **{**OPTIONS, "batch_size": 20})


# --- validation data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "validation",
    [torch.randn(9, 4), torch.randn(9, 3, dtype=torch.float64), torch.cat([torch.randn(500, 3), torch.randn(1, 3)])],
    ids=["columns", "dtype", "a last block of one"],
)
def test_validation_data_are_refused_before_anything_moves(validation):
    """The programs must take them; what is wrong shows in the first or last block. Nothing moved, no number was drawn."""

    class OfTwo(Plain):
        def model(self, x):
            if len(x) == 1:
                raise ValueError("one row")
            super().model(x)

    vae = OfTwo()
    vae.decoder.requires_grad_(True)
    before = [tensor.clone() for tensor in vae.state_dict().values()]
    moved = []
    with pytest.raises(
        (ValueError, RuntimeError), match="with the data of validation=: |validation: found torch.float64"
    ):
        pv.fit(
            vae.model,
            vae.guide,
            data(),
            validation=validation,
            **OPTIONS,
            schedule=lambda done: moved.append(done) or 1.0,
        )
    assert same(before, vae.state_dict().values())
    assert len(moved) <= 1  # the first step was not made
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_the_check_of_validation_data_draws_nothing():
    """Neither torch's, NumPy's nor Python's numbers, of programs that draw from all three."""
    import random

    class Drawing(Plain):
        def model(self, x):
            np.random.rand(), random.random()  # noqa: NPY002
            super().model(x)

    ends = []
    for validation in (None, data()):
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        vae, seen = Drawing(), []

        def transform(x, seen=seen):
            seen.append((torch.rand(()).item(), np.random.rand(), random.random()))  # noqa: NPY002
            return x

        pv.fit(vae.model, vae.guide, data(), validation=validation, transform=transform, **OPTIONS | {"epochs": 1})
        ends.append((seen, [tensor.clone() for tensor in vae.state_dict().values()]))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])


def test_looking_leaves_the_run_as_it_was(monkeypatch):
    """Bit for bit, with BatchNorm's statistics and the generators; it costs a few runs, once."""
    results = []
    for looks in (True, False):
        pyro.clear_param_store()
        if not looks:
            monkeypatch.setattr("pyrovae.training.first_step.site_by_position", lambda *a: None)
        pyro.set_rng_seed(3)
        vae = Plain()
        pv.fit(vae.model, vae.guide, data(), **OPTIONS)
        results.append([*vae.state_dict().values(), torch.randn(3)])
    assert same(*results)


def test_latents_marked_for_enumeration_need_a_loss_that_sums_them_out():
    def model(x):
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("d", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[y], 1.0), obs=x)

    x = torch.randn(30)
    with (
        pytest.raises(ValueError, match=r"site 'y' of the model is marked .*Trace_ELBO would draw it.*TraceEnum_ELBO"),
        pytest.warns(UserWarning, match="not guide"),
    ):
        pv.fit(model, lambda x: None, x, **OPTIONS)
    pv.fit(model, lambda x: None, x, loss=TraceEnum_ELBO(max_plate_nesting=1), **OPTIONS)


class Kept(nn.Module):
    """An encoder with a running mean that is assigned anew at each run, or given other data."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 3), kind
        if kind == "attribute":
            self.mean = torch.zeros(3)
        else:
            self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        pyro.module("kept", self)
        mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        if self.kind == "data":
            self.mean.data = mean
        else:
            self.mean = mean
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(self.layer(x - self.mean), 0.7).to_event(1))


@pytest.mark.parametrize("kind", ["buffer", "attribute", "data"])
def test_what_a_program_assigns_stays_as_the_steps_left_it(kind, monkeypatch):
    """Bit for bit as without the look at the first step, in the dtype that it has."""
    ends = []
    for looks in (True, False):
        pyro.clear_param_store()
        if not looks:
            monkeypatch.setattr("pyrovae.training.first_step.site_by_position", lambda *a: None)
        pyro.set_rng_seed(3)
        guide = Kept(kind)
        pv.fit(local, guide, data(), **OPTIONS)
        assert guide.mean.dtype == torch.float32
        assert guide.mean.abs().min() > 0.1, "trained on its data"
        ends.append([guide.mean, *parameters(guide)])
    assert same(*ends)


def energy_gradient(z):
    y = z.detach().clone().requires_grad_()
    return torch.autograd.grad(y.pow(3).sum(), y, create_graph=True)[0]


def energy_of_new_leaf(z):
    y = torch.tensor(z.tolist(), requires_grad=True)
    return torch.autograd.grad(y.cos().sum(), y, create_graph=True)[0]


def steps_of_an_inner_loop(z):
    y = torch.zeros_like(z, requires_grad=True)
    for _ in range(3):
        y = y - 0.1 * torch.autograd.grad((y - z).square().sum(), y, create_graph=True)[0]
    return y


@pytest.mark.parametrize("inside", [energy_gradient, energy_of_new_leaf, steps_of_an_inner_loop])
@pytest.mark.parametrize("loss", [Trace_ELBO(), pv.objectives.ImportanceWeighted(3)])
def test_a_leaf_made_inside_a_program_is_no_parameter(inside, loss):
    class Energy(Plain):
        def model(self, x):
            self.declare("decoder")
            with pyro.plate("d", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                with torch.enable_grad():
                    loc = self.decoder(z) + 0.1 * inside(z).sum(-1, keepdim=True)
                pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    vae = Energy()
    before = parameters(vae)
    pv.fit(vae.model, vae.guide, data(), loss=loss, **OPTIONS)
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters(vae), strict=True))


def standardised(x):
    h = x.detach().numpy()
    return torch.from_numpy((h - h.mean(0)) / h.std(0))


def centred_by_rows(x):
    h = x.detach().numpy()
    return torch.from_numpy(h - h.sum(0) / len(h))


def of_norms(x):
    return x / float(np.linalg.norm(x.detach().numpy()))


@pytest.mark.parametrize("statistic", [standardised, centred_by_rows, of_norms])
@pytest.mark.parametrize("num_data", [47, 200])
def test_statistics_of_a_batch_that_numpy_rounds_are_left_alone(statistic, num_data):
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            pyro.module("guide", self)
            with pyro.plate("d", len(x)):
                pyro.sample("z", dist.Normal(self.layer(statistic(x).float()), 0.7).to_event(1))

    pv.fit(local, Guide(), torch.randn(num_data, 3) * 3 + 20, **OPTIONS)


def weighted(weights, by="scale"):
    def rows(x):
        held = weights[: len(x)]
        return poutine.scale(scale=held) if by == "scale" else poutine.mask(mask=held > 0.5)

    def model(x):
        weight = pyro.param("weight", torch.ones(3))
        with pyro.plate("d", len(x)), rows(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * weight, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("d", len(x)), rows(x):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())) * x, 1.0).to_event(1))

    return model, guide


@pytest.mark.parametrize("by", ["scale", "mask"])
@pytest.mark.parametrize("num_data", [20, 60, 100])
def test_weights_per_datum_that_a_program_holds(by, num_data):
    model, guide = weighted(torch.rand(num_data) + 0.01, by=by)
    with pytest.raises(ValueError, match=r"numbers of site '[xz]' go by the place"):
        pv.fit(model, guide, data()[:num_data], **{**OPTIONS, "batch_size": 20})
    pyro.clear_param_store()
    model, guide = weighted(torch.full((num_data,), 0.7), by=by)  # alike for all
    pv.fit(model, guide, data()[:num_data], **{**OPTIONS, "batch_size": 20})


@pytest.mark.parametrize("weight", [lambda x: x.abs().mean(1), lambda x: torch.tensor(0.3), lambda x: 2.0])
def test_weights_that_come_from_the_data(weight):
    def scaled(program):
        def run(x):
            with poutine.scale(scale=weight(x)):
                program(x)

        return run

    pv.fit(scaled(local), scaled(amortised), data(), **OPTIONS)


@pytest.mark.parametrize("lazy", [nn.LazyLinear, lambda width: nn.Sequential(nn.LazyLinear(width), nn.Tanh())])
@pytest.mark.parametrize("compile", ["auto", False])
def test_a_lazy_module_that_was_never_called(lazy, compile):
    net = lazy(3)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.7).to_event(1))

    with pytest.raises(ValueError, match=r"weight' of \w+ is a parameter of a lazy module.*call the module once"):
        pv.fit(local, guide, data(), **OPTIONS, compile=compile)
    net(data())
    before = parameters(net)
    pv.fit(local, guide, data(), **OPTIONS, compile=compile)
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters(net), strict=True))


@pytest.mark.parametrize("kind", [own, automatic])
def test_parameters_outside_of_pyros_store(kind):
    with pyro.settings.context(module_local_params=True):
        model, guide, _ = kind()
        with pytest.raises(ValueError, match=r"is not in Pyro's store.*module_local_params=False"):
            pv.fit(model, guide, data(), **OPTIONS)
