"""Seconds on the wall, and those of the process on its cores, which others on the machine hardly change."""

import os
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from support.provenance import read_json, write_json


def cpu_seconds() -> float:
    """Of this process, and of its children that have ended: compilers."""
    return sum(os.times()[:4])


class Clock:
    """Seconds on the wall and on the process's cores, by what was done, over all sessions of a run.

    Its file is written every few seconds, so that little is lost of a session that is killed.
    """

    EVERY = 10.0

    def __init__(self, path: Path):
        self.path = path
        remedy = "delete it to go on; the seconds of earlier sessions are lost"
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
