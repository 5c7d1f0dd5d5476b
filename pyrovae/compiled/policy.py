"""When `compile="auto"` records: training, evaluation, annealing and refinement all ask `pays_off`."""

import inspect
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyrovae.compiled.compiler import import_compiler
from pyrovae.programs.reach import modules_behind
from pyrovae.programs.traces import Program

__all__ = ["mark_compiled", "pays_off"]

# Seconds that compiled arithmetic saves per product on two cores, and the seconds that compiling must save. These are
# constants, not timings, so that the same call with the same cache takes the same path every time.
_SAVED_PER_PRODUCT, _COMPILING_COSTS = 1e-11, 15.0
_CACHED_COSTS = 1.5  # seconds, if Inductor finds what it compiled before
_KNOWN_PACKAGES = {"pyrovae", "torch", "zuko"}


def pays_off(
    num_runs: int,
    rows_per_run: int,
    repeated: Sequence[Program],
    once: Sequence[Program] = (),
    *,
    saved_per_run: float = 0.0,
    known: bool = True,
    inductor: bool = True,
    described: tuple = (),
) -> bool:
    """Whether recording a step or a draw saves more time than it costs, and records all that it uses.

        saved = num_runs * (saved_per_run + 1e-11 s * rows_per_run * number of parameters) > 15 s, or 1.5 s if cached

    Args:
        num_runs: How many times the recording will run.
        rows_per_run: Data times particles (or chains) of one run.
        repeated: The programs that run every time: their parameters count as work.
        once: Programs that are recorded, too, but do most of their work once (an encoder).
        saved_per_run: Seconds saved per run beside arithmetic (Pyro's handlers, constructors of distributions).
        known: Whether everything else that is recorded is known: the objective, the transform of the data.
        inductor: Whether the recording will be compiled. If not, it costs about as much as ten runs, so it pays off for
            any known parts.
        described: What the caller passes to `mark_compiled` after compiling; the same again costs 1.5 s, not 15.

    Returns:
        True if it pays off. False for third-party parts, because recording them may turn values into constants.
    """
    modules = modules_behind(*repeated, *once)
    if not (modules and known and _has_known_parts(*repeated, *once)):
        return False
    num_parameters = sum(parameter.numel() for module in modules_behind(*repeated) for parameter in module.parameters())
    saved = num_runs * (saved_per_run + _SAVED_PER_PRODUCT * rows_per_run * num_parameters)
    if saved > _COMPILING_COSTS or not inductor:
        return True
    # The mark is looked for only if it matters, because the first use of Inductor's cache imports the compiler.
    return bool(described) and saved > _CACHED_COSTS and _is_marked(described)


def mark_compiled(described: tuple) -> None:
    """Note in Inductor's cache that modules and sizes that print like these have been compiled."""
    with suppress(Exception):  # the mark only saves time, and a third-party module may fail to print
        _mark(described).touch()


def _is_marked(described: tuple) -> bool:
    try:
        return _mark(described).exists()
    except OSError:
        return False


def _mark(described: tuple) -> Path:
    import_compiler()
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    text = "\n".join(map(str, (torch.__version__, torch.get_num_threads(), *described)))
    return Path(cache_dir()) / f"pyrovae-{sha256(text.encode()).hexdigest()}"


def _has_known_parts(*programs: Any) -> bool:
    """Whether programs are modules of pyrovae, torch and zuko only."""
    parts = {type(part) for module in modules_behind(*programs) for part in module.modules()}
    return all(map(_is_known, programs)) and all(part.__module__.partition(".")[0] in _KNOWN_PACKAGES for part in parts)


def _is_known(program: Any) -> bool:
    if inspect.ismethod(program):
        return _is_known(program.__self__)
    # A function of this library wraps a program that is checked on its own (annealing's prior of a model).
    return isinstance(program, nn.Module) or getattr(program, "__module__", "").partition(".")[0] == "pyrovae"
