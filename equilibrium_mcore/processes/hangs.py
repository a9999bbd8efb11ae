"""Where a process is when it makes no progress: the stack of every thread, written in time.

A collective that others do not join returns, or ends the job, when its time-out is over, and says
nothing of the other ranks. So each rank writes where it is a little earlier, by a thread of the
interpreter's own that needs no lock: also from within a library's call. What only Python can tell,
such as the last collective, is added after it by an ordinary thread, which a call that keeps the
interpreter's lock would hold back.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_seconds: float | None = None  # what is armed; faulthandler has one clock for a process
_stream = None
_last_progress = 0.0  # time.monotonic()


@contextmanager
def stacks_when_stuck(
    path: Path, *, seconds: float, more: Callable[[], str] | None = None
) -> Iterator[None]:
    """Inside, add all stacks to `path` whenever `seconds` pass without `progress()`.

    `more()` is added after them, once for each stop. A file that nothing was written to is
    removed, with its folder if that is empty.
    """
    global _seconds, _stream
    path.parent.mkdir(parents=True, exist_ok=True)
    # What an earlier process wrote, whose run this one resumes, stays.
    # Not whole: a part of a hanging process's stacks is better than nothing.
    with path.open("a", encoding="utf-8") as _stream:
        _seconds = seconds
        progress()
        ended = threading.Event()
        watcher = threading.Thread(target=_tell_more, args=(seconds, more, ended), daemon=True)
        if more is not None:
            watcher.start()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            ended.set()
            if more is not None:
                watcher.join()
            _seconds = None
    if not path.stat().st_size:
        path.unlink()
        with suppress(OSError):
            path.parent.rmdir()


def progress() -> None:
    """Start the clock again; nothing where no stacks were asked for."""
    global _last_progress
    if _seconds is not None:
        _last_progress = time.monotonic()
        faulthandler.dump_traceback_later(_seconds, repeat=True, file=_stream)


def _tell_more(seconds: float, more: Callable[[], str], ended: threading.Event) -> None:
    """Write `more()` a little after the stacks, once for each time that progress stops."""
    told = -1.0
    while True:
        since = _last_progress
        left = since + seconds * 1.02 - time.monotonic()
        if since == told:  # wait for the next progress
            left = max(left, seconds * 0.1)
        elif left <= 0:
            try:
                text = more()
            except Exception as error:  # a private part of a library; the stacks are there
                text = f"nothing more could be told: {error!r}\n"
            _stream.write(f"\n{text}")
            _stream.flush()
            told = since
            continue
        if ended.wait(left):
            return
