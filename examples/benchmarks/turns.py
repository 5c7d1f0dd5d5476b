"""Time competitors in turns within one process, and write the table of results.

On a shared machine, speed changes over time. All competitors therefore run once in each round, in an order that changes
from round to round. The table reports medians over rounds and their ratios.
"""

import argparse
import contextlib
import logging
import os
import platform
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # examples/

from support.script import parser_of, positive, processor, versions, write_json

NOT_INSTALLED = "not installed"
# Flags of /proc/cpuinfo on x86 and ARM, and their names in tables.
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "bf16",
}


@dataclass
class Row:
    """One competitor in one setting.

    Attributes:
        setting: the setting, for example model and batch size.
        name: name of the competitor.
        rate: median over rounds of the count per second; None if it did not run.
        rates: the rate of each round.
        ratio: rate relative to the base competitor, or None.
        note: why it did not run, or another remark.
    """

    setting: str
    name: str
    rate: float | None = None
    rates: list[float] = field(default_factory=list)
    ratio: float | None = None
    note: str = ""


def parser_for(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = parser_of(description)
    parser.add_argument("--rounds", type=positive(int), help=f"rounds to run (default: {rounds}; 2 with --quick)")
    parser.add_argument("--out", help="output file without suffix: writes .md and .json")
    add_machine_options(parser)
    parser.set_defaults(default_rounds=rounds)
    return parser


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--quick", action="store_true", help="short trial run, to check that everything works")
    add("--threads", type=positive(int), default=len(os.sched_getaffinity(0)), help="number of cores (default: all)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu); JAX uses the device it is installed for")
    add(
        "--data-dir",
        default=os.environ.get("PYROVAE_DATA"),
        help="folder of MNIST (default: $PYROVAE_DATA if set, else random pixels)",
    )


def prepare(options: argparse.Namespace) -> None:
    """Give all libraries the same cores: JAX uses all that the process may use, torch as many as it is told."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    import torch

    torch.set_num_threads(options.threads)
    logging.getLogger("pyrovae").addFilter(_refuse_slower_code)
    options.rounds = options.rounds or (2 if options.quick else options.default_rounds)


def _refuse_slower_code(record: logging.LogRecord) -> bool:
    """Fail, instead of timing slower code under the name of the compiled program or its CUDA graph."""
    if any(words in record.getMessage() for words in ("runs eagerly", "is not replayed as a CUDA graph")):
        raise RuntimeError(record.getMessage())
    return True


def in_turns(
    setting: str, competitors: dict[str, Callable[[], float] | str], rounds: int, base: str | None = None
) -> list[Row]:
    """Time the competitors in turns and return a row for each.

    Args:
        setting: name of the setting.
        competitors: functions turn() -> count per second, or the reason why a competitor cannot run.
        rounds: rounds after the first, which is for warming up.
        base: competitor that ratios are relative to.
    """
    rows = {name: Row(setting, name, note=turn if isinstance(turn, str) else "") for name, turn in competitors.items()}
    turns = {name: turn for name, turn in competitors.items() if not isinstance(turn, str)}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(turns), len(turns)):
            try:
                rate = turns[name]()
            except Exception as error:  # the others continue, and the row says why
                rows[name].note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"
                del turns[name]
                continue
            if number:  # the first round compiles and warms up
                rows[name].rates.append(rate)
            print(f"\r{setting}: round {number} of {rounds}, {name:40}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for row in rows.values():
        row.rate = statistics.median(row.rates) if row.rates else None
    if base is not None and rows[base].rate:
        for row in rows.values():
            row.ratio = row.rate / rows[base].rate if row.rate else None
    return list(rows.values())


def show(rows: Sequence[Row], unit: str, ratio: str) -> str:
    """A Markdown table of rates, quartiles and ratios."""
    lines = [f"| setting | | {unit} | quartiles | {ratio} | |", "|---|---|---:|---:|---:|---|"]
    for row in rows:
        rate = spread = "-"
        if row.rate is not None:
            rate = _short(row.rate)
            low, _, high = (
                statistics.quantiles(row.rates, n=4, method="inclusive") if len(row.rates) > 1 else (row.rate,) * 3
            )
            spread = f"{_short(low)} - {_short(high)}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {row.setting} | {row.name} | {rate} | {spread} | {ratio} | {row.note} |")
    return "\n".join(lines)


def write(
    options: argparse.Namespace, title: str, tables: dict[str, str], rows: Sequence[Row], **facts: object
) -> None:
    """Print the tables and write them as Markdown, and everything as JSON, with machine and versions."""
    machine = {
        "machine": processor(),
        "instructions": instruction_sets(),
        "cores": options.threads,
        "device": _device_name(options.device),
        "system": platform.platform(),
        "versions": versions(),
        "rounds": options.rounds,
        "quick": options.quick,
        "command": " ".join(["python", *sys.argv]),
        **facts,
    }
    packages = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    about = (
        f"{machine['machine']} ({machine['instructions']}), {options.threads} cores, {machine['device']}; {packages}; "
        f"medians of {options.rounds} rounds in turns. `{machine['command']}`"
    )
    text = "\n\n".join([f"## {title}", about, *(f"{name}\n\n{table}" for name, table in tables.items())]) + "\n"
    print(text)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{options.out}.md").write_text(text)
        write_json(f"{options.out}.json", {**machine, "rows": [asdict(row) for row in rows]})


def instruction_sets() -> str:
    """Which vector and matrix instructions the CPU has, and which of them torch's own loops use."""
    import torch

    words = set()
    with contextlib.suppress(OSError):
        words.update(Path("/proc/cpuinfo").read_text().split())
    found = [name for flag, name in INSTRUCTION_SETS.items() if flag in words]
    return ", ".join([*found, f"torch uses {torch.backends.cpu.get_cpu_capability()}"])


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
