"""Shards of a dataset in their order: made in this process, or ahead of time by several."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait

from equilibrium_mcore.corpus.mixtures.parts import SourcePart
from equilibrium_mcore.corpus.mixtures.shards import Shard, ShardMaker, WorkSpec, read_shard
from equilibrium_mcore.corpus.process_pool import (
    deaths_told,
    leave_with_parent,
    pool_context,
    start_pool,
)

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
            # Jobs of a turn up to this one are to stop: the dataset has given enough. No lock: a
            # worker that is killed would keep it.
            self._stopped_turn = pool_context().Value("q", 0, lock=False)
            self._pool = start_pool(workers, _start_worker, os.getpid(), self._stopped_turn)

    def __enter__(self) -> ShardWorkers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._pool is not None:
            self._stopped_turn.value = self._turn
            self._pool.shutdown(wait=True, cancel_futures=True)

    def shards(self, spec: WorkSpec, parts: list[tuple[int, SourcePart]]) -> Iterator[Shard]:
        """The shards of these (number, part), in order. Closing the iterator stops the work.

        Raises ChildProcessError where a worker dies; the shards that are whole are used again.
        """
        if self._pool is None:
            maker = ShardMaker(spec)
            for number, part in parts:
                yield from maker.make(number, part)
            return
        self._turn += 1
        with deaths_told():
            yield from self._in_pool(self._pool, spec, parts)

    def _in_pool(
        self, pool: ProcessPoolExecutor, spec: WorkSpec, parts: list[tuple[int, SourcePart]]
    ) -> Iterator[Shard]:
        waiting, jobs = deque(parts), deque()
        try:
            while waiting or jobs:
                while waiting and len(jobs) < self._workers * PARTS_AHEAD_PER_WORKER:
                    number, part = waiting.popleft()
                    job = pool.submit(_make_in_worker, self._turn, spec, number, part)
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
    """Note the shared number, and leave when the parent is gone."""
    global _stopped_turn
    _stopped_turn = stopped_turn
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    leave_with_parent(parent)


def _make_in_worker(turn: int, spec: WorkSpec, number: int, part: SourcePart) -> None:
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
