"""Commands, some at a time, with what is left of the time; stopped so that they can save."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
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
    place: int
    """Among those that run at a time."""
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
                    free = min(set(range(at_a_time)) - {one.place for one in running})
                    running.append(_start(waiting.pop(0), free, at_a_time))
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


def _start(job: Job, place: int, at_a_time: int) -> Running:
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
    _share_cores(process.pid, place, at_a_time)
    return Running(job, place, process, time.monotonic())


def _share_cores(process: int, place: int, at_a_time: int) -> None:
    """Give each of the jobs its own cores, of which a run makes its number of threads.

    Threads of several runs on the same cores mostly wait for each other, and their waiting is CPU
    time: on 2 busy cores a step of 0.12 s took 3 s.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[place::at_a_time] or [cores[place % len(cores)]]
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process, mine)


def _stop(running: Sequence[Running]) -> None:
    for one in running:
        one.process.terminate()
    for one in running:
        try:
            one.process.wait(TO_SAVE)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does."""

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
