"""Measure training throughput: pyrovae, Pyro's own example, NumPyro, Pythae, plain PyTorch and bare matrix products.

    pip install -e ".[bench]" && python examples/benchmarks/training.py --out runs/training

The unit is data per second of optimisation steps, with data in memory, float32, one particle and Adam. "Pyro as in its
example" is `SVI` with `pyro.optim.Adam`, `Trace_ELBO`, a VAE class as users write it, and Pyro's default validation.
pyrovae is `pv.fit` itself, after its eager epoch and the recording. How long a compiled `fit` takes to record, with compiled
code in the cache, stands in the last column. The floor is the time of the forward and backward matrix products alone or,
for models other than the MLP, of the networks alone. With `--device cuda` there is also a step by hand, with Adam,
captured whole as a CUDA graph.
"""

import contextlib
import functools
import importlib.util
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable

import programs
import turns

STEPS = {"full": 60, "quick": 8}
BATCH_SIZES = {"full": [64, 256, 1024, 4096], "quick": [256]}
MOST_DATA = 60_000


def main() -> None:
    parser = turns.parser_for(__doc__, rounds=7)
    parser.add_argument("--model", nargs="+", default=["mlp"], choices=[*programs.MODELS, "all"])
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, help="batch sizes (default: 64 256 1024 4096; 256 with --quick)"
    )
    parser.add_argument("--bf16", action="store_true", help="also measure pyrovae with networks in bfloat16")
    parser.add_argument(
        "--medium",
        action="store_true",
        help="also measure pyrovae and PyTorch by hand with products of medium precision",
    )
    options = parser.parse_args()
    turns.prepare(options)
    kind = "quick" if options.quick else "full"
    rows, tables, source = [], {}, ""
    for model in programs.MODELS if "all" in options.model else options.model:
        for batch_size in options.batch_sizes or BATCH_SIZES[kind]:
            num_data = max(1, min(STEPS[kind], MOST_DATA // batch_size)) * batch_size
            data, source = programs.images(num_data, options.data_dir, options.device)
            competitors = make_competitors(model, data, batch_size, options.bf16, options.medium)
            setting = f"{model}, batch {batch_size}"
            found = turns.in_turns(setting, competitors, options.rounds, base="Pyro as in its example")
            for row in found:
                if row.rate and not row.note and (recording := getattr(competitors[row.name], "recording", 0.0)):
                    row.note = f"recording {recording:.1f} s"
            rows += found
    tables["Images per second"] = turns.show(rows, "images/s", "x Pyro")
    turns.write(options, "Training", tables, rows, data=source)


def make_competitors(
    model: str, data, batch_size: int, bf16: bool, medium: bool
) -> dict[str, Callable[[], float] | str]:
    competitors: dict[str, Callable[[], float] | str] = {
        "Pyro as in its example": pyro_own_way(model, data, batch_size),
        "pyrovae, eager": Fit(model, data, batch_size, compile=False),
        "pyrovae, compiled": Fit(model, data, batch_size, compile=True),
    }
    if bf16:
        competitors["pyrovae, compiled, bf16 networks"] = Fit(model, data, batch_size, compile=True, precision="bf16")
    if medium:
        competitors["pyrovae, compiled, medium"] = Fit(model, data, batch_size, compile=True, precision="medium")
    if model in ("mlp", "conv", "vamp"):
        competitors["PyTorch by hand, eager"] = by_hand(model, data, batch_size, compiled=False)
        competitors["PyTorch by hand, compiled"] = by_hand(model, data, batch_size, compiled=True)
        if data.is_cuda:
            competitors["PyTorch by hand, CUDA graph"] = by_hand_in_a_graph(model, data, batch_size, compiled=False)
            competitors["PyTorch by hand, compiled, CUDA graph"] = by_hand_in_a_graph(model, data, batch_size, True)
        if medium:
            competitors["PyTorch by hand, compiled, medium"] = by_hand(model, data, batch_size, True, "medium")
    if model == "mlp":
        competitors["NumPyro, epoch jitted"] = numpyro(data, batch_size)
        competitors["Pythae"] = pythae(data, batch_size)
        # "medium" chooses oneDNN on a CPU: float32 as well, if the CPU has no bfloat16 products that oneDNN uses.
        competitors["matrix products alone"] = floor(data, batch_size, "highest")
        competitors["matrix products alone, medium"] = floor(data, batch_size, "medium")
    else:
        competitors["networks alone"] = networks_alone(model, data, batch_size)
    return competitors


def timed(epoch: Callable[[object], None], data, batch_size: int) -> float:
    """Data per second of epoch(order), including the wait for the device."""
    import torch

    wait = torch.cuda.synchronize if data.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    epoch(torch.randperm(len(data), device=data.device).split(batch_size))
    wait()
    return len(data) / (time.perf_counter() - start)


def pyro_own_way(model: str, data, batch_size: int) -> Callable[[], float]:
    import pyro
    from pyro.infer import SVI, Trace_ELBO

    pyro.clear_param_store()
    # Pyro has no such flows: use our programs, trained in Pyro's way.
    if model in ("nsf-prior", "iaf"):
        programs_of = programs.ours(model, data)
    else:
        vae = programs.PyroVAE(model, data)
        programs_of = vae.model, vae.guide
    svi = SVI(*programs_of, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())

    def epoch(order):
        total = 0.0
        for index in order:
            total += svi.step(data[index])

    return lambda: timed(epoch, data, batch_size)


class Fit:
    """Time `pv.fit` after its eager epoch and the recording.

    Attributes:
        recording: seconds of recording and compiling in the latest call; 0 without it.
    """

    def __init__(self, model: str, data, batch_size: int, **options):
        self.pair, self.data = programs.ours(model, data), data
        self.options = {"batch_size": batch_size, "device": data.device, "progress": False, **options}
        self.recording = 0.0

    def __call__(self) -> float:
        import pyrovae as pv

        history = pv.fit(*self.pair, self.data, epochs=4, **self.options).history
        _, second, _, last = (epoch["seconds"] for epoch in history)
        steady = (last - second) / 2
        if self.options["compile"]:  # the second epoch includes the recording
            self.recording = second - history[0]["seconds"] - steady
        return len(self.data) / steady


def by_hand(model: str, data, batch_size: int, compiled: bool, precision: str = "highest") -> Callable[[], float]:
    import torch

    vae = programs.TorchVAE(model, data)
    adam = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
    loss_of = torch.compile(vae) if compiled else vae

    def epoch(order):
        total = torch.zeros((), device=data.device)
        torch.set_float32_matmul_precision(precision)
        for index in order:
            adam.zero_grad(set_to_none=True)
            loss = loss_of(data[index])
            loss.backward()
            adam.step()
            total += loss.detach()
        total.item()
        torch.set_float32_matmul_precision("highest")

    return lambda: timed(epoch, data, batch_size)


def by_hand_in_a_graph(model: str, data, batch_size: int, compiled: bool) -> Callable[[], float]:
    """A step captured whole: rows, loss, gradients and Adam."""
    import torch

    vae = programs.TorchVAE(model, data)
    adam = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True, capturable=True)
    loss_of = torch.compile(vae) if compiled else vae
    rows = torch.arange(batch_size, device=data.device)
    total = torch.zeros((), device=data.device)

    def step():
        adam.zero_grad(set_to_none=True)
        loss = loss_of(data[rows])
        loss.backward()
        adam.step()
        total.add_(loss.detach())

    @functools.cache
    def captured():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as torch's notes say: run it first, on another stream than the default one
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph

    def epoch(order):
        graph = captured()  # in the first turn, which is for warming up
        total.zero_()
        for index in order:
            rows.copy_(index)
            graph.replay()
        total.item()

    return lambda: timed(epoch, data, batch_size)


def numpyro(data, batch_size: int) -> Callable[[], float] | str:
    if importlib.util.find_spec("numpyro") is None:
        return turns.NOT_INSTALLED
    state, run, _ = programs.numpyro_epoch(data, batch_size)

    def turn() -> float:
        nonlocal state
        start = time.perf_counter()
        _, state = run(state)
        return len(data) / (time.perf_counter() - start)

    return turn


def pythae(data, batch_size: int) -> Callable[[], float] | str:
    if importlib.util.find_spec("pythae") is None:
        return turns.NOT_INSTALLED
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    config = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch_size, learning_rate=1e-3, num_epochs=1
    )
    dataset = BaseDataset(data.cpu(), torch.zeros(len(data)))
    with contextlib.redirect_stderr(io.StringIO()):
        trainer = BaseTrainer(programs.pythae_vae(data), dataset, training_config=config)
        trainer.prepare_training()

    def turn() -> float:
        with contextlib.redirect_stderr(io.StringIO()):  # hide its progress bar
            start = time.perf_counter()
            trainer.train_step(1)
            return len(data) / (time.perf_counter() - start)

    return turn


