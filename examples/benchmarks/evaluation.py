"""Measure the throughput of estimating log p(x): pyrovae, Pythae, Pyro's traces and bare matrix products.

    pip install -e ".[bench]" && python examples/benchmarks/evaluation.py --out runs/evaluation

The unit is log weights per second, measured on a subset of the images. The time for 10,000 images with 5,000 particles
each is extrapolated from this rate, plus the time of a call before its first weight (inspecting the programs,
recording, compiling). pyrovae is `pv.log_marginal_likelihood` itself, with standard errors and diagnostics. The floor
is the time of the decoder's matrix products alone, by the library that is faster in float32; for the convolutional
model, of the decoder alone. Where the hardware has bfloat16 products, a second floor is of those.

Peak memory is measured in a separate process, above model, data and what the process held before the call, for the
first call, which loads and runs the compiler, and for a second call.
"""

import argparse
import importlib.util
import logging
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import programs
import turns

NUM_DATA, NUM_PARTICLES = 10_000, 5_000
TABLES = {
    "rates": "Log weights per second",
    "call": "Log weights per second of whole calls for 100 images with default options, compiled before",
    "rows": "How the rate depends on the rows, particles times data, that are drawn at once",
    "growth": "How the rate changes (with it the cost of one log weight)",
    "memory": "Peak memory above model, data and what the process held, in MB",
}
FLOOR_ROWS = 1_000  # rows at once, so that activations stay in the cache
ROWS, ROWS_DATA = (340, 660, 1_340, 2_680, 5_360), 20  # rows drawn at once, and the data that share them


def main() -> None:
    parser = turns.parser_for(__doc__, rounds=5)
    parser.add_argument(
        "--num-particles", type=int, help=f"particles per image (default: {NUM_PARTICLES}; 500 with --quick)"
    )
    parser.add_argument("--memory-of", type=int, nargs=2, metavar=("DATA", "PARTICLES"), help=argparse.SUPPRESS)
    parser.add_argument("--tables", nargs="+", choices=TABLES, help="tables to measure (default: all)")
    parser.add_argument("--model", default="mlp", choices=FLOORS, help="model of the rates (default: mlp)")
    parser.add_argument("--bf16", action="store_true", help="also measure pyrovae with the model's layers in bfloat16")
    options = parser.parse_args()
    turns.prepare(options)
    if options.memory_of:
        print(*peak_memory(*options.memory_of, options))
        return
    particles = options.num_particles or (500 if options.quick else NUM_PARTICLES)
    num_data = 100 if options.quick else 600
    data, source = programs.images(num_data, options.data_dir, options.device)
    few = data[: 2 if options.quick else 10]
    tables, rows = {}, []
    measures = {
        "rates": lambda: rates(options.model, data, few, particles, options.rounds, options.bf16),
        "call": lambda: whole_calls(data[:100], particles, options.rounds),
        "rows": lambda: by_rows(data[:100], particles, options),
        "growth": lambda: growth(data, options),
        "memory": lambda: memory(options),
    }
    for name in options.tables or TABLES:
        measured, unit, ratio = measures[name]()
        tables[TABLES[name]] = turns.show(measured, unit, ratio)
        rows += measured
    turns.write(options, "Evaluation", tables, rows, data=source, num_data=num_data)


def rates(model: str, data, few, particles: int, rounds: int, bf16: bool) -> tuple[list[turns.Row], str, str]:
    competitors = {
        "pyrovae, compiled": pyrovae(data, particles, compile=True, model=model),
        "pyrovae, eager": pyrovae(data, particles, compile=False, model=model),
        "Pyro traces, datum by datum": pyro_traces(model, few, particles),
    }
    if bf16:
        competitors["pyrovae, compiled, bf16 layers"] = pyrovae(
            data, particles, compile=True, model=model, precision="bf16"
        )
    if model == "mlp":
        competitors["Pythae get_nll, batch_size=100"] = pythae(few, particles, batch_size=100)
        competitors["Pythae get_nll, batch_size=1000"] = pythae(few, particles, batch_size=1000)
    competitors.update(FLOORS[model](data, particles))
    rows = turns.in_turns(f"{model}, {particles:,} particles", competitors, rounds, base="floor")
    for row in rows:
        if row.rate:
            fixed = getattr(competitors[row.name], "fixed", 0.0)
            seconds = NUM_DATA * particles / row.rate + fixed
            row.note = f"{NUM_DATA:,} x {particles:,}: {seconds:,.0f} s" + (
                f", {fixed:.0f} of them before the first weight" if fixed else ""
            )
    return rows, "log weights/s", "x floor"


