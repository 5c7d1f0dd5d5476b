"""Deliberate errors of sign and factor, each of which a test must catch: python tests/mutations.py [words of their names]

The repository is copied to a temporary folder. There the tests named below pass; then each error is planted in turn, and
every test named for it must fail. `test_mutations.py` sees to it that the list still fits the code.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    """What is wrong, in which file of `pyrovae`: what stands there, what is put in its place, and who must notice."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def in_file(test_file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{test_file}::test_{name}" for name in names)


ESTIMATORS = [
    Mutation(
        "bound: the sum of weights over S - 1",
        "estimators/weights.py",
        "return self.log_sum - math.log(len(self))",
        "return self.log_sum - math.log(max(1, len(self) - 1))",
        in_file(
            "estimators/test_estimators.py", "hand_computed_values", "bound_of_gamma_weights_is_exact_in_expectation"
        ),
    ),
    Mutation(
        "error of the bound: without 1/S",
        "estimators/reducers.py",
        "/ (num_particles - 1) / num_particles).sqrt()",
        "/ (num_particles - 1)).sqrt()",
        in_file("estimators/test_estimators.py", "hand_computed_values", "standard_errors_match_the_spread_of_repeats"),
    ),
    Mutation(
        "error of the bound: variance over S, not S - 1",
        "estimators/reducers.py",
        "/ (num_particles - 1) / num_particles).sqrt()",
        "/ num_particles / num_particles).sqrt()",
        in_file("estimators/test_estimators.py", "hand_computed_values"),
    ),
    Mutation(
        "error of the gap: its two terms added",
        "estimators/reducers.py",
        "weights.relative - weights.log\n",
        "weights.relative + weights.log\n",
        in_file("estimators/test_estimators.py", "standard_errors_match_the_spread_of_repeats"),
    ),
    Mutation(
        "effective sample size: the sum not squared",
        "estimators/reducers.py",
        "(2 * weights.log_sum - ",
        "(weights.log_sum - ",
        in_file("estimators/test_estimators.py", "hand_computed_values"),
    ),
    Mutation(
        "jackknife: the correction with the wrong sign",
        "estimators/jackknife.py",
        "bound - (num_particles - 1) * correction",
        "bound + (num_particles - 1) * correction",
        in_file("estimators/test_estimators.py", "hand_computed_values", "jackknives_by_definition"),
    ),
    Mutation(
        "jackknife of order 2: pairs counted twice",
        "estimators/jackknife.py",
        "(size - 2) ** 2 / 2 * pairs",
        "(size - 2) ** 2 * pairs",
        in_file("estimators/test_estimators.py", "jackknives_by_definition"),
    ),
    Mutation(
        "Pareto k: of the weights' negatives",
        "estimators/tails.py",
        "1 if statistics.psislw(tail.copy())[1] > 0.5 else -1",
        "-1 if statistics.psislw(tail.copy())[1] > 0.5 else 1",
        in_file("estimators/test_estimators.py", "pareto_k_finds_the_tail_of_pareto_weights"),
    ),
    Mutation(
        "chi-square bound: without the half",
        "estimators/tails.py",
        "- math.log(len(weights))) / 2",
        "- math.log(len(weights)))",
        in_file("estimators/test_estimators.py", "chi_square_bound_is_above_where_the_tail_allows_it"),
    ),
    Mutation(
        "bias estimate: its sign",
        "evaluation/marginal_likelihood.py",
        "(self.jackknife - self.log_prob).mean()",
        "(self.log_prob - self.jackknife).mean()",
        in_file("evaluation/test_files.py", "result_over_data"),
    ),
    Mutation(
        "precision: the error measured between float32 and float32",
        "evaluation/rounding.py",
        "torch.cat([without, draw(rounded, block, size).log_weights], 1)",
        "torch.cat([without, draw(exact, block, size).log_weights], 1)",
        in_file("evaluation/test_evaluation_precision.py", "the_error_is_that_computed_by_hand_for_the_same_draws"),
    ),
    Mutation(
        "log weights: log q added",
        "programs/log_densities.py",
        'term if program == "model" else -term for',
        "term for",
        in_file("evaluation/test_exact_evidence.py", "exact_posterior_gives_exact_evidence_with_one_particle"),
    ),
    Mutation(
        "error of the approximation gap: shared draws taken for independent",
        "evaluation/inference_gaps.py",
        "- 2 * share * covariance",
        "- 0 * share * covariance",
        in_file("evaluation/test_gaps.py", "the_error_of_what_shares_its_draws"),
    ),
    Mutation(
        "use of the latents: a datum counted once in the error",
        "evaluation/latent_use.py",
        "influence = own - other - given",
        "influence = own - other",
        in_file("evaluation/test_latent_use.py", "the_standard_error_is_the_spread_over_data_sets"),
    ),
    Mutation(
        "use of the latents: the noise of draws counted as the data's",
        "evaluation/latent_use.py",
        "- within.mean(0) / num_draws",
        "- 0 * within.mean(0) / num_draws",
        in_file("evaluation/test_latent_use.py", "a_guide_with_one_code_for_all"),
    ),
    Mutation(
        "use of the latents: each datum gets its own code",
        "evaluation/latent_use.py",
        "order.roll(1)",
        "order.roll(0)",
        in_file("evaluation/test_latent_use.py", "each_datum_gives_its_code_to_another"),
    ),
    Mutation(
        "use of the latents: KL from the sum with the log weight",
        "evaluation/latent_use.py",
        "own - log_weights_of",
        "own + log_weights_of",
        in_file("evaluation/test_latent_use.py", "closed_form_over_data"),
    ),
    Mutation(
        "use of the latents: others' codes from the block's neighbours",
        "evaluation/latent_use.py",
        "order[start:stop] if",
        "torch.arange(start, stop) if",
        in_file("evaluation/test_latent_use.py", "sorted_data_in_blocks"),
    ),
]

