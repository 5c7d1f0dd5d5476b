"""Whether a recording gives what its program gives: nothing frozen, no change of the modules lost, nothing miscompiled.

A recording as `make_fx` made it calls the program's own operations in the program's order. Given the same random numbers, it
must give the same numbers, gradients and buffers at any data and parameters; a difference beyond rounding means that something
was frozen. Inductor's code rounds differently, which may decide a draw differently (rand() < p), so compiled code is allowed
to differ from the recording by more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyrovae.compiled.reachable import Reached
from pyrovae.compiled.signature import Kept

__all__ = ["Comparison", "refuse_captured_parameters", "refuse_reading", "turned"]

# In units of eps times the largest number. The same operations give the same numbers on a CPU; on a GPU some of them add in
# no fixed order.
_CPU_ROUNDING, _GPU_ROUNDING = 16.0, 1024.0


class refuse_reading(TorchFunctionMode):
    """Inside, ValueError for a value of traced tensors that Python or NumPy gets: the recording would hold it for ever.

    Comparing numbers does not find all of these: whatever is counted or sorted may be the same at the few places looked at.
    (`make_fx` itself refuses item(), float() and bool().)
    """

    _READS = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in self._READS:
            from torch.fx.experimental.proxy_tensor import get_proxy_mode, has_proxy_slot

            mode = get_proxy_mode()
            if mode is not None and has_proxy_slot(args[0], mode.tracer):
                raise ValueError(
                    f"values of data, parameters or draws go to Python or numpy (Tensor.{func.__name__}) and were frozen in the "
                    f"recording"
                )
        return func(*args, **(kwargs or {}))


class _Place(NamedTuple):
    """Where a program is run: arguments, values of parameters and buffers, and which random numbers it draws."""

    tensors: list[Tensor]
    state: list[Tensor]
    noise: int


class _Run(NamedTuple):
    """What a run gives, and the parameters and buffers after it."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    state: list[Tensor]


def refuse_sizes_by_values(graph: torch.fx.GraphModule) -> None:
    """Raise ValueError for a tensor whose size depends on values (nonzero, a mask as an index): Python may have read it."""
    for node in graph.graph.nodes:
        if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
            continue
        indices = node.args[1] if node.target is torch.ops.aten.index.Tensor else ()
        masks = {torch.bool, torch.uint8}
        if not indices or any(i is not None and i.meta["tensor_meta"].dtype in masks for i in indices):
            raise ValueError(
                f"the size of a tensor depends on values ({node.target}), and would be frozen in the recording"
            )


def refuse_hooks_of_gradients(modules: nn.Module) -> None:
    """Raise ValueError for a hook on an accumulated gradient, which a recording does not call."""
    for name, parameter in modules.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"parameter '{name}' has a hook on its accumulated gradient, which a recording does not call"
            )


def refuse_captured_parameters(graph: torch.fx.GraphModule) -> None:
    """Raise ValueError for a parameter that is not of the modules (pyro.param in a function): it would get no gradient."""
    for node in graph.graph.nodes:
        if node.op == "get_attr" and getattr(getattr(graph, node.target, None), "requires_grad", False):
            raise ValueError("the program uses a parameter that belongs to none of its modules")


