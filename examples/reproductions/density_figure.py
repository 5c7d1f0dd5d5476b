"""Draw the NLLs of `density_table.py` against the CPU time of training, each beside the published number."""

from pathlib import Path

import matplotlib.pyplot as plt
from density_rows import ROWS
from matplotlib.lines import Line2D

# The label of each row, and where it stands: points right of and above the marker, and which end is there.
LABELS = {
    "burda1-vae": ("Burda, 1 layer", (8, 4), "left"),
    "burda1-iwae5": ("by IWAE, k=5", (8, 4), "left"),
    "burda2-vae": ("Burda, 2 layers", (8, 4), "left"),
    "mlp300-standard": ("normal prior", (-9, -4), "right"),
    "mlp300-vamp": ("VampPrior", (9, -4), "left"),
    "mlp300-maf": ("MAF prior", (9, -4), "left"),
    "hvae2-vamp": ("2 levels, VampPrior", (9, -4), "left"),
    "gated300-standard": ("normal prior", (10, -9), "left"),
    "gated300-vamp": ("VampPrior", (-9, -2), "right"),
    "gated300-vamp-iwae": ("by IWAE, k=10", (8, 4), "left"),
    "gated300-vamp-all": ("by the ELBO,\non 60,000 images", (9, -2), "left"),
    "gated300-realnvp": ("RealNVP", (9, 2), "left"),
    "gated300-maf": ("MAF prior", (-10, -8), "right"),
    "gated300-maf-iwae": ("by IWAE, k=10", (9, 2), "left"),
    "gated300-maf-iwae-all": ("by IWAE, k=10,\non 60,000 images", (0, -12), "center"),
    "gated300-maf-iwae25-all": ("then k=25", (9, -4), "left"),
    "gated300-hierarchy-vamp": ("2 levels,\nVampPrior", (8, -44), "left"),
}
OTHER_SEED = (-8, 9), "left"
SAME_IMAGES, DRAWN_ANEW = "the paper's networks and binary test images", "test images drawn anew"
BETTER, WORSE, NEITHER = "#0072B2", "#D55E00", "0.25"


def draw_figure(found: list[dict], path: Path) -> Path | None:
    """Write the figure of the rows in `LABELS`, in a panel for each kind of test images; None if there are none.

    Args:
        found: the results, as `density_table.py` stores them.
        path: where the figure goes.
    """
    shown = [result for result in found if result["row"] in LABELS and result["dataset"] == "mnist"]
    by_row = {result["row"]: result for result in shown if not result["seed"]}
    panels = {DRAWN_ANEW: [], SAME_IMAGES: []}
    for result in shown:
        if minutes_of(result, by_row) is not None:
            panels[SAME_IMAGES if ROWS[result["row"]].draw is not None else DRAWN_ANEW].append(result)
    panels = {title: results for title, results in panels.items() if results}
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 5.4), layout="constrained", squeeze=False)
    for ax, (title, results) in zip(axes[0], panels.items(), strict=True):
        for result in results:
            draw_row(ax, result, by_row)
        ax.set(xscale="log", title=title, ylabel="test NLL [nats], lower is better")
        ax.set_xlabel("CPU minutes of training (log scale)\none thread, machines differ")
        ax.margins(x=0.08, y=0.12)
        left, right = ax.get_xlim()
        ax.set_xlim(left, right * (right / left) ** 0.25)  # room for the labels
        ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500) if left <= tick <= ax.get_xlim()[1]]
        ax.set_xticks(ticks, ticks)
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.25)
    handles = [
        Line2D([], [], color=WORSE, marker="o", label="worse than published"),
        Line2D([], [], color=BETTER, marker="o", label="as good or better"),
        Line2D([], [], color="black", marker="_", markersize=14, markeredgewidth=2, linewidth=0, label="published"),
        Line2D([], [], color=NEITHER, marker="o", fillstyle="none", linewidth=0, label="arrows: trained further"),
        Line2D(
            [], [], color=NEITHER, marker="|", markersize=12, linewidth=0, label="± for using part of the test images"
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(panels) > 1 else 2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_row(ax, result: dict, by_row: dict[str, dict]) -> None:
    """A marker with its label; a line to the published number, or an arrow from the row that this one goes on from."""
    name, nll, published = result["row"], result["nll"], ROWS[result["row"]].published
    minutes, after = minutes_of(result, by_row), result["training"].get("after")
    color = NEITHER if published is None else WORSE if nll > published else BETTER
    if published is not None:
        ax.plot([minutes] * 2, [nll, published], color=color, linewidth=1.2, zorder=1)
        ax.plot(minutes, published, color="black", marker="_", markersize=14, markeredgewidth=2, zorder=1)
    face = color
    if after is not None:
        face = "white"
        start = minutes_of(by_row[after], by_row), by_row[after]["nll"]
        bend = 0.3 if name == "gated300-maf-iwae-all" else 0.0  # around the marker of gated300-maf-iwae
        arrow = {"arrowstyle": "->", "color": "0.5", "shrinkA": 5, "shrinkB": 5, "connectionstyle": f"arc3,rad={bend}"}
        ax.annotate("", (minutes, nll), start, arrowprops=arrow, zorder=1)
    ax.errorbar(minutes, nll, result["sample_stderr"], color=color, marker="o", markersize=6, markerfacecolor=face)
    text, offset, end = LABELS[name]
    if result["seed"]:
        first_line = text.partition("\n")[0].rstrip(",")
        text, (offset, end) = f"{first_line}, seed {result['seed']}", OTHER_SEED
    vertical = {"va": "top"} if end == "center" else {}
    ax.annotate(text, (minutes, nll), offset, textcoords="offset points", fontsize=10, ha=end, **vertical)


def minutes_of(result: dict, by_row: dict[str, dict]) -> float | None:
    """CPU minutes of training, with those of the rows that it goes on from; None if one of these is not there."""
    before, after = 0.0, result["training"].get("after")
    if after is not None:
        before = minutes_of(by_row[after], by_row) if after in by_row else None
    return None if before is None else before + result["seconds"]["training_cpu"] / 60
