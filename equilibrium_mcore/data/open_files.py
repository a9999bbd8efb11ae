"""Reading many files of which only so many are open, and noticing when one of them changes.

A blend of thousands of sources has more files than a process may open; so those that were used last
stay open, and others are opened again when they are needed.

Token ids are read, not mapped: a map of a file that is cut short ends the process by SIGBUS, where
a read says so. As fast, measured: a read of 2,049 ids took 3.8 microseconds and a map 4.2, of 8,193
ids 5.0 and 5.3, in the page cache; 120 and 112 where the disk had to be asked. A file that was
replaced or written to is noticed by its size and time of change, which are looked at every
CHECK_SECONDS, since they are a question to the file server. (The number of its inode is not: some
network file systems change it by themselves.)
"""

from __future__ import annotations

import mmap
import os
import resource
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from equilibrium_mcore.config.installation import command
from equilibrium_mcore.files.errors import FileContentError

MOST_OPEN = 4096
SHARE_OF_LIMIT = 4  # a process needs files for other things too
CHECK_SECONDS = 5.0


class _Facts(NamedTuple):
    """What tells a file from the one that the run began with."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Facts:
        return cls(status.st_size, status.st_mtime_ns)


@dataclass
class _Open:
    descriptor: int
    checked_at: float
    map: mmap.mmap | None = None

    def __del__(self) -> None:
        os.close(self.descriptor)


class OpenFiles:
    """Files that are only read, by path, least recently used first."""

    def __init__(self, limit: int | None = None) -> None:
        """At most `limit` files are open; None: a quarter of what the process may open."""
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if allowed == resource.RLIM_INFINITY:
            allowed = SHARE_OF_LIMIT * MOST_OPEN
        self.limit = limit or max(1, min(MOST_OPEN, allowed // SHARE_OF_LIMIT))
        self._open: OrderedDict[Path, _Open] = OrderedDict()
        self._facts: dict[Path, _Facts] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in their process; how the files were when the run began does not.
        return {"limit": self.limit, "_facts": self._facts, "_open": OrderedDict()}

    def expect(self, path: Path) -> None:
        """From now on the file has to stay as it is."""
        if path not in self._facts:
            self._facts[path] = _Facts.of(path.stat())

    def read(self, path: Path, dtype: Any, *, offset: int, count: int) -> np.ndarray:
        """`count` values from byte `offset` on, [count].

        Raises OSError where the file cannot be opened or read, and ValueError, which names it,
        where it is not what it was when it was first opened.
        """
        length = count * np.dtype(dtype).itemsize
        descriptor = self._file(path).descriptor
        data = os.pread(descriptor, length, offset)
        while len(data) < length:
            more = os.pread(descriptor, length - len(data), offset + len(data))
            if not more:
                size = os.fstat(descriptor).st_size
                raise FileContentError(self._changed(path, f"it ends at byte {size:,}"))
            data += more
        return np.frombuffer(data, dtype)

    def gather(
        self, path: Path, dtype: Any, *, offset: int, count: int, places: np.ndarray
    ) -> np.ndarray:
        """Those of the `count` values from byte `offset` on that stand at `places`, [places].

        They lie all over the file, so it is mapped, and its size is looked at just before. Raises
        as `read` does.
        """
        file = self._file(path)
        size = os.fstat(file.descriptor).st_size
        if size < offset + count * np.dtype(dtype).itemsize:
            raise FileContentError(self._changed(path, f"it ends at byte {size:,}"))
        if file.map is None:
            file.map = mmap.mmap(file.descriptor, 0, access=mmap.ACCESS_READ)
        return np.frombuffer(file.map, dtype, count, offset)[places]

    def check(self, path: Path) -> None:
        """Raise ValueError where the file is not what it was when it was first opened."""
        try:
            facts = _Facts.of(path.stat())
        except FileNotFoundError:
            raise FileContentError(self._changed(path, "it is gone")) from None
        expected = self._facts.setdefault(path, facts)
        if facts.size != expected.size:
            change = f"it had {expected.size:,} bytes and has {facts.size:,}"
            raise FileContentError(self._changed(path, change))
        if facts != expected:
            raise FileContentError(self._changed(path, "it was written to, or replaced"))

    def _file(self, path: Path) -> _Open:
        now, found = time.monotonic(), self._open.get(path)
        if found is not None:
            self._open.move_to_end(path)
            if now - found.checked_at >= CHECK_SECONDS:
                self.check(path)
                found.checked_at = now
            return found
        while len(self._open) >= self.limit:
            self._open.popitem(last=False)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[path] = found = _Open(descriptor, now)
        self.check(path)
        return found

    def _changed(self, path: Path, what: str) -> str:
        return (
            f"{path} changed while the run reads it: {what}. Nothing may write to a dataset in "
            f"use. Put back the file that was there, check it with `{command('preprocess')} "
            "--verify`, and resume from the last checkpoint; or give changed data a new source name"
        )
