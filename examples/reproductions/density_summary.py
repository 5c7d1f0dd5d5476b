"""Write the table and the figure of `density_table.py` from the JSON files of the results."""

from pathlib import Path

from density_figure import draw_figure
from density_rows import ROWS
from support.script import read_json

COLUMNS = (
    "| row | NLL | target | published | too high by | ELBO | gap | k too high | annealing above | annealed NLL | active | CPU minutes |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)

ABOUT = """\
# Density estimation on binarised MNIST: all rows

Written by `python examples/reproductions/density_table.py --table` from the JSON files in this folder; edit those or the script, not this page. Each JSON file
holds the row's command, seeds, versions, settings and seconds. What the numbers say is discussed in `README.md` beside this page.

- **NLL**: test negative log-likelihood in nats per image, lower is better; importance sampled with the guide, so rather too high than too low.
  The first ± is the standard error over test images. The second is the error against the mean over all 10,000, if fewer were importance
  sampled (mean ELBO of all + mean gap of those; the gap differs little between images). The third is the Monte Carlo error.
- **Too high by**: the bias estimate, a lower bound.
- **Gap**: KL(q || posterior), a lower bound.
- **k too high**: share of images whose weights have a tail too heavy to trust their Monte Carlo error.
- **Annealing above**: log p(x) by annealed importance sampling from the prior minus that by importance sampling, on the same images (their
  number in brackets).
- **Annealed NLL**: the NLL, corrected by annealing from the guide on a random slice of the images (their number in brackets); ± is the error
  against the mean over all 10,000.
- **CPU minutes**: CPU time of the process for training and estimates, on one thread unless the JSON file says otherwise. On a machine shared
  with other work this is about the time on a quiet core; the elapsed time is longer.

The test set is drawn once from a seed of its own; the published rows redraw it or use another draw (static: another file). Rows "draw
seed-777" use the test set of the VampPrior paper's code (`pv.data.mnist(draw="seed-777")`). Targets are our own, most of them a little below
the published number. Training: 50,000 images, the state with the best bound on 10,000 others (the ELBO; if the importance-weighted bound is
trained, that one). Rows marked * train on all 60,000 and keep the last state. Rows "after" another start from its trained pair: their CPU
minutes come on top of that row's.
"""

ABOUT_ABLATIONS = """\
## What helps

What each change does, against the first row (rows that name a row of the table above: against that row); one training each, same seeds. Rows
with 1,000 particles use 1,000 images.

- **Better by**: nats of NLL. ± is the error against the mean over all test images; it does not contain what another training seed would change.
- **Too high by**: the bias estimate, a lower bound; part of a smaller gap may be this.
- **Overfitting**: ELBO of the training images during the epoch that was kept (with dropout active, if there is any), minus that of the
  validation images.

| change | NLL | better by | too high by | gap | validation ELBO | overfitting | active | CPU minutes of training |
|---|---|---|---|---|---|---|---|---|"""


def write_table(results: Path) -> Path:
    """Write density.md and density.png in the folder of the results; return the path of the former."""
    remedy = "delete it and run its row again"
    found = [read_json(path, remedy) for path in sorted(results.glob("*.json"))]
    found = [result for result in found if result.get("row") in ROWS]
    parts = [ABOUT]
    for binarization in ("dynamic", "static"):
        names = [row.name for row in ROWS.values() if row.binarization == binarization and row.variant_of is None]
        lines = [line(result) for name in names for result in found if result["row"] == name]
        parts.append("\n".join([f"## {binarization.capitalize()} binarisation\n", *COLUMNS, *lines]) + "\n")
    parts.append("\n".join([ABOUT_ABLATIONS, *ablations(found)]) + "\n")
    done = {result["row"] for result in found}
    missing = [row for row in ROWS.values() if row.name not in done]
    parts.append(
        "\n".join(["## Not run\n", "| row | target | published | why |", "|---|---|---|---|", *map(absent, missing)])
    )
    draw_figure(found, results / "density.png")
    path = results / "density.md"
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return path


def ablations(found: list[dict]) -> list[str]:
    """A line for each variant, with its difference from its base row if both were measured in the same way."""

    def measured(result: dict) -> tuple:
        return tuple(result.get(name) for name in ("dataset", "data_seed", "draw", "seed", "particles", "test_images"))

    lines = []
    variants = [row for row in ROWS.values() if row.variant_of is not None]
    for row, result in ((row, result) for row in variants for result in found if result["row"] == row.name):
        bases = (other for other in found if other["row"] == row.variant_of and measured(other) == measured(result))
        base = next(bases, None)
        training = result["training"]
        validated = training["validation_elbo"]
        better = f"{base['nll'] - result['nll']:+.2f}" if base not in (None, result) else ""
        cells = (
            f"{row.title} ({training['epochs']} epochs, {result['particles']:,} particles)",
            f"{result['nll']:.2f} ± {result['sample_stderr']:.2f}",
            better,
            f"{result['bias_estimate']:.2f}",
            f"{result['gap']:.2f}",
            number(validated),
            number(None if validated is None else training["train_elbo"] - validated),
            f"{result['active_units']}",
            f"{result['seconds']['training_cpu'] / 60:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def line(result: dict) -> str:
    seconds = sum(value for name, value in result["seconds"].items() if name.endswith("_cpu"))
    marks = "*" * (result["validation_size"] == 0)
    notes = [
        *([f"seed {result['seed']}"] if result["seed"] else []),
        *([f"draw {result['draw']}"] if result.get("draw") else []),
        *([result["dataset"]] if result["dataset"] != "mnist" else []),
        *([f"{result['test_images']:,} images"] if result["test_images"] < result["of_test_images"] else []),
        *([f"{result['particles']:,} particles"] if result["particles"] != 5000 else []),
        f"{result['training']['epochs']} epochs",
        *([f"after those of `{result['training']['after']}`"] if "after" in result["training"] else []),
    ]
    cells = (
        f"{result['title']}{marks} ({', '.join(notes)})",
        f"{result['nll']:.2f} ± {result['nll_stderr']:.2f} ± {result['sample_stderr']:.3f} ± {result['mc_stderr']:.3f}",
        number(result["target"]) + missed(result),
        number(result["published"]),
        f"{result['bias_estimate']:.2f}",
        f"{result['elbo']:.2f}",
        f"{result['gap']:.2f}",
        f"{result['share_of_k_too_high']:.0%}",
        annealed(result["ais"]),
        corrected(result.get("slice")),
        f"{result['active_units']} of {result['latent_dim']}",
        f"{seconds / 60:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def missed(result: dict) -> str:
    if result["target"] is None or result["dataset"] != "mnist":
        return ""
    by = result["nll"] - result["target"]
    return f", missed by {by:.2f}" if by > 0 else ", reached"


def annealed(ais: dict | None) -> str:
    if ais is None:
        return "-"
    stderr = "" if ais["its_stderr"] is None else f" ± {ais['its_stderr']:.2f}"
    return f"{ais['annealed_above_importance_sampled']:+.2f}{stderr} ({ais['images']})"


def corrected(slice: dict | None) -> str:
    return "-" if slice is None else f"{slice['nll']:.2f} ± {slice['sample_stderr']:.2f} ({slice['images']})"


def absent(row) -> str:
    why = "needs a GPU; none was available" if row.device == "cuda" else "not yet"
    return f"| {row.title} (`{row.name}`) | {number(row.target)} | {number(row.published)} | {why} |"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