PARTS = [
    Mutation(
        "mixture of normals: weights in place of their logarithms",
        "priors/densities.py",
        "Mixture(self.logits.log_softmax(-1), lambda index: dist.Normal",
        "Mixture(self.logits.softmax(-1), lambda index: dist.Normal",
        in_file("priors/test_priors.py", "density_integrates_to_one_and_draws_follow_it"),
    ),
    Mutation(
        "mixture of normals: the cross term of the square once",
        "distributions/mixtures.py",
        "- 2 * (z @",
        "- (z @",
        in_file("priors/test_priors.py", "a_mixture_is_its_sum", "density_integrates_to_one_and_draws_follow_it"),
    ),
    Mutation(
        "mixture of normals: log sigma added",
        "distributions/mixtures.py",
        "log_normaliser = scale.double().log().sum(-1)",
        "log_normaliser = -scale.double().log().sum(-1)",
        in_file("priors/test_priors.py", "a_mixture_is_its_sum", "density_integrates_to_one_and_draws_follow_it"),
    ),
    Mutation(
        "VampPrior: all components with the weight 1",
        "priors/densities.py",
        "Mixture(self.logits.log_softmax(-1), lambda index: self.guide",
        "Mixture(self.logits, lambda index: self.guide",
        in_file("priors/test_priors.py", "vamp_prior_is_the_mixture_of_posteriors"),
    ),
    Mutation(
        "flow: the log-determinant subtracted in the density of a value",
        "distributions/zuko_adapter.py",
        "        return self.flow.log_prob(\n",
        "        noise = self.flow.base.log_prob(self.flow.transform(value))\n        return 2 * noise - self.flow.log_prob(\n",
        in_file("priors/test_priors.py", "density_integrates_to_one_and_draws_follow_it"),
    ),
    Mutation(
        "flow: the log-determinant subtracted in the density of a draw",
        "distributions/zuko_adapter.py",
        "value, log_prob = self.flow.rsample_and_log_prob(torch.Size(sample_shape))\n",
        "value, log_prob = self.flow.rsample_and_log_prob(torch.Size(sample_shape))\n"
        "        log_prob = 2 * self.flow.base.log_prob(self.flow.transform(value)) - log_prob\n",
        in_file("priors/test_flows.py", "the_density_of_a_draw_is_the_density"),
    ),
    Mutation(
        "Bernoulli: log(1 + exp(-|l|)) subtracted",
        "distributions/binary.py",
        "return -(products.log() + rest",
        "return (products.log() - rest",
        in_file("distributions/test_binary.py", "log_mass_and_gradients_are_those_of_bernoulli_pixels"),
    ),
    Mutation(
        "Bernoulli: the gradient's sign",
        "distributions/binary.py",
        "gradient * (value - logits.sigmoid())",
        "gradient * (logits.sigmoid() - value)",
        in_file("distributions/test_binary.py", "log_mass_and_gradients_are_those_of_bernoulli_pixels"),
    ),
    Mutation(
        "continuous Bernoulli: the normaliser multiplied",
        "distributions/pixels.py",
        "self.logits * value - log_norm",
        "self.logits * value + log_norm",
        in_file("likelihoods/test_likelihoods.py", "total_is_one", "continuous_bernoulli_exactly"),
    ),
    Mutation(
        "logistic levels: bins of half the width",
        "distributions/pixels.py",
        "centre, step = (level - loc) * precision, precision / 2",
        "centre, step = (level - loc) * precision, precision / 4",
        in_file("likelihoods/test_likelihoods.py", "logistic_levels_sum_to_one_everywhere", "logistic_levels_exactly"),
    ),
    Mutation(
        "normal pixels: exp(log sigma) squared",
        "likelihoods/pixelwise.py",
        "dist.Normal(parameters + self.bias, self.log_scale.exp())",
        "dist.Normal(parameters + self.bias, (2 * self.log_scale).exp())",
        in_file("likelihoods/test_likelihoods.py", "normals_exactly"),
    ),
    Mutation(
        "negative binomial: the count left out of the power of r / (r + m)",
        "distributions/count_masses.py",
        "count * (F.logsigmoid(-log_odds) + log_mean)",
        "count * log_mean",
        in_file("distributions/test_count_masses.py", "negative_binomial_exactly"),
    ),
    Mutation(
        "negative binomial: half a term of Stirling's series left out",
        "distributions/count_masses.py",
        "(large - 0.5) * growth",
        "large * growth",
        in_file("distributions/test_count_masses.py", "negative_binomial_exactly"),
    ),
    Mutation(
        "exposure: squared",
        "likelihoods/counts.py",
        "_bounded(log_mean) + log_exposure,",
        "_bounded(log_mean) + 2 * log_exposure,",
        in_file("likelihoods/test_columns.py", "exposure_multiplies_the_mean", "gamma_poisson_evidence_with_exposures"),
    ),
    Mutation(
        "scaled data: the Jacobian added",
        "distributions/real_values.py",
        "/ self.scale) - self.scale.log()",
        "/ self.scale) + self.scale.log()",
        in_file("likelihoods/test_columns.py", "scaled_evidence_is_that_of_standardised_data_and_the_jacobian"),
    ),
    Mutation(
        "log-normal: a density of log x",
        "distributions/real_values.py",
        "math.log(2 * math.pi) / 2 - log_value",
        "math.log(2 * math.pi) / 2",
        in_file("distributions/test_count_masses.py", "log_normal_exactly"),
    ),
    Mutation(
        "bits per dimension: of the density without the bins",
        "estimators/compression.py",
        "-(log_prob.double() + log_volume)",
        "-log_prob.double()",
        in_file("estimators/test_bits.py", "codes_of_known_length", "units_do_not_matter"),
    ),
    Mutation(
        "full-rank guide: the diagonal of L squared, and so its log-determinant doubled",
        "guides/normals.py",
        "entries = torch.cat([log_scale.exp(), triangle], -1)",
        "entries = torch.cat([(2 * log_scale).exp(), triangle], -1)",
        in_file("guides/test_guides.py", "normals_of_their_parameters"),
    ),
    Mutation(
        "low-rank guide: standard deviations for variances",
        "guides/normals.py",
        "(2 * log_scale).exp())",
        "log_scale.exp())",
        in_file("guides/test_guides.py", "normals_of_their_parameters"),
    ),
    Mutation(
        "defensive mixture: every component with the weight 1",
        "guides/defensive.py",
        "math.log(share) + ",
        "",
        in_file("guides/test_refinement.py", "mixture_density"),
    ),
]

