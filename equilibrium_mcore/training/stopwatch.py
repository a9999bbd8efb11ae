"""How long this process trained, by the wall and by its own CPU time, without its pauses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple


class Spent(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float
    """Of all threads of this process; a process that it started, e.g. of rewards, is not in it."""


class Stopwatch:
    """Runs from when it is made; each `lap` begins the next."""

    def __init__(self) -> None:
        self._since, self._paused = _now(), Spent(0.0, 0.0)

    def lap(self) -> Spent:
        """Since the last lap, less the pauses."""
        now, since, paused = _now(), self._since, self._paused
        self._since, self._paused = now, Spent(0.0, 0.0)
        return Spent(now.wall - since.wall - paused.wall, now.cpu - since.cpu - paused.cpu)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done meanwhile does not count."""
        start = _now()
        yield
        end, before = _now(), self._paused
        self._paused = Spent(before.wall + end.wall - start.wall, before.cpu + end.cpu - start.cpu)


def _now() -> Spent:
    return Spent(time.perf_counter(), time.process_time())
