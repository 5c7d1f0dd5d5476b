"""Wall time and CPU time of a run. Other processes on the machine hardly change the CPU time."""

import os
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from support.script import read_json, write_json


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children, such as compilers."""
    return sum(os.times()[:4])


class Clock:
    """Wall and CPU seconds of each activity, summed over all sessions of a run.

    The file is written every few seconds, so that a killed session loses little.
    """

    EVERY = 10.0

    def __init__(self, path: Path):
        self.path = path
        remedy = "delete it to continue; this loses the seconds of earlier sessions"
        self.seconds = read_json(path, remedy) if path.exists() else {}

    @contextmanager
    def __call__(self, name: str):
        before, started, ended = dict(self.seconds), (time.perf_counter(), cpu_seconds()), Event()

        def note():
            for kind, begin, now in zip(("wall", "cpu"), started, (time.perf_counter(), cpu_seconds()), strict=True):
                self.seconds[f"{name}_{kind}"] = before.get(f"{name}_{kind}", 0.0) + now - begin
            write_json(self.path, self.seconds)

        def watch():
            while not ended.wait(self.EVERY):
                note()

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            note()