TRAINING = [
    Mutation(
        "objective: the KL rewarded",
        "objectives/kl.py",
        "integrand = integrand - weight * (active * piece.kl)",
        "integrand = integrand + weight * (active * piece.kl)",
        in_file("objectives/test_objectives.py", "monte_carlo_kl_is_trace_elbo", "beta_and_warm_up"),
    ),
    Mutation(
        "objective: log q and log p change places in the KL",
        "objectives/kl.py",
        "        return guide - prior\n",
        "        return prior - guide\n",
        in_file("objectives/test_objectives.py", "monte_carlo_kl_is_trace_elbo"),
    ),
    Mutation(
        "sums: the scale of a subsample left out",
        "objectives/runs.py",
        "return run.plate_scale * total if scaled else total",
        "return total",
        in_file("objectives/test_summed_sites.py", "coupled_classes_against_the_sum_over_all_pairs"),
    ),
    Mutation(
        "sums: the score of the guide's summed class left out",
        "objectives/runs.py",
        "in sample_sites(runs[0].drawn_trace)",
        "in sample_sites(runs[0].guide_trace)",
        in_file("objectives/test_summed_sites.py", "a_guide_with_sums_against_quadrature"),
    ),
    Mutation(
        "sums: validation by Trace_ELBO, which draws the class from its prior",
        "training/losses.py",
        "return loss.sums_out if isinstance(loss, Objective) else",
        "return False if isinstance(loss, Objective) else",
        in_file("objectives/test_summed_sites.py", "the_elbo_of_sums_is_measured_by_the_objective"),
    ),
    Mutation(
        "warm-up: beta left out",
        "objectives/kl.py",
        "(self.beta * (self.num_steps",
        "((self.num_steps",
        in_file("objectives/test_objectives.py", "beta_and_warm_up"),
    ),
    Mutation(
        "free bits: of one datum for the batch",
        "objectives/kl.py",
        "* run.layout.num_data * run.plate_scale",
        "* run.plate_scale",
        in_file("objectives/test_objectives.py", "free_bits_by_hand"),
    ),
    Mutation(
        "sticking the landing: the score kept",
        "objectives/kl.py",
        "held = {name: guide.detach()",
        "held = {name: guide",
        in_file("objectives/test_objectives.py", "no_gradient_is_left_at_the_exact_posterior"),
    ),
    Mutation(
        "DReG: the weights not squared",
        "objectives/weighted.py",
        "(normalised.square() * guide).sum()",
        "(normalised * guide).sum()",
        in_file("objectives/test_objectives.py", "gradients_without_score_are_unbiased"),
    ),
    Mutation(
        "VIMCO: the signal's sign",
        "objectives/weighted.py",
        "bound.detach() - without)",
        "without - bound.detach())",
        in_file("objectives/test_objectives.py", "score_function_gradients_against_enumeration"),
    ),
    Mutation(
        "score function: a baseline that holds the draw itself",
        "objectives/kl.py",
        "(signal.sum(0) - signal) / (len(signal) - 1)",
        "signal.sum(0) / len(signal)",
        in_file("objectives/test_objectives.py", "score_function_baseline_against_enumeration"),
    ),
    Mutation(
        "importance-weighted objective: the sum of weights, not their mean",
        "objectives/weighted.py",
        "return log_weights.logsumexp(0) - math.log(len(log_weights))",
        "return log_weights.logsumexp(0)",
        in_file("objectives/test_objectives.py", "importance_weighted_value_is_the_reducers"),
    ),
    Mutation(
        "history: the ELBO of the data as their sum of reconstruction and KL",
        "training/losses.py",
        "return reconstruction - kl, reconstruction, kl",
        "return reconstruction + kl, reconstruction, kl",
        in_file("training/test_training.py", "history_is_the_real_elbo_whatever_the_objective"),
    ),
    Mutation(
        "skipped steps: one more than allowed",
        "training/guarded_step.py",
        "self.num_skipped <= self.max_skipped",
        "self.num_skipped <= self.max_skipped + 1",
        in_file(
            "training/test_skipped_steps.py",
            "one_more_stops_the_run_and_a_higher_limit_lets_it_go_on",
            "in_a_hand_written_svi",
        ),
    ),
    Mutation(
        "skipped steps: an infinite loss taken where its gradient is finite",
        "training/steps.py",
        "self.run.optimizer.watch(torch.tensor(value))",
        "pass",
        in_file("training/test_skipped_steps.py", "an_infinite_loss_with_finite_gradients_is_not_taken"),
    ),
    Mutation(
        "skipped steps: their data counted",
        "training/steps.py",
        "sums.add(parts, run.batches.num_made(len(index)), guard.was_made)",
        "sums.add(parts, run.batches.num_made(len(index)))",
        in_file("training/test_skipped_steps.py", "a_skipped_step_is_counted_and_changes_nothing"),
    ),
    Mutation(
        "skipped steps: those of a recording counted",
        "training/acceleration.py",
        "torch.where(optimizer.guard.was_made, row, 0.0)",
        "row",
        in_file("training/test_skipped_steps.py", "a_skipped_step_is_counted_and_changes_nothing"),
    ),
    Mutation(
        "softplus of compiled code: without the highest power of its polynomial",
        "compiled/lowering.py",
        "reversed(_LOG1P[:-1])",
        "reversed(_LOG1P[:-2])",
        in_file("compiled/test_lowering.py", "values_are_those_of_float64_and_gradients_those_of_torch"),
    ),
    Mutation(
        "log1p of compiled code: without the digits that rounding 1 + x lost",
        "compiled/lowering.py",
        "corrected = rounded.log() * (x / (rounded - 1))",
        "corrected = rounded.log()",
        in_file("compiled/test_lowering.py", "values_are_those_of_float64_and_gradients_those_of_torch"),
    ),
    Mutation(
        "skipped steps: running means keep them",
        "training/steps.py",
        "put_back(buffers, unless=guard.was_made)",
        "pass",
        in_file("training/test_skipped_steps.py", "running_means_do_not_see_a_skipped_step"),
    ),
    Mutation(
        "optimizers: a step that is not finite is made by those that do not skip it themselves",
        "training/guarded_step.py",
        "elif is_made:",
        "else:",
        in_file(
            "training/test_optimizers.py",
            "a_skipped_step_leaves_parameters_and_state_untouched",
            "a_first_step_that_is_skipped_makes_no_state",
        ),
    ),
    Mutation(
        "accumulate: gradients scaled up to all data are added, not averaged",
        "training/optimization.py",
        "gradient / self._weight if self.is_scaled else gradient",
        "gradient",
        in_file("training/test_averaging.py", "batches_together_are_one_larger_batch"),
    ),
    Mutation(
        "average: without its normalisation, so that the first steps weigh too little",
        "training/averaging.py",
        "(1 - self.decay) / (1 - self.decay**self.num_steps)",
        "torch.full_like(self.num_steps, 1 - self.decay)",
        in_file("training/test_averaging.py", "the_average_is_the_weighted_mean_of_the_steps"),
    ),
    Mutation(
        "callback: its draws change the numbers of the run",
        "training/callbacks.py",
        "    set_random_state(random, state.device)\n",
        "",
        in_file("training/test_callbacks.py", "a_callback_that_draws_and_evaluates_changes_no_number"),
    ),
]

