"""A recording gives what its program gives, or is not used: nothing frozen, no buffer lost, no gradient of its own.

Every program here has something in it that a recording may not see: NumPy, Python's numbers, attributes, other generators.
"""

import copy
import functools
import itertools
import os
import random
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import pyrovae as pv
from pyrovae.compiled.record import record

# --- a function of data whose values go through Python ----------------------------------------------------------------

STATISTICS = {
    "elements": lambda x: torch.from_numpy(np.tanh(x.detach().numpy())),
    "mean": lambda x: float(x.detach().numpy().mean()),
    "spread": lambda x: float(np.std(x.detach().numpy())),
    "largest": lambda x: float(x.detach().numpy().max()),
    "how many": lambda x: int((x.detach().numpy() > 0.5).sum()),
    "median": lambda x: sorted(x.detach().flatten().tolist())[x.numel() // 2],
    "of a list": lambda x: x.new_tensor(x.detach().tolist()).square(),
    "of an array": lambda x: torch.as_tensor(np.asarray(x.detach())).exp(),
    "rows": lambda x: torch.as_tensor(x.detach().numpy().sum(-1, keepdims=True)),
}
DATA = {
    "normal": lambda *shape: torch.randn(*shape),
    "binary": lambda *shape: (torch.rand(*shape) < 0.5).to(torch.get_default_dtype()),
    "zeros": lambda *shape: torch.zeros(*shape),
    "symmetric": lambda *shape: torch.ones(*shape).cumsum(0) + torch.ones(*shape).cumsum(0).flip(0),
    "expanded": lambda *shape: torch.randn(shape[-1]).expand(*shape),
}


@settings(max_examples=80, deadline=None)
@given(
    statistic=st.sampled_from(sorted(STATISTICS)),
    data=st.sampled_from(sorted(DATA)),
    of=st.sampled_from(["data", "parameter", "noise"]),
    rows=st.integers(2, 7),
    columns=st.integers(2, 4),
    share=st.sampled_from([1.0, 1e-2, 1e-4]),
    double=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_what_goes_through_python_is_not_frozen(statistic, data, of, rows, columns, share, double, seed):
    """However little of the result it is, and whatever noise there is beside it."""
    dtype = torch.float64 if double else torch.float32
    torch.manual_seed(seed)
    x = DATA[data](rows, columns).to(dtype)
    layer = nn.Linear(columns, columns).to(dtype)

    def program(x, through_python=True):
        noise = torch.randn_like(x)
        read = {"data": x, "parameter": layer.weight[:2], "noise": noise}[of]
        term = STATISTICS[statistic](read) if through_python else read.square().sum()
        return (
            ((layer(x) + noise).square() * (1 + share * term)).sum()
            if of != "parameter"
            else ((layer(x) + noise).square().sum() * (1 + share * torch.as_tensor(term, dtype=dtype).sum())),
        )

    assert record(program, [layer], (x,), gradients=True, inductor=False) is None
    assert record(lambda x: program(x, False), [layer], (x,), gradients=True, inductor=False) is not None


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    kind=st.sampled_from(["one hot", "mask", "scalar"]),
    seed=st.integers(0, 2**31),
)
def test_whole_numbers_and_masks_are_not_frozen(labels, kind, seed):
    """Also if the first block has one label alone, or nothing missing."""
    torch.manual_seed(seed)
    table = torch.randn(4, 3)
    y = {
        "one hot": torch.tensor(labels),
        "mask": torch.tensor(labels)[:, None].expand(-1, 3) < 5,
        "scalar": torch.tensor(float(labels[0])),
    }[kind]

    def read(y):
        if kind == "one hot":
            return torch.from_numpy(np.eye(4, dtype=np.float32)[y.numpy()]) @ table
        return torch.tensor(y.tolist(), dtype=torch.float32) * (table[0] if kind == "scalar" else 1)

    def right(y):
        return table[y] if kind == "one hot" else y.float() * (table[0] if kind == "scalar" else 1)

    assert record(lambda y: (read(y) + torch.randn(3),), [], (y,), inductor=False) is None
    assert record(lambda y: (right(y) + torch.randn(3),), [], (y,), inductor=False) is not None


# --- modules with a state of their own: the eager numbers, or the eager program ---------------------------------------


class Net(nn.Module):
    """Base of the programs below: forward(x) -> loss, a sum over rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)


class AssignedBuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("running", torch.zeros(2))

    def forward(self, x):
        h = self.linear(x)
        self.running = 0.9 * self.running + 0.1 * h.detach().mean(0)
        return (h + torch.randn_like(h)).square().sum()


class AssignedAndRead(AssignedBuffer):
    def forward(self, x):
        return super().forward(x) + (self.linear(x) * self.running).sum()


class NestedAssigned(Net):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(AssignedBuffer())

    def forward(self, x):
        return self.inner(x) + self.linear(x).sum()


class InPlaceBuffer(AssignedBuffer):
    def forward(self, x):
        h = self.linear(x)
        self.running.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return ((h - self.running) + torch.randn_like(h)).square().sum()


class Counter(Net):
    count = 0

    def forward(self, x):
        self.count += 1
        return self.linear(x).square().sum() * min(1.0, self.count / 1000)


class RareCounter(Counter):
    """Reads what it counts once in a hundred runs."""

    def forward(self, x):
        self.count += 1
        return self.linear(x).square().sum() * (2.0 if self.count % 100 == 0 else 1.0)


class PlainTensor(Net):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(2)

    def forward(self, x):
        h = self.linear(x)
        self.mean = 0.5 * self.mean + 0.5 * h.detach().mean(0)
        return (h - self.mean).square().sum()


class PlainTensorInPlace(PlainTensor):
    def forward(self, x):
        h = self.linear(x)
        self.mean.mul_(0.5).add_(0.5 * h.detach().mean(0))
        return (h - self.mean).square().sum()


class Remembers(Net):
    """Keeps its last result, which it never reads: harmless."""

    last = None

    def forward(self, x):
        loss = self.linear(x).square().sum()
        self.last = loss.detach()
        return loss


STATE = {"count": 0}


class Global(Net):
    def forward(self, x):
        STATE["count"] += 1
        return self.linear(x).square().sum() * (1 + 1e-3 * STATE["count"])


class OfPython(Net):
    def forward(self, x):
        return (self.linear(x) * random.gauss(1.0, 0.1)).square().sum()


class OfNumpy(Net):
    def forward(self, x):
        return (self.linear(x) + torch.as_tensor(np.random.normal(size=(len(x), 2)))).square().sum()  # noqa: NPY002


class OwnGenerator(Net):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x):
        return (self.linear(x) + torch.randn(len(x), 2, generator=self.generator)).square().sum()


class Through(torch.autograd.Function):
    """Its gradient, and only that, goes through NumPy."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.from_numpy(2 * x.detach().numpy())


class FrozenGradient(Net):
    def forward(self, x):
        return Through.apply(self.linear(x)).sum()


class FrozenCopy(Net):
    def forward(self, x):
        return self.linear(copy.deepcopy(x)).square().sum()


class CountingGradient(Net):
    def forward(self, x):
        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, h):
                return h.clone()

            @staticmethod
            def backward(ctx, gradient):
                STATE["count"] += 1
                return gradient * (1 + 0.01 * STATE["count"])

        return Scaled.apply(self.linear(x)).square().sum()


