"""Code compiled before is used again only for the same graph, and then gives the numbers of code compiled anew."""

import gc
import weakref

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from shared.runs import make, parameters
from torch import nn

import pyrovae as pv
from pyrovae.compiled import kept_code
from pyrovae.compiled.compiler import compiled_by_inductor
from pyrovae.compiled.record import Recording, record


@pytest.fixture
def compilations(monkeypatch):
    """A list that grows by one with each compilation; nothing is kept from other tests. The graph runs as it is."""
    done = []

    def compiler(graph):
        done.append(graph)
        return lambda *inputs: graph(*inputs)

    monkeypatch.setattr(kept_code, "_kept", type(kept_code._kept)())
    monkeypatch.setattr(Recording, "compiler", staticmethod(compiler))
    return done


def grey(dtype=torch.float32):
    return torch.rand(40, 1, 4, 3, generator=torch.Generator().manual_seed(4)).to(dtype)


def fit(pair, dtype=torch.float32, **options):
    pyro.set_rng_seed(2)
    options = {"batch_size": 10, "clip_norm": 1.0, "transform": pv.data.binarize, **options}
    result = pv.fit(*pair, grey(dtype), epochs=3, learning_rate=1e-2, compile=True, progress=False, **options)
    return [row["objective"] for row in result.history], parameters(*pair)


def dropping(pair, probability):
    pair[0].likelihood.decoder_net = nn.Sequential(pair[0].likelihood.decoder_net, nn.Dropout(probability))
    return pair


def nothing(pair):
    return pair


def another_pair(pair):
    return make(seed=5)


def another_tensor(pair):
    layer = next(module for module in pair[0].modules() if isinstance(module, nn.Linear))
    layer.weight = nn.Parameter(layer.weight.detach() + 0.1)
    return pair


def another_width(pair):
    pair[0].likelihood.decoder_net = pv.nets.MLP(2, [9], 12)
    return pair


def another_activation(pair):
    pair[0].likelihood.decoder_net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 12))
    return pair


def drops(pair):
    return dropping(pair, 0.2)


def frozen(pair):
    next(pair[0].parameters()).requires_grad_(False)
    return pair


def hooked(pair):
    pair[0].likelihood.decoder_net.register_forward_hook(lambda module, inputs, output: output * 1.5)
    return pair


def patched(pair):
    decoder = pair[0].likelihood.decoder_net
    forward = decoder.forward
    decoder.forward = lambda z: forward(z) - 0.25
    return pair


def in_float64(pair):
    return tuple(module.double() for module in pair)


def at_one_half(x):
    return (x > 0.5).to(x.dtype)


SAME = [(nothing, {}), (another_pair, {}), (another_tensor, {})]
OTHER = [
    *((change, {}) for change in (another_width, another_activation, drops, frozen, hooked, patched)),
    (in_float64, {"dtype": torch.float64}),
    (nothing, {"loss": Trace_ELBO(num_particles=2)}),
    (nothing, {"clip_norm": 0.5}),
    (nothing, {"clip_norm": None}),
    (nothing, {"batch_size": 20}),
    (nothing, {"transform": at_one_half}),
]


@pytest.mark.parametrize(
    ("change", "options"),
    SAME + OTHER,
    ids=lambda value: value.__name__ if callable(value) else "-".join(value) or "as it is",
)
def test_a_second_fit_gives_the_numbers_of_a_fresh_recording(compilations, change, options):
    fit(make())
    assert len(compilations) == 1
    found = fit(change(make()), **options)
    assert len(compilations) == (1 if (change, options) in SAME else 2)
    kept_code._kept.clear()
    compilations.clear()
    expected = fit(change(make()), **options)
    assert len(compilations) == 1
    assert found[0] == expected[0]
    assert all(torch.equal(*pair) for pair in zip(found[1], expected[1], strict=True))


def test_dropout_of_another_probability_or_mode_compiles_anew(compilations):
    def recorded(probability, training=True):
        layer = nn.Sequential(nn.Linear(3, 2), nn.Dropout(probability)).train(training)
        record(lambda x: (layer(x).sum(),), [layer], (torch.ones(5, 3),), gradients=True)
        return len(compilations)

    assert [recorded(0.2), recorded(0.2), recorded(0.3), recorded(0.3, training=False)] == [1, 1, 2, 3]


@pytest.mark.parametrize(("first", "second"), [(1.0, 1.0 + 2**-52), (0.0, -0.0), (2, 2.0)])
def test_numbers_that_differ_at_all_compile_anew(compilations, first, second):
    for number in (first, second):
        record(lambda x, number=number: (torch.add(x, torch.full_like(x, number)),), [], (torch.ones(3),))
    assert len(compilations) == 2


def test_a_graph_that_holds_values_is_not_kept(compilations):
    for scale in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])):
        found = record(lambda x, scale=scale: (x * scale,), [], (torch.ones(3),))
        assert torch.equal(found(torch.ones(3))[0][0], scale)
    assert len(compilations) == 2
    assert not kept_code._kept


def test_other_threads_compile_anew(compilations):
    threads = torch.get_num_threads()
    try:
        for number in (threads, threads + 1):
            torch.set_num_threads(number)
            record(lambda x: (x + 1,), [], (torch.ones(3),))
    finally:
        torch.set_num_threads(threads)
    assert len(compilations) == 2


def test_inputs_split_otherwise_compile_anew(compilations):
    """The same operations on the same tensors, one of which is an argument here and a buffer there."""
    module = nn.Module()
    module.register_buffer("shift", torch.ones(3))
    record(lambda x, y: (x + y,), [], (torch.ones(3), torch.ones(3)))
    found = record(lambda x: (x + module.shift,), [module], (torch.ones(3),))
    assert len(compilations) == 2
    assert torch.equal(found(torch.ones(3))[0][0], torch.full((3,), 2.0))


def test_a_code_that_fails_its_check_is_not_kept(compilations, monkeypatch):
    monkeypatch.setattr(Recording, "compiler", staticmethod(lambda graph: lambda *inputs: ([torch.zeros(3)], [])))
    assert record(lambda x: (x + 1,), [], (torch.ones(3),)) is None
    assert not kept_code._kept


def test_only_the_last_codes_are_kept(compilations):
    for number in range(kept_code._CAPACITY + 2):
        record(lambda x, number=number: (x + number,), [], (torch.ones(3),))
    assert len(kept_code._kept) == kept_code._CAPACITY


@pytest.mark.slow
def test_through_the_compiler_and_nothing_else_stays_alive(monkeypatch):
    """With Inductor's own code: the same numbers bit for bit; neither data nor modules are kept alive by it."""
    done = []
    monkeypatch.setattr(kept_code, "_kept", type(kept_code._kept)())
    monkeypatch.setattr(
        Recording, "compiler", staticmethod(lambda graph: (done.append(1), compiled_by_inductor(graph))[1])
    )
    expected = fit(make())
    pair, data = make(), grey()
    pyro.set_rng_seed(2)
    result = pv.fit(
        *pair,
        data,
        transform=pv.data.binarize,
        epochs=3,
        batch_size=10,
        clip_norm=1.0,
        learning_rate=1e-2,
        compile=True,
        progress=False,
    )
    assert len(done) == 1
    assert [row["objective"] for row in result.history] == expected[0]
    assert all(torch.equal(*two) for two in zip(parameters(*pair), expected[1], strict=True))
    alive = [weakref.ref(data), *(weakref.ref(tensor) for module in pair for tensor in module.parameters())]
    del pair, data, result
    pyro.clear_param_store()
    gc.collect()
    assert kept_code._kept
    assert [reference() for reference in alive] == [None] * len(alive)
