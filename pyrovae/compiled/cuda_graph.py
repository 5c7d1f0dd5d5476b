"""Replays a recording as a CUDA graph, because launching the kernels of a small network takes longer than running them.

The first calls run the code as it is, which loads its kernels. Then it is captured, which executes nothing, with the
memory of the real parameters and buffers, and from then on each call replays the capture. A capture holds addresses:
small arguments are copied into memory of its own, and large ones (the training data) are read where they lie. It is
captured again if such an argument, a parameter or a buffer has moved, or a setting of torch has changed.

A replay draws the numbers that the code itself would draw. The first replays of a capture are checked: the code runs,
too, on copies of parameters and buffers and with the same random numbers. If outputs, gradients, buffers or generators
then differ, or anything fails, the log says so in one line, and the code runs as it is from then on.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.compiled.self_check import Results, Run, difference

__all__ = ["Capture", "CudaGraph", "replayed"]

_logger = logging.getLogger("pyrovae")

_COPIED = 2**22  # bytes: copying fewer takes a few microseconds
_WARM_UP, _CHECKED, _MOST_CAPTURES = 2, 2, 8  # calls before the capture; replays to check; captures before giving up

_Code = Callable[[list[Tensor], list[Tensor]], Results]


def replayed(code: _Code, graph: torch.fx.GraphModule, tensors: Sequence[Tensor]) -> _Code:
    """Return code that is replayed as a CUDA graph, or the same code if that is impossible.

    Args:
        code: (arguments, values of parameters and buffers) -> (outputs, gradients); it may change the values in place.
        graph: What it computes.
        tensors: Arguments, parameters and buffers like those it will be called with.
    """
    devices = {tensor.device for tensor in (*tensors, *_kept(graph))}
    # Before torch 2.14, a capture that fails can leave torch's allocator and generators as if it still went on. On ROCm,
    # a capture may ignore what it cannot capture.
    can_fail_safely = torch.__version__ >= "2.14" and torch.version.hip is None
    if can_fail_safely and len(devices) == 1 and all(tensor.layout == torch.strided for tensor in tensors):
        device = devices.pop()
        if device.type == "cuda":
            return CudaGraph(code, device)
    return code


def _kept(graph: torch.fx.GraphModule) -> list[Tensor]:
    """The tensors that a recording keeps and someone may change in place, which is not so for literals."""
    literal = torch.ops.aten.lift_fresh_copy.default
    nodes = [node for node in graph.graph.nodes if node.op == "get_attr"]
    names = [node.target for node in nodes if not all(user.target is literal for user in node.users)]
    held = (getattr(graph, name, None) for name in names)
    return [tensor for tensor in held if isinstance(tensor, Tensor) and tensor.numel()]


class Capture:
    """One captured run on a GPU. Capturing executes nothing; `replay` runs it, and writes to `results` each time."""

    def __init__(self, code: _Code, tensors: list[Tensor], values: list[Tensor], device: torch.device):
        self.graph = torch.cuda.CUDAGraph()
        torch._C._cuda_clearCublasWorkspaces()  # so that the workspace is this capture's own, and is freed with it
        try:
            with (
                torch.cuda.device(device),
                torch.cuda.stream(torch.cuda.current_stream(device)),  # goes back to it even if the capture fails
                # Other threads (of NCCL, of a DataLoader) may do what a capture must not.
                torch.cuda.graph(self.graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
            ):
                self.results = code(tensors, values)
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def replay(self) -> None:
        self.graph.replay()

    @staticmethod
    @contextmanager
    def without_waits() -> Iterator[None]:
        """Raise RuntimeError if the host waits for the GPU inside: it reads a value, which a capture would freeze."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # as an error it would reach other threads
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        if any("synchronizing CUDA operation" in str(warning.message) for warning in caught):
            raise RuntimeError("the host waits for the GPU inside it")


class _Own(NamedTuple):
    """Memory of a capture for an argument: as a vector, and as a tensor with the argument's layout."""

    memory: Tensor
    tensor: Tensor


class _Places(NamedTuple):
    """What a capture relies on: addresses, settings of torch and the stream."""

    arguments: dict[int, int]  # position -> address, of those that are not copied
    values: list[int]
    settings: tuple


