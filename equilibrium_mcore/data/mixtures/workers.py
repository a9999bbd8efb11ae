"""Shards of a dataset in their order: made in this process, or ahead of time by several."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait

from equilibrium_mcore.data.mixtures.readers import Part
from equilibrium_mcore.data.mixtures.shards import Shard, ShardMaker, WorkSpec, read_shard
from equilibrium_mcore.processes.parents import end_with_parent
from equilibrium_mcore.processes.threads import fork_is_safe

POLL_SECONDS = 0.02
PARTS_AHEAD_PER_WORKER = 2


class ShardWorkers:
    """A pool that makes shards. Start it before threads and locks: its processes are then forked.

    After threads they are fresh interpreters: a fork would wait for threads that it does not have.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._turn = 0
        if workers > 1:
            context = multiprocessing.get_context("fork" if fork_is_safe() else "spawn")
            # Jobs of a turn up to this one are to stop: the dataset has given enough.
            self._stopped_turn = context.Value("q", 0)
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=context,
                initializer=_start_worker,
                initargs=(os.getpid(), self._stopped_turn),
            )
            for job in [self._pool.submit(os.getpid) for _ in range(workers)]:
                job.result()

    def __enter__(self) -> ShardWorkers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._pool is not None:
            self._stopped_turn.value = self._turn
            self._pool.shutdown(wait=True, cancel_futures=True)

    def shards(self, spec: WorkSpec, parts: list[tuple[int, Part]]) -> Iterator[Shard]:
        """The shards of these (number, part), in order. Closing the iterator stops the work."""
        if self._pool is None:
            maker = ShardMaker(spec)
            for number, part in parts:
                yield from maker.make(number, part)
            return
        self._turn += 1
        waiting, jobs = deque(parts), deque()
        try:
            while waiting or jobs:
                while waiting and len(jobs) < self._workers * PARTS_AHEAD_PER_WORKER:
                    number, part = waiting.popleft()
                    job = self._pool.submit(_make_in_worker, self._turn, spec, number, part)
                    jobs.append((number, job))
                number, job = jobs.popleft()
                yield from _as_they_come(spec, number, job)
        finally:
            self._stopped_turn.value = self._turn
            for _, job in jobs:
                job.cancel()
            wait([job for _, job in jobs])


def _as_they_come(spec: WorkSpec, part: int, job: Future) -> Iterator[Shard]:
    """The shards of one part as its worker finishes them."""
    number = 0
    while True:
        finished = job.done()
        shard = read_shard(spec.folder, part, number)
        if shard is None and finished:
            job.result()  # raises what the worker raised
            raise RuntimeError(f"{spec.folder}: shard {number} of part {part} was not written")
        if shard is None:
            wait([job], timeout=POLL_SECONDS)
            continue
        yield shard
        number += 1
        if shard.facts.last:
            job.result()
            return


_stopped_turn = None
_makers: dict[tuple, ShardMaker] = {}


def _start_worker(parent: int, stopped_turn) -> None:
    """Note the shared number, and leave when the parent is gone: a killed parent cannot say so."""
    global _stopped_turn
    _stopped_turn = stopped_turn
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent(parent)


def _make_in_worker(turn: int, spec: WorkSpec, number: int, part: Part) -> None:
    def stopped() -> bool:
        return _stopped_turn.value >= turn

    if stopped():
        return
    key = (turn, str(spec.folder))
    if key not in _makers:
        _makers.clear()
        _makers[key] = ShardMaker(spec)
    for _ in _makers[key].make(number, part, stopped):
        if stopped():
            return
