"""Shards of a dataset in their order: made in this process, or ahead of time by several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from equilibrium_mcore.corpus.mixtures.parts import SourcePart
from equilibrium_mcore.corpus.mixtures.shards import Shard, ShardMaker, WorkSpec, read_shard
from equilibrium_mcore.processes.ordered_pool import Job, OrderedPool, pool_context

POLL_SECONDS = 0.02
PARTS_AHEAD_PER_WORKER = 2


class ShardWorkers:
    """A pool that makes shards. Start it before threads and locks, as an `OrderedPool`."""

    def __init__(self, workers: int) -> None:
        self._stack = contextlib.ExitStack()
        self._pool: OrderedPool | None = None
        self._turn = 0
        if workers > 1:
            # Jobs of a turn up to this one are to stop: the dataset has given enough. No lock: a
            # worker that is killed would keep it.
            self._stopped_turn = pool_context().Value("q", 0, lock=False)
            pool = OrderedPool(
                workers,
                ahead_per_worker=PARTS_AHEAD_PER_WORKER,
                start=_start_worker,
                arguments=(self._stopped_turn,),
            )
            self._pool = self._stack.enter_context(pool)

    def __enter__(self) -> ShardWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._stopped_turn.value = self._turn
        self._stack.__exit__(*error)

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
        jobs = self._pool.in_order(_make_in_worker, parts, self._turn, spec)
        try:
            for (number, _), job in jobs:
                yield from _as_they_come(spec, number, job)
        finally:
            self._stopped_turn.value = self._turn  # before those under way are waited for
            jobs.close()


def _as_they_come(spec: WorkSpec, part: int, job: Job) -> Iterator[Shard]:
    """The shards of one part as its worker finishes them."""
    number = 0
    while True:
        finished = job.is_done()
        shard = read_shard(spec.folder, part, number)
        if shard is None and finished:
            job.result()  # raises what the worker raised
            raise RuntimeError(f"{spec.folder}: shard {number} of part {part} was not written")
        if shard is None:
            job.wait(POLL_SECONDS)
            continue
        yield shard
        number += 1
        if shard.facts.last:
            job.result()
            return


_stopped_turn = None
_makers: dict[tuple, ShardMaker] = {}


def _start_worker(stopped_turn) -> None:
    """Note the shared number."""
    global _stopped_turn
    _stopped_turn = stopped_turn
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _make_in_worker(task: tuple[int, SourcePart], turn: int, spec: WorkSpec) -> None:
    number, part = task

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