class Comparison:
    """Runs of a program and of its recording, which must give the same. As a context, it puts the modules back at its end.

    Args:
        program: Runs the function on the modules as they are: (tensors, values) -> (outputs, gradients).
        function: What it runs, for the values that it refers to.
        modules: The modules whose parameters and buffers the program uses.
        tensors: The program's arguments.
        state: The parameters and buffers by name.
        devices: The GPUs that random numbers are drawn on.
    """

    def __init__(
        self,
        program: Callable[..., tuple[list[Tensor], list[Tensor | None]]],
        function: Callable,
        modules: nn.ModuleList,
        tensors: list[Tensor],
        state: Mapping[str, Tensor],
        devices: list[torch.device],
    ):
        self.program, self.function, self.modules, self.devices = program, function, modules, devices
        self.names = list(state)
        self.given = _Place(tensors, [value.clone() for value in state.values()], noise=1)

    def __enter__(self) -> "Comparison":
        self.kept = Kept(self.modules)
        return self

    def __exit__(self, *_: object) -> None:
        self.kept.put_back()

    def check_program(self) -> None:
        """Raise ValueError if the program is no function of its arguments, parameters, buffers and torch's random numbers."""
        self.expected, before = self._run_program(self.given), self.kept.attributes()
        reached = Reached([self.function, *self.modules], [*self.modules.parameters(), *self.modules.buffers()])
        again, after = self._run_program(self.given), self.kept.attributes()
        for name in sorted(before.keys() | after.keys()):
            if not _same_value(before.get(name), after.get(name)):
                raise ValueError(
                    f"every run changes the attribute '{name}' of a module, which a recording cannot: keep it in a buffer "
                    f"(register_buffer) and change that in place"
                )
        if any(map(_differ, again, self.expected)):
            raise ValueError(
                "run twice with the same data, parameters and torch seed, the program gives different numbers: it draws from "
                "a generator that is not torch's, or changes something that it reads later (a counter, an attribute, a global)"
            )
        if (changed := reached.changed()) is not None:
            reached.put_back()
            raise ValueError(
                f"every run changes what the program holds beside parameters and buffers ({changed}), which a recording cannot: "
                f"keep numbers in a buffer (register_buffer) and change that in place; draw from torch's generator"
            )

    def check_recording(self, graph: Callable) -> None:
        """Raise ValueError if the recording gives other numbers, gradients or buffers than the program, here or elsewhere.

        A program may read anything from its data: a mean does not see their order, a largest value not their number. So it is
        run with all rows alike, too, and with every number changed and moved. One of the two may be no data for the program.
        """
        self._check_same(self._run_recording(graph, self.given), self.expected)
        failed: list[Exception] = []
        for change in (_repeated, _changed):
            state = self.given.state if change is _repeated else [*map(_shrunk, self.given.state)]
            place = _Place([*map(change, self.given.tensors)], state, noise=2)
            try:
                expected = self._run_program(place)
            except Exception as error:
                failed.append(error)
                continue
            self._check_same(self._run_recording(graph, place), expected)
            self.elsewhere = place
        if len(failed) == 2:
            raise failed[0]

    def check_compiled(self, graph: Callable, compiled: Callable) -> None:
        """Raise ValueError if compiled code misses the recording by more than rounding and by a tenth of what noise changes."""
        found, expected = (self._run_recording(program, self.elsewhere) for program in (compiled, graph))
        other = self._run_recording(graph, self.elsewhere._replace(noise=3))
        # A gradient may be zero because large numbers cancel, and those round differently.
        largest = max((_size(gradient) for gradient in expected.gradients), default=0.0)
        for part, least in (("outputs", 1.0), ("gradients", largest), ("state", 1.0)):
            for left, right, noisy in zip(*(getattr(run, part) for run in (found, expected, other)), strict=True):
                eps = torch.finfo(right.dtype).eps if right.is_floating_point() else 0.0
                miss = _distance(left, right)
                if miss > eps**0.5 * max(_size(right), least) and miss > 0.1 * _distance(noisy, right):
                    raise ValueError("compiled, the recording gives other numbers than the program")

    def _check_same(self, found: _Run, expected: _Run) -> None:
        if _differ(found.outputs, expected.outputs) or _differ(found.gradients, expected.gradients):
            raise ValueError(
                "the recording gives other numbers than the program: some of its values go through numpy or Python, and were "
                "frozen"
            )
        for name, left, right in zip(self.names, found.state, expected.state, strict=True):
            if _differ([left], [right]):
                raise ValueError(
                    f"the program changes '{name}', and the recording does not: change it in place "
                    f"(self.{name.rpartition('.')[2]}.copy_(...)) where another tensor is assigned to it"
                )

    def _run_program(self, place: _Place) -> _Run:
        """A run on the modules themselves, which also shows what is assigned to an attribute."""
        named = dict(self.modules.named_parameters()) | dict(self.modules.named_buffers())
        try:
            if place.state is not self.given.state:
                for name, value in zip(self.names, place.state, strict=True):
                    named[name].copy_(value)
            with self.noise(place.noise):
                outputs, gradients = self.program(place.tensors, [])
            after = dict(self.modules.named_parameters()) | dict(self.modules.named_buffers())
            # Copies: an output may be a buffer.
            return _Run(
                [output.clone() for output in outputs],
                [gradient for gradient in gradients if gradient is not None],
                [after[name].detach().clone() for name in self.names],
            )
        finally:
            self.kept.put_back_state()

    def _run_recording(self, program: Callable, place: _Place) -> _Run:
        state = [value.clone() for value in place.state]
        with self.noise(place.noise):
            results = program(list(place.tensors), state)
        num_outputs = len(self.expected.outputs)
        return _Run(list(results[:num_outputs]), list(results[num_outputs:]), state)

    @contextmanager
    def noise(self, number: int) -> Iterator[None]:
        """The same random numbers for every run with this number; none of them are used up."""
        with torch.random.fork_rng(self.devices):
            for device in (torch.device("cpu"), *self.devices):
                torch.rand(1000 * number, device=device)
            yield


