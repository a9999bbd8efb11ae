"""A pool of worker processes whose results come in the order of their tasks.

A bounded number of tasks is under way, so memory does not grow with the work. The workers end with
their parent, whatever ends it, and the death of one is an error that says what to do.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from equilibrium_mcore.processes.parents import end_with_parent
from equilibrium_mcore.processes.threads import fork_is_safe

MOST_WORKERS = 4096  # more is a slip of the hand: no host has so many cores


class OrderedPool:
    """Worker processes. Make it before anything starts a thread: on Linux they are then forked.

    A fork would wait for threads of this process that it does not have, so after the first thread
    workers are fresh interpreters.
    """

    def __init__(
        self,
        count: int,
        *,
        ahead_per_worker: int,
        start: Callable[..., object],
        arguments: tuple[Any, ...] = (),
    ) -> None:
        """Start `count` workers; `start(*arguments)` is called in each.

        `ahead_per_worker` tasks for each worker are under way at most. Raises ChildProcessError
        where a worker dies at once, and ValueError for more than MOST_WORKERS.
        """
        if count > MOST_WORKERS:
            raise ValueError(
                f"{count:,} workers: one host has {MOST_WORKERS:,} at most. Name about as many as "
                "it has cores"
            )
        self._ahead = count * ahead_per_worker
        self._executor = ProcessPoolExecutor(
            count,
            mp_context=pool_context(),
            initializer=_begin,
            initargs=(os.getpid(), start, arguments),
        )
        with _deaths_reported():
            for job in [self._executor.submit(os.getpid) for _ in range(count)]:
                job.result()

    def __enter__(self) -> OrderedPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def in_order[Task](
        self, work: Callable[..., Any], tasks: Iterable[Task], *shared: Any
    ) -> Generator[tuple[Task, Job], None, None]:
        """Every task with its job, which calls `work(task, *shared)` in a worker; in order.

        A job that comes may not be done yet: ask for its `result()`. Tasks are taken from `tasks`
        as there is room. Closing the iterator cancels what has not begun, and waits for the rest.
        Raises ChildProcessError where a worker died.
        """
        source, pending = iter(tasks), deque()
        try:
            while True:
                while len(pending) < self._ahead and (task := next(source, _END)) is not _END:
                    with _deaths_reported():
                        job = Job(self._executor.submit(work, task, *shared))
                    pending.append((task, job))
                if not pending:
                    return
                yield pending[0]
                pending.popleft()
        finally:
            for _, job in pending:
                job.cancel()
            for _, job in pending:
                job.wait()


class Job:
    """What a worker does, or will do, with one task."""

    def __init__(self, future: Future) -> None:
        self._future = future

    def result(self) -> Any:
        """What the work returned, once it is done; raises what it raised.

        Raises ChildProcessError where a worker died.
        """
        with _deaths_reported():
            return self._future.result()

    def is_done(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        return self._future.done()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until it is done, at most so long."""
        wait([self._future], timeout=seconds)

    def cancel(self) -> None:
        """Do not begin it; what has begun goes on."""
        self._future.cancel()


def pool_context() -> multiprocessing.context.BaseContext:
    """How the workers are started: for values that they share with this process."""
    return multiprocessing.get_context("fork" if fork_is_safe() else "spawn")


_END: Any = object()


@contextlib.contextmanager
def _deaths_reported() -> Iterator[None]:
    """ChildProcessError, which a tool prints as its error, where a worker died."""
    try:
        yield
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process died: it was killed, most often because the memory of the machine "
            "(or of the job, or the container) ran out, or it could not start. Take fewer "
            "--workers, or give it more memory. The same command resumes from what was written"
        ) from None


def _begin(parent: int, start: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    # The parent ends its workers; a signal to the whole group must not reach them first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent)
    start(*arguments)