ANNEALING = [
    Mutation(
        "annealing: leapfrog down the density",
        "annealing/chains.py",
        "momentum = momentum + half * step * scale * energy.gradient",
        "momentum = momentum - half * step * scale * energy.gradient",
        in_file("annealing/test_annealing.py", "both_directions_are_strict"),
    ),
    Mutation(
        "annealing: a whole step of momentum at the end",
        "annealing/chains.py",
        "half = 0.5 if number",
        "half = 1.0 if number",
        in_file("annealing/test_annealing.py", "both_directions_are_strict"),
    ),
    Mutation(
        "annealing: acceptance of the inverse ratio",
        "annealing/chains.py",
        "log_ratio = (after - before)",
        "log_ratio = (before - after)",
        in_file("annealing/test_annealing.py", "both_directions_are_strict"),
    ),
    Mutation(
        "annealing: weights of the wrong temperatures",
        "annealing/chains.py",
        "(kernels.temperatures[t] - kernels.temperatures[t - 1])",
        "(kernels.temperatures[t] + kernels.temperatures[t - 1])",
        in_file("annealing/test_annealing.py", "both_directions_are_strict"),
    ),
    Mutation(
        "annealing: the Jacobian of constrained latents divided",
        "annealing/potential.py",
        "site_log_prob(site) + placed.log_jacobians[name]",
        "site_log_prob(site) - placed.log_jacobians[name]",
        in_file("annealing/test_annealing.py", "constrained_latents"),
    ),
    Mutation(
        "bidirectional bound: 1 / w taken for w",
        "annealing/bidirectional.py",
        "-estimators.importance_weighted_bound(-back.log_weights)",
        "estimators.importance_weighted_bound(back.log_weights)",
        in_file("annealing/test_annealing.py", "both_bounds_of_known_weights_by_hand"),
    ),
    Mutation(
        "second opinions: the codes of the lowest scores",
        "guides/defensive.py",
        ".topk(self.num_codes, 0)",
        ".topk(self.num_codes, 0, largest=False)",
        in_file("guides/test_defensive.py", "the_codes_that_count_are_the_models_best"),
    ),
    Mutation(
        "second opinion: shares of the draws for those of the weights",
        "evaluation/second_opinion.py",
        "weights + parts - parts.logsumexp(0)",
        "parts - parts.logsumexp(0)",
        in_file("guides/test_defensive.py", "shares_are_those_of_the_posterior"),
    ),
    Mutation(
        "gaps of a hand-written guide: values of a plate left of the data in the wrong place",
        "guides/program_guide.py",
        "return value.movedim(0, axis)",
        "return value",
        in_file("evaluation/test_gaps_of_programs.py", "several_sites_and_a_plate_within_a_datum"),
    ),
]

