"""Data simulated from a model together with their latents, which are exact draws of the posterior."""

import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyrovae.annealing.potential import unconstrained
from pyrovae.programs.modules import map_tensors
from pyrovae.programs.traces import Program, sample_sites, trace_program
from pyrovae.weights.pair import Pair

__all__ = ["exact_draws", "simulate"]


def simulate(
    model: Program, guide: Program | None, args: tuple, kwargs: dict
) -> tuple[poutine.Trace, Program, tuple, dict]:
    """Simulate the model: (trace, model that observes what was simulated, its arguments)."""
    free = poutine.uncondition(model)
    state = torch.get_rng_state()
    trace = trace_program(free, args, kwargs)
    observed = {name: site for name, site in sample_sites(trace) if site["infer"].get("was_observed")}
    for name, site in observed.items():
        if site_is_factor(site):
            raise ValueError(f"site '{name}' is a factor, which cannot be simulated: write it as an observation")
        if site["mask"] is not None or getattr(site["fn"], "_mask", None) is not None:
            raise ValueError(
                f"observed site '{name}' is masked, so what to simulate is unclear: pass data without gaps"
            )
        if site["value"].shape != site["infer"]["obs"].shape:
            raise ValueError(
                f"observed site '{name}' simulates values of shape {tuple(site['value'].shape)} for data of shape "
                f"{tuple(site['infer']['obs'].shape)}: give its distribution the shape of the data (expand)"
            )
    if not observed:
        raise ValueError("the model observes nothing, so there is no log p(x) to bound")
    # Where the data come in as arguments (reshaped perhaps), the simulated ones take their place there.
    places: dict[int, Tensor] = {}

    def look(tensor: Tensor) -> None:
        for site in observed.values():
            found = site["infer"]["obs"]
            if tensor.numel() == found.numel() and torch.equal(tensor.flatten().to(found), found.flatten()):
                places[id(tensor)] = site["value"].reshape(tensor.shape).to(tensor)

    map_tensors(look, (args, kwargs))
    if len(places) == len(observed):
        other_args, other_kwargs = map_tensors(lambda tensor: places.get(id(tensor), tensor), (args, kwargs))
        program = model
    elif guide is not None:
        raise ValueError(
            f"the observed values of site(s) {sorted(observed)} are not among the arguments, so the guide cannot be shown "
            f"simulated ones: pass the data as arguments, or start from the prior (guide=None)"
        )
    else:
        other_args, other_kwargs = map_tensors(
            lambda tensor: tensor.flatten().flip(0).reshape(tensor.shape), (args, kwargs)
        )
        program = poutine.condition(free, data={name: site["value"] for name, site in observed.items()})
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    again = trace_program(free, other_args, other_kwargs)
    torch.set_rng_state(after)
    for name, site in sample_sites(trace):
        if name not in again or not torch.equal(again.nodes[name]["value"], site["value"]):
            raise ValueError(
                f"what the model simulates at site '{name}' depends on the values of the data passed (or on state that "
                f"changes between runs), so its draws are not draws of p(x, z)"
            )
    return (trace, program, other_args, other_kwargs) if program is model else (trace, program, args, kwargs)


def exact_draws(pair: Pair, trace: poutine.Trace, guide: Program | None, num_chains: int) -> Tensor:
    """The simulated latents as u (S, N, D), the same for all chains."""
    latents = poutine.Trace()
    for name, site in sample_sites(trace):
        if not site["infer"].get("was_observed"):
            latents.add_node(name, **site)
    if guide is not None:
        replayed = trace_program(guide, pair.args, pair.kwargs, latents)
        if strange := sorted(name for name, _ in sample_sites(replayed) if name not in latents):
            raise ValueError(
                f"the guide draws auxiliary site(s) {strange}, whose values belonging to a simulated latent are not at "
                f"hand: start from the prior (guide=None), or sample the latents directly in the guide"
            )
        latents = replayed
    return unconstrained(latents, pair.layout_of(0, pair.num_data), num_chains)
