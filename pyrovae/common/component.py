"""Modules that remember their constructor arguments, so that a checkpoint can rebuild them."""

from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Component", "Made", "Unknown"]


class Made(NamedTuple):
    """The constructor arguments of a component.

    Plain values, tensors, components and classes are kept, also inside tuples and lists; anything else becomes
    `Unknown`.

    Attributes:
        arguments: Positional arguments.
        options: Keyword arguments.
    """

    arguments: tuple
    options: dict[str, Any]


class Unknown(NamedTuple):
    """Placeholder for an argument that a file cannot hold, such as a function or a module that is not a component.

    Attributes:
        kind: Name of the argument's class.
    """

    kind: str


class Component(nn.Module):
    """A module that remembers the arguments of its constructor.

    Attributes:
        made_with: The arguments as they were passed. Later changes to the component do not show here.
    """

    made_with: Made

    def __new__(cls, *arguments: Any, **options: Any) -> "Component":
        part = super().__new__(cls)
        made = Made(_kept(arguments), {name: _kept(value) for name, value in options.items()})
        part.__dict__["made_with"] = made  # nn.Module.__setattr__ works only after nn.Module.__init__
        return part

    def extra_repr(self) -> str:
        """The number of trainable parameters, including those shared with other components."""
        parameters = list(self.parameters())
        count = sum(parameter.numel() for parameter in parameters if not is_lazy(parameter))
        unknown = ", more after the first call" if any(is_lazy(parameter) for parameter in parameters) else ""
        return f"{count:,} parameters{unknown}"


def _kept(value: Any) -> Any:
    if isinstance(value, tuple | list):
        kept = [_kept(item) for item in value]
        return kept if isinstance(value, list) else tuple(kept)
    if isinstance(value, Real) and not isinstance(value, bool):  # a checkpoint holds Python's numbers, not NumPy's
        return int(value) if isinstance(value, Integral) else float(value)
    if value is None or isinstance(value, bool | str | Tensor | Component | type):
        return value
    return Unknown(type(value).__name__)
