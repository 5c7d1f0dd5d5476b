"""Programs in processes of their own, forked from one that has imported torch, Pyro and the compiler already.

The imports take 3 to 10 seconds of a core, more than most of these programs. All warnings are errors, as with
`python -W error`. What the imports themselves do, and settings that they read, need a fresh interpreter instead.
"""

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from contextlib import suppress
from functools import cache
from pathlib import Path
from unittest.mock import patch

# In place of ArviZ, whose first import on a day warns, the packages that it takes long to import.
_IMPORTED = ["pyrovae", "matplotlib.pyplot", "scipy.stats", "sklearn.datasets", "xarray"]
_IMPORTED += ["torch._inductor.compile_fx", "torch.fx.experimental.proxy_tensor"]
# The environment as it is before any test changes it, and no pool of compilers, because it cannot be forked.
_SERVER = {**os.environ, "PYTHONWARNINGS": "error", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
_ROOT = Path(__file__).parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_IMPORTED)


class Program:
    """A running program, with the methods of `subprocess.Popen`.

    Args:
        program: path of a script, or code.
        arguments: of its command line.
        cwd: its folder.
        environment: variables to set beside those of this process.
    """

    def __init__(self, program, *arguments, cwd=None, **environment):
        self._outputs = [_new_file() for _ in ("stdout", "stderr")]
        environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        given = (program, [*map(str, arguments)], cwd or os.getcwd(), environment, self._outputs)
        self._process = _context.Process(target=_run, args=given)
        # The first start also starts the process that all are forked from.
        with patch.dict(os.environ, _SERVER, clear=True):
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait_for(self, line):
        """Wait until the program has printed this line."""
        has_ended = False
        while line not in self._outputs[0].read_text().splitlines():
            assert not has_ended, self.communicate()[1]
            time.sleep(0.01)
            has_ended = self.poll() is not None

    def communicate(self, timeout=None):
        """Wait for the end, and return (stdout, stderr)."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._outputs[0], timeout)
        return tuple(path.read_text() for path in self._outputs)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number):
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)


def run(program, *arguments, cwd=None, timeout=600, **environment):
    """Run a program to its end, as `subprocess.run`; for the arguments see `Program`."""
    running = Program(program, *arguments, cwd=cwd, **environment)
    try:
        stdout, stderr = running.communicate(timeout)
    finally:
        running.kill()
    return subprocess.CompletedProcess([program, *arguments], running.returncode, stdout, stderr)


def _run(program, arguments, cwd, environment, outputs):
    """Become the program: leave nothing of the process that it was forked from but imported modules."""
    import numpy

    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    numpy.random.seed()  # noqa: NPY002
    multiprocessing.set_start_method(None, force=True)
    ours = (_ROOT / "tests", _ROOT / "examples")
    sys.path[:] = [
        path for path in sys.path if not any(Path(path).absolute().is_relative_to(folder) for folder in ours)
    ]
    is_script = isinstance(program, Path)
    sys.argv = [str(program) if is_script else "-c", *arguments]
    sys.path.insert(0, str(program.parent) if is_script else "")
    if is_script:
        runpy.run_path(str(program), run_name="__main__")
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(main))


def _new_file():
    number, path = tempfile.mkstemp(dir=_folder())
    os.close(number)
    return Path(path)


@cache
def _folder():
    folder = tempfile.mkdtemp()
    atexit.register(_clean_up, folder)
    return folder


def _clean_up(folder):
    for process in multiprocessing.active_children():  # of tests that failed: Python would wait for them
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)
