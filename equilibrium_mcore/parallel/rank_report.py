"""What is said of ranks that failed, and where ranks are that do not end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Mapping

from equilibrium_mcore.parallel.rank_job import REFUSED, TOLD, Job, JobOutcome
from equilibrium_mcore.processes.stacks import STACKS_SIGNAL

ANSWER_SECONDS = 5.0
SETTLED_SECONDS = 0.2


def failures(job: Job, failed: Iterable[tuple[int, int]]) -> JobOutcome:
    """Failures, earliest first: a rank's own error comes before the broken connections.

    `failed` holds (rank, exit code). The first has its traceback, the others a line each; a setting
    that the first refused is reported alone, as it would be by a process without ranks.
    """
    failed = list(failed)
    stories = []
    for rank, code in failed:
        path = job.file(rank, "traceback")
        if path.exists():
            when, _, text = path.read_text(encoding="utf-8").partition("\n")
            stories.append((float(when), rank, text.strip()))
        else:  # killed, for example by the kernel for want of memory: it could not tell
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            stories.append((0.0, rank, f"it ended by {reason} without a traceback"))
    stories.sort()
    (_, first, text), *others = stories
    if dict(failed)[first] in (REFUSED, TOLD):
        refused = dict(failed)[first] == REFUSED
        return JobOutcome(failure=text, refused=refused, told=not refused)
    signalled = max(0, -dict(failed)[first])
    lines = [f"rank {first} failed first:", text]
    lines += [f"rank {rank} then failed: {said.splitlines()[-1][:200]}" for _, rank, said in others]
    lines.append(f"the other ranks were stopped ({len(stories)} failed)")
    return JobOutcome(failure="\n".join(lines), signalled=signalled)


def stacks(job: Job, running: Mapping[int, int]) -> str:
    """The stack of every thread of the ranks that run, `running` by pid; asks them by a signal."""
    known = {rank: _written(job, rank) for rank in running.values()}
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACKS_SIGNAL)
    _await_answers(job, known)
    parts = []
    for pid, rank in sorted(running.items(), key=lambda item: item[1]):
        with contextlib.suppress(OSError):
            text = job.file(rank, "stack").read_bytes()[known[rank] :].decode(errors="replace")
            parts.append(f"rank {rank} (pid {pid}):\n{text.strip() or 'it did not answer'}")
    return "\n\n".join(parts)


def _await_answers(job: Job, known: dict[int, int]) -> None:
    """Until every rank has written, and no more, or ANSWER_SECONDS are over."""
    deadline, before = time.monotonic() + ANSWER_SECONDS, {}
    while time.monotonic() < deadline:
        now = {rank: _written(job, rank) for rank in known}
        if now == before and all(now[rank] > known[rank] for rank in known):
            return
        before = now
        time.sleep(SETTLED_SECONDS)


def _written(job: Job, rank: int) -> int:
    path = job.file(rank, "stack")
    return path.stat().st_size if path.exists() else 0
