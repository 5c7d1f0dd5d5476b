"""Checks that a recording gives what its program gives: the same values, gradients and buffers under the same noise.

A recording by `make_fx` calls the program's own operations in the program's order. With the same random numbers it must
give the same outputs, gradients and buffers for any data and parameters; a difference means that a value became a
constant, or that a change of a module was lost. Three comparisons, each of outputs, gradients and buffers:

    program against itself      the program depends on data, parameters, buffers and torch's generator alone
    recording against program   each tensor within 16 eps of its largest number on a CPU, where the same operations
                                give the same bits; within 1024 eps on a GPU, where some add in no fixed order
    compiled against recording  root mean square within sqrt(eps) of the largest number (of a gradient: of the largest
                                gradient; of a buffer: within half of its change, too), or within a tenth of what
                                other noise changes: rounding can change a draw (rand() < p)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyrovae.compiled.hidden_state import HiddenState
from pyrovae.compiled.signature import Snapshot

__all__ = ["Inputs", "Results", "Run", "SelfCheck", "difference", "reversed_values"]

Results = tuple[list[Tensor], list[Tensor | None]]  # outputs, gradients

_CPU_ROUNDING, _GPU_ROUNDING = 16.0, 1024.0  # in units of eps times the largest number


class Inputs(NamedTuple):
    """The inputs of a run: arguments, values of parameters and buffers, and the number of its random stream."""

    tensors: list[Tensor]
    state: list[Tensor]
    noise: int


class Run(NamedTuple):
    """The results of a run: outputs, gradients, and the parameters and buffers after it."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]
    state: list[Tensor]


def _pairs(found: Run, expected: Run) -> Iterator[tuple[str, int, Tensor | None, Tensor | None]]:
    """(part, position in it, found, expected) of all outputs, gradients, parameters and buffers."""
    for part in Run._fields:
        for position, pair in enumerate(zip(getattr(found, part), getattr(expected, part), strict=True)):
            yield part, position, *pair


def difference(found: Run, expected: Run) -> tuple[str, int] | None:
    """The first (part, position) at which two runs differ by more than rounding; None if there is none."""
    pairs = _pairs(found, expected)
    return next(((part, position) for part, position, left, right in pairs if _differ(left, right)), None)


