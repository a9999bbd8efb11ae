"""Runs functions on ranks of this machine, forked by a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import util
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from equilibrium_mcore.parallel.rank_host import serve
from equilibrium_mcore.parallel.rank_job import Job, JobOutcome, RankError, TimeLimit, pack
from equilibrium_mcore.processes.stacks import STACKS_SIGNAL
from equilibrium_mcore.processes.threads import fork_is_safe, threads_per_rank

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, STACKS_SIGNAL)
CLOSE_SECONDS = 10.0


class RankServer:
    """Starts the ranks of one job after another: `server.run(4, work)`.

    A helper process forks them. It is itself forked from this one, with all that is imported, as
    long as nothing here has started threads; later it is a fresh interpreter, which imports again.
    So make it before the first tensor operation. The helper kills the ranks and removes `folder`
    when this process closes it, or ends in whatever way.
    """

    def __init__(self, *, prefix: str = "equilibrium_ranks_", preload: Sequence[str] = ()) -> None:
        """`preload` names modules that the helper imports before it forks ranks."""
        self._folders: list[Path] = []  # that of the helper, once it was heard of
        self._preload, self._jobs = tuple(preload), 0
        self._handed_on: set[int] = set()  # signals, to the ranks of the present job
        fresh = not fork_is_safe()
        context = multiprocessing.get_context("spawn" if fresh else "fork")
        self._connection, theirs = context.Pipe()
        self._host = context.Process(
            target=serve,
            args=(theirs, None if fresh else self._connection),
            kwargs={"prefix": prefix, "asker": os.getpid(), "fresh": fresh},
        )
        self._host.start()
        theirs.close()
        # Before multiprocessing waits for its children, when this process ends.
        self.close = util.Finalize(
            self, _close, (self._connection, self._host, self._folders), exitpriority=100
        )

    @property
    def folder(self) -> Path:
        """Temporary, and the helper's: whatever ends this process, somebody removes it.

        Raises OSError where it cannot be made, and RankError when the helper has ended.
        """
        if not self._folders:
            with self._lifeline():
                told = self._connection.recv()
            if isinstance(told, OSError):
                self.close()
                raise told
            self._folders.append(told)
        return self._folders[0]

    def __enter__(self) -> RankServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether it takes jobs: it does until it is closed, or its helper ended."""
        return self.close.still_active() and self._host.is_alive()

    def run(
        self,
        world_size: int,
        work: Callable[..., Any],
        *arguments: object,
        limit: TimeLimit | None = None,
        forward_signals: bool = False,
    ) -> list[Any]:
        """Call `work(rank_info, *arguments)` in every rank; what it returned, by rank.

        The first rank that fails ends the others within a second. With `forward_signals` this
        process hands the signals that ask to save and stop to its ranks; else they end it, and
        the ranks with it.

        Args:
            work: a function of a module, or a functools.partial of one; what it takes and returns
                is pickled.
            limit: how long the ranks may take; None for as long as they want.

        Raises RankError with the first rank's traceback, or with every rank's stack when the
        limit is over.
        """
        pickled, module = pack(work, arguments)
        self._jobs += 1
        job = Job(
            world_size=world_size,
            work=pickled,
            modules=(*self._preload, module),
            folder=self.folder / f"job_{self._jobs}",
            threads=threads_per_rank(world_size),
            limit=limit,
        )
        with self._lifeline():
            self._connection.send(job)
            with self._forwarding() if forward_signals else contextlib.nullcontext():
                outcome: JobOutcome = self._connection.recv()
        if outcome.failure is not None:
            stopped_by = outcome.signalled if outcome.signalled in self._handed_on else 0
            raise RankError(
                outcome.failure,
                refused=outcome.refused,
                told=outcome.told,
                stopped_by=stopped_by,
            )
        return [pickle.loads(result) for result in outcome.results]

    @contextlib.contextmanager
    def _lifeline(self) -> Iterator[None]:
        """Inside, whatever is raised ends the helper; its end from outside is a RankError."""
        try:
            yield
        except (EOFError, ConnectionError):
            self.close()
            raise RankError(
                "the process that starts the ranks was ended from outside, and they ended with it"
            ) from None
        except BaseException:  # such as Ctrl-C: the job is over too
            self.close()
            raise

    @contextlib.contextmanager
    def _forwarding(self) -> Iterator[None]:
        self._handed_on.clear()

        def forward(number: int, frame: object) -> None:
            self._handed_on.add(number)
            if number == signal.SIGINT:  # a second one ends this process, and the ranks with it
                signal.signal(number, signal.SIG_DFL)
            self._connection.send(number)

        def pause(number: int, frame: object) -> None:  # Ctrl-Z, which ranks do not see
            self._connection.send(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._connection.send(signal.SIGCONT)

        handlers = dict.fromkeys(FORWARDED_SIGNALS, forward) | {signal.SIGTSTP: pause}
        previous = {number: signal.signal(number, what) for number, what in handlers.items()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _close(connection: Connection, host: Any, folders: Sequence[Path]) -> None:
    """Let the helper end, with its ranks, and see that its folder is gone."""
    connection.close()
    host.join(CLOSE_SECONDS)
    if host.is_alive():
        host.kill()
        host.join()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
