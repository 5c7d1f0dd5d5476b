"""Records a Pyro program once with `make_fx` as a pure tensor function, and compiles it with Inductor.

Pyro's handlers, constructors of distributions and module calls are Python code that runs again at every step; on a CPU
they take a third of its time. Recording runs them once. What remains is a few hundred tensor operations on parameters,
buffers, arguments and new random numbers, which Inductor fuses. (`torch.compile` on the Pyro program itself breaks the
graph at every handler and makes it slower.)

A recording keeps what Python sees as constants: numbers, attributes, lengths, the branch taken, and tensors that are
neither parameters, buffers nor arguments (the same tensor, whose values may change in place). A new recording is made
if the shape, dtype or device of an argument, parameter or buffer changes, or the train/eval mode of a module. Each call
draws new noise from torch's generator in the order of the eager program, so both give the same numbers up to rounding;
`self_check.py` compares them. Checks of values are left out: run a program eagerly before you record it. Compiled code
is used again for the same graph: `kept_code.py`. On a GPU its calls are replayed as a CUDA graph: `cuda_graph.py`.

What is recorded: a step (`training/acceleration.py`), a chunk of draws (`evaluation/recorded_draw.py`), a gradient of
annealing (`annealing/potential.py`) and of refinement (`guides/refinement.py`). When: `policy.py`.
"""

import logging
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy
import pyro
import torch
from torch import Tensor, nn

from pyrovae.common.arguments import without_checks
from pyrovae.compiled.compiler import (
    check_cache_is_writable,
    compiled_by_inductor,
    float32_products,
    import_compiler,
    remove_damaged_library,
)
from pyrovae.compiled.cuda_graph import replayed
from pyrovae.compiled.hidden_state import ReadsByPython, check_gradient_hooks, check_graph
from pyrovae.compiled.kept_code import compiled_once
from pyrovae.compiled.self_check import Inputs, Results, SelfCheck
from pyrovae.compiled.signature import LastCall, Snapshot, kinds

__all__ = ["Recording", "Results", "record"]

_logger = logging.getLogger("pyrovae")

Finish = Callable[[list[Tensor], list[Tensor | None]], Results]


def record(
    function: Callable[..., tuple[Tensor, ...]],
    modules: Sequence[nn.Module],
    examples: Sequence[Tensor],
    *,
    gradients: bool = False,
    inductor: bool = True,
    medium: bool = False,
    finish: Finish | None = None,
) -> "Recording | None":
    """Record and compile a function of tensors and of the modules it refers to.

    Args:
        function: Tensors -> tuple of tensors.
        modules: The modules whose parameters and buffers it uses.
        examples: Tensors like those it will be called with.
        gradients: Also return d(first output) / d(parameter) for each of `Recording.parameters`.
        inductor: Compile the recording, which takes seconds. If False, run the recorded operations as they are, which
            already saves Pyro's overhead.
        medium: Allow bfloat16 inside the products of float32 matrices: see `float32_products`. The self-check runs without it.
        finish: Function of outputs and gradients, recorded too; it may change buffers of the modules in place.

    Returns:
        The recording, or None if that fails (control flow that depends on values, no C++ compiler) or the self-check
        finds other values, gradients or buffers than the function's. One line of the log gives the reason, and the
        caller runs its eager program.
    """
    recording = Recording(function, modules, gradients, inductor, medium, finish)
    try:
        try:
            recording.at(*examples)
        except Exception as error:
            if not (inductor and remove_damaged_library(error)):
                raise
            recording.at(*examples)
    except Exception as error:  # any failure: the caller can always run its eager program
        _log_reason(error)
        return None
    return recording


