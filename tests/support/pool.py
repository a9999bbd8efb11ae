"""A pool of processes that play the ranks of many small jobs, one job after another.

Starting ranks is what a multi-rank test costs, so the ranks are forked once, from a server that has
imported torch and megatron-core, and every test runs its function in the first N of them.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 180


class RankError(AssertionError):
    """A rank failed; the message holds every failing rank's traceback."""


class RankPool:
    """Runs `function(place, *arguments)` on N ranks and gives back their results in order."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.support.preload"])
        self._workers: list[tuple[Any, Any]] = []

    def run(self, world_size: int, function: Callable, *arguments: object) -> list[Any]:
        """Results by rank. Raises RankError with tracebacks, and renews the pool, on failure."""
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
            meeting_point = f"file://{Path(folder) / 'rendezvous'}"
            for rank in range(world_size):
                self._workers[rank][1].send((rank, world_size, meeting_point, function, arguments))
            answers = [self._answer(rank) for rank in range(world_size)]
        failures = [text for kind, text in answers if kind != "result"]
        if failures:
            self.close()
            raise RankError("\n".join(failures))
        return [value for _, value in answers]

    def _start(self) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _answer(self, rank: int) -> tuple[str, Any]:
        _, pipe = self._workers[rank]
        if not pipe.poll(TIMEOUT_SECONDS):
            return "hang", f"rank {rank} gave no answer in {TIMEOUT_SECONDS} s"
        try:
            return pipe.recv()
        except EOFError:
            return "death", f"rank {rank} died"

    def close(self) -> None:
        """End all ranks; the next `run` starts new ones."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()


def _serve(pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    from equilibrium_mcore.parallel import process_groups
    from equilibrium_mcore.parallel.launch import Place

    while True:
        try:
            rank, world_size, meeting_point, function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            result = function(Place(rank, world_size, rank, meeting_point), *arguments)
            pipe.send(("result", result))
        except BaseException:
            pipe.send(("error", f"rank {rank}:\n{traceback.format_exc()}"))
        finally:
            process_groups.destroy()
