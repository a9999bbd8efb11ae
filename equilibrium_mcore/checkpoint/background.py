"""Who writes a rank's data files: the rank itself, or a process beside it.

Both are given the same files and write the same bytes. `InPlace` returns when they are on the disk;
`Background` when the tensors are copied, which is all that training waits for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import NoReturn, Protocol

from equilibrium_mcore.checkpoint.data_files import DataFile, WrittenFile, write_data_file
from equilibrium_mcore.checkpoint.shared_buffer import SharedBuffer
from equilibrium_mcore.checkpoint.writer_jobs import FileToWrite, Removal, Reservation, WriteJob
from equilibrium_mcore.files.whole import remove_rest

HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Writer(Protocol):
    """Writes one save at a time: `take`, then `result`."""

    def reserve(self, bytes_: int) -> None:
        """Find memory for a save of about this size; nobody waits for it."""

    def take(self, files: Sequence[DataFile]) -> None:
        """Begin to write. The tensors may change once this returns."""

    def is_done(self) -> bool:
        """Whether `result` would return at once."""

    def result(self) -> list[WrittenFile]:
        """What was written, once it is on the disk. Raises what the writing raised."""

    def remove(self, folder: Path) -> None:
        """Remove a folder of old files; nobody waits for it."""

    def close(self) -> None:
        """Give everything back, once what was asked for is done."""


class InPlace:
    """Writes at once, on the rank itself."""

    def __init__(self) -> None:
        self._written: list[WrittenFile] | Exception = []

    def reserve(self, bytes_: int) -> None:
        pass

    def take(self, files: Sequence[DataFile]) -> None:
        try:
            self._written = [write_data_file(file) for file in files]
        except Exception as error:  # raised by `result`, where all ranks meet
            self._written = error

    def is_done(self) -> bool:
        return True

    def result(self) -> list[WrittenFile]:
        return _raised(self._written)

    def remove(self, folder: Path) -> None:
        remove_rest(folder)

    def close(self) -> None:
        self._written = []


class Background:
    """Copies tensors to memory that a process of its own writes from.

    The process starts with this object and imports meanwhile, so that the first save need not wait.
    """

    def __init__(self) -> None:
        self._buffer = SharedBuffer()
        self._pipe, there = Pipe()
        given = (there.fileno(), self._buffer.descriptor)
        command = [sys.executable, "-m", "equilibrium_mcore.checkpoint.writer_process"]
        with _held_back():  # until it ignores them: they are for the rank
            self._process = subprocess.Popen(
                [*command, str(os.getpid()), *map(str, given)],
                pass_fds=given,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal reaches a whole session
            )
        there.close()

    def reserve(self, bytes_: int) -> None:
        self._buffer.grow(bytes_)
        self._send(Reservation(self._buffer.size))

    def take(self, files: Sequence[DataFile]) -> None:
        slots = iter(self._buffer.copy_in([t for file in files for _, t in file.tensors]))
        jobs = [
            FileToWrite(
                str(file.path),
                file.name,
                file.objects,
                [(item, next(slots)) for item, _ in file.tensors],
            )
            for file in files
        ]
        self._send(WriteJob(jobs, self._buffer.size))

    def is_done(self) -> bool:
        return self._pipe.poll()  # also where it has ended: there is an end to read

    def result(self) -> list[WrittenFile]:
        try:
            return _raised(self._pipe.recv())
        except (EOFError, ConnectionResetError):
            self._gone()

    def remove(self, folder: Path) -> None:
        try:
            self._pipe.send(Removal(str(folder)))
        except OSError:  # it has ended, with nothing to write: the next save says so
            remove_rest(folder)

    def close(self) -> None:
        with suppress(OSError):  # nothing is left to write, so its end matters no more
            self._pipe.send(None)  # the last word: what it was asked to remove goes first
        self._process.wait()
        self._pipe.close()
        self._buffer.close()

    def _send(self, message: WriteJob | Reservation) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            self._gone()

    def _gone(self) -> NoReturn:
        status = self._process.wait()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        raise OSError(
            f"the process that writes checkpoints ({self._process.pid}) ended by {how}: what it "
            "was writing is lost, the checkpoints before are whole. Signal 9 is often the "
            "kernel's, for want of memory: checkpoint.asynchronous needs room for a second copy of "
            "what a rank saves; set it to false, or give the host more memory"
        )


def _raised(outcome: list[WrittenFile] | Exception) -> list[WrittenFile]:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@contextmanager
def _held_back():
    """A process that is started inside inherits that these signals wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
