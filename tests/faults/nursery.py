"""Commands that begin with the libraries imported: a start costs a tenth of what a fresh one costs.

A process imports what a command imports, starts no thread, and forks one command after another,
each as a person would start it: in a session of its own, with its own output and temporary folder.
From there on everything is the command's own code, the ranks and processes that it starts too.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from equilibrium_mcore.processes.parents import end_with_parent

ROOT = Path(__file__).parents[2]


class Command(NamedTuple):
    """What to start: `train`, or a sub-command, with its words."""

    name: str
    words: tuple[str, ...]
    output: str  # the file for what it prints
    temporary: str  # its folder for temporary files


class Nursery:
    """Starts commands; made once, closed with `close`."""

    def __init__(self) -> None:
        self._pipe, there = Pipe()
        self._statuses: dict[int, int] = {}
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-m", "tests.faults.nursery"),
                *(str(os.getpid()), str(there.fileno())),
            ],
            cwd=ROOT,
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
        )
        there.close()
        self._pipe.recv()  # it has imported

    def start(self, command: Command) -> Born:
        """Start a command."""
        self._pipe.send(command)
        while isinstance(message := self._pipe.recv(), tuple):
            self._note(message)
        return Born(message, self)

    def status(self, pid: int, *, seconds: float = 0.0) -> int | None:
        """The exit status of a command, as subprocess has it; None if it runs after `seconds`."""
        while pid not in self._statuses and self._pipe.poll(seconds):
            self._note(self._pipe.recv())
        return self._statuses.get(pid)

    def close(self) -> None:
        """End the process, and every command that still runs."""
        self._pipe.close()
        self._process.wait()

    def _note(self, message: tuple[int, int]) -> None:
        pid, status = message
        self._statuses[pid] = status


class Born:
    """A command that runs, with the methods of subprocess.Popen that the bench uses."""

    def __init__(self, pid: int, nursery: Nursery) -> None:
        self.pid, self._nursery = pid, nursery

    def poll(self) -> int | None:
        return self._nursery.status(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        seconds = 3600.0 if timeout is None else timeout
        status = self._nursery.status(self.pid, seconds=seconds)
        if status is None:
            raise subprocess.TimeoutExpired([str(self.pid)], seconds)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# ------------------------------------------------------------------------- the process that forks


def main(arguments: Sequence[str]) -> int:
    """Serve the pipe until it ends; a command that is forked here leaves with its own status."""
    parent, descriptor = map(int, arguments)
    end_with_parent(parent)
    pipe = Connection(descriptor)
    _import_all()
    pipe.send(None)
    woken, wakes = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    running: set[int] = set()
    while True:
        ready, _, _ = select.select([pipe, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _reap(running, pipe)
        if pipe not in ready:
            continue
        try:
            command = pipe.recv()
        except EOFError:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            return 0
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            for private in (woken, wakes):
                os.close(private)
            pipe.close()
            return _run(command)
        running.add(pid)
        pipe.send(pid)


def _import_all() -> None:
    """What a command imports before it trains, in its order."""
    from equilibrium_mcore.parallel import accelerator

    accelerator.install()
    accelerator.quiet_libraries()
    import equilibrium_mcore.cli.command
    import equilibrium_mcore.corpus.preprocess
    import equilibrium_mcore.hugging_face.convert
    import equilibrium_mcore.stages.table
    import equilibrium_mcore.train  # noqa: F401


def _reap(running: set[int], pipe: Connection) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            running.discard(pid)
            pipe.send((pid, os.waitstatus_to_exitcode(status)))


def _run(command: Command) -> int:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with Path(command.output).open("ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ["TMPDIR"] = command.temporary
    tempfile.tempdir = None
    warnings.simplefilter("ignore")
    from equilibrium_mcore.cli.command import run_subcommand
    from equilibrium_mcore.training.signals import take_signals_at_once

    if command.name == "train":
        from equilibrium_mcore import train

        sys.argv = [train.__file__, *command.words]
        take_signals_at_once()
        return train.main(list(command.words))
    sys.argv = [command.name, *command.words]
    return run_subcommand(command.name, command.words, program=command.name)


if __name__ == "__main__":
    # As the module that others import, so that what is sent over the pipe has one class.
    from tests.faults import nursery

    sys.exit(nursery.main(sys.argv[1:]))