@dataclass(frozen=True)
class SelfCheck:
    """Compares runs of a program with runs of its recording.

    Args:
        program: Runs the function on the modules as they are: (tensors, values) -> (outputs, gradients).
        modules: The modules whose parameters and buffers the program uses.
        names: Of those parameters and buffers, in the order of `Inputs.state`.
        before: The modules before the first run: every run ends with their state restored.
        devices: The GPUs on which the program may draw random numbers.
    """

    program: Callable[..., Results]
    modules: nn.ModuleList
    names: list[str]
    before: Snapshot
    devices: list[torch.device]

    def check_program(self, function: Callable, given: Inputs) -> Run:
        """Return the program's results for what the modules hold now.

        Raises:
            ValueError: If they depend on more than arguments, parameters, buffers and torch's generator.
        """
        expected, attributes = self._run_program(given), self.before.attributes()
        hidden = HiddenState([function, *self.modules], [*self.modules.parameters(), *self.modules.buffers()])
        again, after = self._run_program(given), self.before.attributes()
        for name in sorted(attributes.keys() | after.keys()):
            if not _same_value(attributes.get(name), after.get(name)):
                raise ValueError(
                    f"every run changes the attribute '{name}' of a module, and a recording cannot do that: keep it in "
                    f"a buffer (register_buffer) and change the buffer in place"
                )
        if difference(again, expected) is not None:
            raise ValueError(
                "run twice with the same data, parameters and torch seed, the program gives different numbers: it "
                "draws from another generator than torch's, or changes something that it reads later (a counter, an "
                "attribute, a global)"
            )
        if (changed := hidden.changed()) is not None:
            hidden.put_back()
            raise ValueError(
                f"every run changes what the program holds beside parameters and buffers ({changed}), which a recording "
                f"cannot: keep numbers in a buffer (register_buffer) and change that in place; draw from torch's generator"
            )
        return expected

    def check_recording(self, graph: Callable, given: Inputs, expected: Run) -> Inputs:
        """Raise ValueError if the recording gives other outputs, gradients or buffers than the program.

        Compared on the data given and on two variants: all rows equal, and all values changed and reordered. Both are
        needed, because a constant mean does not depend on the order of the data, nor a constant maximum on their
        number. The program may reject one of the variants as invalid data.

        Returns:
            The last variant that the program accepts.
        """
        self._check_same(self._run_recording(graph, given), expected)
        accepted: list[Inputs] = []
        failed: list[Exception] = []
        for change in (_repeated, _changed):
            state = given.state if change is _repeated else [*map(_shrunk, given.state)]
            variant = Inputs([*map(change, given.tensors)], state, noise=2)
            try:
                expected = self._run_program(variant)
            except Exception as error:
                failed.append(error)
                continue
            self._check_same(self._run_recording(graph, variant), expected)
            accepted.append(variant)
        if not accepted:
            raise failed[0]
        return accepted[-1]

    def check_compiled(self, inputs: Inputs, graph: Callable, compiled: Callable) -> None:
        """Raise ValueError if compiled code gives other outputs, gradients or buffers than the recording."""
        found, expected = (self._run_recording(program, inputs) for program in (compiled, graph))
        other = self._run_recording(graph, inputs._replace(noise=3))
        # Compare with the largest gradient: a gradient may be zero because large terms cancel, which round differently.
        largest = max((_size(gradient) for gradient in expected.gradients if gradient is not None), default=0.0)
        least = {"outputs": 1.0, "gradients": largest, "state": 1.0}
        noisy = (value for _, _, value, _ in _pairs(other, expected))
        for (part, position, left, right), elsewhere in zip(_pairs(found, expected), noisy, strict=True):
            if left is None or right is None or elsewhere is None:
                wrong = left is not right
            else:
                eps = torch.finfo(right.dtype).eps if right.is_floating_point() else 0.0
                scale = max(_size(right), least[part])
                allowed = eps**0.5 * scale
                if part == "state":  # a small change (of a slow running mean) must not get lost in this
                    change = _distance(inputs.state[position], right)
                    allowed = min(allowed, max(change / 2, 32 * eps * scale))
                allowed = max(allowed, 0.1 * _distance(elsewhere, right))
                wrong = _distance(left, right) > allowed or bool((left.isnan() & right.isfinite()).any())
            if wrong:
                raise ValueError(
                    f"compiled, the recording gives other numbers than the program ({self._name(part, position)})"
                )

    def _check_same(self, found: Run, expected: Run) -> None:
        if (place := difference(found, expected)) is None:
            return
        part, position = place
        name = self._name(part, position)
        if part == "state":
            raise ValueError(
                f"the program changes {name}, and the recording does not: change it in place "
                f"(self.{self.names[position].rpartition('.')[2]}.copy_(...)) instead of assigning another tensor to it"
            )
        raise ValueError(
            f"the recording gives other numbers than the program ({name}): some values pass through NumPy or Python "
            f"and became constants"
        )

    def _name(self, part: str, position: int) -> str:
        if part == "outputs":
            return f"output {position}"
        if part == "state":
            return f"'{self.names[position]}'"
        trained = [name for name, parameter in self.modules.named_parameters() if parameter.requires_grad]
        return f"gradient of '{trained[position]}'"

    def _run_program(self, inputs: Inputs) -> Run:
        """Run the program on the modules themselves, so that assignments to attributes are seen too."""
        named = dict(self.modules.named_parameters()) | dict(self.modules.named_buffers())
        try:
            for name, value in zip(self.names, inputs.state, strict=True):
                if value.layout != torch.strided or not torch.equal(named[name], value):
                    named[name].copy_(value)
            with self.noise(inputs.noise):
                outputs, gradients = self.program(inputs.tensors, [])
            after = dict(self.modules.named_parameters()) | dict(self.modules.named_buffers())
            # Clone, because an output may be a buffer.
            return Run(
                [output.clone() for output in outputs],
                gradients,
                [after[name].detach().clone() for name in self.names],
            )
        finally:
            self.before.put_back_state()

    def _run_recording(self, program: Callable, inputs: Inputs) -> Run:
        state = [value.clone() for value in inputs.state]
        with self.noise(inputs.noise):
            outputs, gradients = program(list(inputs.tensors), state)
        return Run(outputs, gradients, state)

    @contextmanager
    def noise(self, number: int) -> Iterator[None]:
        """Draw the same random numbers in every run with this number, and restore the generators afterwards."""
        with torch.random.fork_rng(self.devices):
            for device in (torch.device("cpu"), *self.devices):
                torch.rand(1000 * number, device=device)
            yield


def reversed_values(tensor: Tensor) -> Tensor:
    """Return the values in reversed order; integers, which may be indices, are reversed by rows only.

    The memory layout stays the same, because a compiled recording relies on it.
    """
    return _like(tensor, _flipped)


def _changed(tensor: Tensor) -> Tensor:
    """Reverse the order and, for floating point, change the values."""
    return _like(reversed_values(tensor), _smaller)


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
        return not _differ(first, second)
    return type(first) is type(second) and (first == second or first != first)


def _differ(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether tensors differ by more than rounding, or one of them is missing."""
    if left is None or right is None:
        return left is not right
    if left.shape != right.shape:
        return True
    same = (left == right) | (left.isnan() & right.isnan())
    if same.all():
        return False
    if not right.is_floating_point():
        return True
    miss = torch.where(same, 0.0, left.double() - right.double()).abs().max()
    rounding = _CPU_ROUNDING if right.device.type == "cpu" else _GPU_ROUNDING
    return not miss <= rounding * torch.finfo(right.dtype).eps * _size(right)


def _size(tensor: Tensor) -> float:
    """The largest absolute value of the finite elements."""
    return tensor.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if tensor.numel() else 0.0


def _distance(left: Tensor, right: Tensor) -> float:
    """The root of the mean squared difference."""
    left, right = left.double(), right.double()
    same = (left == right) | (left.isnan() & right.isnan())
    return torch.where(same, 0.0, left - right).nan_to_num().square().mean().sqrt().item() if left.numel() else 0.0
