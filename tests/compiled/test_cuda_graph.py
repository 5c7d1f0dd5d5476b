"""Replaying recordings as CUDA graphs: the numbers of the code itself, or the code itself.

A CPU has no CUDA graphs. `StandIn` takes the place of a capture there: it holds on to memory as a capture does, and runs
the code again. Tests with real captures run where a GPU is.
"""

import contextlib
import gc
import weakref

import pyro
import pytest
import torch
from shared.runs import binary, make, parameters
from torch import nn

import pyrovae as pv
from pyrovae.compiled import cuda_graph
from pyrovae.compiled import record as record_module
from pyrovae.compiled.cuda_graph import CudaGraph, replayed
from pyrovae.compiled.record import record

needs_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.__version__ < "2.14", reason="needs a GPU and torch 2.14 or later"
)


class StandIn:
    """Replays by running the code again on the memory of its capture, and writes to the same results each time."""

    def __init__(self, code, tensors, values, device):
        # Aliases of the memory: if another tensor is assigned to a buffer, they still show the old one.
        self.code = code
        self.inputs, self.values = ([tensor.detach() for tensor in group] for group in (tensors, values))
        self.results = None

    def replay(self):
        self.write(*self.code(list(self.inputs), self.values))

    @torch.inference_mode(False)  # a GPU writes to memory, whatever the mode
    def write(self, outputs, gradients):
        if self.results is None:
            self.results = [output.clone() for output in outputs], [g if g is None else g.clone() for g in gradients]
            return
        for place, found in zip((*self.results[0], *self.results[1]), (*outputs, *gradients), strict=True):
            if place is not None:
                place.copy_(found)

    without_waits = staticmethod(contextlib.nullcontext)


