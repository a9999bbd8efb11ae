"""Where a process is when it makes no progress: the stack of every thread, written in time.

A collective that others do not join returns, or ends the job, when its time-out is over, and says
nothing of the other ranks. So each rank writes where it is a little earlier, by a thread of the
interpreter's own that needs no lock: also from within a library's call.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_seconds: float | None = None  # what is armed; faulthandler has one clock for a process
_stream = None


@contextmanager
def stacks_when_stuck(path: Path, *, seconds: float) -> Iterator[None]:
    """Inside, add all stacks to `path` whenever `seconds` pass without `progress()`.

    A file that nothing was written to is removed, with its folder if that is empty.
    """
    global _seconds, _stream
    path.parent.mkdir(parents=True, exist_ok=True)
    # What an earlier process wrote, whose run this one resumes, stays.
    # Not whole: a part of a hanging process's stacks is better than nothing.
    with path.open("a", encoding="utf-8") as _stream:
        _seconds = seconds
        progress()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _seconds = None
    if not path.stat().st_size:
        path.unlink()
        with suppress(OSError):
            path.parent.rmdir()


def progress() -> None:
    """Start the clock again; nothing where no stacks were asked for."""
    if _seconds is not None:
        faulthandler.dump_traceback_later(_seconds, repeat=True, file=_stream)
