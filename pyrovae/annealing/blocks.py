"""Blocks of data for annealing, each with its potential and its tuned kernels."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from pyrovae.annealing.chains import Kernels, num_pilot_kernels, tune
from pyrovae.annealing.potential import Potential, block_potential, prior_of
from pyrovae.common.random_numbers import seeded
from pyrovae.common.reporting import progress_bar, warn_once
from pyrovae.compiled.policy import pays_off
from pyrovae.compiled.record import Recording
from pyrovae.evaluation.opening import Options, Prepare
from pyrovae.programs.pair import Pair
from pyrovae.programs.reach import modules_behind
from pyrovae.programs.traces import Program

__all__ = ["FEWEST_PILOT_CHAINS", "AnnealingOptions", "TunedBlock", "tuned_blocks", "with_prior"]

FEWEST_PILOT_CHAINS = 4


@dataclass(frozen=True, kw_only=True)
class AnnealingOptions(Options):
    """Options of the chains; see `annealed_importance_sampling`."""

    num_chains: int
    num_temperatures: int
    num_leapfrog_steps: int
    schedule: Literal["adaptive", "sigmoidal"] = "adaptive"

    counts: ClassVar[tuple[str, ...]] = ("num_chains", "num_temperatures", "num_leapfrog_steps")

    @classmethod
    def of(cls, arguments: Mapping[str, Any], **others: Any) -> Self:
        """Take the options from a public function's arguments, `locals()`, and from `others` in place of these."""
        given = {field.name: arguments[field.name] for field in fields(cls) if field.name in arguments}
        return cls(**{**given, **others})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in ("adaptive", "sigmoidal"):
            raise ValueError(f"schedule must be 'adaptive' or 'sigmoidal', found {self.schedule!r}")


def with_prior(model: Program, guide: Program | None = None) -> Prepare:
    """Return what `opened` asks for: the chains start from the model's prior if there is no guide."""
    return lambda args, kwargs: (model, guide or prior_of(model), args, kwargs)


class TunedBlock(NamedTuple):
    """A range of data with what its chains need; call `tick` after each kernel.

    The first `num_repeated` data belong to the block before, too: leave out their results by `own`.
    """

    start: int
    stop: int
    num_repeated: int
    potential: Potential
    kernels: Kernels
    tick: Callable[[], object]

    def own(self, results: Tensor) -> Tensor:
        """The results (..., data) of the data that belong to this block alone."""
        return results[..., self.num_repeated :]


def tuned_blocks(pair: Pair, options: AnnealingOptions, from_prior: bool, passes: int) -> Iterator[TunedBlock]:
    """Yield the blocks of a pair's data, in order; the caller goes through each one `passes` times.

    Chains run together under an outer plate. If the program does not support such a plate, they run one by one, with a
    warning.
    """
    num_chains, num_temperatures = options.num_chains, options.num_temperatures
    size = pair.num_data
    most = options.data_batch_size
    reason = pair.reason_to_loop(most if isinstance(most, int) else size)
    if reason:
        warn_once(
            pair.model,
            f"chains are run one by one, which is slow: under an outer plate the program fails ({reason}); networks "
            f"must keep leading dimensions, for instance (no view(-1, D), no fixed dim=1)",
        )
    if pair.split_size is not None and most is not None:
        together = 1 if reason else num_chains
        most = max(2, pair.rows // together) if most == "auto" else most
        size = math.ceil(size / math.ceil(size / most))  # blocks of nearly one size
    blocks = list(pair.blocks(size))
    modules = modules_behind(pair.model, pair.guide)
    if options.compile == "auto":
        num_gradients, rows = num_temperatures * options.num_leapfrog_steps, pair.num_data * num_chains
        record, inductor = (
            pays_off(num_gradients, rows, repeated=[pair.model], once=[pair.guide], inductor=inductor)
            for inductor in (False, True)
        )
    else:
        record = inductor = options.compile
    recorded: dict[tuple[int, int], Recording | None] = {}

    def potential_of(start: int, stop: int, num_chains: int) -> Potential:
        potential = block_potential(pair, start, stop, num_chains, from_prior=from_prior, vectorised=not reason)
        sizes = (stop - start, num_chains)
        if not record or reason or stop - start != size:
            return potential
        if sizes not in recorded:
            recorded[sizes] = potential.record(modules, inductor=inductor).recorded
        return replace(potential, recorded=recorded[sizes])

    total = len(blocks) * (num_pilot_kernels(num_temperatures) + passes * num_temperatures)
    with progress_bar("annealing", total, "kernels", options.progress) as bar:
        for start, stop in blocks:
            # A shorter last block runs with data of the block before it, so that it has the recorded size.
            first = min(start, stop - size) if record and not reason else start
            potential = potential_of(first, stop, num_chains)
            pilot = potential
            if num_chains < FEWEST_PILOT_CHAINS:
                pilot = potential_of(first, stop, FEWEST_PILOT_CHAINS)
            # Tune with separate random numbers, so that the kernels are independent of the chains whose weights count.
            seed = int(torch.randint(2**62, ()))
            with seeded(seed, potential.device):
                kernels = tune(
                    pilot,
                    num_temperatures,
                    options.num_leapfrog_steps,
                    adaptive=options.schedule == "adaptive",
                    tick=bar.update,
                )
            yield TunedBlock(first, stop, start - first, potential, kernels, bar.update)
