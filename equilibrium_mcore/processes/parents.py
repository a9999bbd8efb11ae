"""A process that ends with the one that started it, whatever ends that one."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent(parent: int) -> None:
    """End this process once process `parent`, which started it, has ended, however it ended.

    On Linux the kernel kills it, also within a collective or another long call. Strictly it does
    so when the *thread* that forked this process ends: fork from a thread that lasts. Elsewhere a
    thread watches. A parent that ended before this call ends the process at once.
    """
    if sys.platform == "linux":
        _killed_by_kernel()
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


def _killed_by_kernel() -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