class Recording:
    """A recorded function. Each call uses the current values of parameters and buffers, and draws new noise.

    A call with tensors returns the outputs and the gradients in the order of `parameters` (None for a parameter without
    one; an empty list if gradients were not requested). Each new signature (shapes, strides, dtypes, devices, modes) is
    recorded; the last `CAPACITY` graphs are kept. If recording fails, calls with that signature run the function
    itself, and the log says so.
    """

    CAPACITY = 8
    compiler = staticmethod(compiled_by_inductor)

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        modules: Sequence[nn.Module],
        gradients: bool,
        inductor: bool,
        medium: bool = False,
        finish: Finish | None = None,
    ):
        self.function, self.finish = function, finish
        self.inductor, self.medium = inductor, medium
        self.modules = nn.ModuleList(modules)
        self.gradients = gradients
        self.num_recordings = 0
        self._recorded: OrderedDict[Any, Callable[..., Results]] = OrderedDict()
        self._last: LastCall | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, each once: gradients come in this order."""
        return [parameter for parameter in self.modules.parameters() if parameter.requires_grad]

    def __call__(self, *tensors: Tensor) -> Results:
        return self.at(*tensors)()

    def at(self, *tensors: Tensor) -> Callable[[], Results]:
        """Return the recorded function for these tensors, recorded now if necessary.

        Call the result as often as you like while only values change. Unlike `__call__`, it does not check whether the
        modules have changed.
        """
        if self._last is None or not self._last.holds(tensors):
            self._last = self._look_up(tensors)
        return partial(self._last.run, tensors, self._last.values)

    def _look_up(self, tensors: Sequence[Tensor]) -> LastCall:
        parameters = {name: parameter.detach() for name, parameter in self.modules.named_parameters()}
        state = parameters | dict(self.modules.named_buffers())
        signature = self._signature((*tensors, *state.values()))
        run = self._recorded.get(signature)
        if run is None:
            try:
                run = self._record(tensors, state)
            except Exception as error:
                if not self.num_recordings:
                    raise
                _log_reason(error)  # do not raise: the caller has worked with an earlier recording already
                run = self._run_eagerly
            self._recorded[signature] = run
            if len(self._recorded) > self.CAPACITY:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(signature)
        return LastCall(self.modules, tensors, run, list(state.values()))

    def _signature(self, tensors: Sequence[Tensor]) -> tuple:
        modes = tuple(module.training for module in self.modules.modules())
        trained = tuple(parameter.requires_grad for parameter in self.modules.parameters())
        return modes, trained, *kinds(tensors)

    def _record(self, tensors: Sequence[Tensor], state: dict[str, Tensor]) -> Callable[..., Results]:
        """Record the function for tensors and modules like these, check the recording, compile it, check it again."""
        import_compiler()
        if self.inductor:
            check_cache_is_writable()
        # These take a second to import.
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx

        check_gradient_hooks(self.modules)
        devices = list({tensor.device for tensor in (*tensors, *state.values()) if tensor.is_cuda})
        # Give each argument its own alias: one tensor passed twice now may be two tensors at the next call.
        given = Inputs([tensor.detach() for tensor in tensors], [value.clone() for value in state.values()], noise=1)
        with _unseen(devices), Snapshot(self.modules) as before:
            check = SelfCheck(self._run_eagerly, self.modules, list(state), before, devices)
            expected = check.check_program(self.function, given)
            # torch notes the kind of each result in a mode for fake tensors; without a context it makes one each time.
            with check.noise(0), ReadsByPython(), tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
                graph = make_fx(partial(self._run_on, list(state)))(given.tensors, [*map(torch.clone, given.state)])
            check_graph(graph)
            elsewhere = check.check_recording(graph, given, expected)
            compiled: Callable = graph
            if self.inductor:
                layouts = (*given[:2], *expected[:2])
                # The check runs the code, which compiles now, so that a failure shows here.
                compiled = compiled_once(graph, self.compiler, layouts, partial(check.check_compiled, elsewhere, graph))
        self.num_recordings += 1
        # Without `self`, so that the memory of a CUDA graph is freed as soon as the recording goes.
        code, medium = replayed(compiled, graph, (*tensors, *state.values())), self.medium

        def run(tensors: Sequence[Tensor], values: list[Tensor]) -> Results:
            with torch.no_grad(), float32_products(medium):
                return code(list(tensors), values)

        return run

    def _run_on(self, names: list[str], tensors: list[Tensor], values: list[Tensor]) -> Results:
        """Run the function on other values of parameters and buffers: what `make_fx` records."""
        given = dict(zip(names, values, strict=True))
        trained = [name for name, parameter in self.modules.named_parameters() if parameter.requires_grad]
        if self.gradients:
            given |= {name: given[name].detach().requires_grad_() for name in trained}
        by_id = {
            id(slot): given[name] for name, slot in (*self.modules.named_parameters(), *self.modules.named_buffers())
        }
        # List each slot once: functional_call would restore a module reached by two paths wrongly, as a clone.
        placed = {
            ".".join(filter(None, ("modules_", path, name))): by_id[id(slot)]
            for path, module in self.modules.named_modules()
            for name, slot in (*module._parameters.items(), *module._buffers.items())
            if slot is not None and id(slot) in by_id
        }
        run = partial(self._with_gradients, [given[name] for name in trained] if self.gradients else [])
        results: Results = torch.func.functional_call(_Caller(self.modules), placed, (run, *tensors), tie_weights=False)
        return results

    def _run_eagerly(self, tensors: Sequence[Tensor], _: Sequence[Tensor]) -> Results:
        """Run the function on the modules as they are."""
        return self._with_gradients(self.parameters if self.gradients else [], *tensors)

    def _with_gradients(self, leaves: Sequence[Tensor], *tensors: Tensor) -> Results:
        with torch.set_grad_enabled(self.gradients):
            outputs = self.function(*tensors)
            gradients = torch.autograd.grad(outputs[0], leaves, allow_unused=True) if leaves else ()
        found: Results = [output.detach() for output in outputs], list(gradients)
        with torch.no_grad():
            return found if self.finish is None else self.finish(*found)


class _Caller(nn.Module):
    """A module whose forward calls any function, as `functional_call` needs."""

    def __init__(self, modules: nn.ModuleList):
        super().__init__()
        self.modules_ = modules

    def forward(self, function: Callable, *tensors: Tensor) -> Any:
        return function(*tensors)


def _log_reason(error: Exception) -> None:
    reason = str(error).strip().partition("\n")[0]
    _logger.warning("runs eagerly: recording and compiling failed (%s: %s)", type(error).__name__, reason)


@contextmanager
def _unseen(devices: list[torch.device]) -> Iterator[None]:
    """Run programs for inspection: no checks, no gradients, generators restored, messages of torch silenced.

    torch logs that the machine has no GPU, and warns about its own deprecated functions.
    """
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    of_python, of_numpy = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    logger.setLevel(logging.ERROR)
    try:
        with (
            torch.random.fork_rng(devices),
            pyro.validation_enabled(False),
            without_checks(),
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)  # noqa: NPY002
