"""Commands, some at a time, with what is left of the time; stopped so that they can save."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

LOG_FILE = "log.txt"
TO_SAVE = 120  # seconds that a stopped run has before it is killed


class Job(NamedTuple):
    """A command whose output is kept in its folder."""

    name: str
    folder: Path
    command: Sequence[str]


class Running(NamedTuple):
    """A job at work."""

    job: Job
    process: subprocess.Popen
    since: float


def work_off(
    jobs: Sequence[Job], at_a_time: int, *, after: Callable[[Job], None] = lambda job: None
) -> None:
    """Run all; one that fails does not stop the others. Ended by a signal, they save first."""
    waiting, running, took = list(jobs), [], []
    started = time.monotonic()
    with _terminated_as_interrupted():
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time:
                    running.append(_start(waiting.pop(0)))
                for one in [r for r in running if r.process.poll() is not None]:
                    running.remove(one)
                    took.append(time.monotonic() - one.since)
                    left = (time.monotonic() - started) / len(took) * (len(jobs) - len(took))
                    print(
                        f"[{len(took)}/{len(jobs)}] {one.job.name}: {took[-1]:.0f} s, "
                        f"{left / 60:.0f} min left",
                        flush=True,
                    )
                    after(one.job)
                time.sleep(0.2)
        finally:
            _stop(running)


def _start(job: Job) -> Running:
    job.folder.mkdir(parents=True, exist_ok=True)
    # Not whole: the log of a process as it writes it; nothing reads it but people.
    with (job.folder / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            job.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            start_new_session=True,  # Ctrl-C reaches them through us alone, once
        )
    return Running(job, process, time.monotonic())


def _stop(running: Sequence[Running]) -> None:
    for one in running:
        one.process.terminate()
    for one in running:
        try:
            one.process.wait(TO_SAVE)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does."""

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
