"""Memory maps of many files, of which only so many are open at a time.

A map keeps its file open, and a blend of thousands of sources has more files than a process may
open; so those that were used last stay, and others are opened again when they are needed.
"""

from __future__ import annotations

import mmap
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

MOST_OPEN = 4096
SHARE_OF_LIMIT = 4  # a process needs files for other things too


class OpenMaps:
    """Read-only maps by path, least recently used first."""

    def __init__(self, limit: int | None = None) -> None:
        """At most `limit` files are open; None: a quarter of what the process may open."""
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if allowed == resource.RLIM_INFINITY:
            allowed = SHARE_OF_LIMIT * MOST_OPEN
        self.limit = limit or max(1, min(MOST_OPEN, allowed // SHARE_OF_LIMIT))
        self._open: OrderedDict[Path, mmap.mmap] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "_open": OrderedDict()}  # a map stays in its process

    def array(
        self, path: Path, dtype: Any, *, offset: int, count: int, scattered: bool = False
    ) -> np.ndarray:
        """`count` values from byte `offset` on. A map that is let go lives as long as its arrays.

        `scattered`: of this file single places are read, so the kernel should not read on; the
        stretch asked for is read at once. Raises OSError where the file cannot be opened, and
        ValueError where it is too short.
        """
        whole = self._map(path, scattered)
        if scattered and hasattr(whole, "madvise"):
            page = offset // mmap.PAGESIZE * mmap.PAGESIZE
            length = offset + count * np.dtype(dtype).itemsize - page
            whole.madvise(mmap.MADV_WILLNEED, page, length)
        return np.frombuffer(whole, dtype, count, offset)

    def _map(self, path: Path, scattered: bool) -> mmap.mmap:
        found = self._open.get(path)
        if found is not None:
            self._open.move_to_end(path)
            return found
        while len(self._open) >= self.limit:
            self._open.popitem(last=False)
        with path.open("rb") as stream:
            found = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if scattered and hasattr(found, "madvise"):
            found.madvise(mmap.MADV_RANDOM)
        self._open[path] = found
        return found
