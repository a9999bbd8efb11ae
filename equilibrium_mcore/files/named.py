"""Files whose errors name them, whenever their bytes reach the operating system.

A stream of Python's says `[Errno 28] No space left on device` and no more, at a write, a flush or
only when it is closed.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

from equilibrium_mcore.files.errors import naming


class NamedFile(io.FileIO):
    """An unbuffered file; what it raises names its path."""

    def __init__(self, path: str | Path, mode: str) -> None:
        super().__init__(str(path), mode)

    def write(self, content: Any) -> int | None:
        with naming(self.name):
            return super().write(content)

    def truncate(self, size: int | None = None) -> int:
        with naming(self.name):
            return super().truncate(size)


def open_named(path: str | Path, mode: str) -> IO[Any]:
    """As `open(path, mode)`, for writing; text is UTF-8. Raises OSError, which names the file."""
    raw = NamedFile(path, mode.replace("b", ""))
    stream = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    return stream if "b" in mode else io.TextIOWrapper(stream, encoding="utf-8")
