"""A lock file as another process sees it: who holds it, and whether it may be taken over.

Ages are differences of two times that the file server gave, that of the file's last change and that
of a file made now: the clocks of hosts differ.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.files.owner import Owner

SILENT_SECONDS = 300.0  # an owner that cannot be asked counts as gone after so long


class LockHeldError(Exception):
    """Another holds the lock: `owner` (None if its file says nothing) and its last heartbeat."""

    def __init__(self, path: Path, owner: Owner | None, age_seconds: float) -> None:
        self.path, self.owner, self.age_seconds = path, owner, age_seconds
        super().__init__(f"{path}: held by {owner or 'an unknown owner'}")


class LockLostError(Exception):
    """Another took the lock over from this process: `owner`, as far as it says who it is."""

    def __init__(self, path: Path, owner: Owner | None) -> None:
        self.path, self.owner = path, owner
        super().__init__(f"{path}: taken over by {owner or 'an unknown owner'}")


@dataclass(frozen=True)
class LockState:
    """A lock file as it was seen: its text, its time of change, and its age in seconds."""

    text: str
    changed_ns: int
    age_seconds: float

    @property
    def owner(self) -> Owner | None:
        return Owner.from_text(self.text)


def refuse_if_held(path: Path, found: LockState, me: Owner) -> None:
    """Raises LockHeldError unless `me` may take over the lock that was found."""
    owner = found.owner
    known = owner is not None
    if known and owner.is_dead():
        return
    silent = found.age_seconds > SILENT_SECONDS
    if known and owner.is_alive_here():
        silent = False  # it may be stopped, or its file server away: it is there
    if silent or (known and not owner.is_alive_here() and owner.was_requeued_as(me)):
        return
    raise LockHeldError(path, owner, found.age_seconds)


def look(path: Path) -> LockState | None:
    """The lock file now; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)  # opening asks the server; a plain stat may not
    except FileNotFoundError:
        return None
    try:
        text = os.read(descriptor, 1 << 16).decode(errors="replace")
        changed_ns = os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
    return LockState(text, changed_ns, (_server_time_ns(path.parent) - changed_ns) / 1e9)


def _server_time_ns(folder: Path) -> int:
    """What time it is for the file server: that of a file made now."""
    probe = folder / f".clock.{secrets.token_hex(4)}.tmp"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        os.utime(descriptor)
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)
