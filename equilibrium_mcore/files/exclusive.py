"""One process of a host at a time in a folder, for as long as it runs."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def exclusive(path: Path, *, held: Exception) -> Iterator[None]:
    """While it is open, the lock on `path` is this process's; made with its folder if missing.

    Raises `held` where another process has it. Where the file system has no locks nothing is kept.
    The kernel releases it when the process ends; across hosts use `lock.py`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise held from None
        except OSError:
            pass
        yield