class Net(nn.Module):
    """Rows of the data, batch norm, noise, and a counter: what a step changes and draws."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, data, index):
        self.count.add_(1)
        hidden = self.norm(self.layer(data[index])) + torch.randn(len(index), 2)
        return hidden.square().sum(), hidden, self.count + 0


@pytest.fixture
def captures(monkeypatch, uncompiled):
    """All recordings are replayed by this capture; returns a function that sets it, and gives the list of graphs."""
    made = []

    def use(capture=StandIn):
        monkeypatch.setattr(
            record_module,
            "replayed",
            lambda code, *_: made.append(CudaGraph(code, torch.device("cpu"), capture)) or made[-1],
        )
        return made

    return use


DATA = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))


def nothing(step, net, data):
    return data


def run_steps(num_steps=8, change=nothing):
    """Results, parameters, buffers and random state of steps with other rows each time, and `change` between them."""
    net, data = Net(), DATA.clone()
    recording = record(net, [net], (data, torch.arange(6)), gradients=True)
    assert recording is not None
    torch.manual_seed(7)
    seen, kept = [], []  # all arguments are kept, so that no address is used again
    for step in range(num_steps):
        data = change(step, net, data)
        index = torch.randperm(20)[:6]
        kept += [data, index]
        outputs, gradients = recording(data, index)
        seen.append([*outputs, *gradients])
        with torch.no_grad():
            for parameter, gradient in zip(recording.parameters, gradients, strict=True):
                parameter.sub_(0.01 * gradient)
        seen.append([*(value.clone() for value in net.state_dict().values()), torch.get_rng_state()])
    return seen


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for step, (left, right) in enumerate(zip(found, expected, strict=True)):
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert torch.equal(*pair), (step, number)


def assert_replays(run, captures, caplog, num_captures):
    """Assert that replays give the same bits without a message, in a recording of each number of captures."""
    expected = run()
    made = captures()
    assert_same_bits(run(), expected)
    assert [graph.num_captures for graph in made] == num_captures
    assert not caplog.records


def test_many_replays_of_one_capture_give_the_same_bits(captures, caplog):
    """Outputs and gradients of all steps are compared at the end: none is overwritten by a later replay."""
    expected = run_steps()
    made = captures()
    assert_same_bits(run_steps(), expected)
    (graph,) = made
    assert (graph.num_captures, graph.is_given_up) == (1, False)
    assert graph._captured.results is not None
    assert not caplog.records


def other_storage(step, net, data):
    if step == 5:
        net.layer.weight.data = net.layer.weight.data.clone()
    return data


def other_parameter(step, net, data):
    if step == 5:
        net.layer.bias = nn.Parameter(net.layer.bias.detach() + 1)
    return data


def other_buffer(step, net, data):
    if step == 5:
        net.norm.running_mean = net.norm.running_mean + 1
    return data


def other_memory_of_a_buffer(step, net, data):
    if step == 5:
        net.norm.running_mean.data = net.norm.running_mean.data + 1
    return data


def values_in_place(step, net, data):
    return data.mul_(1.1)


def data_that_moves_later(step, net, data):
    return data + 1 if step > 4 else data


def data_that_always_moves(step, net, data):
    return data + step


def other_setting(step, net, data):
    torch.use_deterministic_algorithms(step in (5, 6))
    return data


@pytest.mark.parametrize(
    ("change", "num_captures", "in_place"),
    [
        (nothing, 1, 1),
        (values_in_place, 1, 1),
        (data_that_moves_later, 1, 2),
        (data_that_always_moves, 1, 1),
        (other_storage, 2, 2),
        (other_parameter, 2, 2),
        (other_buffer, 2, 2),
        (other_memory_of_a_buffer, 2, 2),
        (other_setting, 3, 3),
    ],
)
@pytest.mark.parametrize("is_copied", [True, False])
def test_what_moves_is_copied_or_captured_again(
    captures, monkeypatch, caplog, change, num_captures, in_place, is_copied
):
    if not is_copied:  # at first; an argument that has moved is copied from then on
        monkeypatch.setattr(cuda_graph, "_COPIED", -1)
    expected = run_steps(10, change)
    made = captures()
    assert_same_bits(run_steps(10, change), expected)
    assert made[0].num_captures == (num_captures if is_copied else in_place)
    assert not caplog.records


def test_parameters_that_always_move_are_given_up(captures, caplog):
    def change(step, net, data):
        net.layer.weight.data = net.layer.weight.data.clone()
        return data

    expected = run_steps(15, change)
    made = captures()
    assert_same_bits(run_steps(15, change), expected)
    assert made[0].is_given_up
    assert made[0].num_captures == cuda_graph._MOST_CAPTURES
    assert [entry.getMessage() for entry in caplog.records] == [
        "is not replayed as a CUDA graph: RuntimeError: parameters, buffers or settings have changed places 8 times"
    ]


# --- captures that go wrong -------------------------------------------------------------------------------------------


class OtherOutput(StandIn):
    def write(self, outputs, gradients):
        super().write([outputs[0], outputs[1] + 1e-3, outputs[2]], gradients)


class OtherGradient(StandIn):
    def write(self, outputs, gradients):
        super().write(outputs, [gradients[0] * 1.01, *gradients[1:]])


class OtherBuffer(StandIn):
    def replay(self):
        super().replay()
        next(value for value in self.values if value.dtype == torch.long).add_(1)


class OfNoBuffer(StandIn):
    """Changes no buffer."""

    def replay(self):
        self.write(*self.code(list(self.inputs), [value.clone() for value in self.values]))


class MoreNoise(StandIn):
    def replay(self):
        super().replay()
        torch.randn(1000)


class NoNoise(StandIn):
    """Draws the right numbers, but the generator does not go on."""

    def replay(self):
        before = torch.get_rng_state()
        super().replay()
        torch.set_rng_state(before)


class OtherNoise(StandIn):
    def replay(self):
        torch.manual_seed(3)
        super().replay()


class FrozenNoise(StandIn):
    """Draws the noise of the first replay forever, while the generator goes on as it should."""

    state = None

    def replay(self):
        now = torch.get_rng_state()
        if self.state is None:
            self.state = now
        torch.set_rng_state(self.state)
        super().replay()
        torch.set_rng_state(now)
        torch.randn(6, 2)  # as many as the code draws


class FrozenRows(StandIn):
    """The arguments of the capture forever."""

    def replay(self):
        if self.results is None:
            self.inputs = [tensor.clone() for tensor in self.inputs]
        super().replay()


class FailsToCapture(StandIn):
    def __init__(self, *given):
        torch.randn(10)
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


class OutOfMemory(StandIn):
    def __init__(self, *given):
        raise torch.OutOfMemoryError("CUDA out of memory.")


class FailsToReplay(StandIn):
    def replay(self):
        torch.randn(10)
        raise RuntimeError("unspecified launch failure")


class FailsLater(StandIn):
    """Fails at a replay that is not checked, after the generator has moved."""

    num_replays = 0

    def replay(self):
        self.num_replays += 1
        if self.num_replays > 4:
            torch.randn(10)
            raise RuntimeError("unspecified launch failure")
        super().replay()


class Waits(StandIn):
    @staticmethod
    @contextlib.contextmanager
    def without_waits():
        yield
        raise RuntimeError("the host waits for the GPU inside it")


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        (OtherOutput, "a replay gives other outputs, at position 1"),
        (OtherGradient, "a replay gives other gradients, at position 0"),
        (OtherBuffer, "a replay gives other state"),
        (OfNoBuffer, "a replay gives other state"),
        (MoreNoise, "a replay takes another number of random numbers"),
        (NoNoise, "a replay takes another number of random numbers"),
        (OtherNoise, "a replay gives other outputs"),
        (FrozenNoise, "a replay gives other outputs"),
        (FrozenRows, "a replay gives other outputs"),
        (FailsToCapture, "RuntimeError: operation not permitted when stream is capturing"),
        (OutOfMemory, "OutOfMemoryError: CUDA out of memory."),
        (FailsToReplay, "RuntimeError: unspecified launch failure"),
        (FailsLater, "RuntimeError: unspecified launch failure"),
        (Waits, "the host waits for the GPU inside it"),
    ],
)
def test_a_wrong_capture_is_noticed_and_the_code_itself_runs(captures, caplog, capture, reason):
    expected = run_steps()
    made = captures(capture)
    assert_same_bits(run_steps(), expected)
    (message,) = [entry.getMessage() for entry in caplog.records]
    assert message.startswith("is not replayed as a CUDA graph: ")
    assert reason in message
    assert "more of it" not in message
    assert made[0].is_given_up
    assert made[0].num_captures == (0 if capture is Waits else 1)
    assert made[0]._captured is None


def test_an_error_of_the_code_itself_reaches_the_caller(captures, caplog):
    """At each kind of call: warming up, checked, and replayed."""
    for num_good in (1, 2, 5):
        net = Net()
        made = captures()
        recording = record(net, [net], (DATA, torch.arange(6)), gradients=True)
        for _ in range(num_good):
            recording(DATA, torch.arange(6))
        with pytest.raises(IndexError, match="out of"):
            recording(DATA, torch.full((6,), 20))
        assert made[-1].is_given_up == (num_good > 1)


# --- inputs -----------------------------------------------------------------------------------------------------------


def of_views(x, y, same):
    return (x.sum(0) + y.sum() + same.sum() + torch.randn(3), x * 2, y + 0.0)


LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 3),
    "transposed": lambda: torch.randn(3, 4).t(),
    "columns": lambda: torch.randn(4, 9)[:, 2:8:2],
    "expanded": lambda: torch.randn(3).expand(4, 3),
    "one number": lambda: torch.randn(()).expand(4, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arguments_of_any_memory_layout_are_copied(captures, caplog, layout):
    def run():
        layer = nn.Linear(1, 1)
        torch.manual_seed(2)
        first = LAYOUTS[layout]()
        recording = record(of_views, [layer], (first, torch.ones(0, 2), first))
        assert recording is not None
        seen = []
        for _ in range(6):
            x = LAYOUTS[layout]()
            seen.append(recording(x, torch.ones(0, 2), x)[0])
        return seen

    assert_replays(run, captures, caplog, [1])


@pytest.mark.parametrize("first", [False, True])
def test_calls_in_inference_mode_and_outside(captures, caplog, first):
    """What was captured in one mode is replayed in the other."""
    layer = nn.Linear(3, 2)

    def run():
        recording = record(lambda x: (layer(x) + torch.randn(4, 2),), [layer], (torch.ones(4, 3),))
        torch.manual_seed(2)
        seen = []
        for number in range(8):
            with torch.inference_mode(first if number < 4 else not first):
                (output,), _ = recording(torch.randn(4, 3))
                assert output.is_inference() == torch.is_inference_mode_enabled()
            seen.append([output])
        return seen

    assert_replays(run, captures, caplog, [1])


def test_the_result_of_at_is_called_many_times(captures, caplog):
    """As refinement does: one tensor that an optimizer changes in place between the calls."""

    def run():
        layer, x = Net().layer, torch.zeros(4, 3)
        recording = record(lambda x: (layer(x) + torch.randn(4, 2),), [layer], (x,))
        torch.manual_seed(2)
        call, seen = recording.at(x), []
        for _ in range(8):
            seen.append(call()[0])
            x += 1
        return seen

    assert_replays(run, captures, caplog, [1])


def test_several_recordings_and_shapes_are_replayed_side_by_side(captures, caplog):
    def run():
        layer = Net().layer
        recordings = [
            record(lambda x, f=f: (f(layer(x)),), [layer], (torch.ones(4, 3),)) for f in (torch.sin, torch.exp)
        ]
        torch.manual_seed(2)
        return [recording(torch.randn(size, 3))[0] for _ in range(6) for size in (4, 5) for recording in recordings]

    assert_replays(run, captures, caplog, [1] * 4)


def test_a_capture_goes_with_its_recording(captures):
    """Without waiting for Python's garbage collector, because on a GPU it holds much memory."""
    made, net = captures(), Net()
    recording = record(net, [net], (DATA, torch.arange(6)), gradients=True)
    for _ in range(4):
        recording(DATA, torch.arange(6))
    captured = weakref.ref(made.pop()._captured)
    gc.disable()
    try:
        assert captured() is not None
        del recording
        assert captured() is None
    finally:
        gc.enable()


