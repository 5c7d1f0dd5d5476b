"""Measure what layers of lower precision cost and buy: training curves over several seeds, and seconds per epoch.

    python examples/benchmarks/precision.py --out runs/precision

The default network of `mnist_svi.py` (400-400, 40 latents) on binary images of MNIST, batches of 200. For each seed, all
precisions start from the same weights and see the same data in the same order; `--rounds` is the number of seeds. The
validation ELBO is always computed in float32. "medium" is float32 on processors without bfloat16 products that torch uses for float32.
"""

import logging
import statistics

import programs
import turns
from support.script import positive

SETTINGS = {"full": {"epochs": 20, "images": 50_000}, "quick": {"epochs": 3, "images": 2_000}}


def main() -> None:
    parser = turns.parser_for(__doc__, rounds=3)
    add = parser.add_argument
    add("--precisions", nargs="+", default=["float32", "medium", "bf16"], help="values of fit(precision=)")
    add("--epochs", type=positive(int), help="epochs of each training (default: 20; 3 with --quick)")
    options = parser.parse_args()
    turns.prepare(options)
    settings = SETTINGS["quick" if options.quick else "full"]
    epochs = options.epochs or settings["epochs"]
    if epochs < 3:
        parser.error(f"--epochs must be 3 or more, found {epochs}: the first is eager, and the second compiles")
    images, source = programs.images(settings["images"] * 6 // 5, options.data_dir, options.device)
    train, validation = images.tensor_split([settings["images"]])
    rows = []
    histories: dict[str, list[list[dict]]] = {precision: [] for precision in options.precisions}
    for seed in range(options.rounds):
        for precision in options.precisions:
            histories[precision].append(history_of(train, validation, seed, epochs, precision))
    for precision, found in histories.items():
        seconds = [(history[-1]["seconds"] - history[1]["seconds"]) / (epochs - 2) for history in found]
        rates = [len(train) / each for each in seconds]
        rows.append(turns.Row(f"{len(train):,} images", precision, statistics.median(rates), rates))
    for row in rows:
        row.ratio = row.rate / rows[0].rate
    tables = {
        "Validation ELBO, nats": curves(histories, epochs),
        "Images per second, without the first two epochs": turns.show(rows, "images/s", f"x {options.precisions[0]}"),
    }
    turns.write(options, "Precision of training", tables, rows, data=source, histories=histories)


def history_of(train, validation, seed: int, epochs: int, precision: str) -> list[dict]:
    import pyro

    import pyrovae as pv

    pyro.set_rng_seed(seed)
    how = {"batch_size": 200, "learning_rate": 3e-3, "compile": True, "device": train.device, "progress": False}
    pair = programs.ours("deep", train)
    return pv.fit(*pair, train, validation=validation, epochs=epochs, precision=precision, **how).history


def curves(histories: dict[str, list[list[dict]]], epochs: int) -> str:
    """A Markdown table: a row for each precision and seed, a column for some epochs."""
    shown = sorted({max(1, epochs // 4), max(1, epochs // 2), epochs})
    lines = [
        f"| precision | seed | {' | '.join(f'epoch {epoch}' for epoch in shown)} |",
        "|---|---|" + "---:|" * len(shown),
    ]
    for precision, found in histories.items():
        for seed, history in enumerate(found):
            values = " | ".join(f"{history[epoch - 1]['validation_elbo']:.2f}" for epoch in shown)
            lines.append(f"| {precision} | {seed} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