class DetachedParameter(Net):
    def forward(self, x):
        return self.linear(x).square().sum() * (1 + float(np.abs(self.linear.bias.detach().numpy()).sum()))


class ParameterClipped(Net):
    """A parameter changed in the forward pass."""

    def forward(self, x):
        with torch.no_grad():
            self.linear.weight.clamp_(-0.1, 0.1)
        return self.linear(x).square().sum()


class Branching(Net):
    def forward(self, x):
        h = self.linear(x)
        return h.square().sum() if h.sum() > 0 else h.abs().sum()


class Dropout(Net):
    def forward(self, x):
        h = torch.dropout(self.linear(x), 0.5, self.training)
        return (h + torch.randn_like(h)).square().sum()


class WeightNorm(Net):
    def __init__(self):
        super().__init__()
        self.linear = parametrizations.weight_norm(self.linear)

    def forward(self, x):
        return (self.linear(x) + torch.randn(len(x), 2)).square().sum()


class SpectralNorm(WeightNorm):
    def __init__(self):
        Net.__init__(self)
        self.linear = parametrizations.spectral_norm(self.linear)


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.linear = nn.LazyLinear(2)

    def forward(self, x):
        return self.linear(x).square().sum()


class Norm(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.linear(x)).exp().sum()


class NormOfAllBatches(Norm):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2, momentum=None)


RECORDED = [InPlaceBuffer, Remembers, ParameterClipped, Dropout, WeightNorm, SpectralNorm, Norm]
REFUSED = [
    *(AssignedBuffer, AssignedAndRead, NestedAssigned, Counter, RareCounter, PlainTensor, PlainTensorInPlace, Global),
    *(
        OfPython,
        OfNumpy,
        OwnGenerator,
        FrozenGradient,
        FrozenCopy,
        CountingGradient,
        DetachedParameter,
        Branching,
        NormOfAllBatches,
    ),
    Lazy,  # before its first run
]


