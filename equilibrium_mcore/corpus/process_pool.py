"""Pools of worker processes that leave with their parent, and whose deaths are told as an error."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from equilibrium_mcore.processes.parents import end_with_parent
from equilibrium_mcore.processes.threads import fork_is_safe


def start_pool(count: int, start: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """`count` running processes, in each of which `start(*arguments)` was called.

    Make it before anything starts a thread: the processes are forked here, on Linux. Raises
    ChildProcessError where one dies at once.
    """
    pool = ProcessPoolExecutor(
        count, mp_context=pool_context(), initializer=start, initargs=arguments
    )
    with deaths_told():
        for job in [pool.submit(os.getpid) for _ in range(count)]:
            job.result()
    return pool


def pool_context() -> multiprocessing.context.BaseContext:
    """How the processes of a pool are started."""
    return multiprocessing.get_context("fork" if fork_is_safe() else "spawn")


@contextlib.contextmanager
def deaths_told() -> Iterator[None]:
    """ChildProcessError, which a tool prints as its error, where a process of a pool died."""
    try:
        yield
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process died: it was killed, most often because the memory of the machine "
            "(or of the job, or the container) ran out, or it could not start. Take fewer "
            "--workers, or give it more memory. The same command resumes from what was written"
        ) from None


def leave_with_parent(parent: int) -> None:
    """First call of a worker: no signals, and gone when `parent` is, which may have been killed."""
    # The parent ends its workers; a signal to the whole group must not reach them first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent)
