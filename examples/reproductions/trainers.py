"""Train the network of `mnist_svi.py` in several libraries, with their defaults, and save weights at intervals.

Each trainer is called as train(grey, snapshots, epochs) with images (N, 784) in [0, 1], which are binarised anew at
every use. It saves its weights in the form of this library's pair (`pair()`), so that one estimator measures them all.
"""

import contextlib
import importlib.util
import inspect
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks import programs
from clock import cpu_seconds
from torch import Tensor

import pyrovae as pv

BATCH_SIZE = {"pyro": 256, "numpyro": 128}  # as in the examples of these libraries; Pythae has it in its configuration
GROWTH = 1.25  # factor between the times of two snapshots
FIRST = 5.0  # seconds until the first snapshot
DEFAULT_SCHEDULE = inspect.signature(pv.fit).parameters["schedule"].default


class Enough(Exception):
    """Raised when the time budget is spent."""


class Snapshots:
    """Save the weights to files at growing intervals of training time.

    Time is CPU time of the process and of the compilers that it started. Other load on the machine hardly changes it.
    The clock stops while weights are written.
    """

    def __init__(self, folder: Path, budget: float, first: float = FIRST):
        self.folder, self.budget, self.next, self.number = folder, budget, first, 0
        self.cpu, self.wall = cpu_seconds(), time.perf_counter()

    @property
    def seconds(self) -> float:
        return cpu_seconds() - self.cpu

    def look(self, export: Callable[[], dict], *, last: bool = False) -> None:
        """Save the weights if a snapshot is due; raise Enough if the budget is spent."""
        seconds, wall = self.seconds, time.perf_counter() - self.wall
        if not last and seconds < min(self.next, self.budget):
            return
        began, began_wall = cpu_seconds(), time.perf_counter()
        path = self.folder / f"{self.number:03}.pt"
        torch.save({"seconds": seconds, "wall": wall, **export()}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        self.number += 1
        self.next = max(self.next, seconds) * GROWTH
        self.cpu += cpu_seconds() - began
        self.wall += time.perf_counter() - began_wall
        if seconds >= self.budget and not last:
            raise Enough


def pair(data_mean: Tensor | None = None) -> tuple[pv.GenerativeModel, pv.guides.Guide]:
    """Model and guide with the defaults of `mnist_svi.py`, for images (N, 784)."""
    trunk, decoder = programs.networks("deep")
    latent_dim = programs.latents("deep")
    guide = pv.guides.MeanFieldNormal(trunk, latent_dim)
    likelihood = pv.likelihoods.Bernoulli(decoder, [programs.PIXELS], data_mean=data_mean)
    return pv.GenerativeModel(pv.priors.StandardNormal(latent_dim), likelihood), guide


def pyrovae(grey: Tensor, snapshots: Snapshots, epochs: int, validation: Tensor | None = None) -> None:
    """Train with the defaults of `mnist_svi.py`, except for the number of epochs."""
    model, guide = pair(grey.mean(0))

    def export():
        return {"model": model.state_dict(), "guide": guide.state_dict()}

    def schedule(done):  # called at every step
        snapshots.look(export)
        return DEFAULT_SCHEDULE(done)

    pv.fit(
        model,
        guide,
        grey,
        transform=pv.data.binarize,
        validation=validation,
        epochs=epochs,
        batch_size=200,
        learning_rate=3e-3,
        schedule=schedule,
        device="cpu",
        progress=False,
    )
    snapshots.look(export, last=True)


def pyro_example(grey: Tensor, snapshots: Snapshots, epochs: int) -> None:
    """Train as Pyro's VAE example does: `SVI`, `pyro.optim.Adam` at 1e-3, `Trace_ELBO`, batches of 256."""
    import pyro
    from pyro.infer import SVI, Trace_ELBO

    vae = programs.PyroVAE("deep", grey)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(epochs):
        for index in torch.randperm(len(grey)).split(BATCH_SIZE["pyro"]):
            svi.step(pv.data.binarize(grey[index]))
            snapshots.look(lambda: from_pyro(vae))


def from_pyro(vae: programs.PyroVAE) -> dict:
    heads = vae.loc.state_dict(), vae.log_scale.state_dict()
    head = {name: torch.cat([part[name] for part in heads]) for name in ("weight", "bias")}
    return exported(vae.trunk.state_dict(), head, vae.decoder.state_dict())


def numpyro(grey: Tensor, snapshots: Snapshots, epochs: int) -> None:
    """Train as NumPyro's VAE example does: each epoch jitted, Adam at 1e-3, batches of 128."""
    state, run, parameters = programs.numpyro_epoch(grey, BATCH_SIZE["numpyro"], "deep", dynamic=True)
    for _ in range(epochs):
        _, state = run(state)
        snapshots.look(lambda state=state: from_numpyro(parameters(state)))


def from_numpyro(parameters: dict[str, Any]) -> dict:
    (*trunk, head), decoder = (stax_layers(parameters[f"{name}$params"]) for name in ("encoder", "decoder"))
    return exported(mlp_state(trunk), head, mlp_state(decoder))


def stax_layers(parameters: Any) -> list[dict[str, Tensor]]:
    """Weights and biases of the layers that have any, with matrices transposed to torch's layout."""
    import numpy as np

    layers = [[torch.as_tensor(np.array(array)) for array in layer] for layer in parameters if len(layer)]
    return [{"weight": weight.T.contiguous() if weight.ndim == 2 else weight, "bias": bias} for weight, bias in layers]


def mlp_state(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The state of a `pv.nets.MLP` with LayerNorm from its layers, whose numbers are 1, 2, 4, 5 and 7."""
    places = (number + 1 + number // 2 for number in range(len(layers)))
    return {
        f"layers.{place}.{name}": value
        for place, layer in zip(places, layers, strict=False)
        for name, value in layer.items()
    }


def pythae(grey: Tensor, snapshots: Snapshots, epochs: int) -> None:
    """Train with Pythae's trainer and its default configuration: Adam at 1e-4, batches of 64."""
    from pythae.data.datasets import BaseDataset, DatasetOutput
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    class Redrawn(BaseDataset):
        def __getitem__(self, index):
            return DatasetOutput(data=pv.data.binarize(self.data[index]), labels=self.labels[index])

    class Look(TrainingCallback):
        def on_train_step_end(self, training_config, **_):
            snapshots.look(lambda: from_pythae(vae))

    vae = programs.pythae_vae(grey, "deep")
    config = BaseTrainerConfig(output_dir=tempfile.mkdtemp(), num_epochs=epochs)
    with contextlib.redirect_stderr(io.StringIO()):  # hide its progress bar
        trainer = BaseTrainer(vae, Redrawn(grey, torch.zeros(len(grey))), training_config=config, callbacks=[Look()])
        trainer.prepare_training()
        for epoch in range(1, epochs + 1):
            trainer.train_step(epoch)


def from_pythae(vae: Any) -> dict:
    encoder, half = vae.encoder.state_dict(), programs.latents("deep")
    head = {name: encoder[f"head.{name}"].clone() for name in ("weight", "bias")}
    for value in head.values():
        value[half:] /= 2  # from the logarithm of a variance to that of a standard deviation
    trunk = {name.removeprefix("trunk."): value for name, value in encoder.items() if name.startswith("trunk.")}
    decoder = {name.removeprefix("net."): value for name, value in vae.decoder.state_dict().items()}
    return exported(trunk, head, decoder)


def exported(trunk: dict[str, Tensor], head: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict:
    """The states of `pair()` from those of its networks; the likelihood's own bias is zero."""
    guide = {f"encoder_net.{name}": value for name, value in trunk.items()}
    model = {f"likelihood.decoder_net.{name}": value for name, value in decoder.items()}
    return {
        "guide": guide | {f"head.{name}": value for name, value in head.items()},
        "model": model | {"likelihood.bias": torch.zeros(programs.PIXELS)},
    }


PACKAGES = {
    "numpyro": ("numpyro", "jax.example_libraries.stax"),
    "pythae": ("pythae.trainers",),
}  # imported before the clock starts


def missing_package(library: str) -> str | None:
    """The first package that a library needs and that is not installed, or None."""
    names = (name.partition(".")[0] for name in PACKAGES.get(library, ()))
    return next((name for name in names if importlib.util.find_spec(name) is None), None)


TRAINERS = {"pyrovae": pyrovae, "pyro": pyro_example, "numpyro": numpyro, "pythae": pythae}