def whole_calls(data, particles: int, rounds: int) -> tuple[list[turns.Row], str, str]:
    """All that a user waits for, also what passes before the first weight."""
    measured = pyrovae(data, particles, compile=True)
    measured()  # `compile="auto"` compiles so short a call only if the code is in the cache
    measured.options["compile"] = "auto"

    def call() -> float:
        start = time.perf_counter()
        measured()
        return len(data) * particles / (time.perf_counter() - start)

    competitors = {"pyrovae, whole call": call, **products(data, particles)}
    return (
        turns.in_turns(f"mlp, {particles:,} particles", competitors, rounds, base="floor"),
        "log weights/s",
        "x floor",
    )


def by_rows(data, particles: int, options) -> tuple[list[turns.Row], str, str]:
    """A compiled evaluation by the number of rows drawn at once, beside the size that the library chooses."""
    competitors = {"the library's choice": pyrovae(data, particles, compile=True), **products(data, particles)}
    for rows in ROWS[:1] if options.quick else ROWS:
        sizes = {"data_batch_size": ROWS_DATA, "particle_batch_size": rows // ROWS_DATA}
        competitors[f"{rows:,}"] = pyrovae(data, particles, compile=True, **sizes)
    found = turns.in_turns("rows at once", competitors, options.rounds, base="floor")
    return found, "log weights/s", "x floor"


def growth(data, options) -> tuple[list[turns.Row], str, str]:
    rows = []
    for name, settings in growths(options.quick).items():
        competitors = {
            str(value): pyrovae(data[:some], count, compile=True, latent_dim=latent_dim)
            for value, some, count, latent_dim in settings
        }
        rows += turns.in_turns(name, competitors, 1 if options.quick else 3)
    return rows, "log weights/s", ""


def memory(options) -> tuple[list[turns.Row], str, str]:
    rows = [row for num_data, particles in sizes(options.quick) for row in memory_of(num_data, particles, options)]
    return rows, "MB", ""


def growths(quick: bool) -> dict[str, list[tuple[int, int, int, int]]]:
    """For each quantity varied: (its value, data, particles, latents)."""
    if quick:
        return {"particles": [(100, 50, 100, 50), (500, 50, 500, 50)]}
    return {
        "particles": [(s, min(600, 2_000_000 // s), s, 50) for s in (10, 100, 1000, 10_000, 100_000)],
        "latents": [(d, 300, 2000, d) for d in (2, 10, 50, 200)],
        "data": [(n, n, 2000, 50) for n in (50, 150, 600)],
    }


def sizes(quick: bool) -> list[tuple[int, int]]:
    """(data, particles) at which peak memory is measured."""
    return [(20, 2000)] if quick else [(1000, 100), (100, 5000), (1000, 5000), (20, 100_000)]


class Timed:
    """Time `pv.log_marginal_likelihood` from the first block of data on, by a hook on the encoder.

    Attributes:
        fixed: seconds before the first block, in the latest call.
    """

    def __init__(self, model: str, data, latent_dim: int, **options):
        self.data, self.num_particles, self.options = data, options["num_particles"], options
        self.model, self.guide = programs.ours(model, data, latent_dim)
        self.stamps: list[tuple[float, int]] = []
        self.guide.encoder_net.register_forward_pre_hook(self._stamp)

    def _stamp(self, module, inputs) -> None:
        if self.data.is_cuda:
            import torch

            torch.cuda.synchronize()
        self.stamps.append((time.perf_counter(), len(inputs[0])))

    def __call__(self) -> float:
        import pyrovae as pv

        self.stamps.clear()
        start = time.perf_counter()
        pv.log_marginal_likelihood(self.model, self.guide, self.data, **self.options)
        end = time.perf_counter()
        # The last encoder calls that together cover all data are the blocks; earlier calls are preparation.
        blocks, left = [], len(self.data)
        while left > 0:
            blocks.append(self.stamps.pop())
            left -= blocks[-1][1]
        blocks.reverse()
        self.fixed = blocks[0][0] - start
        return sum(size for _, size in blocks) * self.num_particles / (end - blocks[0][0])


def pyrovae(
    data,
    num_particles: int,
    *,
    compile: bool,
    latent_dim: int = programs.LATENT_DIM,
    model: str = "mlp",
    **options,
) -> Timed:
    return Timed(model, data, latent_dim, num_particles=num_particles, compile=compile, **options)


def pyro_traces(model: str, data, num_particles: int) -> Callable[[], float]:
    """A loop over data with the particles as the batch, as one writes it with Pyro."""
    import pyro
    import torch
    from pyro import poutine

    pyro.clear_param_store()
    vae = programs.PyroVAE(model, data)

    @torch.no_grad()
    def turn() -> float:
        start = time.perf_counter()
        for x in data:
            batch = x.expand(num_particles, -1)
            guide_trace = poutine.trace(vae.guide).get_trace(batch)
            model_trace = poutine.trace(poutine.replay(vae.model, guide_trace)).get_trace(batch)
            guide_trace.compute_log_prob()
            model_trace.compute_log_prob()
            log_weights = (
                sum(model_trace.nodes[name]["log_prob"] for name in ("z", "x")) - guide_trace.nodes["z"]["log_prob"]
            )
            (log_weights.logsumexp(0) - math.log(num_particles)).item()
        return len(data) * num_particles / (time.perf_counter() - start)

    return turn


def pythae(data, num_particles: int, batch_size: int) -> Callable[[], float] | str:
    if importlib.util.find_spec("pythae") is None:
        return turns.NOT_INSTALLED
    import torch

    vae = programs.pythae_vae(data).eval()

    @torch.no_grad()
    def turn() -> float:
        start = time.perf_counter()
        vae.get_nll(data, n_samples=num_particles, batch_size=batch_size)
        return len(data) * num_particles / (time.perf_counter() - start)

    return turn


def products(data, num_particles: int) -> dict[str, Callable[[], float]]:
    """The decoder's matrix products alone, in chunks that fit the cache, or larger ones on a GPU."""
    import torch

    rows = 100 * FLOOR_ROWS if data.is_cuda else FLOOR_ROWS
    z = torch.randn(rows, programs.LATENT_DIM, device=data.device)
    first = torch.randn(programs.LATENT_DIM, programs.HIDDEN, device=data.device)
    second = torch.randn(programs.HIDDEN, programs.PIXELS, device=data.device)
    hidden, pixels = (torch.empty(rows, width, device=data.device) for width in (programs.HIDDEN, programs.PIXELS))

    def decode():
        torch.mm(z, first, out=hidden)
        torch.mm(hidden, second, out=pixels)

    def in_medium():
        torch.set_float32_matmul_precision("medium")
        try:
            decode()
        finally:
            torch.set_float32_matmul_precision("highest")

    # "medium" chooses oneDNN on a CPU. Without bfloat16 instructions for products this is float32 as well, and faster
    # than MKL on processors of AMD. The difference to exact products tells which it is.
    decode()
    exact = pixels.clone()
    in_medium()
    is_float32 = (pixels - exact).abs().max() < 1e-4 * exact.abs().max()
    repeat = partial(repeated, data=data, rows=rows, num_particles=num_particles)
    if is_float32:
        return {"floor": lambda: max(repeat(decode), repeat(in_medium))}
    return {"floor": lambda: repeat(decode), "floor, bfloat16 or TF32 products": lambda: repeat(in_medium)}


def decoder_alone(data, num_particles: int) -> dict[str, Callable[[], float]]:
    import torch

    rows = 100 * FLOOR_ROWS if data.is_cuda else FLOOR_ROWS
    decoder = programs.networks("conv")[1].to(data.device)
    z = torch.randn(rows, programs.LATENT_DIM, device=data.device)
    return {"floor": lambda: repeated(lambda: decoder(z), data, rows, num_particles)}


def repeated(decode: Callable[[], object], data, rows: int, num_particles: int) -> float:
    """Rows per second of a tenth of all rows."""
    import torch

    repeats = max(1, len(data) * num_particles // rows // 10)
    with torch.no_grad():
        start = time.perf_counter()
        for _ in range(repeats):
            decode()
        if data.is_cuda:
            torch.cuda.synchronize()
    return repeats * rows / (time.perf_counter() - start)


FLOORS = {"mlp": products, "conv": decoder_alone}


def memory_of(num_data: int, num_particles: int, options: argparse.Namespace) -> list[turns.Row]:
    command = [sys.executable, __file__, "--memory-of", num_data, num_particles, "--threads", options.threads]
    command += ["--device", options.device, *(["--data-dir", options.data_dir] if options.data_dir else [])]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    why = done.stderr.strip().splitlines()[-1] if done.returncode else ""
    found = [None, None] if why else [float(word) for word in done.stdout.split()]
    size = f"{num_data:,} x {num_particles:,}"
    calls = ("first call, with the compiler", "later calls")
    return [
        turns.Row(size, call, rate, [] if rate is None else [rate], None, why)
        for call, rate in zip(calls, found, strict=True)
    ]


def peak_memory(num_data: int, num_particles: int, options: argparse.Namespace) -> list[float]:
    """Peak MB above what the process held before the call, for a first and a second call."""
    import torch

    import pyrovae as pv

    data, _ = programs.images(num_data, options.data_dir, options.device)
    model, guide = programs.ours("mlp", data)
    peaks = []
    for _ in range(2):
        if data.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
            before = _of_status("VmRSS")
        pv.log_marginal_likelihood(model, guide, data, num_particles=num_particles, compile=True)
        after = torch.cuda.max_memory_allocated() if data.is_cuda else _of_status("VmHWM")
        peaks.append((after - before) / 2**20)
    return peaks


def _of_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.disable(logging.INFO)  # of Pythae
    warnings.filterwarnings("ignore")  # of the other libraries
    main()
