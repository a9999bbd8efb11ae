"""The engines that answer prompts: the training modules, or a server with their weights."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from equilibrium_mcore.generation.engine import OwnEngine
from equilibrium_mcore.generation.http_engine import HttpEngine
from equilibrium_mcore.generation.interface import Engine, Request, Rollout, Sampling
from equilibrium_mcore.hugging_face.stream import stream_weights
from equilibrium_mcore.processes.http_client import Client
from equilibrium_mcore.training.setup import Run


def engine_of(run: Run) -> Engine:
    """The engine that `rollout.engine` names."""
    return ENGINES[run.config.rollout.engine](run)


def own_engine(run: Run) -> Engine:
    """The engine over the run's chunks, in its layout: no weight moves."""
    return OwnEngine.of(run, rows_at_once=run.config.rollout.rows)


class ServedEngine:
    """A server that is sent the run's weights whenever they are others. See Engine.

    The server counts them by numbers of this process's own, from a random one on: a server that
    another run, or an earlier process of this one, has given weights is found out.
    """

    def __init__(self, run: Run) -> None:
        http = run.config.rollout.http
        assert http is not None  # by a rule
        client = Client(
            http.url,
            timeout_seconds=http.timeout_seconds,
            attempts=http.attempts,
            pause_seconds=http.pause_seconds,
        )
        self._run = run
        self._engine = HttpEngine(
            client,
            model=http.model,
            vocab_size=run.config.model.vocab_size,
            connections=http.connections,
        )
        self._number = secrets.randbits(40)  # of rank 0, which alone talks
        self._sent: int | None = None

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, version: int = 0
    ) -> list[Rollout]:
        """See Engine; the weights as they are now are those of `version`. Collective.

        Raises what `HttpEngine` does.
        """
        if version != self._sent:
            self._sent = None
            self._number += 1
            stream_weights(self._run.chunks, self._run.config, self._engine, version=self._number)
            self._sent = version
        found = self._engine.generate(requests, sampling, version=self._number)
        return [replace(rollout, version=version) for rollout in found]


ENGINES: dict[str, Callable[[Run], Engine]] = {"own": own_engine, "http": ServedEngine}