# --- what is replayed -------------------------------------------------------------------------------------------------


def graph_of(function, *inputs):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function)(*inputs)


class OnGpu:
    """Says that it lies on a GPU, which this machine need not have."""

    device, layout = torch.device("cuda", 0), torch.strided


@pytest.fixture
def made_graphs(monkeypatch):
    monkeypatch.setattr(cuda_graph, "CudaGraph", lambda code, device: ("replayed", device))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.14.0"))
    monkeypatch.setattr(torch.version, "hip", None)


def test_only_what_lies_on_one_gpu_is_replayed(made_graphs, monkeypatch):
    graph, code = graph_of(lambda x: x + 1, torch.ones(3)), object()
    other, sparse = OnGpu(), OnGpu()
    other.device, sparse.layout = torch.device("cuda", 1), torch.sparse_coo
    assert replayed(code, graph, [OnGpu(), OnGpu()]) == ("replayed", torch.device("cuda", 0))
    for tensors in ([torch.ones(2)], [OnGpu(), torch.ones(2)], [OnGpu(), other], [OnGpu(), sparse], []):
        assert replayed(code, graph, tensors) is code
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert replayed(code, graph, [OnGpu()]) is code
    monkeypatch.setattr(torch.version, "hip", None)
    for version, expected in (("2.11.0", code), ("2.13.1+cu130", code), ("2.15.0", ("replayed", OnGpu.device))):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        assert replayed(code, graph, [OnGpu()]) == expected


