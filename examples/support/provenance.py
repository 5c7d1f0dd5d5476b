"""Where a number comes from (command, versions, git revision), and JSON files that are never half written."""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def write_json(path, content) -> None:
    path = Path(os.path.realpath(path))  # write through a symbolic link
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)  # atomic: readers see the old file or the new one


def read_json(path, remedy: str, *names: str) -> dict:
    """Read a dict with these names; a damaged file raises ValueError with the path and the remedy."""
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it holds a {type(content).__name__}, expected a dict): {remedy}")
    if missing := [name for name in names if name not in content]:
        raise ValueError(f"{path} is damaged (it lacks {', '.join(missing)}): {remedy}")
    return content


def command(*more) -> str:
    """The command line of this program, with `more` arguments added."""
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