class CudaGraph:
    """Code that is replayed as a CUDA graph after the first calls.

    Args:
        code: See `replayed`.
        device: The GPU on which all its tensors lie.
        capture: Makes a capture; tests on a CPU pass a stand-in.

    Attributes:
        num_captures: How often it was captured.
        is_given_up: Whether the code runs as it is from now on.
    """

    def __init__(self, code: _Code, device: torch.device, capture: type[Capture] = Capture):
        self.code, self.device, self.capture = code, device, capture
        self.generators = [torch.default_generator]
        if device.type == "cuda":
            self.generators.append(torch.cuda.default_generators[device.index])
        self.num_captures, self.is_given_up = 0, False
        self._num_calls = self._num_unchecked = 0
        self._captured: Capture | None = None
        self._places: _Places | None = None
        self._own: dict[int, _Own] = {}

    def __call__(self, tensors: list[Tensor], values: list[Tensor]) -> Results:
        if self.is_given_up:
            return self.code(tensors, values)
        if self._num_calls < _WARM_UP:
            self._num_calls += 1
            self._places = self._look(tensors, values)
            return self.code(tensors, values)
        before, expected, after = self._random_state(), None, []
        try:
            has_moved = self._captured is None or self._look(tensors, values) != self._places
            if has_moved:
                self._num_unchecked = _CHECKED
            if self._num_unchecked:
                state = [value.clone() for value in values]
                with self.capture.without_waits():
                    expected, after = Run(*self.code(list(tensors), state), state), self._random_state()
                self._restore(before)
            if has_moved:
                self._capture(tensors, values)
                self._restore(before)  # the code may have drawn on the CPU
            results = self._replay(tensors)
            if expected is not None:
                self._check(Run(*results, values), expected, after)
                self._num_unchecked -= 1
            return results
        except Exception as error:  # any failure: the code itself gives the results
            reason = str(error).strip().partition("\n")[0]
            _logger.warning("is not replayed as a CUDA graph: %s: %s", type(error).__name__, reason)
        self.is_given_up, self._captured = True, None
        self._own.clear()
        # The call counts once: take over the checking run, or if there was none, nothing has been changed yet.
        if expected is None:
            self._restore(before)
            return self.code(tensors, values)
        self._restore(after)
        for value, right in zip(values, expected.state, strict=True):
            if not torch.equal(value, right):
                value.copy_(right)
        return expected.outputs, expected.gradients

    def _capture(self, tensors: list[Tensor], values: list[Tensor]) -> None:
        self._captured = None  # free its memory first
        if self.num_captures == _MOST_CAPTURES:
            raise RuntimeError(f"parameters, buffers or settings have changed places {_MOST_CAPTURES} times")
        self.num_captures += 1
        assert self._places is not None
        for position, address in self._places.arguments.items():
            tensor = tensors[position]
            memory = _memory_of(tensor)
            if memory.nbytes <= _COPIED or tensor.data_ptr() != address:
                with torch.inference_mode(False):  # others may not be changed in place outside of inference mode
                    own = torch.empty_like(memory)
                    self._own[position] = _Own(own, own.as_strided(tensor.shape, tensor.stride()))
        inputs = [self._own[i].tensor if i in self._own else tensor for i, tensor in enumerate(tensors)]
        self._captured = self.capture(self.code, inputs, values, self.device)
        self._places = self._look(tensors, values)

    def _replay(self, tensors: list[Tensor]) -> Results:
        assert self._captured is not None
        if self._own:
            torch._foreach_copy_(
                [own.memory for own in self._own.values()], [_memory_of(tensors[position]) for position in self._own]
            )
        self._captured.replay()
        # Return copies of gradients, too: any optimizer may come next, and it may keep them for its next step.
        outputs, gradients = self._captured.results
        static = [tensor for tensor in (*outputs, *gradients) if tensor is not None]
        copies = [torch.empty_like(tensor) for tensor in static]
        torch._foreach_copy_(copies, static)
        rest = iter(copies)
        return [next(rest) for _ in outputs], [None if gradient is None else next(rest) for gradient in gradients]

    def _check(self, found: Run, expected: Run, after: list[Tensor]) -> None:
        if (place := difference(found, expected)) is not None:
            raise RuntimeError("a replay gives other {}, at position {}".format(*place))
        if not all(map(torch.equal, self._random_state(), after)):
            raise RuntimeError("a replay takes another number of random numbers")

    def _look(self, tensors: list[Tensor], values: list[Tensor]) -> _Places:
        arguments = {i: tensor.data_ptr() for i, tensor in enumerate(tensors) if i not in self._own}
        backends: Any = torch.backends
        settings = (
            torch.are_deterministic_algorithms_enabled(),
            backends.cuda.matmul.fp32_precision,
            backends.cudnn.conv.fp32_precision,
            # Work on another stream might still read what a replay writes; capturing waits for it.
            torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None,
        )
        return _Places(arguments, [value.data_ptr() for value in values], settings)

    def _random_state(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def _restore(self, states: list[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)


def _memory_of(tensor: Tensor) -> Tensor:
    """The memory from a tensor's first element to its last, as a vector, whatever its strides."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((1 + last if tensor.numel() else 0,), (1,))