def test_a_number_on_the_cpu_that_may_change_is_not_frozen(made_graphs):
    """A KL weight in a closure, say: a capture would keep its value. A literal is the same at each call."""
    beta, code = torch.tensor(2.0), object()
    assert replayed(code, graph_of(lambda x: x * beta, torch.ones(3)), [OnGpu()]) is code
    assert replayed(code, graph_of(lambda x: x * torch.tensor(2.0), torch.ones(3)), [OnGpu()]) is not code
    assert replayed(code, graph_of(lambda x: x * 2.0, torch.ones(3)), [OnGpu()]) is not code


def test_nothing_is_replayed_on_a_cpu(monkeypatch, uncompiled):
    monkeypatch.setattr(cuda_graph, "CudaGraph", None)
    assert run_steps()


# --- the whole library ------------------------------------------------------------------------------------------------


def placed(device):
    pyro.clear_param_store()
    model, guide = (module.to(device) for module in make())
    pyro.set_rng_seed(3)
    return model, guide, binary().to(device)


def train(device, **options):
    model, guide, x = placed(device)
    options = {"epochs": 4, "batch_size": 10, "clip_norm": 1.0, "validation": x, **options}
    result = pv.fit(
        *(model, guide, 0.8 * x + 0.1),
        transform=pv.data.binarize,
        device=device,
        compile=True,
        progress=False,
        **options,
    )
    names = ("objective", "kl", "validation_elbo")
    return [*parameters(model, guide), *(torch.tensor([row[name] for name in names]) for row in result.history)]


def train_with_more(device):
    return train(device, average=0.9, accumulate=2, max_skipped_steps=2)


def evaluate(device):
    options = {"num_particles": 40, "particle_batch_size": 8, "data_batch_size": 10, "compile": True}
    return [pv.log_weights(*placed(device), progress=False, **options)]


def anneal(device):
    model, guide, x = placed(device)
    options = {"num_chains": 4, "num_temperatures": 6, "compile": True, "progress": False}
    return [pv.annealed_importance_sampling(model, x[:8], guide=guide, **options).log_prob]


def refine(device):
    model, guide, x = placed(device)
    refined = pv.guides.Refined(guide, model, 10)
    return [pv.log_weights(model, refined, x, num_particles=32, particle_batch_size=8, compile=True, progress=False)]


