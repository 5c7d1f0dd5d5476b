"""A model/guide pair as densities of unconstrained numbers, as gradients and Markov chains require.

The guide's draws, mapped to unconstrained numbers u (chains, data, D), have the density q(u), and each u has an
importance weight w(u). Then q(u) w(u)^beta leads from the guide (beta = 0) to the joint density p(x, z) (beta = 1),
whose normaliser is p(x). Any pair that `pyrovae.log_weights` accepts will do, including auxiliary draws of AutoNormal.
Without a guide, the prior takes its place, and log w is log p(x|z).
"""

from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyrovae.annealing.coordinates import (
    Coordinates,
    Placed,
    check_coordinates,
    random_sites,
    unconstrained,
)
from pyrovae.common.arguments import checks_values, map_tensors
from pyrovae.compiled.compiler import float32_products
from pyrovae.compiled.record import Recording, record
from pyrovae.programs.enumeration import SummedOut, holds_sums
from pyrovae.programs.log_densities import log_density_of, log_weights_of, site_log_prob, summed_sites
from pyrovae.programs.masks import unmasked
from pyrovae.programs.pair import Block, Pair, guide_given
from pyrovae.programs.simulation import ProperPriors
from pyrovae.programs.traces import Program, sample_sites, spread, under_particles

__all__ = ["Energy", "Potential", "block_potential", "prior_of"]


class Energy(NamedTuple):
    """log q(u) and log w(u), each (S, N), and the gradient of log q + beta log w, (S, N, D)."""

    log_start: Tensor
    log_weight: Tensor
    gradient: Tensor


def prior_of(model: Program) -> Program:
    """Return the model's latent draws alone, as a guide."""

    def prior(*args, **kwargs):
        observed = poutine.block(hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])
        with observed, ProperPriors():
            model(*args, **kwargs)

    return prior


