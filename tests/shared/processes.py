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
from pathlib import Path

_IMPORTED = (
    "pyrovae",
    "torch.fx.experimental.proxy_tensor",
    "torch._inductor.compile_fx",
    "matplotlib.pyplot",
    "arviz",
)
_SERVER = {
    "PYTHONWARNINGS": "error",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}  # no pool of compilers, which cannot be forked
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(_IMPORTED))
_OUTPUTS = tempfile.mkdtemp()
atexit.register(shutil.rmtree, _OUTPUTS, ignore_errors=True)


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
        before = dict(os.environ)
        os.environ.update(_SERVER)  # the first start starts the process that all are forked from
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait_for(self, line):
        """Wait until the program has printed this line."""
        while line not in self._outputs[0].read_text().splitlines():
            assert self.poll() is None, self.communicate()[1]
            time.sleep(0.01)

    def communicate(self, timeout=None):
        """Wait for the end, and return (stdout, stderr)."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._outputs[0], timeout)
        return tuple(path.read_text() for path in self._outputs)

    def kill(self):
        self._process.kill()

    def send_signal(self, number):
        os.kill(self.pid, number)


def run(program, *arguments, cwd=None, timeout=600, **environment):
    """Run a program to its end, as `subprocess.run`; for the arguments see `Program`."""
    running = Program(program, *arguments, cwd=cwd, **environment)
    try:
        stdout, stderr = running.communicate(timeout)
    finally:
        running.kill()
    return subprocess.CompletedProcess([program, *arguments], running.returncode, stdout, stderr)


def _new_file():
    number, path = tempfile.mkstemp(dir=_OUTPUTS)
    os.close(number)
    return Path(path)


def _run(program, arguments, cwd, environment, outputs):
    import numpy

    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    numpy.random.seed()  # noqa: NPY002  # it would be that of all others forked
    is_script = isinstance(program, Path)
    sys.argv = [str(program) if is_script else "-c", *arguments]
    sys.path.insert(0, str(program.parent) if is_script else "")
    if is_script:
        runpy.run_path(str(program), run_name="__main__")
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(main))
