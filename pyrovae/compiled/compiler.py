"""torch's compiler as it is called here, and what can be in its way: a cache that cannot be written, or a damaged one."""

import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["compiled_by_inductor", "import_compiler", "refuse_unwritable_cache", "remove_damaged_library"]

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compiled_by_inductor(graph: torch.fx.GraphModule) -> Callable:
    # The eager generator, and its draws in the eager order, so that the noise is that of the eager program: in torch 2.11
    # both passes that reorder operations move draws past each other.
    options: dict[str, Any] = {
        "fallback_random": True,
        "reorder_for_locality": False,
        "reorder_for_peak_memory": False,
        # `Extracted` has compared with the recording whatever a guard would look at.
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
    }
    return torch.compile(graph, fullgraph=True, dynamic=False, options=options)


def import_compiler() -> None:
    """Import `torch._dynamo`, as torch's optimizers do, also if the folder of Inductor's cache cannot be made.

    torch makes that folder during the import. If it fails, the module stays half imported, and no optimizer can be made in
    this process any more. So the import is given a folder that exists; nothing is written into it.
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


def refuse_unwritable_cache() -> None:
    """Raise OSError if Inductor cannot write what it compiles."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with tempfile.TemporaryFile(dir=cache_dir()):
        pass


def remove_damaged_library(error: Exception) -> bool:
    """Whether a library in Inductor's cache was in the way, as a process killed while it compiled leaves one; it is removed."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    found = re.search(rf"{re.escape(cache_dir())}[^\s:]*\.so", str(error))
    if found is None or not os.path.exists(found[0]):
        return False
    os.unlink(found[0])
    return True
