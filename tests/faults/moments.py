"""Moments of a run that is watched from outside, drawn from a seed, and who dies there."""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from equilibrium_mcore.checkpoint.directory import checkpoints_directory, list_checkpoints, step_of
from tests.faults.bench import PATIENCE_SECONDS, Bench, Job, expect, logged_steps

LOOK_SECONDS = 0.001  # a small save takes some hundredths of a second
_BEGINS = re.compile(r"^step\s+(\d+)/\d+ \| (?:start|resume):", re.MULTILINE)


def await_moment(bench: Bench, run: Path, job: Job, rng: random.Random, *, steps: int) -> str:
    """Return at a moment that is drawn, or when the job has ended; which one it was, in words."""
    kind = rng.choice(("starting", "starting", "at a step", "in a save", "in a save", "renamed"))
    seen = {path.name for path in _entries(checkpoints_directory(run))}
    if kind == "starting":
        seconds = rng.uniform(0, 1.3) * bench.start_seconds
        until = time.monotonic() + seconds
        _look(job, lambda: time.monotonic() > until)
        return f"{seconds:.2f} s after its start"
    if kind == "at a step":
        step = logged_steps(run) + rng.randint(1, 3)
        _look(job, lambda: logged_steps(run) >= min(step, steps))
        time.sleep(rng.uniform(0, 0.1))
        return f"after step {step}"
    if kind == "renamed":  # between the name, `latest`, and the removal of the oldest
        _look(job, lambda: any(p.name not in seen for p in list_checkpoints(run)))
        return "while a checkpoint got its name"
    files = rng.randint(0, 5)
    _look(job, lambda: _files_of_a_save(run) >= files)
    return f"in a save, with {files} files"


def died(process: psutil.Process) -> bool:
    """SIGKILL; False where it had ended before."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def members(job: Job) -> dict[str, list[psutil.Process]]:
    """A run's processes: the command, the helper that forks its ranks, ranks, writers."""
    family = job.family()
    found: dict[str, list[psutil.Process]] = {
        "command": family[:1], "helper": [], "rank": [], "writer": []
    }  # fmt: skip
    for process in family[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("writer_process" in word for word in process.cmdline()):
                found["writer"].append(process)
            elif process.ppid() == family[0].pid:
                found["helper"].append(process)
            else:
                found["rank"].append(process)
    return {kind: some for kind, some in found.items() if some}


def newest_steps(run: Path) -> set[int]:
    """The steps that a run may rightly continue from: what `latest` names, and the newest."""
    steps = {step for path in list_checkpoints(run) if (step := step_of(path)) is not None}
    with contextlib.suppress(OSError):
        named = (checkpoints_directory(run) / "latest").read_text(encoding="utf-8").strip()
        return {int(named.removeprefix("step_")), max(steps)}
    return {max(steps, default=0)}


def began_at(job: Job) -> int | None:
    """The step from which the job trained; None where it did not come so far."""
    found = _BEGINS.search(job.text())
    return int(found[1]) if found else None


def check_beginning(job: Job, allowed: set[int]) -> None:
    """It continued the newest whole checkpoint, if it came so far."""
    began = began_at(job)
    expect(began is None or began in allowed, f"it begins at {sorted(allowed)}", job.text())


def _look(job: Job, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while job.process.poll() is None and not holds():
        expect(time.monotonic() < deadline, "the run comes to its next moment", job.text())
        time.sleep(LOOK_SECONDS)


def _files_of_a_save(run: Path) -> int:
    """How many files the save has that is being written; -1 while there is none."""
    for partial in _entries(checkpoints_directory(run)):
        if partial.name.endswith(".partial"):
            return len(_entries(partial / "content"))
    return -1


def _entries(folder: Path) -> Sequence[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
