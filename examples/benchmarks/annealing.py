"""Measure gradient evaluations per second of annealing and local optimisation: eager, extracted and compiled.

    python examples/benchmarks/annealing.py --out runs/annealing

Annealing evaluates the log joint density and its gradient for one chain of one datum. Each leapfrog step of the
Hamiltonian chains does this, and it takes nearly all of their time. Refinement evaluates the ELBO of a guide's
parameters for one datum and its gradient, with one of several draws, and makes a step of the optimizer. A row is one
chain or draw of one datum. Few rows show the cost of Pyro's handlers, many rows the cost of the arithmetic.
"""

import argparse
import logging
import time
from collections.abc import Callable

import programs
import turns

ROWS = {"full": [16, 64, 256, 1024, 4096], "quick": [64, 1024]}
EVALUATIONS = {"full": 40_000, "quick": 4_000}
CHAINS, DRAWS = 16, 8
TABLES = {"annealing": "Annealing", "refinement": "Local optimisation, `Refined`"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["mlp", "nsf-prior"], choices=programs.MODELS)
    parser.add_argument("--rows", nargs="+", type=int, help="numbers of rows: chains or draws, times data")
    parser.add_argument(
        "--tables", nargs="+", choices=TABLES, default=list(TABLES), help="tables to measure (default: both)"
    )
    turns.add_common_options(parser, rounds=7)
    options = parser.parse_args()
    turns.prepare(options)
    kind = "quick" if options.quick else "full"
    tables, rows, source = {}, [], ""
    for table in options.tables:
        measured = []
        times, competitors = {"annealing": (CHAINS, annealing), "refinement": (DRAWS, refinement)}[table]
        for model in options.model:
            for size in options.rows or ROWS[kind]:
                data, source = programs.images(max(1, size // times), options.data_dir, options.device)
                repeats = max(3, min(300, EVALUATIONS[kind] // size))
                measured += turns.in_turns(
                    f"{model}, {len(data) * times} rows",
                    competitors(model, data, repeats),
                    options.rounds,
                    base="eager",
                )
        tables[TABLES[table]] = turns.show(measured, "gradients/s", "x eager")
        rows += measured
    turns.write(options, "Gradient evaluations per second", tables, rows, data=source)


def annealing(model: str, data, repeats: int) -> dict[str, Callable[[], float]]:
    return {
        "eager": gradients(model, data, repeats, None),
        "extracted": gradients(model, data, repeats, False),
        "extracted, compiled": gradients(model, data, repeats, True),
    }


def refinement(model: str, data, repeats: int) -> dict[str, Callable[[], float]]:
    return {
        "eager": refining(model, data, repeats, compile=False),
        "extracted, compiled": refining(model, data, repeats, compile=True),
    }


def refining(model: str, data, repeats: int, *, compile: bool) -> Callable[[], float]:
    """Rate of the gradients with which `Refined` improves a guide."""
    import torch

    from pyrovae.guides import Refined
    from pyrovae.programs.reach import evaluation_mode

    program, guide = programs.ours(model, data)
    refined = Refined(guide, program, repeats, num_particles=DRAWS)
    if compile:
        refined = refined.compiled(len(data))

    @torch.no_grad()
    def turn() -> float:
        with evaluation_mode(program, guide):
            start = time.perf_counter()
            refined.encode(data)
            if data.is_cuda:
                torch.cuda.synchronize()
        return repeats * len(data) * DRAWS / (time.perf_counter() - start)

    return turn


def gradients(model: str, data, repeats: int, inductor: bool | None) -> Callable[[], float]:
    """Rate of gradients of the potential, with chains that start from the prior; inductor=None is eager."""
    import torch

    from pyrovae.annealing.potential import block_potential, prior_of
    from pyrovae.common.arguments import without_checks
    from pyrovae.programs.reach import evaluation_mode, modules_behind
    from pyrovae.programs.splitting import inspect

    program, _ = programs.ours(model, data)
    with evaluation_mode(program):
        pair = inspect(program, prior_of(program), (data,), {})
        potential = block_potential(pair, 0, len(data), CHAINS, from_prior=True)
        if inductor is not None:
            potential = potential.record(modules_behind(program), inductor=inductor)
            if potential.recorded is None:
                raise RuntimeError("could not be recorded")
    u, beta = potential.draw(), torch.tensor(0.5, device=data.device)

    @torch.no_grad()
    def turn() -> float:
        with evaluation_mode(program), without_checks():
            start = time.perf_counter()
            for _ in range(repeats):
                potential.energy(u, beta)
            if data.is_cuda:
                torch.cuda.synchronize()
        return repeats * len(data) * CHAINS / (time.perf_counter() - start)

    return turn


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