def turned(tensor: Tensor) -> Tensor:
    """Other values of the same kind: numbers in the opposite order, rows of whole numbers (they may be indices).

    They lie in memory as the tensor does, since a compiled recording does not look how.
    """
    return _like(tensor, _flipped)


def _changed(tensor: Tensor) -> Tensor:
    """In the opposite order and, if they are no whole numbers, with other values."""
    return _like(turned(tensor), _smaller)


def _shrunk(tensor: Tensor) -> Tensor:
    return _like(tensor, _smaller)


def _repeated(tensor: Tensor) -> Tensor:
    """The last row in every row. Whole numbers that are all the same become others, and a mask loses elements."""

    def change(values: Tensor) -> Tensor:
        if values.dtype == torch.bool:
            every_other = torch.arange(values.numel(), device=values.device).reshape(values.shape) % 2 == 0
            return values & every_other if values.any() else every_other
        if not values.is_floating_point() and values.numel() and (values == values.flatten()[0]).all():
            # They may be indices, and one out of range ends the process on a GPU, where it is an error on a CPU.
            return torch.where(values == 0, 0 if values.is_cuda else 1, 0)
        return values[-1:].expand(values.shape) if values.ndim else values

    return _like(tensor, change)


def _flipped(values: Tensor) -> Tensor:
    return values.flip(tuple(range(values.ndim if values.is_floating_point() else min(values.ndim, 1))))


def _smaller(values: Tensor) -> Tensor:
    """By a tenth; what is in [0, 1] or positive stays so, and an index kept as a floating-point number does not grow."""
    return values * 0.9 + 0.01 if values.is_floating_point() else values


def _like(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor with other values that lies in memory as this one does."""
    base = tensor[tuple(slice(0, 1 if stride == 0 else None) for stride in tensor.stride())]
    other = torch.empty_strided(base.shape, base.stride(), dtype=base.dtype, device=base.device)
    return other.copy_(change(base)).as_strided(tensor.shape, tensor.stride())


def _same_value(first: object, second: object) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return not _differ([first], [second])
    return type(first) is type(second) and (first == second or first != first)


def _differ(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors differ by more than rounding."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return True
    for left, right in zip(found, expected, strict=True):
        same = (left == right) | (left.isnan() & right.isnan())
        if same.all():
            continue
        if not right.is_floating_point():
            return True
        miss = torch.where(same, 0.0, left.double() - right.double()).abs().max()
        rounding = _CPU_ROUNDING if right.device.type == "cpu" else _GPU_ROUNDING
        if not miss <= rounding * torch.finfo(right.dtype).eps * _size(right):
            return True
    return False


def _size(tensor: Tensor) -> float:
    """The largest absolute value of those that are finite."""
    return tensor.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if tensor.numel() else 0.0


def _distance(left: Tensor, right: Tensor) -> float:
    """The root of the mean squared difference."""
    left, right = left.double(), right.double()
    same = (left == right) | (left.isnan() & right.isnan())
    return torch.where(same, 0.0, left - right).nan_to_num().square().mean().sqrt().item() if left.numel() else 0.0
