"""Where a process is: `kill -USR2 PID` prints the Python stack of each of its threads."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
from typing import TextIO

# SIGTERM, SIGINT and SIGUSR1 ask a run to save and stop.
STACKS_SIGNAL = signal.SIGUSR2


def print_stacks_on_signal(file: TextIO | None = None) -> None:
    """From now on STACKS_SIGNAL writes all threads' stacks to `file` (stderr), and nothing else.

    It is done by the C handler itself, so a process that hangs within a C call answers too. `file`
    must stay open. A stderr without a descriptor is left alone.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):
        faulthandler.register(STACKS_SIGNAL, file or sys.stderr, all_threads=True, chain=False)
