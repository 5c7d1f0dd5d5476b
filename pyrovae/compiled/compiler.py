"""How this package calls torch's compiler, which library multiplies matrices, and what to do if its cache is damaged."""

import functools
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from pyrovae.compiled.lowering import lowered

__all__ = [
    "check_cache_is_writable",
    "compiled_by_inductor",
    "float32_products",
    "import_compiler",
    "remove_damaged_library",
]

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compiled_by_inductor(graph: torch.fx.GraphModule) -> Callable:
    # Draw the same noise as the eager program: use the eager generator, and keep the order of the draws. In torch 2.11
    # both passes that reorder operations can swap two draws.
    options: dict[str, Any] = {
        "fallback_random": True,
        "reorder_for_locality": False,
        "reorder_for_peak_memory": False,
        "layout_optimization": not _keeps_layout(graph),
        # Compute a product and a sum in one instruction. It is faster and rounds once, not twice as eager torch does.
        "cpp.enable_floating_point_contract_flag": "fast",
        # No guards: `Recording` has already checked everything that a guard would check.
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
    }
    return torch.compile(lowered(graph), fullgraph=True, dynamic=False, options=options)


def _keeps_layout(graph: torch.fx.GraphModule) -> bool:
    """Whether to keep images as they are, instead of moving their channels to the last dimension.

    Channels at the end make convolutions a little faster, so that an evaluation takes 0.8 of the time. But the compiled
    gradient of a normalisation layer is several times slower then, and a step of a convolutional VAE takes 1.2 to 1.5
    times as long.
    """
    gradients = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution_backward.default)
    return any(node.args[0].meta["val"].device.type == "cpu" for node in gradients)


@contextmanager
def float32_products(medium: bool = False) -> Iterator[None]:
    """Multiply float32 matrices on a CPU by the faster library within this context: oneDNN or MKL.

    MKL keeps to AVX2 on processors of AMD, and oneDNN uses their AVX-512: twice as fast, with the same float32
    arithmetic. torch has one switch that sends float32 products to oneDNN, and it also allows bfloat16 inside, which
    oneDNN uses only on processors with AMX. There, it is turned on only for `medium`.

    Args:
        medium: Allow bfloat16 inside the products (torch's "medium" precision), TensorFloat32 on a GPU. Changes nothing
            on other hardware.
    """
    if not (medium or _prefers_onednn()):
        yield
        return
    backends: Any = torch.backends
    switches = [(backends.mkldnn.matmul, "bf16"), *([(backends.cuda.matmul, "tf32")] if medium else [])]
    before = [switch.fp32_precision for switch, _ in switches]
    try:
        for switch, precision in switches:
            switch.fp32_precision = precision
        yield
    finally:
        for (switch, _), precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


@functools.cache
def _prefers_onednn() -> bool:
    """Whether this is a processor of AMD with AVX-512, on which oneDNN's products are exact in float32."""
    processor = ""
    with suppress(OSError):
        processor = Path("/proc/cpuinfo").read_text()
    if "AuthenticAMD" not in processor or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    numbers = torch.full((256, 256), 1 + 2.0**-12, dtype=torch.float32, device="cpu")  # bfloat16 would round them to 1
    with float32_products(medium=True):
        return bool(((numbers @ torch.eye(256, dtype=torch.float32, device="cpu")) == numbers).all())


def import_compiler() -> None:
    """Import `torch._dynamo` even if Inductor's cache folder cannot be created.

    torch creates that folder during the import, which its optimizers trigger. If that fails, the module stays half
    imported, and no optimizer can be created in this process. So the import gets a folder that exists; nothing is
    written to it.
    """
    if "torch._dynamo" in sys.modules:
        return
    before = os.environ.get(_CACHE)
    try:
        os.makedirs(before or tempfile.gettempdir(), exist_ok=True)
    except OSError:
        os.environ[_CACHE] = os.path.abspath(os.sep)
    try:
        importlib.import_module("torch._dynamo")
    finally:
        if before is not None:
            os.environ[_CACHE] = before
        else:
            os.environ.pop(_CACHE, None)


def check_cache_is_writable() -> None:
    """Raise OSError if Inductor cannot write to its cache."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with tempfile.TemporaryFile(dir=cache_dir()):
        pass


def remove_damaged_library(error: Exception) -> bool:
    """Remove the damaged library in Inductor's cache that caused an error; return False if there is none.

    A process that is killed while it compiles leaves such a library.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    found = re.search(rf"{re.escape(cache_dir())}[^\s:]*\.so", str(error))
    if found is None or not os.path.exists(found[0]):
        return False
    os.unlink(found[0])
    return True
