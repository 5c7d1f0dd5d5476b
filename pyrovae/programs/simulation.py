"""Simulates data from a model, together with latents that are exact draws from their posterior."""

from typing import Any

import torch
from pyro import poutine
from pyro.distributions import ImproperUniform
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyrovae.common.arguments import map_tensors
from pyrovae.common.random_numbers import seeded
from pyrovae.programs.parameters import check_program
from pyrovae.programs.supports import innermost, masks_of
from pyrovae.programs.traces import Layout, Program, sample_sites, trace_program

__all__ = ["ProperPriors", "first_data", "simulate"]


def simulate(
    model: Program, guide: Program | None, args: tuple, kwargs: dict
) -> tuple[poutine.Trace, Program, tuple, dict]:
    """Simulate the model: (trace, model that observes the simulated data, its arguments).

    If each observed site matches exactly one argument, the simulated data replace these arguments. Otherwise the model
    is conditioned on the simulated data, which a guide does not see.
    """
    check_program("model", model)
    free = ProperPriors()(poutine.uncondition(model))
    seed = int(torch.randint(2**62, ()))
    trace = _trace_under(seed, free, args, kwargs)
    observed = {name: site for name, site in sample_sites(trace) if site["infer"].get("was_observed")}
    for site in observed.values():
        _refuse_what_is_not_simulated(site)
    if not observed:
        raise ValueError("the model observes nothing, so there is no log p(x) to bound")
    shown = _show(model, trace, observed, args, kwargs)
    if shown is None and guide is not None:
        raise ValueError(
            f"cannot tell which arguments are the observed values of site(s) {sorted(observed)}, so the guide cannot "
            f"be given simulated ones: pass the data of each site as a separate tensor, and tensors that differ in "
            f"value (torch.zeros for one site, torch.ones for another), or start from the prior (guide=None)"
        )
    # The simulated values must not depend on the data passed: run with other data and the same random numbers.
    others = shown or map_tensors(lambda tensor: tensor.flatten().flip(0).reshape(tensor.shape), (args, kwargs))
    again = _trace_under(seed, free, *others)
    for name, site in sample_sites(trace):
        if name not in again or not torch.equal(again.nodes[name]["value"], site["value"]):
            raise ValueError(
                f"what the model simulates at site '{name}' depends on the values of the data passed (or on state that "
                f"changes between runs), so it is not a draw from p(x, z)"
            )
    if shown is not None:
        return trace, model, *shown
    values = {name: site["value"] for name, site in observed.items()}
    return trace, poutine.condition(free, data=values), args, kwargs


def _trace_under(seed: int, program: Program, args: tuple, kwargs: dict) -> poutine.Trace:
    """Trace of a run under a seed, on all devices, with the generators restored afterwards."""
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    devices = [torch.device("cuda", index) for index in range(count)]
    with seeded(seed, *devices):
        return trace_program(program, args, kwargs)


def _refuse_what_is_not_simulated(site: dict) -> None:
    name, value, data = site["name"], site["value"], site["infer"]["obs"]
    if site_is_factor(site):
        raise ValueError(f"site '{name}' is a factor, which cannot be simulated: replace it by an observed site")
    if any(True for _ in masks_of(site)):
        raise ValueError(
            f"observed site '{name}' is masked, so it is unclear what to simulate: leave the mask out (observed=, or "
            f"the lengths of padded series); both bounds are then of whole data that the model simulates. For the data with "
            f"gaps, annealed_importance_sampling gives the lower bound"
        )
    if value.shape != data.shape:
        raise ValueError(
            f"observed site '{name}' simulates values of shape {tuple(value.shape)} for data of shape "
            f"{tuple(data.shape)}: give its distribution the shape of the data (expand)"
        )


def _show(
    model: Program, trace: poutine.Trace, observed: dict[str, dict], args: tuple, kwargs: dict
) -> tuple[tuple, dict] | None:
    """Put the simulated data (reshaped if necessary) into the arguments; None if it is unclear which arguments to
    replace.

    An argument is replaced if it alone holds the values of an observed site. The model, run on the new arguments, must
    then observe the simulated data.
    """
    tensors: dict[int, Tensor] = {}
    map_tensors(lambda tensor: tensors.setdefault(id(tensor), tensor), (args, kwargs))
    holders = {
        name: [key for key, tensor in tensors.items() if _holds(tensor, site["infer"]["obs"])]
        for name, site in observed.items()
    }
    places = {keys[0]: observed[name]["value"] for name, keys in holders.items() if len(keys) == 1}
    if len(places) < len(observed):
        return None
    shown = map_tensors(
        lambda tensor: places[id(tensor)].reshape(tensor.shape).to(tensor) if id(tensor) in places else tensor,
        (args, kwargs),
    )
    seen = trace_program(model, *shown, trace).nodes
    agree = (name in seen and _holds(seen[name]["value"], site["value"]) for name, site in observed.items())
    return shown if all(agree) else None


def _holds(tensor: Tensor, data: Tensor) -> bool:
    return tensor.numel() == data.numel() and torch.equal(tensor.flatten().to(data), data.flatten())


def first_data(site: dict, layout: Layout, count: int) -> Tensor:
    """A site's value for the first `count` data."""
    value = site["value"]
    if count == layout.num_data or layout.dim is None:
        return value
    axis = value.ndim - len(site["fn"].event_shape) + layout.dim
    return value.narrow(axis, 0, count) if axis >= 0 and value.shape[axis] == layout.num_data else value


class ProperPriors(Messenger):
    """Handler that raises ValueError, naming the site, if a latent would be drawn from an improper prior."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["value"] is None and isinstance(innermost(msg["fn"]), ImproperUniform):
            raise ValueError(
                f"the prior of site '{msg['name']}' is improper (ImproperUniform): chains cannot start from its draws, "
                f"and p(x) is defined up to a constant only; give the site a prior with a density that integrates to "
                f"1, for example Normal(0, 10)"
            )
