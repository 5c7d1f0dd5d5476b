"""Checks that a recording gives what its program gives: no frozen values, no lost module updates, no miscompilation.

A recording by `make_fx` calls the program's own operations in the program's order. With the same random numbers it must
give the same outputs, gradients and buffers for any data and parameters; a difference beyond rounding means that a
value was frozen. Compiled code rounds differently, which can change a draw (rand() < p), so a larger difference is
allowed there.
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

# In units of eps times the largest number. On a CPU the same operations give the same numbers; on a GPU some operations
# add in no fixed order.
_CPU_ROUNDING, _GPU_ROUNDING = 16.0, 1024.0


class refuse_reading(TorchFunctionMode):
    """Context that raises ValueError if Python or NumPy reads values of traced tensors, which would freeze them.

    Comparing outputs does not find every such read: a count or a rank may be equal at the few inputs compared.
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
                    f"values of data, parameters or draws are read by Python or NumPy (Tensor.{func.__name__}) and "
                    f"were frozen in the recording"
                )
        return func(*args, **(kwargs or {}))


class _Place(NamedTuple):
    """The inputs of a run: arguments, values of parameters and buffers, and the number of its random stream."""

    tensors: list[Tensor]
    state: list[Tensor]
    noise: int


class _Run(NamedTuple):
    """The results of a run: outputs, gradients, and the parameters and buffers after it."""

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
    """Raise ValueError for a parameter of no module (pyro.param in a function): it would get no gradient."""
    for node in graph.graph.nodes:
        if node.op == "get_attr" and getattr(getattr(graph, node.target, None), "requires_grad", False):
            raise ValueError("the program uses a parameter that belongs to none of its modules")


class Comparison:
    """Compares runs of a program with runs of its recording. A context manager: restores the modules on exit.

    Args:
        program: Runs the function on the modules as they are: (tensors, values) -> (outputs, gradients).
        function: What it runs, for the values that it refers to.
        modules: The modules whose parameters and buffers the program uses.
        tensors: The program's arguments.
        state: The parameters and buffers by name.
        devices: The GPUs on which the program may draw random numbers.
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
        """Raise ValueError if the results depend on more than arguments, parameters, buffers and torch's generator."""
        self.expected, before = self._run_program(self.given), self.kept.attributes()
        reached = Reached([self.function, *self.modules], [*self.modules.parameters(), *self.modules.buffers()])
        again, after = self._run_program(self.given), self.kept.attributes()
        for name in sorted(before.keys() | after.keys()):
            if not _same_value(before.get(name), after.get(name)):
                raise ValueError(
                    f"every run changes the attribute '{name}' of a module, and a recording cannot do that: keep it in "
                    f"a buffer (register_buffer) and change the buffer in place"
                )
        if any(map(_differ, again, self.expected)):
            raise ValueError(
                "run twice with the same data, parameters and torch seed, the program gives different numbers: it "
                "draws from another generator than torch's, or changes something that it reads later (a counter, an "
                "attribute, a global)"
            )
        if (changed := reached.changed()) is not None:
            reached.put_back()
            raise ValueError(
                f"every run changes what the program holds beside parameters and buffers ({changed}), which a recording cannot: "
                f"keep numbers in a buffer (register_buffer) and change that in place; draw from torch's generator"
            )

    def check_recording(self, graph: Callable) -> None:
        """Raise ValueError if the recording gives other outputs, gradients or buffers than the program.

        Compared on the data given and on two variants: all rows equal, and all values changed and reordered. Both are
        needed, because a frozen mean does not depend on the order of the data, nor a frozen maximum on their number.
        The program may reject one of the variants as invalid data.
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
        """Raise ValueError if compiled code differs from the recording by more than rounding and 0.1 of the noise."""
        found, expected = (self._run_recording(program, self.elsewhere) for program in (compiled, graph))
        other = self._run_recording(graph, self.elsewhere._replace(noise=3))
        # Compare with the largest gradient: a gradient may be zero because large terms cancel, which round differently.
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
                "the recording gives other numbers than the program: some values pass through NumPy or Python and were "
                "frozen"
            )
        for name, left, right in zip(self.names, found.state, expected.state, strict=True):
            if _differ([left], [right]):
                raise ValueError(
                    f"the program changes '{name}', and the recording does not: change it in place "
                    f"(self.{name.rpartition('.')[2]}.copy_(...)) instead of assigning another tensor to it"
                )

    def _run_program(self, place: _Place) -> _Run:
        """Run the program on the modules themselves, so that assignments to attributes are seen too."""
        named = dict(self.modules.named_parameters()) | dict(self.modules.named_buffers())
        try:
            if place.state is not self.given.state:
                for name, value in zip(self.names, place.state, strict=True):
                    named[name].copy_(value)
            with self.noise(place.noise):
                outputs, gradients = self.program(place.tensors, [])
            after = dict(self.modules.named_parameters()) | dict(self.modules.named_buffers())
            # Clone, because an output may be a buffer.
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
        """Draw the same random numbers in every run with this number, and restore the generators afterwards."""
        with torch.random.fork_rng(self.devices):
            for device in (torch.device("cpu"), *self.devices):
                torch.rand(1000 * number, device=device)
            yield


def turned(tensor: Tensor) -> Tensor:
    """Return the values in reversed order; integers, which may be indices, are reversed by rows only.

    The memory layout stays the same, because a compiled recording relies on it.
    """
    return _like(tensor, _flipped)


def _changed(tensor: Tensor) -> Tensor:
    """Reverse the order and, for floating point, change the values."""
    return _like(turned(tensor), _smaller)


def _shrunk(tensor: Tensor) -> Tensor:
    return _like(tensor, _smaller)


def _repeated(tensor: Tensor) -> Tensor:
    """Repeat the last row in every row; change integers that are all equal, and drop elements of a mask."""

    def change(values: Tensor) -> Tensor:
        if values.dtype == torch.bool:
            every_other = torch.arange(values.numel(), device=values.device).reshape(values.shape) % 2 == 0
            return values & every_other if values.any() else every_other
        if not values.is_floating_point() and values.numel() and (values == values.flatten()[0]).all():
            # They may be indices: out of range is an error on a CPU, but kills the process on a GPU.
            return torch.where(values == 0, 0 if values.is_cuda else 1, 0)
        return values[-1:].expand(values.shape) if values.ndim else values

    return _like(tensor, change)


def _flipped(values: Tensor) -> Tensor:
    return values.flip(tuple(range(values.ndim if values.is_floating_point() else min(values.ndim, 1))))


def _smaller(values: Tensor) -> Tensor:
    """Shrink by a tenth: values in [0, 1] and positive values stay so, and an index stored as a float does not grow."""
    return values * 0.9 + 0.01 if values.is_floating_point() else values


def _like(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a tensor with other values and the same memory layout."""
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
    """The largest absolute value of the finite elements."""
    return tensor.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if tensor.numel() else 0.0


def _distance(left: Tensor, right: Tensor) -> float:
    """The root of the mean squared difference."""
    left, right = left.double(), right.double()
    same = (left == right) | (left.isnan() & right.isnan())
    return torch.where(same, 0.0, left - right).nan_to_num().square().mean().sqrt().item() if left.numel() else 0.0
