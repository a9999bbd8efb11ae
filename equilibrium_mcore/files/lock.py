"""A lock file: one owner at a time, on any file system that several hosts share.

The file is made with O_EXCL and says who holds it; its time of change is the owner's heartbeat.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from equilibrium_mcore.files.lock_file import (
    LockHeldError,
    LockLostError,
    LockState,
    look,
    refuse_if_held,
)
from equilibrium_mcore.files.owner import Owner

HEARTBEAT_SECONDS = 30.0
_PATIENCE_SECONDS = 10.0  # others that take the lock over hold its guard for an instant
_TRIES = 5


class FileLock:
    """Held from `acquire` to `release`; a thread keeps it fresh, so fork before `acquire`."""

    def __init__(
        self, path: Path, name: str, *, heartbeat_seconds: float = HEARTBEAT_SECONDS
    ) -> None:
        self.path = path
        self.name = name
        self.heartbeat_seconds = heartbeat_seconds
        self.lost: LockLostError | None = None  # set by a heartbeat that found another's lock
        self._text = ""
        self._pid = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._renewing = threading.Lock()

    def acquire(self) -> Owner | None:
        """Take the lock; the owner that it was taken over from, if there was one.

        A lock is taken over at once from a dead process of this machine and from the same Slurm
        job, else after SILENT_SECONDS. Raises LockHeldError; of two that try, one gets it.
        """
        me = Owner.of_this_process(self.name)
        self._text, self._pid = me.to_text(), me.pid
        for _ in range(_TRIES):
            if self._create():
                return self._begin(None)
            with self._one_taker():
                found = look(self.path)
                if found is None:
                    continue
                refuse_if_held(self.path, found, me)
                if self._remove(found) and self._create():
                    return self._begin(found.owner)
        raise LockHeldError(self.path, None, 0.0)

    def confirm(self) -> None:
        """Raises LockLostError if another took the lock over. A lock that is gone is made again."""
        with self._renewing:  # the heartbeat's thread asks, too
            if self.lost is None and not self._renew():
                found = look(self.path)
                self.lost = LockLostError(self.path, found.owner if found else None)
        if self.lost is not None:
            raise self.lost

    def release(self) -> None:
        """Let go of the lock, if it is this process's. Without effect in a forked child."""
        if self._pid != os.getpid():
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        with contextlib.suppress(OSError):
            if self.path.read_text(encoding="utf-8") == self._text:
                self.path.unlink()
        self._pid = 0

    def _begin(self, before: Owner | None) -> Owner | None:
        """Start the heartbeat."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._thread.start()
        return before

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat_seconds):
            with contextlib.suppress(OSError, LockLostError):  # a file server that is away
                self.confirm()
            if self.lost is not None:
                return

    def _create(self) -> bool:
        """Make the file; False if there is one."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self._text.encode())
            os.fsync(descriptor)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _renew(self) -> bool:
        """The heartbeat, given by the file server's clock; False if the file is another's."""
        for _ in range(_TRIES):
            try:
                descriptor = os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:  # removed by hand, or with its folder
                if self._stop.is_set():
                    return True
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self._create():
                    return True
                continue
            try:
                if os.read(descriptor, 1 << 16) != self._text.encode():
                    return False
                os.utime(descriptor)
                return True
            finally:
                os.close(descriptor)
        return False

    def _remove(self, found: LockState) -> bool:
        """Remove the file that was found, and no other; True if the name is free now.

        It is renamed to a name of its own first. If that turns out to be another file, of an owner
        who came or woke in between, it is put back.
        """
        doomed = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.stale")
        try:
            os.rename(self.path, doomed)
        except FileNotFoundError:
            return True
        seen = look(doomed)
        same = seen is not None and (seen.text, seen.changed_ns) == (found.text, found.changed_ns)
        if not same:
            with contextlib.suppress(OSError):  # without links, its owner makes it again
                os.link(doomed, self.path)
        doomed.unlink(missing_ok=True)
        return same

    @contextlib.contextmanager
    def _one_taker(self) -> Iterator[None]:
        """One at a time judges and removes; a file system without flock relies on `_remove`."""
        with self.path.with_name(f".{self.path.name}.guard").open("a") as stream:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise LockHeldError(self.path, None, 0.0) from None
                    time.sleep(0.01)
                    continue
                except OSError:
                    pass
                break
            yield
