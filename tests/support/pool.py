"""Processes that play the ranks of many small jobs, one job after another.

Starting ranks is what a multi-rank test costs: importing torch and megatron-core takes seconds. So
they are forked from a server that has imported both. Every job gets new ones: process groups that
a job leaves behind keep their threads, and hundreds of those slow a machine down.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
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

    def run(self, world_size: int, function: Callable, *arguments: object) -> list[Any]:
        """Results by rank. Raises RankError with the tracebacks of the ranks that failed."""
        with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
            meeting_point = f"file://{Path(folder) / 'rendezvous'}"
            ranks = []
            for rank in range(world_size):
                ours, theirs = self._context.Pipe()
                work = (theirs, rank, world_size, meeting_point, function, arguments)
                process = self._context.Process(target=_play, args=work, daemon=True)
                process.start()
                theirs.close()
                ranks.append((process, ours))
            try:
                answers = [_answer(rank, pipe) for rank, (_, pipe) in enumerate(ranks)]
            finally:
                for process, pipe in ranks:
                    pipe.close()
                    process.kill()
                    process.join()
        failures = [text for kind, text in answers if kind != "result"]
        if failures:
            raise RankError("\n".join(failures))
        return [value for _, value in answers]


def _answer(rank: int, pipe: Any) -> tuple[str, Any]:
    if not pipe.poll(TIMEOUT_SECONDS):
        return "hang", f"rank {rank} gave no answer in {TIMEOUT_SECONDS} s"
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return "death", f"rank {rank} died"


def _play(
    pipe: Any,
    rank: int,
    world_size: int,
    meeting_point: str,
    function: Callable,
    arguments: tuple[object, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    from equilibrium_mcore.parallel.launch import Place

    try:
        result = function(Place(rank, world_size, rank, meeting_point), *arguments)
        answer = ("result", result)
    except BaseException:
        answer = ("error", f"rank {rank}:\n{traceback.format_exc()}")
    # Plain pickling copies tensors; the pipe's own would share memory that ends with this process.
    pipe.send_bytes(pickle.dumps(answer))
    # Leaving in order would wait for ranks that may never come.
    pipe.close()
    os._exit(0)
