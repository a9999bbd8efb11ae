"""Runs the tools with a fault at a chosen place, so that no test has to hit a moment.

`with_fault(FAULT, TOOL, ...)` is the command line of a tool in whose process `FAULT` was run first:
Python text that makes a step wait for a file, or a process kill itself there. The rest is the tool.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# What only a test that hangs ever waits for; a slow machine under load may need minutes.
PATIENCE_SECONDS = 300

# Ranges of a few kilobytes, and every range a journal.
SMALL_RANGES = """
from equilibrium_mcore.corpus import preprocess
preprocess.preprocess.__kwdefaults__.update(range_bytes=20_000, journal_seconds={seconds})
"""
# Encoding a text beyond byte {at} of its file waits until the file {go} is there.
HOLD = """
import pathlib, time
from equilibrium_mcore.corpus import workers
encode_range = workers.encode_range
def held(piece, *rest):
    while piece.spans[0].start > {at} and not pathlib.Path({go!r}).exists():
        time.sleep(0.01)
    return encode_range(piece, *rest)
workers.encode_range = held
"""
# A worker is killed, as by the kernel when memory runs out: at its start, or beyond byte {at}.
KILL_A_WORKER = """
import os, signal
from equilibrium_mcore.corpus import workers
encode_range, parent = workers.encode_range, os.getpid()
def killed(piece, *rest):
    if piece.spans[0].start >= {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_range(piece, *rest)
if {at} < 0:
    workers._start_worker = lambda: os.kill(os.getpid(), signal.SIGKILL)
workers.encode_range = killed
"""


def with_fault(fault: str, tool: str, *words: object) -> list[str]:
    """The command line; the tool sees `words` as its own."""
    path = REPOSITORY / "tools" / tool
    code = f"{fault}\nimport runpy, sys\nsys.argv[0] = {str(path)!r}\n"
    code += f"if __name__ == '__main__':\n    runpy.run_path({str(path)!r}, run_name='__main__')"
    return [sys.executable, "-c", code, *map(str, words)]


def environment() -> dict[str, str]:
    """The user's, with this checkout's package."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def wait_for(reached: Callable[[], object], alive: Callable[[], bool] = lambda: True) -> None:
    """Return when `reached`; fails when the process is not `alive` any more."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert alive(), "the process ended before it was where it should be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