def floor(data, batch_size: int, precision: str) -> Callable[[], float]:
    """The matrix products of a step: forward, and the gradients of each weight and of each input but the first."""
    import torch

    sizes = [
        (programs.PIXELS, programs.HIDDEN),
        (programs.HIDDEN, 2 * programs.LATENT_DIM),
        (programs.LATENT_DIM, programs.HIDDEN),
        (programs.HIDDEN, programs.PIXELS),
    ]
    layers = []
    for fan_in, fan_out in sizes:
        x, weight, y = (
            torch.randn(*shape, device=data.device)
            for shape in ((batch_size, fan_in), (fan_in, fan_out), (batch_size, fan_out))
        )
        layers.append((x, weight, y, torch.empty_like(x), torch.empty_like(weight), torch.empty_like(y)))

    @torch.no_grad()
    def epoch(order):
        torch.set_float32_matmul_precision(precision)
        for _ in order:
            for x, weight, _, _, _, out in layers:
                torch.mm(x, weight, out=out)
            for number, (x, weight, y, grad_x, grad_weight, _) in enumerate(layers):
                torch.mm(x.T, y, out=grad_weight)
                if number:
                    torch.mm(y, weight.T, out=grad_x)
        torch.set_float32_matmul_precision("highest")

    return lambda: timed(epoch, data, batch_size)


def networks_alone(model: str, data, batch_size: int) -> Callable[[], float]:
    import torch

    encoder, decoder = (net.to(data.device) for net in programs.networks(model))
    z = torch.randn(batch_size, programs.LATENT_DIM, device=data.device)
    parameters = [*encoder.parameters(), *decoder.parameters()]

    def epoch(order):
        for index in order:
            torch.autograd.grad(encoder(data[index]).sum() + decoder(z[: len(index)]).sum(), parameters)

    return lambda: timed(epoch, data, batch_size)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.disable(logging.INFO)  # of Pythae
    warnings.filterwarnings("ignore")  # of the other libraries
    main()
