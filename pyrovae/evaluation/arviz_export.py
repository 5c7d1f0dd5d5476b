"""Export to ArviZ: an InferenceData with ArviZ 0.x, an xarray DataTree with ArviZ 1.x, with the same groups."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor

from pyrovae.common.arguments import check_count
from pyrovae.common.reporting import import_arviz, progress_bar
from pyrovae.evaluation.opening import evaluation_of
from pyrovae.programs.enumeration import SummedOut
from pyrovae.programs.inspection import inspect_pair
from pyrovae.programs.log_densities import log_weights_of
from pyrovae.programs.traces import Layout, Program, as_guide, run_pair, sample_sites, trace_program

if TYPE_CHECKING:
    from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood

__all__ = ["to_elpd_data", "to_inference_data"]


def to_inference_data(
    result: "LogMarginalLikelihood",
    *,
    model: Program | None = None,
    guide: Program | None = None,
    args: tuple = (),
    plate: str | None = None,
    num_draws: int = 100,
    predictive: bool = True,
    progress: bool = False,
) -> Any:
    """Export an evaluation to ArviZ.

    Group sample_stats holds each estimate along dimension "datum", and "bound" along ("num_particles", "datum"). With a
    model and a guide, the export also draws z ~ q(z|x) and adds:

    - posterior: the draws, dimensions ("chain", "draw", "drawn_datum", ...); their log weights join sample_stats as
      "log_weight";
    - observed_data: the observed sites;
    - posterior_resampled: as many of the draws, chosen with replacement by their weights. They are closer to the
      posterior, except where the guide has no mass. Absent for a sequential plate, and if all weights of a datum are 0;
    - with `predictive`: log_likelihood (log p(x|z) of each datum under each draw), posterior_predictive (data simulated
      at the draws), prior and prior_predictive (as many draws of the model).

    Values are in nats.

    Args:
        result: the evaluation to export
        model: Pyro model; together with `guide`, adds the groups of draws
        guide: Pyro guide
        args: data to draw for, usually a few of those evaluated
        plate: name of the plate that indexes the data, as in `log_marginal_likelihood`
        num_draws: draws per datum
        predictive: add the log likelihood and the simulated data, whose size is data times draws
        progress: show a progress bar of the draws

    Returns:
        arviz.InferenceData or xarray.DataTree; both have `.to_netcdf(path)`.

    Raises:
        ValueError: if only one of `model` and `guide` is given.

    References:
        Kumar, Carroll, Hartikainen & Martin, ArviZ: a unified library for exploratory analysis of Bayesian models in
        Python (2019).
    """
    import xarray

    arviz = import_arviz()

    if (model is None) != (guide is None):
        raise ValueError("drawing needs both the model and the guide: pass both, or neither")
    stats: dict[str, tuple[Any, np.ndarray]] = {
        name: ("datum", values.numpy()) for name, values in result.per_datum().items()
    }
    stats["bound"] = (("num_particles", "datum"), result.curve.numpy())
    coords = {"datum": np.arange(len(result)), "num_particles": result.curve_particles}
    groups = {}
    if model is not None and guide is not None:
        num_draws = check_count("num_draws", num_draws)
        drawn, log_weight = _draws(model, guide, args, plate, num_draws, predictive, progress)
        groups = {name: xarray.Dataset(variables) for name, variables in drawn.items()}
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
            precision=result.precision,
            log_marginal_likelihood=result.mean,
        )
        for dimension in group.sizes:
            if dimension not in group.coords:
                group.coords[dimension] = np.arange(group.sizes[dimension])
    if "InferenceData" in vars(arviz):
        return arviz.InferenceData(**groups)
    return xarray.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})


def to_elpd_data(result: "LogMarginalLikelihood") -> Any:
    """Convert the Pareto k of an evaluation to the form that `arviz.plot_khat` takes, on ArviZ 0.x and 1.x.

    ArviZ stores k with the expected log predictive densities of leave-one-out cross-validation. Here log p(x_n) takes
    their place, and fields that only cross-validation defines are NaN.

    Args:
        result: the evaluation to convert

    Returns:
        ArviZ's ELPDData, dimension "datum".

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry, Pareto Smoothed Importance Sampling (2024).
    """
    import xarray

    coords = {"datum": np.arange(len(result))}
    pointwise, pareto_k = (
        xarray.DataArray(values.numpy(), coords, ("datum",)) for values in (result.log_prob, result.pareto_k)
    )
    values = {
        "elpd": result.log_prob.sum().item(),
        "se": result.mean_stderr * len(result),
        "p": np.nan,
        "n_samples": result.num_particles,
        "n_data_points": len(result),
        "warning": bool(result.share_of_bad_k() > 0),
        "elpd_i": pointwise,
        "scale": "log",
        "pareto_k": pareto_k,
        "good_k": result.pareto_k_limit,
    }
    if "InferenceData" in vars(import_arviz()):
        from arviz.stats import ELPDData as ELPDSeries

        names = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
        return ELPDSeries(data=list(values.values()), index=[names.get(name, name) for name in values])
    from arviz_stats.utils import ELPDData

    return ELPDData(**values)


@torch.no_grad()
def _draws(
    model: Program, guide: Program, args: tuple, plate: str | None, num_draws: int, predictive: bool, progress: bool
) -> tuple[dict[str, dict], np.ndarray]:
    """Return ({group: {site: (dimensions, values)}}, log weights (1, draws, N))."""
    draws: dict[str, dict[str, list]] = {}

    def add(group: str, layout: Layout, name: str, site: dict, value: torch.Tensor, event_dim: int) -> None:
        draws.setdefault(group, {}).setdefault(name, []).append(_array(layout, site, value, event_dim))

    with (
        evaluation_of(model, guide, args=args, kwargs={}) as (args, _),
        progress_bar("draws", num_draws, "draws", progress) as bar,
    ):
        guide = as_guide(guide)
        pair = inspect_pair(model, guide, args, {}, plate)
        layout, guide = pair.layout, pair.guide
        if predictive and (isinstance(pair.model, SummedOut) or isinstance(guide, SummedOut)):
            raise ValueError(
                "predictive draws and log likelihoods need a value of each latent, and sites marked for enumeration are "
                "summed out: pass predictive=False, or sample these sites in both programs without the mark"
            )
        observed = {
            name: _array(layout, site, site["value"], len(site["fn"].event_shape))
            for name, site in sample_sites(pair.model_trace)
            if site["is_observed"] and site["value"].numel()
        }
        free = poutine.uncondition(model)
        weights = []
        for _ in range(num_draws):
            model_trace, guide_trace = run_pair(pair.model, guide, args, {}, layout.pinned)
            weights.append(log_weights_of(layout, model_trace, guide_trace))
            for name, site in sample_sites(model_trace):
                if not site["is_observed"]:
                    add("posterior", layout, name, site, site["value"], len(site["fn"].event_shape))
                elif predictive:
                    log_prob = site["fn"].log_prob(site["value"])
                    if site["mask"] is not None:
                        log_prob = torch.where(torch.as_tensor(site["mask"], device=log_prob.device), log_prob, 0.0)
                    add("log_likelihood", layout, name, site, log_prob, 0)
            if predictive:
                simulated = trace_program(free, args, {}, layout.pinned, guide_trace)
                prior = trace_program(free, args, {}, layout.pinned)
                for trace, latent_group, group in (
                    (simulated, None, "posterior_predictive"),
                    (prior, "prior", "prior_predictive"),
                ):
                    for name, site in sample_sites(trace):
                        place = group if site["infer"].get("was_observed") else latent_group
                        if place is not None and not site_is_factor(site):
                            add(place, layout, name, site, site["value"], len(site["fn"].event_shape))
            bar.update()
    log_weight = torch.cat(weights)
    groups = {
        group: {
            name: (("chain", "draw", *values[0][0]), np.stack([value for _, value in values])[None])
            for name, values in sites.items()
        }
        for group, sites in draws.items()
    }
    groups["observed_data"] = observed
    if not layout.sequential and (log_weight > -torch.inf).any(0).all():
        chosen = torch.multinomial(log_weight.softmax(0).T, num_draws, replacement=True).T.cpu().numpy()
        groups["posterior_resampled"] = {
            name: (dimensions, _chosen(values, chosen)) for name, (dimensions, values) in groups["posterior"].items()
        }
    return groups, log_weight.unsqueeze(0).cpu().numpy()


def _chosen(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Select draws (1, draws, N, ...), or (1, draws, ...) for a single datum, at indices (draws, N)."""
    if chosen.shape[1] == 1:
        return values[:, chosen[:, 0]]
    return values[:, chosen, np.arange(chosen.shape[1])]


def _array(layout: Layout, site: dict, value: torch.Tensor, event_dim: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Return (dimension names, values) of a site's tensor: the datum axis first, the others named by site and number."""
    value = value.detach().cpu()
    names = []
    if layout.dim is not None:
        value = value.movedim(layout.dim - event_dim, 0)
        names = ["drawn_datum"]
    names += [f"{site['name']}_dim_{i}" for i in range(value.ndim - len(names))]
    return tuple(names), value.numpy()
