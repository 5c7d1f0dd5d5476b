"""Measure how training scales out: two ranks on two cores against one rank on one core, with the same batches.

    python examples/benchmarks/ranks.py --out runs/ranks

The unit is images per second of `pv.fit`, compiled, after its eager epoch and the compilation. Every rank has one
thread on a core of its own, and takes its share of every batch. `torch.distributed.run` starts the ranks anew for every
round. The ideal ratio is the number of ranks.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import programs
import turns

BATCH_SIZES, RANKS = [256, 1024], 2
NUM_DATA = {"full": 15_360, "quick": 2_048}  # a multiple of the batch sizes


def main() -> None:
    parser = turns.parser_for(__doc__, rounds=5)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES, help="data of all ranks per step")
    parser.add_argument("--rate-of", type=int, metavar="BATCH_SIZE", help=argparse.SUPPRESS)
    parser.add_argument("--rate-file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rate_of:
        rate_of_this_rank(options)
        return
    turns.prepare(options)
    cores = sorted(os.sched_getaffinity(0))
    too_few = "" if len(cores) >= RANKS else f"needs {RANKS} cores, found {len(cores)}"
    rows, source = [], programs.images(1, options.data_dir)[1]
    for batch_size in options.batch_sizes:
        competitors = {
            "1 rank": ranks(1, batch_size, options),
            f"{RANKS} ranks": too_few or ranks(RANKS, batch_size, options),
        }
        rows += turns.in_turns(f"mlp, batch {batch_size}", competitors, options.rounds, base="1 rank")
    tables = {"Images per second": turns.show(rows, "images/s", "x 1 rank")}
    turns.write(options, "Several ranks", tables, rows, data=source)


def ranks(number: int, batch_size: int, options: argparse.Namespace) -> Callable[[], float]:
    """A turn of that many ranks, each a process."""

    def turn() -> float:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rate"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
            command += [__file__, "--rate-of", str(batch_size), "--rate-file", str(file), "--device", options.device]
            command += [*(["--data-dir", options.data_dir] if options.data_dir else [])]
            command += ["--quick"] if options.quick else []
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            return float(file.read_text())

    return turn


def rate_of_this_rank(options: argparse.Namespace) -> None:
    """Train as one of the ranks; the first one writes the rate of all together."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[int(os.environ["LOCAL_RANK"]) % len(cores)]])

    import torch

    import pyrovae as pv

    torch.set_num_threads(1)
    batch_size = options.rate_of
    num_data = NUM_DATA["quick" if options.quick else "full"] // batch_size * batch_size or batch_size
    data, _ = programs.images(num_data, options.data_dir)
    with pv.distributed.joined() as rank:
        device = pv.pick_device("auto") if options.device == "cuda" else torch.device(options.device)
        pair = programs.ours("mlp", data.to(device))
        result = pv.fit(*pair, data, epochs=4, batch_size=batch_size, device=device, compile=True, progress=False)
        if rank == 0:
            # The first epoch is eager, and the second includes the compilation.
            rate = 2 * num_data / (result.history[3]["seconds"] - result.history[1]["seconds"])
            Path(options.rate_file).write_text(str(rate))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
