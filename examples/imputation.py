"""Missing values filled in: MIWAE against the column mean and scikit-learn's IterativeImputer, on breast cancer.

    python examples/imputation.py

Half of the cells of the breast cancer table are removed at random. Each method sees what is left, and fills in the
rest. The error is the root mean square over the removed cells, in standard deviations of each column. It is repeated
with other cells removed (--seeds), and errors are paired by seed.

The model is that of Mattei & Frellsen, MIWAE (2019): a Student t decoder, trained on the importance-weighted bound of
the observed cells. A missing cell gets its posterior mean, by importance weights.
"""

import argparse
import math
import statistics
import time
import warnings

import numpy as np
import pyro
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401  # makes the next import work
from sklearn.impute import IterativeImputer
from support.script import command, parser_of, positive, versions, write_json

import pyrovae as pv

HIDDEN = [128, 128, 128]


def main() -> None:
    options = parse_options()
    data = pv.data.breast_cancer()
    x = torch.cat([split.values for split in (data.train, data.validation, data.test)])
    x = (x - x.mean(0)) / x.std(0, correction=0)
    rows = []
    for seed in range(options.seeds):
        pyro.set_rng_seed(seed)
        observed = torch.rand_like(x) >= options.missing
        holes = torch.where(observed, x, torch.nan)
        started = time.process_time()
        imputed = miwae(holes, observed, options)
        seconds = time.process_time() - started
        guesses = {
            "column mean": holes.nanmean(0).expand_as(x),
            "IterativeImputer": iterative(holes, seed),
            "MIWAE": imputed.mean,
        }
        errors = {name: (guess - x)[~observed].square().mean().sqrt().item() for name, guess in guesses.items()}
        inside = ((imputed.mean - x).abs() <= 1.96 * imputed.std)[~observed].double().mean().item()
        rows.append({**errors, "inside": inside, "median_ess": imputed.ess.median().item(), "seconds": seconds})
        print(
            f"seed {seed}: " + ", ".join(f"{name} {error:.4f}" for name, error in errors.items()) + f"; median ESS "
            f"{imputed.ess.median():.0f} of {options.num_particles:,}, k > {imputed.evidence.pareto_k_limit:.2f} for "
            f"{imputed.evidence.share_of_bad_k():.1%}; {inside:.1%} of the cells within 1.96 std; {seconds:.0f} s of processor time",
            flush=True,
        )
    print_table(rows)
    if options.out:
        result = {"rows": rows, "options": vars(options), "versions": versions(), "command": command()}
        write_json(options.out, result)


def miwae(holes: torch.Tensor, observed: torch.Tensor, options: argparse.Namespace) -> pv.Imputation:
    num_columns, latent_dim = holes.shape[1], options.latent_dim
    decoder = pv.nets.MLP(latent_dim, HIDDEN, num_columns)
    model = pv.GenerativeModel(
        pv.priors.StandardNormal(latent_dim),
        pv.likelihoods.StudentT(decoder, num_columns, df=4.0, learn_df=True),
    )
    guide = pv.guides.MeanFieldNormal(pv.nets.ConcatenateMask(pv.nets.MLP(2 * num_columns, HIDDEN)), latent_dim)

    pv.fit(
        model,
        guide,
        {"x": holes, "observed": observed},
        loss=pv.objectives.ImportanceWeighted(options.training_particles),
        epochs=options.epochs,
        batch_size=64,
        learning_rate=1e-3,
        progress=not options.quiet,
    )
    return pv.impute(
        model,
        guide,
        holes,
        observed=observed,
        num_particles=options.num_particles,
        num_draws=1,
        progress=not options.quiet,
    )


def iterative(holes: torch.Tensor, seed: int) -> torch.Tensor:
    """Each column regressed on all others in turns (BayesianRidge), with more rounds than the default 10."""
    imputer = IterativeImputer(max_iter=50, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it stops after 50 rounds, converged or not
        return torch.as_tensor(imputer.fit_transform(holes.double().numpy()).astype(np.float32))


def print_table(rows: list[dict]) -> None:
    def mean_and_error(values):
        spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return f"{statistics.mean(values):8.4f} ± {spread:.4f}"

    print(f"\n{len(rows)} seeds, mean ± standard error over them\n{'':20}{'RMSE':20}MIWAE's RMSE minus this, paired")
    for name in ("column mean", "IterativeImputer", "MIWAE"):
        errors = [row[name] for row in rows]
        less = [row["MIWAE"] - row[name] for row in rows]
        print(f"{name:17}{mean_and_error(errors)}  {'' if name == 'MIWAE' else mean_and_error(less)}".rstrip())


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add(
        "--seeds", type=positive(int), default=5, help="number of seeds 0, 1, ...: cells removed, training (default: 5)"
    )
    add("--missing", type=float, default=0.5, help="share of the cells that are removed (default: 0.5)")
    add("--epochs", type=positive(int), default=200, help="epochs of each training (default: 200)")
    add("--latent-dim", type=positive(int), default=10, help="dimensions of z (default: 10)")
    add("--training-particles", type=positive(int), default=20, help="particles of the bound in training (default: 20)")
    add("--num-particles", type=positive(int), default=5000, help="particles per row to impute (default: 5000)")
    add("--out", help="JSON file for the numbers")
    add("--quiet", action="store_true", help="show no progress bars")
    options = parser.parse_args()
    if not 0 < options.missing < 1:
        parser.error(f"--missing must lie between 0 and 1, found {options.missing}")
    return options


if __name__ == "__main__":
    main()
