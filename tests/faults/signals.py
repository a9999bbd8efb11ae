"""Signals that ask a run to stop, many times to one run."""

from __future__ import annotations

import random
import signal
from pathlib import Path

from equilibrium_mcore.checkpoint.directory import list_checkpoints, step_of
from tests.faults.bench import STEPS, Bench, Job, expect, logged_steps, no_traceback
from tests.faults.moments import await_moment, check_beginning, members, newest_steps

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def chain_of_signals(
    bench: Bench, rng: random.Random, name: str, *, signals: int | None = None
) -> tuple[str, int]:
    """A run that is asked to stop three to six times, or `signals`, and started again each time."""
    beside = rng.random() < 0.4
    run, told = bench.new_run(name), []
    words = ("checkpoint.asynchronous=true",) if beside else ()
    pids: set[int] = set()
    for _ in range(signals or rng.randint(3, 6)):
        allowed = newest_steps(run)
        job = bench.start(run, *words)
        moment = await_moment(bench, run, job, rng, steps=STEPS)
        pids |= {process.pid for some in members(job).values() for process in some}
        number = rng.choice(SIGNALS)
        job.process.send_signal(number)
        status = job.wait()
        check_beginning(job, allowed)
        told.append(f"{number.name} {moment}, status {status}")
        _check_stopped(run, job, number, status)
        if logged_steps(run) == STEPS:
            break
    allowed = newest_steps(run)
    check_beginning(bench.finish(run, *words), allowed)
    bench.check_left(pids)
    return "; ".join(told), len(told)


def _check_stopped(run: Path, job: Job, number: signal.Signals, status: int) -> None:
    no_traceback(job)
    expect(status in (0, -number, 128 + number), "the status is the signal's, or 0", job.text())
    if status == 0:
        steps = [step_of(path) for path in list_checkpoints(run)]
        expect(logged_steps(run) in steps, "the step that ran was saved", (steps, job.text()))
