"""What workers of a pool do in its tests: functions of a module that any process can import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def note_process(folder: Path) -> None:
    """Leave a file that is called as this process."""
    (folder / str(os.getpid())).touch()


def later_for_earlier(task: int, folder: Path) -> int:
    """The square of a task; task 0 waits for task 1, so results are made out of order."""
    while task == 0 and not (folder / "1.done").exists():
        time.sleep(0.01)
    (folder / f"{task}.done").touch()
    return task * task


def wait_for(task: int, folder: Path) -> int:
    """Note that the task has begun, and wait for the file `go`."""
    (folder / f"{task}.begun").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    return task


def fail_or_die(task: int, how: str) -> int:
    """Task 2 raises, or is killed as by a lack of memory."""
    if task == 2 and how == "raises":
        raise ValueError(f"task {task} is bad")
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return task
