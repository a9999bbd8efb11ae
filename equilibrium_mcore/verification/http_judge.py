"""A judge over HTTP: a model that speaks OpenAI's chat protocol, asked twice for each pair."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.judges import HttpJudgeConfig
from equilibrium_mcore.processes.http_client import Client, ServerError
from equilibrium_mcore.verification.error_share import ErrorShare, TooManyErrorsError
from equilibrium_mcore.verification.pairwise import (
    Compared,
    Preference,
    Question,
    agreed,
    instructions,
    read_verdict,
    text_of,
)
from equilibrium_mcore.verification.scored import shown

PATH = "/v1/chat/completions"


class HttpJudge:
    """Compares answers. What it could not judge has the preference `error`, with the reason."""

    def __init__(self, config: HttpJudgeConfig) -> None:
        """Raises ConfigError where `key_variable` is not set."""
        self._config = config
        self._errors = ErrorShare(config.max_error_share, config.error_window, unit="pairs")
        self._client = Client(
            _base(config.url),
            timeout_seconds=config.timeout_seconds,
            attempts=config.attempts,
            pause_seconds=config.pause_seconds,
            headers=headers_of(config),
        )

    def __call__(self, questions: Sequence[Question]) -> list[Compared]:
        """A judgement of each, in their order. Answers that are the same are a tie, unasked.

        Raises TooManyErrorsError where more than `max_error_share` of the last `error_window` could
        not be judged.
        """
        asked = [q for q in questions if q.first != q.second]
        both = [one for question in asked for one in (question, question.swapped)]
        with ThreadPoolExecutor(max_workers=self._config.requests_at_once) as threads:
            replies = list(threads.map(self._reply, both))
        found = iter(map(_compared, replies[::2], replies[1::2]))
        compared = [Compared("tie") if q.first == q.second else next(found) for q in questions]
        self._count_errors(compared)
        return compared

    def _reply(self, question: Question) -> Preference | str:
        """What is said of one order, or in more than a word why nothing was."""
        try:
            answer = self._client.post(PATH, self._request(question))
        except ServerError as error:
            return _failed(error)
        try:
            reply = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return _failed(f"{self._config.url} answered {answer!r}, which is no chat completion")
        found = read_verdict(reply) if isinstance(reply, str) else None
        return found or _failed(f"no verdict in the reply {reply!r}")

    def _request(self, question: Question) -> dict[str, Any]:
        return {
            "model": self._config.model,
            "messages": [
                {"role": "system", "content": instructions(self._config.criterion)},
                {"role": "user", "content": text_of(question)},
            ],
            "temperature": 0,
            "max_tokens": self._config.max_tokens,
        }

    def _count_errors(self, compared: Sequence[Compared]) -> None:
        problem = self._errors.problem([one.preference == "error" for one in compared])
        if problem is not None:
            reasons = [one.reason for one in compared if one.preference == "error"]
            raise TooManyErrorsError(f"{problem}: the judge does not work. {reasons[0]}", compared)


_FAILED = "failed: "


def _failed(why: object) -> str:
    return _FAILED + shown(why)


def _compared(straight: str, swapped: str) -> Compared:
    for reply in (straight, swapped):
        if reply.startswith(_FAILED):
            return Compared("error", reason=reply.removeprefix(_FAILED))
    return agreed(straight, swapped)


def _base(url: str) -> str:
    """The server's address: the path of the protocol may stand after it, or its first part."""
    return url.rstrip("/").removesuffix(PATH).removesuffix("/v1")


def headers_of(config: HttpJudgeConfig) -> dict[str, str]:
    """With the server's key, if it wants one. Raises ConfigError where its variable is not set."""
    if config.key_variable is None:
        return {}
    key = os.environ.get(config.key_variable)
    if not key:
        raise ConfigError(
            f"judge.key_variable={config.key_variable!r}: this variable is not set; export it, or "
            "leave key_variable out where the server wants no key"
        )
    return {"Authorization": f"Bearer {key}"}
