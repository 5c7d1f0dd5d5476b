"""Draw the NLLs of `density_table.py` against the CPU time of training, each beside the published number."""

from pathlib import Path

import matplotlib.pyplot as plt
from density_rows import ROWS
from matplotlib.lines import Line2D

LABELS = {
    "burda1-vae": "Burda, 1 layer",
    "burda2-vae": "Burda, 2 layers",
    "mlp300-standard": "normal prior, ours",
    "mlp300-vamp": "VampPrior, ours",
    "mlp300-maf": "MAF, ours",
    "hvae2-vamp": "2 levels, VampPrior, ours",
    "gated300-standard": "normal prior",
    "gated300-vamp": "VampPrior",
    "gated300-maf": "MAF",
    "gated300-hierarchy-vamp": "2 levels, VampPrior",
}


def draw_figure(found: list[dict], path: Path) -> Path | None:
    """Write the figure of the rows in `LABELS`; None if no result is one of them.

    Args:
        found: the results, as `density_table.py` stores them.
        path: where the figure goes.
    """
    shown = [result for result in found if result["row"] in LABELS and result["dataset"] == "mnist"]
    if not shown:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for result in shown:
        name, nll, published = result["row"], result["nll"], ROWS[result["row"]].published
        minutes = result["seconds"]["training_cpu"] / 60
        is_theirs = ROWS[name].draw is not None
        color = "C3" if nll > published else "C0"
        axes.plot([minutes] * 2, [nll, published], color=color, linewidth=1, zorder=1)
        axes.errorbar(
            minutes, nll, result["sample_stderr"], color=color, marker="o" if is_theirs else "s", markersize=5, zorder=2
        )
        axes.plot(minutes, published, color="0.3", marker="_", markersize=14, markeredgewidth=1.5, zorder=3)
        label = LABELS[name] + (f", seed {result['seed']}" if result["seed"] else "")
        axes.annotate(label, (minutes, nll), (6, 3), textcoords="offset points", fontsize=7.5)
    axes.legend(
        handles=[
            Line2D([], [], color="0.5", marker="o", linewidth=0, label="the paper's binary test images"),
            Line2D([], [], color="0.5", marker="s", linewidth=0, label="test images drawn anew"),
            Line2D([], [], color="C3", label="worse than published"),
            Line2D([], [], color="C0", label="as good or better"),
            Line2D([], [], color="0.3", marker="_", markersize=14, markeredgewidth=1.5, linewidth=0, label="published"),
        ],
        fontsize=8,
        loc="upper right",
    )
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.15)  # room for the labels
    axes.set_xticks(ticks := [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500) if left <= tick <= right], ticks)
    axes.set_xticks([], minor=True)
    axes.margins(y=0.15)
    axes.set(xlabel="CPU minutes of training, one thread (machines differ)", ylabel="test NLL [nats], lower is better")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