def steps(net, compile):
    """Losses, parameters and buffers of some steps of gradient descent with other data each, and whether they were recorded."""
    STATE["count"] = 0
    pyro.set_rng_seed(3)
    data = torch.randn(6, 5, 3, dtype=torch.float64)
    recorded = record(lambda x: (net(x),), [net], (data[0],), gradients=True, inductor=False) if compile else None
    losses = []
    for x in data:
        if recorded is not None:
            (loss,), gradients = recorded(x)
            parameters = recorded.parameters
        else:
            loss = net(x)
            parameters = list(net.parameters())
            gradients = torch.autograd.grad(loss, parameters)
        losses.append(loss.detach())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(0.01 * gradient)
    return [torch.stack(losses), *(value.detach() for value in net.state_dict().values())], recorded is not None


@pytest.mark.parametrize("kind", [*RECORDED, *REFUSED])
def test_a_module_with_a_state_takes_the_eager_steps(double, caplog, kind):
    """Compiled or not: the same losses, parameters and buffers, and what a refused recording ran has left nothing behind."""
    results = []
    for compile in (False, True):
        torch.manual_seed(1)
        net = kind()
        if kind is OwnGenerator:
            net.generator.manual_seed(5)
        results.append(steps(net, compile))
    (eager, _), (found, recorded) = results
    assert recorded == (kind in RECORDED)
    assert ("runs eagerly" in caplog.text) == (not recorded)
    if kind not in (Global, CountingGradient, OwnGenerator):  # what is in no module cannot be put back
        for left, right in zip(eager, found, strict=True):
            assert torch.allclose(left, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (AssignedBuffer, "the program changes '0.running', and the recording does not"),
        (Counter, "every run changes the attribute '0.count'"),
        (PlainTensor, "every run changes the attribute '0.mean'"),
        (OfPython, "run twice with the same data"),
        (FrozenGradient, "the recording gives other numbers than the program"),
        (DetachedParameter, "values of data, parameters or draws are read by Python or NumPy (Tensor.numpy)"),
    ],
)
def test_the_log_says_what_stands_in_the_way(double, caplog, kind, words):
    steps(kind(), True)
    assert [record.name for record in caplog.records].count("pyrovae") == 1
    assert words in caplog.text


# --- state whose effect comes later, or seldom ------------------------------------------------------------------------

LATE = 40  # runs: more than a recording looks at


def closure_counter():
    count = [0]

    def scale(x):
        count[0] += 1
        return 1.0 if count[0] < LATE else 0.2

    return scale


def nonlocal_counter():
    count = 0

    def scale(x):
        nonlocal count
        count += 1
        return 1.0 if count < LATE else 0.2

    return scale


class Held:
    runs = 0

    def __init__(self):
        self.own = 0

    def __call__(self, x):
        self.own += 1
        return 1.0 if self.own < LATE else 0.2


class Slotted:
    __slots__ = ("runs",)

    def __init__(self):
        self.runs = 0

    def __call__(self, x):
        self.runs += 1
        return 1.0 if self.runs < LATE else 0.2


def of_a_class():
    class Shared:
        runs = 0

    def scale(x):
        Shared.runs += 1
        return 1.0 if Shared.runs < LATE else 0.2

    return scale


def in_a_dict():
    held = {"of": {"runs": 0}}

    def scale(x):
        held["of"]["runs"] += 1
        return 1.0 if held["of"]["runs"] < LATE else 0.2

    return scale


def iterator():
    runs = itertools.count()
    return lambda x: 1.0 if next(runs) < LATE else 0.2


def generator():
    runs = (0.2 if i > LATE else 1.0 for i in range(10**6))
    return lambda x: next(runs)


def history():
    seen = []

    def scale(x):
        seen.append(x.mean().detach())
        return 1.0 if len(seen) < LATE else 0.2

    return scale


def tensor_in_a_dict():
    held = {"mean": torch.zeros(())}

    def scale(x):
        held["mean"] = held["mean"] + 1e-20 * x.mean().detach()
        return 1.0 if held["mean"] < 1 else 0.2

    return scale


def python_seldom():
    return lambda x: 5.0 if random.random() < 1e-6 else 1.0


def numpy_seldom():
    return lambda x: 5.0 if np.random.rand() < 1e-6 else 1.0  # noqa: NPY002


def own_numpy_generator():
    draws = np.random.default_rng(0)
    return lambda x: 5.0 if draws.random() < 1e-6 else 1.0


