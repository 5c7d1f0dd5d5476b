"""Split the gap between ELBO and log p(x) into the share of the guide's family and that of its encoder."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae.common.networks import Inputs
from pyrovae.common.reporting import progress_bar
from pyrovae.estimators.reducers import standard_error
from pyrovae.evaluation.importance_sampling import log_marginal_likelihood
from pyrovae.evaluation.local_search import SearchOptions, given_encoding, search_for
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.evaluation.opening import evaluation_of
from pyrovae.guides.program_guide import guide_of
from pyrovae.programs.traces import Program

__all__ = ["InferenceGaps", "inference_gaps"]


@dataclass(frozen=True, repr=False)
class InferenceGaps:
    """Parts of log p(x) - ELBO per datum: tensors (N,) on the CPU, in nats.

    The best member is the best set of parameters of the guide's family that was found for the datum.

    Attributes:
        num_particles: number of particles of each estimate
        log_prob: estimate of log p(x), a lower bound on average
        stderr: its Monte Carlo standard error
        elbo: ELBO of the guide as given
        elbo_stderr: its Monte Carlo standard error
        best_elbo: ELBO of the best member
        best_elbo_stderr: its Monte Carlo standard error
        approximation: log_prob - best_elbo, the loss due to the guide's family. Too small by as much as `log_prob` is
            too low; too large by what refinement failed to gain, about the tolerance
        approximation_stderr: its Monte Carlo standard error
        amortization: best_elbo - elbo, the loss due to the encoder
        amortization_stderr: its Monte Carlo standard error
        pareto_k: of the importance weights of the best member
        num_steps: steps of refinement
        converged: whether doubling the steps gained less than the tolerance (bool)
    """

    num_particles: int
    log_prob: Tensor
    stderr: Tensor
    elbo: Tensor
    elbo_stderr: Tensor
    best_elbo: Tensor
    best_elbo_stderr: Tensor
    approximation: Tensor
    approximation_stderr: Tensor
    amortization: Tensor
    amortization_stderr: Tensor
    pareto_k: Tensor
    num_steps: Tensor
    converged: Tensor

    def __len__(self) -> int:
        return len(self.log_prob)

    @property
    def total(self) -> Tensor:
        """log_prob - elbo (N,), a lower estimate of KL(q(z|x) || p(z|x))."""
        return self.log_prob - self.elbo

    def summary(self) -> str:
        """Return a few lines to print."""
        num_data = len(self)

        def line(name: str, values: Tensor, stderr: Tensor, remark: str) -> str:
            monte_carlo = stderr.square().sum().sqrt().item() / num_data
            return f"  {name:17}{values.mean():9.3f}   ± {standard_error(values):.3f} over data, ± {monte_carlo:.3f} Monte Carlo; {remark}"

        count = f"{num_data:,} {'datum' if num_data == 1 else 'data'}"
        lines = [
            f"gaps between log p(x) and ELBO: {count}, {self.num_particles:,} particles; nats per datum",
            line("log p(x)", self.log_prob, self.stderr, "a lower bound"),
            line("approximation gap", self.approximation, self.approximation_stderr, "the guide's family"),
            line("amortization gap", self.amortization, self.amortization_stderr, "the encoder's share"),
            line("ELBO", self.elbo, self.elbo_stderr, "of the guide as given"),
        ]
        open_end = int((~self.converged).sum())
        if open_end:
            lines.append(
                f"  {open_end:,} of {count} had not converged after {int(self.num_steps.max()):,} steps: their true amortization gap may "
                f"be larger and their approximation gap smaller; raise max_num_steps or lower learning_rate"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"InferenceGaps({len(self)} data, {self.num_particles} particles: approximation {self.approximation.mean():.3f}, "
            f"amortization {self.amortization.mean():.3f})"
        )


def inference_gaps(
    model: Program,
    guide: Program,
    x: Tensor,
    context: Tensor | None = None,
    *,
    observed: Tensor | None = None,
    num_particles: int = 1000,
    plate: str | None = None,
    annealed: LogMarginalLikelihood | None = None,
    tolerance: float = 0.05,
    max_num_steps: int = 1600,
    learning_rate: float = 0.05,
    data_batch_size: int = 100,
    compile: bool | Literal["auto"] = "auto",
    progress: bool = False,
) -> InferenceGaps:
    """Split log p(x) - ELBO into the loss due to the guide's family and the loss due to its encoder, per datum.

        log p(x) - ELBO(x; lambda(x)) = [ log p(x) - ELBO(x; lambda*) ] + [ ELBO(x; lambda*) - ELBO(x; lambda(x)) ],
        lambda(x) = guide.encode(x),   lambda* = the best parameters found for x, starting from lambda(x)

    The family is the set of distributions that `guide.distribution` makes of its parameters: for a mean-field guide,
    all normals with a diagonal covariance; for a flow, and for the upper layers of a hierarchy, what the context can
    reach while the weights stay fixed. A hand-written guide has no `encode`. Its family is what the distributions of
    its sites can be at one datum if all their parameters (`arg_constraints`) are free, those too that the guide holds
    constant; plates within a datum are kept, and fixed transforms around a distribution too. Sites whose parameters
    depend on other draws have no such parameters of their own, and are refused by name.

    lambda* is a local optimum: `Refined` runs 100, 200, 400 ... steps until
    doubling them gains less than `tolerance`. Any remaining shortfall counts as approximation gap. Each ELBO is
    evaluated with draws that were not used to find lambda*.

    log p(x) is importance-sampled from the best member. With annealed weights of the same data, the two estimates of
    p(x) are averaged, log p(x) ~ logaddexp(importance, annealed) - log 2: a lower bound on average as both are, and at
    most 0.69 nats below the better one. (Taking the larger of the two per datum would be biased upwards.)

    Args:
        model: Pyro program of x with the latent sites of the guide
        guide: a guide with reparameterised draws: any Pyro guide, or a `pyrovae.guides.Guide`
        x: data (N, *data_shape)
        context: what the pair is conditioned on, (N, ...); the second argument of both programs
        observed: mask of what is known of x, shaped like x; the keyword argument `observed` of both programs
        num_particles: for each ELBO and for log p(x)
        plate: as in `log_marginal_likelihood`
        annealed: result of `annealed_importance_sampling(model, x)`, for data whose importance weights cannot be
            trusted
        tolerance: gain below which refinement stops, in nats per datum
        max_num_steps: steps after which refinement stops even if it has not converged
        learning_rate: see `Refined`
        data_batch_size: number of data refined at once
        compile: record and compile the gradients of full batches; "auto" does so if model and guide are components of
            this library and there is enough work to make up for the compilation time
        progress: show progress bars, of the refinement and of each ELBO

    Returns:
        The parts of the gap, as an `InferenceGaps`, each (N,) in nats.

    Raises:
        ValueError: for settings out of range, annealed weights for another number of data, everything that
            `log_marginal_likelihood` refuses, and, naming the site, for draws that are not reparameterised, and in
            hand-written guides for parameters that depend on other draws, masks, transforms that may hold parameters
            of a datum, and distributions that cannot be made again from their `arg_constraints`.

    References:
        Cremer, Li & Duvenaud, Inference Suboptimality in Variational Autoencoders (2018).
    """
    options = SearchOptions(
        num_particles=num_particles,
        plate=plate,
        tolerance=tolerance,
        max_num_steps=max_num_steps,
        learning_rate=learning_rate,
        data_batch_size=data_batch_size,
        compile=compile,
        progress=progress,
    )
    if annealed is not None and (not isinstance(annealed, LogMarginalLikelihood) or len(annealed) != len(x)):
        raise ValueError(
            f"annealed must be the result of annealed_importance_sampling for the same {len(x):,} data, found {annealed!r}"
        )
    data = Inputs(x, context, observed)
    with (
        evaluation_of(guide, model, args=data.args, kwargs=data.kwargs, evaluation=inference_gaps) as (args, kwargs),
        progress_bar("refining", len(x), "data", progress) as bar,
    ):
        data = Inputs(args[0], args[1] if len(args) > 1 else None, kwargs.get("observed"))
        family = guide_of(model, guide, data.args, data.kwargs, plate)
        parameters, num_steps, converged = search_for(model, family, len(x), options).best(data, bar.update)
    sampling: dict[str, Any] = {"num_particles": options.num_particles, "plate": plate, "progress": progress}
    start = log_marginal_likelihood(model, guide, *data.args, **data.kwargs, **sampling)
    # An interrupted evaluation returns the first data only.
    data, parameters = data.map(lambda part: part[: len(start)]), parameters[: len(start)]
    alone, encoded = given_encoding(model, family)
    best = log_marginal_likelihood(alone, encoded, data.x, parameters, *data.args[1:], **data.kwargs, **sampling)
    start, num_steps, converged = start[: len(best)], num_steps[: len(best)], converged[: len(best)]
    log_prob, stderr, share = best.log_prob, best.stderr, torch.ones_like(best.log_prob)
    if annealed is not None:
        annealed = annealed[: len(best)]
        both = torch.stack([best.log_prob, annealed.log_prob])
        log_prob = both.logsumexp(0) - math.log(2)
        share = both.softmax(0)[0]
        stderr = ((share * best.stderr).square() + ((1 - share) * annealed.stderr).square()).sqrt()
    return InferenceGaps(
        num_particles=options.num_particles,
        log_prob=log_prob,
        stderr=stderr,
        elbo=start.elbo,
        elbo_stderr=start.elbo_stderr,
        best_elbo=best.elbo,
        best_elbo_stderr=best.elbo_stderr,
        approximation=log_prob - best.elbo,
        approximation_stderr=_approximation_stderr(best, stderr, share),
        amortization=best.elbo - start.elbo,
        amortization_stderr=(best.elbo_stderr.square() + start.elbo_stderr.square()).sqrt(),
        pareto_k=best.pareto_k,
        num_steps=num_steps.cpu(),
        converged=converged.cpu(),
    )


def _approximation_stderr(best: LogMarginalLikelihood, stderr: Tensor, share: Tensor) -> Tensor:
    """Return the standard error of log_prob - best.elbo, whose two terms share the draws of the importance weights.

    share: of the importance weights in log_prob; 1 without annealed weights
    """
    bound, elbo = best.stderr.square(), best.elbo_stderr.square()
    covariance = (bound + elbo - best.gap_stderr.square()) / 2
    return (stderr.square() + elbo - 2 * share * covariance).clamp_min(0).sqrt()
