"""Whether training with `Trace_ELBO` and the like bounds log p(x): both programs must draw the same latents."""

import logging

from pyro import poutine
from pyro.poutine.util import site_is_factor

from pyrovae.programs.log_densities import site_log_prob
from pyrovae.programs.supports import innermost
from pyrovae.programs.traces import sample_sites

__all__ = ["check_not_swapped", "check_same_sites"]

_logger = logging.getLogger("pyrovae")


def check_not_swapped(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Raise ValueError if the guide observes data and the model does not."""
    in_model, in_guide = (
        sorted(name for name, site in sample_sites(trace) if site["is_observed"] and not site_is_factor(site))
        for trace in (model_trace, guide_trace)
    )
    if in_guide and not in_model:
        raise ValueError(
            f"the guide observes site(s) {in_guide}, and the model observes nothing: they are swapped. The model comes first: "
            f"(model, guide, data)"
        )


def check_same_sites(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Raise ValueError if a latent site of one program alone, or an observed one of the guide, makes the ELBO no bound.

    Pyro adds log p(u) for a latent u of the model that the guide lacks, which is then drawn from p(u), and subtracts no
    log q(u). A bound remains if this term is never positive: for discrete latents, which are logged.
    """
    check_not_swapped(model_trace, guide_trace)
    in_model, in_guide = dict(sample_sites(model_trace)), dict(sample_sites(guide_trace))
    for name, site in in_guide.items():
        if site["infer"].get("is_auxiliary") or site_is_factor(site):
            continue
        if site["is_observed"]:
            raise ValueError(
                f"site '{name}' of the guide is observed, so that training subtracts its log density, and the ELBO is no "
                f"bound: leave it out of the guide, which samples latents only"
            )
        if name not in in_model:
            raise ValueError(
                f"the guide samples site '{name}', which is no latent site of the model, so the ELBO is no bound: use the "
                f"model's names ({sorted(in_model)}), or mark a site that the model lacks on purpose, "
                f"infer={{'is_auxiliary': True}}"
            )
    for name, site in in_model.items():
        if site["is_observed"] or name in in_guide or site["infer"].get("enumerate"):
            continue
        if not site_log_prob(site).any():  # a constant, or masked out
            continue
        if innermost(site["fn"]).support.is_discrete:
            _logger.warning(
                "site '%s' of the model is drawn from its prior, because the guide lacks it: the ELBO stays a bound, but is "
                "loose by the entropy of the site or more; sample it in the guide, or sum it out "
                "(infer={'enumerate': 'parallel'} and TraceEnum_ELBO)",
                name,
            )
            continue
        raise ValueError(
            f"site '{name}' of the model is latent, and the guide does not sample it: training would draw it from the prior and "
            f"add its log density, and the ELBO is no bound. Sample it in the guide; or, if it is meant to follow its "
            f"prior, from that same distribution"
        )
