"""Records a Pyro program once with `make_fx` as a pure tensor function, and compiles it with Inductor.

Pyro's handlers, constructors of distributions and module calls are Python code that runs again at every step; on a CPU
they take a third of its time. Recording runs them once. What remains is a few hundred tensor operations on parameters,
buffers, arguments and new random numbers, which Inductor fuses. (`torch.compile` on the Pyro program itself breaks the
graph at every handler and makes it slower.)

A recording freezes what Python sees: numbers, attributes, lengths, the branch taken, and tensors that are neither
parameters, buffers nor arguments (frozen by identity: their values may change in place). A new recording is made if the
shape, dtype or device of an argument, parameter or buffer changes, or the train/eval mode of a module. Each call draws
new noise from torch's generator in the order of the eager program, so both give the same numbers up to rounding. Checks
of values are left out: run a program eagerly before you record it.
"""

import inspect
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
    compiled_by_inductor,
    import_compiler,
    refuse_unwritable_cache,
    remove_damaged_library,
)
from pyrovae.compiled.frozen import (
    Comparison,
    refuse_captured_parameters,
    refuse_hooks_of_gradients,
    refuse_reading,
    refuse_sizes_by_values,
)
from pyrovae.compiled.signature import Last, kinds
from pyrovae.programs.reach import modules_behind

__all__ = ["Extracted", "all_ours", "extract"]

_logger = logging.getLogger("pyrovae")
_OURS = {"pyrovae", "torch", "zuko"}


def all_ours(*programs: Any) -> bool:
    """Whether programs are modules of pyrovae, torch and zuko only: recording third-party code may freeze values."""
    parts = {type(part) for module in modules_behind(*programs) for part in module.modules()}
    return all(map(_is_ours, programs)) and all(part.__module__.partition(".")[0] in _OURS for part in parts)


def _is_ours(program: Any) -> bool:
    if inspect.ismethod(program):
        return _is_ours(program.__self__)
    # A function of this library wraps a program that is checked on its own (annealing's prior of a model).
    return isinstance(program, nn.Module) or getattr(program, "__module__", "").partition(".")[0] == "pyrovae"


def extract(
    function: Callable[..., tuple[Tensor, ...]],
    modules: Sequence[nn.Module],
    examples: Sequence[Tensor],
    *,
    gradients: bool = False,
    inductor: bool = True,
) -> "Extracted | None":
    """Record and compile a function of tensors and of the modules it refers to.

    Args:
        function: Tensors -> tuple of tensors.
        modules: The modules whose parameters and buffers it uses.
        examples: Tensors like those it will be called with.
        gradients: Also return d(first output) / d(parameter) for each of `Extracted.parameters`.
        inductor: Compile the recording, which takes seconds. If False, run the recorded operations as they are, which
            already saves Pyro's overhead.

    Returns:
        The recording, or None if that fails (control flow that depends on values, no C++ compiler). One line of the log
        gives the reason, and the caller runs its eager program.
    """
    extracted = Extracted(function, modules, gradients, inductor)
    try:
        try:
            extracted.at(*examples)
        except Exception as error:
            if not (inductor and remove_damaged_library(error)):
                raise
            extracted.at(*examples)
    except Exception as error:  # any failure: the caller can always run its eager program
        _say_why(error)
        return None
    return extracted


def _say_why(error: Exception) -> None:
    reason = str(error).strip().partition("\n")[0]
    _logger.warning("runs eagerly: recording and compiling failed (%s: %s)", type(error).__name__, reason)


