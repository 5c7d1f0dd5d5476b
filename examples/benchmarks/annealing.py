"""Measure gradient evaluations per second of annealing and local optimisation, eager and compiled.

    python examples/benchmarks/annealing.py --out runs/annealing

Annealing evaluates the log joint density and its gradient for one chain of one datum. Each leapfrog step of the
Hamiltonian chains does this, and it takes nearly all of their time. The rate is that of a whole call of
`pv.annealed_importance_sampling`, to which recording and compiling belong.
Refinement evaluates the ELBO of a guide's parameters for one datum and its gradient, with one of several draws, and
makes a step of the optimizer. A row is one chain or draw of one datum. Few rows show the cost of Pyro's handlers, many
rows the cost of the arithmetic.
"""

import logging
import time
from collections.abc import Callable
from functools import partial

import programs
import turns

ROWS = {"full": [16, 64, 256, 1024, 4096], "quick": [64, 1024]}
EVALUATIONS = {"full": 40_000, "quick": 4_000}
CHAINS, DRAWS = 16, 8
LEAPFROG_STEPS = 10  # at each temperature of annealing, at most
TABLES = {"annealing": "Annealing", "refinement": "Local optimisation, `Refined`"}


def main() -> None:
    parser = turns.parser_for(__doc__, rounds=7)
    parser.add_argument("--model", nargs="+", default=["mlp", "nsf-prior"], choices=programs.MODELS)
    parser.add_argument("--rows", nargs="+", type=int, help="numbers of rows: chains or draws, times data")
    parser.add_argument(
        "--tables", nargs="+", choices=TABLES, default=list(TABLES), help="tables to measure (default: both)"
    )
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
    """Rates of the gradients of annealing; every call has the same random numbers, and so as many gradients."""
    import pyro
    import torch

    import pyrovae as pv

    program, _ = programs.ours(model, data)

    def anneal(*, compile: bool) -> None:
        pyro.set_rng_seed(0)
        pv.annealed_importance_sampling(
            program,
            data,
            num_chains=CHAINS,
            num_temperatures=max(10, repeats // LEAPFROG_STEPS),
            num_leapfrog_steps=LEAPFROG_STEPS,
            data_batch_size=None,
            compile=compile,
        )

    calls = []  # of the decoder: the eager program runs it once for each gradient of all rows
    counter = program.likelihood.decoder_net.register_forward_hook(lambda *_: calls.append(1))
    anneal(compile=False)
    counter.remove()

    def rate(*, compile: bool) -> float:
        start = time.perf_counter()
        anneal(compile=compile)
        if data.is_cuda:
            torch.cuda.synchronize()
        return len(calls) * len(data) * CHAINS / (time.perf_counter() - start)

    return {"eager": partial(rate, compile=False), "compiled": partial(rate, compile=True)}


def refinement(model: str, data, repeats: int) -> dict[str, Callable[[], float]]:
    """Rates of the gradients with which `Refined` improves a guide."""
    import torch

    import pyrovae as pv

    program, guide = programs.ours(model, data)
    refined = pv.guides.Refined(guide, program, repeats, num_particles=DRAWS)

    @torch.no_grad()
    def rate(refined: pv.guides.Refined) -> float:
        start = time.perf_counter()
        refined.encode(data)
        if data.is_cuda:
            torch.cuda.synchronize()
        return repeats * len(data) * DRAWS / (time.perf_counter() - start)

    return {"eager": partial(rate, refined), "compiled": partial(rate, refined.compiled(len(data)))}


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
