"""Where a number comes from: command, machine and versions, stored beside it."""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def write_json(path, content) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)  # whole at any moment


def command(*more) -> str:
    """How this program was called, and perhaps more."""
    return shlex.join([sys.executable, *sys.argv, *more])


def versions() -> dict[str, str]:
    packages = ("pyrovae", "torch", "torchvision", "pyro-ppl", "zuko", "arviz", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