def own_python_generator():
    draws = random.Random(0)
    return lambda x: 5.0 if draws.random() < 1e-6 else 1.0


def size_by_nonzero():
    return lambda x: 5.0 if len((x.abs().amax(1) > 20).nonzero()) else 1.0


def size_by_mask():
    return lambda x: 5.0 if len(x[x[:, 0] > 20]) else 1.0


def size_by_held_mask():
    mask = torch.tensor([True, False, True])
    return lambda x: x[:, mask].mean()


def size_by_masked_select():
    return lambda x: 5.0 if x.masked_select(x > 20).numel() else 1.0


def size_by_unique():
    return lambda x: 5.0 if len(torch.unique(x > 20)) > 1 else 1.0


def size_by_repetition():
    return lambda x: 5.0 if len(x[:, 0].repeat_interleave((x[:, 0] > 20).long())) else 1.0


FREEZES = [
    *(closure_counter, nonlocal_counter, Held, Slotted, of_a_class, in_a_dict, iterator, generator, history),
    *(tensor_in_a_dict, python_seldom, numpy_seldom, own_numpy_generator, own_python_generator),
    *(size_by_nonzero, size_by_mask, size_by_held_mask, size_by_masked_select, size_by_unique, size_by_repetition),
]


def in_the_function(layer, scale):
    return lambda x: (layer(x).square().sum() * scale(x),)


def in_a_forward_hook(layer, scale):
    layer.register_forward_hook(lambda module, inputs, output: output * scale(inputs[0]))
    return lambda x: (layer(x).square().sum(),)


def in_an_attribute(layer, scale):
    layer.scale = scale
    return lambda x: (layer(x).square().sum() * layer.scale(x),)


@pytest.mark.parametrize("place", [in_the_function, in_a_forward_hook, in_an_attribute])
@pytest.mark.parametrize("kind", FREEZES)
def test_what_acts_later_or_seldom_is_not_frozen(kind, place, caplog):
    layer = nn.Linear(3, 2)
    assert record(place(layer, kind()), [layer], (torch.randn(5, 3),), gradients=True, inductor=False) is None
    assert "every run changes what the program holds" in caplog.text or "the size of a tensor depends" in caplog.text


@pytest.mark.parametrize("kind", [closure_counter, nonlocal_counter, Held, in_a_dict, history])
def test_a_refused_recording_has_counted_once_at_most(kind):
    layer, scale = nn.Linear(3, 2), kind()
    record(in_the_function(layer, scale), [layer], (torch.randn(5, 3),), inductor=False)
    runs = next(run for run in range(LATE + 2) if scale(torch.randn(5, 3)) != 1)
    assert runs >= LATE - 2


CONSTANT = {"scale": [2.0], "table": np.arange(3.0)}


def kept_list(x):
    return CONSTANT["scale"][0] * float(CONSTANT["table"][1])


def cached(x):
    return table_of(len(x))


@functools.lru_cache
def table_of(number):
    return torch.linspace(0, 1, number).sum()


def index_by_numbers(x):
    return x[:, torch.tensor([0, 2])].sum() + x[torch.arange(len(x)).flip(0)].mean()


HELD_INDEX = torch.tensor([2, 0])


def index_that_is_held(x):
    return x[:, HELD_INDEX].sum()


@pytest.mark.parametrize(
    "scale", [kept_list, cached, index_by_numbers, index_that_is_held, lambda x: next(iter([2.0, 3.0]))]
)
def test_what_stays_as_it_is_does_not_stand_in_the_way(scale):
    layer, held = nn.Linear(3, 2), Held()
    layer.note, layer.names = {"of": held}, ["a", "b"]
    recorded = record(in_the_function(layer, scale), [layer], (torch.randn(5, 3),), gradients=True, inductor=False)
    x = torch.randn(5, 3)
    assert torch.allclose(recorded(x)[0][0], in_the_function(layer, scale)(x)[0])


@pytest.mark.parametrize("name", ["weight", "bias", "both"])
def test_a_hook_on_the_accumulated_gradient_is_not_lost(caplog, name):
    layer = nn.Linear(3, 2)
    for own, parameter in layer.named_parameters():
        if name in (own, "both"):
            parameter.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))
    assert record(lambda x: (layer(x).sum(),), [layer], (torch.randn(5, 3),), gradients=True, inductor=False) is None
    assert "has a hook on its accumulated gradient" in caplog.text


# --- through the library: evaluation, training ------------------------------------------------------------------------


def standard_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))


