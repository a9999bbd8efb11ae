"""Signals that ask a run to save and stop: SIGTERM (schedulers, people) and SIGUSR1 (Slurm).

Before the training loop a run has nothing to save, and such a signal ends it by the kernel, at
once, whatever it is in: `take_signals_at_once`. Within the loop it is noted, and the run saves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# One press of Ctrl-C may come twice, from the terminal and from a launcher; two presses are apart.
ONE_PRESS_SECONDS = 0.5
INTERRUPTED = 128 + signal.SIGINT


def take_signals_at_once() -> None:
    """From now on a stop signal ends this process by the kernel, also within a library's call."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


class StopSignals:
    """While this context is open, such a signal is noted in `received` instead of ending us.

    A second Ctrl-C ends the process at once, as a person at a terminal expects, even where the main
    thread is stuck in a collective and no handler of Python's would run.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's
        self._woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        self._wakes = wakes
        self._wakeup_before = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        threading.Thread(target=_watch, args=(self._woken,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakes)  # its reader sees the end


def _watch(woken: int) -> None:
    """Read numbers of signals as the kernel delivers them; the second Ctrl-C ends the process."""
    first: float | None = None
    with contextlib.closing(os.fdopen(woken, "rb", buffering=0)) as stream:
        while numbers := stream.read(1):
            if numbers[0] != signal.SIGINT:
                continue
            now = time.monotonic()
            if first is not None and now - first > ONE_PRESS_SECONDS:
                os._exit(INTERRUPTED)
            first = now if first is None else first