@dataclass(frozen=True)
class Potential:
    """Densities of one block of data, under S chains at once; `block_potential` makes it.

    Attributes:
        pair: an inspected pair; its guide is `prior_of(model)` if `from_prior`
        block: range of its data
        num_chains: S
        from_prior: whether the start density is the prior
        plate_size: size of the outer plate of chains; None if they run one by one
        coordinates: of the latents
        recorded: recording of `energy`; None if there is none
    """

    pair: Pair
    block: Block
    num_chains: int
    from_prior: bool
    plate_size: int | None
    coordinates: Coordinates
    recorded: Recording | None = None

    @property
    def device(self) -> torch.device:
        return self.coordinates.u.device

    @torch.no_grad()
    def draw(self) -> Tensor:
        """Return draws u (S, N, D) from the guide."""
        runs = 1 if self.plate_size is not None else self.num_chains
        traces = (_draw(self.pair, self.block, self.from_prior, self.plate_size)[1] for _ in range(runs))
        return torch.cat([unconstrained(trace, self.block.layout, self.plate_size) for trace in traces])

    def log_densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return (log q(u), log w(u)), each (S, N); differentiable."""
        return self._log_densities(u, self.block)

    def energy(self, u: Tensor, beta: Tensor) -> Energy:
        """Return both densities and the gradient of log q(u) + beta log w(u), without a graph; beta () or (N,)."""
        if self.recorded is not None:
            energy = Energy(*self.recorded(u, beta, *_tensors_of(self.block))[0])
            if not checks_values() or (torch.maximum(energy.log_start, energy.log_weight) < torch.inf).all():
                return energy
        # If a recorded density is NaN or +inf, evaluate it eagerly: the error then names the site.
        with float32_products():
            return self._energy(u, beta, self.block)

    def record(self, modules: list[nn.Module], *, inductor: bool) -> "Potential":
        """Return this potential with `energy` recorded (and compiled) if possible; it serves blocks of the same size."""

        def flat(u: Tensor, beta: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            rest = iter(tensors)
            encoded = None if self.block.encoded is None else next(rest)
            args, kwargs = map_tensors(lambda _: next(rest), (self.block.args, self.block.kwargs))
            return tuple(self._energy(u, beta, Block(args, kwargs, self.block.layout, encoded)))

        u = self.coordinates.u
        recorded = record(flat, modules, (u, u.new_tensor(0.5), *_tensors_of(self.block)), inductor=inductor)
        return replace(self, recorded=recorded)

    def _energy(self, u: Tensor, beta: Tensor, block: Block) -> Energy:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_start, log_weight = self._log_densities(u, block)
            (gradient,) = torch.autograd.grad(log_start.sum() + (beta * log_weight).sum(), u)
        return Energy(log_start.detach(), log_weight.detach(), gradient)

    def _log_densities(self, u: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        together = [u] if self.plate_size is not None else u.split(1)
        log_start, log_weight = zip(*(self._of_one_run(some, block) for some in together), strict=True)
        return torch.cat(log_start), torch.cat(log_weight)

    def _of_one_run(self, u: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        placed = Placed(self.coordinates.values(u))
        model_trace, guide_trace = _run(self.pair, block, placed, self.from_prior, self.plate_size)
        summed = summed_sites(guide_trace)
        if summed or holds_sums(model_trace):
            return self._of_sums(placed, block, model_trace, guide_trace, summed)
        terms = {}
        for name, site in random_sites(guide_trace):
            # Masks do not change what is drawn. With a log density of 0, masked elements of a chain would drift without limit.
            site = {**site, "mask": None, "fn": unmasked(site["fn"])}
            terms[name] = spread(site_log_prob(site) + placed.log_jacobians[name], site, block.layout, self.plate_size)
        for name, term in terms.items() if checks_values() else ():
            if not (term < torch.inf).all():
                raise ValueError(
                    f"the start density of site '{name}' is NaN or +inf at one of its draws: look for NaN in the data or "
                    f"parameters, or for an unbounded density"
                )
        log_start = reduce(add, terms.values())
        if self.from_prior:  # the prior terms of the latents cancel
            for name, _ in random_sites(guide_trace):
                model_trace.remove_node(name)
            guide_trace = poutine.Trace()
        return log_start, log_weights_of(block.layout, model_trace, guide_trace, self.plate_size)

    def _of_sums(
        self,
        placed: Placed,
        block: Block,
        model_trace: poutine.Trace,
        guide_trace: poutine.Trace,
        summed: dict[str, dict],
    ) -> tuple[Tensor, Tensor]:
        """`_of_one_run` for programs with summed sites, whose terms do not add up site by site."""
        layout, sites = block.layout, dict(random_sites(guide_trace))
        drawn = {name: {**site, "mask": None, "fn": unmasked(site["fn"])} for name, site in sites.items()}
        log_start = log_density_of(layout, {**drawn, **summed}, self.plate_size)
        for name, site in sites.items():
            log_start = log_start + spread(placed.log_jacobians[name], site, layout, self.plate_size)
        if checks_values() and not (log_start < torch.inf).all():
            raise ValueError(
                f"the start density of sites {sorted({**drawn, **summed})} is NaN or +inf at one of their draws: look for "
                f"NaN in the data or parameters, or for an unbounded density"
            )
        return log_start, log_weights_of(layout, model_trace, guide_trace, self.plate_size)


def block_potential(
    pair: Pair, start: int, stop: int, num_chains: int, *, from_prior: bool, vectorised: bool = True
) -> Potential:
    """Find the coordinates of a pair's latents, and return the densities of a range of its data.

    Args:
        pair: an inspected pair; its guide is `prior_of(model)` if `from_prior`
        start: first datum of the block
        stop: end of the block
        num_chains: S
        from_prior: whether the start density is the prior
        vectorised: whether the chains run together under an outer plate, or one by one for programs without support for
            it

    Raises:
        ValueError: naming the site, for latents that are discrete, on a circle or sphere, or without a gradient.
    """
    if pair.layout.sequential:
        raise ValueError(
            f"plate '{pair.layout.plate}' is sequential, and chains run over all data at once: write it with "
            f"'with pyro.plate(...)'"
        )
    block = pair.block(start, stop)
    plate_size = num_chains if vectorised else None
    with torch.no_grad():
        model_trace, guide_trace = _draw(pair, block, from_prior, plate_size)
    check_coordinates(model_trace)
    coordinates = Coordinates.of(guide_trace, block.layout, plate_size)
    potential = Potential(pair, block, num_chains, from_prior, plate_size, coordinates)
    _check_gradients(potential)
    return potential


def _tensors_of(block: Block) -> list[Tensor]:
    tensors = [] if block.encoded is None else [block.encoded]
    map_tensors(tensors.append, (block.args, block.kwargs))
    return tensors


def _run(
    pair: Pair, block: Block, placed: Placed, from_prior: bool, plate_size: int | None
) -> tuple[poutine.Trace, poutine.Trace]:
    """Run both programs, under the plate of chains if there is one, and return (model trace, guide trace)."""
    guide, model = guide_given(pair.guide, block.encoded), pair.model
    if plate_size is not None:
        guide, model = (under_particles(program, block.layout, plate_size) for program in (guide, model))
    with pyro.validation_enabled(False), poutine.replay(trace=block.layout.pinned):
        if from_prior:
            with placed:
                model_trace = poutine.trace(model).get_trace(*block.args, **block.kwargs)
            latents = poutine.Trace()
            for name, site in {**dict(sample_sites(model_trace)), **summed_sites(model_trace)}.items():
                if not site["is_observed"]:
                    latents.add_node(name, **site)
            return model_trace, latents
        with placed:
            guide_trace = poutine.trace(guide).get_trace(*block.args, **block.kwargs)
        if isinstance(model, SummedOut):
            model = poutine.replay(model, trace=model.clean(guide_trace))
            return poutine.trace(model).get_trace(*block.args, **block.kwargs), guide_trace
        return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *block.args, **block.kwargs
        ), guide_trace


def _draw(pair: Pair, block: Block, from_prior: bool, plate_size: int | None) -> tuple[poutine.Trace, poutine.Trace]:
    """Traces of both programs without placed values; sites that are summed out are drawn, and left out."""
    model, guide = (
        program.drawn if isinstance(program, SummedOut) else program for program in (pair.model, pair.guide)
    )
    plain = replace(pair, model=model, guide=guide)
    traces = _run(plain, block, Placed({}), from_prior, plate_size)
    for program, trace in zip((pair.model, pair.model if from_prior else pair.guide), traces, strict=True):
        for name in program.names & trace.nodes.keys() if isinstance(program, SummedOut) else ():
            trace.remove_node(name)
    return traces


def _check_gradients(potential: Potential) -> None:
    coordinates = potential.coordinates
    with torch.enable_grad():
        values = {name: value.detach().requires_grad_() for name, value in coordinates.values(coordinates.u).items()}
        log_start, log_weight = potential.log_densities(coordinates.join(values))
        for part, what in ((log_start, "the density it starts from"), (log_weight, "the weight")):
            if not part.requires_grad:
                raise ValueError(
                    f"{what} has no gradient with respect to site(s) {sorted(values)}: detached somewhere?"
                )
        gradients = torch.autograd.grad((log_start + log_weight).sum(), list(values.values()), allow_unused=True)
    for name, gradient in zip(values, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"the joint density has no gradient with respect to site '{name}': detached somewhere?")