@pytest.mark.parametrize("use", [train, train_with_more, evaluate, anneal, refine])
def test_the_library_gives_the_same_bits(captures, caplog, use):
    expected = use("cpu")
    made = captures()
    assert_same_bits([use("cpu")], [expected])
    assert any(graph.num_captures for graph in made)
    assert not caplog.records


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_graphs(monkeypatch):
    """The graphs made by the recordings to come."""
    made, original = [], cuda_graph.CudaGraph
    monkeypatch.setattr(cuda_graph, "CudaGraph", lambda *given: made.append(original(*given)) or made[-1])
    return made


def steps_on_gpu(inductor=False, **options):
    """A few steps of a net with batch norm and noise, with and without replays, in float64."""
    ends = []
    for is_replayed in (False, True):
        net, data = Net().cuda().double(), DATA.cuda().double()

        def function(data, index, net=net):
            net.count.add_(1)
            hidden = net.norm(net.layer(data[index])) + torch.randn(6, 2, device="cuda", dtype=torch.float64)
            return hidden.square().sum(), hidden

        index = torch.arange(6, device="cuda")
        with pytest.MonkeyPatch.context() as patch:
            if not is_replayed:
                patch.setattr(record_module, "replayed", lambda code, *_: code)
            recording = record(function, [net], (data, index), gradients=True, inductor=inductor, **options)
        torch.manual_seed(7)
        seen = []
        for step in range(10):
            if step == 6:
                net.layer.weight.data = net.layer.weight.data.clone()
            outputs, gradients = recording(data, torch.arange(step, step + 6, device="cuda"))
            seen += [*outputs, *gradients, *(value.clone() for value in net.state_dict().values())]
            seen.append(torch.cuda.get_rng_state().double())
        ends.append([value.double().cpu() for value in seen])
    return ends


@needs_a_gpu
@pytest.mark.parametrize("medium", [False, True])
@pytest.mark.parametrize("inductor", [False, True])
def test_steps_on_a_gpu(real_graphs, caplog, inductor, medium):
    for expected, found in zip(*steps_on_gpu(inductor, medium=medium), strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert "CUDA graph" not in caplog.text
    assert [graph.num_captures for graph in real_graphs] == [2]


@needs_a_gpu
@pytest.mark.parametrize("use", [train, train_with_more, evaluate, anneal, refine])
def test_the_library_on_a_gpu(double, monkeypatch, real_graphs, caplog, use):
    with monkeypatch.context() as patch:
        patch.setattr(record_module, "replayed", lambda code, *_: code)
        expected = use("cuda")
    assert not real_graphs
    found = use("cuda")
    assert any(graph.num_captures for graph in real_graphs)
    assert not any(graph.is_given_up for graph in real_graphs), caplog.text
    for pair in zip(found, expected, strict=True):
        assert torch.allclose(*pair, rtol=1e-6, atol=1e-8)


@needs_a_gpu
def test_code_that_waits_for_the_gpu_is_not_captured(caplog):
    graph = CudaGraph(lambda tensors, values: ([tensors[0] * tensors[0].sum().item()], []), torch.device("cuda", 0))
    for number in range(1, 6):
        x = torch.full((3,), float(number), device="cuda")
        assert torch.equal(graph([x], [])[0][0], x * x.sum())
    assert "the host waits for the GPU" in caplog.text
    assert graph.num_captures == 0


@needs_a_gpu
def test_a_capture_that_fails_leaves_torch_as_it_was(caplog, monkeypatch):
    """The wait is not looked for, so that it comes in the middle of the capture."""
    monkeypatch.setattr(cuda_graph.Capture, "without_waits", staticmethod(contextlib.nullcontext))
    stream = torch.cuda.current_stream()
    graph = CudaGraph(
        lambda tensors, values: ([torch.randn_like(tensors[0]) * tensors[0].sum().item()], []), stream.device
    )
    x = torch.ones(3, device="cuda")
    torch.manual_seed(1)
    found = [graph([x], [])[0][0] for _ in range(6)]
    torch.manual_seed(1)
    assert_same_bits([found], [[torch.randn_like(x) * x.sum().item() for _ in range(6)]])
    assert graph.is_given_up
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    assert not steps_on_gpu()[0][0].isnan()


@needs_a_gpu
def test_the_memory_of_captures_is_freed(real_graphs):
    def reserved():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def once():
        layer = nn.Linear(1000, 1000).cuda()
        x = torch.randn(2000, 1000, device="cuda")
        recording = record(lambda x: (layer(x).sin().exp(),), [layer], (x,), inductor=False)
        for _ in range(5):
            recording(x)
        assert real_graphs.pop().num_captures == 1

    once()
    before = reserved()
    for _ in range(3):
        once()
    assert reserved() <= before
