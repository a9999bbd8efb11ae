"""The process that forks ranks: it never runs a tensor operation, so its forks lack no thread.

It stands between a tool and its ranks. The tool's end of a pipe is its lifeline: when that closes,
whatever ended the tool, the ranks are killed and the temporary folder is removed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from equilibrium_mcore.files.errors import in_words
from equilibrium_mcore.files.named import open_named
from equilibrium_mcore.parallel.rank_job import Job, JobOutcome
from equilibrium_mcore.parallel.rank_process import ASKERS_SIGNALS, play
from equilibrium_mcore.parallel.rank_report import failures, stacks
from equilibrium_mcore.processes.stacks import STACKS_SIGNAL

GRACE_SECONDS = 1.0
PROBE_BYTES = 1 << 16  # what tracebacks and the rendezvous take
POLL_SECONDS = 1.0  # the pipe may be held open by another child of the tool: its pid is asked too


class AskerGoneError(Exception):
    """The tool has closed its end, or has ended."""


def serve(
    connection: Connection, theirs: Connection | None, *, prefix: str, asker: int, fresh: bool
) -> None:
    """Run the jobs that come from process `asker` until it is gone. Never returns.

    A temporary folder is made first, and its path told, or the OSError that it met. `theirs` is
    the asker's end, where a fork has inherited it. A `fresh` interpreter still has to make the
    libraries ready.
    """
    if theirs is not None:
        theirs.close()
    folder = None
    try:
        os.setsid()  # a terminal's signals go to the asker, which says what they mean
        # Only the pipe ends this process: a signal to all would leave ranks and folder to nobody.
        for number in (*ASKERS_SIGNALS, STACKS_SIGNAL):
            signal.signal(number, signal.SIG_IGN)
        folder = _told_folder(connection, prefix)
        if fresh:
            from equilibrium_mcore.parallel import accelerator

            accelerator.install()
            accelerator.quiet_libraries()
        host = _Host(connection, asker)
        with contextlib.suppress(AskerGoneError, BrokenPipeError):
            while True:
                connection.send(host.run(host.receive()))
    except BaseException:
        traceback.print_exc()
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _told_folder(connection: Connection, prefix: str) -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as error:
        connection.send(error)
        os._exit(1)
    with contextlib.suppress(ConnectionError):  # the asker is gone: that is seen next
        connection.send(folder)
    return folder


def _check_room(job: Job) -> None:
    """Ranks can leave their files. Raises OSError: a rank could not tell of its own."""
    for rank in range(job.world_size):
        job.file(rank, "stack").touch()
    probe = job.folder / "probe"
    with open_named(probe, "wb") as stream:  # not whole: it is removed at once
        stream.write(bytes(PROBE_BYTES))
    probe.unlink()


class _Host:
    """Forks the ranks of one job after another, and waits for whatever comes first."""

    def __init__(self, connection: Connection, asker: int) -> None:
        self._connection, self._asker = connection, asker
        self._woken, wakes = os.pipe()  # a rank's end writes to it, so that waiting is not polling
        os.set_blocking(self._woken, False)
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._private = (self._woken, wakes)

    def receive(self) -> Job:
        """The next job. Raises AskerGoneError."""
        while True:
            message = self._message_within(POLL_SECONDS)
            if isinstance(message, Job):  # not a signal that came after its job had ended
                return message

    def run(self, job: Job) -> JobOutcome:
        """Fork the ranks of a job and see them through. Raises AskerGoneError; none is left."""
        try:
            job.folder.mkdir()
            _check_room(job)
            _import_once(job.modules)
            return _Ranks(job, self).outcome()
        except AskerGoneError:
            raise
        except OSError as error:
            return JobOutcome(failure=f"ranks: {in_words(error)}", told=True)
        except Exception:
            return JobOutcome(failure=f"the ranks were not started:\n{traceback.format_exc()}")
        finally:
            shutil.rmtree(job.folder, ignore_errors=True)

    def fork(self, job: Job, rank: int, group: int) -> int:
        """Fork a rank into process group `group`, or into a new one of its own if 0; its pid."""
        host = os.getpid()
        pid = os.fork()
        if pid:
            # Both set it, so that it is set whoever runs first; a rank may have ended already.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpgid(pid, group or pid)
            return pid
        code = 1
        try:
            os.setpgid(0, group)
            signal.set_wakeup_fd(-1)
            self._connection.close()
            for descriptor in self._private:
                os.close(descriptor)
            code = play(job, rank, host=host)
        finally:
            # Leaving in order would wait for ranks that may never come.
            os._exit(code)

    def wait(self, seconds: float) -> object | None:
        """A message, or None when a rank has ended or `seconds` are over. Raises AskerGoneError."""
        return self._message_within(max(0.0, min(seconds, POLL_SECONDS)))

    def _message_within(self, seconds: float) -> object | None:
        ready = wait([self._connection, self._woken], seconds)
        if self._woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 4096)
        if os.getppid() != self._asker:
            raise AskerGoneError
        if self._connection not in ready:
            return None
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError):
            raise AskerGoneError from None


class _Ranks:
    """The ranks of one job, from their fork to their end."""

    def __init__(self, job: Job, host: _Host) -> None:
        self._job, self._host = job, host
        self._running: dict[int, int] = {}  # rank by pid
        self._failed: list[tuple[int, int]] = []  # rank, exit code
        self._group = 0
        sys.stdout.flush()
        sys.stderr.flush()

    def outcome(self) -> JobOutcome:
        """Fork, wait, kill what is left. Raises AskerGoneError."""
        try:
            for rank in range(self._job.world_size):
                pid = self._host.fork(self._job, rank, self._group)
                self._group = self._group or pid
                self._running[pid] = rank
            hang = self._wait()
        finally:
            self._end()
        if hang:
            return JobOutcome(failure=hang)
        if self._failed:
            return failures(self._job, self._failed)
        return JobOutcome(results=tuple(_result(self._job, r) for r in range(self._job.world_size)))

    def _wait(self) -> str | None:
        """Until all have ended, or GRACE_SECONDS after the first failure; what hung, if one did."""
        limit = self._job.limit
        late = time.monotonic() + limit.minutes * 60 if limit else float("inf")
        while self._running:
            until = late
            if self._failed:
                until = min(late, self._first_failure + GRACE_SECONDS)
            if time.monotonic() >= until:
                return None if self._failed else self._hang()
            message = self._host.wait(until - time.monotonic())
            if message is not None:
                self._heed(message)
            self._reap()
        return None

    def _reap(self) -> None:
        for pid in list(self._running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            rank, code = self._running.pop(pid), os.waitstatus_to_exitcode(status)
            if code:
                self._failed.append((rank, code))
                if len(self._failed) == 1:
                    self._first_failure = time.monotonic()

    def _heed(self, message: object) -> None:
        """A signal for the ranks, or STACKS_SIGNAL: print where they are."""
        if message == STACKS_SIGNAL:
            print(stacks(self._job, self._running), file=sys.stderr, flush=True)
            return
        for pid in self._running:
            _send(pid, message)

    def _hang(self) -> str:
        limit = self._job.limit
        return (
            f"{limit.phase}: they did not end within {limit.minutes:g} minutes, and were killed "
            f"({limit.raised_by} allows more). Where they were:\n{stacks(self._job, self._running)}"
        )

    def _end(self) -> None:
        """Kill what still runs, with its children."""
        if self._group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, signal.SIGKILL)
        for pid in self._running:
            _send(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _import_once(modules: Sequence[str]) -> None:
    """Import what ranks need here, so that none of them does; no thread starts."""
    for module in modules:
        importlib.import_module(module)
        if "torch" in sys.modules:
            # A module that computes when it is imported would leave threads that no fork has.
            sys.modules["torch"].set_num_threads(1)


def _result(job: Job, rank: int) -> bytes:
    path = job.file(rank, "result")  # none of a rank that left by SystemExit
    return path.read_bytes() if path.exists() else pickle.dumps(None)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