class Extracted:
    """A recorded function. Each call uses the current values of parameters and buffers, and draws new noise.

    A call with tensors returns the outputs and the gradients in the order of `parameters` (None for a parameter without
    one; an empty list if gradients were not requested). Each new signature (shapes, strides, dtypes, devices, modes) is
    recorded; the last `CAPACITY` recordings are kept. If recording fails, calls with that signature run the function
    itself, and the log says so.
    """

    CAPACITY = 8
    compiler = staticmethod(compiled_by_inductor)

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], modules: Sequence[nn.Module], gradients: bool, inductor: bool
    ):
        self.function = function
        self.inductor = inductor
        self.modules = nn.ModuleList(modules)
        self.gradients = gradients
        self.num_recordings = 0
        self._recorded: OrderedDict[Any, Callable[..., tuple[list[Tensor], list[Tensor | None]]]] = OrderedDict()
        self._last: Last | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, each once: gradients come in this order."""
        return [parameter for parameter in self.modules.parameters() if parameter.requires_grad]

    def __call__(self, *tensors: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        return self.at(*tensors)()

    def at(self, *tensors: Tensor) -> Callable[[], tuple[list[Tensor], list[Tensor | None]]]:
        """Return the recording for these tensors, recorded now if necessary.

        Call the result as often as you like while only values change. Unlike `__call__`, it does not check whether the
        modules have changed.
        """
        if self._last is None or not self._last.holds(tensors):
            self._last = self._look_up(tensors)
        return partial(self._last.run, tensors, self._last.values)

    def _look_up(self, tensors: Sequence[Tensor]) -> Last:
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
                _say_why(error)  # do not raise: the caller has worked with an earlier recording already
                run = self._run_eagerly
            self._recorded[signature] = run
            if len(self._recorded) > self.CAPACITY:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(signature)
        return Last(self.modules, tensors, run, list(state.values()))

    def _run_eagerly(self, tensors: Sequence[Tensor], _: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        leaves = self.parameters if self.gradients else []
        with torch.set_grad_enabled(self.gradients):
            outputs = self.function(*tensors)
            gradients = torch.autograd.grad(outputs[0], leaves, allow_unused=True) if leaves else ()
        return [output.detach() for output in outputs], list(gradients)

    def _signature(self, tensors: Sequence[Tensor]) -> tuple:
        modes = tuple(module.training for module in self.modules.modules())
        trained = tuple(parameter.requires_grad for parameter in self.modules.parameters())
        return modes, trained, *kinds(tensors)

    def _record(self, tensors: Sequence[Tensor], state: dict[str, Tensor]) -> Callable:
        import_compiler()
        if self.inductor:
            refuse_unwritable_cache()
        from torch.fx.experimental.proxy_tensor import make_fx  # takes a second to import

        names = list(state)
        trained = {name for name, parameter in self.modules.named_parameters() if parameter.requires_grad}
        has_gradient: list[bool] = []

        def flat(tensors: list[Tensor], values: list[Tensor]) -> list[Tensor]:
            given = dict(zip(names, values, strict=True))
            if self.gradients:
                given = {n: v.detach().requires_grad_() if n in trained else v for n, v in given.items()}
            with torch.set_grad_enabled(self.gradients):
                by_id = {
                    id(slot): given[name]
                    for name, slot in (*self.modules.named_parameters(), *self.modules.named_buffers())
                }
                # List each slot once: functional_call would restore a module reached by two paths wrongly, as a clone.
                placed = {
                    f"{path}.{name}" if path else name: by_id[id(slot)]
                    for path, module in self.modules.named_modules()
                    for name, slot in (*module._parameters.items(), *module._buffers.items())
                    if slot is not None and id(slot) in by_id
                }
                outputs = torch.func.functional_call(
                    _Caller(self.modules), _prefixed(placed), (self.function, *tensors), tie_weights=False
                )
                leaves = [given[name] for name in names if name in trained] if self.gradients else []
                gradients = torch.autograd.grad(outputs[0], leaves, allow_unused=True) if leaves else ()
            has_gradient[:] = [gradient is not None for gradient in gradients]
            return [*(o.detach() for o in outputs), *(g for g in gradients if g is not None)]

        # Give each argument its own alias: one tensor passed twice now may be two tensors at the next call.
        given = [tensor.detach() for tensor in tensors]
        devices = list({tensor.device for tensor in (*tensors, *state.values()) if tensor.is_cuda})
        programs = self._run_eagerly, self.function
        refuse_hooks_of_gradients(self.modules)
        with _unseen(devices), Comparison(*programs, self.modules, given, state, devices) as comparison:
            comparison.check_program()
            with comparison.noise(0), refuse_reading():
                graph = make_fx(flat)(given, [tensor.clone() for tensor in state.values()])
            refuse_captured_parameters(graph)
            refuse_sizes_by_values(graph)
            comparison.check_recording(graph)
            compiled: Callable = graph
            if self.inductor:
                compiled = self.compiler(graph)
                comparison.check_compiled(graph, compiled)  # compiles now, so that a failure shows here
        self.num_recordings += 1

        def run(tensors: Sequence[Tensor], values: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
            with torch.no_grad():
                results = compiled(list(tensors), values)
            num_outputs = len(results) - sum(has_gradient)
            gradients = iter(results[num_outputs:])
            return list(results[:num_outputs]), [next(gradients) if there else None for there in has_gradient]

        return run


class _Caller(nn.Module):
    """A module whose forward calls any function, as `functional_call` needs."""

    def __init__(self, modules: nn.ModuleList):
        super().__init__()
        self.modules_ = modules

    def forward(self, function: Callable, *tensors: Tensor) -> Any:
        return function(*tensors)


def _prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"modules_.{name}": tensor for name, tensor in state.items()}


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
