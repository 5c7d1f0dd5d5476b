"""Lower bounds of log p(x) by annealed importance sampling, for data in any form."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from pyrovae.annealing.blocks import AnnealingOptions, TunedBlock, tuned_blocks, with_prior
from pyrovae.annealing.chains import Annealed, anneal
from pyrovae.evaluation.drawing import until_interrupted
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood
from pyrovae.evaluation.opening import Part, opened, parts_of
from pyrovae.programs.traces import Program

__all__ = ["anneal_parts", "annealed_importance_sampling"]


def annealed_importance_sampling(
    model: Program,
    *args: Any,
    guide: Program | None = None,
    num_chains: int = 16,
    num_temperatures: int = 500,
    num_leapfrog_steps: int = 10,
    schedule: Literal["adaptive", "sigmoidal"] = "adaptive",
    plate: str | None = None,
    data_batch_size: int | Literal["auto"] | None = "auto",
    compile: bool | Literal["auto"] = "auto",
    progress: bool = False,
    transform: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> LogMarginalLikelihood:
    """Estimate log p(x) by annealed importance sampling for any Pyro model with continuous latents, per datum.

        log p(x_n) ~ log 1/S sum_s w_sn,   w = prod_t [ p(x, z_{t-1}) / q(z_{t-1}) ]^(beta_t - beta_{t-1}),   z_0 ~ q

    Chains move from q (the guide, or the prior if there is none) to the posterior through q(z)^(1 - beta) p(x, z)^beta,
    with one Hamiltonian trajectory per temperature in unconstrained coordinates. Temperatures, step sizes (per
    temperature and datum, for an acceptance near 0.65) and the metric are tuned in pilot runs with separate random
    numbers, then fixed. The estimate is therefore a lower bound on average, as importance sampling's is. Started from
    the prior, it does not depend on a guide that may miss modes.

    The call warns if the program does not support an outer plate (view(-1, D), BatchNorm1d), because its chains then
    run one by one, which is slow. It also warns if draws pile up at the edge of their support, as those of Beta(0.05,
    0.05) do because float32 cannot tell them from 1: the bound is then not strict. Ctrl-C returns the result for the
    blocks of data that are done, as in `log_marginal_likelihood`.

    Args:
        model: Pyro program, called as model(*args, **kwargs); its modules are in eval mode during the call
        *args: arguments of the programs
        guide: Pyro program to start from; None starts from the prior
        num_chains: S
        num_temperatures: T
        num_leapfrog_steps: maximum number of steps per trajectory; each temperature draws its number from 1 to this.
            By default the model is evaluated with its gradient about 1.2 S T num_leapfrog_steps times per datum, pilots
            included
        schedule: "adaptive" spends half of the temperatures where log w varies most in the pilot, the other half as
            "sigmoidal" does
        plate: as in `log_marginal_likelihood`
        data_batch_size: as in `log_marginal_likelihood`
        compile: as in `log_marginal_likelihood`
        progress: show a progress bar
        transform: as in `log_marginal_likelihood`
        **kwargs: further arguments of the programs

    Returns:
        A `LogMarginalLikelihood` of annealed weights, in nats, each array (N,): `elbo` and `gap` are NaN (only
        importance sampling defines them), `acceptance` is the mean acceptance rate.

    Raises:
        ValueError: naming the site, for discrete latents that are not marked for enumeration, angles and directions
            (Pyro's distributions on a circle or a sphere, even wrapped, because they have no coordinates on the line;
            custom distributions of this kind are not detected), improper priors, distributions with unknown support,
            densities without a gradient, and everything that `log_marginal_likelihood` refuses; also for a model without
            latents.

    References:
        Neal, Annealed Importance Sampling (2001).
        Wu, Burda, Salakhutdinov & Grosse, On the Quantitative Analysis of Decoder-Based Generative Models (2017).
    """
    options = AnnealingOptions.of(locals())
    return anneal_parts(
        model, guide, parts_of(args, kwargs, transform), options, _annealed, evaluation=annealed_importance_sampling
    )


def anneal_parts(
    model: Program,
    guide: Program | None,
    parts: Iterable[Part],
    options: AnnealingOptions,
    run: Callable[[TunedBlock], Annealed],
    *,
    evaluation: Callable,
    resampled: bool = False,
) -> LogMarginalLikelihood:
    """Return the result of `run` for each tuned block of each part of the data, until Ctrl-C.

    Args:
        model: Pyro program
        guide: Pyro program to start from, or None for the prior
        parts: parts of the data
        options: options of the chains
        run: runs the chains of a block
        evaluation: the public function, whose options are named if one is misspelt
        resampled: whether its weights are those of populations
    """

    def results() -> Iterator[tuple[LogMarginalLikelihood, int, int]]:
        for part in parts:
            with opened(model, guide, part.args, part.kwargs, options, with_prior(model, guide), evaluation) as pair:
                for block in tuned_blocks(pair, options, guide is None, passes=1):
                    found = run(block)
                    result = LogMarginalLikelihood.from_annealed(
                        block.own(found.log_weights), block.own(found.acceptance), resampled=resampled
                    )
                    yield result, part.before + block.stop, part.num_data or pair.num_data

    return LogMarginalLikelihood.concatenate(until_interrupted(results()))


def _annealed(block: TunedBlock) -> Annealed:
    return anneal(block.potential, block.kernels, block.tick)
