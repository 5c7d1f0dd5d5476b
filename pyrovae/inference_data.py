"""Export to ArviZ: an InferenceData with ArviZ 0.x, an xarray DataTree with ArviZ 1.x, the same groups in both."""

from typing import Any

import numpy as np
import pyro
import torch

from pyrovae.marginal_likelihood import LogMarginalLikelihood
from pyrovae.programs.inspection import inspect_pair
from pyrovae.programs.modules import check_count, evaluation_mode, import_arviz
from pyrovae.programs.traces import Layout, Program, log_weights_of, run_pair, sample_sites

__all__ = ["to_inference_data"]


def to_inference_data(
    result: LogMarginalLikelihood,
    *,
    model: Program | None = None,
    guide: Program | None = None,
    args: tuple = (),
    plate: str | None = None,
    num_draws: int = 100,
) -> Any:
    """Export an evaluation to ArviZ.

    result: gives group sample_stats, each estimate along dimension "datum", and "bound" along ("num_particles", "datum")
    model, guide, args: if given, draws z ~ q(z|x) for the data in `args` (a few of those evaluated, usually) give group
        posterior, dimensions ("chain", "draw", "drawn_datum", ...), the observed sites group observed_data, and the
        draws' log weights join sample_stats as "log_weight"
    num_draws: draws per datum

    Returns arviz.InferenceData or xarray.DataTree; both have `.to_netcdf(path)`. Values in nats.

    Raises ValueError if only one of model and guide is given.

    Source: Kumar, Carroll, Hartikainen & Martin, ArviZ: a unified library for exploratory analysis of Bayesian models
    in Python (2019).
    """
    import xarray

    arviz = import_arviz()

    if (model is None) != (guide is None):
        raise ValueError("draws need both the model and the guide: pass both, or neither")
    stats = {name: ("datum", getattr(result, name).numpy()) for name in result.per_datum()}
    stats["bound"] = (("num_particles", "datum"), result.curve.numpy())
    coords = {"datum": np.arange(len(result)), "num_particles": result.curve_particles}
    groups = {}
    if model is not None and guide is not None:
        check_count("num_draws", num_draws)
        posterior, observed, log_weight = _draws(model, guide, args, plate, num_draws)
        groups["posterior"] = xarray.Dataset(posterior)
        groups["observed_data"] = xarray.Dataset(observed)
        stats["log_weight"] = (("chain", "draw", "drawn_datum"), log_weight)
    groups["sample_stats"] = xarray.Dataset(stats, coords)
    for group in groups.values():
        group.attrs.update(
            created_by="pyrovae",
            inference_library="pyro",
            inference_library_version=str(pyro.__version__),
            torch_version=str(torch.__version__),
            arviz_version=arviz.__version__,
            num_particles=result.num_particles,
            log_marginal_likelihood=result.mean,
        )
        for dimension in group.sizes:
            if dimension not in group.coords:
                group.coords[dimension] = np.arange(group.sizes[dimension])
    if "InferenceData" in vars(arviz):
        return arviz.InferenceData(**groups)
    return xarray.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})


@torch.no_grad()
def _draws(model: Program, guide: Program, args: tuple, plate: str | None, num_draws: int) -> tuple[dict, dict, Any]:
    with evaluation_mode(model, guide) as device:
        if device is not None:
            args = tuple(arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args)
        layout, model_trace, _ = inspect_pair(model, guide, args, {}, plate)
        observed = {
            name: _array(layout, site, ())
            for name, site in sample_sites(model_trace)
            if site["is_observed"] and site["value"].numel()
        }
        values: dict[str, list] = {}
        weights = []
        for _ in range(num_draws):
            model_trace, guide_trace = run_pair(model, guide, args, {}, layout.pinned)
            weights.append(log_weights_of(layout, model_trace, guide_trace))
            for name, site in sample_sites(model_trace):
                if not site["is_observed"]:
                    values.setdefault(name, []).append(_array(layout, site, ("chain", "draw")))
    posterior = {
        name: (draws[0][0], np.concatenate([value for _, value in draws], axis=1)) for name, draws in values.items()
    }
    return posterior, observed, torch.cat(weights).unsqueeze(0).cpu().numpy()


def _array(layout: Layout, site: dict, leading: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
    """(dimension names, values) of a site: the datum axis first, the others by site and number."""
    value = site["value"].detach().cpu()
    event_dim = len(site["fn"].event_shape)
    names = []
    if layout.dim is not None:
        value = value.movedim(layout.dim - event_dim, 0)
        names = ["drawn_datum"]
    names += [f"{site['name']}_dim_{i}" for i in range(value.ndim - len(names))]
    return (*leading, *names), value.numpy()[(None,) * len(leading)]
