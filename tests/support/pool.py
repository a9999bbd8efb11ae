"""Ranks of many small jobs, one job after another, from the package's own rank server.

Starting ranks is what a multi-rank test costs: importing torch and megatron-core takes seconds. So
they are forked from a helper that has imported both. Every job gets new ones: process groups that
a job leaves behind keep their threads, and hundreds of those slow a machine down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from equilibrium_mcore.parallel.rank_job import RankError, TimeLimit
from equilibrium_mcore.parallel.rank_server import RankServer

__all__ = ["RankError", "RankPool"]

# For a hang alone: a job takes seconds, and a slow or busy machine some minutes.
LIMIT = TimeLimit(minutes=10, phase="ranks of a test", raised_by="tests/support/pool.py")


class RankPool:
    """Runs `function(place, *arguments)` on N ranks and gives back their results in order."""

    def __init__(self) -> None:
        self._server: RankServer | None = None

    @property
    def server(self) -> RankServer:
        """The server; another one when the last has ended."""
        if self._server is None or not self._server.running:
            self._server = RankServer(prefix="ranks_", preload=["tests.support.preload"])
        return self._server

    def run(self, world_size: int, function: Callable, *arguments: object) -> list[Any]:
        """Results by rank. Raises RankError: a rank's traceback, or where ranks are that hang."""
        return self.server.run(world_size, function, *arguments, limit=LIMIT)

    def close(self) -> None:
        """End the helper."""
        if self._server is not None:
            self._server.close()
