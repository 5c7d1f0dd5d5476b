"""What every script needs: options with clear errors, JSON files that are never half written, where a number comes from."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("pyrovae", "torch", "torchvision", "pyro-ppl", "zuko", "arviz", "numpy", "numpyro", "jax", "pythae")


def parser_of(description) -> argparse.ArgumentParser:
    """A parser that reports an error in one line, without printing the usage, and takes options by their whole names."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help explains the options)\n")
    return parser


def positive(kind):
    return checked(kind, "positive", lambda value: value > 0)


def not_negative(kind):
    return checked(kind, "0 or more", lambda value: value >= 0)


def checked(kind, name, accepts):
    def parse(text):
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {name}, found {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in errors
    return parse


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
    return shlex.join([Path(sys.executable).name, *sys.argv, *more])


def versions() -> dict[str, str]:
    """The versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
