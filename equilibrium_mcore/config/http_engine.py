"""Where the server is that answers prompts in place of the training modules."""

from __future__ import annotations

from equilibrium_mcore.config.section import (
    NonNegativeFloat,
    PositiveFloat,
    Section,
    SmallInt,
    setting,
)


class HttpEngineConfig(Section):
    """A server of OpenAI's completions that takes weights: docs/reference/http_engine.md."""

    url: str = setting(..., "of the server, e.g. http://host:8000")
    model: str = setting("policy", "the server's name of the model")
    connections: SmallInt = setting(32, "requests that are under way at once")
    timeout_seconds: PositiveFloat = setting(600.0, "longest wait for an answer to a request")
    attempts: SmallInt = setting(
        4, "how often a request is sent in all, where none is answered or the server is busy"
    )
    pause_seconds: NonNegativeFloat = setting(
        1.0, "pause before a request is sent again; doubles each time"
    )