MUTATIONS = [*ESTIMATORS, *PARTS, *TRAINING, *ANNEALING]


def failed(folder: Path, tests: Iterable[str]) -> tuple[set[str], str]:
    """Which of the tests fail in that copy of the repository, and what pytest printed."""
    tests = sorted(set(tests))
    options = ["-q", "-rf", "--tb=line", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run {', '.join(tests)}:\n{done.stdout}{done.stderr}")
    lines = [line.removeprefix("FAILED ") for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    return {
        test
        for test in tests
        for line in lines
        if line[len(test) : len(test) + 1] in ("", " ", "[") and line.startswith(test)
    }, done.stdout


def planted(text: str, mutation: Mutation) -> str:
    """The file with the error in it."""
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times, expected once")
    return text.replace(mutation.old, mutation.new)


def main(words: list[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if all(word in mutation.what for word in words)]
    if not chosen:
        print(f"no planted error has {' and '.join(words)} in its name")
        return 2
    survived = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("pyrovae", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        broken, output = failed(folder, (test for mutation in chosen for test in mutation.tests))
        if broken:
            print(output)
            return 1
        print("| error | where | seconds | caught by |\n|---|---|---|---|", flush=True)
        for mutation in chosen:
            path, began = folder / "pyrovae" / mutation.file, time.perf_counter()
            right = path.read_text()
            path.write_text(planted(right, mutation))
            caught, _ = failed(folder, mutation.tests)
            path.write_text(right)
            missed = [test for test in mutation.tests if test not in caught]
            survived += bool(missed)
            by = ", ".join(f"`{test.removeprefix('tests/')}`" for test in mutation.tests if test in caught)
            not_by = f" **not by {', '.join(missed)}**" if missed else ""
            print(
                f"| {mutation.what} | `{mutation.file}` | {time.perf_counter() - began:.0f} | {by}{not_by} |",
                flush=True,
            )
    print(f"\n{len(chosen)} errors, {len(chosen) - survived} caught by every test named for them")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
