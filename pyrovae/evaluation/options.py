"""What enters an evaluation: its options, checked in one frozen object, and the arguments of its programs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.utils.data import TensorDataset

from pyrovae.common.arguments import check_count, map_tensors
from pyrovae.data.forms import as_arguments, by_position, takes_items
from pyrovae.programs.parameters import check_arguments, numbers_of
from pyrovae.programs.reach import evaluation_mode

__all__ = ["Options", "SamplingOptions", "evaluation_of"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every evaluation; see `log_marginal_likelihood` for their meaning."""

    plate: str | None = None
    data_batch_size: int | Literal["auto"] | None = "auto"
    compile: bool | Literal["auto"] = "auto"
    progress: bool = False

    counts: ClassVar[tuple[str, ...]] = ()  # names of the options that are numbers of 1 or more

    def __post_init__(self) -> None:
        for name in self.counts:
            self._check_count(name)
        if self.data_batch_size not in ("auto", None):
            self._check_count("data_batch_size")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', found {self.compile!r}")

    def _check_count(self, name: str) -> None:
        object.__setattr__(self, name, check_count(name, getattr(self, name)))  # the dataclass is frozen


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """Options of importance sampling."""

    num_particles: int
    vectorize_particles: bool | Literal["auto"] = "auto"
    particle_batch_size: int | Literal["auto"] = "auto"

    counts: ClassVar[tuple[str, ...]] = ("num_particles",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.particle_batch_size != "auto":
            self._check_count("particle_batch_size")
        if self.vectorize_particles not in (True, False, "auto"):
            raise ValueError(f"vectorize_particles must be True, False or 'auto', found {self.vectorize_particles!r}")


@contextmanager
def evaluation_of(
    *programs: Any, args: tuple, kwargs: dict
) -> Iterator[tuple[torch.device | None, tuple, dict[str, Any]]]:
    """`evaluation_mode`, and the arguments of the programs moved to their device.

    Args:
        programs: Pyro programs.
        args: Their arguments, as the user passed them.
        kwargs: Their keyword arguments, likewise.

    Yields:
        The device, as `evaluation_mode` does, and the arguments to call the programs with.
    """
    with evaluation_mode(*programs) as device:
        args, kwargs = _arguments(programs, args, kwargs)
        if device is not None:
            args, kwargs = map_tensors(lambda tensor: tensor.to(device), (args, kwargs))
        yield device, args, kwargs


def _arguments(programs: tuple, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments to call the programs with: the items of a batch, and tensors in place of arrays and frames."""
    called = [program for program in programs if program is not None]
    check_arguments(called, args, kwargs)
    if len(args) == 1 and not kwargs and isinstance(args[0], tuple | list | Mapping | TensorDataset):
        items = args[0].tensors if isinstance(args[0], TensorDataset) else args[0]
        if takes_items(called, items):
            args, kwargs = ((), dict(items)) if isinstance(items, Mapping) else (tuple(items), {})
    return as_arguments(*by_position(args, kwargs), numbers_of(*called))
