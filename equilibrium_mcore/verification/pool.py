"""Worker processes that are killed when a task takes too long, and started again.

A task that never ends (a number too large, a loop in a library) costs its own result alone. The
workers are fresh interpreters, not forks, since whoever scores may have threads and a GPU; they end
with this process. Tasks go one at a time, so a killed worker takes no other task with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

START_SECONDS = 600.0  # for a hang alone: imports on a busy machine take a minute
TICK_SECONDS = 0.2
_READ_BYTES = 1 << 16

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from equilibrium_mcore.verification.worker import main; main()"
)


@dataclass(frozen=True)
class Task:
    """What a worker is to do, and how long it may take: in CPU time, and on the clock."""

    payload: Mapping[str, Any]
    seconds: float
    wall_seconds: float


@dataclass(frozen=True)
class Outcome:
    """A worker's reply, or why there is none."""

    status: Literal["done", "timeout", "died"]
    reply: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


class WorkerRefusedError(ValueError):
    """A worker cannot do what it is set up for: the reason is for the user."""


class KillablePool:
    """Persistent workers. Make it in a thread that lasts: on Linux they end with it."""

    def __init__(self, count: int, setup: Mapping[str, Any]) -> None:
        """Start `count` workers with `setup`, which is plain values.

        Raises WorkerRefusedError for what the first one cannot do.
        """
        self._setup = json.dumps(setup)
        self._selector = selectors.DefaultSelector()
        self._workers = [self._start() for _ in range(count)]
        self.kills = 0
        try:
            self.greeting = self._wait_for_first()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> KillablePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.kill()
        self._workers = []
        self._selector.close()

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """The outcome of every task, in their order."""
        outcomes: list[Outcome | None] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        while waiting or any(worker.number is not None for worker in self._workers):
            for worker in self._workers:
                if worker.is_ready and worker.number is None and waiting:
                    number = waiting.popleft()
                    if not worker.begin(number, tasks[number]):  # it died while it was idle
                        waiting.appendleft(number)
                        self._replace(worker)
            for key, _ in self._selector.select(TICK_SECONDS):
                self._take(key.data, outcomes)
            for worker in list(self._workers):
                if (reason := worker.overdue()) and worker.number is not None:
                    outcomes[worker.number] = Outcome("timeout", reason=reason)
                    self.kills += 1
                    self._replace(worker)
                elif reason:
                    raise ChildProcessError(f"a worker did not start within {START_SECONDS:.0f} s")
        return [outcome for outcome in outcomes if outcome is not None]

    def _take(self, worker: _Worker, outcomes: list[Outcome | None]) -> None:
        """What a worker wrote, or that it ended."""
        lines, ended = worker.read()
        for line in lines:
            if worker.is_ready:
                outcomes[worker.number] = Outcome("done", json.loads(line))
                worker.number = None
            else:
                worker.greet(json.loads(line))
        if ended:
            if not worker.is_ready:
                raise ChildProcessError(
                    f"a worker ended while it started ({worker.status()}); its error is above"
                )
            if worker.number is not None:
                outcomes[worker.number] = Outcome(
                    "died",
                    reason=f"its worker process ended ({worker.status()}); was memory short?",
                )
            self._replace(worker)

    def _wait_for_first(self) -> Mapping[str, Any]:
        """What a worker says when it is set up."""
        first = self._workers[0]
        while not first.is_ready:
            for key, _ in self._selector.select(TICK_SECONDS):
                self._take(key.data, [])
            if first.overdue():
                raise ChildProcessError(f"a worker did not start within {START_SECONDS:.0f} s")
        return first.greeting

    def _replace(self, worker: _Worker) -> None:
        self._selector.unregister(worker.stream)
        worker.kill()
        self._workers[self._workers.index(worker)] = self._start()

    def _start(self) -> _Worker:
        worker = _Worker(self._setup)
        self._selector.register(worker.stream, selectors.EVENT_READ, worker)
        return worker


class _Worker:
    """One process, and the task that it has."""

    def __init__(self, setup: str) -> None:
        paths = [path or str(Path.cwd()) for path in sys.path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(paths), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # with what it starts, it is killed as a group
        )
        assert self.process.stdin and self.process.stdout
        self.stream = self.process.stdout
        os.set_blocking(self.stream.fileno(), False)
        self.is_ready = False
        self.greeting: Mapping[str, Any] = {}
        self.number: int | None = None
        self._task = Task({}, START_SECONDS, START_SECONDS)
        self._buffer = b""
        self._begun, self._cpu = time.monotonic(), 0.0
        self._send(setup)

    def begin(self, number: int, task: Task) -> bool:
        """Hand it a task. False where it is not there any more."""
        self.number, self._task = number, task
        self._begun, self._cpu = time.monotonic(), cpu_seconds(self.process.pid) or 0.0
        return self._send(json.dumps(task.payload))

    def _send(self, line: str) -> bool:
        # It reads nothing but the next task, so it takes all of this before it does anything.
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.number = None
            return False
        return True

    def read(self) -> tuple[list[bytes], bool]:
        """Whole lines that came, and whether it has ended."""
        while True:
            try:
                data = os.read(self.stream.fileno(), _READ_BYTES)
            except BlockingIOError:
                ended = False
                break
            if not data:
                ended = True
                break
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        return lines, ended

    def greet(self, greeting: Mapping[str, Any]) -> None:
        """Take its first line. Raises WorkerRefusedError where it cannot work."""
        if "refused" in greeting:
            raise WorkerRefusedError(greeting["refused"])
        self.greeting, self.is_ready = greeting, True

    def overdue(self) -> str:
        """Why its task has had its time; "" where it has not."""
        if self.is_ready and self.number is None:
            return ""
        elapsed = time.monotonic() - self._begun
        if elapsed > self._task.wall_seconds:
            return f"more than {self._task.wall_seconds:g} s"
        if elapsed < self._task.seconds or not self.is_ready:
            return ""
        cpu = cpu_seconds(self.process.pid)
        if cpu is None or cpu - self._cpu > self._task.seconds:
            return f"more than {self._task.seconds:g} s"
        return ""

    def status(self) -> str:
        """How it ended."""
        status = self.process.wait()
        return f"signal {-status}" if status < 0 else f"status {status}"

    def kill(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.stream.close()


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process so far; None where the system does not tell it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