@pytest.mark.parametrize("share", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("statistic", ["elements", "mean", "how many", "rows"])
def test_every_block_of_an_evaluation_has_its_own_data(double, uncompiled, chunks, statistic, share):
    """Data in blocks of four; what goes through NumPy is a small part beside the noise of the draws."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            rows = [torch.as_tensor(STATISTICS[statistic](row), dtype=x.dtype).mean() for row in x]
            pyro.sample("x", dist.Normal(z.sum(-1) + share * torch.stack(rows), 1.0), obs=x[:, 0])

    x, results = torch.randn(12, 3), []
    for compile in (False, True):
        pyro.set_rng_seed(8)
        results.append(
            pv.log_weights(
                model, standard_guide, x, num_particles=20, particle_batch_size=4, data_batch_size=4, compile=compile
            )
        )
    assert torch.equal(*results)
    assert not chunks


class Pair(nn.Module):
    """A model and guide with something in the encoder that a recording may not see."""

    def __init__(self, net):
        super().__init__()
        self.net, self.decoder = net, nn.Linear(2, 3)

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net.linear(x) + 0.01 * self.net(x), 0.8).to_event(1))


@pytest.mark.parametrize(
    "kind", [AssignedAndRead, InPlaceBuffer, Counter, OfPython, DetachedParameter, SpectralNorm, Norm]
)
def test_training_is_the_same_compiled(double, uncompiled, caplog, kind):
    ends = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        pair = Pair(kind())
        result = pv.fit(
            pair.model, pair.guide, torch.randn(22, 3), epochs=4, batch_size=5, compile=compile, progress=False
        )
        losses = torch.tensor([row["objective"] for row in result.history])
        ends.append([losses, *(value.clone() for value in pair.state_dict().values())])
    for eager, found in zip(*ends, strict=True):
        assert torch.allclose(eager, found, rtol=1e-9, atol=1e-11)
    assert ("runs eagerly" in caplog.text) == (kind in REFUSED)


# --- what fails later, and a cache that cannot be written -------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
def test_a_later_recording_that_fails_runs_the_program(uncompiled, caplog, gradients):
    """Another shape takes another path through the program, which cannot be recorded."""
    layer = nn.Linear(3, 2)

    def program(x):
        scale = float(x.detach().numpy().mean()) if len(x) > 4 else 1.0
        return (layer(x).square().sum() * scale,)

    recorded = record(program, [layer], (torch.randn(4, 3),), gradients=gradients)
    assert not caplog.records
    for size in (6, 4, 6, 7, 4):
        x = torch.randn(size, 3)
        (loss,), found = recorded(x)
        expected = torch.autograd.grad(program(x)[0], list(layer.parameters()))
        assert torch.allclose(loss, program(x)[0])
        assert len(found) == (2 if gradients else 0)
        assert all(torch.allclose(left, right) for left, right in zip(found, expected, strict=False))
    assert recorded.num_recordings == 1
    messages = [record.getMessage() for record in caplog.records if record.name == "pyrovae"]
    assert len(messages) == 2, "once for each shape"
    assert all("runs eagerly" in message for message in messages)


WHOLE_RUN = """
import logging, sys, torch, pyro; logging.basicConfig(); import pyrovae as pv; pyro.set_rng_seed(0)
model = pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 6), 6))
guide, x = pv.guides.MeanFieldNormal(pv.nets.MLP(6, [8]), 2), torch.ones(12, 6)
options = {"compile": sys.argv[1] == "compiled", "progress": False}
print(pv.fit(model, guide, x, epochs=3, batch_size=4, **options).num_steps)
print(pv.log_weights(model, guide, x, num_particles=8, particle_batch_size=4, **options).mean().item())
print(pv.annealed_importance_sampling(model, x[:2], num_temperatures=5, num_chains=16, **options).log_prob.mean().item())
"""


def whole_run(how, **environment):
    command, environment = [sys.executable, "-c", WHOLE_RUN, how], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr.count("runs eagerly")


@pytest.fixture(scope="module")
def eager_run():
    return whole_run("eager", TORCHINDUCTOR_CACHE_DIR="/proc/nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["under a file", "not a folder", "nowhere"])
def test_a_cache_that_cannot_be_written_runs_eagerly(tmp_path, eager_run, place):
    """Training, evaluation and annealing, in a process of their own: torch makes the folder when it is first asked to."""
    (tmp_path / "file").write_text("")
    folder = {
        "under a file": tmp_path / "file" / "cache",
        "not a folder": tmp_path / "file",
        "nowhere": "/proc/nowhere",
    }
    numbers, num_messages = whole_run("compiled", TORCHINDUCTOR_CACHE_DIR=str(folder[place]))
    assert (numbers, 0) == eager_run
    assert num_messages >= 3
