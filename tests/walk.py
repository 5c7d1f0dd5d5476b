"""How far the data walk through the library before the user's model sees them: python tests/walk.py

Counts the functions of pyrovae that are given the data, from the call of a public function to the first call of the
model, and how often control comes back to a folder that it had left. Both are small in code that reads from top to bottom, and
`test_walk.py` holds them to `BOUNDS`. A function is given the data if one of its arguments is the data (or rows of them),
or holds them: in a tuple, list or dict, a closure, or an attribute of one of pyrovae's objects.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyrovae as pv

ROOT = Path(pv.__file__).parent
_DEEPEST = 5  # containers inside one another that are searched for the data
_TAKES_VARARGS, _TAKES_KEYWORDS = 4, 8  # flags of a code object


class Followed(Tensor):
    """Data whose rows, copies and reshapes are of this class too, as torch gives results the class of their input."""


class Walk(NamedTuple):
    """The calls that were given the data, in order, as (file, function); and where control was, call by call.

    A call of a function by itself, as in the search of a nested list, counts as one with the call before it.
    """

    calls: list[tuple[str, str]]
    control: list[tuple[str, str]]

    @property
    def places(self) -> list[tuple[str, str]]:
        """The functions, each once."""
        return list(dict.fromkeys(self.calls))

    @property
    def returns(self) -> int:
        """How often control comes back to a folder that it had left."""
        rooms = [Path(file).parent for file, _ in self.control]
        moves = [here for before, here in zip([None, *rooms], rooms, strict=False) if here != before]
        return len(moves) - len(set(moves))

    def __str__(self) -> str:
        lines = [f"  {file}: {function}" for file, function in self.calls]
        count = (
            f"{len(self.places)} functions in {len(self.calls)} calls, {self.returns} returns to a folder left before"
        )
        return "\n".join([*lines, count])


class Model(nn.Module):
    """z ~ N(0, 1), x | z ~ N(w z, 1), as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> None:
        pyro.module("model", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.weight * z, 1.0), obs=x)


class Guide(nn.Module):
    """q(z|x) = N(w x, 1/2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.5))

    def forward(self, x: Tensor) -> None:
        pyro.module("guide", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.weight * x, 0.7))


def walk(call: Callable[[nn.Module, nn.Module, Tensor], Any]) -> Walk:
    """Follow the data through call(model, guide, x), up to the first call of the model."""
    calls: list[tuple[str, str]] = []
    control: list[tuple[str, str]] = []
    stack: list[tuple[FrameType, tuple[str, str] | None]] = []  # frames of pyrovae; None for those without the data

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if code is Model.forward.__code__:
            sys.setprofile(None)
        if event not in ("call", "return") or ROOT not in Path(code.co_filename).parents:
            return
        if event == "return":
            if stack and stack[-1][0] is frame:
                stack.pop()
        else:
            here = _place(frame)
            if here is not None and here != next((place for _, place in reversed(stack) if place), None):
                calls.append(here)
            stack.append((frame, here))
        held = [place for _, place in stack if place is not None]
        control.extend(held[-1:])

    torch.manual_seed(0)
    pyro.clear_param_store()
    x = torch.linspace(-2, 2, 60).as_subclass(Followed)
    model, guide = Model(), Guide()
    sys.setprofile(note)
    try:
        call(model, guide, x)
    finally:
        sys.setprofile(None)
        pyro.clear_param_store()
    return Walk(calls, control)


def _place(frame: FrameType) -> tuple[str, str] | None:
    """(file, function) of a frame that was given the data; None for other frames, and those of comprehensions."""
    code = frame.f_code
    flags = bool(code.co_flags & _TAKES_VARARGS) + bool(code.co_flags & _TAKES_KEYWORDS)
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + flags]
    given = [frame.f_locals[name] for name in (*arguments, *code.co_freevars) if name in frame.f_locals]
    if code.co_name.startswith("<") or not any(_holds(value, _DEEPEST) for value in given):
        return None
    return str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname


def _holds(value: Any, depth: int) -> bool:
    if isinstance(value, Followed):
        return True
    if depth == 0 or isinstance(value, nn.Module | Tensor):
        return False
    if isinstance(value, dict):
        return any(_holds(held, depth - 1) for held in value.values())
    if isinstance(value, tuple | list):
        return any(_holds(held, depth - 1) for held in value)
    if type(value).__module__.startswith("pyrovae."):
        return any(_holds(held, depth - 1) for held in getattr(value, "__dict__", {}).values())
    return False


WALKS: dict[str, Callable[[nn.Module, nn.Module, Tensor], Any]] = {
    "log_marginal_likelihood": lambda model, guide, x: pv.log_marginal_likelihood(model, guide, x, num_particles=5),
    "annealed_importance_sampling": lambda model, guide, x: pv.annealed_importance_sampling(
        model, x, num_chains=2, num_temperatures=2, num_leapfrog_steps=1
    ),
    "fit": lambda model, guide, x: pv.fit(model, guide, x, epochs=1, device="cpu", progress=False),
}

# The largest allowed numbers of functions, and of returns to a folder that was left before.
BOUNDS = {"log_marginal_likelihood": (10, 4), "annealed_importance_sampling": (11, 6)}

if __name__ == "__main__":
    for name, call in WALKS.items():
        print(f"{name}\n{walk(call)}\n")
