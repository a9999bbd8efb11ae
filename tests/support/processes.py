"""Processes that a test watches from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

PATIENCE_SECONDS = 300  # for a hang alone: what is waited for takes a second on a quiet machine


def still_there(pids: Iterable[int], *, patience: float = PATIENCE_SECONDS) -> list[int]:
    """The processes that have not ended within `patience`; one that waits to be reaped has."""
    deadline = time.monotonic() + patience
    while left := [pid for pid in pids if _runs(pid)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.1)
    return []


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def await_text(
    path: Path, holds: Callable[[str], object] = bool, *, patience: float = PATIENCE_SECONDS
) -> str:
    """The text of a file once `holds` is true of it, or what it is when patience ends."""
    deadline = time.monotonic() + patience
    while True:
        text = path.read_text() if path.exists() else ""
        if holds(text) or time.monotonic() > deadline:
            return text
        time.sleep(0.1)
