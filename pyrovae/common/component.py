"""Parts that remember what they were made with, so that a checkpoint can tell how to make them again."""

from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Component", "Made", "Unknown"]


class Made(NamedTuple):
    """What a part was made with: plain values, tensors, parts and classes, in tuples and lists; `Unknown` for the rest."""

    arguments: tuple
    options: dict[str, Any]


class Unknown(NamedTuple):
    """Stands for an argument that no file can hold: a function, a module that is no part."""

    kind: str


class Component(nn.Module):
    """A module that remembers the arguments of its constructor, in `made_with`.

    They are kept as they came: what is changed in a part afterwards does not show in them.
    """

    made_with: Made

    def __new__(cls, *arguments: Any, **options: Any) -> "Component":
        part = super().__new__(cls)
        made = Made(_kept(arguments), {name: _kept(value) for name, value in options.items()})
        part.__dict__["made_with"] = made  # torch's own way of setting attributes needs its constructor to have run
        return part

    def extra_repr(self) -> str:
        """How many numbers can be trained in it, those that it shares with other parts included."""
        parameters = list(self.parameters())
        count = sum(parameter.numel() for parameter in parameters if not is_lazy(parameter))
        unknown = ", more at the first call" if any(is_lazy(parameter) for parameter in parameters) else ""
        return f"{count:,} parameters{unknown}"


def _kept(value: Any) -> Any:
    if isinstance(value, tuple | list):
        kept = [_kept(item) for item in value]
        return kept if isinstance(value, list) else tuple(kept)
    if isinstance(value, Real) and not isinstance(value, bool):  # NumPy's numbers as Python's, which a file holds
        return int(value) if isinstance(value, Integral) else float(value)
    if value is None or isinstance(value, bool | str | Tensor | Component | type):
        return value
    return Unknown(type(value).__name__)
