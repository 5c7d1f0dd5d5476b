"""Run the benchmarks of `pyrovae/docs/benchmarks.md` one after the other, and write one page with all tables.

    pip install -e ".[bench]" && python examples/benchmarks/run_all.py --out runs/benchmarks

This takes hours. `--quick` tries all of them in minutes, `--only NAME` runs some of them; the page holds what the folder
holds. Time to quality is a script of its own: `examples/reproductions/time_to_quality.py`.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import turns
from support.script import parser_of

FOLDER = Path(__file__).parent
# name -> script and options, as on the page
COMMANDS = {
    "training": "training.py --batch-sizes 64 256 1024 --rounds 3 --medium",
    "training-models": "training.py --model vamp nsf-prior iaf --batch-sizes 256 --rounds 5",
    "training-conv": "training.py --model conv --batch-sizes 64 --quick --rounds 3",
    "precision": "precision.py",
    "ranks": "ranks.py --rounds 3",
    "evaluation": "evaluation.py --rounds 5 --tables rates call --bf16",
    "evaluation-conv": "evaluation.py --model conv --quick --rounds 3 --tables rates",
    "evaluation-rows": "evaluation.py --rounds 3 --tables rows",
    "evaluation-growth": "evaluation.py --rounds 3 --tables growth",
    "evaluation-memory": "evaluation.py --tables memory",
    "annealing": "annealing.py --tables annealing --model mlp --rows 64 256 1024 --rounds 3",
    "annealing-nsf": "annealing.py --tables annealing --model nsf-prior --rows 64 256 1024 --rounds 2",
    "refinement": "annealing.py --tables refinement --model mlp --rows 16 64 256 1024 4096 --rounds 3",
}


def main() -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--out", default="runs/benchmarks", help="folder of the tables (default: runs/benchmarks)")
    add("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="benchmarks to run (default: all)")
    turns.add_machine_options(parser)
    options = parser.parse_args()
    out = Path(options.out)
    failed = [name for name in options.only if not run(name, out, options)]
    pages = [path.read_text() for name in COMMANDS if (path := out / f"{name}.md").exists()]
    if pages:
        (out / "all.md").write_text("\n".join(["# Benchmarks\n", *pages]))
        print(f"All tables: {out / 'all.md'}")
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed, see above; --only {' '.join(failed)} runs them again")


def run(name: str, out: Path, options) -> bool:
    """Run one benchmark; return whether it succeeded."""
    script, *words = shlex.split(COMMANDS[name])
    words += ["--threads", str(options.threads), "--device", options.device, "--out", str(out / name)]
    words += ["--data-dir", options.data_dir] if options.data_dir else []
    words += ["--quick", "--rounds", "1"] if options.quick else []  # the last --rounds counts
    print(f"{name}: {shlex.join([script, *words])}", flush=True)
    return subprocess.run([sys.executable, str(FOLDER / script), *words]).returncode == 0


if __name__ == "__main__":
    main()
